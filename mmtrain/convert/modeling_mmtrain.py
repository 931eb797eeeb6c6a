"""A vision-language model that mmtrain trained, for transformers alone: this one file goes into every exported folder.

    model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
    inputs = model.prompt(tokenizer, "What is this?", Image.open(FILE))
    print(tokenizer.decode(model.generate(**inputs)[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))

The names of weights are mmtrain's. Written to be read: experts are visited in a loop. mmtrain itself never imports it.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class MmtrainConfig(PretrainedConfig):
    """parts: vision, connector and decoder as the recipe has them; data: how images become pixels; scales: factors of
    muP; chat: pieces of a prompt, with and without an image."""

    model_type = "mmtrain"

    def __init__(self, parts=None, data=None, scales=None, chat=None, **kwargs):
        self.parts, self.data, self.scales, self.chat = parts or {}, data or {}, scales or {}, chat or {}
        decoder = self.parts.get("decoder", {})
        self.vocab_size, self.hidden_size = decoder.get("vocab_size", 0), decoder.get("hidden_size", 0)
        self.num_hidden_layers, self.num_attention_heads = decoder.get("num_layers", 0), decoder.get("num_heads", 0)
        self.image_token_id = kwargs.pop("image_token_id", None)
        super().__init__(**kwargs)


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "swiglu": F.silu,
}


class Norm(nn.Module):
    """RMSNorm, LayerNorm or CRMSNorm."""

    def __init__(self, size, eps, kind="layer", bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None
        self.eps, self.kind = eps, kind

    def forward(self, x):
        if self.kind == "layer":
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        wide = x.float()
        square, size = wide.square().sum(-1, keepdim=True), x.shape[-1]
        if self.kind == "crms":
            square, size = square + wide.sum(-1, keepdim=True).square(), size + 1
        return (wide * torch.rsqrt(square / size + self.eps)).to(x.dtype) * self.weight


class Mlp(nn.Module):
    def __init__(self, d_in, hidden, d_out, activation, bias):
        super().__init__()
        self.up, self.down = nn.Linear(d_in, hidden, bias), nn.Linear(hidden, d_out, bias)
        self.gate = nn.Linear(d_in, hidden, bias) if activation == "swiglu" else None
        self.activation = ACTIVATIONS[activation]

    def forward(self, x):
        up = self.up(x)
        return self.down(self.activation(up) if self.gate is None else self.activation(self.gate(x)) * up)


class Router(nn.Module):
    def __init__(self, d_in, experts):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(experts, d_in)), nn.Parameter(torch.zeros(experts))


class Experts(nn.Module):
    def __init__(self, count, d_in, hidden, d_out, activation, bias):
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.empty(count, *s)) for s in ((hidden, d_in), (d_out, hidden)))
        self.gate = nn.Parameter(torch.empty(count, hidden, d_in)) if activation == "swiglu" else None
        self.up_bias = nn.Parameter(torch.empty(count, hidden)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(count, d_out)) if bias else None
        self.activation = ACTIVATIONS[activation]

    def forward(self, x, e):
        bias = (None, None) if self.up_bias is None else (self.up_bias[e], self.down_bias[e])
        up = F.linear(x, self.up[e], bias[0])
        hidden = self.activation(up) if self.gate is None else self.activation(F.linear(x, self.gate[e])) * up
        return F.linear(hidden, self.down[e], bias[1])


class SparseMlp(nn.Module):
    """Each token visits top_k experts, and the shared one; the bias takes part in the choice alone."""

    def __init__(self, moe, d_in, hidden, *rest):
        super().__init__()
        self.moe, width = moe, hidden // moe["granularity"]
        self.router, self.experts = Router(d_in, moe["num_experts"]), Experts(moe["num_experts"], d_in, width, *rest)
        self.shared = Mlp(d_in, moe["shared"] * width, *rest) if moe["shared"] else None

    def forward(self, x):
        tokens = x.flatten(0, -2)
        logits = F.linear(tokens.float(), self.router.weight.float())
        ranking = logits.softmax(-1) + self.router.bias.float() if self.moe["balance"] == "bias" else logits
        chosen = ranking.topk(self.moe["top_k"], -1).indices
        gates = logits.gather(-1, chosen).softmax(-1)
        if not self.moe["renormalize"]:
            gates = logits.softmax(-1).gather(-1, chosen)
        gates = gates * self.moe["routed_scale"]
        out = None if self.shared is None else self.shared(tokens)
        for e in range(self.moe["num_experts"]):
            token, choice = (chosen == e).nonzero(as_tuple=True)
            rows = self.experts(tokens[token], e) * gates[token, choice].unsqueeze(-1).to(x.dtype)
            out = tokens.new_zeros(tokens.shape[0], rows.shape[-1]) if out is None else out
            out.index_add_(0, token, rows)
        return out.view(*x.shape[:-1], -1)


def feed_forward(moe, sparse, *shape):
    return SparseMlp(moe, *shape) if sparse else Mlp(*shape)


class Attention(nn.Module):
    def __init__(self, width, heads, kv_heads, head_dim, scale, bias, out_bias, memory=None, qk_norm=None, eps=0.0):
        super().__init__()
        self.q = nn.Linear(width, heads * head_dim, bias)
        self.k, self.v = (nn.Linear(memory or width, kv_heads * head_dim, bias) for _ in range(2))
        self.out = nn.Linear(heads * head_dim, width, out_bias)
        self.head_dim, self.scale, self.qk_norm = head_dim, head_dim**-0.5 if scale is None else scale, qk_norm
        sizes = {"head": (head_dim, head_dim), "all": (heads * head_dim, kv_heads * head_dim), None: (0, 0)}[qk_norm]
        self.q_norm, self.k_norm = (Norm(size, eps, "rms", False) if size else None for size in sizes)

    def forward(self, x, memory=None, mask=None, rope=None, cache=None, layer=0):
        memory = x if memory is None else memory
        q, k, v = self.q(x), self.k(memory), self.v(memory)
        if self.qk_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (heads.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for heads in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (heads * rope[0] + heads.roll(self.head_dim // 2, -1) * rope[1] for heads in (q, k))
        if cache is not None:
            k, v = cache.update(k, v, layer)
        k, v = (heads.repeat_interleave(q.shape[1] // heads.shape[1], 1) for heads in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, norm, attention, mlp):
        super().__init__()
        self.norm1, self.attention, self.norm2, self.mlp = norm(), attention, norm(), mlp

    def forward(self, x, **view):
        x = x + self.attention(self.norm1(x), **view)
        return x + self.mlp(self.norm2(x))


def is_sparse(moe, layer):
    return moe["num_experts"] > 0 and (layer + 1) % moe["every"] == 0


class Vision(nn.Module):
    def __init__(self, c, scale):
        super().__init__()
        d, heads = c["hidden_size"], c["num_heads"]
        grid = [side // c["patch_size"] for side in c["image_size"]]
        self.patch = nn.Conv2d(3, d, c["patch_size"], c["patch_size"], bias=c["patch_bias"])
        self.class_token = nn.Parameter(torch.zeros(1, d)) if c["class_token"] else None
        self.positions = nn.Parameter(torch.zeros(grid[0] * grid[1] + c["class_token"], d))

        def norm():
            return Norm(d, c["norm_eps"])

        self.pre_norm = norm() if c["pre_norm"] else None
        self.blocks = nn.ModuleList(
            Block(
                norm,
                Attention(d, heads, heads, d // heads, scale, True, True),
                feed_forward(c["moe"], is_sparse(c["moe"], layer), d, c["intermediate_size"], d, c["activation"], True),
            )
            for layer in range(c["num_layers"] + 1 + c["select_layer"])
        )
        self.final_norm = norm() if c["final_norm"] else None

    def forward(self, pixels):
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            x = torch.cat((self.class_token.expand(len(x), 1, -1), x), 1)
        x = x + self.positions
        x = x if self.pre_norm is None else self.pre_norm(x)
        for block in self.blocks:
            x = block(x)
        x = x if self.class_token is None else x[:, 1:]
        return x if self.final_norm is None else self.final_norm(x)


class Depthwise(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 1, 3, 3))


class Bottleneck(nn.Module):
    """RegNet block, channels last."""

    def __init__(self, d_in, width):
        super().__init__()
        squeezed = round(d_in * 0.25)
        self.enter, self.leave = nn.Linear(d_in, width, False), nn.Linear(width, width, False)
        self.squeeze, self.excite = nn.Linear(width, squeezed), nn.Linear(squeezed, width)
        self.norm1, self.norm2, self.norm3 = (Norm(width, 1e-6) for _ in range(3))
        self.depthwise = Depthwise(width)
        self.shortcut = nn.Linear(d_in, width, False) if d_in != width else None
        self.shortcut_norm = Norm(width, 1e-6) if d_in != width else None

    def forward(self, x):
        shortcut = x if self.shortcut is None else self.shortcut_norm(self.shortcut(x))
        x = F.silu(self.norm1(self.enter(x)))
        x = F.conv2d(x.permute(0, 3, 1, 2), self.depthwise.weight, padding=1, groups=x.shape[-1])
        x = F.silu(self.norm2(x.permute(0, 2, 3, 1)))
        x = x * torch.sigmoid(self.excite(F.silu(self.squeeze(x.mean((1, 2), keepdim=True)))))
        return F.silu(self.norm3(self.leave(x)) + shortcut)


class Connector(nn.Module):
    def __init__(self, c, vision, width, scale):
        super().__init__()
        self.kind, self.side, d = c["kind"], math.isqrt(c["num_tokens"]), c["hidden_size"]
        self.grid = tuple(side // vision["patch_size"] for side in vision["image_size"])
        d_vision, eps, heads = vision["hidden_size"], vision["norm_eps"], c["num_heads"]
        if self.kind == "c_abstractor":
            self.positions = nn.Parameter(torch.zeros(self.grid[0] * self.grid[1], d_vision))
            widths = [d_vision, *[d] * c["depth"]]
            self.stage1 = nn.ModuleList(Bottleneck(widths[i], d) for i in range(c["depth"]))
            self.stage2 = nn.ModuleList(Bottleneck(d, d) for _ in range(c["depth"]))
        elif self.kind == "attention_pool":
            self.queries = nn.Parameter(torch.zeros(c["num_tokens"], d))
            self.query_norm, self.feature_norm, self.final_norm = Norm(d, eps), Norm(d_vision, eps), Norm(d, eps)
            self.attention = Attention(d, heads, heads, d // heads, scale, True, True, memory=d_vision)
        d_in = d if self.kind in ("c_abstractor", "attention_pool") else d_vision
        activation = "gelu" if self.kind == "mlp" else "silu"
        self.mlp = feed_forward(c["moe"], c["moe"]["num_experts"] > 0, d_in, width, width, activation, True)

    def forward(self, x):
        if self.kind == "attention_pool":
            queries = self.queries.expand(len(x), -1, -1)
            x = self.final_norm(queries + self.attention(self.query_norm(queries), self.feature_norm(x)))
        elif self.kind != "mlp":
            x = (x + self.positions if self.kind == "c_abstractor" else x).unflatten(1, self.grid)
            for block in self.stage1 if self.kind == "c_abstractor" else ():
                x = block(x)
            x = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), self.side).permute(0, 2, 3, 1)
            for block in self.stage2 if self.kind == "c_abstractor" else ():
                x = block(x)
            x = x.flatten(1, 2)
        return self.mlp(x)


class Decoder(nn.Module):
    def __init__(self, c, scale):
        super().__init__()
        self.c, d = c, c["hidden_size"]

        def norm():
            return Norm(d, c["norm_eps"], c["norm"], False)

        shape = d, c["num_heads"], c["num_kv_heads"], c["head_dim"], scale, c["attention_bias"], False
        qk_norm = c["qk_norm_over"] if c["qk_norm"] else None
        self.embedding = nn.Embedding(c["vocab_size"], d)
        self.blocks = nn.ModuleList(
            Block(
                norm,
                Attention(*shape, qk_norm=qk_norm, eps=c["norm_eps"]),
                feed_forward(c["moe"], is_sparse(c["moe"], layer), d, c["intermediate_size"], d, "swiglu", False),
            )
            for layer in range(c["num_layers"])
        )
        self.norm = norm()
        self.head = None if c["tied"] else nn.Linear(d, c["vocab_size"], False)

    def rope(self, positions, dtype):
        c, s = self.c, self.c["rope_scaling"]
        if not c["rope"]:
            return None
        exponent = torch.arange(0, c["head_dim"], 2, dtype=torch.float32, device=positions.device) / c["head_dim"]
        frequencies = 1.0 / c["rope_theta"] ** exponent
        if s["factor"] != 1.0 and s["kind"] == "linear":
            frequencies = frequencies / s["factor"]
        elif s["factor"] != 1.0:
            low, high = s["low_freq_factor"], s["high_freq_factor"]
            kept = ((s["original_length"] * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0.0, 1.0)
            frequencies = frequencies * (kept + (1.0 - kept) / s["factor"])
        angles = (positions.unsqueeze(-1).float() * frequencies).unsqueeze(1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


class MmtrainForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """pixel_values [N, 3, H, W], normalised; input_ids hold `image_token_id` as often as images have tokens."""

    config_class = MmtrainConfig
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        scales, (vision, connector, decoder) = config.scales, map(config.parts.get, ("vision", "connector", "decoder"))
        self.vision = Vision(vision, scales.get("attention_vision"))
        self.connector = Connector(connector, vision, decoder["hidden_size"], scales.get("attention_connector"))
        self.decoder = Decoder(decoder, scales.get("attention_decoder"))
        self.post_init()

    def _init_weights(self, module):
        """Weights come from the folder."""

    def get_input_embeddings(self):
        return self.decoder.embedding

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, pixel_values=None, **kwargs):
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        inputs = {"input_ids": input_ids[:, seen:], "past_key_values": past_key_values, "use_cache": True}
        return inputs | {"attention_mask": kwargs.get("attention_mask"), "pixel_values": None if seen else pixel_values}

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        past_key_values=None,
        use_cache=False,
        labels=None,
        logits_to_keep=0,
        **kwargs,
    ):
        x = self.decoder.embedding(input_ids) * self.config.scales.get("embedding", 1.0)
        if pixel_values is not None:
            images = self.connector(self.vision(pixel_values.to(x.dtype)))
            place = input_ids == self.config.image_token_id
            if int(place.sum()) != images.shape[0] * images.shape[1]:
                raise ValueError(f"{int(place.sum())} image tokens, but {images.shape[0]} images of {images.shape[1]}")
            x = x.masked_scatter(place.unsqueeze(-1), images.to(x.dtype))
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        seen, new = (0 if past_key_values is None else past_key_values.get_seq_length()), x.shape[1]
        if attention_mask is None:
            attention_mask = torch.ones(x.shape[0], seen + new, dtype=torch.int64, device=x.device)
        slot = torch.arange(seen + new, device=x.device)
        visible = (slot <= slot[seen:, None]) & attention_mask.bool()[:, None, :] | (slot == slot[seen:, None])
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, seen:]
        rope = self.decoder.rope(positions, x.dtype)
        for layer, block in enumerate(self.decoder.blocks):
            x = block(x, mask=visible.unsqueeze(1), rope=rope, cache=past_key_values, layer=layer)
        x = self.decoder.norm(x)
        x = x[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else x[:, logits_to_keep]
        head = self.decoder.embedding.weight if self.decoder.head is None else self.decoder.head.weight
        logits = F.linear(x, head) * self.config.scales.get("output", 1.0)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def preprocess(self, image):
        """A PIL image -> normalised pixels [K, 3, H, W]: itself, or an overview and four crops."""
        data, (height, width) = self.config.data, self.config.parts["vision"]["image_size"]
        image = image.convert("RGB")
        crops = 1 if data["sub_images"] and (image.width > width or image.height > height) else 0
        whole = [on_canvas(image, height, width, data["resize"])]
        if crops:
            large = on_canvas(image, 2 * height, 2 * width, data["resize"])
            whole += [large[r : r + height, c : c + width] for r in (0, height) for c in (0, width)]
        pixels = torch.from_numpy(np.stack(whole)).permute(0, 3, 1, 2) / 255
        mean, std = (torch.tensor(data[name]).view(3, 1, 1) for name in ("mean", "std"))
        return ((pixels - mean) / std).to(self.device)

    def prompt(self, tokenizer, question, image=None):
        """Inputs of `generate` for one question, about one PIL image or none."""
        pixels = None if image is None else self.preprocess(image)
        images = (
            []
            if pixels is None
            else [self.config.image_token_id] * (len(pixels) * self.config.parts["connector"]["num_tokens"])
        )
        ids = []
        for kind, text in self.config.chat["text" if image is None else "image"]:
            if kind == "special":
                ids.append(tokenizer.convert_tokens_to_ids(text))
            elif kind == "text":
                ids += tokenizer.encode(text.replace("{question}", question), add_special_tokens=False)
            else:
                ids += images
        ids = torch.tensor([ids], device=self.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return inputs if pixels is None else {**inputs, "pixel_values": pixels}


def on_canvas(image, height, width, resize):
    """uint8 [height, width, 3]."""
    bicubic = Image.Resampling.BICUBIC
    if image.size == (width, height):
        return np.array(image)
    if resize == "squash":
        return np.array(image.resize((width, height), bicubic))
    if resize == "shortest_crop":
        return np.array(ImageOps.fit(image, (width, height), bicubic))
    aspect = image.width / image.height
    across = min(width, round(height * aspect))
    inside = (max(1, across), max(1, min(height, round(across / aspect))))
    canvas = Image.new("RGB", (width, height), (122, 116, 104))
    canvas.paste(image.resize(inside, bicubic), ((width - inside[0]) // 2, (height - inside[1]) // 2))
    return np.array(canvas)
