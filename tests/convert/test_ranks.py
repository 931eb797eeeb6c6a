"""Pretrained folders over tensor ranks and expert ranks: transformers' logits and greedy text again."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from mmtrain.config.schema import Parallel
from mmtrain.convert.export import export
from mmtrain.run.reader import open_weights
from tests import dist, tiny
from tests.convert import families, ranks
from tests.convert.cases import SMALL, image_batch, text_batch
from tests.convert.test_families import TOLERANCE, normalised
from tests.data.inputs import tokenizer

NEW_TOKENS = 32
WHOLES = ("llava", "llava_siglip_tied", "llava_mixtral")

LAYOUTS = {
    "2 tensor ranks": (["parallel.tensor=2"], (*families.DECODERS, *WHOLES)),
    "2 expert ranks": (["parallel.expert=2"], (*families.SPARSE, "llava_mixtral")),
}


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """Family -> (recipe, overrides), batches, and transformers' logits and text."""
    made = {}
    for family in (*families.DECODERS, *WHOLES):
        kind, config = families.DECODERS.get(family) or families.WHOLES[family]
        twin = families.random_twin(kind, config)
        folder = families.save(twin, tmp_path_factory.mktemp(family))
        recipe = folder / "recipe.yaml"
        recipe.write_text("name: a\nout: b\n")
        ids, prompt = families.tokens(2, 24), families.tokens(2, 9, seed=2)
        batches, more, overrides = [text_batch(ids), text_batch(prompt)], {}, SMALL
        parts = ["decoder"]
        if family in WHOLES:
            ids = prompt = families.tokens(1, 40)
            ids[0, 5:21] = families.IMAGE_ID
            images = torch.randint(0, 256, (1, 3, 28, 28), dtype=torch.uint8)
            batches, more = (
                [image_batch(ids, images, families.IMAGE_ID)] * 2,
                {"pixel_values": normalised(images, "siglip" if "siglip" in family else "clip")},
            )
            parts, overrides = ["vision", "connector", "decoder"], []
        overrides = [*overrides, *(f"model.{part}.pretrained={folder}" for part in parts)]
        with torch.no_grad():
            logits = twin(input_ids=ids, **more).logits.flatten(0, 1)
        text = families.greedy_of(twin, prompt, NEW_TOKENS, **more)
        made[family] = ((str(recipe), overrides), batches, logits, text)
    return made


@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_computes_what_transformers_computes(layout, twins) -> None:
    overrides, chosen = LAYOUTS[layout]
    cases = [(twins[family][0][0], [*twins[family][0][1], *overrides], *twins[family][1]) for family in chosen]
    for found in dist.run(ranks.answers, 2, cases, NEW_TOKENS, limit=500):
        for family, (logits, text) in zip(chosen, found, strict=True):
            assert (logits - twins[family][2]).abs().max() <= TOLERANCE, family
            assert text == twins[family][3], family


def test_a_norm_over_all_heads_splits_over_tensor_ranks_with_its_gradients() -> None:
    for wanted, got in dist.run(ranks.norm_over_all_heads, 2, 12, limit=120):
        for want, value in zip(wanted, got, strict=True):
            torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-6)


@pytest.mark.timeout(600)
def test_what_four_ranks_trained_leaves_as_what_one_process_trained(tmp_path) -> None:
    words = tokenizer()
    recipe = tiny.recipe()
    recipe = replace(
        recipe, model=replace(recipe.model, decoder=replace(recipe.model.decoder, vocab_size=words.vocab_size))
    )
    layouts = {"one": (1, Parallel(zero_stage=1)), "four": (4, Parallel(zero_stage=2, tensor=2, expert=2))}
    for name, (world, parallel) in layouts.items():
        given = (str(tmp_path / name), replace(recipe, parallel=parallel), words.path.read_bytes())
        dist.run(ranks.save_trained, world, *given, limit=500)
        export(open_weights(tmp_path / name), tmp_path / f"{name}_hf")
    one, four = (load_file(tmp_path / f"{name}_hf/model.safetensors") for name in layouts)
    assert one.keys() == four.keys()
    assert max(float((four[name] - one[name]).norm() / one[name].norm().clamp(min=1e-3)) for name in one) <= 1e-5
    configs = [(tmp_path / f"{name}_hf/config.json").read_text() for name in layouts]
    assert configs[0] == configs[1]
