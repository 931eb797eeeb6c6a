"""Hugging Face weights in.

    python -m tools.convert hf-to-mm [RECIPE.yaml] [key=value ...] [--vision DIR] [--decoder DIR] [--vlm DIR] --out DIR

RECIPE    what config.json does not say: connector, canvas, experts (with `upcycle`, dense MLPs are copied into them)
--vision  CLIP or SigLIP; --decoder  Llama, Mistral, Qwen2, Qwen3, Mixtral, Qwen3-MoE, OLMoE; --vlm  LLaVA, all parts
The checkpoint is DIR/step_00000000, with the folder's tokenizer. A recipe with `model.<part>.pretrained` does the same
by itself.
"""

import argparse
import sys
from pathlib import Path

from launch.entry import run, setup

PLAIN = Path(__file__).resolve().parents[1] / "configs/base.yaml"


def main() -> int:
    setup()
    commands = {"hf-to-mm": _into}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=commands)
    return commands[parser.parse_args(sys.argv[1:2]).command](sys.argv[2:])


def _into(given: list[str]) -> int:
    """The arguments of hf-to-mm."""
    parser = argparse.ArgumentParser(prog="tools.convert hf-to-mm")
    parser.add_argument("recipe", nargs="*", metavar="RECIPE.yaml | key=value")
    parser.add_argument("--vision", help="folder of an image tower")
    parser.add_argument("--decoder", help="folder of a language model")
    parser.add_argument("--vlm", help="folder of a whole model: tower, connector and language model")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    arguments = parser.parse_intermixed_args(given)
    folders = {"vision": arguments.vision, "decoder": arguments.decoder}
    return hf_to_mm(arguments.recipe, folders, arguments.vlm, arguments.out)


def hf_to_mm(recipe: list[str], folders: dict[str, str | None], vlm: str | None, out: Path) -> int:
    """Write the checkpoint and say what became of which tensor. UserError where folders and recipe do not fit."""
    from mmtrain.config.check import check_model
    from mmtrain.config.errors import ConfigError
    from mmtrain.config.load import load_with_origins
    from mmtrain.config.schema import PARTS
    from mmtrain.data.tokenizer import Tokenizer
    from mmtrain.start import write_start

    files = [item for item in recipe if "=" not in item]
    named = {**dict.fromkeys(PARTS if vlm else (), vlm), **{part: given for part, given in folders.items() if given}}
    if len(files) > 1:
        raise ConfigError(f"{' and '.join(files)}: one recipe at most; the others are key=value")
    if not named:
        raise ConfigError("no folder to convert: give --vision, --decoder or --vlm")
    overrides = [item for item in recipe if "=" in item]
    overrides += [f"model.{part}.pretrained={folder}" for part, folder in named.items()]
    if not files:
        overrides = ["name=converted", f"out={out}", *overrides]
    path = files[0] if files else PLAIN
    loaded, origins = load_with_origins(path, overrides)
    tokenizer = Tokenizer(loaded.data.tokenizer, loaded.data.chat_template)
    if tokenizer.vocab_size > loaded.model.decoder.vocab_size and "config.json" in origins["model.decoder.vocab_size"]:
        # The tokens of images and padding are new to the checkpoint: their rows are the mean of its rows.
        loaded, _ = load_with_origins(path, [*overrides, f"model.decoder.vocab_size={tokenizer.vocab_size}"])
    check_model(loaded)
    started = write_start(loaded, tokenizer, out)
    print(started.report)
    print(f"{started.folder}: {started.count.total:,} parameters, {started.count.active:,} active for a token")
    return 0


if __name__ == "__main__":
    run(main)
