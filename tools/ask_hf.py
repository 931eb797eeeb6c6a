"""Ask an exported model, with transformers and nothing of mmtrain.

    python tools/ask_hf.py FOLDER --image FILE --prompt TEXT [--prompt TEXT ...] [--max-new-tokens N]

FOLDER is what `tools.convert mm-to-hf --form own` wrote. Prints one JSON line: the answers, their tokens, and whether
anything of mmtrain was imported.
"""

import argparse
import json
import sys

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--image", required=True, help="picture to look at")
    parser.add_argument("--prompt", action="append", required=True, help="a question; each is asked by itself")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens of an answer at most")
    arguments = parser.parse_args()
    model = AutoModelForImageTextToText.from_pretrained(arguments.folder, trust_remote_code=True, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder, trust_remote_code=True)
    answers, tokens = [], []
    for prompt in arguments.prompt:
        inputs = model.eval().prompt(tokenizer, prompt, Image.open(arguments.image))
        made = model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False)
        tokens.append(made[0, inputs["input_ids"].shape[1] :].tolist())
        answers.append(tokenizer.decode(tokens[-1], skip_special_tokens=True).strip())
    alone = not any(name.split(".")[0] == "mmtrain" for name in sys.modules)
    print(json.dumps({"answers": answers, "tokens": tokens, "alone": alone}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
