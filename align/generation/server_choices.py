"""Which candidate a server's answer stands for: by the log-probabilities of its first tokens, or by its text.

Texts are compared without the blanks before them and without regard to case: `The first` is `the first`.
"""

import math
from collections.abc import Sequence
from typing import Any

from align.generation.speakers import Failed

DECORATION = " \t\n\r\"'`*_([{“‘«"
"""What may stand before an answer without being part of it."""


def first_token_logps(logprobs: Any, candidates: Sequence[str]) -> tuple[float, ...] | None:
    """Log-probabilities of the candidates as far as they can be told apart; None where these do not show them.

    logprobs: `choices[0].logprobs` of an answer that was asked for with `top_logprobs`. Along the tokens that were
    answered, as long as they begin all candidates alike; at the first place where they part, each candidate gets the
    probability of all listed tokens that continue it and no other. What follows that place is not counted: a candidate
    is nearly certain once it has begun. None if a candidate has no token in the list, or one token fits some and not
    all. Raises: KeyError, TypeError, ValueError if it is not what the interface says.
    """
    path, path_logp = "", 0.0
    for step in logprobs["content"] or ():
        if all(_fits(path + step["token"], candidate) for candidate in candidates):
            path, path_logp = path + step["token"], path_logp + _number(step["logprob"])
            continue
        return _parted(path, path_logp, step.get("top_logprobs") or (), candidates)
    return None


def _parted(
    path: str, path_logp: float, listed: Sequence[dict[str, Any]], candidates: Sequence[str]
) -> tuple[float, ...] | None:
    found: list[list[float]] = [[] for _ in candidates]
    for entry in listed:
        fits = [i for i, candidate in enumerate(candidates) if _fits(path + entry["token"], candidate)]
        if len(fits) == 1:
            found[fits[0]].append(_number(entry["logprob"]))
        elif fits and len(fits) < len(candidates):
            return None
    return tuple(path_logp + _log_sum(logps) for logps in found) if all(found) else None


def vote_of(text: str, candidates: Sequence[str]) -> int | None:
    """The one candidate that an answer begins with."""
    text, wanted = text.lstrip(DECORATION), [candidate.lstrip(DECORATION) for candidate in candidates]
    named = [i for i, one in enumerate(wanted) if len(_plain(text)) >= len(_plain(one)) and _fits(text, one)]
    return named[0] if len(named) == 1 else None


def log_shares(votes: Sequence[int | None], candidates: int) -> tuple[float, ...] | Failed:
    """Logs of the shares of the votes (None: an answer that named no candidate). None at all counts as half a vote.

    Fewer than half the answers naming one is no verdict.
    """
    valid = [vote for vote in votes if vote is not None]
    if not valid or 2 * len(valid) < len(votes):
        return Failed("no_verdict", f"{len(valid)} of {len(votes)} sampled answers name one of the candidates")
    return tuple(math.log(max(valid.count(i), 0.5) / len(valid)) for i in range(candidates))


def _fits(text: str, candidate: str) -> bool:
    """Whether a text begins the candidate, or begins with it as whole words."""
    text, candidate = _plain(text), _plain(candidate)
    if len(text) <= len(candidate):
        return candidate.startswith(text)
    return text.startswith(candidate) and not (candidate[-1].isalnum() and text[len(candidate)].isalnum())


def _plain(text: str) -> str:
    return text.lstrip().casefold()


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value > 0.01:
        raise ValueError(f"{value!r} is no log-probability")
    return float(value)


def _log_sum(logps: Sequence[float]) -> float:
    top = max(logps)
    return top + math.log(sum(math.exp(logp - top) for logp in logps))
