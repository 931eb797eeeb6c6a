"""The tiny recipe in plain PyTorch: the whole global batch in one forward, textbook formulas, float64.

Nothing here comes from mmtrain but the recipe, the parameters by global name, and muP's plain numbers (lr, decay, eps,
forward scales). Experts are a loop, logits are whole, attention is a softmax, AdamW, SGD and clipping are written out.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain.config.schema import Model, Moe, Recipe
from mmtrain.mup.roles import Scales

Params = dict[str, Tensor]
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass
class Routing:
    """What the routers did in one forward: raw losses by layer, counts, and how close the closest decision was."""

    balance: dict[str, list[Tensor]] = field(default_factory=dict)
    z: dict[str, list[Tensor]] = field(default_factory=dict)
    sources: dict[int, float] = field(default_factory=dict)
    counts: dict[str, list[Tensor]] = field(default_factory=dict)
    margin: float = math.inf
    inputs: Tensor | None = None
    """The decoder's input, whose gradient is kept."""


@dataclass
class Shares:
    """f of the previous step by part [layers, E], N by part, and by part the bias [layers, E] of the choice."""

    load: dict[str, Tensor]
    valid: dict[str, float]
    bias: dict[str, Tensor]


def logits(params: Params, recipe: Recipe, scales: Scales, batch: dict[str, Tensor], shares: Shares, routing: Routing):
    """Logits [B, T, V] of a batch of all packs and all images, valid ones only."""
    model = recipe.model
    features = vision(params, model, scales, batch["images"], routing, shares)
    tokens = connector(params, model, features, routing, shares)
    x = params["decoder.embedding.weight"][batch["tokens"]] * scales.embedding
    x = x.view(-1, x.shape[-1]).index_put((batch["slots"].flatten(),), tokens.flatten(0, 1)).view_as(x)
    routing.inputs = x
    if x.requires_grad:
        x.retain_grad()
    x = decoder(params, model, scales, x, batch, routing, shares)
    return (x * scales.output) @ params["decoder.head.weight"][: model.decoder.vocab_size].T


def forward(params: Params, recipe: Recipe, scales: Scales, batch: dict[str, Tensor], shares: Shares, weight: float):
    """(loss [], routing) of a batch of all packs and all images, valid ones only."""
    routing = Routing()
    scores = logits(params, recipe, scales, batch, shares, routing)
    ce = F.cross_entropy(scores.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    weighted, source = ce * batch["weights"].flatten(), batch["source_ids"].flatten()
    routing.sources = {s: float((weighted * (source == s)).sum().detach()) / weight for s in source.unique().tolist()}
    loss = weighted.sum() / weight
    for part in routing.balance:
        moe: Moe = getattr(recipe.model, part).moe
        loss = loss + moe.balance_coef * torch.stack(routing.balance[part]).mean()
        loss = loss + moe.z_coef * torch.stack(routing.z[part]).mean()
    return loss, routing


def layer_norm(params: Params, name: str, x: Tensor, eps: float) -> Tensor:
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (var + eps).sqrt() * params[f"{name}.weight"] + params[f"{name}.bias"]


def rms_norm(params: Params, name: str, x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * params[f"{name}.weight"]


def affine(params: Params, name: str, x: Tensor) -> Tensor:
    out = x @ params[f"{name}.weight"].T
    return out + params[f"{name}.bias"] if f"{name}.bias" in params else out


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, scale: float) -> Tensor:
    """q [B, T, H, h], k and v [B, S, K, h], allowed [B, T, S] -> [B, T, H * h]."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    if allowed is not None:
        scores = scores.masked_fill(~allowed.unsqueeze(1), -math.inf)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(2)


def mlp(params: Params, name: str, x: Tensor, valid: Tensor, part: str, act: str, model: Model, routing, shares):
    """Dense or sparse feed-forward of [..., d]; valid marks the tokens that router losses see."""
    if f"{name}.router.weight" not in params:
        return dense(params, name, x, act)
    moe: Moe = getattr(model, part).moe
    rows, good = x.flatten(0, -2), valid.flatten()
    logits = rows @ params[f"{name}.router.weight"].T
    p = logits.softmax(-1)
    layer = len(routing.z.setdefault(part, []))
    ranking = p + shares.bias[part][layer]
    ids = ranking.topk(moe.top_k, -1).indices
    top = p.gather(-1, ids)
    gates = top / top.sum(-1, keepdim=True)
    ordered = ranking.sort(-1, descending=True).values
    routing.margin = min(routing.margin, float((ordered[:, moe.top_k - 1] - ordered[:, moe.top_k]).min().detach()))
    out = torch.zeros(rows.shape[0], rows.shape[1] if part != "connector" else model.decoder.hidden_size, dtype=x.dtype)
    for e in range(moe.num_experts):
        gate = (gates * (ids == e)).sum(-1, keepdim=True)
        out = out + moe.routed_scale * gate * expert(params, name, e, rows, act)
    if moe.shared:
        out = out + dense(params, f"{name}.shared", rows, act)
    n = shares.valid[part]
    routing.z[part].append((torch.logsumexp(logits, -1).square() * good).sum() / n)
    f = shares.load[part][layer]
    balance = moe.num_experts * (f * (p * good.unsqueeze(1)).sum(0) / n).sum()
    routing.balance.setdefault(part, []).append(balance if moe.balance == "loss" else 0 * balance)
    chosen = torch.stack([((ids == e).any(-1) & good).sum() for e in range(moe.num_experts)])
    routing.counts.setdefault(part, []).append(chosen.to(x.dtype))
    return out.view(*x.shape[:-1], -1)


ACT = {"gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))), "silu": lambda x: x * torch.sigmoid(x)}


def dense(params: Params, name: str, x: Tensor, act: str) -> Tensor:
    up = affine(params, f"{name}.up", x)
    hidden = ACT["silu"](affine(params, f"{name}.gate", x)) * up if act == "swiglu" else ACT[act](up)
    return affine(params, f"{name}.down", hidden)


def expert(params: Params, name: str, e: int, x: Tensor, act: str) -> Tensor:
    up = x @ params[f"{name}.experts.up"][e].T
    down = params[f"{name}.experts.down"][e].T
    if act == "swiglu":
        return (ACT["silu"](x @ params[f"{name}.experts.gate"][e].T) * up) @ down
    up = ACT[act](up + params[f"{name}.experts.up_bias"][e])
    return up @ down + params[f"{name}.experts.down_bias"][e]


def vision(params: Params, model: Model, scales: Scales, images: Tensor, routing: Routing, shares: Shares) -> Tensor:
    """uint8 [N, 3, H, W] -> [N, P, d]."""
    config = model.vision
    dtype = params["vision.patch.weight"].dtype
    mean, std = (torch.tensor(v, dtype=dtype).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    x = F.conv2d((images.to(dtype) / 255 - mean) / std, params["vision.patch.weight"], stride=config.patch_size)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat((params["vision.class_token"].expand(len(x), 1, -1), x), 1) + params["vision.positions"]
    x = layer_norm(params, "vision.pre_norm", x, config.norm_eps)
    head = config.hidden_size // config.num_heads
    valid = torch.ones(x.shape[:2], dtype=torch.bool)
    for i in range(config.built_layers()):
        block = f"vision.blocks.{i}"
        y = layer_norm(params, f"{block}.norm1", x, config.norm_eps)
        q, k, v = (affine(params, f"{block}.attention.{n}", y).unflatten(-1, (-1, head)) for n in "qkv")
        x = x + affine(params, f"{block}.attention.out", attend(q, k, v, None, scales.attention_vision))
        y = layer_norm(params, f"{block}.norm2", x, config.norm_eps)
        x = x + mlp(params, f"{block}.mlp", y, valid, "vision", config.activation, model, routing, shares)
    return x[:, 1:]


def connector(params: Params, model: Model, features: Tensor, routing: Routing, shares: Shares) -> Tensor:
    """C-Abstractor: [N, P, d_v] -> [N, M, d]."""
    side = math.isqrt(model.connector.num_tokens)
    x = (features + params["connector.positions"]).unflatten(1, model.vision.grid())
    for i in range(model.connector.depth):
        x = bottleneck(params, f"connector.stage1.{i}", x)
    x = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), side).permute(0, 2, 3, 1)
    for i in range(model.connector.depth):
        x = bottleneck(params, f"connector.stage2.{i}", x)
    x = x.flatten(1, 2)
    valid = torch.ones(x.shape[:2], dtype=torch.bool)
    return mlp(params, "connector.mlp", x, valid, "connector", "silu", model, routing, shares)


def bottleneck(params: Params, name: str, x: Tensor) -> Tensor:
    """RegNet block with squeeze-excitation, channels last."""
    act, eps = ACT["silu"], 1e-6
    y = act(layer_norm(params, f"{name}.norm1", affine(params, f"{name}.enter", x), eps))
    weight = params[f"{name}.depthwise.weight"]
    y = F.conv2d(y.permute(0, 3, 1, 2), weight, padding=1, groups=len(weight)).permute(0, 2, 3, 1)
    y = act(layer_norm(params, f"{name}.norm2", y, eps))
    squeezed = act(affine(params, f"{name}.squeeze", y.mean((1, 2), keepdim=True)))
    y = y * torch.sigmoid(affine(params, f"{name}.excite", squeezed))
    y = layer_norm(params, f"{name}.norm3", affine(params, f"{name}.leave", y), eps)
    if f"{name}.shortcut.weight" in params:
        x = layer_norm(params, f"{name}.shortcut_norm", affine(params, f"{name}.shortcut", x), eps)
    return act(x + y)


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """RoPE in Llama's layout on [B, T, H, h]."""
    half = x.shape[-1] // 2
    angle = positions.double().unsqueeze(-1) * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angle.cos().unsqueeze(2).to(x.dtype), angle.sin().unsqueeze(2).to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def decoder(
    params: Params, model: Model, scales: Scales, x: Tensor, batch: dict[str, Tensor], routing, shares
) -> Tensor:
    """[B, T, d] -> normed hidden states."""
    config, ids = model.decoder, batch["document_ids"]
    causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    allowed = (ids.unsqueeze(2) == ids.unsqueeze(1)) & (ids >= 0).unsqueeze(2) & causal
    allowed = allowed | torch.eye(x.shape[1], dtype=torch.bool)
    for i in range(config.num_layers):
        block = f"decoder.blocks.{i}"
        y = rms_norm(params, f"{block}.norm1", x, config.norm_eps)
        q, k, v = (affine(params, f"{block}.attention.{n}", y).unflatten(-1, (-1, config.head_dim)) for n in "qkv")
        q = rms_norm(params, f"{block}.attention.q_norm", q, config.norm_eps)
        k = rms_norm(params, f"{block}.attention.k_norm", k, config.norm_eps)
        q, k = (rotate(n, batch["positions"], config.rope_theta) for n in (q, k))
        x = x + affine(params, f"{block}.attention.out", attend(q, k, v, allowed, scales.attention_decoder))
        y = rms_norm(params, f"{block}.norm2", x, config.norm_eps)
        x = x + mlp(params, f"{block}.mlp", y, ids >= 0, "decoder", "swiglu", model, routing, shares)
    return rms_norm(params, "decoder.norm", x, config.norm_eps)


@dataclass
class Hyper:
    """One parameter's numbers: peak lr, decay, eps, part."""

    lr: float
    decay: float
    eps: float
    part: str


@dataclass
class Optimizer:
    """AdamW (arXiv:1711.05101) or SGD, with clipping by the global norm or each part's, over a dictionary."""

    recipe: Recipe
    hyper: dict[str, Hyper]
    moments: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    steps: int = 0

    def step(self, params: Params, grads: Params, factor: float) -> tuple[float, dict[str, float]]:
        """Update `params` in place; the norm before clipping, and by part."""
        optim = self.recipe.optim
        squares: dict[str, float] = {}
        for name, grad in grads.items():
            part = self.hyper[name].part
            squares[part] = squares.get(part, 0.0) + float(grad.square().sum())
        norm = math.sqrt(sum(squares.values()))
        self.steps += 1
        for name, grad in grads.items():
            bound = norm if optim.clip_scope == "global" else math.sqrt(squares[self.hyper[name].part])
            scale = min(1.0, optim.clip / (bound + 1e-6)) if optim.clip else 1.0
            self._update(name, params[name], grad * scale, factor)
        return norm, {part: math.sqrt(value) for part, value in squares.items()}

    def _update(self, name: str, p: Tensor, g: Tensor, factor: float) -> None:
        optim, hyper = self.recipe.optim, self.hyper[name]
        lr = hyper.lr * factor
        if optim.name == "sgd":
            p -= lr * (g + hyper.decay * p)
            return
        m = self.moments.setdefault(("exp_avg", name), torch.zeros_like(p))
        v = self.moments.setdefault(("exp_avg_sq", name), torch.zeros_like(p))
        m += (1 - optim.beta1) * (g - m)
        v += (1 - optim.beta2) * (g * g - v)
        m_hat, v_hat = m / (1 - optim.beta1**self.steps), v / (1 - optim.beta2**self.steps)
        p -= lr * hyper.decay * p
        p -= lr * m_hat / (v_hat.sqrt() + hyper.eps)
