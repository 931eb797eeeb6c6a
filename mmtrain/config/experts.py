"""Rules of experts: what a sparse layer can be, and when slices of a dense MLP compute what it computes.

A dense MLP of hidden width f is the sum of G = granularity MLPs of width f / G, its slices. Upcycling gives a shared
expert `shared` of them and deals the others out to the routed experts, in copies; a router whose rows are equal inside
a copy chooses whole copies, so gates are 1 / (slices of a copy) of what a whole expert's would be ("virtual groups",
arXiv:2410.07524, section 3.2; its scaling factor is `preserving_scale`, all of it in the forward and none in weights).
"""

from collections.abc import Iterator

from mmtrain.config.layout import divides, hidden_width, multiples, sparse_parts
from mmtrain.config.schema import PARTS, Model, Moe, Recipe


def routed_slices(moe: Moe) -> int:
    """Slices of the dense MLP that one copy deals out to routed experts.

    Those that the shared expert has not; or, where it has them all, all of them again.
    """
    return moe.granularity - moe.shared if moe.shared < moe.granularity else moe.granularity


def preserving_scale(moe: Moe) -> float:
    """The routed_scale with which slices compute what the dense MLP does: slices of a copy; half of it, where shared
    and routed experts hold all slices and share the function between them."""
    return routed_slices(moe) / (2.0 if moe.shared == moe.granularity else 1.0)


def expert_problems(model: Model) -> Iterator[str]:
    """What keeps a part from having its experts."""
    layers = {"vision": model.vision.built_layers(), "connector": 1, "decoder": model.decoder.num_layers}
    for part, moe in sparse_parts(model):
        where = f"model.{part}.moe"
        if moe.top_k > moe.num_experts:
            yield (
                f"{where}.top_k={moe.top_k} is more than {where}.num_experts={moe.num_experts}; "
                f"the nearest is {moe.num_experts}"
            )
        if part != "connector" and 0 < layers[part] < moe.every:
            yield (
                f"{where}.every={moe.every}: the part has {layers[part]} layers, so none would hold experts; "
                f"the nearest is {layers[part]}"
            )
        yield from divides(*hidden_width(model, part), f"{where}.granularity", moe.granularity)


def upcycle_problems(recipe: Recipe) -> Iterator[str]:
    """What keeps a part's experts from starting as its dense MLPs."""
    for part in PARTS:
        if getattr(recipe.upcycle, part) is None:
            continue
        own = getattr(recipe.model, part)
        if not own.moe.num_experts:
            yield (
                f"upcycle.{part} makes experts, but model.{part}.moe.num_experts=0; give model.{part}.moe.num_experts, "
                f"or set upcycle.{part} to null"
            )
        if not own.moe.renormalize:
            yield (
                f"upcycle.{part} keeps the dense function only where gates sum to 1, but model.{part}.moe.renormalize="
                "false; set it to true"
            )
        if not recipe.init_from and not own.pretrained:
            yield (
                f"upcycle.{part} copies dense weights, but init_from is empty; give init_from=DENSE_CHECKPOINT or "
                f"model.{part}.pretrained=FOLDER"
            )
        yield from _slice_problems(part, own.moe)


def _slice_problems(part: str, moe: Moe) -> Iterator[str]:
    """Experts that are slices: whole copies of them, whole copies chosen, and their sum at the dense MLP's size."""
    where = f"model.{part}.moe"
    if moe.shared > moe.granularity:
        yield (
            f"upcycle.{part}: {where}.shared={moe.shared} slices are more than the {where}.granularity="
            f"{moe.granularity} that a dense MLP has; the nearest is {moe.granularity}"
        )
        return
    slices = routed_slices(moe)
    for key, count in (("num_experts", moe.num_experts), ("top_k", moe.top_k)):
        if count % slices:
            yield (
                f"upcycle.{part}: {where}.{key}={count} is not a multiple of the {slices} slices of a dense MLP that "
                f"routed experts hold (granularity={moe.granularity}, shared={moe.shared}); {multiples(count, slices)}"
            )
    if moe.routed_scale != preserving_scale(moe):
        yield (
            f"upcycle.{part} keeps the dense function with {where}.routed_scale={preserving_scale(moe):g} "
            f"(granularity={moe.granularity}, shared={moe.shared}), not with {moe.routed_scale:g}"
        )
