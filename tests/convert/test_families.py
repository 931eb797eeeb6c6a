"""Every family's checkpoint, as transformers writes it, gives our model transformers' own logits and greedy text."""

import pytest
import torch

from mmtrain.inference import open_inference
from tests.convert import families
from tests.convert.cases import (
    all_logits,
    convert,
    greedy,
    image_batch,
    import_decoder,
    text_batch,
)

TOLERANCE = 1e-4  # absolute, of logits
NEW_TOKENS = 32


@pytest.mark.parametrize("family", families.DECODERS)
def test_a_decoder_computes_what_transformers_computes(family, tmp_path, monkeypatch) -> None:
    twin = families.random_twin(*families.DECODERS[family])
    folder = families.save(twin, tmp_path / "hf", shard="40KB" if family in ("llama", "mixtral") else "50GB")
    opened = open_inference(import_decoder(monkeypatch, folder, tmp_path / "mm"))
    ids = families.tokens(3, 40)
    with torch.no_grad():
        want = twin(ids).logits
    got = all_logits(opened.forward, text_batch(ids))
    assert want.std() > 0.5  # nothing is equal because everything is small
    assert (got - want).abs().max() <= TOLERANCE
    prompt = families.tokens(2, 9, seed=2)
    assert greedy(opened.forward, text_batch(prompt), 2, NEW_TOKENS) == families.greedy_of(twin, prompt, NEW_TOKENS)


@pytest.mark.parametrize("family", families.WHOLES)
def test_a_whole_model_computes_what_transformers_computes(family, tmp_path, monkeypatch, capsys) -> None:
    twin = families.random_twin(*families.WHOLES[family])
    folder = families.save(twin, tmp_path / "hf")
    assert convert(monkeypatch, "hf-to-mm", "--vlm", folder, "--out", tmp_path / "mm") == 0
    never_read = capsys.readouterr().out.partition("never read:")[2]
    assert ("image_newline" in never_read) == (family == "llava_next") and "post_layernorm.weight" in never_read
    opened = open_inference(tmp_path / "mm")
    vision, connector = opened.recipe.model.vision, opened.recipe.model.connector
    assert (vision.select_layer, vision.final_norm, connector.kind, connector.num_tokens) == (-2, False, "mlp", 16)
    assert opened.recipe.model.decoder.tied == (family == "llava_siglip_tied")
    images = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    ids = families.tokens(1, 60)
    ids[0, 5:21] = ids[0, 30:46] = families.IMAGE_ID
    batch = image_batch(ids, images, families.IMAGE_ID)
    pixels = normalised(images, "siglip" if "siglip" in family else "clip")
    if family != "llava_next":
        with torch.no_grad():
            want = twin(input_ids=ids, pixel_values=pixels).logits
        assert greedy(opened.forward, batch, 2, NEW_TOKENS) == families.greedy_of(
            twin, ids, NEW_TOKENS, pixel_values=pixels
        )
    else:  # its own layout of panels has separators, which ours has not: the same features in LLaVA-1.5's places
        with torch.no_grad():
            states = twin.model.vision_tower(pixels, output_hidden_states=True).hidden_states
            features = twin.model.multi_modal_projector(states[-2][:, 1:])
            embeddings = twin.get_input_embeddings()(ids)
            embeddings[0, ids[0] == families.IMAGE_ID] = features.flatten(0, 1)
            want = twin(inputs_embeds=embeddings).logits
    assert (all_logits(opened.forward, batch) - want).abs().max() <= TOLERANCE


def normalised(images: torch.Tensor, kind: str) -> torch.Tensor:
    """Pixels as the family's image processor makes them."""
    mean, std = {
        "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    }[kind]
    return (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@pytest.mark.parametrize("size", [(28, 28), (42, 21)], ids=["own size", "another size"])
@pytest.mark.parametrize("select", [-1, -2])
@pytest.mark.parametrize("family", families.TOWERS)
def test_a_tower_gives_the_hidden_states_of_transformers(family, select, size, tmp_path) -> None:
    twin = families.random_twin(*families.TOWERS[family])
    twin.save_pretrained(tmp_path / "hf")
    tower = imported_tower(tmp_path / "hf", tmp_path, f"model.vision.image_size=[{size[0]},{size[1]}]", select)
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        out = twin(normalised(images, family), output_hidden_states=True, interpolate_pos_encoding=size != (28, 28))
        got, _ = tower(images, torch.ones(2, dtype=torch.bool), None)
    want = out.hidden_states[select]
    if family == "siglip" and select == -1:
        want = out.last_hidden_state  # behind its norm
    want = want[:, 1:] if family == "clip" else want
    assert (got - want).abs().max() <= TOLERANCE


def imported_tower(folder, tmp_path, size: str, select: int):
    """The image tower of a recipe whose vision is pretrained."""
    from mmtrain.assemble import blueprint
    from mmtrain.config.load import load
    from mmtrain.model.vlm import VisionLanguageModel
    from mmtrain.parallel.box import Box
    from mmtrain.run.comm import SingleProcess
    from mmtrain.weights import Weights

    (tmp_path / "recipe.yaml").write_text("name: tower\nout: unused\ndata: {tokenizer: unused}\n")
    chosen = load(
        tmp_path / "recipe.yaml",
        [f"model.vision.pretrained={folder}", size, f"model.vision.select_layer={select}"]
        + ([f"model.vision.final_norm={select == -1}"] if "siglip" in (folder / "config.json").read_text() else [])
        + ["model.decoder.num_layers=1", "model.decoder.vocab_size=32", "model.decoder.hidden_size=32"]
        + ["model.decoder.intermediate_size=32", "model.connector.hidden_size=16", "model.connector.num_tokens=4"],
    )
    _, registry = blueprint(chosen)
    weights = Weights(chosen, registry, SingleProcess())
    model = VisionLanguageModel(chosen.model)
    with torch.no_grad():
        for name, parameter in model.vision.named_parameters():
            parameter.copy_(weights.make(f"vision.{name}", Box.whole(parameter.shape)))
    return model.vision
