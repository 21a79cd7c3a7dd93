"""Token and completion log-probabilities."""

import math

import pytest
import torch

from align.losses.logprobs import completion_lengths, completion_logps, token_logps


def test_token_logps_are_log_softmax_at_the_target():
    logits = torch.tensor([[0.0, math.log(3.0)], [math.log(9.0), 0.0]])
    assert token_logps(logits, torch.tensor([1, 1])).tolist() == pytest.approx([math.log(0.75), math.log(0.1)])


def test_bf16_logits_are_summed_in_fp32():
    logits = torch.zeros(1, 4096, dtype=torch.bfloat16)
    assert token_logps(logits, torch.tensor([5])).item() == pytest.approx(-math.log(4096), rel=1e-6)


def test_completion_logps_sum_each_completions_tokens():
    token = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    completion = torch.tensor([0, 2, 2, 0])
    assert completion_logps(token, completion, 3).tolist() == [-5.0, 0.0, -5.0]
    assert completion_lengths(completion, 3).tolist() == [2, 0, 2]


def test_long_sums_keep_small_differences():
    token = torch.full((4000,), -0.5)
    token[-1] = -0.5 - 2**-20
    assert completion_logps(token, torch.zeros(4000, dtype=torch.long), 1).item() == -2000.0 - 2**-20
