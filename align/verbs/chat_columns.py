"""Two texts that grow at the same time, side by side on a terminal."""

import textwrap
from collections.abc import Iterable, Iterator, Sequence

GAP = " | "


def side_by_side(titles: Sequence[str], texts: Sequence[Iterable[str]], width: int) -> Iterator[str]:
    """Lines of two columns or more, each as soon as no piece that is still to come can change it.

    texts: the pieces of each column. width: of the terminal, in characters.
    """
    column = max(8, (width - len(GAP) * (len(titles) - 1)) // len(titles))
    streams, written = [iter(text) for text in texts], ["" for _ in texts]
    ended = [False for _ in texts]
    yield _row([title[:column] for title in titles], column)
    yield _row(["-" * column for _ in titles], column)
    shown = 0
    while not all(ended):
        for place, stream in enumerate(streams):
            piece = None if ended[place] else next(stream, None)
            ended[place] = piece is None
            written[place] += piece or ""
        lines = [wrapped(text, column) for text in written]
        # The last line of a text that goes on may still grow.
        sure = [None if over else max(0, len(of) - 1) for of, over in zip(lines, ended, strict=True)]
        until = max(map(len, lines)) if all(ended) else min(count for count in sure if count is not None)
        for place in range(shown, until):
            yield _row([of[place] if place < len(of) else "" for of in lines], column)
        shown = max(shown, until)


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters; line ends of the text are kept. What is added changes the last line only."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        lines += textwrap.wrap(paragraph, width, break_on_hyphens=False) or [""]
    return lines


def _row(cells: Sequence[str], column: int) -> str:
    return GAP.join(cell.ljust(column) for cell in cells).rstrip()
