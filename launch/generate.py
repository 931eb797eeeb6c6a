"""Ask a checkpoint about one picture, or without any.

    python launch/generate.py CHECKPOINT --image FILE --prompt TEXT [--max-new-tokens N]

CHECKPOINT is a step folder, or a run folder: then its newest good checkpoint.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # launchers start this file from anywhere

from launch.entry import positive, run, setup


def main() -> int:
    setup()
    from mmtrain.config.load import without_launcher_flags

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--image", help="picture to look at (PNG, JPEG or WebP)")
    parser.add_argument("--prompt", required=True, help="the question")
    parser.add_argument("--max-new-tokens", type=positive, default=64, help="tokens of the answer at most")
    parser.add_argument("--tensor", type=positive, default=1, help="processes that share the model")
    arguments = parser.parse_args(without_launcher_flags(sys.argv[1:]))

    from mmtrain.evaluate.prompts import Prompter
    from mmtrain.evaluate.tasks import Evaluator
    from mmtrain.inference import open_inference

    opened = open_inference(arguments.checkpoint, arguments.tensor)
    prompter = Prompter(opened.recipe, opened.tokenizer)
    evaluator = Evaluator(prompter, opened.forward, max_new_tokens=arguments.max_new_tokens)
    answer = evaluator.answer(arguments.prompt, arguments.image)
    if opened.rank == 0:
        print(answer)
    opened.close()
    return 0


if __name__ == "__main__":
    run(main)
