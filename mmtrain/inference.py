"""A checkpoint as a model that answers: one process without an engine, or tensor ranks. No optimizer."""

from collections.abc import Callable
from pathlib import Path

import torch

from mmtrain.config.errors import CheckpointError, ConfigError
from mmtrain.config.load import load
from mmtrain.config.schema import Model, Parallel, Recipe
from mmtrain.data.record import Batch
from mmtrain.data.tokenizer import Tokenizer
from mmtrain.model.attention import KVCache
from mmtrain.model.balance import RouterState
from mmtrain.model.vlm import VisionLanguageModel
from mmtrain.mup.scales import base_model_config, forward_scales
from mmtrain.parallel.environment import discover
from mmtrain.run.reader import Reader, open_weights
from mmtrain.run.saver import RECIPE


class Inference:
    """A checkpoint's model, tokenizer and recipe. `open_inference` makes it."""

    def __init__(
        self,
        reader: Reader,
        recipe: Recipe,
        model: VisionLanguageModel,
        device: torch.device,
        rank: int,
        close: Callable[[], None],
    ) -> None:
        self.folder, self.step, self.recipe = reader.folder, reader.manifest.step, recipe
        self.tokenizer = Tokenizer(reader.folder, recipe.data.chat_template)
        if self.tokenizer.vocab_size > recipe.model.decoder.vocab_size:
            raise CheckpointError(
                f"{reader.folder}: its tokenizer has {self.tokenizer.vocab_size} entries, its model rows for "
                f"{recipe.model.decoder.vocab_size}; the folder was put together from two runs"
            )
        self.rank, self.close = rank, close
        self._model, self._device = model.eval(), device
        one = torch.ones((), device=device)
        routers = _router_state(reader, recipe.model, device)
        self._inputs = routers.inputs(one, dict.fromkeys(routers.shares, one))

    @torch.no_grad()
    def forward(self, batch: Batch, logits_at: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Logits [n, V] at flat positions `logits_at` [n] of the batch; see VisionLanguageModel.forward.

        On several ranks all of them call it with the same batch.
        """
        return self._model(batch.to(self._device), self._inputs, logits_at.to(self._device), cache)


def open_inference(path: Path, tensor: int = 1) -> Inference:
    """The checkpoint at `path` (a step folder, or a run folder: its newest good one), in fp32.

    tensor   ranks that share the matrices; the job must have exactly as many processes.
    ConfigError, CheckpointError, DataError: the layout does not fit, the checkpoint or its tokenizer is damaged.
    """
    place = discover()
    if place.world != tensor:
        raise ConfigError(
            f"{place.world} processes with --tensor {tensor}: an evaluation runs on its tensor ranks and no others; "
            f"start it with torchrun --nproc-per-node {tensor}, or give --tensor {place.world}"
        )
    if tensor > 1:
        return _on_ranks(path, tensor)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reader = open_weights(path)
    recipe = load(reader.folder / RECIPE)
    with device:
        model = _build(recipe)
    _check_shapes(reader, model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = reader.read(name)
            parameter.zero_()  # rows that pad the vocabulary are in no checkpoint
            parameter[: value.shape[0]].copy_(value)
    return Inference(reader, recipe, model, device, 0, lambda: None)


def _on_ranks(path: Path, tensor: int) -> Inference:
    """This rank's part of the model."""
    from mmtrain.parallel.groups import connect  # the engine's libraries take seconds, and one process needs none
    from mmtrain.parallel.materialize import fill
    from mmtrain.parallel.tensor import shard

    groups = connect(Parallel(tensor=tensor))
    reader = open_weights(path, groups)
    recipe = load(reader.folder / RECIPE)
    with torch.device("meta"):
        model = _build(recipe)
    _check_shapes(reader, model)
    fill(model, shard(model, groups), lambda name, box: reader.read(name, box=box), groups.device)
    return Inference(reader, recipe, model, groups.device, groups.rank, groups.close)


def _build(recipe: Recipe) -> VisionLanguageModel:
    """The model on the current device, without values."""
    base = base_model_config(recipe.model, recipe.mup.base)
    return VisionLanguageModel(recipe.model, forward_scales(recipe.model, base, recipe.mup))


def _check_shapes(reader: Reader, model: VisionLanguageModel) -> None:
    """CheckpointError unless the checkpoint holds every parameter of its own recipe's model, in its shape."""
    stored = reader.shapes()
    for name, parameter in model.named_parameters():
        found, wanted = stored.get(name), tuple(parameter.shape)
        rows = (
            wanted[0]
            if not name.startswith(("decoder.embedding.", "decoder.head."))
            else model.config.decoder.vocab_size
        )
        if found != (rows, *wanted[1:]):
            raise CheckpointError(
                f"{reader.folder}: {name} is {'missing' if found is None else list(found)}, the model of its "
                f"{RECIPE} has {[rows, *wanted[1:]]}; the folder was put together from two runs"
            )


def _router_state(reader: Reader, model: Model, device: torch.device) -> RouterState:
    """What the routers had learnt beside their weights."""
    state = RouterState.first(model, device)
    saved = reader.manifest.state.routers
    if saved.keys() != state.shares.keys():
        raise CheckpointError(
            f"{reader.folder}: router state of {sorted(saved) or 'no part'}, the model has experts in "
            f"{sorted(state.shares) or 'no part'}; the folder was put together from two runs"
        )
    state.load(saved)
    return state
