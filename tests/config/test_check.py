"""Each rule of a recipe and of its layout, with the words of its error."""

import pytest

from mmtrain.config.check import check, problems
from mmtrain.config.errors import ConfigError
from mmtrain.config.schema import Eval, LossWeights, Matching, Moe, Source, Upcycle, UpcyclePart
from tests.config.sample import RECIPE, changed

EXPERTS = {f"model__{part}__moe": Moe(num_experts=4, top_k=2) for part in ("vision", "connector", "decoder")}
SLICED = {"upcycle": Upcycle(vision=UpcyclePart()), "init_from": "runs/dense"}


def test_a_sound_recipe_has_no_problems():
    sparse = changed(RECIPE, **EXPERTS, parallel__expert=2, parallel__zero_stage=2)
    for recipe, world_size in ((RECIPE, 1), (RECIPE, 8), (sparse, 2), (sparse, 4)):
        assert list(problems(recipe, world_size)) == []
        check(recipe, world_size)
    check(changed(RECIPE, parallel__tensor=2), 4)


ONE_RANK = [
    # numbers out of range
    ({"optim__lr": 0.0}, "optim.lr=0.0 must be above 0"),
    ({"optim__lr": float("nan")}, "optim.lr=nan is not a finite number"),
    ({"optim__weight_decay": -0.1}, "optim.weight_decay=-0.1 must not be negative; 0 is the least"),
    ({"optim__beta2": 1.0}, "optim.beta2=1.0 must be at least 0 and below 1"),
    ({"optim__final_lr_ratio": 1.5}, "optim.final_lr_ratio=1.5 must be between 0 and 1"),
    ({"model__vision__num_layers": 0}, "model.vision.num_layers=0 must be at least 1"),
    ({"model__vision__image_size": (0, 8)}, "model.vision.image_size=[0, 8]: every number must be at least 1"),
    ({"guard__skip_steps": [3, 0]}, "guard.skip_steps=[3, 0]: every number must be at least 1"),
    ({"data__max_wait": 9}, "data.max_wait=9: 1 sources need at least 10 packs to keep their mixture"),
    (
        {"data__window": 5000},
        "data.window=5000: with 1 sources at most 3399 documents, so that the state of the stream stays below 64 KiB",
    ),
    ({"data__cache_gib": 0.0}, "data.cache_gib=0.0 must be above 0"),
    (
        {"data__loss_weights": LossWeights(0.0, 0.0)},
        "data.loss_weights: after_image and text_only are both 0, so nothing would be learnt; raise one of them",
    ),
    (
        {"data__loss_weights": LossWeights(-1.0, 1.0)},
        "data.loss_weights.after_image=-1.0 must not be negative; 0 is the least",
    ),
    ({"data__skip_packs": [0, -1]}, "data.skip_packs=[0, -1]: every number must be at least 0"),
    ({"data__sources": {"a": Source("x", -1.0)}}, "data.sources.a.weight=-1.0 must not be negative; 0 is the least"),
    ({"mup__base": {"decoder": {"hidden_size": 0}}}, "mup.base.decoder.hidden_size=0 must be above 0"),
    *(({f"mup__{name}": 0.0}, f"mup.{name}=0.0 must be above 0") for name in ("init", "router", "output", "attention")),
    (
        {"mup__cross_attention": 2.0},
        "mup.cross_attention=2: model.connector.kind=c_abstractor has no cross-attention; leave it at 1, or take "
        "attention_pool",
    ),
    ({"mup__lr": {"vision": 0.0}}, "mup.lr.vision=0.0 must be above 0"),
    (
        {"optim__name": "sgd", "mup__base": {"decoder": {"hidden_size": 32}}},
        "optim.name=sgd with mup.base: muP's rates are those of Adam's update, and SGD needs other powers of the "
        "width; take adamw, or leave mup.base out",
    ),
    # model
    (
        {"model__vision__image_size": (33, 48)},
        "model.vision.image_size: height 33 is not a multiple of model.vision.patch_size=8; the nearest are 32 and 40",
    ),
    (
        {"model__vision__image_size": (32, 4)},
        "model.vision.image_size: width 4 is not a multiple of model.vision.patch_size=8; the nearest is 8",
    ),
    (
        {"model__vision__num_heads": 5},
        "model.vision.hidden_size=32 is not a multiple of model.vision.num_heads=5; the nearest are 30 and 35",
    ),
    (
        {"model__vision__select_layer": 1},
        "model.vision.select_layer=1 must be between -2 (the first of 2 layers) and -1 (the last); the nearest is -1",
    ),
    (
        {"model__vision__select_layer": -3},
        "model.vision.select_layer=-3 must be between -2 (the first of 2 layers) and -1 (the last); the nearest is -2",
    ),
    (
        {"model__connector__num_tokens": 6},
        "model.connector.num_tokens=6 is not a square number; the nearest are 4 and 9",
    ),
    (
        {"model__connector__kind": "mlp"},
        "model.connector.num_tokens=4: kind mlp makes one token of each patch, and the grid has 4 x 6 = 24 patches; "
        "give 24, or take another kind",
    ),
    (
        {"model__connector__kind": "attention_pool", "model__connector__num_heads": 3},
        "model.connector.hidden_size=32 is not a multiple of model.connector.num_heads=3; the nearest are 30 and 33",
    ),
    (
        {"model__decoder__num_kv_heads": 3},
        "model.decoder.num_heads=4 is not a multiple of model.decoder.num_kv_heads=3; the nearest are 3 and 6",
    ),
    (
        {"model__decoder__head_dim": 7},
        "model.decoder.head_dim=7 is odd, and rotary positions turn pairs; the nearest are 6 and 8",
    ),
    (
        {"model__decoder__moe": Moe(num_experts=2, top_k=3)},
        "model.decoder.moe.top_k=3 is more than model.decoder.moe.num_experts=2; the nearest is 2",
    ),
    (
        {"model__vision__moe": Moe(num_experts=2, every=3)},
        "model.vision.moe.every=3: the part has 2 layers, so none would hold experts; the nearest is 2",
    ),
    ({"model__decoder__moe": Moe(num_experts=4, granularity=0)}, "model.decoder.moe.granularity=0 must be at least 1"),
    ({"model__decoder__moe": Moe(4, routed_scale=0.0)}, "model.decoder.moe.routed_scale=0.0 must be above 0"),
    (
        {"model__vision__moe": Moe(num_experts=4, granularity=3)},
        "model.vision.intermediate_size=64 is not a multiple of model.vision.moe.granularity=3; the nearest are 63 and "
        "66",
    ),
    (
        {"model__connector__moe": Moe(num_experts=4, granularity=3)},
        "model.decoder.hidden_size=32 is not a multiple of model.connector.moe.granularity=3; the nearest are 30 "
        "and 33",
    ),
    # start
    (
        {"requires_pretrained": True},
        "init_from is empty: this recipe starts from pretrained weights and makes no sense without them; "
        "give init_from=CHECKPOINT, or model.vision.pretrained=FOLDER and model.decoder.pretrained=FOLDER",
    ),
    ({"trainable": []}, "trainable is empty, so nothing would learn; trainable: ['*'] trains everything"),
    (
        {"upcycle": Upcycle(vision=UpcyclePart()), "init_from": "runs/dense"},
        "upcycle.vision makes experts, but model.vision.moe.num_experts=0; give model.vision.moe.num_experts, "
        "or set upcycle.vision to null",
    ),
    (
        {"upcycle": Upcycle(vision=UpcyclePart()), "model__vision__moe": Moe(num_experts=4)},
        "upcycle.vision copies dense weights, but init_from is empty; give init_from=DENSE_CHECKPOINT or "
        "model.vision.pretrained=FOLDER",
    ),
    (
        {
            "upcycle": Upcycle(vision=UpcyclePart()),
            "model__vision__moe": Moe(num_experts=4, renormalize=False),
            "init_from": "runs/dense",
        },
        "upcycle.vision keeps the dense function only where gates sum to 1, but model.vision.moe.renormalize="
        "false; set it to true",
    ),
    (
        {**SLICED, "model__vision__moe": Moe(num_experts=7, granularity=4, shared=1, top_k=3, routed_scale=3.0)},
        "upcycle.vision: model.vision.moe.num_experts=7 is not a multiple of the 3 slices of a dense MLP that routed "
        "experts hold (granularity=4, shared=1); the nearest are 6 and 9",
    ),
    (
        {**SLICED, "model__vision__moe": Moe(num_experts=8, granularity=4, top_k=2, routed_scale=4.0)},
        "upcycle.vision: model.vision.moe.top_k=2 is not a multiple of the 4 slices of a dense MLP that routed experts "
        "hold (granularity=4, shared=0); the nearest is 4",
    ),
    (
        {**SLICED, "model__vision__moe": Moe(num_experts=8, granularity=2, shared=3)},
        "upcycle.vision: model.vision.moe.shared=3 slices are more than the model.vision.moe.granularity=2 that a "
        "dense MLP has; the nearest is 2",
    ),
    (
        {**SLICED, "model__vision__moe": Moe(num_experts=4, shared=1)},
        "upcycle.vision keeps the dense function with model.vision.moe.routed_scale=0.5 (granularity=1, shared=1), not "
        "with 1",
    ),
    # data
    (
        {"data__sources": {}},
        "data.sources is empty; name at least one folder of shards, data.sources.NAME.shards=FOLDER",
    ),
    (
        {"data__sources": {"a": Source("x", 0.0), "b": Source("y", 0.0)}},
        "data.sources: every weight is 0 (a, b); give one of them a weight above 0",
    ),
    (
        {"data__sequence_length": 20, "data__sub_images": 4},
        "data.sequence_length=20 holds no text beside one image of 5 x 4 = 20 tokens (1 + data.sub_images=4, "
        "model.connector.num_tokens=4); the least is 21",
    ),
    (
        {"data__max_images": 4, "data__sub_images": 4},
        "data.max_images=4 is less than the 5 pieces of one image (1 + data.sub_images=4); the nearest is 5",
    ),
    ({"data__lanes": 3}, "data.lanes=3 does not divide data.global_batch=8; lanes that fit: 1, 2, 4, 8"),
    # length, measuring, names
    ({"steps": 0}, "steps=0 and epochs=0: the stage has no length; give one of them"),
    ({"epochs": 2.0}, "steps=10 and epochs=2 are both given; set one of them to 0"),
    (
        {"optim__warmup_steps": 10},
        "optim.warmup_steps=10 leaves none of steps=10 at the full rate; the nearest is 9",
    ),
    (
        {"checkpoint__keep_best": True},
        "checkpoint.keep_best needs a held-out loss, but eval.every=0; give eval.every and eval.sources, "
        "or set checkpoint.keep_best=false",
    ),
    (
        {"checkpoint__keep_best": True, "eval": Eval(every=5, matching=Matching("m", "i"))},
        "checkpoint.keep_best needs a held-out loss, but eval.sources is empty; give eval.every and eval.sources, "
        "or set checkpoint.keep_best=false",
    ),
    (
        {"eval__every": 5},
        "eval.every=5 has nothing to measure; give eval.sources or eval.matching, or set eval.every=0",
    ),
    (
        {"eval": Eval(every=5, sources={"a": Source("x", 0.0), "b": Source("y", 0.0)})},
        "eval.sources: every weight is 0 (a, b); raise one, or set eval.every=0",
    ),
    (
        {"eval": Eval(every=5, sources={"a": Source("x", max_epochs=2.0)})},
        "eval.sources.a.max_epochs=2: a held-out source is read once at most, up to eval.batches; leave it out",
    ),
    ({"mup__lr": {"vison": 2.0}}, "mup.lr.vison: no such part (did you mean vision?)"),
    ({"mup__base": {"decodr": {}, "vision": {}}}, "mup.base.decodr: no such part (did you mean decoder?)"),
    (
        {"mup__base": {"vision": {"hiden_size": 8}}},
        "mup.base.vision.hiden_size: no width of vision (did you mean hidden_size?)",
    ),
    ({"resume_allow": ["optm"]}, "resume_allow: 'optm' is no key of a recipe (did you mean optim.lr?)"),
    # engine
    (
        {"parallel__zero_stage": 0, "parallel__precision": "bf16"},
        "parallel.zero_stage=0 with precision=bf16 cannot sum gradients in fp32; take zero_stage 1, or precision=fp32",
    ),
    (
        {"parallel__zero_stage": 0, "parallel__offload_optimizer": True},
        "parallel.offload_optimizer needs sharded optimizer state; take zero_stage 1, 2 or 3",
    ),
]

MANY_RANKS = [
    (
        {
            "model__vision__moe": Moe(num_experts=4, granularity=4),
            "parallel__precision": "bf16",
            "parallel__zero_stage": 2,
            "parallel__tensor": 2,
            "model__vision__intermediate_size": 48,
        },
        2,
        "model.vision.intermediate_size=48 is not a multiple of model.vision.moe.granularity=4 x parallel.tensor=2 x 8"
        ", as experts in bf16 need; the nearest is 64; or take precision=fp32",
    ),
    (
        {
            "model__decoder__moe": Moe(num_experts=4),
            "parallel__precision": "bf16",
            "parallel__zero_stage": 2,
            "model__decoder__hidden_size": 20,
        },
        1,
        "model.decoder.hidden_size=20 is not a multiple of 8, as experts in bf16 need; the nearest are 16 and 24; or "
        "take precision=fp32",
    ),
    (
        {"parallel__sequence_parallel": True},
        2,
        "parallel.sequence_parallel=true shares the positions over tensor ranks, and parallel.tensor=1 has no other; "
        "set it to false, or parallel.tensor to 2 or more",
    ),
    (
        {"parallel__sequence_parallel": True, "parallel__tensor": 2, "data__sequence_length": 63},
        2,
        "data.sequence_length=63 is not a multiple of parallel.tensor=2; the nearest are 62 and 64",
    ),
    (
        {**EXPERTS, "parallel__zero_stage": 0, "parallel__expert": 2},
        2,
        "parallel.zero_stage=0 with parallel.expert=2 clips with a wrong gradient norm; "
        "take zero_stage 1, 2 or 3, or expert=1",
    ),
    (
        {"parallel__tensor": 4},
        4,
        "model.decoder.num_kv_heads=2 is less than parallel.tensor=4, and a head cannot be cut; "
        "tensor sizes that fit: 1, 2",
    ),
    (
        {"model__vision__num_heads": 1, "parallel__tensor": 2},
        2,
        "model.vision.num_heads=1 is not a multiple of parallel.tensor=2; tensor sizes that fit: 1",
    ),
    (
        {"model__vision__intermediate_size": 63, "parallel__tensor": 2},
        2,
        "model.vision.intermediate_size=63 is not a multiple of parallel.tensor=2; "
        "tensor sizes that fit: 1, 3, 7, 9, 21, 63",
    ),
    (
        {"model__decoder__intermediate_size": 9, "parallel__tensor": 2},
        2,
        "model.decoder.intermediate_size=9 is not a multiple of parallel.tensor=2; tensor sizes that fit: 1, 3, 9",
    ),
    (
        {"model__decoder__hidden_size": 9, "parallel__tensor": 2},
        2,
        "model.decoder.hidden_size=9 is not a multiple of parallel.tensor=2; tensor sizes that fit: 1, 3, 9",
    ),
    (
        {
            "model__connector__kind": "attention_pool",
            "model__connector__hidden_size": 33,
            "model__connector__num_heads": 3,
            "parallel__tensor": 2,
        },
        2,
        "model.connector.num_heads=3 is not a multiple of parallel.tensor=2; tensor sizes that fit: 1, 3",
    ),
    (
        {"model__decoder__moe": Moe(num_experts=4, granularity=64), "parallel__tensor": 2},
        2,
        "model.decoder.intermediate_size / model.decoder.moe.granularity=1 is not a multiple of parallel.tensor=2; "
        "tensor sizes that fit: 1",
    ),
    (
        {"model__vision__moe": Moe(num_experts=3, top_k=1), "parallel__expert": 2},
        2,
        "model.vision.moe.num_experts=3 is not a multiple of parallel.expert=2; expert sizes that fit: 1, 3",
    ),
    (
        {"parallel__tensor": 2},
        3,
        "3 ranks are not a multiple of parallel.tensor=2; the nearest are 2 and 4",
    ),
    (
        {**EXPERTS, "parallel__expert": 4},
        2,
        "parallel.expert=4 does not divide the data size 2 (2 ranks / parallel.tensor=1); expert sizes that fit: 1, 2",
    ),
    (
        {"data__micro_batch": 3},
        2,
        "data.global_batch=8 is not a multiple of data.micro_batch=3 x data size 2 (2 ranks / parallel.tensor=1) = 6; "
        "the nearest are 6 and 12",
    ),
    (
        {"data__lanes": 4},
        8,
        "the data size 8 (8 ranks / parallel.tensor=1) does not divide the 4 lanes of the stream (data.lanes, or else "
        "data.global_batch); data sizes that fit: 1, 2, 4",
    ),
]


@pytest.mark.parametrize(("values", "sentence"), ONE_RANK, ids=[text[:40] for _, text in ONE_RANK])
def test_a_broken_rule_is_one_sentence(values, sentence):
    assert list(problems(changed(RECIPE, **values), 1)) == [sentence]


@pytest.mark.parametrize(("values", "ranks", "sentence"), MANY_RANKS, ids=[text[:40] for _, _, text in MANY_RANKS])
def test_a_broken_layout_is_one_sentence(values, ranks, sentence):
    assert list(problems(changed(RECIPE, **values), ranks)) == [sentence]


def test_a_vocabulary_that_tensor_ranks_cannot_share_is_named_with_its_padding():
    recipe = changed(
        RECIPE,
        parallel__tensor=256,
        model__decoder__num_heads=256,
        model__decoder__num_kv_heads=256,
        model__decoder__intermediate_size=256,
        model__decoder__hidden_size=256,
        model__vision__hidden_size=256,
        model__vision__num_heads=256,
        model__vision__intermediate_size=256,
    )
    assert list(problems(recipe, 256)) == [
        "model.decoder.vocab_size=300, padded to 384, is not a multiple of parallel.tensor=256; "
        "tensor sizes that fit: 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 384"
    ]


def test_check_raises_all_problems_at_once():
    recipe = changed(RECIPE, steps=0, parallel__tensor=2, trainable=[])
    with pytest.raises(ConfigError) as caught:
        check(recipe, 3)
    assert str(caught.value).splitlines() == [
        "recipe sample cannot run on 3 ranks: 3 problems",
        "  - trainable is empty, so nothing would learn; trainable: ['*'] trains everything",
        "  - steps=0 and epochs=0: the stage has no length; give one of them",
        "  - 3 ranks are not a multiple of parallel.tensor=2; the nearest are 2 and 4",
    ]


def test_a_single_problem_is_a_single_line():
    with pytest.raises(ConfigError, match=r"^recipe sample cannot run on 1 rank: steps=0 and epochs=0: [^\n]*$"):
        check(changed(RECIPE, steps=0), 1)
