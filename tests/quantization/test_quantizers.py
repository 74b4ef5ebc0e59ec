"""Laws of the modules that own d, q_m and t."""

import copy
import pickle

import pytest
import torch

from hf_geta.quantization import Quantizer, quantize_codes


def weight(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [4, 7.5, 16])
@pytest.mark.parametrize("channel_shape", [None, (6, 1)])
def test_an_initialized_quantizer_covers_the_weight_at_its_width(bits, channel_shape):
    w = weight(6, 5)
    quantizer = Quantizer(channel_shape)
    quantizer.initialize_(w, bits)
    top = w.abs().max() if channel_shape is None else w.abs().amax(1, keepdim=True)
    clip_max = quantizer.clip_max if channel_shape is None else quantizer.clip_max * quantizer.channel_scale
    # exp(log(.)) in float32
    torch.testing.assert_close(clip_max, top, rtol=1e-6, atol=0)
    assert quantizer.exponent.item() == 1
    assert quantizer.bits.item() == pytest.approx(bits, abs=1e-5)
    step_size = clip_max / (2 ** (bits - 1) - 1)
    assert ((quantizer(w) - w).abs() <= 0.501 * step_size).all()


def test_a_finer_grid_per_channel_is_closer_to_the_weight():
    w = weight(6, 50) * torch.logspace(-2, 0, 6).view(-1, 1)
    errors = []
    for channel_shape in (None, (6, 1)):
        quantizer = Quantizer(channel_shape)
        quantizer.initialize_(w, 4)
        errors.append((quantizer(w) - w).norm())
    assert errors[1] < 0.7 * errors[0]


def test_zeros_start_with_the_range_of_a_fresh_layer():
    quantizer = Quantizer((4, 1))
    quantizer.initialize_(torch.zeros(4, 25), 8)
    assert quantizer.clip_max.item() == pytest.approx(0.2)
    assert quantizer.channel_scale.eq(1).all()
    quantizer.initialize_(torch.cat([torch.zeros(1, 25), weight(3, 25)]), 8)
    assert quantizer.channel_scale.isfinite().all()
    assert quantizer.channel_scale[0] == 1


@pytest.mark.parametrize("signed", [True, False])
def test_set_bits_changes_the_step_size_only(signed):
    quantizer = Quantizer()
    quantizer.set_range_(3.0, 16, signed)
    quantizer.log_exponent.data.fill_(0.2)
    quantizer.set_bits_(5)
    assert quantizer.bits.item() == pytest.approx(5, abs=1e-5)
    assert quantizer.clip_max.item() == pytest.approx(3)
    assert quantizer(torch.tensor([-1.0])).item() == 0 or signed


@pytest.mark.parametrize("change", [torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.double])
def test_parameters_stay_in_float32_bit_for_bit(change):
    quantizer = Quantizer((6, 1))
    quantizer.initialize_(weight(6, 5), 7)
    before = copy.deepcopy(quantizer.state_dict())
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), quantizer)
    change(model)
    assert model[0].weight.dtype != torch.float32
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.dtype == before[name].dtype
    assert quantizer.to("meta").log_step_size.is_meta


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), "state_dict"])
def test_a_copy_rounds_alike(copied):
    quantizer = Quantizer((6, 1))
    quantizer.initialize_(weight(6, 5), 4)
    quantizer.signed = False
    if copied == "state_dict":
        other = Quantizer((6, 1), enabled=False)
        other.load_state_dict(quantizer.state_dict())
    else:
        other = copied(quantizer)
    x = weight(6, 5)
    assert torch.equal(other(x), quantizer(x))
    assert other.enabled
    assert not other.signed


def test_a_quantizer_that_is_not_enabled_returns_its_input():
    x = weight(6, 5)
    assert Quantizer(enabled=False)(x) is x


def test_every_parameter_gets_a_gradient_even_when_all_are_zero():
    quantizer = Quantizer((6, 1))
    for parameter in quantizer.parameters():
        parameter.data.zero_()  # d = q_m = t = s = 1
    quantizer(weight(6, 5)).square().sum().backward()
    for name, parameter in quantizer.named_parameters():
        assert parameter.grad.isfinite().all(), name
    assert [parameter.shape for parameter in quantizer.parameters()] == [(), (), (), (6, 1)]


def test_codes_are_those_of_the_grid():
    quantizer = Quantizer((6, 1))
    w = weight(6, 5)
    quantizer.initialize_(w, 4)
    codes = quantizer.codes(w)
    assert torch.equal(codes, quantize_codes(w, *quantizer.grid))
    assert torch.equal(quantizer.step_size * quantizer.channel_scale * codes, quantizer(w))
    assert codes.abs().amax(1).eq(7).all()
