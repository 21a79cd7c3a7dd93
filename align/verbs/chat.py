"""`do=chat`: talk to any stage's model in the terminal, or by a script on the standard input."""

import difflib
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from align.config.errors import UserError
from align.config.schema import ChatConfig, RunConfig
from align.constitutional.drawing import seed_of
from align.data.canonical import canonical
from align.data.records import Message, PromptRow, RowRefused
from align.data.template import Template
from align.distributed.runtime import launched_rank
from align.generation.batching import Rules
from align.generation.chats import Chats
from align.generation.streaming import Stream
from align.models.load import check_model, has_tokenizer, use_bf16
from align.models.trained import POLICY, load_trained, trained_model
from align.stages.export import EXPORTED
from align.stages.rows import load_template
from align.tracking.model_card import root_of
from align.trainers.quiet import quiet_libraries
from align.verbs.chat_columns import side_by_side

COMMANDS = {
    "/base": "answer with the base side by side, from your last message on; again: no more",
    "/system": "TEXT: set the system prompt; without a text: none",
    "/reset": "forget the conversation",
    "/save": "FILE: add your messages, each with what came before, to a file of prompts (data.prompts=FILE)",
    "/help": "this",
    "/quit": "end (so does the end of the input)",
}


def run_chat(config: RunConfig) -> None:
    """Read lines and answer them until the input ends; on the first rank of a launch.

    Raises: UserError for a model that is not there, and, where the input is no terminal, for a command that is none.
    """
    if launched_rank() != 0:
        return
    quiet_libraries()
    name, label = chosen_model(config)
    speaker = Speaker.load(name, label, config)
    conversation = Conversation(config, speaker)
    terminal = sys.stdin.isatty()
    print(f"{label} is {name}; /help lists commands", file=sys.stderr)
    for line in _lines(terminal):
        if not terminal:
            print(f"you: {line}")
        try:
            if not conversation.take(line):
                break
        except UserError as error:
            if not terminal:
                raise
            print(f"  {error}")


def chosen_model(config: RunConfig) -> tuple[str, str]:
    """(model, what it is called): chat.model, a stage's model by the stage's name; else the run's last one; else
    model.path. Raises: UserError for a stage that has not run, or a model that is not there."""
    run_dir, wanted = Path(config.run_dir), config.chat.model
    left = {
        stage: folder
        for stage in config.run
        for name in (POLICY, EXPORTED)
        if (folder := run_dir / stage / name).is_dir()
    }
    if wanted is None:
        wanted = list(left)[-1] if left else None
    if wanted in left:
        return str(left[wanted]), wanted
    if wanted in config.run:
        raise UserError(f"chat.model={wanted}: that stage has left no model in {run_dir}; run it first")
    if wanted is None and config.run:
        print(f"no stage of this run has left a model in {run_dir} yet; it would start from this one:", file=sys.stderr)
    name = wanted or config.model.path
    return name, "/".join(Path(name).parts[-2:]) if Path(name).is_dir() else name


def _check_there(name: str, key: str, config: RunConfig) -> None:
    """Raises: UserError for a model that is not whole; of an adapter, its base has to be."""
    parts = trained_model(name) if Path(name).is_dir() else None
    check_model(name if parts is None else parts.start, where=key, pickled=config.model.pickled_weights)


def _lines(terminal: bool) -> Iterator[str]:
    """What is typed, or stands in the script, without empty lines."""
    if terminal:
        with suppress(ImportError):  # editing and history of the line
            import readline  # noqa: F401
    while True:
        try:
            line = input("you> " if terminal else "")
        except (EOFError, KeyboardInterrupt):
            print(end="\n" if terminal else "")
            return
        if line.strip():
            yield line.strip()


@dataclass
class Speaker:
    """A model that answers."""

    label: str
    model: torch.nn.Module
    template: Template
    longest: int | None
    """Tokens of a conversation with its answer."""
    settings: ChatConfig

    @classmethod
    def load(cls, name: str, label: str, config: RunConfig, template: Template | None = None) -> "Speaker":
        """A model by name, its adapter on its base. template: where its own tokenizer has none."""
        _check_there(name, "chat.model" if template is None else "chat.base", config)
        parts = trained_model(name)
        own = load_template(config, name if has_tokenizer(name) else parts.start)
        if not own.tokenizer.chat_template and template is not None:
            own = template
        own.chat  # noqa: B018  proves the template, before weights are loaded
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if use_bf16(config.precision, device) else torch.float32
        model = load_trained(parts, config.model, dtype).to(device)
        return cls(label, model, own, parts.longest, config.chat)

    def answer(self, messages: list[Message], turn: int) -> Stream:
        """Raises: UserError for messages that its template does not take, or that are too long."""
        settings = self.settings
        try:
            ids = self.template.encode_prompt(messages)
        except RowRefused as refused:
            raise UserError(f"{self.label} cannot be asked that: {refused.detail}") from refused
        if self.longest is not None and len(ids) + settings.max_new_tokens > self.longest:
            raise UserError(
                f"{len(ids)} tokens and chat.max_new_tokens={settings.max_new_tokens} exceed the {self.longest} "
                f"of {self.label}; /reset starts anew"
            )
        pad = self.template.tokenizer.pad_token_id
        stops = frozenset(self.template.stop_token_ids)
        rules = Rules(stops, min(stops) if pad is None else pad, settings.max_new_tokens, settings.temperature)
        text = Chats(self.template, self.longest).text
        return Stream(self.model, ids, rules, text, seed=seed_of(settings.seed, "chat", turn))


@dataclass
class Turn:
    """A message and who answered what."""

    asked: str
    system: str | None
    """The system prompt that it was asked under."""
    answers: dict[str, str] = field(default_factory=dict)


class Conversation:
    """What was said so far, and the commands."""

    def __init__(self, config: RunConfig, speaker: Speaker):
        self.config, self.speaker = config, speaker
        self.system: str | None = config.chat.system
        self.turns: list[Turn] = []
        self.base: Speaker | None = None
        self.beside = False
        self.saved = 0

    def take(self, line: str) -> bool:
        """Answer a message or obey a command; False for /quit. Raises: UserError for what cannot be done."""
        if not line.startswith("/"):
            self.turns.append(Turn(line, self.system))
            self._answer([self.speaker, *([self.base] if self.beside and self.base else [])])
            return True
        command, _, rest = line.partition(" ")
        if command not in COMMANDS:
            close = difflib.get_close_matches(command, COMMANDS, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; there is {', '.join(COMMANDS)}"
            raise UserError(f"{command} is no command{hint}")
        if command == "/help":
            print("\n".join(f"  {name:<8} {says}" for name, says in COMMANDS.items()))
        elif command == "/base":
            self._toggle_base()
        elif command == "/system":
            self.system = rest.strip() or None
            print(f"  system prompt: {self.system or 'none'}")
        elif command == "/reset":
            self.turns, self.saved = [], 0
            print("  the conversation is forgotten")
        elif command == "/save":
            self._save(rest.strip())
        return command != "/quit"

    def messages(self, label: str, turns: list[Turn]) -> list[Message]:
        """The conversation up to the last of the turns, as a speaker knows it: with its own answers, if it gave any."""
        said = [Message("system", turns[-1].system)] if turns[-1].system else []
        for turn in turns:
            said.append(Message("user", turn.asked))
            if turn.answers and turn is not turns[-1]:
                said.append(Message("assistant", turn.answers.get(label, turn.answers[self.speaker.label])))
        return said

    def _answer(self, speakers: list[Speaker]) -> None:
        """Each speaker answers the last message; what was written until Ctrl-C counts."""
        turn = self.turns[-1]
        try:
            streams = {one.label: one.answer(self.messages(one.label, self.turns), len(self.turns)) for one in speakers}
        except UserError:
            if not turn.answers:
                self.turns.pop()
            raise
        try:
            _show(streams)
        except KeyboardInterrupt:
            print("  (stopped)")
        finally:
            for label, stream in streams.items():
                stream.stop()
                turn.answers[label] = stream.text.strip()

    def _toggle_base(self) -> None:
        self.beside = not self.beside
        if not self.beside:
            print("  the base answers no more")
            return
        if self.base is None:
            name = base_of(self.config, self.speaker)
            self.base = Speaker.load(name, "base", self.config, self.speaker.template)
            print(f"  base is {name}")
        if self.turns:
            self._answer([self.speaker, self.base])

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("/save needs a file: /save prompts.jsonl")
        if not self.turns[self.saved :]:
            raise UserError("there is nothing to save since the last time")
        rows = [
            canonical(PromptRow(tuple(self.messages(self.speaker.label, self.turns[: place + 1]))))
            for place in range(self.saved, len(self.turns))
        ]
        path = Path(name).expanduser()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        except OSError as error:
            raise UserError(f"/save {name}: {error.strerror}") from error
        self.saved = len(self.turns)
        print(f"  {len(rows)} prompt{'s' * (len(rows) > 1)} added to {path}")


def base_of(config: RunConfig, speaker: Speaker) -> str:
    """Raises: UserError if nothing says what the model was trained from."""
    name, _ = chosen_model(config)
    base = config.chat.base or root_of(name)
    if base == name:
        base = config.model.path
    if base == name:
        raise UserError("/base: nothing says what this model was trained from; start again with chat.base=MODEL")
    return base


def _show(streams: dict[str, Stream]) -> None:
    """One answer as it comes; several in columns on a terminal, else one after the other."""
    if len(streams) > 1 and sys.stdout.isatty():
        for line in side_by_side(list(streams), list(streams.values()), shutil.get_terminal_size().columns):
            print(line, flush=True)
        return
    for label, stream in streams.items():
        print(f"{label}: ", end="", flush=True)
        for piece in stream:
            print(piece, end="", flush=True)
        print()
