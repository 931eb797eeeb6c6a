"""What may differ between an interrupted run's recipe and the one that goes on with it."""

from mmtrain.config.keys import leaves
from mmtrain.config.schema import Recipe

ALWAYS_FREE = (
    "name",
    "out",
    "steps",
    "epochs",
    "requires_pretrained",
    "model.vision.pretrained",  # where weights started; an interrupted run's are in its checkpoint
    "model.connector.pretrained",
    "model.decoder.pretrained",
    "resume",
    "resume_allow",
    "log",
    "eval",
    "checkpoint",
    "parallel.tensor",
    "parallel.expert",
    "parallel.zero_stage",
    "parallel.offload_optimizer",
    "parallel.activation_checkpointing",
    "parallel.sequence_parallel",
    "guard",
    "data.workers",
    "data.cache",
    "data.allow_pipes",
    "data.cache_gib",
    "data.skip_packs",  # what a person leaves out, or puts up with, after having seen it
    "data.max_bad_fraction",
    "data.micro_batch",  # how the global batch is cut: layout, like the world size
)
"""Keys and sections that a run may change between two starts.

How it is laid out and watched, which changes no number; its length, which stretches a schedule that decays; and what a
person decides after having seen it.
"""


def resume_differences(old: Recipe, new: Recipe) -> tuple[list[str], list[str]]:
    """(allowed, refused): each difference as `key: old -> new`, in the order of the schema.

    Allowed are ALWAYS_FREE and what `new.resume_allow` names, a key or a whole section; all else is refused.
    """
    before, after = dict(leaves(old)), dict(leaves(new))
    free = (*ALWAYS_FREE, *new.resume_allow)
    allowed: list[str] = []
    refused: list[str] = []
    for key in dict.fromkeys((*after, *before)):
        if key in before and key in after and before[key] == after[key]:
            continue
        line = f"{key}: {before.get(key, 'not set')} -> {after.get(key, 'not set')}"
        is_free = any(key == name or key.startswith(name + ".") for name in free)
        (allowed if is_free else refused).append(line)
    return allowed, refused
