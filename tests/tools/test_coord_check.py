"""The coordinate check on a small model with experts in all three parts: muP passes, SP and every fault are caught."""

from mmtrain.config.schema import Connector, Decoder, Model, Moe, Mup, Optim, Recipe, Vision

MOE = Moe(num_experts=8, top_k=2)
MODEL = Model(
    vision=Vision(
        image_size=(16, 16), patch_size=4, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64, moe=MOE
    ),
    connector=Connector(kind="avg_pool", num_tokens=4, hidden_size=32, depth=1, moe=MOE),
    decoder=Decoder(
        vocab_size=128,
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=64,
        moe=MOE,
    ),
)
RECIPE = Recipe(name="coord", out="nowhere", model=MODEL, optim=Optim(lr=4e-3), mup=Mup())
