"""One cell of the table of docs/adapters.md: a method in a stage, run to its end on the embedded model, and judged."""

import contextlib
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file

from align import cli
from align.config.schema import ModelConfig
from align.distributed import runtime
from align.models.adapters.saved import load_scorer, load_speaker
from align.models.load import load_model
from align.models.reward import load_reward_model
from align.stages import saving_actor, training
from align.tracking.local import read_metrics
from tests.stages.runs import write_pairs

METHODS = ("lora", "qlora", "dora", "adalora", "ia3", "prefix", "prompt", "ptuning", "bottleneck")
STAGES = ("sft", "dpo", "reward", "ppo")
VIRTUAL = ("prefix", "prompt", "ptuning")
ROUNDING = 2e-4
"""Of logits and scores, relative to the largest: merged weights add up in another order."""
IDS = torch.randint(5, 200, (2, 24), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Cell:
    """A place in the table. packed: several sequences in a row (packing=true; layout=auto), else one."""

    method: str
    stage: str
    sharding: str = "none"
    checkpointing: bool = False
    packed: bool = True

    def command(self, folder: Path) -> list[str]:
        """Four steps, or two updates of PPO, on forty pairs in plain words."""
        stage = f"stages.{self.stage}"
        words = [
            f"+recipe={self.stage}", f"peft={self.method}", f"deepspeed={self.sharding}", "precision=fp32",
            f"run_dir={folder}/run", f"cache_dir={folder.parent}/cache", "data.held_out_fraction=0.2",
            f"{stage}.activation_checkpointing={str(self.checkpointing).lower()}", f"{stage}.learning_rate=1e-2",
        ]  # fmt: skip
        words += [f"peft.r={r}" for r in (8,) if self.method in ("lora", "qlora", "dora", "bottleneck")]
        words += ["peft.r=6", "peft.final_r=3"] if self.method == "adalora" else []
        if self.stage == "ppo":
            prompts = folder / "prompts.jsonl"
            prompts.write_text("".join(json.dumps({"prompt": f"Who is villager {n}?"}) + "\n" for n in range(16)))
            settings = {
                "max_steps": 2, "completions_per_update": 8, "batch_size": 4, "micro_batch_size": 4,
                "update_epochs": 1, "max_tokens": 96, "max_new_tokens": 8, "learning_rate": "1e-3",
                "sample_every": 0, "value_warmup_updates": 0,
            }  # fmt: skip
            words += [f"{stage}.{key}={value}" for key, value in settings.items()]
            words += [f"data.prompts={prompts}", "stages.ppo.rewards.preference=null"]
            words.append("stages.ppo.rewards.mine={function: 'tests.adapters.cells:vowels'}")
        else:
            words += [f"{stage}.max_steps=4", f"{stage}.batch_size=8", f"{stage}.micro_batch_size=8"]
            words += [f"data.preferences={write_pairs(folder)}"]
        if self.stage == "sft":
            words += [f"data.demonstrations={folder}/pairs.jsonl", f"{stage}.packing={str(self.packed).lower()}"]
            words += [f"{stage}.batch_size=1", f"{stage}.micro_batch_size=1"] if self.packed else []
        elif not self.packed:
            words.append(f"{stage}.layout=padded")
        given = {word.partition("=")[0]: word for word in words}  # what comes later counts
        return [word for word in given.values() if not word.startswith("data.preferences") or self.stage != "sft"]


def vowels(prompts: list[Any], completions: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """A reward."""
    return [sum(map(text.count, "aeiou")) / 10 for text in completions]


def outcome(cell: Cell, folder: Path, *more: str) -> str:
    """`works`, or the one line that refuses it. Raises: AssertionError for a cell that fails in any other way."""
    folder.mkdir(parents=True)
    said, seen = io.StringIO(), {}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        _watch(patch, seen)
        # DeepSpeed joins a process group once in a process; the next cell takes the same one.
        patch.setattr(runtime, "stop", lambda: None)
        code = cli.main([*cell.command(folder), *more])
    text = said.getvalue()
    if code:
        assert code == 2, text
        lines = [line for line in text.splitlines() if line.strip()]
        refusal = lines[-1]
        assert "Traceback" not in text and re.search(r"peft[=.]", refusal), text
        assert not (folder / "run" / cell.stage / "adapter").exists()
        return refusal.removeprefix("align: ")
    stage_dir = folder / "run" / cell.stage
    _loss_falls(cell, stage_dir)
    _adapter_is_alone(stage_dir / "adapter")
    _reload_is_equal(cell, stage_dir, seen)
    assert re.search(rf"peft={cell.method} trains [\d,]+ of [\d,]+ parameters", text), text
    layout = re.search(r"layout (\w+)", text)
    return "works" if layout is None or not cell.packed else f"works, {layout[1]}"


def _watch(patch: pytest.MonkeyPatch, seen: dict[str, torch.Tensor]) -> None:
    """Note what the model in memory computes just before it is saved."""
    save, save_actor = training.save_model, saving_actor.save_actor

    def note(session: Any, trainer: Any, *rest: Any) -> Any:
        model = trainer.model.eval()
        with torch.no_grad():
            seen["logits"] = read(model, IDS)
        return save(session, trainer, *rest)

    def note_actor(session: Any, trainer: Any) -> Any:
        with (
            torch.no_grad(),
            trainer.whole_weights() if hasattr(trainer, "whole_weights") else contextlib.nullcontext(),
        ):
            seen["logits"] = read(trainer.inner.policy.eval(), IDS)
        return save_actor(session, trainer)

    from align.stages import ppo, reward

    patch.setattr(training, "save_model", note)
    patch.setattr(reward, "save_model", note)
    patch.setattr(ppo, "save_actor", note_actor)


def read(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits (rows, tokens, vocabulary) of the real tokens, or scores (rows,) at the last one of a reward model."""
    plain = model
    while hasattr(plain, "module"):
        plain = plain.module
    inner = plain.get_base_model() if hasattr(plain, "peft_config") and hasattr(plain, "get_base_model") else plain
    mask = torch.ones_like(ids)
    if hasattr(inner, "score"):
        width = ids.shape[1]
        positions = torch.arange(1, len(ids) + 1) * width - 1
        return model(input_ids=ids, attention_mask=mask, positions=positions, use_cache=False).detach()
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -ids.shape[1] :].detach()


def _loss_falls(cell: Cell, stage_dir: Path) -> None:
    lines = list(read_metrics(stage_dir / "metrics.jsonl"))
    if cell.stage == "ppo":
        assert sum("loss" in line or "ppo/kl" in str(line) for line in lines) >= 1, lines
        return
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert len(losses) >= 2 and losses[-1] < losses[0] - 1e-4, losses


def _adapter_is_alone(folder: Path) -> None:
    """Nothing of the base is in it, and something has been trained."""
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    tensors = load_file(folder / "adapter_model.safetensors")
    parts = r"lora_|ia3_l|bottleneck_|prompt_embeddings|score\.weight$"
    assert tensors and all(re.search(parts, name) for name in tensors), list(tensors)[:5]


def _reload_is_equal(cell: Cell, stage_dir: Path, seen: dict[str, torch.Tensor]) -> None:
    """What is in the folder computes what the model in memory did; so does the adapter on the base, through PEFT."""
    scores = cell.stage == "reward"
    whole = stage_dir / ("reward_model" if scores else "policy")
    loaded = (load_scorer if scores else load_speaker)(str(whole), ModelConfig(), torch.float32, seed=0)
    with torch.no_grad():
        _close(read(loaded.eval(), IDS), seen["logits"], "the saved model")
        if cell.method == "qlora":
            return  # its adapter belongs to a base in 4 bits
        base = str(PeftConfig.from_pretrained(str(stage_dir / "adapter")).base_model_name_or_path)
        fresh = (load_reward_model if scores else load_model)(base, ModelConfig(), torch.float32, seed=0)
        adapted = PeftModel.from_pretrained(fresh, str(stage_dir / "adapter"))
        if scores and cell.method in ("prompt", "ptuning"):
            fresh.virtual_tokens = adapted.active_peft_config.num_virtual_tokens
        _close(read(adapted.eval(), IDS), seen["logits"], "the adapter on its base")
        _differs(read(fresh_model(base, scores), IDS), seen["logits"])


def fresh_model(base: str, scores: bool) -> Any:
    """The base as it was."""
    return (load_reward_model if scores else load_model)(base, ModelConfig(), torch.float32, seed=0).eval()


def _close(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    off = ((found - expected).abs().max() / expected.abs().max()).item()
    assert off < ROUNDING, f"{what} is off by {off:.2g}"


def _differs(found: torch.Tensor, trained: torch.Tensor) -> None:
    assert (found - trained).abs().max() / trained.abs().max() > 10 * ROUNDING, "training has changed nothing"
