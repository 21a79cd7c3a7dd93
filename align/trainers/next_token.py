"""Next-token figures of SFT: those that training adds up, and those of every token."""

import torch
from torch import Tensor, nn
from trl.trainer import utils as trl_utils

from align.data.fit import NOT_TRAINED
from align.distributed.memory import logits_are_whole
from align.models.layout import plain_model, prompt_learning, takes_columns

FIGURES = ("loss", "entropy", "mean_token_accuracy")
"""Of an evaluation, under TRL's names."""
FUSED_OUTPUTS = hasattr(trl_utils, "add_fused_lm_head")
"""TRL 1.16 gives figures of every token without keeping logits; 1.14, the newest for Python 3.10, only their sums."""


def trained_figures(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over trained tokens: log-probability (with gradient), then without entropy, hits and the tokens themselves.

    batch: of TRL's collator, `labels` (rows, length) among it. Where logits are made whole, only trained tokens reach
    the output layer; else TRL's tiles (or its Triton kernel) take their place.
    """
    mask = batch["labels"][:, 1:] != NOT_TRAINED
    if not _whole(model, mask):
        out = model(**batch, use_cache=False, fused_lm_head=True)
        return out.log_probs.sum(), out.entropy.detach().sum(), out.is_top1.sum(), out.label_mask.sum()
    columns = mask.any(0).nonzero().flatten()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits
    logps = logits[mask[:, columns]].float().log_softmax(-1)
    targets = batch["labels"][:, 1:][mask]
    with torch.no_grad():
        entropy = -(logps.exp() * logps).sum()
        hits = (logps.argmax(-1) == targets).sum()
    return logps.gather(-1, targets[:, None]).sum(), entropy, hits, mask.sum()


def _whole(model: nn.Module, mask: Tensor) -> bool:
    """Whether the logits of all positions are small enough, and the model can be asked for some of them."""
    plain = plain_model(model)
    small = logits_are_whole(mask.numel(), plain.config.get_text_config().vocab_size)
    return small and takes_columns(plain) and not prompt_learning(model)


def row_sums(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Negative log-likelihood, entropy, hits and count of each row's trained tokens: float32 (rows, 4).

    batch: of TRL's collator; a flat one (without padding) says by `seq_idx` which row a token belongs to.
    """
    token = torch.stack(token_figures(model, batch), dim=-1).float()
    if "seq_idx" not in batch:
        return token.sum(1)
    row = batch["seq_idx"][0].long()
    return token.new_zeros(int(row[-1]) + 1, token.shape[-1]).index_add_(0, row[1:], token[0])


def token_figures(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Negative log-likelihood, entropy, hit, label mask of every next token: (rows, length - 1) each, 0 if masked."""
    if FUSED_OUTPUTS:
        out = model(**batch, fused_lm_head=True)
        return -out.log_probs, out.entropy, out.is_top1, out.label_mask
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    mask = labels != NOT_TRAINED
    columns = [torch.zeros(labels.shape, device=logits.device) for _ in FIGURES]
    # The vocabulary is wide: its probabilities are made for one row at a time, of the tokens that count.
    for row, trained in enumerate(mask):
        logps = logits[row, trained].float().log_softmax(-1)
        targets = labels[row, trained]
        columns[0][row, trained] = -logps.gather(-1, targets[:, None]).squeeze(-1)
        columns[1][row, trained] = -(logps.exp() * logps).sum(-1)
        columns[2][row, trained] = (logps.argmax(-1) == targets).float()
    return *columns, mask
