"""Which rows may be learnt from: every check has a name, and nothing is repaired."""

from collections import Counter
from collections.abc import Sequence

from align.config.errors import UserError
from align.config.schema import DataConfig, OnBadRows
from align.data.records import BadRow, Demonstration, Message, PreferencePair, PromptRow, RowRefused, TextDocument

SHOWN_ROWS = 3


class TooManyBadRows(UserError):
    """More rows are bad than the policy allows; `bad_rows` are all of them."""

    def __init__(self, message: str, bad_rows: Sequence[BadRow]):
        super().__init__(message)
        self.bad_rows = bad_rows


def check_text(document: TextDocument) -> None:
    """Raises RowRefused for a document without text."""
    if not document.text.strip():
        raise RowRefused("empty_text", "'text' is empty")


def check_demonstration(demonstration: Demonstration) -> None:
    """Raises RowRefused unless turns alternate from the user to a last, non-empty assistant turn."""
    messages = demonstration.messages
    if not messages or messages[-1].role != "assistant":
        raise RowRefused("roles_do_not_alternate", "the last turn is not the assistant's")
    check_prompt(PromptRow(messages[:-1]))
    _check_completion("the answer", messages[-1])


def check_pair(pair: PreferencePair) -> None:
    """Raises RowRefused unless both answers are text, differ, and belong to a sound prompt."""
    _check_completion("'chosen'", pair.chosen)
    _check_completion("'rejected'", pair.rejected)
    check_prompt(PromptRow(pair.prompt))
    if pair.chosen.content.strip() == pair.rejected.content.strip():
        raise RowRefused("chosen_equals_rejected", "'chosen' and 'rejected' are the same text")


def check_prompt(prompt: PromptRow) -> None:
    """Raises RowRefused unless turns alternate, after an optional system turn, from the user to the user."""
    messages = prompt.messages[1:] if prompt.messages and prompt.messages[0].role == "system" else prompt.messages
    if not messages:
        raise RowRefused("empty_prompt", "there is no turn to answer")
    for turn, message in enumerate(messages, start=1):
        expected = "user" if turn % 2 else "assistant"
        if message.role != expected:
            raise RowRefused("roles_do_not_alternate", f"turn {turn} is the {message.role}'s, not the {expected}'s")
    if len(messages) % 2 == 0:
        raise RowRefused("roles_do_not_alternate", "the last turn before the answer is not the user's")
    for turn, message in enumerate(messages, start=1):
        if not message.content.strip():
            raise RowRefused("empty_prompt", f"turn {turn} is empty")


def _check_completion(name: str, message: Message) -> None:
    if message.role != "assistant":
        raise RowRefused("roles_do_not_alternate", f"{name} is the {message.role}'s turn, not the assistant's")
    if not message.content.strip():
        raise RowRefused("empty_completion", f"{name} is empty")


def count_reasons(bad_rows: Sequence[BadRow]) -> dict[str, int]:
    """Reason -> rows, the most frequent first."""
    return dict(Counter(bad.reason for bad in bad_rows).most_common())


def enforce_policy(bad_rows: Sequence[BadRow], read: int, data: DataConfig) -> None:
    """Stop when `data.on_bad_rows=error` and more than `data.max_bad_fraction` of the rows read are bad.

    Raises: TooManyBadRows naming the reasons with counts, the first rows, and how to go on.
    """
    if data.on_bad_rows is not OnBadRows.error or not bad_rows or len(bad_rows) <= data.max_bad_fraction * read:
        return
    reasons = ", ".join(f"{reason} {count}" for reason, count in count_reasons(bad_rows).items())
    first = "; ".join(f"{bad.origin}: {bad.reason}: {bad.detail}" for bad in bad_rows[:SHOWN_ROWS])
    more = f"; and {len(bad_rows) - SHOWN_ROWS} more" if len(bad_rows) > SHOWN_ROWS else ""
    raise TooManyBadRows(
        f"{len(bad_rows)} of {read} rows cannot be used ({reasons}): {first}{more}. More than data.max_bad_fraction="
        f"{data.max_bad_fraction:g}; mend the rows, or leave them out with data.on_bad_rows=drop",
        bad_rows,
    )
