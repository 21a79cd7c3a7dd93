"""What is watched while PPO runs: a few figures of each update, and one line where one of them says it goes wrong.

Thresholds are far from what a sound run does, so that a line is worth reading. An alarm is given once; it can come
again after `CLEAR_UPDATES` updates in a row in which its figure was well on the sound side.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from align.config.schema import Guard

# At one nat a token the reference finds what is sampled e times less likely than the policy does, token for token.
KL_CEILING_NATS_PER_TOKEN = 1.0
# A few tokens that change with good reason, such as the first of a refusal, cost this much in a short completion.
KL_LEAST_NATS_PER_COMPLETION = 10.0
# KL that grows with the square of the updates stands at four times its median over them.
KL_JUMP_FOLD = 5.0
KL_JUMP_WINDOW, KL_JUMP_LEAST_UPDATES = 20, 8
# Sums over long completions reach 10 nats while each token is still where the reference puts it.
KL_JUMP_LEAST_NATS_PER_TOKEN = 0.1

# The short window sees a sudden change, the long ones a creep.
LENGTH_WINDOWS = (20, 50, 100)
LENGTH_GROWTH_IN_WINDOW = 0.1
# Over where they stood at first: a sound run may shorten its answers and lengthen them again while reward rises.
# Another alarm comes with another such growth.
LENGTH_GROWTH = 0.25
LENGTH_LATEST = 5
# Slope over its standard error: noise alone gets there in one window of 20 in about 1,000, for one of two figures.
TREND_T = 4.0
LENGTH_CORRELATION = 0.8

# Sampling that keeps a tenth of its nats meets the same completion again and again, and learns nothing from it.
ENTROPY_SHARE, ENTROPY_SHARE_CLEARED = 0.1, 0.2
ENTROPY_UPDATES = 3
# A policy that starts nearly certain has no entropy to lose; a share of it is noise.
ENTROPY_LEAST_NATS = 0.02

# A value model may start as a reward model's score or as nothing, and needs some updates to fit this policy.
VALUE_FIRST_UPDATES = 10
# By chance, a value model at zero is below it ten times in a row once in 1,000; and it stays close, as a constant does.
VALUE_UPDATES_IN_A_ROW, VALUE_LEAST_MEAN = 10, -0.05

# Clipping ends the pull on a token outside 1 +- 0.2; only other tokens can carry one as far as this. One rare token
# may go several hundredfold in an update of a policy with little entropy (607 seen), so most updates must have one.
RATIO_MAX, RATIO_UPDATES = 10.0, 5
# Before the first step the ratio is 1 up to rounding: 1e-6 in fp32; about 0.01 in bf16, batches laid out differently.
RATIO_FIRST_FP32, RATIO_FIRST_BF16 = 1e-3, 0.05

CLEAR_UPDATES = 5
# An alarm clears on this share of its limit, so that a figure at the limit does not switch it on and off.
CLEARED_SHARE = 0.8

KL, KL_PER_TOKEN = "kl/nats_per_completion", "kl/nats_per_token"
SCORE, LENGTH = "reward/score", "completion/tokens"
ENTROPY, EXPLAINED = "policy/entropy", "value/explained_variance"
LARGEST_RATIO, FIRST_RATIO = "policy/ratio_max", "policy/ratio_first"

# How many updates of a figure are remembered.
REMEMBERED = {
    KL: KL_JUMP_WINDOW + 1,
    KL_PER_TOKEN: 1,
    SCORE: max(LENGTH_WINDOWS),
    LENGTH: max(LENGTH_WINDOWS),
    ENTROPY: ENTROPY_UPDATES,
    EXPLAINED: VALUE_UPDATES_IN_A_ROW,
    LARGEST_RATIO: RATIO_UPDATES,
    FIRST_RATIO: 1,
}
# What no sound update logs as NaN. A mean score is, where nothing could be scored.
ALWAYS_NUMBERS = {
    Guard.kl: (KL, KL_PER_TOKEN),
    Guard.entropy: (ENTROPY,),
    Guard.value: (EXPLAINED,),
    Guard.ratio: (LARGEST_RATIO, FIRST_RATIO),
}

LESS_KL = "raise stages.ppo.kl_coefficient or lower stages.ppo.learning_rate"

Window = Mapping[str, Sequence[float]]


class Alarm(NamedTuple):
    """One guard's line at one update."""

    guard: Guard
    text: str

    def line(self, update: int) -> dict[str, Any]:
        """As a JSON object, which `align.tracking.ppo_page` takes."""
        return {"step": update, "guard": self.guard.value, "text": self.text}


class Reading(NamedTuple):
    """What a check finds at one update. Between `fires` and `cleared` an alarm stays as it is."""

    guard: Guard
    fires: bool
    cleared: bool
    text: str


class Guards:
    """Takes the figures of each update, in order, and says which alarms start with it.

    Figures may lack: a run without a value model has no explained variance, and its guard is silent.
    bf16: whether log-probabilities come from a forward in bf16, which rounds more.
    """

    def __init__(self, *, bf16: bool) -> None:
        self.ratio_first_limit = RATIO_FIRST_BF16 if bf16 else RATIO_FIRST_FP32
        self.recent: dict[str, list[float]] = {name: [] for name in REMEMBERED}
        # Entropy and length of the first update, whose rollout is of the policy as it came. An alarm over length puts
        # the length it speaks of in place of the first.
        self.first: dict[str, float] = {}
        # Alarms that are on, by the check's name: updates in a row in which the figure was on the sound side.
        self.sound_updates: dict[str, int] = {}
        self.raised: list[dict[str, Any]] = []

    def observe(self, update: int, figures: Mapping[str, float]) -> list[Alarm]:
        """The alarms that start with this update (1, 2, ...); those of all updates so far are in `raised`."""
        seen = {name for name in REMEMBERED if math.isfinite(figures.get(name, math.nan))}
        if not seen.issuperset((SCORE, LENGTH)):
            # Their windows are compared update by update.
            seen -= {SCORE, LENGTH}
        for name in seen:
            self.recent[name] = [*self.recent[name], float(figures[name])][-REMEMBERED[name] :]
        for name in seen & {ENTROPY, LENGTH}:
            self.first.setdefault(name, float(figures[name]))
        started = [
            Alarm(reading.guard, f"update {update}: {reading.text}")
            for name, reading in (*self._readings(update, seen), *_numbers(figures))
            if self._starts(name, reading)
        ]
        if any(alarm.guard is Guard.reward_by_length for alarm in started):
            self.first[LENGTH] = _latest_length(self.recent)
        self.raised += [alarm.line(update) for alarm in started]
        return started

    def state_dict(self) -> dict[str, Any]:
        """All that later alarms depend on, as JSON can hold it."""
        return {
            "recent": {name: list(values) for name, values in self.recent.items()},
            "first": dict(self.first),
            "sound_updates": dict(self.sound_updates),
            "raised": [dict(line) for line in self.raised],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.recent = {name: list(state["recent"].get(name, [])) for name in REMEMBERED}
        self.first = dict(state["first"])
        self.sound_updates = dict(state["sound_updates"])
        self.raised = [dict(line) for line in state["raised"]]

    def _readings(self, update: int, seen: set[str]) -> Iterator[tuple[str, Reading]]:
        """Of each check whose figures this update has."""
        checks: dict[str, tuple[tuple[str, ...], Callable[[], Reading]]] = {
            "kl_ceiling": ((KL, KL_PER_TOKEN), lambda: _kl_ceiling(self.recent)),
            "kl_jump": ((KL, KL_PER_TOKEN), lambda: _kl_jump(self.recent)),
            "reward_by_length": ((SCORE, LENGTH), lambda: _reward_by_length(self.recent, self.first[LENGTH])),
            "entropy": ((ENTROPY,), lambda: _entropy(self.recent, self.first[ENTROPY])),
            "value": ((EXPLAINED,), lambda: _value(self.recent, update)),
            "ratio_max": ((LARGEST_RATIO,), lambda: _ratio_max(self.recent)),
            "ratio_first": ((FIRST_RATIO,), lambda: _ratio_first(self.recent, self.ratio_first_limit)),
        }
        for name, (needed, check) in checks.items():
            if seen.issuperset(needed):
                yield name, check()

    def _starts(self, name: str, reading: Reading) -> bool:
        """Whether an alarm starts; one that is on is counted towards its end."""
        if name not in self.sound_updates:
            if reading.fires:
                self.sound_updates[name] = 0
            return reading.fires
        self.sound_updates[name] = self.sound_updates[name] + 1 if reading.cleared else 0
        if self.sound_updates[name] == CLEAR_UPDATES:
            del self.sound_updates[name]
        return False


def _kl_ceiling(recent: Window) -> Reading:
    nats, a_token = recent[KL][-1], recent[KL_PER_TOKEN][-1]
    return Reading(
        Guard.kl,
        fires=a_token > KL_CEILING_NATS_PER_TOKEN and nats > KL_LEAST_NATS_PER_COMPLETION,
        cleared=a_token < CLEARED_SHARE * KL_CEILING_NATS_PER_TOKEN,
        text=f"{KL_PER_TOKEN} is {a_token:.3g}, above {KL_CEILING_NATS_PER_TOKEN:g} ({nats:.3g} nats a completion): "
        f"the policy has left the reference; {LESS_KL}",
    )


def _kl_jump(recent: Window) -> Reading:
    *before, now = recent[KL]
    usual = statistics.median(before) if before else now
    limit = max(KL_JUMP_FOLD * usual, KL_LEAST_NATS_PER_COMPLETION)
    enough = len(before) >= KL_JUMP_LEAST_UPDATES and recent[KL_PER_TOKEN][-1] > KL_JUMP_LEAST_NATS_PER_TOKEN
    return Reading(
        Guard.kl,
        fires=enough and now > limit,
        cleared=now < CLEARED_SHARE * limit,
        text=f"{KL} is {now:.3g}, above {limit:.3g}, while its median over the {len(before)} updates before is "
        f"{usual:.3g}: the policy runs away from the reference; {LESS_KL}",
    )


def _reward_by_length(recent: Window, first: float) -> Reading:
    """A policy that gets its reward by writing more."""
    now = _latest_length(recent)
    longer = now > (1 + LENGTH_GROWTH) * first
    return Reading(
        Guard.reward_by_length,
        fires=longer and any(_rise_together(recent[SCORE][-n:], recent[LENGTH][-n:], n) for n in LENGTH_WINDOWS),
        cleared=not longer,
        text=f"{LENGTH} is {now:.3g}, more than {LENGTH_GROWTH:.0%} above {first:.3g}, and {SCORE} rose with it: the "
        "reward may be paid for length; read samples.jsonl, set stages.ppo.length_penalty_per_token, or train the "
        "reward model on pairs whose longer answer is as often the worse one",
    )


def _latest_length(recent: Window) -> float:
    return float(np.mean(recent[LENGTH][-LENGTH_LATEST:]))


def _entropy(recent: Window, first: float) -> Reading:
    now, limit = statistics.median(recent[ENTROPY]), ENTROPY_SHARE * first
    known = len(recent[ENTROPY]) == ENTROPY_UPDATES and first > ENTROPY_LEAST_NATS
    return Reading(
        Guard.entropy,
        fires=known and now < limit,
        cleared=now > ENTROPY_SHARE_CLEARED * first,
        text=f"{ENTROPY} is {now:.3g} nats a token, below {limit:.3g}, which is {ENTROPY_SHARE:.0%} of its first "
        "level: sampling no longer explores; raise stages.ppo.kl_coefficient, stages.ppo.entropy_weight or "
        "stages.ppo.temperature",
    )


def _value(recent: Window, update: int) -> Reading:
    run = recent[EXPLAINED]
    late = update >= VALUE_FIRST_UPDATES + VALUE_UPDATES_IN_A_ROW
    return Reading(
        Guard.value,
        fires=late and len(run) == VALUE_UPDATES_IN_A_ROW and max(run) < 0 and statistics.mean(run) < VALUE_LEAST_MEAN,
        cleared=run[-1] > 0,
        text=f"{EXPLAINED} is {run[-1]:.3g}, below 0 for {VALUE_UPDATES_IN_A_ROW} updates: the value model misleads "
        "more than a constant would; start it from a reward model (stages.ppo.value), raise "
        "stages.ppo.value_warmup_updates, or change stages.ppo.value_learning_rate",
    )


def _ratio_max(recent: Window) -> Reading:
    ratio = statistics.median(recent[LARGEST_RATIO])
    return Reading(
        Guard.ratio,
        fires=len(recent[LARGEST_RATIO]) == RATIO_UPDATES and ratio > RATIO_MAX,
        cleared=ratio < CLEARED_SHARE * RATIO_MAX,
        text=f"{LARGEST_RATIO} is {ratio:.3g}, above {RATIO_MAX:g}, as the median of {RATIO_UPDATES} updates: they "
        "move some tokens far beyond the clip; lower stages.ppo.learning_rate or stages.ppo.update_epochs, or set "
        "stages.ppo.dual_clip",
    )


def _ratio_first(recent: Window, limit: float) -> Reading:
    distance = recent[FIRST_RATIO][-1]
    return Reading(
        Guard.ratio,
        fires=distance > limit,
        cleared=distance < CLEARED_SHARE * limit,
        text=f"{FIRST_RATIO} is {distance:.3g}, above {limit:g}: before its first step the policy should agree with "
        "its own log-probabilities, so training is off-policy by accident; set stages.ppo.layout=padded or "
        "precision=fp32",
    )


def _numbers(figures: Mapping[str, float]) -> Iterator[tuple[str, Reading]]:
    """A figure that is NaN or infinite passes every comparison, so it is an alarm of its own."""
    for guard, names in ALWAYS_NUMBERS.items():
        odd = [name for name in names if not math.isfinite(figures.get(name, 0.0))]
        text = "".join(f"{name} is {figures[name]}, not a finite number; " for name in odd)
        yield f"{guard.value}_number", Reading(guard, bool(odd), not odd, f"{text}lower stages.ppo.learning_rate")


def _rise_together(scores: Sequence[float], lengths: Sequence[float], updates: int) -> bool:
    """Whether both have a clear trend over so many updates, the same one, and lengths grow by what matters."""
    if not len(scores) == len(lengths) == updates:
        return False
    slope, length_t = _trend(lengths)
    rise = slope * (updates - 1)
    if rise < LENGTH_GROWTH_IN_WINDOW * (np.mean(lengths) - rise / 2) or min(length_t, _trend(scores)[1]) < TREND_T:
        return False
    return float(np.corrcoef(scores, lengths)[0, 1]) > LENGTH_CORRELATION


def _trend(values: Sequence[float]) -> tuple[float, float]:
    """Slope per update by least squares, and that slope over its standard error."""
    y = np.asarray(values, dtype=np.float64)
    x = np.arange(len(y)) - (len(y) - 1) / 2
    slope = float(x @ y / (x @ x))
    left = y - y.mean() - slope * x
    error = math.sqrt(float(left @ left) / (len(y) - 2) / float(x @ x))
    # Values without noise have an error of rounding alone, or none.
    least = 1e-12 * max(float(np.abs(y).max()), 1e-300)
    return slope, slope / max(error, least)
