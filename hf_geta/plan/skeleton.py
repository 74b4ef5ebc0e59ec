"""`prepare_model` and `create_optimizer` without numbers: the same groups, quantizers, timetable and refusals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_geta.compress import create_optimizer, find_groups
from hf_geta.config import GETAConfig
from hf_geta.optim.qasso import QASSO
from hf_geta.quantization.layers import quantized_layers
from hf_geta.quantization.swap import quantize_modules_, settled


def prepare_skeleton_(model: PreTrainedModel, config: GETAConfig, inputs: Mapping[str, Any]) -> PreTrainedModel:
    """Prepare a model on the meta device, in place: its quantizers are real, with the widths that they start with.

    What only numbers tell is taken as it mostly is: the search space holds, calibration reaches every layer that the
    forward uses, and every grid is signed.

    Raises:
        ValueError: no layer to quantize, no axis to prune, inputs that the model does not take.
    """
    config = settled(config, model)
    preparation = find_groups(model, config, inputs)
    if config.weight_bits is not None:
        quantize_modules_(model, config, preparation.qadg.bypassed)
        used = {
            id(model.get_parameter(operation.weight)) for operation in preparation.qadg.operations if operation.weight
        }
        for layer in quantized_layers(model).values():
            if id(layer.weight) not in used:
                layer.input_quantizer = None
            for quantizer in filter(None, [layer.weight_quantizer, layer.input_quantizer]):
                quantizer.to_empty(device="cpu")
                quantizer.set_range_(1.0, config.initial_bits)
    model.geta = preparation  # type: ignore[assignment]
    return model


def create_planned_optimizer(model: PreTrainedModel, total_steps: int) -> QASSO:
    """QASSO as the run will have it, around a base optimizer that never steps.

    Raises:
        ValueError: as `create_optimizer`: stages that do not fit, more groups than may go, a budget out of reach.
    """
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    return create_optimizer(model, base, total_steps)
