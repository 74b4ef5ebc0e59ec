"""`dense`: an ordinary transformers folder. Weights in float, the pruned sizes in the config's own fields.

It needs nothing but transformers, and holds what a float model can hold: rounded weights as the floats that they stand
for. Rounding of activations is left behind.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hf_geta.checkpoint.layers import PackedLayer

logger = logging.getLogger(__name__)


def write_dense(model: PreTrainedModel, folder: Path) -> None:
    """Save `model` as the plain model of its class.

    Raises:
        ValueError: where no config builds a model of these shapes.
    """
    plain = plain_model(model)
    if layers := [name for name, layer in packed_layers(model).items() if layer.manifest.activation_bits is not None]:
        logger.warning(
            "%d layers round their input, which a float model cannot say: its outputs are those of the compressed "
            "model with inputs left in float.",
            len(layers),
        )
    plain.save_pretrained(folder)


@torch.no_grad()
def plain_model(model: PreTrainedModel) -> PreTrainedModel:
    """A float model of the same class and function, but for rounded activations."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    packed = packed_layers(model)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[0] not in packed}
    for name, layer in packed.items():
        tensors[f"{name}.weight"] = layer.weight
        if layer.bias is not None:
            tensors[f"{name}.bias"] = layer.bias
    plain.load_state_dict(tensors, strict=False, assign=True)
    plain.tie_weights()
    return plain


def packed_layers(model: PreTrainedModel) -> dict[str, PackedLayer]:
    """The packed layers by every name that they have."""
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if isinstance(module, PackedLayer)}
