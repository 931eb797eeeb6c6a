"""Every value that the network can set: vision encoder, connector, decoder, and experts in each of them.

Standard library only. The string under a field is its documentation.
"""

from dataclasses import dataclass, field
from typing import Literal

PARTS = ("vision", "connector", "decoder")

VOCAB_MULTIPLE = 128


@dataclass(frozen=True)
class Moe:
    """Sparse experts in place of one part's MLPs."""

    num_experts: int = 0
    """Experts in each sparse layer; 0 leaves the part dense."""
    top_k: int = 2
    """Routed experts that each token visits."""
    granularity: int = 1
    """Experts are this many times narrower than a dense MLP of the part (arXiv:2402.07871): width / granularity."""
    shared: int = 0
    """Always-on experts beside the routed ones (DeepSeekMoE, arXiv:2401.06066), held as one MLP of `shared` times an
    expert's width."""
    routed_scale: float = 1.0
    """Factor on the routed experts' weighted sum (DeepSeek's routed_scaling_factor). Slices of a dense MLP need the
    number of slices: see mmtrain.model.upcycle."""
    renormalize: bool = True
    """Whether a token's gates sum to 1; false keeps the softmax over all experts as it is (OLMoE)."""
    every: int = 1
    """Every n-th layer is sparse (MM1: 2 or 4): layer i, from 0, is sparse when (i + 1) % every == 0."""
    balance: Literal["loss", "bias", "none"] = "loss"
    """What keeps experts busy: the Switch loss (arXiv:2101.03961), a router bias (arXiv:2408.15664), nothing."""
    balance_scope: Literal["step", "sequence"] = "step"
    """Tokens over which the balance loss takes its shares: the step's global batch, or one pack / one image."""
    balance_coef: float = 0.01
    """Coefficient of the balance loss, averaged over the part's sparse layers. CuMo 0.1, MM1 0.01."""
    z_coef: float = 0.001
    """Coefficient of the router z-loss (ST-MoE, arXiv:2202.08906). CuMo 0.01, MM1 0.001."""
    bias_rate: float = 0.001
    """Step of the loss-free router bias; read when balance is bias."""

    def expert_width(self, dense: int) -> int:
        """Hidden width of an expert where a dense MLP has `dense`."""
        return dense // self.granularity

    def is_sparse(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) holds experts."""
        return self.num_experts > 0 and (layer + 1) % self.every == 0


@dataclass(frozen=True)
class Vision:
    """Pre-norm ViT in CLIP's layout."""

    image_size: tuple[int, int] = (224, 224)
    """The recipe's one canvas, height x width in pixels: every image or sub-image becomes exactly that."""
    patch_size: int = 14
    """Side of a square patch in pixels."""
    hidden_size: int = 1024
    """Width of the residual stream."""
    num_layers: int = 24
    """Depth of the tower as pretrained; select_layer may cut it."""
    num_heads: int = 16
    """Attention heads; head size = hidden_size / num_heads."""
    intermediate_size: int = 4096
    """Width inside the MLP (of each expert, when sparse; see moe.granularity)."""
    activation: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu"
    """Non-linearity of the MLP; CLIP uses quick_gelu, SigLIP gelu_tanh."""
    pixel_norm: Literal["clip", "half"] = "clip"
    """Mean and std that pixels in [0, 1] are normalised by: CLIP's, or 0.5 of every channel (SigLIP)."""
    class_token: bool = True
    """Whether a learned token precedes the patches (CLIP yes, SigLIP no); it never reaches the connector."""
    patch_bias: bool = False
    """Bias of the patch convolution (CLIP no, SigLIP yes)."""
    pre_norm: bool = True
    """LayerNorm before the first block (CLIP yes, SigLIP no)."""
    final_norm: bool = False
    """LayerNorm on the features that leave the tower."""
    norm_eps: float = 1e-5
    """Epsilon of every LayerNorm."""
    select_layer: int = -1
    """Layer whose output is the features: -1 the last, -2 the one before (LLaVA, CuMo). Later layers are not built."""
    moe: Moe = field(default_factory=Moe)
    """Experts in the tower's MLPs."""
    pretrained: str = ""
    """Hugging Face folder (CLIP, SigLIP, LLaVA) whose config.json gives the shapes; its weights start the part unless
    init_from is given."""

    def grid(self) -> tuple[int, int]:
        """Patches along height and width."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    def built_layers(self) -> int:
        """Blocks that exist after the cut at select_layer."""
        return self.num_layers + 1 + self.select_layer


@dataclass(frozen=True)
class Connector:
    """From patch features to decoder tokens."""

    kind: Literal["c_abstractor", "avg_pool", "attention_pool", "mlp"] = "c_abstractor"
    """Honeybee's C-Abstractor; pooling by averages; learned queries; one token a patch through an MLP (LLaVA)."""
    num_tokens: int = 144
    """Tokens an image becomes, a square number (64 and 144 are usual). For `mlp` it is the number of patches."""
    hidden_size: int = 1024
    """Width inside the connector: RegNet stages, queries, MLP."""
    depth: int = 3
    """Blocks of each RegNet stage (c_abstractor)."""
    num_heads: int = 16
    """Heads of the cross-attention (attention_pool)."""
    moe: Moe = field(default_factory=Moe)
    """Experts in the MLP at the connector's end (one layer; `every` has no meaning here)."""
    pretrained: str = ""
    """Hugging Face folder (LLaVA) whose weights start the part unless init_from is given."""


@dataclass(frozen=True)
class RopeScaling:
    """Stretching of rotary wavelengths; factor 1 leaves RoPE alone."""

    factor: float = 1.0
    """Stretch of the wavelengths."""
    low_freq_factor: float = 1.0
    """Wavelengths above original_length / low_freq_factor are stretched by `factor`."""
    high_freq_factor: float = 4.0
    """Wavelengths below original_length / high_freq_factor are kept."""
    original_length: int = 8192
    """Context length before stretching."""
    kind: Literal["llama3", "linear"] = "llama3"
    """Llama-3 stretches the long wavelengths, linear all of them and reads `factor` alone."""


@dataclass(frozen=True)
class Decoder:
    """Pre-norm causal transformer of the Llama / Mistral / Qwen family."""

    vocab_size: int = 32000
    """Entries of the tokenizer with all special tokens; stored padded to a multiple of 128, padding masked."""
    hidden_size: int = 4096
    """Width of the residual stream."""
    num_layers: int = 32
    """Blocks."""
    num_heads: int = 32
    """Query heads."""
    num_kv_heads: int = 8
    """Key and value heads (grouped-query attention)."""
    head_dim: int = 128
    """Width of a head."""
    intermediate_size: int = 14336
    """Width inside the SwiGLU MLP (of each expert, when sparse; see moe.granularity)."""
    norm: Literal["rms", "layer", "crms"] = "rms"
    """RMSNorm, LayerNorm, or CRMSNorm (RMSNorm of mean-free inputs, arXiv:2305.14858)."""
    norm_eps: float = 1e-5
    """Epsilon of every norm."""
    rope: bool = True
    """Rotary positions; false leaves the decoder without any."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    """Stretching of rotary wavelengths."""
    qk_norm: bool = False
    """RMSNorm on queries and keys, before the rotation."""
    qk_norm_over: Literal["head", "all"] = "head"
    """What such a norm spans: each head (Qwen3), or all heads together (OLMoE)."""
    attention_bias: bool = False
    """Biases on the query, key and value projections (Qwen2)."""
    tied: bool = False
    """Whether the head is the token embedding."""
    sliding_window: int = 0
    """Positions that a pretrained decoder attends back to, 0 for all; packs may not be longer."""
    moe: Moe = field(default_factory=Moe)
    """Experts in the decoder's MLPs."""
    pretrained: str = ""
    """Hugging Face folder (Llama, Mistral, Qwen, Mixtral, OLMoE, LLaVA) whose config.json gives the shapes; its weights
    start the part unless init_from is given."""

    def padded_vocab(self) -> int:
        """Rows of embedding and head: the vocabulary rounded up to a multiple of 128 in every layout."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@dataclass(frozen=True)
class Model:
    """The three parts of a vision-language model."""

    vision: Vision = field(default_factory=Vision)
    """Image encoder."""
    connector: Connector = field(default_factory=Connector)
    """Image features to decoder tokens."""
    decoder: Decoder = field(default_factory=Decoder)
    """Language model."""
