"""Every value that a recipe can set. The string under a field is its documentation.

Frozen: a recipe never changes after loading. A value is stored once; what follows from others is a method.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from mmtrain.config.network import PARTS, VOCAB_MULTIPLE, Connector, Decoder, Model, Moe, RopeScaling, Vision

__all__ = [
    "CURSOR_BYTES",
    "PARTS",
    "REQUIRED",
    "VOCAB_MULTIPLE",
    "Checkpoint",
    "Connector",
    "Data",
    "Decoder",
    "Eval",
    "Guard",
    "Log",
    "LossWeights",
    "Matching",
    "Model",
    "Moe",
    "Mup",
    "Optim",
    "Parallel",
    "Recipe",
    "RopeScaling",
    "Source",
    "Upcycle",
    "UpcyclePart",
    "Vision",
]

CURSOR_BYTES = 64 * 1024
"""The state of the stream in a checkpoint is shorter than this as JSON."""
WAITING_BYTES = 18
"""Most characters of a waiting document in it: three small differences (the first of a source is larger)."""

REQUIRED: Any = "???"  # omegaconf's spelling of "the recipe must say"


@dataclass(frozen=True)
class Source:
    """One named stream of shards."""

    shards: str = REQUIRED
    """Folder of .tar shards with their indexes (tools.make_shards), or of indexes of remote ones (index_shards)."""
    weight: float = 1.0
    """Relative share of tokens, image tokens included; 0 switches an inherited source off."""
    max_epochs: float = 0.0
    """Passes over it at most, the others share its place afterwards; 0 for no limit."""


@dataclass(frozen=True)
class LossWeights:
    """What a target counts in the training loss, by what it can be told from. Held-out losses weigh every target 1."""

    after_image: float = 1.0
    """Targets with an image before them in their own document: captions, and answers about an image."""
    text_only: float = 1.0
    """Targets without one: text documents, and what stands before a document's first image."""


@dataclass(frozen=True)
class Data:
    """What the model reads, and how documents become packs."""

    sources: dict[str, Source] = field(default_factory=dict)
    """The mixture, by name, so that a recipe can change one weight of an inherited mixture."""
    tokenizer: str = REQUIRED
    """Path of a tokenizer.json, or of the folder that holds one."""
    chat_template: Literal["plain", "chatml", "vicuna", "llama3", "mistral", "auto"] = "plain"
    """How turns of a conversation become text; auto recognises the tokenizer's own (chat_template.jinja or
    tokenizer_config.json)."""
    sequence_length: int = 2048
    """Tokens in a pack, image tokens included."""
    max_images: int = 16
    """Images in a pack at most (the second packing budget; MM1 16)."""
    global_batch: int = 8
    """Packs of one optimizer step, over all ranks."""
    micro_batch: int = 1
    """Packs of one forward pass on one data-parallel rank."""
    lanes: int = 0
    """Lanes of the plan: data-parallel sizes that divide it can resume the stream; 0 means global_batch."""
    window: int = 256
    """Documents a source's packing window holds."""
    max_wait: int = 64
    """Packs that a document may wait in the window at most."""
    open_shards: int = 4
    """Shards of one source that may be open at once; locality against shuffling."""
    resize: Literal["squash", "pad", "shortest_crop"] = "squash"
    """How an image of another shape meets the canvas."""
    sub_images: Literal[0, 4] = 0
    """4: one overview and 4 crops of an image larger than the canvas (MM1 3.5); 0: the overview alone."""
    max_image_pixels: int = 50_000_000
    """Images with more pixels are refused before decoding (decompression bombs)."""
    cache: str = ""
    """Folder for copies of remote shards, shared by the processes of a node; empty for one in the temporary folder."""
    cache_gib: float = 50.0
    """GiB that the copies take at most; the shards that all sources have open must fit, and twice as much lets those
    that come next be fetched before their turn."""
    allow_pipes: bool = False
    """Whether indexes may name shell commands (`pipe:...`) that give their shards."""
    quarantine: str = ""
    """JSON lines with source, shard and key, as in ledger.jsonl: these samples stay planned but are never read."""
    max_bad_fraction: float = 0.01
    """Training stops when more than this share of the samples that all ranks have read since step 1 was unusable (never
    before 100 samples)."""
    skip_packs: list[int] = field(default_factory=list)
    """Packs of the stream (from 0; step t, from 1, begins at (t - 1) * global_batch) that stay planned but are served
    as padding without weight, so that no other pack moves."""
    loss_weights: LossWeights = field(default_factory=LossWeights)
    """How text that has seen an image and text that has not share the gradient of what both train."""
    workers: int = 1
    """Processes of each rank that read and decode; 0 decodes in the training process."""

    def num_lanes(self) -> int:
        """Lanes of the plan."""
        return self.lanes or self.global_batch

    def least_wait(self, sources: int) -> int:
        """Smallest max_wait with which so many sources can keep their mixture (mmtrain.data.fill proves it)."""
        return 4 * sources + 6

    def most_window(self, sources: int) -> int:
        """Largest window with which the state of the stream stays below CURSOR_BYTES."""
        return (CURSOR_BYTES - 4096 - 256 * sources) // (WAITING_BYTES * sources)


@dataclass(frozen=True)
class Optim:
    """AdamW and its schedule. Rates are those of the muP base width."""

    name: Literal["adamw", "sgd"] = "adamw"
    """adamw to train; sgd without momentum to compare layouts (tools and tests)."""
    lr: float = 1e-3
    """Peak learning rate at the base width."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    final_lr_ratio: float = 0.1
    """Factor of the peak that the schedule ends at."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices at the base width (never of gains and biases)."""
    beta1: float = 0.9
    """Adam's first decay."""
    beta2: float = 0.95
    """Adam's second decay."""
    eps: float = 1e-8
    """Adam's epsilon at the base width."""
    clip: float = 1.0
    """Gradient norm above which gradients are scaled down; 0 never clips."""
    clip_scope: Literal["global", "per_part"] = "global"
    """Whose norm that is: all gradients', or each part's own (then one part's spike leaves the others alone)."""
    lr_multipliers: dict[str, float] = field(default_factory=dict)
    """Parameter pattern (fnmatch) -> factor on its learning rate; a pattern that matches nothing is an error."""


@dataclass(frozen=True)
class Mup:
    """Maximal update parametrisation: the base widths, and the multipliers that a sweep tunes."""

    base: dict[str, dict[str, int]] = field(default_factory=dict)
    """Part -> width key -> value at the base, e.g. decoder: {hidden_size: 256}. What is not named is at its base."""
    init: float = 1.0
    """Factor on the initial std of matrices."""
    embedding: float = 1.0
    """Factor on token embeddings in the forward."""
    attention: float = 1.0
    """Factor on attention logits of vision and decoder."""
    cross_attention: float = 1.0
    """Factor on attention logits of the connector (attention_pool)."""
    output: float = 1.0
    """Factor on the language model's logits."""
    router: float = 1.0
    """Factor on router logits' initial std."""
    lr: dict[str, float] = field(default_factory=dict)
    """Part (vision, connector, decoder) -> factor on its learning rate."""


@dataclass(frozen=True)
class Parallel:
    """How the model lies on the ranks."""

    tensor: int = 1
    """Ranks that share each matrix (megatron-core)."""
    expert: int = 1
    """Data-parallel ranks that share each layer's experts."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed shards over data ranks: nothing, optimizer, + gradients, + parameters."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Compute type; master weights, moments and gradient sums are fp32 always."""
    offload_optimizer: bool = False
    """Whether optimizer state lives in host memory (ZeRO 1-3)."""
    activation_checkpointing: bool = False
    """Whether blocks recompute their activations in backward."""
    sequence_parallel: bool = False
    """Whether tensor ranks share the decoder's positions between the layers that they share."""


@dataclass(frozen=True)
class UpcyclePart:
    """How one part's experts start from its dense MLPs. How many there are is model.<part>.moe."""

    noise: float = 0.0
    """Std of the noise on each copy, relative to the tensor's own std; 0 keeps the dense function exactly."""


@dataclass(frozen=True)
class Upcycle:
    """Parts whose MLPs become experts when weights come from init_from (co-upcycling, CuMo arXiv:2405.05949)."""

    vision: UpcyclePart | None = None
    """Experts in the image encoder."""
    connector: UpcyclePart | None = None
    """Experts in the connector's MLP."""
    decoder: UpcyclePart | None = None
    """Experts in the decoder."""


@dataclass(frozen=True)
class Checkpoint:
    """When to save and what to keep."""

    every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = 2
    """Newest checkpoints that stay."""
    keep_every: int = 0
    """Steps whose multiples stay for ever; 0 for none."""
    keep_best: bool = False
    """Whether the checkpoint with the lowest held-out loss stays too (needs eval.every)."""


@dataclass(frozen=True)
class Log:
    """What is written while training."""

    every: int = 10
    """Steps between lines of metrics.jsonl."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases; offline needs no account."""
    project: str = "mmtrain"
    """wandb project."""
    plots: bool = True
    """Whether the run's end draws its plots; a sweep's trials need none."""


@dataclass(frozen=True)
class Matching:
    """In-loop image-text matching: is P(true) above P(false)?"""

    data: str = REQUIRED
    """JSON lines of id, image, statement, label."""
    images: str = REQUIRED
    """Folder that the image paths are relative to."""
    limit: int = 256
    """Statements asked at most, the first ones of the file."""


@dataclass(frozen=True)
class Eval:
    """Held-out measurements inside the loop."""

    every: int = 0
    """Steps between measurements; 0 never measures."""
    sources: dict[str, Source] = field(default_factory=dict)
    """Held-out shards by name; the loss is reported by name."""
    batches: int = 8
    """Global batches of each measurement, the same ones every time."""
    matching: Matching | None = None
    """Image-text matching, measured with the held-out loss."""


@dataclass(frozen=True)
class Guard:
    """What happens to a step whose numbers are not usable."""

    max_skips: int = 10
    """Skipped steps of a run at most; one more stops it."""
    skip_steps: list[int] = field(default_factory=list)
    """Steps (from 1) whose update is left out on purpose."""
    spike: float = 0.0
    """A loss or gradient norm above this times its median is unusable, as one that is not finite; 0 takes any."""
    spike_window: int = 64
    """Usable steps that the median is of; nothing is a spike before there are as many."""
    rollback_after: int = 3
    """Unusable steps in a row after which the weights go back to the checkpoint before them; 0 never goes back."""
    max_rollbacks: int = 2
    """Times that a run goes back at most; a further row of unusable steps stops it."""
    stall_seconds: float = 60.0
    """Time without a sign of life after which a rank is called stalled, and the job ends; 0 waits for ever."""


@dataclass(frozen=True)
class Recipe:
    """One stage of training."""

    name: str = REQUIRED
    """Name of the run in logs and plots."""
    out: str = REQUIRED
    """Run folder: checkpoints, metrics, plots, report."""
    steps: int = 0
    """Optimizer steps; 0 takes `epochs` instead."""
    epochs: float = 0.0
    """Passes over the longest-lasting source, relative to its weight; read when steps is 0."""
    seed: int = 0
    """Every random draw comes from a generator keyed by (seed, step, site)."""
    model: Model = field(default_factory=Model)
    """The network."""
    data: Data = field(default_factory=Data)
    """The stream."""
    optim: Optim = field(default_factory=Optim)
    """Optimizer and schedule."""
    mup: Mup = field(default_factory=Mup)
    """Parametrisation."""
    parallel: Parallel = field(default_factory=Parallel)
    """Layout."""
    trainable: list[str] = field(default_factory=lambda: ["*"])
    """Parameter patterns that learn; the rest is frozen. A pattern that matches nothing is an error."""
    init_from: str = ""
    """Checkpoint, or run folder, whose weights start this stage."""
    requires_pretrained: bool = False
    """Whether this recipe makes no sense from random weights: then init_from must be given."""
    upcycle: Upcycle = field(default_factory=Upcycle)
    """Parts whose experts are copies of init_from's dense MLPs."""
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    """Saving."""
    log: Log = field(default_factory=Log)
    """Watching."""
    eval: Eval = field(default_factory=Eval)
    """Measuring."""
    guard: Guard = field(default_factory=Guard)
    """Surviving."""
    resume: Literal["auto", "never"] = "auto"
    """auto goes on from the newest good checkpoint in `out`; never refuses a folder that has one."""
    resume_allow: list[str] = field(default_factory=list)
    """Keys that may differ from the interrupted run's beyond those that always may."""
