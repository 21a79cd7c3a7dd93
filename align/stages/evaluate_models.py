"""One model of an evaluation: its replies, and its log-probabilities of samples, pairs and texts.

Everything is kept as soon as it is known; a model that has nothing left to do is never loaded. Forwards have a fixed
number of rows, so that no figure depends on `batch_size`.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from align.artifacts import digest_file, digest_value
from align.config.schema import EvaluateStage
from align.constitutional.drawing import seed_of
from align.constitutional.journal import key_of
from align.constitutional.work import Work
from align.data.prepare import Prepared, prepare_preferences, prepare_text
from align.data.records import Message, PromptRow
from align.data.template import Template
from align.distributed.runtime import free_memory, from_main
from align.generation import harness
from align.generation.answer_logps import token_logps_alone
from align.generation.local_speaker import LocalSpeaker
from align.generation.rollout import sample
from align.generation.speakers import Ask, Failed, Said
from align.stages.context import RunContext
from align.stages.evaluate_parts import Parts, shared
from align.stages.rows import load_template
from align.stages.speakers import load_local, local_name
from align.tracking.progress import Progress, say

ROWS_TOGETHER = 16
KL_TEMPERATURE = 1.0
"""Of the samples that KL is estimated from: it is a distance between distributions as they are."""

Answer = tuple[list[int], list[int]]
"""Token ids of a prompt and of what follows it."""


class Subject:
    """A model that is evaluated. Each method is called on every rank, with the same arguments."""

    weighed_together = None

    def __init__(self, label: str, path: str, stage: EvaluateStage, context: RunContext, parts: Parts):
        self.label, self.path, self.stage, self.context, self.parts = label, path, stage, context, parts
        self.name = local_name(path)
        self.template: Template = load_template(context.config, path)

    @cached_property
    def _speaker(self) -> LocalSpeaker:
        return load_local(self.path, self.context, seed=self.stage.seed, batch_size=self.stage.batch_size)

    def say(self, asks: Sequence[Ask], done: Callable[[int, Said | Failed], None]) -> None:
        """See `align.generation.speakers.Speaker`."""
        self._speaker.say(asks, done)

    def replies(self, work: Work, prompts: Sequence[PromptRow], shots: Sequence[Message] = ()) -> list[Said | Failed]:
        """An answer to each prompt, after the turns of `shots`."""
        asks = self.asks(prompts, shots)
        return work.say(f"answers of {self.label}" + (" to a few-shot prompt" if shots else ""), self, asks)

    def asks(self, prompts: Sequence[PromptRow], shots: Sequence[Message] = ()) -> list[Ask]:
        """The questions that `replies` puts."""
        stage = self.stage
        return [
            Ask(
                str(place), tuple(turn.as_dict() for turn in (*shots, *row.messages)),
                seed_of(stage.seed, "reply", place), stage.temperature, stage.max_new_tokens, tools=row.tools,
            )
            for place, row in enumerate(prompts)
        ]  # fmt: skip

    def samples(self, prompts: Sequence[PromptRow]) -> list[Answer]:
        """A completion of each prompt, drawn at temperature 1; with the prompt, as token ids."""
        stage = self.stage
        asked = [(seed_of(stage.seed, "kl", place), self._prompt_ids(row)) for place, row in enumerate(prompts)]

        def draw(share: Sequence[tuple[int, list[int]]]) -> list[Answer]:
            progress = Progress(f"evaluate: samples of {self.label}", len(share), active=self.context.runtime.is_main)
            drawn = sample(
                self._speaker.model,
                [ids for _, ids in share],
                per_prompt=1,
                seeds=[seed for seed, _ in share],
                stop_token_ids=sorted(self.template.stop_token_ids),
                pad_token_id=self._pad,
                max_new_tokens=stage.max_new_tokens,
                temperature=KL_TEMPERATURE,
                batch_size=stage.batch_size,
                progress=progress,
            )
            return [(list(ids), one.ids) for (_, ids), one in zip(share, drawn, strict=True)]

        key = key_of(self.name, self.template.digest, stage.max_new_tokens, asked)
        found = self.parts.get(f"samples_{self.label}", key, lambda: shared(self.context.runtime, asked, draw))
        return [(list(prompt), list(answer)) for prompt, answer in found]

    def token_logps(self, what: str, rows: Sequence[Answer]) -> list[list[float]]:
        """Log-probability (nats) of each token of each answer after its prompt; `what` is the name of the rows."""

        def read(share: Sequence[Answer]) -> list[list[float]]:
            # Longest first, so that rows of a forward are of like length and one too large fails at once.
            order = sorted(range(len(share)), key=lambda i: -len(share[i][0]) - len(share[i][1]))
            progress = Progress(f"evaluate: {self.label} reads {what}", len(share), active=self.context.runtime.is_main)
            found: list[list[float]] = [[] for _ in share]
            with torch.no_grad():
                logps = token_logps_alone(
                    self._speaker.model, [share[i] for i in order], pad_token_id=self._pad, batch_size=ROWS_TOGETHER
                )
                for done, (place, values) in enumerate(zip(order, logps, strict=True)):
                    found[place] = values
                    progress.show(done + 1)
            return found

        key = key_of(self.name, [[list(prompt), list(answer)] for prompt, answer in rows])
        name = f"logps_{self.label}_{what}".replace(" ", "_")
        return self.parts.get(name, key, lambda: shared(self.context.runtime, rows, read))

    def lm_eval(self, task: str) -> dict[str, Any]:
        """Figures of one of lm-eval's tasks; the first rank asks, for lm-eval tells no other."""
        this = self.context.runtime

        def ask() -> dict[str, Any]:
            if this.is_main:
                say(f"{self.context.stage_name}: {self.label} does lm-eval's {task}")
            model, tokenizer = self._speaker.model, self.template.tokenizer
            return from_main(
                harness.task_figures(model, tokenizer, task, batch_size=self.stage.batch_size) if this.is_main else None
            )

        made_of = digest_file(Path(task)) if harness.is_file(task) else harness.version()
        key = key_of(self.name, self.template.digest, task, made_of)
        name = digest_value(task)[:12]
        return dict(self.parts.get(f"lm_eval_{self.label}_{name}", key, ask))

    def pairs(self) -> Prepared:
        """`data.preferences` as this model's tokens."""
        context = self.context
        return prepare_preferences(context.config.data, self.template, self.stage.max_tokens, context.cache_dir)

    def text(self) -> Prepared:
        """`data.text` as this model's tokens."""
        context = self.context
        return prepare_text(context.config.data, self.template, self.stage.max_tokens, context.cache_dir)

    def text_of(self, ids: Sequence[int]) -> str:
        """A text of its tokens, without special ones."""
        return self.template.tokenizer.decode(list(ids), skip_special_tokens=True)

    def close(self) -> None:
        """Give the memory of the model back, if it was ever loaded."""
        if "_speaker" in self.__dict__:
            self._speaker.close()
            del self._speaker
            free_memory()

    @property
    def _pad(self) -> int:
        pad: int | None = self.template.tokenizer.pad_token_id
        return self.template.chat.stop_id if pad is None else pad

    def _prompt_ids(self, row: PromptRow) -> list[int]:
        return list(self.template.encode_prompt(row.messages, row.tools))

    def prompt_text(self, messages: Any) -> str:
        """See `Speaker`."""
        return self._speaker.prompt_text(messages)

    def prompt_tokens(self, messages: Any) -> int:
        """See `Speaker`."""
        return self._speaker.prompt_tokens(messages)
