"""What other programs call their optimizers, schedules and options that would undo muP: refused by name, with why.

muP holds while the rates of two groups stay in the ratio that mmtrain.mup.rules gives them, for Adam's update rule.
"""

NOT_ADAM = "the rates of mmtrain/mup/rules.py are those of Adam's update; take adamw"

FLATTENS = (
    "sets one rate for all parameter groups, which erases muP's ratios between them; take cosine, linear or constant "
    "with optim.warmup_steps, which multiply each group's own rate"
)

ABSOLUTE = (
    "one absolute rate for all groups erases muP's ratios between them; give optim.final_lr_ratio, the share of each "
    "group's own peak"
)

SPECTRAL = f"gives each matrix an update of one spectral norm: its rates go by other powers of width, and {NOT_ADAM}"
BY_NORM = f"scales each tensor's update by the tensor's own norm, which changes with width, and {NOT_ADAM}"

VALUES = {
    "optim.name": {
        "muon": SPECTRAL,
        "lamb": BY_NORM,
        "lars": BY_NORM,
        "adafactor": BY_NORM,
    },
    "optim.schedule": dict.fromkeys(("warmuplr", "warmupdecaylr", "onecycle", "lrrangetest"), FLATTENS),
}
"""Key -> value, in lower case -> why not."""

KEYS = {
    "optim.scheduler": "a schedule of DeepSpeed or torch " + FLATTENS.replace("sets", "may set"),
    "optim.min_lr": ABSOLUTE,
    "optim.max_lr": ABSOLUTE,
    "optim.clip_value": (
        "entries of a gradient shrink with width, so one absolute bound on each clips narrow models alone; "
        "give optim.clip, a bound on the norm"
    ),
}
"""Key that no recipe has -> why not."""


def refusal(key: str, value: object = None) -> str:
    """Why `key`, or `value` of it, is refused; empty where there is nothing to say beyond that it is unknown."""
    if key in KEYS:
        return KEYS[key]
    why = VALUES.get(key, {}).get(str(value).lower(), "")
    return why or (NOT_ADAM if key == "optim.name" else "")
