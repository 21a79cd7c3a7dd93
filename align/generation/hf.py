"""Completions by Hugging Face `generate`."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align.tracking.progress import Progress


@torch.inference_mode()
def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    *,
    stop_token_ids: list[int],
    max_new_tokens: int,
    batch_size: int,
    temperature: float,
    seed: int,
    progress: Progress,
) -> list[str]:
    """One completion a prompt, in the order given, without special tokens. temperature 0 is greedy.

    Prompts are token ids. They are grouped by length, so that little is padded.
    """
    torch.manual_seed(seed)
    model.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    completions = [""] * len(prompts)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids, mask = _left_padded([prompts[i] for i in batch], tokenizer.pad_token_id, model.device)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            eos_token_id=stop_token_ids,
            pad_token_id=tokenizer.pad_token_id,
            **(sampling or {"do_sample": False}),
        )
        texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        for index, text in zip(batch, texts, strict=True):
            completions[index] = text.strip()
        progress.show(min(start + batch_size, len(order)))
    return completions


def _left_padded(rows: list[list[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask
