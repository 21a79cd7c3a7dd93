"""Rollouts by vLLM, in the process of the trainer and on its GPU: one engine a rank, asleep while the policy trains.

    load    wakes the memory of the weights and copies the policy's into it
    sample  wakes the cache, forgets prefixes read with other weights, completes the prompts, gives all memory back

The API was read in the packages of vLLM 0.20.0 and 0.33.0 (`LLM`, `SamplingParams`, workers, executors); nothing here
has run on a GPU. Weights are written by the model's own `load_weights`, as for its checkpoint. Kernels that reorder
weights after loading (some of those for mixtures of experts) would read them wrongly: training refuses such a sampler
(`align.trainers.experience.refuse_disagreement`).
"""

import gc
import os
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from align.config.errors import UserError
from align.generation.rollout import Completion
from align.tracking.progress import Progress

WHERE = "stages.ppo.rollout=vllm"
MEMORY_SHARE = 0.3
"""Of a GPU's memory, for weights, cache and activations of a rollout. Weights, gradients and optimizer states of the
training stay where they are meanwhile, and want the rest."""
LEAST_TEMPERATURE = 0.01
"""vLLM samples at this temperature where it is told a lower one that is not 0, and only logs it."""
STEP_TOKENS = 4096
"""Prompt tokens read in a step. What a step may need is taken from the cache when the engine starts; vLLM's own default
is several times this, too much for a share of the memory."""


def check_vllm(*, device: str, temperature: float) -> None:
    """Refuse a run that vLLM cannot sample for, before anything is loaded.

    Raises: UserError if vLLM cannot be imported, if there is no GPU, or if the temperature is one that it changes.
    """
    import_vllm()
    if not device.startswith("cuda"):
        raise UserError(f"{WHERE}: there is no GPU here for vLLM to sample on; set stages.ppo.rollout=hf")
    if 0 < temperature < LEAST_TEMPERATURE:
        raise UserError(
            f"stages.ppo.temperature={temperature}: vLLM samples at {LEAST_TEMPERATURE} or above; raise it, or set "
            "stages.ppo.rollout=hf"
        )


def import_vllm() -> ModuleType:
    """The module, told to keep to this process and to leave the standard output alone.

    Raises: UserError if it cannot be imported.
    """
    # In a process of its own it could be given neither this process's tensors nor its process group.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    try:
        import vllm
    except ImportError as error:
        raise UserError(
            f"{WHERE}: vLLM cannot be imported ({_one_line(error)}); pip install vllm, or set stages.ppo.rollout=hf"
        ) from error
    return vllm


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
    ):
        """Start the engine, and put it to sleep. Call it on every rank, before the training takes its memory.

        model_path: a folder or hub id, for the architecture; its weights are replaced by `load`.
        max_tokens: longest prompt with its completion. batch_size: completions that are sampled together.
        Raises: UserError if vLLM does not run the model, or finds too little memory.
        """
        vllm = import_vllm()
        self._parameters = vllm.SamplingParams
        try:
            self._llm = vllm.LLM(
                model=model_path,
                revision=revision,
                trust_remote_code=trust_remote_code,
                skip_tokenizer_init=True,
                # Left to itself it makes fp16 of fp32.
                dtype=str(dtype).removeprefix("torch."),
                seed=seed,
                max_model_len=max_tokens,
                max_num_seqs=batch_size,
                max_num_batched_tokens=max(STEP_TOKENS, batch_size),
                gpu_memory_utilization=memory_share,
                enable_sleep_mode=True,
                enable_prefix_caching=True,
                # Those it samples from, temperature included; by default they are of the logits as they come.
                logprobs_mode="processed_logprobs",
                # The model's own top_k, penalties and stop tokens have no say.
                generation_config="vllm",
                tensor_parallel_size=1,
                # Joins the process group of the ranks; alone there is none, and none of a launcher's variables.
                distributed_executor_backend="external_launcher" if dist.is_initialized() else "uni",
            )
        except (ValueError, TypeError, torch.OutOfMemoryError) as error:
            raise UserError(
                f"{WHERE}: vLLM {vllm.__version__} does not start with {model_path}: {_one_line(error)}; "
                "set stages.ppo.rollout=hf"
            ) from error
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
                f"{WHERE}: {len(missing)} weights of vLLM's model are not among the policy's, {missing[0]}; "
                "set stages.ppo.rollout=hf"
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
        drawn_by = [self._drawn_by(seed, stop_token_ids, max_new_tokens, temperature) for seed in seeds]
        self._llm.wake_up(tags=["kv_cache"])
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM still caches prefixes that it computed with other weights")
        outputs = self._llm.generate(asked, drawn_by, use_tqdm=False) if asked else []
        self._sleep()
        if progress:
            progress.show(len(outputs))
        assert [list(output.prompt_token_ids) for output in outputs] == [one["prompt_token_ids"] for one in asked]
        return [_completion(output.outputs[0]) for output in outputs]

    def close(self) -> None:
        """Stop the engine and free its memory; there can be one in a process."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _sleep(self) -> None:
        """Give the memory back. Level 2 keeps no copy of the weights, which are loaded anew anyway."""
        self._llm.sleep(level=2)
        self._loaded = False

    def _drawn_by(self, seed: int, stop_token_ids: Sequence[int], max_new_tokens: int, temperature: float) -> Any:
        return self._parameters(
            n=1,
            temperature=temperature,
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            seed=seed,
            max_tokens=max_new_tokens,
            stop_token_ids=list(stop_token_ids),
            # The model's own end token stops nothing unless it is one of ours.
            ignore_eos=True,
            # No more than that of the sampled token.
            logprobs=0,
            detokenize=False,
        )


@torch.no_grad()
def _load_into(model: nn.Module, named_weights: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the model's parameters that the weights do not set; vLLM asks the same of a checkpoint."""
    loaded = model.load_weights(named_weights)
    return [] if loaded is None else sorted({name for name, _ in model.named_parameters()} - loaded)


def _completion(output: Any) -> Completion:
    """Raises: UserError for log-probabilities that are no numbers, or an end other than a stop token or the limit."""
    ids = list(output.token_ids)
    if output.finish_reason not in ("stop", "length"):
        raise UserError(f"{WHERE}: vLLM ended a completion for the reason {output.finish_reason}; see its log above")
    logps = [step[token].logprob for token, step in zip(ids, output.logprobs, strict=True)]
    if not torch.tensor(logps).isfinite().all():
        raise UserError("the model's logits are no numbers, so nothing can be sampled; go back to a checkpoint before")
    return Completion(ids, logps, output.finish_reason == "stop")


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
