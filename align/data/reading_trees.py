"""Trees of conversations: turns with nested `replies`, those of the assistant ranked among each other."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from align.data.fields import Row, list_field, number_of, text_field, wrong_type
from align.data.reading_messages import ROLES
from align.data.records import Demonstration, Message, PromptRow, Ranking, RowRefused

OTHER = {"user": "assistant", "assistant": "user"}


class Node(NamedTuple):
    """A turn that was read, its rank among its siblings, and the turns that reply to it, not yet read."""

    turn: Message
    rank: float | None
    replies: list[Any]


def root_of(row: Row) -> Any:
    """The first turn of a tree: the row itself, or its `prompt`."""
    return row["prompt"] if isinstance(row.get("prompt"), Mapping) else row


def is_tree(row: Row) -> bool:
    """True for a turn with `text`, `role` and a list of `replies`, or a row whose `prompt` is one."""
    root = root_of(row)
    return all(name in root for name in ("text", "role")) and isinstance(root.get("replies"), list)


def read_tree(row: Row) -> list[Ranking | RowRefused]:
    """A ranking for every turn with two answers or more; its prompt is the path from the root.

    A branch that is not fully ranked, or has a turn that cannot be read, is left out; its sound replies are followed.
    Deleted turns are passed over with what follows them. Replies of the user are not compared.
    """
    root = _node(root_of(row), "user")
    found: list[Ranking | RowRefused] = []
    waiting = [((root.turn,), root)]
    while waiting:
        path, node = waiting.pop()
        nodes = _replies(node)
        sound = [reply for reply in nodes if isinstance(reply, Node)]
        refused = [reply for reply in nodes if isinstance(reply, RowRefused)]
        found += refused
        if node.turn.role == "user" and len(sound) > 1 and not refused:
            found.append(_ranking(path, sound))
        waiting += [((*path, reply.turn), reply) for reply in reversed(sound)]
    if not found:
        raise RowRefused("nothing_to_compare", "no turn of the tree has two answers")
    return found


def best_conversation(row: Row) -> Demonstration:
    """The one conversation of a tree that follows the best answers and only replies, up to its last answer.

    It ends where no reply is the best: answers not fully ranked, several best ones, several replies of the user.
    Raises: RowRefused if there is no best answer to the first turn.
    """
    node: Node | RowRefused = _node(root_of(row), "user")
    messages: list[Message] = []
    while isinstance(node, Node):
        messages.append(node.turn)
        node = _best_reply(node)
    if len(messages) < 2:
        raise node
    return Demonstration(tuple(messages[: len(messages) // 2 * 2]))


def root_prompt(row: Row) -> PromptRow:
    return PromptRow((_node(root_of(row), "user").turn,), row)


def _best_reply(node: Node) -> Node | RowRefused:
    """The reply to go on with, or why there is none."""
    replies = _replies(node)
    refused = next((reply for reply in replies if isinstance(reply, RowRefused)), None)
    if refused or not replies:
        return refused or RowRefused("unanswered", "nothing replies to the last turn")
    if len(replies) == 1:
        return replies[0]
    if any(reply.rank is None for reply in replies):
        return _unranked(replies)
    first = min(reply.rank for reply in replies)
    best = [reply for reply in replies if reply.rank == first]
    return best[0] if len(best) == 1 else RowRefused("tie", f"{len(best)} answers are equally good")


def _ranking(prompt: tuple[Message, ...], replies: list[Node]) -> Ranking | RowRefused:
    ranks = tuple(reply.rank for reply in replies if reply.rank is not None)
    if len(ranks) != len(replies):
        return _unranked(replies)
    return Ranking(prompt, tuple(reply.turn for reply in replies), ranks)


def _unranked(replies: list[Node]) -> RowRefused:
    missing = sum(reply.rank is None for reply in replies)
    return RowRefused("unranked", f"{missing} of {len(replies)} replies have no rank")


def _replies(node: Node) -> list[Node | RowRefused]:
    """The replies to a turn that were not deleted, each read, or the reason why it cannot be."""
    there = [reply for reply in node.replies if not (isinstance(reply, Mapping) and reply.get("deleted") is True)]
    return [_node_or_refused(reply, OTHER[node.turn.role]) for reply in there]


def _node_or_refused(reply: Any, role: str) -> Node | RowRefused:
    try:
        return _node(reply, role)
    except RowRefused as error:
        return error


def _node(value: Any, role: str) -> Node:
    """One turn, which must be of this role. Its replies are not looked at."""
    if not isinstance(value, Mapping):
        raise wrong_type("a turn of the tree", value, "{text, role, replies}")
    found = ROLES.get(text_field(value, "role").lower())
    if found != role:
        raise RowRefused("roles_do_not_alternate", f"a turn of the tree is {value['role']!r}, not the {role}'s")
    if value.get("deleted") is True:
        raise RowRefused("deleted", "the first turn of the tree was deleted")
    rank = None if value.get("rank") is None else number_of(value["rank"], "'rank'")
    replies = list_field(value, "replies") if value.get("replies") is not None else []
    return Node(Message(role, text_field(value, "text")), rank, replies)
