"""A moving average of weights is the obvious loop, in fp32 whatever the weights are."""

import pytest
import torch
from torch import nn

from align.trainers.moving_average import MovingAverage


def parameters(dtype=torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((3, 4), (5,))]


def walk(own: list[nn.Parameter], steps: int) -> list[list[torch.Tensor]]:
    """Changes the weights; yields them as they are after each step."""
    for step in range(steps):
        with torch.no_grad():
            for parameter in own:
                generator = torch.Generator().manual_seed(step)
                parameter += (0.01 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
        yield [parameter.detach().clone() for parameter in own]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_it_is_the_obvious_loop_in_fp32(dtype, decay):
    own = parameters(dtype)
    average, expected = MovingAverage(own, decay), [parameter.detach().double() for parameter in own]
    for now in walk(own, 30):
        average.update()
        expected = [decay * old + (1 - decay) * new.double() for old, new in zip(expected, now, strict=True)]
    for found, wanted in zip(average.averages, expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    assert (own[0].double() - expected[0]).abs().max() > 1e-3, "the weights must move, or it shows nothing"


def test_the_weights_do_not_feel_it_and_a_swap_there_and_back_changes_nothing():
    own = parameters()
    average = MovingAverage(own, 0.9)
    for now in walk(own, 3):
        average.update()
        assert all(torch.equal(parameter, before) for parameter, before in zip(own, now, strict=True))
    averages = [one.clone() for one in average.averages]
    average.swap()
    assert all(torch.equal(parameter, one) for parameter, one in zip(own, averages, strict=True))
    average.swap()
    assert all(torch.equal(parameter, before) for parameter, before in zip(own, now, strict=True))
    assert all(torch.equal(one, before) for one, before in zip(average.averages, averages, strict=True))


def test_an_average_taken_up_again_goes_on_bit_for_bit(tmp_path):
    own, again = parameters(), parameters()
    whole = MovingAverage(own, 0.9)
    for step, _ in enumerate(walk(own, 6)):
        whole.update()
        if step == 2:
            whole.save(tmp_path / "average.safetensors")
    walked = walk(again, 6)
    for _ in range(3):
        next(walked)
    resumed = MovingAverage(again, 0.9)
    resumed.load(tmp_path / "average.safetensors")
    for _ in walked:
        resumed.update()
    assert all(torch.equal(a, b) for a, b in zip(whole.averages, resumed.averages, strict=True))


def test_an_average_of_another_model_is_not_taken_up(tmp_path):
    MovingAverage(parameters(), 0.9).save(tmp_path / "average.safetensors")
    with pytest.raises(AssertionError, match="another model"):
        MovingAverage(parameters()[:1], 0.9).load(tmp_path / "average.safetensors")
