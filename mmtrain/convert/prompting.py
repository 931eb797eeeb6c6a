"""A chat template for readers without mmtrain: pieces of one question's prompt, and the whole of it as Jinja."""

import json
from typing import Any

from mmtrain.data.chat import IMAGE_MARK, ImageMark, Run, Template, Turn, conversation_pieces
from mmtrain.data.tokenizer import Tokenizer

QUESTION = "{question}"


def pieces(tokenizer: Tokenizer) -> dict[str, list[tuple[str, str]]]:
    """The prompt of a question with one image, and without any, as (kind, text); kinds are text, special and image."""
    asked = {"image": f"{IMAGE_MARK}\n{QUESTION}", "text": QUESTION}
    return {name: _flat(text, tokenizer) for name, text in asked.items()}


def _flat(text: str, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    out: list[tuple[str, str]] = []
    for piece in conversation_pieces([Turn("user", text)], tokenizer.template):
        if isinstance(piece, ImageMark):
            out.append(("image", ""))
        else:
            out += [("special" if run.special else "text", _text(run, tokenizer)) for run in piece]
    return out


def _text(run: Run, tokenizer: Tokenizer) -> str:
    """What a run stands for; an empty special run is the end-of-text token."""
    return run.text or tokenizer.eos


def jinja(tokenizer: Tokenizer) -> str:
    """chat_template of tokenizer_config.json. Content is a string, or a list of {type: text | image}.

    A user's turn is always followed by what precedes the answer, so that `add_generation_prompt` changes nothing.
    """
    template: Template = tokenizer.template
    first, other, answer, end = (
        json.dumps("".join(_text(run, tokenizer) for run in runs), ensure_ascii=False)
        for runs in (template.first, template.next, template.answer, (template.end,))
    )
    opening = f"{{{{ {first} if loop.first else {other} }}}}"
    mark = json.dumps(IMAGE_MARK + ("" if template.images_first else "\n"))
    images = (
        "{% if message['content'] is not string %}{% for part in message['content'] %}"
        f"{{% if part['type'] == 'image' %}}{{{{ {mark} }}}}{{% endif %}}"
        "{% endfor %}{% endif %}"
    )
    words = (
        "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}"
        "{% endfor %}{% endif %}"
    )
    question = (images + opening if template.images_first else opening + images) + words + f"{{{{ {answer} }}}}"
    return (
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        + question
        + f"{{% else %}}{{{{ {json.dumps(template.before_answer)} }}}}"
        + words
        + f"{{{{ {end} }}}}{{% endif %}}{{% endfor %}}"
    )


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer_config.json of an exported folder."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.eos,
        "pad_token": tokenizer.pad,
        "image_token": IMAGE_MARK,
        "additional_special_tokens": [IMAGE_MARK, *tokenizer.template.special_tokens],
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "chat_template": jinja(tokenizer),
    }
