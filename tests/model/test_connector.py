"""The four connectors: shapes, sizes, and slow twins."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mmtrain.config.schema import Connector, Decoder, Model, Vision
from mmtrain.model.block import Mlp
from mmtrain.model.build import parameter_counts
from mmtrain.model.connector import Bottleneck, average_cells, build_connector
from mmtrain.model.stepio import first_inputs
from tests.model.small import CONNECTOR, DENSE, SPARSE, fill

KINDS = ("c_abstractor", "avg_pool", "attention_pool", "mlp")


def with_kind(kind: str, **changes: object) -> Model:
    """The small model with that connector; its grid is 4 x 3."""
    tokens = 12 if kind == "mlp" else 4
    return replace(DENSE, connector=replace(CONNECTOR, kind=kind, num_tokens=tokens, **changes))


def features(model: Model, count: int = 3) -> torch.Tensor:
    rows, columns = model.vision.grid()
    shape = (count, rows * columns, model.vision.hidden_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("experts", [False, True])
def test_every_connector_makes_its_tokens_on_a_grid_that_is_not_square(kind: str, experts: bool) -> None:
    model = with_kind(kind, **({"moe": SPARSE} if experts else {}))
    connector = fill(build_connector(model))
    valid = torch.tensor([True, True, False])
    x = features(model).requires_grad_()
    out, report = connector(x, valid, first_inputs(model).routers.get("connector"))
    tokens = model.connector.num_tokens
    assert out.shape == (3, tokens, model.decoder.hidden_size)
    assert (report is not None) == experts
    if experts:
        assert report.counts.shape == (1, 4) and report.counts.sum() == 2 * tokens * SPARSE.top_k
    out.square().sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.any() for parameter in connector.parameters() if not experts
    )
    assert x.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_images_do_not_influence_each_other(kind: str) -> None:
    model = with_kind(kind)
    connector = fill(build_connector(model))
    x = features(model)
    together, _ = connector(x, torch.ones(3, dtype=torch.bool), None)
    alone = torch.cat([connector(image.unsqueeze(0), torch.ones(1, dtype=torch.bool), None)[0] for image in x])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_average_cells_are_the_means_of_uneven_cells() -> None:
    x = torch.randn(2, 5, 7, 3, generator=torch.Generator().manual_seed(1))
    side, got = 3, average_cells(x, 3)
    assert got.shape == (2, 3, 3, 3)
    for i in range(side):
        for j in range(side):
            rows = slice(i * 5 // side, -(-(i + 1) * 5 // side))
            columns = slice(j * 7 // side, -(-(j + 1) * 7 // side))
            torch.testing.assert_close(got[:, i, j], x[:, rows, columns].mean((1, 2)))


@pytest.mark.parametrize("d_in", [6, 8])
def test_a_bottleneck_is_timms_in_convolutions(d_in: int) -> None:
    block = fill(Bottleneck(d_in, 8))
    x = torch.randn(2, 5, 4, d_in, generator=torch.Generator().manual_seed(1))

    def conv(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, layer.weight[:, :, None, None], layer.bias)

    def norm(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(1, keepdim=True)
        unit = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return unit * layer.weight[:, None, None] + layer.bias[:, None, None]

    image = x.permute(0, 3, 1, 2)
    y = F.silu(norm(block.norm1, conv(block.enter, image)))
    y = F.silu(norm(block.norm2, F.conv2d(y, block.depthwise.weight, padding=1, groups=8)))
    y = y * conv(block.excite, F.silu(conv(block.squeeze, F.adaptive_avg_pool2d(y, 1)))).sigmoid()
    shortcut = image if d_in == 8 else norm(block.shortcut_norm, conv(block.shortcut, image))
    want = F.silu(norm(block.norm3, conv(block.leave, y)) + shortcut).permute(0, 2, 3, 1)
    torch.testing.assert_close(block(x), want, rtol=1e-4, atol=1e-5)


def test_c_abstractor_is_its_stages_around_a_pooling() -> None:
    model = with_kind("c_abstractor", depth=2)
    connector, x = fill(build_connector(model)), features(model)
    y = (x + connector.positions).view(3, 4, 3, -1)
    y = average_cells(connector.stage1[1](connector.stage1[0](y)), 2)
    y = connector.stage2[1](connector.stage2[0](y)).view(3, 4, -1)
    torch.testing.assert_close(connector(x, torch.ones(3, dtype=torch.bool), None)[0], connector.mlp(y))


def test_attention_pool_adds_what_its_queries_read() -> None:
    model = with_kind("attention_pool")
    connector, x = fill(build_connector(model, attention_scale=0.2)), features(model)
    assert connector.attention.scale == 0.2
    queries = connector.queries.expand(3, -1, -1)
    read = connector.attention(connector.query_norm(queries), memory=connector.feature_norm(x))
    want = connector.mlp(connector.final_norm(queries + read))
    torch.testing.assert_close(connector(x, torch.ones(3, dtype=torch.bool), None)[0], want)


def test_c_abstractor_has_honeybees_parameter_count() -> None:
    """16 x 16 patches of width 1024 to 144 tokens of width 4096; the sum is worked out by hand, layer by layer."""
    model = Model(Vision(), Connector(kind="c_abstractor", num_tokens=144, hidden_size=1024, depth=3), Decoder())
    squeeze = 1024 * 256 + 256 + 256 * 1024 + 1024
    bottleneck = 2 * 1024 * 1024 + 9 * 1024 + 3 * 2 * 1024 + squeeze
    mlp = 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    total = parameter_counts(model)["connector"].total
    assert total == 6 * bottleneck + mlp + 256 * 1024 == 37_070_336


def test_the_mlp_connector_is_llavas() -> None:
    connector = build_connector(with_kind("mlp"))
    assert isinstance(connector.mlp, Mlp) and connector.mlp.activation == "gelu"
    assert {name for name, _ in connector.named_parameters()} == {
        "mlp.up.weight",
        "mlp.up.bias",
        "mlp.down.weight",
        "mlp.down.bias",
    }
