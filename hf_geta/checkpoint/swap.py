"""Which packed layer stands in for which dense one, and the swap that puts empty ones into a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_geta.checkpoint.embeddings import PackedEmbedding
from hf_geta.checkpoint.experts import PackedStackedLinear
from hf_geta.checkpoint.layers import PackedConv1D, PackedConv2d, PackedLayer, PackedLinear
from hf_geta.checkpoint.manifest import LayerManifest
from hf_geta.quantization.experts import StackedLinear

PACKED_CLASSES: dict[type[nn.Module], type[PackedLayer]] = {
    nn.Linear: PackedLinear,
    nn.Conv2d: PackedConv2d,
    Conv1D: PackedConv1D,
    nn.Embedding: PackedEmbedding,
    StackedLinear: PackedStackedLinear,
}


def packed_class(dense: nn.Module) -> type[PackedLayer] | None:
    """The packed layer that stands in for a dense or quantized one; None where there is none."""
    return next((packed for kind, packed in PACKED_CLASSES.items() if isinstance(dense, kind)), None)


def replace_with_packed_(model: nn.Module, layers: Mapping[str, LayerManifest]) -> dict[str, PackedLayer]:
    """Put empty packed layers where the manifest says, under every name that the model has for the module.

    Returns:
        The packed layers by the manifest's names.

    Raises:
        ValueError: for a module that cannot be packed.
    """
    packed: dict[str, PackedLayer] = {}
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
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
        for alias in names[dense]:
            model.set_submodule(alias, packed[name])
        if layer.shared_with:  # transformers would look for a parameter to tie
            getattr(model, "all_tied_weights_keys", {}).pop(f"{name}.weight", None)
    return packed
