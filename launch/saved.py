"""Print the newest checkpoint of each recipe, a line each: what a job script compares to see whether a start got on.

python launch/saved.py RECIPES.yaml... [key=value ...]       other words are launch/train.py's, and left out
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.entry import run


def main() -> int:
    from mmtrain.config.load import load

    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    overrides = [word for word in words if "=" in word]
    for recipe in (word for word in words if "=" not in word and word.endswith((".yaml", ".yml"))):
        out = Path(load(recipe, overrides).out)
        print(max(out.glob("step_*[0-9]"), default=out))  # run/retain.py has the pattern, but imports torch
    return 0


if __name__ == "__main__":
    run(main)
