"""The whole configuration as types. Imports no torch: `--cfg job`, `--help` and every refusal stay instant.

A default is stated once, here. Option files in `conf/` and recipes set only what differs from it.
"""

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

from align.config.choices import (
    AdapterStart,
    Advantage,
    BestBy,
    Draw,
    ExportDtype,
    ExportForm,
    GGUFType,
    Guard,
    JudgeKind,
    KLController,
    KLEstimator,
    KLPlace,
    Layout,
    Offload,
    OnBadRows,
    Order,
    PairLoss,
    PairSource,
    PeftMethod,
    Placement,
    Precision,
    Rankings,
    ReportTo,
    RevisionTarget,
    RewardScale,
    RewardTarget,
    RolloutEngine,
    Schedule,
    SpeakerBackend,
    SweepBy,
    Ties,
    Verb,
    WandbMode,
    ZeroChoice,
)


@dataclass
class ModelConfig:
    """Which model the first stage starts from, and how it is loaded."""

    path: str = "tiny-base"
    """A Hugging Face causal model folder or hub id, or embedded: tiny-base, tiny-sft, tiny-critic, tiny-untrained."""
    revision: Optional[str] = None
    """Hub revision (branch, tag or commit). Ignored values are refused: only a hub id has one."""
    chat_template: Optional[str] = None
    """For a tokenizer that has none: a .jinja file, or `plain` (roles as words, no new tokens). Also replaces one."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    pickled_weights: bool = False
    """Also take weights in PyTorch's pickle format (*.bin), read without running code; else only safetensors."""


@dataclass
class DataConfig:
    """Where rows come from: one slot a kind. A slot is a path, a glob, a hub id, `tiny:<kind>`, or a list of sources
    `{path, format, split, take, weight, columns}`; a stage takes the slot of its kind."""

    text: Any = None
    """Continued pretraining: plain documents."""
    demonstrations: Any = None
    """SFT: conversations. Preference rows are accepted too; their chosen answers are used."""
    preferences: Any = None
    """DPO and reward: pairs of answers."""
    prompts: Any = None
    """Evaluation and RL: prompts only. Rows of any other format are accepted too; their prompts are used."""
    helpful: Any = None
    """Constitutional: demonstrations that are mixed into the ones it makes."""
    format: str = "auto"
    """Row format of sources that do not name their own; `auto` finds it and says which."""
    split: str = "train"
    """Split taken from hub data sets."""
    ties: Ties = Ties.keep
    """Comparisons whose verdict is a tie: `keep` them as p=0.5 (votes keep their share), or `drop` and count them."""
    rankings: Rankings = Rankings.keep
    """What `do=convert` writes of rankings: `keep` them whole, or `pairs`. Training on pairs always takes all pairs."""
    evaluation_sets: Any = None
    """Sources like those of a slot, whose prompts should not be trained on: overlap with them is counted."""
    near_duplicate_threshold: float = 0.8
    """`do=check`: estimated Jaccard similarity of word shingles from which two rows count as near duplicates."""
    on_bad_rows: OnBadRows = OnBadRows.error
    """`error` stops when more than max_bad_fraction of the rows are bad, `drop` never; both list them in a file."""
    max_bad_fraction: float = 0.01
    """Share of bad rows above which `on_bad_rows=error` stops."""
    held_out_fraction: float = 0.05
    """Share of conversations kept out of training, by a hash of the first turn so that near copies stay together."""


@dataclass
class PeftConfig:
    """Parameter-efficient fine-tuning. A key that the method does not read is refused."""

    method: PeftMethod = PeftMethod.none
    """none | lora | qlora | dora | adalora | ia3 | prefix | prompt | ptuning | bottleneck"""
    r: int = 16
    """Rank of the update; of adalora the rank that it starts with, of bottleneck the width of its layers."""
    alpha: int = 32
    """Scale of the update is alpha / r."""
    dropout: float = 0.0
    """Dropout on the adapter's input; of bottleneck layers on their inner width."""
    target_modules: Any = "all-linear"
    """`all-linear`, a list of module names, or null: what the method's authors adapt in models of this type."""
    keep_adapter: bool = False
    """Leave policy/ as base + adapter instead of merging. The adapter is kept in adapter/ in both cases."""
    rank_stabilised: bool = False
    """Scale by alpha / sqrt(r), which lets large ranks learn (rsLoRA, arXiv:2312.03732)."""
    init: AdapterStart = AdapterStart.default
    """default | pissa (arXiv:2404.02948) | loftq, for qlora (arXiv:2310.08659)"""
    rank_pattern: Any = None
    """Module name -> its rank where it is not r: {q_proj: 32, layers.0.mlp.down_proj: 4}."""
    final_r: int = 8
    """adalora: average rank at the end, reached by taking ranks from where they matter least."""
    rank_warmup_fraction: float = 0.1
    """adalora: share of the steps before the first rank is taken."""
    rank_settled_fraction: float = 0.3
    """adalora: share of the steps, at the end, in which ranks stay as they are."""
    virtual_tokens: int = 16
    """prefix, prompt, ptuning: trained positions in front of every row; a row has that many fewer of its own."""
    placement: Placement = Placement.houlsby
    """bottleneck: houlsby | pfeiffer | parallel"""
    double_quantisation: bool = True
    """qlora: also round the scales of the 4-bit blocks, which saves 0.37 bits a number."""
    compute_precision: Precision = Precision.auto
    """qlora: what 4-bit weights are computed in: auto (the run's precision) | bf16 | fp32"""
    paged_optimizer: bool = True
    """qlora: optimizer states move to main memory while a GPU is full. On a CPU there is nowhere to move them to."""


@dataclass
class DeepSpeedConfig:
    """ZeRO: how model states are spread over ranks."""

    mode: ZeroChoice = ZeroChoice.auto
    """auto | none | zero"""
    stage: int = 2
    """ZeRO stage 0-3, when mode=zero."""
    offload: Offload = Offload.none
    """none | cpu"""
    timeout_seconds: int = 600
    """A rank that does not come to a collective, or is not heard of, for so long ends the run on every rank."""


@dataclass
class LaunchConfig:
    """What a launch on several nodes needs besides the launcher."""

    env: List[str] = field(default_factory=list)
    """`do=env`: names of variables to send to other nodes beyond those it sends anyway; the only way for a secret."""


@dataclass
class PlanConfig:
    """`do=plan`: the machine that is planned for, where it is not this one under its launcher."""

    gpus: Optional[int] = None
    """Ranks, one a GPU, over all nodes; null: as many as the launcher has started."""
    gpu_memory_gib: Optional[float] = None
    """Memory of a GPU; null: of the one here, or on a CPU a rank's share of main memory."""


@dataclass
class SweepConfig:
    """`-m`: how the members of a sweep are ranked, and from when one may be ended early."""

    by: SweepBy = SweepBy.auto
    """auto (the first that all members have) | win_rate | helpful | label_accuracy | score | accuracy | loss. A search
    needs one named."""
    prune_after: int = 4
    """stages.X.prune: members that have to be complete before one is ended."""
    prune_from_fraction: float = 0.0
    """stages.X.prune: share of the stage's steps before which no member is ended."""


@dataclass
class ReportConfig:
    """`do=report`: which runs, and where their report goes."""

    runs: List[str] = field(default_factory=list)
    """Run folders to compare on one page; `*` matches, as in 'runs/sweep/*'. Empty: the run of this command line."""
    to: ReportTo = ReportTo.html
    """html | wandb. wandb is html and a W&B Report in log.project; without login or network its spec, as a file."""


@dataclass
class ChatConfig:
    """`do=chat`: who answers, and how."""

    model: Optional[str] = None
    """A stage of the run, such as sft; a folder, a hub id, an embedded name. null: the last stage's or model.path."""
    base: Optional[str] = None
    """Who answers beside it after /base. null: the model that its chain started from."""
    system: Optional[str] = None
    """System prompt at the start; /system TEXT sets another."""
    temperature: float = 0.0
    """0 is greedy: the same answer each time."""
    max_new_tokens: int = 256
    """Longest answer."""
    seed: int = 7
    """Of sampled answers, when temperature > 0."""


@dataclass
class LogConfig:
    """Where figures go besides the run folder, which always has them."""

    wandb: bool = False
    """Log to Weights & Biases from rank 0."""
    project: str = "align"
    """wandb project."""
    entity: Optional[str] = None
    """wandb team or user."""
    mode: WandbMode = WandbMode.online
    """online | offline; the environment variable WANDB_MODE wins."""
    every: int = 1
    """Optimizer steps between logged lines."""
    upload_models: bool = False
    """Send the weights of finished stages to wandb. false: their digests alone, enough for the lineage graph."""


@dataclass
class StageConfig:
    """What every trained stage takes, under the same names."""

    policy: str = "${model.path}"
    """The model to start from: a folder, a hub id, an embedded name, or the output of an earlier stage."""
    max_steps: Optional[int] = None
    """Optimizer steps; takes the place of epochs."""
    epochs: float = 1.0
    """Passes over the rows."""
    learning_rate: float = 2e-5
    """Peak learning rate."""
    schedule: Schedule = Schedule.cosine
    """constant | linear | cosine, after warm-up."""
    warmup_fraction: float = 0.05
    """Share of the steps in which the learning rate rises from zero."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm. 0 turns it off."""
    batch_size: int = 32
    """Sequences (pairs in DPO, packed rows in packed SFT) per optimizer step, over all ranks."""
    micro_batch_size: int = 4
    """Sequences (pairs, packed rows) per rank per forward. batch_size = this x accumulation x ranks, exactly."""
    max_tokens: int = 1024
    """Longest row; longer ones are dropped and counted, never cut. In packed SFT also the length of a packed row."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    seed: int = 7
    """Order of rows and initial adapter weights."""
    eval_every: int = 0
    """Optimizer steps between evaluations on held-out rows. 0: only before the first step and after the last."""
    save_every: int = 100
    """Optimizer steps between checkpoints. 0: none, an interrupted stage starts again."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept while training; all are removed once the stage is complete."""
    keep_best: bool = False
    """The policy is that of the evaluation that is the best by best_by, not of the last step. Needs eval_every."""
    best_by: BestBy = BestBy.loss
    """loss (held-out rows) | accuracy | margin | win_rate | text_loss | unsafe_refused | helpful | ...: one of a table
    in docs/evaluation.md. What held-out rows do not tell is measured at each evaluation, see `best`."""
    stop_after: int = 0
    """Evaluations in a row that are not better by best_by, after which training ends. 0: never. Needs eval_every."""
    prune: bool = False
    """In a sweep: end this run where its best evaluation by best_by is worse than the median of the other members' at
    that step. See `sweep` for when. Needs eval_every."""
    max_nonfinite_steps: int = 3
    """Steps whose loss or gradient is not finite are skipped and counted; one more than this ends the run."""


@dataclass
class SFTStage(StageConfig):
    """Supervised fine-tuning on `data.demonstrations`: only assistant tokens are trained."""

    packing: bool = True
    """Several conversations in one row, best fit decreasing, without seeing each other."""


@dataclass
class PretrainStage(StageConfig):
    """Continued pretraining on `data.text`: every token is trained."""

    packing: bool = True
    """Several documents in one row, best fit decreasing, without seeing each other."""


@dataclass
class RewardStage(StageConfig):
    """A reward model from `data.preferences`: pairs by Bradley-Terry, rankings of several answers by Plackett-Luce.

    With another objective than `comparison` it learns the rows' scores; rows without are left out and counted.
    """

    learning_rate: float = 9e-6
    objective: RewardTarget = RewardTarget.comparison
    """comparison | regression (squared error to standardised scores) | ordinal (scores as levels, cut points learnt)"""
    label_smoothing: float = 0.0
    """Assumed share of swapped labels."""
    centring_weight: float = 0.0
    """Weight of the squared sum of a prompt's scores, which draws scores towards zero. 0 turns it off."""
    statistics_rows: int = 512
    """Rows of `data.demonstrations` whose mean score becomes zero; their spread is stored in the model's config too."""
    layout: Layout = Layout.auto
    """auto | forest | sequences | padded"""
    order: Order = Order.shuffled
    """shuffled | stratified: micro-batches of nearly equal tokens, so that ranks do not wait and memory peaks less."""


@dataclass
class ScoreStage:
    """Scores of a reward model for every answer in `data.demonstrations`, whatever its format; pairs are judged too."""

    reward_model: str = "runs/reward/reward/reward_model"
    """The folder of a reward model, or a hub id; by default what +recipe=reward leaves."""
    max_tokens: int = 1024
    """Longest prompt with its answer; longer ones are left out and counted."""
    micro_batch_size: int = 16
    """Prompts scored together."""
    subset_field: str = "subset"
    """Field of a row by which accuracy is broken down, where rows have it."""


@dataclass
class DPOStage(StageConfig):
    """Direct preference optimisation on `data.preferences`."""

    learning_rate: float = 1e-6
    reference: Optional[str] = None
    """The frozen reference; null: the policy as it was before the first step."""
    loss: PairLoss = PairLoss.sigmoid
    """sigmoid | hinge | ipo | robust | sigmoid_norm"""
    beta: float = 0.1
    """Strength of the pull to the reference."""
    label_smoothing: float = 0.0
    """Assumed share of swapped labels (losses sigmoid, sigmoid_norm and robust)."""
    nll_weight: float = 0.0
    """Weight of an added negative log-likelihood of the chosen answer, a mean over its tokens. 0 turns it off."""
    layout: Layout = Layout.auto
    """auto | forest | sequences | padded"""
    order: Order = Order.shuffled
    """shuffled | stratified: micro-batches of nearly equal tokens, so that ranks do not wait and memory peaks less."""


@dataclass
class PPOStage(StageConfig):
    """Reinforcement learning on `data.prompts`: PPO, or without a value model RLOO, GRPO and REINFORCE++.

    An update is a rollout of `completions_per_update`, then `update_epochs` passes over it in minibatches of
    `batch_size`. What StageConfig counts in optimizer steps (max_steps, save_every) counts updates here.
    """

    max_steps: Optional[int] = None
    """Updates: a rollout and the optimizer steps on it. Takes the place of epochs."""
    epochs: float = 1.0
    """Passes over the prompts."""
    learning_rate: float = 1e-6
    """Peak learning rate of the policy."""
    value_learning_rate: Optional[float] = None
    """Peak learning rate of the value model; null: that of the policy."""
    schedule: Schedule = Schedule.linear
    warmup_fraction: float = 0.0
    batch_size: int = 64
    """Completions per optimizer step, over all ranks: a minibatch. completions_per_update is a multiple of it."""
    micro_batch_size: int = 4
    """Completions per rank per forward. batch_size = this x accumulation x ranks, exactly."""
    max_tokens: int = 1024
    """Longest prompt with its completion; prompts longer than max_tokens - max_new_tokens are dropped and counted."""
    save_every: int = 10
    """Updates between checkpoints. 0: none, an interrupted stage starts again."""
    keep_best: bool = False
    """The policy is that of the samples that are the best by best_by, not of the last update. Needs sample_every."""
    best_by: BestBy = BestBy.score
    """score (of the held-out samples) | win_rate | text_loss | unsafe_refused | helpful | ...: one of a table in
    docs/evaluation.md. What samples do not tell is measured whenever they are taken, see `best`."""
    stop_after: int = 0
    """Samples in a row that are not better by best_by, after which training ends. 0: never. Needs sample_every."""
    reference: Optional[str] = None
    """The frozen reference of the KL penalty; null: the policy as it was before the first step."""
    rewards: Dict[str, Any] = field(default_factory=dict)
    """Name -> what scores completions: `{model: FOLDER}` or `{function: module:name}`, with `weight` (default 1)."""
    value: Optional[str] = None
    """What the value model starts from; null: the first reward model, head included, or else the policy."""
    completions_per_update: int = 256
    """Completions sampled per update, over all ranks."""
    completions_per_prompt: int = 1
    """Completions of each prompt; they share its computation."""
    update_epochs: int = 4
    """Passes over the completions of an update."""
    max_new_tokens: int = 128
    """Longest completion; one that reaches it has no stop token, and is counted."""
    temperature: float = 0.7
    """Of sampling, and of every log-probability of the policy and the reference."""
    rollout: RolloutEngine = RolloutEngine.hf
    """hf | vllm"""
    rollout_batch_size: int = 64
    """Completions sampled together on a rank."""
    advantage: Advantage = Advantage.gae
    """gae | rloo | grpo | reinforce_plus_plus"""
    gamma: float = 1.0
    """Discount a token."""
    gae_lambda: float = 0.95
    """How far advantages look past the value model: 0 one token, 1 to the end."""
    clip_low: float = 0.2
    """The policy's ratio is clipped below 1 - this."""
    clip_high: float = 0.2
    """The policy's ratio is clipped above 1 + this."""
    dual_clip: float = 0.0
    """Bound on the loss of a token with negative advantage, in advantages (above 1). 0 turns it off."""
    value_clip: float = 0.2
    """A value moves at most this far from its rollout's before it stops counting. 0 turns it off."""
    value_weight: float = 0.1
    """Weight of the value loss."""
    value_warmup_updates: int = 0
    """Updates at the start in which only the value model learns."""
    kl_coefficient: float = 0.05
    """Weight of the per-token KL penalty to the reference; with kl_controller=adaptive, the first. 0 turns it off."""
    kl_estimator: KLEstimator = KLEstimator.k1
    """k1 | k2 | k3"""
    kl_place: KLPlace = KLPlace.reward
    """reward | loss"""
    kl_controller: KLController = KLController.fixed
    """fixed | adaptive"""
    kl_target_nats_per_completion: float = 6.0
    """KL of a whole completion, in nats, that the adaptive controller steers to."""
    kl_horizon_completions: int = 10000
    """Completions over which the adaptive controller corrects its weight."""
    reward_scale: RewardScale = RewardScale.none
    """none | running"""
    reward_clip: float = 10.0
    """Rewards are clipped to plus and minus this, after scaling. 0 turns it off."""
    missing_stop_penalty: float = 1.0
    """Taken from the reward of a completion that has no stop token."""
    length_penalty_per_token: float = 0.0
    """Taken from the reward for each token of a completion."""
    entropy_weight: float = 0.0
    """Weight of an entropy bonus. 0 turns it off."""
    pretraining_weight: float = 0.0
    """Weight of the mean loss on rows of `data.text`, one a completion (PPO-ptx, arXiv:2203.02155). 0 turns it off."""
    importance_cap: float = 2.0
    """Cap of the weight that corrects sampled log-probabilities to the trainer's. 0 turns the correction off."""
    ema_decay: float = 0.0
    """Decay an optimizer step of a moving average of the policy in fp32, saved as policy_ema/. 0 turns it off."""
    sample_every: int = 10
    """Updates between samples of held-out prompts, in samples.jsonl. 0: only before the first and after the last."""
    sample_prompts: int = 8
    """Held-out prompts that are answered each time, the first ones."""
    stop_on: List[Guard] = field(default_factory=list)
    """Guards that stop the run and keep its best checkpoint: kl, reward_by_length, entropy, value, ratio."""
    offload_frozen: bool = False
    """Keep reference and reward models in main memory while they are not used."""
    layout: Layout = Layout.auto
    """auto | forest | sequences | padded"""


@dataclass
class SpeakerConfig:
    """A model that answers, criticises or judges."""

    backend: SpeakerBackend = SpeakerBackend.hf
    """hf | vllm | server. vllm computes on this rank's GPU, and needs the extra `vllm`."""
    model: Optional[str] = None
    """A folder, a hub id or an embedded name; with backend=server the name that the server knows it by.
    null, for critic and judge: the same model as the role before (generator, critic, judge)."""
    url: Optional[str] = None
    """backend=server: its address up to /v1."""
    key_env: Optional[str] = None
    """backend=server: the environment variable that holds the key. The key itself is never written anywhere."""
    concurrency: int = 16
    """backend=server: requests under way at a time."""
    timeout_seconds: float = 120.0
    """backend=server: for one request."""
    retries: int = 6
    """backend=server: further tries after a timeout, a lost connection, 429, 5xx or an answer that cannot be read."""
    votes: int = 8
    """backend=server: sampled answers that stand for log-probabilities where there are none. 0: such rows fail."""
    memory_share: float = 0.85
    """backend=vllm: of the GPU's memory, for weights and cache; less where another model runs beside it."""
    max_tokens: Optional[int] = None
    """backend=vllm: longest question with its answer; less leaves more memory for the cache. null: the model's own."""
    prompt_price: float = 0.0
    """Of a million tokens read, in any currency; do=plan and the report add it up."""
    completion_price: float = 0.0
    """Of a million tokens written."""


@dataclass
class ConstitutionalStage:
    """Critiques, revisions and comparisons by the principles of a constitution: demonstrations and preferences."""

    constitution: str = "harmlessness"
    """harmlessness | honesty_helpfulness | house_style | tiny, or a YAML file of your own."""
    generator: SpeakerConfig = field(default_factory=SpeakerConfig)
    """Answers prompts and revises replies."""
    critic: SpeakerConfig = field(default_factory=SpeakerConfig)
    """Criticises."""
    judge: SpeakerConfig = field(default_factory=SpeakerConfig)
    """Compares."""
    max_prompts: Optional[int] = None
    """Prompts taken, the first ones in file order; null: all that are not held out."""
    rounds: int = 2
    """Critiques and revisions of each reply, at most: a critique without a flaw ends them. 0: none."""
    draw: Draw = Draw.without_replacement
    """without_replacement | with_replacement | in_order"""
    judge_revisions: bool = True
    """Ask the judge whether a revision is better by its principle; one that is not is left out."""
    targets: RevisionTarget = RevisionTarget.last
    """last | all | best"""
    helpful_ratio: float = 1.0
    """Rows of `data.helpful` mixed in, for each demonstration made here. 0 turns it off."""
    pairs: PairSource = PairSource.revision_vs_initial
    """none | all | random | best_worst | revision_vs_initial | contrast"""
    samples: int = 4
    """Replies sampled for each prompt to be compared (pairs=all, random or best_worst)."""
    temperatures: List[float] = field(default_factory=lambda: [1.0])
    """Of those samples, in turn."""
    judge_principles: int = 4
    """Principles drawn for each pair; their verdicts are averaged. As many as there are at most."""
    temperature: float = 1.0
    """Of first replies. 0 is greedy."""
    revision_temperature: float = 0.7
    """Of critiques, revisions and thoughts. 0 is greedy."""
    max_new_tokens: int = 512
    """Longest reply or revision."""
    max_critique_tokens: int = 256
    """Longest critique or thought."""
    batch_size: int = 16
    """Questions put to a local model together, on a rank."""
    filters: List[str] = field(default_factory=lambda: ["all"])
    """Faults for which a reply is left out: `all`, or names of align/data/reply_filters.py; [] keeps everything."""
    seed: int = 7
    """Of everything that is drawn, each row by itself: batch size, order and ranks change nothing."""


@dataclass
class JudgeConfig:
    """Who says how often a model's replies are better than the baseline's."""

    kind: JudgeKind = JudgeKind.none
    """none | model | reward | function"""
    speaker: SpeakerConfig = field(default_factory=SpeakerConfig)
    """kind=model: where it runs. It is asked in both orders."""
    constitution: str = "quality"
    """kind=model: its principles are the questions; a shipped name or a YAML file."""
    reward_model: Optional[str] = None
    """kind=reward: a reward model's folder or hub id, or the output of an earlier stage; the higher score is better."""
    function: Optional[str] = None
    """kind=function: `module:name`, called as a reward function of PPO is; the higher number is better."""


@dataclass
class BestConfig:
    """What `best_by` measures of the policy while a stage trains it, where held-out rows do not tell: as evaluate does,
    on rows that stay the same."""

    baseline: str = "${model.path}"
    """The model that replies, pairs and KL are compared with."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """Of win rates. It is loaded anew for each evaluation, beside what trains."""
    rows: int = 32
    """Prompts answered (of the embedded world: of each kind), pairs weighed or pieces of text read each time."""
    max_new_tokens: int = 64
    """Longest reply."""
    batch_size: int = 32
    """Prompts generated together."""
    tasks: List[str] = field(default_factory=list)
    """best_by=tasks: files of questions with one right answer, as in stages.evaluate.tasks."""
    instructions: List[str] = field(default_factory=list)
    """best_by=instructions: files of prompts with instructions that a rule can check."""


@dataclass
class EvaluateStage:
    """Several models side by side, on the same held-out prompts, pairs and texts: which is better, and what it cost."""

    models: Dict[str, str] = field(default_factory=dict)
    """Name -> folder, hub id, embedded name, or the output of an earlier stage."""
    baseline: str = "base"
    """Name of the model that the others are compared with."""
    few_shot: int = 0
    """One more column, the baseline shown so many answered prompts first, of `data.demonstrations`. 0: none."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """Of win rates."""
    kl_prompts: int = 64
    """Prompts for which each model samples at temperature 1, for its KL to the baseline and its entropy. 0: none."""
    max_pairs: int = 256
    """Held-out rows of `data.preferences` that each model weighs. 0: none."""
    max_texts: int = 64
    """Held-out pieces of `data.text` that each model reads, to see what it forgot. 0: none."""
    max_tokens: int = 1024
    """Longest pair or piece of text."""
    beta: float = 0.1
    """Of the implicit reward, beta * log-probability over the baseline's, whose calibration on pairs is told."""
    tasks: List[str] = field(default_factory=list)
    """Files of questions with one right answer (`question`, `answer`), told by exact match."""
    instructions: List[str] = field(default_factory=list)
    """Files of prompts with instructions that a rule can check (`prompt`, `instruction_id_list`, `kwargs`)."""
    lm_eval: List[str] = field(default_factory=list)
    """Tasks of lm-eval, by name or as YAML files of your own; needs the extra `lm-eval`."""
    resamples: int = 2000
    """Bootstrap resamples of prompts for each interval."""
    max_prompts: int = 64
    """Prompts answered by each model, the first ones in file order (for the embedded world: of each kind)."""
    max_new_tokens: int = 64
    """Longest reply."""
    batch_size: int = 32
    """Prompts generated together."""
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 7
    """Sampling seed, when temperature > 0."""


@dataclass
class ClassifyStage:
    """Models that put a label word to held-out texts of `data.demonstrations`, each word weighed as a whole answer."""

    models: Dict[str, str] = field(default_factory=dict)
    """Name -> folder, hub id, embedded name, or the output of an earlier stage."""
    baseline: str = "base"
    """Name of the model that the others are compared with."""
    few_shot: int = 4
    """One more column, the baseline shown so many rows of each label first, none of them held out. 0: none."""
    labels: List[str] = field(default_factory=list)
    """The label words; rows with another are left out. []: every answer that the rows have is one."""
    max_rows: int = 500
    """Held-out rows that are labelled, the first ones."""
    batch_size: int = 16
    """Questions put to a model together, on a rank."""
    resamples: int = 2000
    """Bootstrap resamples of rows for each interval."""


@dataclass
class ExportStage:
    """A trained model as a folder to serve, proven to answer as it did when it was trained."""

    policy: str = "${model.path}"
    """What is exported: a policy or an adapter (peft.keep_adapter) of a stage, a folder, a hub id, an embedded name."""
    forms: List[ExportForm] = field(default_factory=lambda: [ExportForm.model])
    """model | adapter | gguf, several in brackets. gguf needs llama.cpp's converter to be installed."""
    dtype: ExportDtype = ExportDtype.auto
    """auto | fp32 | bf16 | fp16"""
    max_shard_size: str = "5GB"
    """Largest weight file, such as 500MB or 5GB; a larger model becomes several files."""
    generation: Dict[str, Any] = field(default_factory=dict)
    """What servers take as their default, such as {temperature: 0.7, top_p: 0.9}; stop tokens are always set."""
    gguf_type: GGUFType = GGUFType.f16
    """f32 | f16 | bf16 | q8_0"""
    push_to: Optional[str] = None
    """Hub repository, organisation/name, that the exported folder is uploaded to. null: nothing is uploaded."""
    private: bool = True
    """Whether a repository that is made for it is private."""
    max_prompts: int = 8
    """Prompts of `data.prompts`, the first ones, that are answered by the trained and by the exported model."""
    max_new_tokens: int = 64
    """Longest of those replies."""
    vllm: bool = True
    """Compare with vLLM too, where it is installed and there is a GPU."""
    tolerance_nats: Optional[float] = None
    """Largest difference in a token's log-probability that passes; null: by number format, see docs/serving.md."""


@dataclass
class Stages:
    """The settings of each stage in `run`."""

    pretrain: Optional[PretrainStage] = None
    sft: Optional[SFTStage] = None
    reward: Optional[RewardStage] = None
    score: Optional[ScoreStage] = None
    dpo: Optional[DPOStage] = None
    ppo: Optional[PPOStage] = None
    constitutional: Optional[ConstitutionalStage] = None
    evaluate: Optional[EvaluateStage] = None
    classify: Optional[ClassifyStage] = None
    export: Optional[ExportStage] = None


@dataclass
class RunConfig:
    """One run: a chain of stages over shared model, data and machine settings."""

    name: str = "???"
    """Name of the recipe; also the wandb group."""
    run: List[str] = field(default_factory=list)
    """Stages in order. A part of a chain may be run alone; the rest is found in run_dir."""
    do: Verb = Verb.train
    """The verb."""
    run_dir: str = "runs/${name}"
    """Everything the run writes. The same command again resumes or skips; a changed config is refused."""
    out: Optional[str] = None
    """`do=convert`: the JSONL file to write (.gz compresses), never overwritten. `do=report`: where the page goes."""
    cache_dir: str = "${oc.env:ALIGN_CACHE,'~/.cache/align'}"
    """Tokenised rows and reference log-probabilities, shared by runs."""
    precision: Precision = Precision.auto
    """auto | fp32 | bf16"""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    log: LogConfig = field(default_factory=LogConfig)
    best: BestConfig = field(default_factory=BestConfig)
    stages: Stages = field(default_factory=Stages)
