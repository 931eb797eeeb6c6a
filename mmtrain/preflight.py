"""What can be known of a stage before anything starts: its recipe, base model, tokenizer and shards."""

from mmtrain.config.check import check
from mmtrain.config.errors import ConfigError
from mmtrain.config.schema import Model, Recipe
from mmtrain.data.index import open_folder
from mmtrain.data.tokenizer import Tokenizer
from mmtrain.mup.scales import base_model_config


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


def check_vocabulary(model: Model, tokenizer: Tokenizer) -> None:
    """Raise ConfigError where the tokenizer has ids that the model has no row for."""
    if tokenizer.vocab_size > model.decoder.vocab_size:
        raise ConfigError(
            f"model.decoder.vocab_size={model.decoder.vocab_size}: tokenizer {tokenizer.path} with its special tokens "
            f"has {tokenizer.vocab_size} entries; set model.decoder.vocab_size={tokenizer.vocab_size}"
        )
