"""`dense`: an ordinary transformers folder. Weights in float, the pruned sizes in the config's own fields.

It needs nothing but transformers, and holds what a float model can hold: rounded weights as the floats that they stand
for. Rounding of activations is left behind.
"""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from hf_geta.export.plain import check_outputs, leave_inputs_in_float_, packed_weights, plain_model


def write_dense(model: PreTrainedModel, folder: Path) -> None:
    """Save `model` as the plain model of its class.

    Raises:
        ValueError: where no config builds a model of these shapes.
    """
    plain_model(model).save_pretrained(folder)
    leave_inputs_in_float_(model, packed_weights(model))
    check_outputs(model, folder)
