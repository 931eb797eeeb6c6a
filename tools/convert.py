"""Hugging Face weights in and out.

    python -m tools.convert hf-to-mm [RECIPE.yaml] [key=value ...] [--vision DIR] [--decoder DIR] [--vlm DIR] --out DIR

RECIPE    what config.json does not say: connector, canvas, experts (with `upcycle`, dense MLPs are copied into them)
--vision  CLIP or SigLIP; --decoder  Llama, Mistral, Qwen2, Qwen3, Mixtral, Qwen3-MoE, OLMoE; --vlm  LLaVA, all parts
The checkpoint is DIR/step_00000000, with the folder's tokenizer. A recipe with `model.<part>.pretrained` does the same
by itself.

    python -m tools.convert mm-to-hf CHECKPOINT --out DIR [--form auto|decoder|llava|own] [--dtype fp32|bf16|fp16]

CHECKPOINT  a step folder, or a run folder: then its newest good checkpoint; saved under any layout
--form      decoder: the language model alone in its public class; llava: a dense tower and an MLP connector; own: any
            model, with its own code (trust_remote_code=True); auto: llava where that holds the model, else own
"""

import argparse
import sys
from pathlib import Path

from launch.entry import run, setup

PLAIN = Path(__file__).resolve().parents[1] / "configs/base.yaml"


def main() -> int:
    setup()
    commands = {"hf-to-mm": _into, "mm-to-hf": _out}
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


def _out(given: list[str]) -> int:
    """The arguments of mm-to-hf."""
    parser = argparse.ArgumentParser(prog="tools.convert mm-to-hf")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--form", choices=("auto", "decoder", "llava", "own"), default="auto")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    arguments = parser.parse_args(given)

    from mmtrain.convert.export import export
    from mmtrain.run.reader import open_weights

    name = export(open_weights(arguments.checkpoint), arguments.out, arguments.form, arguments.dtype)
    print(f"{arguments.out}: {name} in {arguments.dtype}")
    return 0


def hf_to_mm(recipe: list[str], folders: dict[str, str | None], vlm: str | None, out: Path) -> int:
    """Write the checkpoint and say what became of which tensor. UserError where folders and recipe do not fit."""
    from mmtrain.config.check import check_model
    from mmtrain.config.errors import ConfigError
    from mmtrain.config.load import load_with_origins
    from mmtrain.config.schema import PARTS
    from mmtrain.data.tokenizer import Tokenizer
    from mmtrain.start import summary, write_start

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
    print(summary(started))
    return 0


if __name__ == "__main__":
    run(main)
