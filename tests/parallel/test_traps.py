"""Each remedy, taken out: the numbers must then differ from plain PyTorch's, or the engine must refuse.

The table in mmtrain/parallel/README.md says which trap each case belongs to. The ranks of a layout start once; a case
replaces one remedy, takes one step, and puts it back.
"""

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch

from mmtrain.config.errors import ConfigError
from mmtrain.config.schema import Parallel
from mmtrain.model.experts import Experts, identity
from mmtrain.parallel import collectives, engine, expert, groups, layers, marker, sequence, tensor, zero_config
from mmtrain.parallel.groups import Mpu, connect
from tests import dist, tiny
from tests.parallel import compare, harness

BROKEN = 1e-4
"""A difference that no rounding explains: ten times the rule's tolerance."""


@contextlib.contextmanager
def private_gains() -> Iterator[None]:
    """11: the gains of q and k norms, used by this rank's heads alone."""
    with mock.patch.object(tensor, "SharedGainNorm", lambda norm, group: norm):
        yield


@contextlib.contextmanager
def split_inputs() -> Iterator[None]:
    """11: no sum of gradients in front of attention and MLP."""
    with mock.patch.object(tensor, "enter", lambda x, group: x):
        yield


@contextlib.contextmanager
def summed_router_losses() -> Iterator[None]:
    """11: the sum on the parameter instead of the tensor: the router losses' part is then counted once a rank."""
    shard = tensor.shard

    def wrong(model, groups_):
        layout = shard(model, groups_)
        for module in model.modules():
            if type(module).__name__ == "Router":
                module.register_forward_pre_hook(lambda m, args: (collectives.enter(args[0], groups_.tensor),))
        return layout

    with mock.patch.object(engine, "shard", wrong):
        yield


@contextlib.contextmanager
def gains_of_own_positions() -> Iterator[None]:
    """15: gradients of norms in the residual stream from this rank's positions alone."""
    with mock.patch.object(engine.Engine, "_join_runs", lambda self: None):
        yield


@contextlib.contextmanager
def runs_gathered_alike() -> Iterator[None]:
    """15: in front of split work, each rank's own gradient of its run instead of the sum."""
    with mock.patch.object(tensor, "gather_split", collectives.gather):
        yield


@contextlib.contextmanager
def runs_gathered_as_if_split() -> Iterator[None]:
    """15: behind the last norm, the sum over ranks of a gradient that each has whole."""
    with mock.patch.object(sequence, "gather", collectives.gather_split):
        yield


@contextlib.contextmanager
def bias_on_every_rank() -> Iterator[None]:
    """12: an expert's output bias added before the reduction."""

    def forward(self, rows, counts):
        reduce, self.reduce = self.reduce, identity
        try:
            return reduce(inner(self, rows, counts))
        finally:
            self.reduce = reduce

    inner = Experts.forward
    with mock.patch.object(Experts, "forward", forward):
        yield


@contextlib.contextmanager
def replicas_counted_twice() -> Iterator[None]:
    """2: a norm that takes replicated parameters from every tensor rank."""

    def all_cut(self, probe):
        self._cut = set(self._part)
        return counted(self, probe)

    counted = engine.Engine._squares
    with mock.patch.object(engine.Engine, "_squares", all_cut):
        yield


@contextlib.contextmanager
def logits_of_padding() -> Iterator[None]:
    """13: rows that pad the vocabulary take part in the softmax."""
    from mmtrain.parallel import head

    with mock.patch.object(head, "_local_logits", lambda hidden, weight, start, size: (hidden @ weight.t()).float()):
        yield


@contextlib.contextmanager
def unmarked_experts() -> Iterator[None]:
    """2: experts of different ranks averaged as if they were replicas."""
    with mock.patch.object(engine, "mark_experts", lambda *_: None), no_moe_groups():
        yield


@contextlib.contextmanager
def no_moe_groups() -> Iterator[None]:
    """The optimizer groups without DeepSpeed's keys for experts."""

    class OneExpertRank:
        def __init__(self, real):
            self.__dict__.update(real.__dict__)
            self.mesh = type("Mesh", (), {"expert": 1})()

    initialize = engine._initialize
    with mock.patch.object(
        engine,
        "_initialize",
        lambda model, recipe, g, config, og: initialize(model, recipe, OneExpertRank(g), config, og),
    ):
        yield


@contextlib.contextmanager
def no_marker_module() -> Iterator[None]:
    """3: marked parameters, but no instance of DeepSpeed's MoE."""

    def unmark(model, optimizer_groups, groups_):
        marker.mark_experts(model, optimizer_groups, groups_)
        del model.expert_marker

    with mock.patch.object(engine, "mark_experts", unmark):
        yield


@contextlib.contextmanager
def experts_over_data() -> Iterator[None]:
    """4: under ZeRO-3, experts of different ranks partitioned and averaged as if they were replicas."""
    with mock.patch.object(engine, "place_experts", lambda *_: None):
        yield


@contextlib.contextmanager
def native_experts() -> Iterator[None]:
    """4: under ZeRO-3, the marker module of the other stages."""
    with mock.patch.object(engine, "place_experts", lambda model, _: setattr(model, "marker", marker.ExpertMarker(_))):
        yield


@contextlib.contextmanager
def accepted() -> Iterator[None]:
    """4: experts over ranks under ZeRO-0, which the recipe refuses."""
    with mock.patch.object(zero_config, "engine_problems", lambda _: ()):
        yield


@contextlib.contextmanager
def unscaled_loss() -> Iterator[None]:
    """10: DeepSpeed's average over data ranks not undone."""
    backward = engine.Engine.backward

    def wrong(self, total, last):
        backward(self, total / self._groups.data_size, last)

    with mock.patch.object(engine.Engine, "backward", wrong):
        yield


CASES: dict[str, tuple[Parallel, Callable]] = {
    case.__name__: (parallel, case)
    for parallel, cases in (
        (
            Parallel(zero_stage=1, tensor=2),
            (
                contextlib.nullcontext,
                private_gains,
                split_inputs,
                summed_router_losses,
                bias_on_every_rank,
                replicas_counted_twice,
                logits_of_padding,
            ),
        ),
        (
            Parallel(zero_stage=1, tensor=2, sequence_parallel=True),
            (gains_of_own_positions, runs_gathered_alike, runs_gathered_as_if_split),
        ),
        (
            Parallel(zero_stage=1, expert=2),
            (unscaled_loss, unmarked_experts, no_marker_module),
        ),
        (Parallel(zero_stage=3, expert=2), (experts_over_data, native_experts)),
        (Parallel(zero_stage=0, expert=2), (accepted,)),
    )
    for case in cases
}


REFUSED = {
    "no_marker_module": "'NoneType' object is not subscriptable",
    "native_experts": "Native DeepSpeed MoE is not supported with ZeRO Stage 3",
}
"""Cases in which DeepSpeed stops (it finds no expert groups), and a part of what it says."""

NOT_WRITTEN_ONCE = {"unmarked_experts", "experts_over_data"}
"""Cases in which, besides, some elements would be missing from a checkpoint."""


def run_cases(parallel: Parallel, names: list[str]) -> dict[str, harness.Record | str]:
    """On a rank: one step of each case; its record, or the error that building it raised."""
    found: dict[str, harness.Record | str] = {}
    joined = connect(parallel)
    for name in names:
        print(name, flush=True)  # the log of a rank that hangs shows where
        with CASES[name][1]():
            try:
                found[name] = harness.train(tiny.recipe("adamw", parallel), joined, 1)
            except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError) as error:
                found[name] = f"{type(error).__name__}: {error}"
    joined.close()
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, harness.Record | str]:
    """Records of rank 0 by case."""
    records: dict[str, harness.Record | str] = {}
    for parallel in {layout for layout, _ in CASES.values()}:
        names = [name for name, (layout, _) in CASES.items() if layout == parallel]
        ranks = dist.run(run_cases, 2, parallel, names)
        for name in names:
            records[name] = ranks[0][name]
            if name not in REFUSED:
                try:
                    records[name].state = [harness.assemble([rank[name].state[0] for rank in ranks])]
                except AssertionError as error:
                    records[name] = str(error)
    return records


@pytest.fixture(scope="module")
def wanted() -> harness.Record:
    return compare.reference_run(tiny.recipe(), 1)


@pytest.mark.parametrize("case", [name for name in CASES if name != "nullcontext"])
def test_without_its_remedy_the_numbers_are_wrong(case: str, found, wanted: harness.Record) -> None:
    record = found[case]
    if case in REFUSED:
        assert REFUSED[case] in record
    elif case in NOT_WRITTEN_ONCE:
        assert "no rank writes some elements" in record
    else:
        assert compare.compare(record, wanted)[0].largest() > BROKEN


def test_with_all_remedies_they_are_right(found, wanted: harness.Record) -> None:
    assert compare.compare(found["nullcontext"], wanted)[0].largest() <= compare.TOLERANCE


def test_the_mpu_has_every_name_and_not_the_one_that_switches_it_off() -> None:
    named = {
        f"get_{kind}_parallel_{what}"
        for kind in ("model", "data", "tensor_model")
        for what in ("rank", "world_size", "group")
    }
    assert named <= set(dir(Mpu))
    assert not hasattr(Mpu, "initialize_sequence_parallel")


def test_heads_that_do_not_divide_are_refused_with_both_numbers() -> None:
    class EightTensorRanks:
        mesh = groups.Mesh(8, 8)
        rank = tensor_rank = 0
        tensor = None

    with torch.device("meta"):
        model, _ = harness.parts_of(tiny.recipe())
    del model.vision
    with pytest.raises(ConfigError, match=r"tensor = 8 does not divide the 4 key/value heads of decoder.blocks.0"):
        tensor._cut_attention(
            model, "decoder.blocks.0.attention", model.decoder.blocks[0].attention, EightTensorRanks(), lambda *_: None
        )


def test_experts_that_do_not_divide_are_refused_with_both_numbers() -> None:
    class ThreeExpertRanks:
        mesh = groups.Mesh(3, 1, 3)

    model, _ = harness.parts_of(tiny.recipe())
    with pytest.raises(ConfigError, match=r"parallel.expert = 3 does not divide the 4 experts of vision.blocks.1.mlp"):
        expert.spread(model, ThreeExpertRanks())


def test_layers_of_a_tensor_rank_are_megatron_cores() -> None:
    assert layers.ColumnLinear.__mro__[1].__module__.startswith("megatron.core")
