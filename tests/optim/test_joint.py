"""The joint rule descends, whatever the gradient and whatever the base optimizer's step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_geta.optim.joint import ETA, forget_rate, joint_step_size


def quantized_parts(x, clip_max, exponent, step_size):
    """c and r of Q(x) = c + d r, straight from the definition."""
    bounded = x.abs().clamp(max=clip_max) ** exponent
    return x.sign() * bounded, x.sign() * ((bounded / step_size).round() - bounded / step_size)


@st.composite
def tensors(draw):
    """Redundant entries with a gradient and a step that descends: SGD with momentum, Adam-like signs, or decay."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    size = draw(st.integers(1, 50))
    x, g, noise = torch.randn(3, size, generator=generator, dtype=torch.float64)
    kind = draw(st.sampled_from(["sgd", "adam", "momentum", "decay"]))
    lr = 10 ** draw(st.floats(-5, 0))
    s = {
        "sgd": -lr * g,
        "adam": -lr * g.sign(),
        "momentum": -lr * (g + 0.5 * noise),
        "decay": -lr * (g + 0.01 * x),
    }[kind]
    return x, g, s


@settings(max_examples=300)
@given(tensors(), st.floats(0.1, 3), st.floats(0.5, 2), st.integers(2, 8), st.integers(0, 8), st.integers(1, 40))
def test_the_joint_update_descends_and_keeps_the_step_size_in_range(xgs, clip_max, exponent, lower, more, left_steps):
    x, g, s = xgs
    bounds = [clip_max**exponent / (2 ** (bits - 1) - 1) for bits in (lower + more, lower)]
    finest, coarsest = (torch.tensor([d], dtype=torch.float64) for d in bounds)
    present = finest**0.5 * coarsest**0.5
    c, r = quantized_parts(x, clip_max, exponent, present)
    grad_step, grad_clipped, grad_residual = ((g * v).sum()[None] for v in (s, c, r))
    gamma = forget_rate(grad_step, grad_clipped, c.norm()[None], x.norm()[None], left_steps)
    gamma, step_size = joint_step_size(gamma, present, grad_step, grad_residual, finest, coarsest)
    assert 0 <= gamma <= 1 / left_steps
    assert finest <= step_size <= coarsest
    change = s - gamma * (c + step_size * r)
    if grad_step < 0:
        # float64 rounding of sums over at most 50 terms
        assert (g * change).sum() < 1e-12 * (g.norm() * change.norm()) or (g * change).sum() < 0


@pytest.mark.parametrize("left_steps", [1, 2, 10])
def test_forgetting_is_uniform_where_it_descends_and_ends_at_zero(left_steps):
    one = torch.ones(1)
    assert forget_rate(-one, one, one, one, left_steps) == 1 / left_steps


def test_forgetting_slows_where_it_would_ascend():
    one = torch.ones(1)
    gamma = forget_rate(-one, -10 * one, one, one, 2)
    assert gamma == pytest.approx((1 - ETA) / 10)


def test_a_symmetric_tensor_is_not_negligible():
    """The mean of c is zero for symmetric weights; its norm is not."""
    one = torch.ones(1)
    assert forget_rate(-one, -10 * one, one, one, 2) < 0.5
    assert forget_rate(-one, -10 * one, 1e-10 * one, one, 2) == 0.5


def test_no_descent_to_share_means_nothing_is_forgotten():
    zero, one = torch.zeros(1), torch.ones(1)
    gamma, step_size = joint_step_size(one / 4, one / 8, zero, -one, one / 16, one)
    assert gamma == 0
    assert step_size == one / 8
