"""Which packed layer stands in for which dense one, and the swap that puts empty ones into a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_geta.checkpoint.embeddings import PackedEmbedding
from hf_geta.checkpoint.experts import PackedStackedLinear
from hf_geta.checkpoint.layers import PackedConv1D, PackedConv1d, PackedConv2d, PackedConv3d, PackedLayer, PackedLinear
from hf_geta.checkpoint.manifest import LayerManifest
from hf_geta.quantization.experts import StackedLinear

PACKED_CLASSES: dict[type[nn.Module], type[PackedLayer]] = {
    nn.Linear: PackedLinear,
    nn.Conv1d: PackedConv1d,
    nn.Conv2d: PackedConv2d,
    nn.Conv3d: PackedConv3d,
    Conv1D: PackedConv1D,
    nn.Embedding: PackedEmbedding,
    StackedLinear: PackedStackedLinear,
}


def packed_class(dense: nn.Module) -> type[PackedLayer] | None:
    """The packed layer that stands in for a dense or quantized one; None where there is none."""
    return next((packed for kind, packed in PACKED_CLASSES.items() if isinstance(dense, kind)), None)


def replace_with_packed_(model: nn.Module, layers: Mapping[str, LayerManifest]) -> dict[str, PackedLayer]:
    """Put empty packed layers where the manifest says, wherever the model has the module.

    Returns:
        The packed layers by the manifest's names.

    Raises:
        ValueError: for a module that cannot be packed.
    """
    packed: dict[str, PackedLayer] = {}
    successors: dict[nn.Module, nn.Module] = {}
    for name, layer in sorted(layers.items(), key=lambda item: item[1].shared_with is not None):
        dense = model.get_submodule(name)
        if (kind := packed_class(dense)) is None:
            known = ", ".join(each.__name__ for each in PACKED_CLASSES)
            raise ValueError(f"layers: {name} is a {type(dense).__name__}; what can be packed is {known}.")
        if layer.granularity == "block" and not kind.takes_blocks:
            raise ValueError(f"layers: {name} has granularity='block'; a {type(dense).__name__} has no blocks.")
        if layer.granularity != "tensor" and (layer.channel_dim or 0) != kind.channel_dim:
            raise ValueError(
                f"layers: {name} has channel_dim={layer.channel_dim}, but the outputs of a {type(dense).__name__} are "
                f"dimension {kind.channel_dim}."
            )
        packed[name] = kind(dense, layer, packed[layer.shared_with] if layer.shared_with else None)
        successors[dense] = packed[name]
        if layer.shared_with:  # transformers would look for a parameter to tie
            getattr(model, "all_tied_weights_keys", {}).pop(f"{name}.weight", None)
    replace_modules_(model, successors)
    return packed


def replace_modules_(model: nn.Module, successors: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules in the place of others: under every name, and in the lists of their own that some modules call."""

    def successor(value: Any) -> Any:
        return successors.get(value, value) if isinstance(value, nn.Module) else value

    for module in [module for module in model.modules() if module not in successors]:
        everything: list[Any] = [module._modules, vars(module)]
        for values in everything:
            for name, value in values.items():
                if type(value) in (list, tuple):
                    values[name] = type(value)(map(successor, value))
                elif isinstance(value, nn.Module):
                    values[name] = successor(value)
