"""What training takes of a device's memory, as arithmetic: nothing here loads, measures or imports a model.

Sizes are bytes a rank unless a name says otherwise. `docs/memory.md` says where each formula comes from and how far to
trust it. Counted are the tensors that autograd keeps in transformers' own layers with SDPA attention.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

GIB = 2**30
MOMENT_BYTES, MASTER_BYTES = 8, 4
"""Adam's two moments and the fp32 copy of a weight. Source: arXiv:1910.02054, section 3.1."""
REDUCE_BUCKET = 5 * 10**8
"""Numbers in DeepSpeed's buffer for reducing gradients, allocated whole (deepspeed 0.19.8, `reduce_bucket_size`)."""
LIVE_PARAMETERS = 10**9
"""Parameters that ZeRO-3 keeps gathered at a time (deepspeed 0.19.8, `stage3_max_live_parameters`)."""
SUB_GROUP = 10**9
"""Parameters that ZeRO-3 updates at a time (deepspeed 0.19.8, `sub_group_size`)."""
CHUNK_BYTES = 2**26
"""fp32 logits that PPO widens at a time; the backward pass has about four of them (align.models.actor_critic)."""
WHOLE_LOGITS = 2**28
"""Bytes up to which SFT makes a micro-batch's logits whole: tiles compute them twice."""
WHOLE_COPIES = 3
"""fp32 copies of whole logits: they themselves, the logarithms of their softmax, and a gradient."""
TILE_TOKENS, TILE_VOCABULARY = 4096, 32768
"""The tile of logits in TRL 1.16's fused output layer."""
FITS, TIGHT = 0.9, 1.0
"""Shares of the usable memory up to which a run fits, and up to which it may."""
RESERVE = GIB
"""Of a device's memory, for what no tensor shows: CUDA's context, NCCL, the libraries' own workspaces."""


@dataclass(frozen=True)
class Form:
    """Number formats of a run, in bytes a number."""

    weight: int
    compute: int
    residual: int
    """Of the hidden states between layers."""
    casts: bool = False
    """Under autocast with fp32 weights or adapters: each linear layer keeps a copy of its input, made for it alone."""

    @property
    def copies_weights(self) -> bool:
        """Whether autocast keeps a copy of every linear layer's weight until the backward pass is over."""
        return self.casts and self.weight > self.compute


FP32, HALF, AUTOCAST = Form(4, 4, 4), Form(2, 2, 2), Form(4, 2, 4, casts=True)
HALF_BASE = Form(2, 2, 2, casts=True)
"""A frozen base in bf16 under adapters in fp32."""


def form_of(*, bf16: bool, deepspeed: bool, adapters: bool) -> Form:
    """The formats that `align.stages.session` loads a model in."""
    if not bf16:
        return FP32
    if deepspeed:
        return HALF
    return HALF_BASE if adapters else AUTOCAST


@dataclass(frozen=True)
class Shape:
    """A decoder, as far as its memory depends on it. Widths and heads of one layer, parameters of the whole model."""

    parameters: int
    linear: int
    """Parameters of its linear layers, output layer included."""
    largest: int
    """Parameters of its largest layer: a block or an embedding."""
    layers: int
    hidden: int
    heads: int
    key_heads: int
    head_width: int
    mlp: int
    """Width between the two halves of the MLP; with experts, of all that a token passes."""
    vocabulary: int
    gated: bool = True
    """Whether the MLP has a gate beside its way up."""
    norms: int = 2
    """Norms over the hidden width in a layer."""
    head_norms: bool = False
    """Whether queries and keys are normed too."""
    adapter: int = 0
    """Trained parameters with adapters; 0: all are trained."""
    inputs_kept: bool = True
    """Whether linear layers keep what they take in: if they are trained, or have something of low rank beside them."""
    beside: int = 0
    """Numbers a position that adapters keep in a layer."""
    scaled: int = 0
    """Of those that ia3 scales in a layer: they are kept as they were before, too."""
    virtual: int = 0
    """Trained positions in front of every row."""
    prefix: bool = False
    """Whether these are keys and values alone, and pass through no layer."""
    quantised: int = 0
    """Numbers of the base that are kept in 4 bits."""
    double_quantisation: bool = False
    """Whether the scales of these are rounded too."""
    checked: bool = True
    """Whether activations were held against what autograd keeps, for models of this type."""

    @property
    def trained(self) -> int:
        return self.adapter or self.parameters

    @property
    def frozen(self) -> int:
        return self.parameters if self.adapter else 0


@dataclass(frozen=True)
class Batch:
    """A micro-batch as the model meets it."""

    tokens: int
    """Positions, padding included."""
    squares: int
    """Numbers in its attention masks: the square of each tree, or of each padded row; 0 where no mask is kept."""
    forest: bool = False
    """Whether attention is computed tree by tree, so that what it gives is joined by a copy."""
    scored: int = 0
    """Tokens whose logits are read."""
    projected: int = 0
    """Rows of logits that are computed to have them; 0: only those scored."""
    cached: int = 0
    """Positions that have keys and values only."""


@dataclass(frozen=True)
class Sharding:
    """One way to spread model states: ZeRO `stage` (None: plain PyTorch) over `ranks`, `offload` to main memory."""

    stage: int | None
    offload: bool
    ranks: int

    @property
    def name(self) -> str:
        """As the command line has it."""
        if self.stage is None:
            return "none"
        return f"zero{self.stage}" + ("_offload" if self.offload else "")


def options(ranks: int) -> list[Sharding]:
    """Every way to spread states that the command line has, the least sharding first."""
    plain = [Sharding(stage, False, ranks) for stage in (None, 0, 1, 2, 3)]
    return [*plain, Sharding(2, True, ranks), Sharding(3, True, ranks)]


@dataclass(frozen=True)
class Need:
    """Bytes of a rank by what they are for: `kept` from step to step, then what each moment adds to them."""

    kept: Mapping[str, float]
    moments: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Moment -> what it adds: the backward pass, the optimizer step, sampling ..."""
    host: float = 0.0
    """Main memory, for what is offloaded."""

    @property
    def peak_moment(self) -> str:
        return max(self.moments, key=lambda name: sum(self.moments[name].values()), default="")

    @property
    def peak(self) -> float:
        """The most at any one time."""
        return sum(self.kept.values()) + sum(self.moments.get(self.peak_moment, {}).values())


def size_words(size: float) -> str:
    """Bytes as a person reads them."""
    return f"{size / GIB:,.1f} GiB" if size >= GIB else f"{size / 2**20:,.1f} MiB"


def usable(memory: float) -> float:
    """What tensors may take of a device's memory."""
    return max(memory - RESERVE, 0.0)


def verdict(peak: float, memory: float) -> str:
    """fits | tight | does not fit"""
    share = peak / max(usable(memory), 1.0)
    return "fits" if share <= FITS else "tight" if share <= TIGHT else "does not fit"


# Model states.


def state_bytes(trained: int, frozen: int, sharding: Sharding, form: Form) -> dict[str, float]:
    """Weights, gradients and optimizer states of a rank, offloaded ones left out.

    For mixed precision 2 + 2 + 12 bytes a parameter, each term divided from stage 3, 2 and 1 on.
    Source: arXiv:1910.02054, figure 1; what fp32 and plain PyTorch keep is read off deepspeed 0.19.8 and torch 2.13.
    """
    stage, ranks = sharding.stage, sharding.ranks
    if stage is None:
        return {
            "weights": float(4 * trained + form.weight * frozen),
            "gradients": 4.0 * trained,
            "optimizer": float(MOMENT_BYTES * trained),
        }
    # ZeRO keeps a master copy of fp32 weights too (deepspeed 0.19.8, tensors counted 2026-11); stage 0 has none.
    master = MASTER_BYTES if form.weight == 2 or stage >= 1 else 0
    weights = form.weight * (trained + frozen) / (ranks if stage >= 3 else 1)
    gradients = form.weight * trained / (ranks if stage >= 2 else 1)
    optimizer = (MOMENT_BYTES + master) * trained / (ranks if stage >= 1 else 1)
    if sharding.offload:
        gathered = 0.0 if stage >= 3 else weights
        return {"weights": gathered, "gradients": 0.0, "optimizer": 0.0}
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer}


def saved_by_rounding(quantised: int, form: Form, *, double: bool) -> float:
    """What weights of 4 bits do not take. NF4 has a scale of 32 bits for 64 numbers; rounding those scales as well
    leaves 8 bits for 64 numbers and 32 for 256 of them (arXiv:2305.14314, section 3)."""
    scales = 8 / 64 + 32 / (64 * 256) if double else 32 / 64
    return quantised * (form.weight - (4 + scales) / 8)


def offloaded_bytes(trained: int, frozen: int, sharding: Sharding, form: Form) -> float:
    """Main memory of a rank for offloaded states: master weights, moments, fp32 and accumulated gradients."""
    if not sharding.offload:
        return 0.0
    states = (MASTER_BYTES + MOMENT_BYTES + 4 + form.weight) * trained / sharding.ranks
    weights = form.weight * (trained + frozen) / sharding.ranks if sharding.stage == 3 else 0.0
    return states + weights


def buffer_bytes(shape: Shape, sharding: Sharding, form: Form, *, lazy: bool) -> float:
    """Buffers for what ranks send each other, and ZeRO-3's gathered parameters, in the backward pass.

    lazy: memory counts only where it is written, as on a CPU; a GPU gives DeepSpeed's bucket its whole size.
    """
    if sharding.stage is None:
        return 4.0 * shape.trained if sharding.ranks > 1 else 0.0  # DDP's buckets are a second copy of the gradients
    if sharding.stage == 0:
        return 0.0
    bucket = min(REDUCE_BUCKET, shape.trained) if lazy else REDUCE_BUCKET
    if sharding.stage < 3:
        overlapped = 2 if form.weight == 2 else 1  # `zero_dict` overlaps communication in bf16
        return float(overlapped * bucket * form.weight)
    gathered = max(shape.largest, min(shape.parameters, LIVE_PARAMETERS))
    return float((bucket + gathered) * form.weight)


def step_bytes(trained: int, sharding: Sharding) -> float:
    """What the optimizer step adds for a moment: gradients of this rank's share in fp32."""
    if sharding.stage in (None, 0) or sharding.offload:
        return 0.0
    share = trained / sharding.ranks
    return 4.0 * (min(share, SUB_GROUP) if sharding.stage == 3 else share)


# Activations.


def layer_bytes(shape: Shape, batch: Batch, form: Form) -> float:
    """What autograd keeps of one layer between its forward and its backward pass."""
    trained = 0 if shape.adapter else 1
    n, h, c = batch.tokens, shape.hidden, form.compute
    q, kv = shape.heads * shape.head_width, shape.key_heads * shape.head_width
    kv_kept = q if batch.squares else kv  # with a mask SDPA wants a key and a value for every head
    # A norm keeps its input in fp32, and what its weight is multiplied with if that is trained.
    norms = shape.norms * n * h * (4 + trained * form.residual)
    if shape.head_norms:
        norms += n * (q + kv) * (4 + trained * c)
    attention = c * n * (2 * q + 2 * kv_kept) + 4 * n * shape.heads + c * (batch.squares + 2 * batch.cached * kv_kept)
    mlp = c * n * shape.mlp * (3 if shape.gated else 1)
    inputs = 0.0
    if shape.inputs_kept:
        inputs += c * n * (shape.mlp + h * ((3 + (2 if shape.gated else 1)) if form.casts else 2))
        inputs += c * n * q * (int(batch.forest) + int(form.casts and bool(shape.adapter)))
    # What ia3 scales is widened to its own precision first.
    adapters = n * (c * shape.beside + (4 if form.casts else c) * shape.scaled)
    return float(norms + inputs + attention + mlp + adapters)


def with_virtual_tokens(shape: Shape, batch: Batch) -> Batch:
    """A padded batch with the positions that an adapter puts in front of each of its rows."""
    if not shape.virtual:
        return batch
    width = batch.squares // batch.tokens
    rows = batch.tokens // width
    if shape.prefix:
        return replace(batch, squares=batch.tokens * (width + shape.virtual), cached=rows * shape.virtual)
    tokens = rows * (width + shape.virtual)
    return replace(batch, tokens=tokens, squares=tokens**2 // rows, projected=tokens)


def activation_bytes(shape: Shape, batch: Batch, form: Form, *, checkpointing: bool) -> float:
    """What autograd keeps of a forward pass up to the input of the output layer.

    checkpointing: each layer keeps only its input, and one layer at a time is computed again.
    """
    n, h = batch.tokens, shape.hidden
    ends = n * h * (4 + (0 if shape.adapter else form.residual))  # the last norm
    ends += form.compute * batch.scored * h if not shape.adapter else 0
    layer = layer_bytes(shape, batch, form)
    layers = shape.layers * n * h * form.residual + layer if checkpointing else shape.layers * layer
    return float(layers + ends)


def weight_copy_bytes(shape: Shape, form: Form) -> float:
    """Autocast's copies of weights, which live from a layer's forward to its backward pass."""
    return float(form.compute * shape.linear if form.copies_weights else 0)


def reading_bytes(shape: Shape, batch: Batch, form: Form) -> float:
    """What a forward without gradients holds at its widest place, in an MLP; its logits come on top."""
    widest = batch.tokens * (form.compute * shape.mlp * (3 if shape.gated else 2) + 2 * form.residual * shape.hidden)
    return float(widest + form.compute * batch.squares)


# Logits.


def whole_logits_bytes(shape: Shape, batch: Batch, form: Form, *, gradients: bool = True) -> float:
    """`align.losses.logprobs.token_logps`: the logits, in fp32, and the logarithm of their softmax.

    With gradients the widest moment is the backward pass: the kept logarithms and two gradients, all fp32. Padded rows
    have logits of more positions than are scored, and those scored are copied out of them.
    """
    scored, projected = batch.scored, batch.projected
    forward = form.compute * (scored + projected) + (8 if form.compute == 2 else 4) * scored
    return float(shape.vocabulary * (max(forward, 12 * scored) if gradients else forward))


def chunked_logits_bytes(shape: Shape, batch: Batch, form: Form, *, gradients: bool = True) -> float:
    """`align.models.actor_critic.read_tokens`: logits as they came and their gradient, fp32 a chunk at a time."""
    numbers = shape.vocabulary * (batch.scored + batch.projected) * (2 if gradients else 1)
    return float(form.compute * numbers + 4 * min(4 * shape.vocabulary * batch.scored, CHUNK_BYTES))


def logits_are_whole(positions: int, vocabulary: int) -> bool:
    """Whether SFT makes the logits of a micro-batch whole, which is faster, or in TRL's tiles."""
    return WHOLE_COPIES * 4 * positions * vocabulary <= WHOLE_LOGITS


def next_token_bytes(shape: Shape, batch: Batch, form: Form) -> float:
    """`align.trainers.next_token`: whole logits while they are small.

    Else TRL's fused output layer: a tile of logits, and the gradients of hidden states and output layer in fp32.
    """
    if logits_are_whole(batch.tokens, shape.vocabulary):
        return float(WHOLE_COPIES * 4 * batch.tokens * shape.vocabulary)
    tile = min(batch.tokens, TILE_TOKENS) * min(shape.vocabulary, TILE_VOCABULARY)
    head = 0 if shape.adapter else 4 * shape.vocabulary * shape.hidden
    return float(form.compute * tile + 4 * batch.tokens * shape.hidden + head)


def cache_bytes(shape: Shape, tokens: int, form: Form) -> float:
    """Keys and values of `tokens` positions, for sampling."""
    return 2.0 * form.compute * shape.layers * shape.key_heads * shape.head_width * tokens


# Checkpoints.


def checkpoint_bytes(trained: int, frozen: int, sharding: Sharding, form: Form, *, adapters: bool) -> float:
    """A checkpoint of all ranks on disk: weights (of adapters alone, if there are any) and optimizer states."""
    kept = trained if adapters else trained + frozen
    if sharding.stage is None:
        return float((4 + MOMENT_BYTES) * trained + (0 if adapters else form.weight * frozen))
    # DeepSpeed writes the weights, and transformers writes them once more as safetensors.
    return float(2 * form.weight * kept + (MASTER_BYTES + MOMENT_BYTES) * trained)
