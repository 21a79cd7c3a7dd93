"""What vLLM does, slowly, with a Hugging Face model: the part of its API that rollouts and speakers call.

Where vLLM would be silently wrong (weights it was not given, a prefix cached under other weights, log-probabilities of
the raw logits, the model's own stop tokens) this is too, so that a test sees it.
"""

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

LAUNCHERS = ("uni", "external_launcher")


@dataclass
class SamplingParams:
    """The fields that are used, with vLLM's defaults."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    max_tokens: int = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: list[str] = field(default_factory=list)
    detokenize: bool = True


class Served(nn.Module):
    """The model as vLLM holds it: names of its own, weights of which load_weights knows those of a checkpoint."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.inner = model

    def load_weights(self, weights) -> set[str]:
        own, loaded = dict(self.inner.named_parameters()), set()
        for name, tensor in weights:
            assert own[name].shape == tensor.shape, name
            own[name].copy_(tensor)
            loaded.add(f"inner.{name}")
        return loaded


class LLM:
    started: list["LLM"] = []

    def __init__(
        self, model: str, *, revision=None, trust_remote_code=False, skip_tokenizer_init=False, dtype="auto", seed=0,
        max_model_len: int | None = None, max_num_seqs=256, max_num_batched_tokens=8192, gpu_memory_utilization=0.9,
        enable_sleep_mode=False, enable_prefix_caching=True, logprobs_mode="raw_logprobs", generation_config="auto",
        tensor_parallel_size=1, distributed_executor_backend=None, load_format="auto",
        enforce_eager=False,
    ):  # fmt: skip
        if gpu_memory_utilization > 1:
            raise ValueError("1 validation error\n  gpu_memory_utilization is too much")
        assert distributed_executor_backend in LAUNCHERS
        self.tokenizer = None if skip_tokenizer_init else AutoTokenizer.from_pretrained(model)
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), revision=revision)
        self.model = Served(loaded.eval())
        self.max_model_len, self.logprobs_mode = max_model_len or loaded.config.max_position_embeddings, logprobs_mode
        self.can_sleep, self.asleep, self.prefixes, self.calls = enable_sleep_mode, set(), {}, 0
        self.leaks = generation_config != "vllm"
        self.llm_engine = SimpleNamespace(
            engine_core=SimpleNamespace(shutdown=lambda: LLM.started.remove(self)),
            model_config=SimpleNamespace(max_model_len=self.max_model_len),
        )
        assert not LLM.started, "one engine a process"
        LLM.started.append(self)

    def sleep(self, level: int = 1) -> None:
        assert self.can_sleep and level == 2 and not self.asleep
        self.asleep = {"weights", "kv_cache"}
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(torch.nan)

    def wake_up(self, tags: list[str]) -> None:
        assert set(tags) <= self.asleep, "vLLM warns, and does nothing"
        self.asleep -= set(tags)

    def apply_model(self, func) -> list[Any]:
        assert "weights" not in self.asleep, "the memory of the weights is not there"
        return [func(self.model)]

    def reset_prefix_cache(self) -> bool:
        self.prefixes.clear()
        return True

    @torch.no_grad()
    def generate(self, prompts, sampling_params, *, use_tqdm=True) -> list[Any]:
        assert not self.asleep and not use_tqdm and len(prompts) == len(sampling_params)
        self.calls += 1
        pairs = zip(prompts, sampling_params, strict=True)
        return [self._complete(one["prompt_token_ids"], wanted) for one, wanted in pairs]

    def _complete(self, prompt: list[int], wanted: SamplingParams) -> Any:
        assert len(prompt) < self.max_model_len and wanted.n == 1 and wanted.logprobs in (0, None)
        assert wanted.detokenize == bool(wanted.stop), "decoding is paid for where stop texts are looked for"
        config = self.model.inner.generation_config
        stops = set(wanted.stop_token_ids) | (set() if wanted.ignore_eos else {config.eos_token_id})
        random = torch.Generator().manual_seed(wanted.seed)
        ids, logprobs, reason = [], [], "length"
        while len(ids) < min(wanted.max_tokens, self.max_model_len - len(prompt)):
            raw = self._logits([*prompt, *ids], cached=not ids)
            scaled = raw / (wanted.temperature or 1.0)
            if self.leaks and config.top_k:
                scaled = scaled.masked_fill(scaled < scaled.topk(config.top_k).values[-1], -torch.inf)
            probabilities = scaled.softmax(-1)
            token = int(torch.multinomial(probabilities, 1, generator=random) if wanted.temperature else raw.argmax())
            reported = scaled if self.logprobs_mode == "processed_logprobs" else raw
            ids.append(token)
            logprobs.append({token: SimpleNamespace(logprob=reported.log_softmax(-1)[token].item(), rank=1)})
            if token in stops:
                reason = "stop"
                break
            if wanted.stop and any(
                text in self.tokenizer.decode(ids, skip_special_tokens=True) for text in wanted.stop
            ):
                reason = "stop"
                break
        output = SimpleNamespace(token_ids=tuple(ids), logprobs=logprobs, finish_reason=reason)
        return SimpleNamespace(
            prompt_token_ids=prompt, outputs=[output], prompt_logprobs=self._of_prompt(prompt, wanted.prompt_logprobs)
        )

    def _of_prompt(self, prompt: list[int], wanted: int | None) -> list[Any] | None:
        """Those of the raw logits, whatever the temperature; nothing comes before the first token."""
        if wanted is None:
            return None
        assert wanted == 0
        logps = self.model.inner(torch.tensor([prompt]), use_cache=False).logits[0].float().log_softmax(-1)
        rest = zip(logps, prompt[1:], strict=False)
        return [None, *({token: SimpleNamespace(logprob=row[token].item(), rank=1)} for row, token in rest)]

    def _logits(self, ids: list[int], *, cached: bool) -> torch.Tensor:
        if cached and tuple(ids) in self.prefixes:
            return self.prefixes[tuple(ids)]
        logits = self.model.inner(torch.tensor([ids]), use_cache=False).logits[0, -1].float()
        if cached:
            self.prefixes[tuple(ids)] = logits
        return logits


def install(monkeypatch) -> type[LLM]:
    """Let `import vllm` find this."""
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams, module.__version__ = LLM, SamplingParams, "0.0.stand-in"
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(LLM, "started", [])
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL", "VLLM_LOGGING_STREAM"):
        monkeypatch.setenv(name, "1")  # so that what the code sets is undone
        monkeypatch.delenv(name)
    return LLM
