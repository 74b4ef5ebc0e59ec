"""Laws of calibration: input ranges come from what the float model really feeds its layers."""

import logging

import pytest
import torch
from torch import nn

from hf_geta import GETAConfig
from hf_geta.quantization import calibrate_, quantize_modules_, quantized_layers
from hf_geta.quantization.histogram import MagnitudeHistogram

CONFIG = GETAConfig(activation_bits=[4, 8])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.dropout(torch.relu(self.norm(self.conv(x)))).mean((2, 3)))


def net(config=CONFIG):
    torch.manual_seed(0)
    model = Net()
    quantize_modules_(model, config)
    return model


def batch(seed=0, size=8):
    return torch.randn(size, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


def statistics(x):
    result = MagnitudeHistogram(x.device)
    result.add(x)
    return result


def test_ranges_fit_the_inputs_and_grids_are_unsigned_where_nothing_is_negative():
    model = net()
    assert calibrate_(model, [batch(), batch(1)], bits=6) == ["conv", "head"]
    conv, head = model.conv.input_quantizer, model.head.input_quantizer
    assert (conv.signed, head.signed) == (True, False)
    top = torch.cat([batch(), batch(1)]).abs().max()
    assert 0.5 * top < conv.clip_max <= top * 1.0001
    for quantizer in (conv, head):
        assert quantizer.enabled
        assert quantizer.bits.item() == pytest.approx(6, abs=1e-5)


def test_a_layer_that_no_batch_reaches_keeps_its_input_in_float_and_is_named(caplog):
    model = net()
    with caplog.at_level(logging.WARNING):
        calibrate_(model, [batch()])
    assert model.unused.input_quantizer is None
    assert "unused" in caplog.text


def test_a_layer_may_see_one_vector():
    model = nn.Sequential(nn.Linear(3, 4))
    quantize_modules_(model, CONFIG)
    x = torch.tensor([0.5, -1.0, 2.0])
    assert calibrate_(model, [x]) == ["0"]
    torch.testing.assert_close(model[0].weight_quantizer.input_power, x.square()[None])


def test_calibration_runs_the_float_model():
    first, second = net(), net()
    second.conv.weight_quantizer.set_bits_(2)
    for model in (first, second):
        calibrate_(model, [batch()])
    assert torch.equal(first.head.input_quantizer.log_clip_max, second.head.input_quantizer.log_clip_max)
    assert second.conv.weight_quantizer.enabled


def test_calibration_leaves_modes_statistics_and_random_state_alone():
    model = net()
    model.train()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.norm.state_dict().items()}
    state = torch.get_rng_state()
    calibrate_(model, [batch()])
    assert model.training
    assert model.dropout.training
    assert not model.norm.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.norm.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_batch_norm_that_was_never_trained_normalizes_by_the_batch():
    model = net()
    model.conv.weight.data *= 100
    calibrate_(model, [batch()])
    assert model.head.input_quantizer.clip_max < 10


@pytest.mark.parametrize("form", [lambda x: {"x": x}, lambda x: (x,), lambda x: [x], lambda x: x])
def test_batches_may_be_mappings_sequences_or_tensors(form):
    model, plain = net(), net()
    calibrate_(model, (form(batch(seed)) for seed in range(2)))
    calibrate_(plain, [batch(seed) for seed in range(2)])
    for name, layer in quantized_layers(model).items():
        if layer.input_quantizer is not None:
            clip_max = plain.get_submodule(name).input_quantizer.log_clip_max
            assert torch.equal(layer.input_quantizer.log_clip_max, clip_max)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_with_the_name_of_the_layer(value):
    model = net()
    model.conv.bias.data[0] = value
    with pytest.raises(ValueError, match=r"input of head contains NaN or infinite"):
        calibrate_(model, [batch()])
    assert model.training
    assert model.norm.num_batches_tracked == 0  # or the next attempt would take it for a trained one
    assert not model.norm.running_mean.any()
    assert model.conv.weight_quantizer.enabled
    assert not model.conv._forward_pre_hooks


def test_no_batch_at_all_is_refused():
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate_(net(), [])


def test_statistics_of_two_batches_are_those_of_their_union():
    x, y = torch.randn(100), 5 * torch.rand(50)
    both = statistics(x)
    both.add(y)
    union = statistics(torch.cat([x, y]))
    assert torch.equal(both.counts, union.counts)
    assert torch.equal(both.extremes, union.extremes)


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_the_clip_has_nearly_the_least_squared_error_of_all_clips(bits):
    torch.manual_seed(0)
    x = torch.randn(100_000)

    def error(clip_max):
        step_size = clip_max / (2 ** (bits - 1) - 1)
        return (x - (x.clamp(-clip_max, clip_max) / step_size).round() * step_size).square().mean()

    least = min(error(clip_max) for clip_max in torch.linspace(0.5, 6, 200))
    # The histogram knows |x| to 4 % and takes the rounding error of every value as the average one.
    assert error(statistics(x).clip_max(bits)) < 1.1 * least


def test_few_huge_inputs_that_carry_the_energy_keep_the_clip_high():
    x = torch.cat([torch.randn(100_000), torch.full((100,), 300.0)])
    assert statistics(x).clip_max(8) > 200


def test_inputs_that_are_all_zero_get_a_unit_range():
    assert statistics(torch.zeros(10)).clip_max(8) == 1
