"""Parameter counts and FLOPs of known models."""

from dataclasses import replace

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmtrain.config.schema import Connector, Decoder, Model, Moe, Vision
from mmtrain.model.build import Count, Flops, meta_model, parameter_counts
from mmtrain.model.stepio import first_inputs
from tests.model.small import ALL_PARTS, DENSE, built, micro, sparse

CUMO = Model(
    Vision(image_size=(336, 336), activation="quick_gelu", select_layer=-1),
    Connector(kind="mlp", num_tokens=576),
    Decoder(),
)


def test_known_models_have_their_published_sizes() -> None:
    """CLIP ViT-L/14-336 without post-norm and projection; Mistral-7B-v0.1, 7,241,732,096."""
    counts = parameter_counts(CUMO)
    block = 12 * 1024 * 1024 + 13 * 1024
    clip = 24 * block + 577 * 1024 + 1024 + 3 * 14 * 14 * 1024 + 2 * 1024
    assert counts["vision"] == Count(clip, clip)
    assert counts["connector"].total == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert counts["decoder"].total == 7_241_732_096
    assert counts["all"].total == sum(counts[part].total for part in ALL_PARTS)


def test_experts_multiply_the_total_and_top_k_the_active_count() -> None:
    dense, moe = parameter_counts(CUMO), parameter_counts(sparse(CUMO, *ALL_PARTS, moe=Moe(num_experts=4, top_k=2)))
    mlp = {
        "vision": 24 * (2 * 1024 * 4096 + 5120),
        "connector": dense["connector"].total,
        "decoder": 32 * 3 * 4096 * 14336,
    }
    routers = {"vision": 24 * 4 * 1024, "connector": 4 * 1024, "decoder": 32 * 4 * 4096}
    for part in ALL_PARTS:
        assert moe[part].total == dense[part].total + 3 * mlp[part] + routers[part]
        assert moe[part].active == dense[part].total + mlp[part] + routers[part]


def test_padding_of_the_vocabulary_is_not_counted_and_a_tied_head_once() -> None:
    decoder = DENSE.decoder
    padded = sum(p.numel() for name, p in meta_model(DENSE).named_parameters() if name.startswith("decoder."))
    counted = parameter_counts(DENSE)["decoder"].total
    assert padded - counted == 2 * (128 - 100) * decoder.hidden_size
    tied = parameter_counts(replace(DENSE, decoder=replace(decoder, tied=True)))["decoder"].total
    assert counted - tied == 100 * decoder.hidden_size


@pytest.mark.parametrize("kind", ["c_abstractor", "avg_pool", "attention_pool", "mlp"])
def test_the_formula_counts_what_torch_counts(kind: str) -> None:
    tokens = 12 if kind == "mlp" else 4
    connector = replace(DENSE.connector, kind=kind, num_tokens=tokens)
    model = replace(DENSE, connector=connector, decoder=replace(DENSE.decoder, num_kv_heads=4))
    batch = micro(model, [[("it", 1)], [("it", 2)]], tokens + 3)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it does not know the CPU's kernel
        built(model)(batch, first_inputs(model), logits_at=(batch.weights > 0).flatten().nonzero().squeeze(1))
    length = tokens + 3
    want = Flops.of(model).step(tokens=2 * length, images=2, targets=6, context=length) / 3
    # The formula knows no depthwise convolution, and takes squeeze-excitation to run at every cell.
    assert counter.get_total_flops() == pytest.approx(want, rel=0.02 if kind == "c_abstractor" else 1e-6)


def test_active_flops_of_experts_are_those_of_top_k_of_them() -> None:
    """A sparse part with top_k 2 costs what its dense twin with doubled MLP width costs, and its router."""
    wide = replace(DENSE, decoder=replace(DENSE.decoder, intermediate_size=2 * DENSE.decoder.intermediate_size))
    router = 3 * 2 * 10.0 * DENSE.decoder.num_layers * 4 * DENSE.decoder.hidden_size
    case = {"tokens": 10.0, "images": 0.0, "targets": 5.0, "context": 4.0}
    found = Flops.of(sparse(DENSE, "decoder")).step(**case)
    assert found == pytest.approx(Flops.of(wide).step(**case) + router)
