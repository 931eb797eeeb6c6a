"""The image encoder against Hugging Face's CLIP, and positions of other grids."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPVisionModel

from mmtrain.config.schema import Vision
from mmtrain.model.vision import PIXEL_MEAN, PIXEL_STD, PatchEmbedding, VisionEncoder, interpolate_positions
from tests.model.small import VISION, fill

SQUARE = replace(VISION, image_size=(28, 28), norm_eps=1e-4)


def made(config: Vision) -> VisionEncoder:
    return fill(VisionEncoder(config, None, recompute=False))


def pixels(config: Vision, count: int = 3) -> torch.Tensor:
    shape = (count, 3, *config.image_size)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def normalised(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    return (images / 255 - mean) / std


def clip_state(encoder: VisionEncoder, names: list[str]) -> dict[str, torch.Tensor]:
    """Our tensors under Hugging Face's names; layers that were cut away get zeros, and are not read."""
    state = {}
    prefix = "vision_model." if names[0].startswith("vision_model.") else ""
    for name, value in encoder.state_dict().items():
        for ours, theirs in (
            ("patch.", "embeddings.patch_embedding."),
            ("class_token", "embeddings.class_embedding"),
            ("positions", "embeddings.position_embedding.weight"),
            ("pre_norm", "pre_layrnorm"),
            ("blocks.", "encoder.layers."),
            ("norm1", "layer_norm1"),
            ("norm2", "layer_norm2"),
            ("attention.", "self_attn."),
            (".q.", ".q_proj."),
            (".k.", ".k_proj."),
            (".v.", ".v_proj."),
            (".out.", ".out_proj."),
            ("mlp.up", "mlp.fc1"),
            ("mlp.down", "mlp.fc2"),
        ):
            name = name.replace(ours, theirs)
        state[prefix + name] = value.squeeze(0) if name.endswith("class_embedding") else value
    return state


@pytest.mark.parametrize("select_layer", [-1, -2, -3])
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_features_are_the_hidden_states_of_clip(select_layer: int, activation: str) -> None:
    config = replace(SQUARE, select_layer=select_layer, activation=activation)
    encoder = made(config)
    twin = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=28,
            patch_size=7,
            hidden_act=activation,
            layer_norm_eps=1e-4,
        )
    ).eval()
    state = clip_state(encoder, list(twin.state_dict()))
    left = twin.load_state_dict(state, strict=False)
    assert not left.unexpected_keys
    assert len(encoder.blocks) == 4 + select_layer
    images = pixels(config)
    with torch.no_grad():
        want = twin(normalised(images), output_hidden_states=True).hidden_states[select_layer][:, 1:]
        got, report = encoder(images, torch.ones(3, dtype=torch.bool), None)
    assert report is None
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(encoder(normalised(images), torch.ones(3, dtype=torch.bool), None)[0], got)


def test_without_class_token_and_pre_norm_the_layout_is_siglips() -> None:
    config = replace(VISION, class_token=False, pre_norm=False, patch_bias=True, final_norm=True)
    encoder = made(config)
    names = dict(encoder.named_parameters())
    assert not {"class_token", "pre_norm.weight"} & names.keys()
    assert {"patch.bias", "final_norm.weight"} <= names.keys()
    assert encoder.positions.shape == (12, 32)
    x = encoder.patch(pixels(config)) + encoder.positions
    for block in encoder.blocks:
        x = x + block.attention(block.norm1(x))
        x = x + block.mlp(block.norm2(x))
    got, _ = encoder(pixels(config), torch.ones(3, dtype=torch.bool), None)
    torch.testing.assert_close(got, F.layer_norm(x, (32,), encoder.final_norm.weight, encoder.final_norm.bias, 1e-5))


@pytest.mark.parametrize("bias", [True, False])
def test_patches_are_a_strided_convolution_row_by_row(bias: bool) -> None:
    patch = fill(PatchEmbedding(7, 10, bias))
    images = pixels(VISION)
    want = F.conv2d(normalised(images), patch.weight, patch.bias, stride=7).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patch(images), want, rtol=1e-4, atol=1e-4)
    assert patch(images).shape == (3, 12, 10)


def test_other_grids_keep_the_class_token_and_interpolate_the_rest() -> None:
    old = torch.randn(1 + 16, 5, generator=torch.Generator().manual_seed(1)).bfloat16()
    new = interpolate_positions(old, (4, 4), (8, 2), class_token=True)
    assert new.shape == (17, 5) and new.dtype == torch.float32
    assert torch.equal(new[0], old[0].float())
    grid = old[1:].float().T.reshape(1, 5, 4, 4)
    want = F.interpolate(grid, (8, 2), mode="bicubic", align_corners=False).reshape(5, 16).T
    torch.testing.assert_close(new[1:], want)
    assert interpolate_positions(old[1:], (4, 4), (6, 6), class_token=False).shape == (36, 5)
    assert torch.equal(interpolate_positions(old, (4, 4), (4, 4), True), old.float())


def test_a_constant_grid_stays_constant_when_interpolated() -> None:
    old = torch.cat((torch.full((1, 3), 9.0), torch.full((6, 3), 2.0)))
    new = interpolate_positions(old, (2, 3), (5, 4), class_token=True)
    torch.testing.assert_close(new[1:], torch.full((20, 3), 2.0))
