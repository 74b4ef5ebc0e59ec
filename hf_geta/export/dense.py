"""`dense`: an ordinary transformers folder. Weights in float, the pruned sizes in the config's own fields.

It needs nothing but transformers, and holds what a float model can hold: rounded weights as the floats that they stand
for. Rounding of activations is left behind.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from transformers import PreTrainedModel

from hf_geta.export.plain import check_outputs, packed_weights, plain_model

logger = logging.getLogger(__name__)


def write_dense(model: PreTrainedModel, folder: Path) -> None:
    """Save `model` as the plain model of its class.

    Raises:
        ValueError: where no config builds a model of these shapes.
    """
    plain_model(model).save_pretrained(folder)
    leave_inputs_in_float_(model)
    check_outputs(model, folder)


def leave_inputs_in_float_(model: PreTrainedModel) -> None:
    """Let the layers of `model` round no input any more, and say so."""
    rounding = [layer for layer in packed_weights(model).values() if layer.manifest.activation_bits is not None]
    for layer in rounding:
        layer.manifest = dataclasses.replace(layer.manifest, activation_bits=None)
    if rounding:
        logger.warning(
            "%d layers of the compressed model round their input, and this format does not: its outputs are those of "
            "the compressed model with inputs in float.",
            len(rounding),
        )
