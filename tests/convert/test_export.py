"""Checkpoints leave for transformers: public classes to the bit, any other model with its own code, muP folded in."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast

from mmtrain.config.errors import CheckpointError, ConfigError
from mmtrain.config.schema import Connector, Mup, Recipe, RopeScaling
from mmtrain.convert.export import export
from mmtrain.data.chat import TEMPLATES, Turn, conversation_pieces
from mmtrain.data.documents import prompt
from mmtrain.data.record import Text
from mmtrain.data.tokenizer import Tokenizer
from mmtrain.evaluate.prompts import Prompter
from mmtrain.evaluate.tasks import Evaluator
from mmtrain.inference import open_inference
from mmtrain.model.balance import RouterState
from mmtrain.run.reader import open_weights
from tests import tiny
from tests.convert import families
from tests.convert.cases import all_logits, convert, image_batch, import_decoder, text_batch
from tests.convert.test_families import normalised
from tests.data.inputs import picture, tokenizer
from tests.evaluate import checkpoints

ALONE = Path(__file__).with_name("alone.py")


@pytest.mark.parametrize("family", families.DECODERS)
def test_a_decoder_leaves_as_it_came(family, tmp_path, monkeypatch) -> None:
    twin = families.random_twin(*families.DECODERS[family])
    folder = families.save(twin, tmp_path / "hf")
    import_decoder(monkeypatch, folder, tmp_path / "mm")
    assert convert(monkeypatch, "mm-to-hf", tmp_path / "mm", "--out", tmp_path / "out", "--form", "decoder") == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again) is type(twin)
    was, now = twin.state_dict(), again.state_dict()
    assert was.keys() == now.keys() and [name for name in was if not torch.equal(was[name], now[name])] == []
    ids = families.tokens(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, twin(ids).logits, rtol=1e-5, atol=1e-5)
    import_decoder(monkeypatch, tmp_path / "out", tmp_path / "back")
    first, second = open_weights(tmp_path / "mm"), open_weights(tmp_path / "back")
    decoder = [name for name in first.names() if name.startswith("decoder.")]
    assert all(torch.equal(first.read(name), second.read(name)) for name in decoder)


@pytest.mark.parametrize("family", [family for family in families.WHOLES if family != "llava_next"])
def test_llava_leaves_as_it_came_but_for_layers_that_nobody_reads(family, tmp_path, monkeypatch) -> None:
    twin = families.random_twin(*families.WHOLES[family])
    families.save(twin, tmp_path / "hf")
    assert convert(monkeypatch, "hf-to-mm", "--vlm", tmp_path / "hf", "--out", tmp_path / "mm") == 0
    assert convert(monkeypatch, "mm-to-hf", tmp_path / "mm", "--out", tmp_path / "out") == 0
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert type(again) is type(twin)
    was, now = twin.state_dict(), again.state_dict()
    unread = {name for name in was if "vision" in name and (".layers.2." in name or ".head." in name)} | {
        name for name in was if "post_layernorm" in name
    }
    assert was.keys() - now.keys() == {name for name in unread if "post_layernorm" not in name}
    assert [name for name in now.keys() - unread if not torch.equal(was[name], now[name])] == []
    pixels = torch.randint(0, 256, (28, 28, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    inputs = AutoProcessor.from_pretrained(tmp_path / "out")(
        images=[pixels.numpy()], text="<image>ab", return_tensors="pt"
    )
    assert (inputs["input_ids"][0] == families.IMAGE_ID).sum() == 16
    expected = normalised(pixels.permute(2, 0, 1).unsqueeze(0), "siglip" if "siglip" in family else "clip")
    torch.testing.assert_close(inputs["pixel_values"], expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        want, got = twin(**inputs).logits, again(**inputs).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def varied(kind: str) -> Recipe:
    """Experts in all parts, muP factors that are not 1, a canvas that is not square; and what else `kind` says."""
    recipe = checkpoints.recipe(bias=kind == "c_abstractor")
    model = recipe.model
    if kind == "attention_pool":
        decoder = replace(model.decoder, norm="crms", tied=True, moe=replace(model.decoder.moe, renormalize=False))
        connector = Connector(kind="attention_pool", num_tokens=4, hidden_size=24, num_heads=4, moe=model.connector.moe)
        model = replace(model, connector=connector, decoder=decoder)
        recipe = replace(recipe, data=replace(recipe.data, resize="pad", sub_images=4))
    if kind == "avg_pool":
        scaling = RopeScaling(8.0, 1.0, 4.0, 16)
        decoder = replace(model.decoder, qk_norm_over="all", rope_theta=500.0, rope_scaling=scaling, norm="layer")
        vision = replace(model.vision, pixel_norm="half", class_token=False, pre_norm=False, patch_bias=True)
        vision = replace(vision, activation="gelu_tanh", final_norm=True)
        connector = replace(model.connector, kind="avg_pool")
        model = replace(model, vision=vision, decoder=decoder, connector=connector)
        recipe = replace(recipe, data=replace(recipe.data, chat_template="chatml", resize="shortest_crop"))
        model = replace(model, decoder=replace(decoder, vocab_size=tokenizer("chatml").vocab_size))
    return replace(recipe, model=model)


def test_any_model_leaves_with_its_own_code(tmp_path) -> None:
    """Logits and the answer to a question about a picture, from a process that never sees mmtrain."""
    (tmp_path / "picture.png").write_bytes(picture(50, 31, colour=(200, 30, 90)))
    cases, wanted = [], []
    for kind in ("c_abstractor", "attention_pool", "avg_pool"):
        recipe = varied(kind)
        state = checkpoints.routers(recipe, strength=0.3 if kind == "c_abstractor" else 0.0)
        run = checkpoints.save(tmp_path / kind, recipe, checkpoints.random_model(recipe), state)
        assert export(open_weights(run), tmp_path / f"{kind}_hf") == "MmtrainForConditionalGeneration"
        opened = open_inference(run)
        height, width = recipe.model.vision.image_size
        images = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
        ids = families.tokens(1, 24)
        ids[0, 3:7] = ids[0, 12:16] = opened.tokenizer.image_id
        batch = image_batch(ids, images, opened.tokenizer.image_id, per_image=4)
        pixels = normalised(images, "siglip" if recipe.model.vision.pixel_norm == "half" else "clip")
        prompter = Prompter(recipe, opened.tokenizer, tmp_path)
        question = "What is the colour of the shape?"
        document = prompter.question(question, "picture.png")
        answer = Evaluator(prompter, opened.forward, max_new_tokens=12).answer(question, "picture.png")
        wanted.append((all_logits(opened.forward, batch), answer, prompter.batch([document]).tokens))
        cases.append((str(tmp_path / f"{kind}_hf"), ids, pixels, 12, question, str(tmp_path / "picture.png")))
    torch.save(cases, tmp_path / "in.pt")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [sys.executable, str(ALONE), str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for (logits, answer, asked), (got, said, ids, _) in zip(wanted, torch.load(tmp_path / "out.pt"), strict=True):
        assert (got - logits).abs().max() <= 1e-4
        assert torch.equal(ids, asked)
        assert said.strip() == answer


def test_a_model_with_its_own_code_comes_in_again_to_the_bit(tmp_path, monkeypatch) -> None:
    recipe = replace(varied("attention_pool"), mup=Mup())
    run = checkpoints.save(tmp_path / "run", recipe, checkpoints.random_model(recipe), RouterState.first(recipe.model))
    export(open_weights(run), tmp_path / "out")
    assert convert(monkeypatch, "hf-to-mm", "--vlm", tmp_path / "out", "--out", tmp_path / "back") == 0
    first, second = open_weights(run), open_weights(tmp_path / "back")
    assert first.shapes() == second.shapes()
    assert all(torch.equal(first.read(name), second.read(name)) for name in first.names())
    export(second, tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


def test_what_a_pretrained_part_cannot_bring_is_refused(tmp_path, monkeypatch) -> None:
    for number, (mup, strength, kind, said) in enumerate(
        (
            (tiny.recipe().mup, 0.0, ConfigError, r"trained with factors of muP \(attention_vision"),
            (Mup(), 0.2, CheckpointError, r"2 routers have learnt biases \(decoder.blocks.0"),
        )
    ):
        recipe = replace(varied("c_abstractor"), mup=mup)
        state = checkpoints.routers(recipe, strength)
        run = checkpoints.save(tmp_path / f"run{number}", recipe, checkpoints.random_model(recipe), state)
        out = tmp_path / f"out{number}"
        export(open_weights(run), out)
        with pytest.raises(kind, match=said):
            convert(monkeypatch, "hf-to-mm", "--vlm", out, "--out", tmp_path / f"back{number}")


def test_factors_of_mup_go_into_the_weights_of_public_classes(tmp_path) -> None:
    recipe = checkpoints.recipe()
    dense = replace(recipe.model.decoder, moe=replace(recipe.model.decoder.moe, num_experts=0))
    qwen2 = {"qk_norm": False, "tied": True, "num_heads": 4, "num_kv_heads": 2}
    for number, change in enumerate(({"qk_norm": True, "attention_bias": False}, qwen2)):
        decoder = replace(dense, **change)
        chosen = replace(recipe, model=replace(recipe.model, decoder=decoder), mup=replace(recipe.mup, init=1.0))
        assert chosen.mup != Mup()
        run = checkpoints.save(
            tmp_path / f"run{number}", chosen, checkpoints.random_model(chosen), RouterState.first(chosen.model)
        )
        out = tmp_path / f"out{number}"
        assert export(open_weights(run), out, "decoder") == ("Qwen3ForCausalLM", "Qwen2ForCausalLM")[number]
        ids = families.tokens(2, 20)
        with torch.no_grad():
            got = AutoModelForCausalLM.from_pretrained(out)(ids).logits
        want = all_logits(open_inference(run).forward, text_batch(ids))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_exported_chat_template_writes_our_prompts(template, tmp_path) -> None:
    run = checkpoints.save(
        tmp_path / "run",
        chosen := checkpoints.recipe(chat_template=template),
        checkpoints.random_model(chosen),
        checkpoints.routers(chosen),
    )
    export(open_weights(run), tmp_path / "out")
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    ours = Tokenizer(open_weights(run).folder, template)
    turns = [Turn("user", "Is it red?"), Turn("assistant", "no"), Turn("user", "Why is it so?")]
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    ids = [i for part in prompt(turns, [], ours).parts if isinstance(part, Text) for i in part.token_ids.tolist()]
    assert theirs.apply_chat_template(messages, return_dict=False) == ids
    assert conversation_pieces(turns, ours.template)
    assert (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (ours.eos_id, ours.pad_id, ours.vocab_size)


def test_a_form_that_does_not_hold_the_model_says_why(tmp_path) -> None:
    chosen = checkpoints.recipe(bias=True)
    run = checkpoints.save(
        tmp_path / "run", chosen, checkpoints.random_model(chosen), checkpoints.routers(chosen, strength=0.1)
    )
    reader = open_weights(run)
    with pytest.raises(ConfigError) as caught:
        export(reader, tmp_path / "out", "llava")
    text = str(caught.value)
    assert text.endswith("Take --form own.") and "step_00000007 cannot become llava: " in text
    assert "LLaVA's connector is an mlp, this one is a c_abstractor; " in text
    assert "LLaVA has no experts in vision and connector; " in text
    assert "LLaVA's canvas is square, this one is 16 x 24" in text
    assert "its routers have learnt biases (balance: bias), which no public class has; " in text
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").write_text("")
    with pytest.raises(ConfigError, match="out is not empty; choose another --out, or empty it"):
        export(reader, tmp_path / "out")
