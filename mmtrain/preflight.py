"""What can be known of a stage before anything starts: its recipe, base model, tokenizer and shards."""

from mmtrain.config.check import check
from mmtrain.config.errors import ConfigError
from mmtrain.config.schema import Model, Recipe
from mmtrain.data.index import open_folder
from mmtrain.data.tokenizer import Tokenizer
from mmtrain.model.build import parameter_counts
from mmtrain.mup.scales import base_model_config
from mmtrain.parallel.mesh import Mesh


def preflight(recipe: Recipe, world_size: int | None) -> None:
    """Check `recipe` without a model, a process group or a file written; of each shard's index the first line is read.

    world_size   ranks, or None where their number is not known yet.
    ConfigError, DataError: the stage cannot run.
    """
    check(recipe, world_size)
    base_model_config(recipe.model, recipe.mup.base)
    tokenizer = Tokenizer(recipe.data.tokenizer, recipe.data.chat_template)
    check_vocabulary(recipe.model, tokenizer)
    held_out = recipe.eval.sources.values() if recipe.eval.every else ()
    for source in (*recipe.data.sources.values(), *held_out):
        if source.weight > 0:
            open_folder(source.shards, tokenizer)


def summary(recipe: Recipe, world_size: int) -> str:
    """What a recipe that passed on `world_size` ranks amounts to, in two lines."""
    data, layout = recipe.data, recipe.parallel
    mesh = Mesh(world_size, layout.tensor, layout.expert)
    counts = parameter_counts(recipe.model)["all"]
    parts = data.global_batch // (data.micro_batch * mesh.data)
    return (
        f"{recipe.name}: recipe, tokenizer and shards pass for {mesh}, ZeRO-{layout.zero_stage}\n"
        f"{counts.total:,} parameters, {counts.active:,} active for a token; a step of {data.global_batch} packs of "
        f"{data.sequence_length} positions is {parts} micro-batch{'es' if parts > 1 else ''} of {data.micro_batch} on "
        "each data rank"
    )


def check_vocabulary(model: Model, tokenizer: Tokenizer) -> None:
    """Raise ConfigError where the tokenizer has ids that the model has no row for."""
    if tokenizer.vocab_size > model.decoder.vocab_size:
        raise ConfigError(
            f"model.decoder.vocab_size={model.decoder.vocab_size}: tokenizer {tokenizer.path} with its special tokens "
            f"has {tokenizer.vocab_size} entries; set model.decoder.vocab_size={tokenizer.vocab_size}"
        )
