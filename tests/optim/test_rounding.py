"""What a width's rounding errs is known at every other width."""

import pytest
import torch

from hf_geta.optim.rounding import squared_errors
from hf_geta.quantization.blocks import Blocks
from hf_geta.quantization.histogram import MagnitudeHistogram
from hf_geta.quantization.quantizers import Quantizer

WIDTHS = (2, 3, 4, 6, 8)
FINE = 12  # of a number on a fine grid, d^2 / 12


def weight():
    return torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 0.1


def quantizer_at(bits, channel_shape=None, blocks=None):
    quantizer = Quantizer(channel_shape, blocks=blocks)
    quantizer.initialize_(weight(), 16)
    quantizer.move_clips_(weight(), 16, bits)
    quantizer.set_bits_(bits)
    return quantizer


def scale_of(quantizer):
    scale = torch.ones(()) if quantizer.log_channel_scale is None else quantizer.log_channel_scale.detach().exp()
    return scale if quantizer.blocks is None else scale * quantizer.blocks.spread()


@torch.no_grad()
def error_of(quantizer, x, scale=1.0):
    return float(((quantizer(x) - x) / scale).square().mean())


@pytest.mark.parametrize("now", [3, 4, 8, 16])
@pytest.mark.parametrize("grid", ["tensor", "channel", "block"])
def test_each_width_errs_as_a_weight_does_that_has_moved_there(grid, now):
    def at(bits):
        blocks = Blocks((64, 256), 1, 32) if grid == "block" else None
        return quantizer_at(bits, None if grid == "tensor" else (64, 1), blocks)

    present = at(now)
    errors, scale = squared_errors(present, weight(), WIDTHS), scale_of(present)
    for bits in WIDTHS if now >= 8 else (2, 3, 4):  # a coarse grid says less of fine ones
        assert errors[bits] == pytest.approx(
            FINE * error_of(at(bits), weight(), scale), rel=0.5 if grid == "block" else 0.3
        )  # whose multipliers are chosen anew


@pytest.mark.parametrize("grown", [1.0, 3.0])
@pytest.mark.parametrize("signed", [True, False])
def test_of_an_input_it_is_known_from_calibration_and_from_how_its_clip_has_moved_since(signed, grown):
    seen = weight() if signed else weight().relu()
    histogram = MagnitudeHistogram(torch.device("cpu"))
    histogram.add(seen)

    def at(bits):
        quantizer = Quantizer(learn_exponent=False)
        quantizer.set_range_(grown * histogram.clip_max(bits), bits, histogram.signed)
        quantizer.log_clips, quantizer.log_errors = histogram.best_clips([max(bits, 2) for bits in range(17)])
        return quantizer

    zeros = float((seen == 0).float().mean())  # no grid moves them
    errors = squared_errors(at(8), None, WIDTHS)
    for bits in WIDTHS:
        error = FINE * error_of(at(bits), grown * seen) / (1 - zeros)
        assert errors[bits] == pytest.approx(error, rel=0.25)


def test_an_input_that_was_never_calibrated_errs_by_its_step_size():
    quantizer = Quantizer(learn_exponent=False)
    quantizer.set_range_(3.0, 8)
    assert squared_errors(quantizer, None, (2, 4)) == {2: 9.0, 4: pytest.approx(9 / 49)}
