"""Rollouts by vLLM, in the process of the trainer and on its GPU: one engine a rank, asleep while the policy trains.

    load    wakes the memory of the weights and copies the policy's into it
    sample  wakes the cache, forgets prefixes read with other weights, completes the prompts, gives all memory back

The API was read in the packages of vLLM 0.20.0 and 0.33.0 (`LLM`, `SamplingParams`, workers, executors); nothing here
has run on a GPU. Weights are written by the model's own `load_weights`, as for its checkpoint. Kernels that reorder
weights after loading (some of those for mixtures of experts) would read them wrongly: training refuses such a sampler
(`align.trainers.experience.refuse_disagreement`).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from align.config.errors import UserError
from align.distributed.runtime import free_memory
from align.generation.rollout import Completion
from align.generation.vllm_engine import Setting, drawn_by, shut_down
from align.tracking.progress import Progress

ROLLOUT = Setting("stages.ppo.rollout=vllm", "stages.ppo.rollout=hf")
MEMORY_SHARE = 0.3
"""Of a GPU's memory, for weights, cache and activations of a rollout. Weights, gradients and optimizer states of the
training stay where they are meanwhile, and want the rest."""


class VllmSampler:
    """An engine of this rank alone; it samples what was loaded last, once a load."""

    def __init__(
        self,
        model_path: str,
        *,
        max_tokens: int,
        dtype: torch.dtype,
        seed: int,
        batch_size: int,
        memory_share: float = MEMORY_SHARE,
        revision: str | None = None,
        trust_remote_code: bool = False,
        pickled_weights: bool = False,
    ):
        """Start the engine, and put it to sleep. Call it on every rank, before the training takes its memory.

        model_path: a folder or hub id, for the architecture; its weights are replaced by `load`.
        max_tokens: longest prompt with its completion. batch_size: completions that are sampled together.
        Raises: UserError if vLLM does not run the model, or finds too little memory.
        """
        self._vllm = ROLLOUT.vllm()
        self._llm = ROLLOUT.start(
            model_path,
            max_tokens=max_tokens,
            dtype=dtype,
            seed=seed,
            batch_size=batch_size,
            memory_share=memory_share,
            revision=revision,
            trust_remote_code=trust_remote_code,
            pickled_weights=pickled_weights,
            skip_tokenizer_init=True,
            enable_sleep_mode=True,
            # Those it samples from, temperature included; by default they are of the logits as they come.
            logprobs_mode="processed_logprobs",
        )
        self._loaded = False
        self._sleep()

    def load(self, named_weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take these weights (names of a checkpoint, whole tensors in any precision) for the next `sample`.

        Raises: UserError if a weight of the engine's model is not among them: it would keep what it had.
        """
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what the trainer's allocator holds and does not use
        self._llm.wake_up(tags=["weights"])
        (missing,) = self._llm.apply_model(lambda model: _load_into(model, named_weights))
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what was read may be freed by the caller
        if missing:
            raise UserError(
                f"{ROLLOUT.where}: {len(missing)} weights of vLLM's model are not among the policy's, {missing[0]}; "
                f"set {ROLLOUT.instead}"
            )
        self._loaded = True

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        per_prompt: int,
        seeds: Sequence[int],
        stop_token_ids: Sequence[int],
        max_new_tokens: int,
        temperature: float,
        progress: Progress | None,
    ) -> list[Completion]:
        """As `align.generation.rollout.sample`, with other numbers drawn: completions prompt-major, one a seed.

        The same prompt and seed give the same tokens, up to rounding, in any batch. `load` must come before each call.
        """
        assert self._loaded, "the weights are those of an earlier policy"
        assert len(seeds) == len(prompts) * per_prompt and all(prompts) and max_new_tokens > 0
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts for _ in range(per_prompt)]
        # A request a completion, for each has its own seed; the prompt they share is read once, and cached.
        # logprobs=0: no more than that of the sampled token.
        drawn = [
            drawn_by(self._vllm, seed, stop_token_ids, max_new_tokens, temperature, logprobs=0, detokenize=False)
            for seed in seeds
        ]
        self._llm.wake_up(tags=["kv_cache"])
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM still caches prefixes that it computed with other weights")
        outputs = self._llm.generate(asked, drawn, use_tqdm=False) if asked else []
        self._sleep()
        if progress:
            progress.show(len(outputs))
        assert [list(output.prompt_token_ids) for output in outputs] == [one["prompt_token_ids"] for one in asked]
        return [_completion(output.outputs[0]) for output in outputs]

    def close(self) -> None:
        """Stop the engine and free its memory; there can be one in a process."""
        shut_down(self._llm)
        del self._llm
        free_memory()

    def _sleep(self) -> None:
        """Give the memory back. Level 2 keeps no copy of the weights, which are loaded anew anyway."""
        self._llm.sleep(level=2)
        self._loaded = False


@torch.no_grad()
def _load_into(model: nn.Module, named_weights: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the model's parameters that the weights do not set; vLLM asks the same of a checkpoint."""
    loaded = model.load_weights(named_weights)
    return [] if loaded is None else sorted({name for name, _ in model.named_parameters()} - loaded)


def _completion(output: Any) -> Completion:
    """Raises: UserError for log-probabilities that are no numbers, and as `Setting.checked`."""
    ids = list(ROLLOUT.checked(output).token_ids)
    logps = [step[token].logprob for token, step in zip(ids, output.logprobs, strict=True)]
    if not torch.tensor(logps).isfinite().all():
        raise UserError("the model's logits are no numbers, so nothing can be sampled; go back to a checkpoint before")
    return Completion(ids, logps, output.finish_reason == "stop")
