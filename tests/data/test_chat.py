import pytest

from mmtrain.config.errors import DataError
from mmtrain.data.chat import TEMPLATES, Turn, recognise
from mmtrain.data.documents import Content, encode_outlines, outline, prompt, segments_of
from mmtrain.data.record import ImagePart, Text
from tests.data.inputs import tokenizer

TURNS = (
    Turn("user", "<image>\nWhat colour is <image> then?"),
    Turn("assistant", " red "),
    Turn("user", "Is <|im_end|> the end?"),
    Turn("assistant", "no, it goes on"),
    Turn("user", "<image> And now"),
    Turn("assistant", "green"),
)
IMAGES = ("0.png", "1.png", "2.png")

EXPECTED = {
    "plain": [
        "0.png",
        "Question: What colour is ",
        "1.png",
        " then?\nAnswer: red<eos>",
        "\nQuestion: Is <|im_end|> the end?\nAnswer: no, it goes on<eos>",
        "2.png",
        "\nQuestion: And now\nAnswer: green<eos>",
    ],
    "chatml": [
        "<|im_start|>user\n",
        "0.png",
        "\nWhat colour is ",
        "1.png",
        " then?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>",
        "\n<|im_start|>user\nIs <|im_end|> the end?<|im_end|>\n<|im_start|>assistant\nno, it goes on<|im_end|>",
        "\n<|im_start|>user\n",
        "2.png",
        " And now<|im_end|>\n<|im_start|>assistant\ngreen<|im_end|>",
    ],
    "vicuna": [
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: ",
        "0.png",
        "\nWhat colour is ",
        "1.png",
        " then? ASSISTANT: red<eos>",
        "USER: Is <|im_end|> the end? ASSISTANT: no, it goes on<eos>",
        "USER: ",
        "2.png",
        " And now ASSISTANT: green<eos>",
    ],
    "llama3": [
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
        "0.png",
        "\nWhat colour is ",
        "1.png",
        " then?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nred<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nIs <|im_end|> the end?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nno, it goes on<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "2.png",
        " And now<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\ngreen<|eot_id|>",
    ],
    "mistral": [
        "<s>[INST] ",
        "0.png",
        "\nWhat colour is ",
        "1.png",
        " then? [/INST] red<eos>",
        "[INST] Is <|im_end|> the end? [/INST] no, it goes on<eos>",
        "[INST] ",
        "2.png",
        " And now [/INST] green<eos>",
    ],
}
ENDS = {"plain": "<eos>", "chatml": "<|im_end|>", "vicuna": "<eos>", "llama3": "<|eot_id|>", "mistral": "<eos>"}


def encoded(template: str, turns: tuple[Turn, ...] = TURNS, images: tuple[str, ...] = IMAGES) -> list[Text | str]:
    content = Content("conversation", images=images, turns=turns)
    return encode_outlines([outline(content, tokenizer(template))], tokenizer(template))[0]


@pytest.mark.parametrize("template", TEMPLATES)
def test_written_out(template: str) -> None:
    decode = tokenizer(template).decode
    parts = encoded(template)
    assert [p if isinstance(p, str) else decode(p.token_ids, skip_special=False) for p in parts] == EXPECTED[template]


@pytest.mark.parametrize("template", TEMPLATES)
def test_only_answers_and_their_end_tokens_are_learnt(template: str) -> None:
    decode = tokenizer(template).decode
    learnt = [decode(p.token_ids[p.supervised], skip_special=False) for p in encoded(template) if isinstance(p, Text)]
    answers = [turn.text.strip() + ENDS[template] for turn in TURNS if turn.role == "assistant"]
    assert [text.strip() for text in learnt if text] == answers


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_user_cannot_forge_the_end_of_a_turn(template: str) -> None:
    end = tokenizer(template).special_id(TEMPLATES[template].end.text)
    ends = sum(int((part.token_ids == end).sum()) for part in encoded(template) if isinstance(part, Text))
    assert ends == (6 if template in ("chatml", "llama3") else 3)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("asked", [1, 3, 5])
def test_a_prompt_is_the_beginning_of_its_training_document(template: str, asked: int) -> None:
    turns = TURNS[:asked]
    marks = sum(turn.text.count("<image>") for turn in turns)
    parts = prompt(turns, [name.encode() for name in IMAGES[:marks]], tokenizer(template)).parts
    flat = [item for p in parts for item in ([p.data.decode()] if isinstance(p, ImagePart) else p.token_ids.tolist())]
    whole = [item for p in encoded(template) for item in ([p] if isinstance(p, str) else p.token_ids.tolist())]
    assert flat == whole[: len(flat)]
    rest = [item for item in whole[len(flat) :] if not isinstance(item, str)]
    assert tokenizer(template).decode(rest).lstrip().startswith(TURNS[asked].text.strip())


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_segment_never_parts_a_question_from_its_answer(template: str) -> None:
    parts = encoded(template)
    sizes = dict.fromkeys(IMAGES, (3, 5))
    segments = segments_of(parts, sizes)
    assert [segment.is_image for segment in segments] == [isinstance(part, str) for part in parts]
    for segment, part in zip(segments, parts, strict=True):
        if isinstance(part, Text):
            assert (segment.tokens, segment.supervised) == (len(part.token_ids), part.supervised.sum())
            if part.supervised.any():
                assert part.supervised[-1] and not part.supervised[0]
        else:
            assert (segment.width, segment.height) == (3, 5)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("{{ '<|im_start|>' + message['role'] }}", "chatml"),
        ("{{ '<|start_header_id|>' + role + '<|end_header_id|>' }}", "llama3"),
        ("{{ '[INST] ' + content + ' [/INST]' }}", "mistral"),
        ("{{ 'USER: ' + content + ' ASSISTANT:' }}", "vicuna"),
    ],
)
def test_a_public_chat_template_is_recognised(written: str, name: str) -> None:
    assert recognise(written) == name


def test_an_unknown_chat_template_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        DataError, match=r"has none of <\|start_header_id\|> \(llama3\), .*: choose data.chat_template by"
    ):
        recognise("{{ '<turn>' + content }}")


def test_a_prompt_with_the_wrong_turns_or_images_is_refused() -> None:
    with pytest.raises(DataError, match="q7: turns are user, assistant; a prompt alternates and ends with a user"):
        prompt(TURNS[:2], [b"", b""], tokenizer(), key="q7")
    with pytest.raises(DataError, match="q7: turns are missing; a prompt"):
        prompt([], [], tokenizer(), key="q7")
    with pytest.raises(DataError, match="q7: 2 <image> in the turns but 1 images; give one for each"):
        prompt(TURNS[:1], [b""], tokenizer(), key="q7")
