"""What a key may be set to where only some words are allowed. `schema` has them all under its own name too."""

from enum import Enum


class Verb(Enum):
    """What `do=` may be."""

    train = "train"
    plan = "plan"
    check = "check"
    doctor = "doctor"
    preview = "preview"
    convert = "convert"
    env = "env"
    report = "report"
    chat = "chat"
    recipes = "recipes"


class OnBadRows(Enum):
    """What happens to rows that cannot be used."""

    error = "error"
    drop = "drop"


class Ties(Enum):
    """What becomes of a comparison whose verdict is a tie."""

    keep = "keep"
    drop = "drop"


class Rankings(Enum):
    """How `do=convert` writes rankings of several answers."""

    keep = "keep"
    pairs = "pairs"


class RewardTarget(Enum):
    """What a reward model learns: which answer is better, or the scores that the rows have."""

    comparison = "comparison"
    regression = "regression"
    ordinal = "ordinal"


class Order(Enum):
    """How the rows of an epoch follow each other."""

    stratified = "stratified"
    shuffled = "shuffled"


class Precision(Enum):
    """Number format of the forward and backward pass; `auto` is bf16 on a GPU and fp32 on a CPU."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class Schedule(Enum):
    """Shape of the learning rate after warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class PairLoss(Enum):
    """The preference losses of `align.losses.pairwise`."""

    sigmoid = "sigmoid"
    hinge = "hinge"
    ipo = "ipo"
    robust = "robust"
    sigmoid_norm = "sigmoid_norm"


class Layout(Enum):
    """How a batch of pairs is laid out; `auto` takes the first that the model is proven to compute exactly."""

    auto = "auto"
    forest = "forest"
    sequences = "sequences"
    padded = "padded"


class KLEstimator(Enum):
    """How the KL divergence to the reference is estimated from sampled tokens (joschu.net/blog/kl-approx.html)."""

    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


class KLPlace(Enum):
    """Where the KL penalty enters: in each token's `reward`, or as a term of the `loss`."""

    reward = "reward"
    loss = "loss"


class KLController(Enum):
    """Whether the weight of the KL penalty stays, or follows a target (Ziegler et al. 2019, arXiv:1909.08593)."""

    fixed = "fixed"
    adaptive = "adaptive"


class Advantage(Enum):
    """What a token's advantage is made of: only `gae` trains a value model."""

    gae = "gae"
    rloo = "rloo"
    grpo = "grpo"
    reinforce_plus_plus = "reinforce_plus_plus"


class RewardScale(Enum):
    """`running`: rewards are divided by their standard deviation over all updates so far."""

    none = "none"
    running = "running"


class RolloutEngine(Enum):
    """What samples completions."""

    hf = "hf"
    vllm = "vllm"


class Guard(Enum):
    """What is watched while PPO runs; each warns in one line, and stops the run where `stop_on` names it."""

    kl = "kl"
    reward_by_length = "reward_by_length"
    entropy = "entropy"
    value = "value"
    ratio = "ratio"


class SpeakerBackend(Enum):
    """Where a model that generates data runs: in this process, or behind an OpenAI-compatible server."""

    hf = "hf"
    vllm = "vllm"
    server = "server"


class JudgeKind(Enum):
    """Who says which of two replies is better: nobody, a model by a constitution, a reward model, or a function."""

    none = "none"
    model = "model"
    reward = "reward"
    function = "function"


class BestBy(Enum):
    """By which figure one evaluation while training is better than another; `align/config/best.py` says which way."""

    loss = "loss"
    accuracy = "accuracy"
    margin = "margin"
    ece = "ece"
    brier = "brier"
    score = "score"
    win_rate = "win_rate"
    win_rate_at_equal_length = "win_rate_at_equal_length"
    text_loss = "text_loss"
    unsafe_refused = "unsafe_refused"
    safe_refused = "safe_refused"
    distinct_2 = "distinct_2"
    kl = "kl"
    entropy = "entropy"
    tasks = "tasks"
    instructions = "instructions"
    helpful = "helpful"
    right_reason = "right_reason"
    unsafe_complied = "unsafe_complied"
    over_refused = "over_refused"
    garbled = "garbled"


class SweepBy(Enum):
    """The figure by which the members of a sweep are ranked, and which a search makes better."""

    auto = "auto"
    win_rate = "win_rate"
    helpful = "helpful"
    label_accuracy = "label_accuracy"
    score = "score"
    accuracy = "accuracy"
    loss = "loss"


class Draw(Enum):
    """How the principles of a prompt's rounds are drawn, likelier by weight; `in_order` takes them as written."""

    without_replacement = "without_replacement"
    with_replacement = "with_replacement"
    in_order = "in_order"


class RevisionTarget(Enum):
    """Which accepted revisions become demonstrations: the last, every one, or the one that the judge puts first."""

    last = "last"
    all = "all"
    best = "best"


class PairSource(Enum):
    """What is compared: samples of a prompt (all pairs, one at random, best against worst), the revised reply against
    the first, or replies to a positive and a negative system prompt."""

    none = "none"
    all = "all"
    random = "random"
    best_worst = "best_worst"
    revision_vs_initial = "revision_vs_initial"
    contrast = "contrast"


class PeftMethod(Enum):
    """Parameter-efficient method; `none` trains every weight. docs/adapters.md says which goes with what."""

    none = "none"
    lora = "lora"
    qlora = "qlora"
    dora = "dora"
    adalora = "adalora"
    ia3 = "ia3"
    prefix = "prefix"
    prompt = "prompt"
    ptuning = "ptuning"
    bottleneck = "bottleneck"


class AdapterStart(Enum):
    """What a low-rank update starts from: nothing (`default`), the base's main directions (`pissa`), or what rounding
    the base to 4 bits has lost (`loftq`)."""

    default = "default"
    pissa = "pissa"
    loftq = "loftq"


class Placement(Enum):
    """Where bottleneck layers sit: behind attention and behind the MLP, behind the MLP alone, or beside the MLP."""

    houlsby = "houlsby"
    pfeiffer = "pfeiffer"
    parallel = "parallel"


class ZeroChoice(Enum):
    """How model states are spread over ranks: `auto` decides, `none` is plain PyTorch, `zero` ZeRO at `stage`."""

    auto = "auto"
    none = "none"
    zero = "zero"


class Offload(Enum):
    """Where ZeRO keeps optimizer states (and, at stage 3, parameters) between uses."""

    none = "none"
    cpu = "cpu"


class ReportTo(Enum):
    """`wandb` writes the page as well, and makes or updates one W&B Report of the runs that log=wandb made."""

    html = "html"
    wandb = "wandb"


class WandbMode(Enum):
    """`offline` writes files that `wandb sync` sends later."""

    online = "online"
    offline = "offline"


class ExportForm(Enum):
    """What is exported: the whole model, the adapter alone to serve beside its base, a GGUF file for llama.cpp."""

    model = "model"
    adapter = "adapter"
    gguf = "gguf"


class ExportDtype(Enum):
    """Number format of exported weights; `auto` is that of the policy, or of the base of an adapter."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class GGUFType(Enum):
    """Number format of a GGUF file."""

    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"
