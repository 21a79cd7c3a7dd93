"""vLLM in this process: how it is imported and started, and how one of its requests is put, for rollouts and speakers.

The API was read in the packages of vLLM 0.20.0 and 0.33.0; nothing of it has run on a GPU.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from align.config.errors import UserError

STEP_TOKENS = 4096
"""Prompt tokens read in a step. What a step may need is taken from the cache when the engine starts; vLLM's own default
is several times this, too much for a share of the memory."""
LEAST_TEMPERATURE = 0.01
"""vLLM samples at this temperature where it is told a lower one that is not 0, and only logs it."""


@dataclass(frozen=True)
class Setting:
    """The setting that asks for vLLM, for messages."""

    where: str
    """Such as `stages.ppo.rollout=vllm`."""
    instead: str
    """The same setting without vLLM."""

    def check(self, *, device: str, temperatures: Mapping[str, float]) -> None:
        """Refuse what vLLM cannot sample for, before anything is loaded.

        temperatures: by their settings. Raises: UserError if vLLM cannot be imported, if there is no GPU, or if a
        temperature is one that it changes.
        """
        self.vllm()
        if not device.startswith("cuda"):
            raise UserError(f"{self.where}: there is no GPU here for vLLM to sample on; set {self.instead}")
        for key, temperature in temperatures.items():
            if 0 < temperature < LEAST_TEMPERATURE:
                raise UserError(
                    f"{key}={temperature}: vLLM samples at {LEAST_TEMPERATURE} or above; raise it, or set "
                    f"{self.instead}"
                )

    def vllm(self) -> ModuleType:
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
                f"{self.where}: vLLM cannot be imported ({one_line(error)}); pip install vllm, or set {self.instead}"
            ) from error
        return vllm

    def start(
        self,
        model_path: str,
        *,
        max_tokens: int | None,
        dtype: torch.dtype,
        seed: int,
        batch_size: int,
        memory_share: float,
        revision: str | None,
        trust_remote_code: bool,
        pickled_weights: bool,
        **options: Any,
    ) -> Any:
        """An engine of this rank alone, from token ids to token ids.

        max_tokens: longest prompt with its answer; None: what the model allows. Raises: UserError if vLLM does not run
        the model, or finds too little memory.
        """
        vllm = self.vllm()
        try:
            return vllm.LLM(
                model=model_path,
                revision=revision,
                trust_remote_code=trust_remote_code,
                # `auto` takes *.bin where there are no safetensors.
                load_format="auto" if pickled_weights else "safetensors",
                # Left to itself it makes fp16 of fp32.
                dtype=str(dtype).removeprefix("torch."),
                seed=seed,
                max_model_len=max_tokens,
                max_num_seqs=batch_size,
                max_num_batched_tokens=max(STEP_TOKENS, batch_size),
                gpu_memory_utilization=memory_share,
                enable_prefix_caching=True,
                # The model's own top_k, penalties and stop tokens have no say.
                generation_config="vllm",
                tensor_parallel_size=1,
                # Joins the process group of the ranks; alone there is none, and none of a launcher's variables.
                distributed_executor_backend="external_launcher" if dist.is_initialized() else "uni",
                **options,
            )
        except (ValueError, TypeError, torch.OutOfMemoryError) as error:
            raise UserError(
                f"{self.where}: vLLM {vllm.__version__} does not start with {model_path}: {one_line(error)}; "
                f"set {self.instead}"
            ) from error

    def checked(self, output: Any) -> Any:
        """An answer of vLLM's. Raises: UserError for an end other than a stop or the limit."""
        if output.finish_reason not in ("stop", "length"):
            raise UserError(
                f"{self.where}: vLLM ended an answer for the reason {output.finish_reason}; see its log above"
            )
        return output


def drawn_by(
    vllm: ModuleType, seed: int, stop_token_ids: Sequence[int], max_new_tokens: int, temperature: float, **options: Any
) -> Any:
    """SamplingParams of one answer, drawn from the whole distribution at `temperature`."""
    return vllm.SamplingParams(
        n=1,
        temperature=temperature,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        seed=seed % 2**63,
        max_tokens=max_new_tokens,
        stop_token_ids=list(stop_token_ids),
        # The model's own end token stops nothing unless it is one of ours.
        ignore_eos=True,
        **options,
    )


def shut_down(llm: Any) -> None:
    """Stop an engine; what it held is freed when the last name of it is gone."""
    llm.llm_engine.engine_core.shutdown()


def one_line(error: BaseException) -> str:
    """An error's text in one line of at most 300 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
