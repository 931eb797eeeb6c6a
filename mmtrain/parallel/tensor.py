"""Cuts a model on the meta device for this rank: layers swapped by type, experts cut, a layout by name.

| what                      | treatment                                                                       |
|---------------------------|---------------------------------------------------------------------------------|
| attention                 | whole heads: q, k, v by output, out by input; gains of q and k norms are shared, |
|                           | or cut like the heads where a norm spans all of them                             |
| MLP                       | gate and up by output, down by input                                            |
| experts                   | by expert over the expert group; hidden width over the tensor group             |
| token embedding and head  | by row of the padded vocabulary                                                 |
| everything else           | whole on every tensor rank, with equal gradients                                |
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import nn

from mmtrain.config.errors import ConfigError
from mmtrain.model.attention import Attention
from mmtrain.model.experts import Experts
from mmtrain.model.loss import LanguageHead
from mmtrain.model.mlp import Mlp
from mmtrain.model.norm import RmsNorm
from mmtrain.parallel.box import Box
from mmtrain.parallel.collectives import enter, gather_split, reduce
from mmtrain.parallel.expert import spread
from mmtrain.parallel.groups import Groups
from mmtrain.parallel.head import VocabularyHead
from mmtrain.parallel.layers import ColumnLinear, RowLinear, SharedGainNorm, Split, SplitNorm, VocabularyEmbedding


@dataclass(frozen=True)
class Placement:
    """Where this rank's tensor lies in the global one.

    shape  of the global tensor, without the padding of the vocabulary.
    box    of this rank, in the padded tensor: its shape is that of the parameter.
    """

    shape: tuple[int, ...]
    box: Box

    @cached_property
    def real(self) -> Box:
        """The box without padding; a prefix of the parameter's elements, maybe empty."""
        return self.box.clip(self.shape)


Layout = dict[str, Placement]


def parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by canonical name, each once: a tied head appears as the embedding."""
    return model.named_parameters()


def shard(model: nn.Module, groups: Groups) -> Layout:
    """Swap and cut the layers of `model` (on the meta device) for this rank; return where its parameters lie.

    ConfigError where the tensor or expert size does not divide what it must.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters(model)}
    real = {name: _without_padding(name, shape, model) for name, shape in shapes.items()}
    boxes = {name: Box.whole(shape) for name, shape in shapes.items()}
    cut_by_tensor: set[str] = set()
    cut = partial(_cut, boxes, cut_by_tensor, groups)
    if groups.mesh.expert > 1:
        spread(model, groups)
    for name, module in list(model.named_modules()):
        for kind, treatment in PLAN:
            if isinstance(module, kind):
                treatment(model, name, module, groups, cut)
    layout = {name: Placement(real[name], box) for name, box in boxes.items()}
    for name, parameter in parameters(model):
        if tuple(parameter.shape) != layout[name].box.shape:
            raise AssertionError(f"{name}: the cut made {tuple(parameter.shape)}, its box is {layout[name].box.shape}")
        parameter.tensor_cut = name in cut_by_tensor
        parameter.model_parallel = parameter.tensor_cut or ".experts." in name
    return layout


def _without_padding(name: str, shape: tuple[int, ...], model: nn.Module) -> tuple[int, ...]:
    """Shape of a parameter as a checkpoint holds it: rows of the vocabulary's padding are nobody's."""
    if name in ("decoder.embedding.weight", "decoder.head.weight"):
        return (model.config.decoder.vocab_size, *shape[1:])
    return shape


def _cut(
    boxes: dict[str, Box],
    cut_by_tensor: set[str],
    groups: Groups,
    name: str,
    tensor_dim: int | None,
    experts: bool = False,
) -> Box:
    """Narrow the box of parameter `name` along `tensor_dim`, and along dimension 0 for experts."""
    box = boxes[name]
    if experts:
        box = box.cut(0, groups.mesh.expert_rank(groups.rank), groups.mesh.expert)
    if tensor_dim is not None and groups.mesh.tensor > 1:
        box = box.cut(tensor_dim, groups.tensor_rank, groups.mesh.tensor)
        cut_by_tensor.add(name)
    boxes[name] = box
    return box


def _divides(groups: Groups, name: str, what: str, count: int) -> None:
    if count % groups.mesh.tensor:
        raise ConfigError(f"parallel.tensor = {groups.mesh.tensor} does not divide the {count} {what} of {name}")


Cut = Callable[..., Box]


def _swap_linear(model: nn.Module, name: str, column: bool, groups: Groups, cut: Cut) -> None:
    """Replace the linear layer `name` by a column- or row-parallel one."""
    old = model.get_submodule(name)
    bias = old.bias is not None
    kind = ColumnLinear if column else RowLinear
    with torch.device("meta"):
        new = kind(old.in_features, old.out_features, bias, groups.tensor)
    _replace(model, name, new)
    cut(f"{name}.weight", 0 if column else 1)
    if bias and column:
        cut(f"{name}.bias", 0)


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _enter_inputs(names: tuple[str, ...], groups: Groups, module: nn.Module, args: tuple, kwargs: dict):
    """Pre-forward hook: the tensors that are split work's inputs sum their gradients over the group."""
    into = gather_split if module.split.on else enter
    args = (into(args[0], groups.tensor), *args[1:])
    return args, {
        key: enter(value, groups.tensor) if key in names and value is not None else value
        for key, value in kwargs.items()
    }


def _cut_attention(model: nn.Module, name: str, module: Attention, groups: Groups, cut: Cut) -> None:
    if groups.mesh.tensor == 1:
        return
    _divides(groups, name, "query heads", module.q.out_features // module.head_dim)
    _divides(groups, name, "key/value heads", module.k.out_features // module.head_dim)
    for child in ("q", "k", "v"):
        _swap_linear(model, f"{name}.{child}", True, groups, cut)
    _swap_linear(model, f"{name}.out", False, groups, cut)
    for child in ("q_norm", "k_norm"):
        norm = getattr(module, child)
        if isinstance(norm, RmsNorm) and module.norm_whole:
            weight = nn.Parameter(torch.empty(cut(f"{name}.{child}.weight", 0).shape, device="meta"))
            setattr(module, child, SplitNorm(weight, norm.eps, groups.tensor))
        elif isinstance(norm, RmsNorm):
            setattr(module, child, SharedGainNorm(norm, groups.tensor))
    module.split = Split(groups.tensor)
    module.register_forward_pre_hook(partial(_enter_inputs, ("memory",), groups), with_kwargs=True)


def _cut_mlp(model: nn.Module, name: str, module: Mlp, groups: Groups, cut: Cut) -> None:
    if groups.mesh.tensor == 1:
        return
    _divides(groups, name, "hidden units", module.up.out_features)
    for child in ("up", "gate"):
        if getattr(module, child) is not None:
            _swap_linear(model, f"{name}.{child}", True, groups, cut)
    _swap_linear(model, f"{name}.down", False, groups, cut)
    module.split = Split(groups.tensor)
    module.register_forward_pre_hook(partial(_enter_inputs, (), groups), with_kwargs=True)


def _cut_experts(model: nn.Module, name: str, module: Experts, groups: Groups, cut: Cut) -> None:
    _divides(groups, name, "hidden units of an expert", module.up.shape[1])
    dims = {"up": 1, "gate": 1, "up_bias": 1, "down": 2, "down_bias": None}
    for child, dim in dims.items():
        parameter = getattr(module, child)
        if parameter is not None:
            box = cut(f"{name}.{child}", dim, experts=True)
            setattr(module, child, nn.Parameter(torch.empty(box.shape, device="meta")))
    if groups.mesh.tensor > 1:
        module.enter = partial(enter, group=groups.tensor)
        module.reduce = partial(reduce, group=groups.tensor)


def _cut_embedding(model: nn.Module, name: str, module: nn.Embedding, groups: Groups, cut: Cut) -> None:
    if groups.mesh.tensor == 1:
        return
    _divides(groups, name, "rows", module.num_embeddings)
    with torch.device("meta"):
        _replace(model, name, VocabularyEmbedding(module.num_embeddings, module.embedding_dim, groups.tensor))
    cut(f"{name}.weight", 0)


def _cut_head(model: nn.Module, name: str, module: LanguageHead, groups: Groups, cut: Cut) -> None:
    if groups.mesh.tensor == 1:
        return
    if model.config.decoder.tied:
        weight = model.decoder.embedding.weight  # cut already: the embedding comes first in the plan's order
    else:
        weight = nn.Parameter(torch.empty(cut(f"{name}.weight", 0).shape, device="meta"))
    _replace(model, name, VocabularyHead(module, weight, groups.tensor))


PLAN: tuple[tuple[type[nn.Module], Callable[..., None]], ...] = (
    (Attention, _cut_attention),
    (Mlp, _cut_mlp),
    (Experts, _cut_experts),
    (nn.Embedding, _cut_embedding),
    (LanguageHead, _cut_head),
)
"""Module type -> how it is cut."""
