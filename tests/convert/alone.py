"""Run as a script, with transformers and nothing of mmtrain: load exported folders and answer about a picture.

python alone.py IN.pt OUT.pt     IN: list of (folder, ids [B, T], pixel_values, new tokens, question, picture)
"""

import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer


def main(given: Path, out: Path) -> None:
    results = []
    for folder, ids, pixels, count, question, picture in torch.load(given):
        model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=pixels).logits
        inputs = model.prompt(tokenizer, question, Image.open(picture))
        made = model.generate(**inputs, max_new_tokens=count, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        results.append((logits, tokenizer.decode(made, skip_special_tokens=True), inputs["input_ids"], made))
    assert not any(name.split(".")[0] in ("mmtrain", "tools", "launch") for name in sys.modules)
    torch.save(results, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
