"""vLLM's greedy replies and its log-probabilities of given ones, to compare an exported folder by."""

from collections.abc import Sequence
from typing import Any

import torch

from align.config.errors import UserError
from align.distributed.runtime import free_memory
from align.generation.vllm_engine import Setting, drawn_by, shut_down
from align.losses.parity import Read

SETTING = Setting("stages.export.vllm=true", "stages.export.vllm=false")


def why_not_vllm(device: str) -> str | None:
    """Why vLLM cannot be asked here; None where it can: on a GPU, or on a CPU if it was built for that."""
    try:
        SETTING.vllm()
        if device.startswith("cuda") or _built_for_cpu():
            return None
    except UserError:
        if device.startswith("cuda"):
            return "not installed"
    return "no GPU here for it"


def _built_for_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def vllm_read(
    folder: str,
    prompts: Sequence[list[int]],
    given: Sequence[list[int]],
    *,
    stop_token_ids: Sequence[int],
    max_new_tokens: int,
    dtype: torch.dtype,
    trust_remote_code: bool,
    memory_share: float = 0.5,
) -> Read:
    """As `align.generation.greedy.greedy_read`, by an engine that is started for it and stopped again.

    Raises: UserError if vLLM does not run the model.
    """
    vllm = SETTING.vllm()
    llm = SETTING.start(
        folder,
        max_tokens=max(len(p) + max(max_new_tokens, len(g)) for p, g in zip(prompts, given, strict=True)) + 1,
        dtype=dtype,
        seed=0,
        batch_size=1,
        memory_share=memory_share,
        revision=None,
        trust_remote_code=trust_remote_code,
        pickled_weights=False,
        enforce_eager=True,  # compiling takes longer than these few replies
    )
    try:
        greedy = drawn_by(vllm, 0, sorted(stop_token_ids), max_new_tokens, 0.0, logprobs=0, detokenize=False)
        # prompt_logprobs=0: no more than that of the token which is there.
        weighed = drawn_by(vllm, 0, [], 1, 0.0, prompt_logprobs=0, detokenize=False)
        said = [SETTING.checked(output.outputs[0]) for output in _generate(llm, prompts, greedy)]
        whole = [[*prompt, *answer] for prompt, answer in zip(prompts, given, strict=True)]
        read = _generate(llm, whole, weighed)
        replies = [list(answer.token_ids) for answer in said]
        return Read(
            replies,
            [_logps(answer.logprobs, ids) for answer, ids in zip(said, replies, strict=True)],
            [
                _logps(output.prompt_logprobs[len(prompt) :], answer)
                for output, prompt, answer in zip(read, prompts, given, strict=True)
            ],
        )
    finally:
        shut_down(llm)
        del llm
        free_memory()


def _generate(llm: Any, prompts: Sequence[list[int]], drawn: Any) -> list[Any]:
    return llm.generate([{"prompt_token_ids": ids} for ids in prompts], [drawn] * len(prompts), use_tqdm=False)


def _logps(listed: Sequence[Any], ids: Sequence[int]) -> list[float]:
    return [float(step[token].logprob) for step, token in zip(listed, ids, strict=True)]
