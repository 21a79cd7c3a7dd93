"""An answer as it is written, piece by piece."""

from collections.abc import Callable, Iterator, Sequence
from queue import Queue
from threading import Event, Thread

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from align.generation.batching import Rules, generate, left_padded
from align.generation.rollout import Draws, as_sampler
from align.generation.seeds import row_uniforms
from align.models.layout import speaking_model

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a text ends in while bytes of its last character are missing."""


class Stream:
    """The pieces of one answer, made in a thread of its own so that two models may answer at the same time."""

    def __init__(
        self,
        model: torch.nn.Module,
        prompt: Sequence[int],
        rules: Rules,
        decode: Callable[[list[int]], str],
        *,
        seed: int,
    ):
        """prompt: token ids. Tokens are drawn as rollouts draw them, so that a seed gives the same answer there.

        decode: token ids to text, without special tokens.
        """
        self.text = ""
        self._queue: Queue[str | BaseException | None] = Queue()
        self._stop = Event()
        self._thread = Thread(
            target=self._run, args=(speaking_model(model), list(prompt), rules, decode, seed), daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Iterator[str]:
        """Raises: whatever the model raised."""
        while (piece := self._queue.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            self.text += piece
            yield piece

    def stop(self) -> None:
        """Let the answer end here, and wait for the model."""
        self._stop.set()
        self._thread.join()

    @torch.no_grad()
    def _run(self, model, prompt: list[int], rules: Rules, decode: Callable[[list[int]], str], seed: int) -> None:
        pieces = _Pieces(self._queue, decode)
        uniforms = torch.from_numpy(row_uniforms([seed], rules.max_new_tokens)).to(model.device)
        draws = Draws(uniforms, rules.temperature)
        stop = StoppingCriteriaList([_Stopped(self._stop)])
        try:
            with as_sampler(model):
                ids, mask = left_padded([prompt], rules.pad_token_id, model.device)
                generate(model, ids, mask, rules.max_new_tokens, rules, draws, streamer=pieces, stopping_criteria=stop)
        except BaseException as error:  # told to the thread that reads
            self._queue.put(error)
        finally:
            self._queue.put(None)


class _Pieces(BaseStreamer):
    """Tokens to text; a character is held back until its last byte is there."""

    def __init__(self, queue: Queue, decode: Callable[[list[int]], str]):
        self.queue, self.decode = queue, decode
        self.ids: list[int] | None = None
        self.told = ""

    def put(self, value: Tensor) -> None:
        if self.ids is None:  # the prompt comes first
            self.ids = []
            return
        self.ids += value.flatten().tolist()
        if not (text := self.decode(self.ids)).endswith(UNFINISHED):
            self._tell(text)

    def end(self) -> None:
        self._tell(self.decode(self.ids or []))

    def _tell(self, text: str) -> None:
        if text[len(self.told) :]:
            self.queue.put(text[len(self.told) :])
        self.told = text


class _Stopped(StoppingCriteria):
    def __init__(self, event: Event):
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)
