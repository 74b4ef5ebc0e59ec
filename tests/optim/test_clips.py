"""Clips move with widths: by the ratio of what suits the new width to what suited the old."""

import pytest
import torch
from torch import nn

from hf_geta import GETAConfig
from hf_geta.optim.clips import move_clips_
from hf_geta.optim.quantizers import NumberedQuantizers
from hf_geta.optim.widths import WidthTable
from hf_geta.quantization import calibrate_, quantize_modules_, quantized_layers
from hf_geta.quantization.histogram import MagnitudeHistogram
from hf_geta.quantization.quantizers import Quantizer


def weight(seed=0):
    """Gaussian, as weights mostly are: the largest of 4,096 lies at about four standard deviations."""
    return torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))


def quantizer_of(tensor, bits=8.0, channel_shape=None):
    quantizer = Quantizer(channel_shape)
    quantizer.initialize_(tensor, bits)
    return quantizer


def move(quantizer, tensor, bits):
    widths = WidthTable([quantizer])
    bounds = torch.tensor([float(bits)])
    move_clips_(widths, [tensor], bounds, bounds)
    widths.project_(bounds, bounds)


@torch.no_grad()
def error(quantizer, tensor):
    return float((quantizer(tensor) - tensor).square().sum())


@pytest.mark.parametrize("channel_shape", [None, (64, 1)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_narrower_width_with_its_own_clip_rounds_better(bits, channel_shape):
    tensor = weight()
    moved, unmoved = (quantizer_of(tensor, 8.0, channel_shape) for _ in range(2))
    move(moved, tensor, bits)
    bounds = torch.tensor([float(bits)])
    WidthTable([unmoved]).project_(bounds, bounds)
    assert moved.bits == unmoved.bits == bits
    assert error(moved, tensor) < error(unmoved, tensor)


def test_what_was_learned_about_a_clip_is_kept():
    tensor = weight()
    plain, learned = quantizer_of(tensor), quantizer_of(tensor)
    with torch.no_grad():  # the same width, of larger steps
        learned.log_clip_max.add_(0.5)
        learned.log_step_size.add_(0.5)
    for quantizer in (plain, learned):
        move(quantizer, tensor, 3)
    assert (learned.log_clip_max - plain.log_clip_max).item() == pytest.approx(0.5, abs=1e-6)


def test_where_channels_move_together_their_scales_stay():
    tensor = weight()
    quantizer = quantizer_of(tensor, 8.0, (64, 1))
    before = quantizer.log_channel_scale.mean().item()
    move(quantizer, 2 * tensor, 3)
    assert quantizer.log_channel_scale.mean().item() == pytest.approx(before, abs=1e-5)
    assert quantizer.bits.item() == pytest.approx(3, abs=1e-4)


def test_there_and_back_again():
    tensor = weight()
    quantizer = quantizer_of(tensor)
    before = float(quantizer.log_clip_max)
    move(quantizer, tensor, 2)
    assert float(quantizer.log_clip_max) < before - 0.5
    move(quantizer, tensor, 8)
    assert float(quantizer.log_clip_max) == pytest.approx(before, abs=1e-6)


def test_widths_that_stay_inside_their_bounds_leave_their_clips_alone():
    tensor = weight()
    quantizer = quantizer_of(tensor, 5.0)
    before = quantizer.log_clip_max.clone()
    move_clips_(WidthTable([quantizer]), [tensor], torch.tensor([2.0]), torch.tensor([8.0]))
    assert torch.equal(quantizer.log_clip_max, before)


@pytest.mark.parametrize("signed", [True, False])
def test_an_input_moves_by_what_calibration_saw(signed):
    seen = weight() if signed else weight().abs()
    histogram = MagnitudeHistogram(torch.device("cpu"))
    histogram.add(seen)
    quantizer = Quantizer(learn_exponent=False)
    quantizer.set_range_(histogram.clip_max(8), 8, histogram.signed)
    quantizer.log_clips, _ = histogram.best_clips([max(bits, 2) for bits in range(17)])
    move(quantizer, None, 3)
    assert quantizer.clip_max.item() == pytest.approx(float(histogram.clip_max(3)), rel=1e-6)


def test_an_input_that_was_never_calibrated_keeps_its_clip():
    quantizer = Quantizer(learn_exponent=False)
    before = quantizer.log_clip_max.clone()
    move(quantizer, None, 4)
    assert torch.equal(quantizer.log_clip_max, before)


def test_clips_that_come_down_with_their_widths_end_at_those_of_the_final_width():
    """Whatever the way there, and however many bounds were passed."""
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    config = GETAConfig(activation_bits=[4, 4], weight_bits=[4, 4])
    quantize_modules_(model, config)
    calibrate_(model, [torch.randn(256, 16, generator=torch.Generator().manual_seed(0))], bits=config.initial_bits)
    numbered = NumberedQuantizers.of(quantized_layers(model))
    widths = WidthTable(numbered.quantizers)
    for bits in (14, 12, 10, 8, 6, 4):
        bounds = torch.full((len(numbered.quantizers),), float(bits))
        move_clips_(widths, numbered.weights, bounds, bounds)
        widths.project_(bounds, bounds)
    for layer in quantized_layers(model).values():
        quantizer = layer.input_quantizer
        # sums of a few float32 logarithms
        torch.testing.assert_close(quantizer.log_clip_max.detach(), quantizer.log_clips[4], rtol=0, atol=1e-5)
