"""Laws of the quantizer's math."""

import pytest
import torch

from hf_geta.quantization import kernels
from hf_geta.quantization.functional import (
    bits_to_step_size,
    fake_quantize,
    trace_fake_quantize,
)

CHANNELS = {"tensor": None, "linear": (6, 1), "conv1d": (1, 5)}


def make(bits=4.0, exponent=1.3, channels="tensor", signed=True, shape=(6, 5), dtype=torch.float64, seed=0):
    """x with entries inside and beyond the clip, and the arguments of `fake_quantize`, all requiring gradients."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=dtype)
    clip_max = torch.tensor(1.1, dtype=dtype)
    t = None if exponent is None else torch.tensor(exponent, dtype=dtype)
    step_size = bits_to_step_size(bits, clip_max, t, signed)
    scale = CHANNELS[channels]
    if scale is not None:
        scale = torch.rand(scale, generator=generator, dtype=dtype) + 0.5
    grid = [step_size, clip_max, t, scale]
    return x.requires_grad_(), [None if value is None else value.detach().requires_grad_() for value in grid], signed


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK_NUMEL", 7)


def surrogate(x, step_size, clip_max, exponent, scale, signed, at):
    """Q with every rounding frozen at `at` = (x, d, q_m, t, s): smooth in everything, equal to Q at `at`."""
    fixed = [None if value is None else value.detach() for value in at]
    one = torch.ones((), dtype=x.dtype)
    t, t_at = (one, one) if exponent is None else (exponent, fixed[3])
    s, s_at = (one, one) if scale is None else (scale, fixed[4])
    v, v_at = x / s, fixed[0] / s_at
    beyond = (v_at.abs() > fixed[2]) if signed else (v_at > fixed[2])
    below = torch.zeros_like(beyond) if signed else v_at < 0
    sign = torch.sign(v_at)

    def power(magnitude, t):
        return torch.where(below, 0.0, magnitude**t)

    u_at = power(torch.where(beyond, fixed[2], v_at.abs()), t_at)
    rounding = torch.round(u_at / fixed[1]) - u_at / fixed[1]
    u = power(torch.where(beyond, clip_max, v_at.abs()), t)
    inside = ~beyond & ~below
    return s * (sign * (u + step_size * rounding) + torch.where(inside, v - v_at, 0.0))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("exponent", [None, 1.0, 0.8, 1.4])
@pytest.mark.parametrize("channels", list(CHANNELS))
@pytest.mark.parametrize("function", ["fused", "traced"])
def test_gradients_are_finite_differences_of_the_straight_through_surrogate(
    function, channels, exponent, signed, small_blocks
):
    x, grid, signed = make(exponent=exponent, channels=channels, signed=signed)
    at = [x, *grid]
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    value = fake_quantize(x, *grid, signed) if function == "fused" else trace_fake_quantize(x, kernels.Grid(*grid, signed))
    learned = [tensor for tensor in at if tensor is not None]
    gradients = torch.autograd.grad((value * weights).sum(), learned)
    torch.testing.assert_close(surrogate(*at, signed, at), value, rtol=1e-12, atol=1e-12)
    eps = 1e-6
    for tensor, gradient in zip(learned, gradients):
        for index in range(tensor.numel()):
            change = torch.zeros_like(tensor).view(-1)
            change[index] = eps
            ends = []
            for sign in (1, -1):
                moved = [t if t is not tensor else t.detach() + sign * change.view_as(t) for t in at]
                ends.append((surrogate(*moved, signed, at) * weights).sum())
            difference = (ends[0] - ends[1]) / (2 * eps)
            # Central differences in float64: errors of order eps^2 and 1e-16 / eps.
            torch.testing.assert_close(gradient.view(-1)[index], difference, rtol=1e-7, atol=1e-8)
