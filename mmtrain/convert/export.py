"""A checkpoint as a Hugging Face folder: a public decoder class, LLaVA's, or one that brings its own code."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from mmtrain.config.errors import ConfigError
from mmtrain.config.load import load
from mmtrain.config.schema import PARTS, Recipe
from mmtrain.convert import hf_config
from mmtrain.convert.names import Table, connector_table, decoder_table, vision_table
from mmtrain.convert.prompting import pieces, tokenizer_config
from mmtrain.convert.writer import Item, write_weights
from mmtrain.data.image import Canvas
from mmtrain.data.tokenizer import Tokenizer
from mmtrain.model.vision import PIXELS
from mmtrain.mup.roles import Scales
from mmtrain.mup.scales import base_model_config, forward_scales
from mmtrain.parallel.box import Box
from mmtrain.run.reader import Reader
from mmtrain.run.saver import RECIPE

Form = Literal["auto", "decoder", "llava", "own"]

MODULE = "modeling_mmtrain.py"
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def export(reader: Reader, out: Path, form: Form = "auto", dtype: Literal["fp32", "bf16", "fp16"] = "fp32") -> str:
    """Write the folder `out`; returns the class that transformers loads it with.

    form   decoder: the language model alone, as Llama, Mistral, Qwen2, Qwen3, Mixtral, Qwen3-MoE or OLMoE; llava; own:
           with its own code; auto: llava where that holds the model, else own.
    Factors of the forward (muP's, experts') go into the weights of public classes, and stay factors in our own. Tensor
    by tensor, in `dtype`.
    ConfigError: the model is not of that form, or `out` is not empty.
    """
    recipe = load(reader.folder / RECIPE)
    tokenizer = Tokenizer(reader.folder, recipe.data.chat_template)
    model = recipe.model
    biases = _biases(reader, recipe)
    biased = any(bool(bias.any()) for bias in biases.values())
    family, reasons = hf_config.decoder_family(model.decoder, biased)
    if form != "decoder":
        reasons = hf_config.llava_reasons(model, biased)
    if form == "auto":
        form = "own" if reasons else "llava"
    if reasons and form in ("decoder", "llava"):
        raise ConfigError(f"{reader.folder} cannot become {form}: {'; '.join(reasons)}. Take --form own.")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; choose another --out, or empty it")
    out.mkdir(parents=True, exist_ok=True)
    scales = forward_scales(model, base_model_config(model, recipe.mup.base), recipe.mup)
    pixels = dict(zip(("mean", "std"), PIXELS[model.vision.pixel_norm], strict=True))
    if form == "own":
        items = [*_whole(reader), *_bias_items(biases)]
        chat = pieces(tokenizer)
        config = hf_config.own_config(recipe, vars(scales), chat, pixels, tokenizer, _NAMES[dtype])
        shutil.copyfile(Path(__file__).with_name(MODULE), out / MODULE)
    elif form == "decoder":
        items = list(_mapped(reader, decoder_table(model.decoder, family), _Fold(recipe, scales)))
        config = hf_config.decoder_config(model.decoder, family, tokenizer, _NAMES[dtype])
    else:
        items = list(_mapped(reader, _llava_table(recipe, family), _Fold(recipe, scales)))
        items += _unread_norm(recipe)
        config = hf_config.llava_config(recipe, family, tokenizer, _NAMES[dtype])
        canvas = Canvas(*model.vision.image_size, recipe.data.resize, recipe.data.sub_images)
        if (processor := hf_config.image_processor(canvas, pixels)) is not None:
            _write(out / "preprocessor_config.json", processor)
            _write(out / "processor_config.json", hf_config.processor(recipe))
    write_weights(out, items, TYPES[dtype])
    _write(out / "config.json", config)
    _write(out / "generation_config.json", {key: config[key] for key in ("eos_token_id", "pad_token_id")})
    (out / "tokenizer.json").write_text(tokenizer.as_json(), "utf-8")
    _write(out / "tokenizer_config.json", tokenizer_config(tokenizer))
    return config["architectures"][0]


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _whole(reader: Reader) -> Iterator[Item]:
    """Every tensor under our own name."""
    for name, shape in reader.shapes().items():
        yield Item(name, shape, lambda name=name: reader.read(name))


def _llava_table(recipe: Recipe, family: str) -> Table:
    vision = recipe.model.vision
    return {
        **vision_table(vision, vision.built_layers(), "vision_tower.vision_model."),
        **connector_table(),
        **decoder_table(recipe.model.decoder, family, "language_model.model.", "language_model.lm_head."),
    }


def _unread_norm(recipe: Recipe) -> list[Item]:
    """The norm behind the tower that LLaVA's class has and never reads."""
    width = (recipe.model.vision.hidden_size,)
    name = "vision_tower.vision_model.post_layernorm."
    return [
        Item(f"{name}weight", width, lambda: torch.ones(width)),
        Item(f"{name}bias", width, lambda: torch.zeros(width)),
    ]


def _mapped(reader: Reader, table: Table, fold: Callable[[str, torch.Tensor], torch.Tensor]) -> Iterator[Item]:
    """Tensors under Hugging Face's names; an expert at a time."""
    for name, origin in table.items():
        shape = reader.shape(name)
        if origin.experts:
            for number, theirs in enumerate(origin.names):
                box = Box((number,) + (0,) * (len(shape) - 1), (number + 1, *shape[1:]))
                yield Item(theirs, shape[1:], lambda name=name, box=box: fold(name, reader.read(name, box=box)[0]))
        elif origin.row:
            yield Item(origin.names[0], shape[1:], lambda name=name: reader.read(name)[0])
        else:
            yield Item(origin.names[0], shape, lambda name=name: fold(name, reader.read(name)))


class _Fold:
    """Puts the forward's factors, muP's and the experts' own, into weights. Plain factors change nothing."""

    def __init__(self, recipe: Recipe, scales: Scales) -> None:
        model = recipe.model
        self._normed = model.decoder.qk_norm
        self._attention = {
            "vision": _ratio(scales.attention_vision, model.vision.hidden_size // model.vision.num_heads),
            "decoder": _ratio(scales.attention_decoder, model.decoder.head_dim),
        }
        self._routed = model.decoder.moe.routed_scale
        self._embedding = scales.embedding
        self._norm = scales.output / (scales.embedding if model.decoder.tied else 1.0)  # a tied head grows with it

    def __call__(self, name: str, value: torch.Tensor) -> torch.Tensor:
        factor = 1.0
        part = name.partition(".")[0]
        if name == "decoder.embedding.weight":
            factor = self._embedding
        elif name == "decoder.norm.weight":
            factor = self._norm
        elif name.endswith(".mlp.experts.down"):
            factor = self._routed
        elif part in self._attention:
            normed = part == "decoder" and self._normed
            if name.endswith(".attention.q_norm.weight") or (".attention.q." in name and not normed):
                factor = self._attention[part]
        return value if factor == 1.0 else value * factor


def _ratio(scale: float | None, head_dim: int) -> float:
    """The attention factor over the usual one."""
    return 1.0 if scale is None else scale * head_dim**0.5


def _biases(reader: Reader, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Name of each router's bias -> its values [E]."""
    found = {}
    model, saved = recipe.model, reader.manifest.state.routers
    layers = {"vision": model.vision.built_layers(), "decoder": model.decoder.num_layers}
    for part in PARTS:
        if not getattr(model, part).moe.num_experts:
            continue
        names = ["connector.mlp.router.bias"]
        if part in layers:
            sparse = filter(getattr(model, part).moe.is_sparse, range(layers[part]))
            names = [f"{part}.blocks.{layer}.mlp.router.bias" for layer in sparse]
        found |= dict(zip(names, torch.tensor(saved[part]["bias"]).unbind(), strict=True))
    return found


def _bias_items(biases: dict[str, torch.Tensor]) -> list[Item]:
    return [Item(name, tuple(bias.shape), lambda bias=bias: bias) for name, bias in biases.items()]
