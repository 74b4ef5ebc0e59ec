"""Laws of outliers: inputs whose few huge numbers starve all others get more bits, and no other input does."""

import logging

import pytest
import torch
from torch import nn

from hf_geta import GETAConfig
from hf_geta.quantization import calibrate_, outliers, quantize_modules_
from hf_geta.quantization.outliers import TOLERATED_ERROR, position_errors, widen_outliers_

CONFIG = GETAConfig(activation_bits=[8, 8], outlier_activation_bits=16)


class Net(nn.Module):
    """Two layers of the same kind; the second reads the same, 1,000 times larger at the first position."""

    def __init__(self):
        super().__init__()
        self.even = nn.Linear(8, 8)
        self.massive = nn.Linear(8, 8)
        self.dark = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        scale = torch.ones(x.shape[1], 1)
        scale[0] = 1000
        return self.even(x), self.massive(x * scale), self.dark(torch.zeros(1, 8, 2, 2))


def calibrated(batches):
    torch.manual_seed(0)
    model = Net()
    quantize_modules_(model, CONFIG)
    calibrate_(model, batches)
    return model


def batch(seed=0):
    return torch.randn(4, 32, 8, generator=torch.Generator().manual_seed(seed))


def widths(model):
    return {name: getattr(model, name).input_quantizer.widths for name in ("even", "massive", "dark")}


def test_only_the_input_with_outliers_gets_the_wide_width():
    model = calibrated([batch()])
    errors = widen_outliers_(model, [batch()], 8, 16)
    assert list(errors) == ["massive"]
    assert errors["massive"] > 0.8  # nearly all positions are rounded to zero
    assert widths(model) == {
        "even": "activation_bits",
        "massive": "outlier_activation_bits",
        "dark": "activation_bits",  # where all is zero, nothing can be lost
    }
    assert CONFIG.allowed_bits(model.massive.input_quantizer.widths) == (16,)


def test_the_error_is_that_of_the_rounded_input_position_by_position():
    model = calibrated([batch(), batch(1)])
    found = widen_outliers_(model, [batch(), batch(1)], 8, 16)["massive"]
    quantizer = model.massive.input_quantizer
    quantizer.set_range_(quantizer.log_clips[8].exp(), 8, quantizer.signed)
    scale = torch.ones(32, 1)
    scale[0] = 1000
    x = torch.cat([batch(), batch(1)]) * scale
    with torch.no_grad():
        error = (quantizer(x) - x).square().sum(-1) / x.square().sum(-1)
    assert found == pytest.approx(error.mean().item(), rel=1e-5)  # float32, summed in another order


def test_processes_with_batches_of_their_own_see_the_error_of_all(monkeypatch):
    model = calibrated([batch(), batch(1)])
    together, sent = position_errors(model, [batch(), batch(1)], 8), []
    monkeypatch.setattr(outliers, "reduce_", lambda total: sent.append(total.clone()))
    position_errors(model, [batch(1)], 8)  # what the other process sends
    monkeypatch.setattr(outliers, "reduce_", lambda total: total.add_(sent[0]))
    assert position_errors(model, [batch()], 8) == pytest.approx(together, rel=1e-5)
    assert sent[0].nbytes == outliers.OUTLIER_BYTES * len(together)


def test_where_few_bits_cost_every_input_much_none_stands_out():
    model = Net()
    quantize_modules_(model, CONFIG)
    heavy = batch() ** 5  # a long tail at every position, in every input
    calibrate_(model, [heavy])
    assert position_errors(model, [heavy], 4)["even"] > TOLERATED_ERROR
    assert "even" not in widen_outliers_(model, [heavy], 4, 16)


def test_enough_bits_hold_the_outliers_too():
    model = calibrated([batch()])
    assert widen_outliers_(model, [batch()], 15, 16) == {}
    assert set(widths(model).values()) == {"activation_bits"}


def test_without_a_wide_width_nothing_changes_but_the_log_warns(caplog):
    model = calibrated([batch()])
    with caplog.at_level(logging.WARNING):
        errors = widen_outliers_(model, [batch()], 8, None)
    assert errors["massive"] > TOLERATED_ERROR
    assert set(widths(model).values()) == {"activation_bits"}
    assert "massive" in caplog.text
    assert "outlier_activation_bits=16" in caplog.text


def test_a_resumed_quantizer_has_the_width_of_the_saved_one():
    model, other = calibrated([batch()]), calibrated([batch()])
    widen_outliers_(model, [batch()], 8, 16)
    other.load_state_dict(model.state_dict())
    assert widths(other) == widths(model)


@pytest.mark.parametrize("bits", [8, 17, 16.0, "16", True])
def test_a_width_that_is_no_wider_or_none_at_all_is_refused(bits):
    with pytest.raises(ValueError, match="outlier_activation_bits=.* above activation_bits"):
        GETAConfig(activation_bits=[4, 8], outlier_activation_bits=bits)


def test_without_activations_to_round_it_is_refused():
    with pytest.raises(ValueError, match="without activation_bits"):
        GETAConfig(outlier_activation_bits=16)
