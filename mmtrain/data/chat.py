"""How the turns of a conversation become runs of text, images and special tokens, and which of them are learnt.

A template is data. Every run is tokenised alone, so that the tokens of a prompt are exactly the first tokens of the
training document that goes on with the answer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from mmtrain.config.errors import DataError

IMAGE_MARK = "<image>"
"""Where an image stands in a turn's text."""

END_OF_TEXT = ""
"""Content of a special run that means the tokenizer's own end-of-text token, whatever it is called."""

TemplateName = Literal["plain", "chatml", "vicuna", "llama3", "mistral"]


class Turn(NamedTuple):
    """One turn of a conversation."""

    role: Literal["user", "assistant"]
    """Who speaks."""
    text: str
    """What is said; `<image>` in a user's turn is the place of the next image."""


class Run(NamedTuple):
    """Text that is tokenised in one go, or one special token."""

    text: str
    """The text, or the special token's content (END_OF_TEXT: the tokenizer's end-of-text token)."""
    special: bool = False
    """Whether `text` names one token. Ordinary text never becomes a special token, whatever it spells."""
    supervised: bool = False
    """Whether its tokens are targets of the loss."""


class ImageMark(NamedTuple):
    """The place of the next image of the document."""


@dataclass(frozen=True)
class Template:
    """Runs around the texts of a question and its answer."""

    first: tuple[Run, ...]
    """Before the first question."""
    next: tuple[Run, ...]
    """Before every other question."""
    answer: tuple[Run, ...]
    """Between question and answer."""
    before_answer: str
    """Put before the answer's text and tokenised with it: word-level merges start at a space."""
    end: Run
    """After the answer; learnt."""
    images_first: bool
    """Whether images that open a question come before the label `first`/`next`."""
    special_tokens: tuple[str, ...]
    """Tokens that the tokenizer must have for it."""

    def labels(self) -> list[str]:
        """Its plain text, without special tokens: what a tokenizer should know as well as the words around it."""
        return [run.text for run in (*self.next, *self.answer) if not run.special]


_TURN_END = Run("<|im_end|>", special=True)
_TURN_START = Run("<|im_start|>", special=True)
_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)

_LLAMA3_END = Run("<|eot_id|>", special=True)


def _llama3_label(role: str) -> tuple[Run, ...]:
    """What Llama 3 puts before a turn."""
    return Run("<|start_header_id|>", special=True), Run(role), Run("<|end_header_id|>", special=True), Run("\n\n")


TEMPLATES: dict[TemplateName, Template] = {
    "plain": Template(
        first=(Run("Question: "),),
        next=(Run("\nQuestion: "),),
        answer=(Run("\nAnswer:"),),
        before_answer=" ",
        end=Run(END_OF_TEXT, special=True, supervised=True),
        images_first=True,
        special_tokens=(),
    ),
    "chatml": Template(
        first=(_TURN_START, Run("user\n")),
        next=(Run("\n"), _TURN_START, Run("user\n")),
        answer=(_TURN_END, Run("\n"), _TURN_START, Run("assistant\n")),
        before_answer="",
        end=_TURN_END._replace(supervised=True),
        images_first=False,
        special_tokens=(_TURN_START.text, _TURN_END.text),
    ),
    # LLaVA's conv_vicuna_v1: "SYSTEM USER: q ASSISTANT: a</s>USER: ...".
    "vicuna": Template(
        first=(Run(_VICUNA_SYSTEM), Run("USER: ")),
        next=(Run("USER: "),),
        answer=(Run(" ASSISTANT:"),),
        before_answer=" ",
        end=Run(END_OF_TEXT, special=True, supervised=True),
        images_first=False,
        special_tokens=(),
    ),
    "llama3": Template(
        first=(Run("<|begin_of_text|>", special=True), *_llama3_label("user")),
        next=_llama3_label("user"),
        answer=(_LLAMA3_END, *_llama3_label("assistant")),
        before_answer="",
        end=_LLAMA3_END._replace(supervised=True),
        images_first=False,
        special_tokens=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", _LLAMA3_END.text),
    ),
    # Its first version, where [INST] is text: "<s>[INST] q [/INST] a</s>[INST] q [/INST]".
    "mistral": Template(
        first=(Run("<s>", special=True), Run("[INST] ")),
        next=(Run("[INST] "),),
        answer=(Run(" [/INST]"),),
        before_answer=" ",
        end=Run(END_OF_TEXT, special=True, supervised=True),
        images_first=False,
        special_tokens=("<s>",),
    ),
}
"""Every chat template, by the name that recipes use."""

CHAT_TOKENS = tuple(sorted(TEMPLATES["chatml"].special_tokens))
"""Special tokens of the templates that a tokenizer trained here is meant for; plain and vicuna have none, and those of
llama3 and mistral come with their own tokenizers."""

_SIGNS: tuple[tuple[str, TemplateName], ...] = (
    ("<|start_header_id|>", "llama3"),
    ("<|im_start|>", "chatml"),
    ("[INST]", "mistral"),
    ("ASSISTANT:", "vicuna"),
)
"""What a public chat_template writes -> the template here that lays turns out so."""


def recognise(chat_template: str) -> TemplateName:
    """The template that a public Jinja chat template amounts to; DataError if there is none."""
    for sign, name in _SIGNS:
        if sign in chat_template:
            return name
    signs = ", ".join(f"{sign} ({name})" for sign, name in _SIGNS)
    raise DataError(
        f"the tokenizer's own chat template has none of {signs}: choose data.chat_template by name, one of "
        f"{', '.join(TEMPLATES)}"
    )


def template_named(name: str) -> Template:
    """The template called `name`; DataError with the choices if there is none."""
    if name not in TEMPLATES:
        raise DataError(f"chat template {name!r} does not exist: choose one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def conversation_pieces(turns: Sequence[Turn], template: Template) -> list[tuple[Run, ...] | ImageMark]:
    """Runs between the images of a conversation, cut after each answer; loss on answers and their end tokens.

    `turns` alternate user, assistant, user, ... (the formats check it). If the last turn is a user's, what comes out is
    the prompt of its answer: exactly the runs that precede the answer in training.
    """
    pieces: list[tuple[Run, ...] | ImageMark] = []
    pending: list[Run] = []

    def close() -> None:
        if pending:
            pieces.append(_joined(pending))
            pending.clear()

    for number, turn in enumerate(turns):
        if turn.role == "user":
            for item in _question(turn.text, template.first if number == 0 else template.next, template):
                if isinstance(item, ImageMark):
                    close()
                    pieces.append(item)
                else:
                    pending.append(item)
            pending.extend(template.answer)
        else:
            # Everything up to here is what a prompt ends with, so the answer starts a run of its own.
            pending.append(Run(template.before_answer + turn.text.strip(), supervised=True))
            pending.append(template.end)
            close()
    close()
    return pieces


def _question(text: str, opening: tuple[Run, ...], template: Template) -> Iterator[Run | ImageMark]:
    """The opening runs, texts and image marks of one user turn, in order."""
    rest = text.strip()
    if template.images_first:
        while rest.startswith(IMAGE_MARK):
            yield ImageMark()
            rest = rest[len(IMAGE_MARK) :].lstrip()
    yield from opening
    for number, stretch in enumerate(rest.split(IMAGE_MARK)):
        if number:
            yield ImageMark()
        if stretch:
            yield Run(stretch)


def _joined(runs: Sequence[Run]) -> tuple[Run, ...]:
    """`runs` with neighbours of ordinary, unsupervised text made one, so that words are tokenised across labels."""
    out: list[Run] = []
    for run in runs:
        last = out[-1] if out else None
        if last and not (last.special or last.supervised or run.special or run.supervised):
            out[-1] = Run(last.text + run.text)
        else:
            out.append(run)
    return tuple(out)
