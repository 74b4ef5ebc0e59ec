"""From integers back to floats: a packed model becomes an ordinary one of its pruned shapes, which trains again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_geta.checkpoint.layers import PackedLayer
from hf_geta.checkpoint.prune import resize_
from hf_geta.checkpoint.swap import PACKED_CLASSES, replace_modules_
from hf_geta.quantization.experts import join_experts_


@torch.no_grad()
def dequantize_(model: PreTrainedModel) -> None:
    """Make every packed layer the dense one whose weight is step_size * code, in the dtype that it has in the model.

    Layers that shared one packed weight share one parameter, which `model` calls tied as before. Inputs are not
    rounded any more.

    Raises:
        ValueError: for a model of which a part is offloaded; nothing is changed then.
    """
    names: dict[PackedLayer, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedLayer):
            names.setdefault(module, []).append(name)
    if names and (offloaded := [name for name, tensor in model.state_dict().items() if tensor.is_meta]):
        raise ValueError(f"{offloaded[0]} is offloaded: load the model without an offload to dequantize it.")
    weights: dict[nn.Module, nn.Parameter] = {
        layer: nn.Parameter(layer.weight.clone()) for layer in names if not layer.shared_with
    }
    dense: dict[nn.Module, nn.Module] = {}
    for layer in names:
        dense[layer] = _dense_layer(layer, weights[layer.shared_with[0] if layer.shared_with else layer])
    replace_modules_(model, dense)
    join_experts_(model)
    resize_(model, {})  # experts say how they run at the sizes that they have
    shared = {f"{alias}.weight" for layer, aliases in names.items() if layer.shared_with for alias in aliases}
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.all_tied_weights_keys.update({name: tied[name] for name in sorted(shared & tied.keys())})


def _dense_layer(layer: PackedLayer, weight: nn.Parameter) -> nn.Module:
    """The dense layer with the hyperparameters and the bias of a packed one."""
    kind = layer.float_class or next(dense for dense, packed in PACKED_CLASSES.items() if isinstance(layer, packed))
    dense: Any = kind.__new__(kind)
    nn.Module.__init__(dense)
    vars(dense).update({name: vars(layer)[name] for name in layer.hyperparameters}, training=layer.training)
    dense.register_parameter("weight", weight)
    for name in layer.kept_buffers:
        dense.register_buffer(name, layer.get_buffer(name), persistent=name not in layer._non_persistent_buffers_set)
    dense.register_parameter("bias", layer.bias)
    dense._is_hf_initialized = True  # transformers has nothing to initialize here
    return dense
