"""Laws of the quantizer's math."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_geta.quantization import kernels
from hf_geta.quantization.functional import (
    bits_to_step_size,
    fake_quantize,
    quantize_codes,
    step_size_to_bits,
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


def traced(x, grid, signed):
    return trace_fake_quantize(x, kernels.Grid(*grid, signed))


def detached(grid):
    return [None if tensor is None else tensor.detach() for tensor in grid]


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
    value = fake_quantize(x, *grid, signed) if function == "fused" else traced(x, grid, signed)
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


@pytest.mark.parametrize("signed", [True, False])
def test_gradient_of_x_is_one_up_to_the_clip_and_zero_beyond(signed):
    x = torch.tensor([-3.0, -2.0, -0.5, 0.1, 2.0, 2.5], requires_grad=True)
    grid = torch.tensor(0.25), torch.tensor(2.0), torch.tensor(1.0)
    fake_quantize(x, *grid, signed=signed).sum().backward()
    assert x.grad.tolist() == ([0, 1, 1, 1, 1, 0] if signed else [0, 0, 0, 1, 1, 0])


def test_values_are_those_of_the_equation():
    x = torch.tensor([-9.0, -2.6, -0.5, 0.0, 0.6, 1.0, 2.5, 3.5, 9.0])
    one, clip_max = torch.tensor(1.0), torch.tensor(3.0)  # d = 1, q_m = 3: 3 bits, codes -3 ... 3
    assert fake_quantize(x, one, clip_max).tolist() == [-3, -3, 0, 0, 1, 1, 2, 3, 3]
    assert fake_quantize(x, one, clip_max, signed=False).tolist() == [0, 0, 0, 0, 1, 1, 2, 3, 3]
    square = fake_quantize(x, one, torch.tensor(2.0), torch.tensor(2.0))  # u = min(|x|, 2)^2
    assert square.tolist() == [-4, -4, 0, 0, 0, 1, 4, 4, 4]
    per_channel = fake_quantize(
        torch.tensor([[3.0, 1.2], [3.0, 1.2]]), one, clip_max, None, torch.tensor([[0.5], [2.0]])
    )
    assert per_channel.tolist() == [[1.5, 1.0], [4.0, 2.0]]  # steps 0.5 and 2, clips 1.5 and 6


@pytest.mark.parametrize(("bits", "signed", "step_size"), [(4, True, 1.0), (4, False, 7 / 15), (2, True, 7.0)])
def test_step_size_of_a_width_spreads_the_clip_over_its_codes(bits, signed, step_size):
    assert bits_to_step_size(bits, 7.0, signed=signed) == pytest.approx(step_size, rel=1e-12)


positive = st.floats(0.05, 20.0)


@settings(deadline=None, max_examples=50)
@given(bits=st.floats(2, 16), clip_max=positive, exponent=st.floats(0.4, 2.5), signed=st.booleans())
def test_step_size_to_bits_inverts_bits_to_step_size(bits, clip_max, exponent, signed):
    clip_max, exponent = (torch.tensor(value, dtype=torch.float64) for value in (clip_max, exponent))
    step_size = bits_to_step_size(bits, clip_max, exponent, signed)
    assert step_size_to_bits(step_size, clip_max, exponent, signed).item() == pytest.approx(bits, rel=1e-9)


@settings(deadline=None, max_examples=50)
@given(
    bits=st.integers(2, 16),
    clip_max=positive,
    exponent=st.none() | st.floats(0.4, 2.5),
    channels=st.sampled_from(list(CHANNELS)),
    signed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_codes_at_whole_widths_are_bounded_and_decode_to_the_fake_quantized_values_bit_for_bit(
    bits, clip_max, exponent, channels, signed, seed
):
    x, grid, _ = make(bits, exponent, channels, signed, dtype=torch.float32, seed=seed)
    grid = detached(grid)
    grid[1] = torch.tensor(clip_max)
    grid[0] = bits_to_step_size(bits, grid[1], grid[2], signed)
    codes = quantize_codes(x, *grid, signed)
    assert codes.dtype == torch.int32
    assert codes.abs().max() <= 2 ** (bits - signed) - 1
    assert signed or codes.min() >= 0
    step_size = grid[0] if grid[3] is None else grid[0] * grid[3]
    assert torch.equal(step_size * codes, fake_quantize(x, *grid, signed))


@pytest.mark.parametrize("channels", list(CHANNELS))
@pytest.mark.parametrize("exponent", [None, 0.8, 1.4])
def test_fake_quantize_is_odd_and_keeps_zero(exponent, channels):
    x, grid, _ = make(exponent=exponent, channels=channels, dtype=torch.float32)
    assert torch.equal(fake_quantize(-x, *grid), -fake_quantize(x, *grid))
    assert not fake_quantize(torch.zeros_like(x), *grid).any()


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.25])
def test_no_power_of_a_zero_is_a_denormal_number(exponent):
    """They are right, and take exp2 seven times as long; of a pruned weight half may be zeros."""
    zeros, log2 = torch.zeros(4), torch.empty(4)
    power = kernels._signed_power(zeros, kernels.Grid(0.1, 1.0, exponent), log2=log2)
    assert not power.any()
    assert (torch.exp2(exponent * log2) >= torch.finfo(torch.float32).tiny).all()


def test_gradient_at_zero_is_finite():
    x, grid, signed = make(exponent=0.7)
    zeros = torch.zeros_like(x).requires_grad_()
    learned = [zeros, *grid[:3]]
    for value in (fake_quantize(zeros, *grid, signed), traced(zeros, grid, signed)):
        gradients = torch.autograd.grad(value.sum(), learned)
        assert gradients[0].eq(1).all()
        assert not any(gradient.any() for gradient in gradients[1:])


@pytest.mark.parametrize("channels", list(CHANNELS))
@pytest.mark.parametrize("exponent", [None, 1.3])
@pytest.mark.parametrize("signed", [True, False])
def test_the_fused_and_the_traced_function_agree(signed, exponent, channels, small_blocks):
    x, grid, _ = make(exponent=exponent, channels=channels, signed=signed)
    torch.testing.assert_close(fake_quantize(x, *grid, signed), traced(x, grid, signed), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(traced(x, grid, signed), traced(x, grid, signed))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("exponent", [None, 1.3])
def test_scalars_that_stay_on_a_device_give_the_same_values_and_gradients(monkeypatch, exponent, signed):
    results = []
    for readable in (True, False):
        x, grid, _ = make(exponent=exponent, channels="linear", signed=signed)
        if not readable:
            monkeypatch.setattr(kernels, "_readable", lambda scalar: False)
        value = fake_quantize(x, *grid, signed)
        learned = [tensor for tensor in (x, *grid) if tensor is not None]
        results.append([value, *torch.autograd.grad(value.square().sum(), learned)])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_nothing_waits_for_the_device():
    # On the meta device there is no value to wait for: reading one raises.
    x = torch.empty(4, 6, device="meta", requires_grad=True)
    grid = [torch.empty(shape, device="meta", requires_grad=True) for shape in ((), (), (), (4, 1))]
    for signed in (True, False):
        value = fake_quantize(x, *grid, signed)
        gradients = torch.autograd.grad(value.sum(), [x, *grid])
        assert [gradient.shape for gradient in gradients] == [x.shape, *(tensor.shape for tensor in grid)]


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded", "empty", "scalar"])
def test_any_memory_layout_gives_the_values_of_the_contiguous_one(layout, small_blocks):
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    x = {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(0, 3),
        "expanded": x[:, :1].expand(2, 3, 4, 5),
        "empty": x[:0],
        "scalar": x[0, 0, 0, 0],
    }[layout]
    scale = None if layout in ("empty", "scalar") else torch.linspace(0.5, 2, x.shape[0]).view(-1, 1, 1, 1)
    grid = torch.tensor(0.1), torch.tensor(1.0), torch.tensor(1.2), scale
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    results = []
    for value in (x, x.clone(memory_format=torch.contiguous_format)):
        value = value.detach().requires_grad_()
        result = fake_quantize(value, *grid)
        results.append([result, *torch.autograd.grad((result * upstream).sum(), [value])])
        if layout == "channels_last" and value.stride() == x.stride():
            assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_in_float32(dtype):
    x, grid, _ = make(dtype=torch.float32)
    x, grid = x.detach().to(dtype).requires_grad_(), [None if tensor is None else tensor.detach() for tensor in grid]
    value = fake_quantize(x, *grid)
    assert value.dtype == dtype
    assert torch.equal(value, fake_quantize(x.float(), *grid).to(dtype))
    assert torch.autograd.grad(value.sum(), [x])[0].dtype == dtype


def test_only_x_is_kept_for_the_backward_pass():
    x, grid, _ = make(exponent=1.3, channels="linear")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        fake_quantize(x, *grid)
    assert sorted(tensor.numel() for tensor in saved) == sorted(tensor.numel() for tensor in (x, *grid))
    assert any(tensor.data_ptr() == x.data_ptr() for tensor in saved)


def test_nan_stays_visible():
    x = torch.tensor([float("nan"), 1.0])
    assert fake_quantize(x, torch.tensor(0.5), torch.tensor(2.0), torch.tensor(1.1)).isnan().tolist() == [True, False]
