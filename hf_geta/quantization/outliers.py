"""Which inputs do the asked activation bits not hold? Those whose few huge numbers set the clip of all others.

Decoders put numbers hundreds of times larger than all others into the inputs of a few layers, at one or two positions
of a text ("massive activations", Sun et al., 2024, arXiv 2402.17762). Over all positions the error of a fixed grid is
then small, and yet at most positions everything rounds to zero. So the error is taken position by position.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hf_geta.agreement import reduce_
from hf_geta.quantization.calibration import watch_inputs
from hf_geta.quantization.functional import bits_to_step_size, fake_quantize
from hf_geta.quantization.layers import quantized_layers
from hf_geta.quantization.quantizers import Quantizer

logger = logging.getLogger(__name__)

TOLERATED_ERROR = 0.01  # of the power of an input, position by position
TIMES_THE_MEDIAN = 4  # where few bits cost every input of a model much, none stands out
OUTLIER_BYTES = 8  # all-reduced per layer


def widen_outliers_(model: nn.Module, batches: Iterable[Any], bits: int, wide_bits: int | None) -> dict[str, float]:
    """Gives the inputs that `bits` do not hold the width `wide_bits`; after `calibrate_`, on the same batches.

    Such an input loses, at a typical position, more than `TOLERATED_ERROR` of its power when it is rounded to `bits`
    with the clip of least squared error, and `TIMES_THE_MEDIAN` as much as the model's inputs do. Its quantizer is
    bounded by `GETAConfig.outlier_activation_bits` from then on. With `wide_bits=None` nothing changes, but the log
    warns of these layers. Under torch.distributed every process calls it, and all get the same result.

    Returns:
        Layer name -> error of each such input, the largest first.
    """
    errors = position_errors(model, batches, bits)
    bound = max(TOLERATED_ERROR, TIMES_THE_MEDIAN * statistics.median_low(errors.values() or [0.0]))
    errors = {name: error for name, error in sorted(errors.items(), key=lambda item: -item[1]) if error > bound}
    worst = ", ".join(f"{name} ({error:.0%})" for name, error in list(errors.items())[:3])
    if errors and wide_bits is None:
        logger.warning(
            "outliers in the inputs of %d layers: %d bits that reach for them lose this share of all other positions: "
            "%s. Accuracy will suffer; outlier_activation_bits=16 rounds these inputs finer.",
            len(errors),
            bits,
            worst,
        )
    elif errors:
        layers = quantized_layers(model)
        for name in errors:
            quantizer = layers[name].input_quantizer
            assert quantizer is not None
            quantizer.widths = "outlier_activation_bits"
        logger.info("%d inputs get %s bits, for outliers: %s.", len(errors), wide_bits, worst)
    return errors


def position_errors(model: nn.Module, batches: Iterable[Any], bits: int) -> dict[str, float]:
    """By layer name, the mean over all positions of |Q(x) - x|^2 / |x|^2, x the features there; zeros do not count."""
    layers = {
        name: layer
        for name, layer in quantized_layers(model).items()
        if layer.input_quantizer is not None and layer.input_quantizer.log_clips is not None
    }
    if not layers:
        return {}
    total = torch.zeros(len(layers), 2, device=next(iter(layers.values())).weight.device)  # errors, positions
    rows = dict(zip(layers, total, strict=True))

    def add(name: str, x: Tensor) -> None:
        x = x.float().movedim(layers[name].feature_dim, -1)
        power = x.square().sum(-1)
        error = (_rounded(layers[name].input_quantizer, x, bits) - x).square().sum(-1)
        seen = power > 0
        rows[name].add_(torch.stack([(error / power.where(seen, 1)).sum(), seen.sum()]).to(total.device))

    watch_inputs(model, layers, batches, add)
    reduce_(total)
    return dict(zip(layers, (total[:, 0] / total[:, 1].clamp(min=1)).tolist(), strict=True))


def _rounded(quantizer: Quantizer | None, x: Tensor, bits: int) -> Tensor:
    assert quantizer is not None
    assert quantizer.log_clips is not None
    clip_max = quantizer.log_clips[bits].exp()
    step_size = bits_to_step_size(bits, clip_max, None, quantizer.signed)
    return fake_quantize(x, step_size, clip_max, None, None, quantizer.signed)
