"""Laws of a weight's clip: it is where the layer's output errs least."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_geta import GETAConfig
from hf_geta.quantization import calibrate_, quantize_modules_, quantized_layers
from hf_geta.quantization.weight_clips import least_squares_clip


def weight(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(w, clip, bits, importance=1.0):
    levels = 2 ** (bits - 1) - 1
    rounded = (w * levels / clip).round().clamp(-levels, levels) * clip / levels
    return ((w - rounded).square() * importance).sum()


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_no_other_clip_errs_less_up_to_the_grid_of_the_search(bits):
    w = weight(64, 64)
    best = error(w, least_squares_clip(w, bits), bits)
    for ratio in torch.linspace(0.15, 1.2, 43):
        assert best <= 1.02 * error(w, ratio * w.abs().max(), bits)  # clips of the search lie 8 % apart


@pytest.mark.parametrize("largest", [5.0, 15.0, 25.0])
def test_one_weight_far_larger_than_all_others_does_not_hide_the_best_clip(largest):
    """From its size downwards the error rises first: all others round to zero anyway."""
    w = weight(256, 256)
    w[3, 3] = largest
    best = error(w, least_squares_clip(w, 2), 2)
    for ratio in torch.logspace(0, -4, 41, base=2):
        assert best <= 1.02 * error(w, ratio * w.abs().max(), 2)


def test_every_channel_has_the_clip_that_it_would_have_alone():
    w = weight(6, 50) * torch.logspace(-2, 0, 6)[:, None]
    w[2, 0] = 0.5
    clips = least_squares_clip(w, 3, (6, 1))
    assert clips.shape == (6, 1)
    for row, clip in zip(w, clips):
        assert torch.equal(clip[0], least_squares_clip(row[None], 3))
    torch.testing.assert_close(least_squares_clip(w.T, 3, (1, 6)), clips.T)


def test_a_wide_grid_clips_nothing():
    w = weight(8, 32)
    assert torch.equal(least_squares_clip(w, 16, (8, 1)), w.abs().amax(1, keepdim=True))


def test_zeros_have_a_clip_that_hurts_nothing():
    w = weight(3, 8)
    w[1] = 0
    assert least_squares_clip(w, 4, (3, 1))[1] == 1
    assert least_squares_clip(torch.zeros(4, 4), 4) == 1


def test_a_weight_that_meets_large_inputs_is_not_clipped():
    w = weight(1, 1000)
    w[0, 0] = 8.0
    importance = torch.ones(1, 1000)
    assert least_squares_clip(w, 3, (1, 1), importance) < 6
    importance[0, 0] = 1e4
    assert least_squares_clip(w, 3, (1, 1), importance) > 7


def outlier_inputs(features, *others):
    x = weight(*others, features)
    x[..., 0] *= 50
    return x


LAYERS = {
    "linear": (lambda: nn.Linear(12, 8), outlier_inputs(12, 64)),
    "conv1d": (lambda: Conv1D(8, 12), outlier_inputs(12, 2, 32)),
    "conv over a sequence": (lambda: nn.Conv1d(12, 8, 3), outlier_inputs(12, 4, 9).movedim(-1, 1)),
    "conv2d": (lambda: nn.Conv2d(12, 8, 3), outlier_inputs(12, 4, 9, 9).movedim(-1, 1)),
    "grouped": (lambda: nn.Conv2d(12, 8, 3, groups=4), outlier_inputs(12, 4, 9, 9).movedim(-1, 1)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_calibration_weighs_every_entry_by_the_power_of_its_inputs(name):
    make, x = LAYERS[name]
    torch.manual_seed(0)
    model = nn.Sequential(make())
    quantize_modules_(model, GETAConfig(weight_bits=[4, 4]))
    calibrate_(model, [x[: len(x) // 2], x[len(x) // 2 :]])
    (layer,) = quantized_layers(model).values()
    power = layer.weight_quantizer.input_power.expand_as(layer.weight)
    # The same by brute force: how much the output's squared norm moves with each entry.
    for entry in [(0,) * layer.weight.dim(), tuple(size - 1 for size in layer.weight.shape)]:
        probe = torch.zeros_like(layer.weight)
        probe[entry] = 1
        bias = None if layer.bias is None else torch.zeros_like(layer.bias)
        with torch.no_grad():
            layer.weight.copy_(probe)
            if bias is not None:
                layer.bias.zero_()
            layer.weight_quantizer.enabled = False
            effect = model(x).square().sum()
            layer.weight_quantizer.enabled = True
        # A convolution's entry does not meet the border of its inputs.
        assert effect == pytest.approx(float(power[entry]), rel=1e-4 if name in ("linear", "conv1d") else 0.5)
