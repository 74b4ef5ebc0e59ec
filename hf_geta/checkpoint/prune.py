"""Physically smaller modules: tensors sliced or resized in place, and the sizes that modules keep about them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_geta.checkpoint.own_config import own_config
from hf_geta.quantization.blocks import Blocks
from hf_geta.quantization.layers import QuantizedLayer

# Which dimension of `weight` each size attribute states, by the class that owns it.
SIZE_ATTRIBUTES: tuple[tuple[type[nn.Module], dict[str, int]], ...] = (
    (nn.Linear, {"out_features": 0, "in_features": 1}),
    (nn.Embedding, {"num_embeddings": 0, "embedding_dim": 1}),
    (nn.EmbeddingBag, {"num_embeddings": 0, "embedding_dim": 1}),
    (nn.modules.batchnorm._NormBase, {"num_features": 0}),
    (nn.GroupNorm, {"num_channels": 0}),
    (Conv1D, {"nx": 0, "nf": 1}),
    *((convolution, {"out_channels": 0}) for convolution in (nn.Conv1d, nn.Conv2d, nn.Conv3d)),
    (nn.modules.conv._ConvTransposeNd, {"in_channels": 0}),
)


ROWS_PER_LINE = 8  # numbers in the 16 bytes that torch's grouped product aligns rows to, for the narrowest dtype


@torch.no_grad()
def slice_(model: nn.Module, keep: Mapping[str, Mapping[int, Tensor]]) -> None:
    """Keep only some entries of tensors, in place: tensor name -> dimension -> kept indices, int64 (kept,).

    Parameters stay the same objects, so ties hold; a tied tensor is sliced once. The scales of a quantized layer, per
    channel and block, follow its weight. Modules' own sizes (`in_features`, `nf` ...) are updated; the `groups` of a
    convolution or a norm do not follow from shapes: set them with `set_attributes_`.

    Raises:
        ValueError: for a name that is no parameter or buffer of the model.
    """
    tensors = _tensors(model, keep)
    chosen = {id(tensors[name]): (tensors[name], dims) for name, dims in keep.items()}
    following: dict[Blocks, Mapping[int, Tensor]] = {}  # each once, however many layers share it
    for layer in model.modules():
        if isinstance(layer, QuantizedLayer) and id(layer.weight) in chosen:
            scale, blocks = layer.weight_quantizer.log_channel_scale, layer.weight_quantizer.blocks
            dims = chosen[id(layer.weight)][1]
            if scale is not None and layer.channel_dim in dims:
                chosen[id(scale)] = (scale, {layer.channel_dim: dims[layer.channel_dim]})
            if blocks is not None:
                following[blocks] = dims
            if (power := layer.weight_quantizer.input_power) is not None:
                chosen[id(power)] = (power, _of_broadcast(power, layer.weight, dims))
    for tensor, dims in chosen.values():
        for dim, indices in dims.items():
            tensor.data = tensor.data.index_select(dim, indices.to(tensor.device))
        tensor.grad = None
    for blocks, dims in following.items():
        for dim, indices in dims.items():
            blocks.take_(dim, indices)
    _update_sizes_(model)


def _of_broadcast(tensor: Tensor, weight: Tensor, dims: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """What is kept of a tensor that broadcasts to a weight, whose last dimensions are its own."""
    first = weight.ndim - tensor.ndim
    return {dim - first: kept for dim, kept in dims.items() if dim >= first and tensor.shape[dim - first] > 1}


@torch.no_grad()
def resize_(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Give tensors other shapes, in place, with undefined contents on their own device (meta: before loading).

    Raises:
        ValueError: for a name that is no parameter or buffer of the model.
    """
    tensors = _tensors(model, shapes)
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != tuple(shape):
            tensors[name].data = tensors[name].data.new_empty(tuple(shape))
            tensors[name].grad = None
    _update_sizes_(model)


def set_attributes_(model: nn.Module, attributes: Mapping[str, int]) -> None:
    """Set int attributes by dotted path: `module.attribute`, or `module.config.attribute` on the module's own config.

    A config that is written to becomes a copy that only this module holds.

    Raises:
        ValueError: for a path that leads nowhere.
    """
    for path, value in attributes.items():
        *steps, name = path.split(".")
        owner: Any = model
        for step in steps:
            child = getattr(owner, step, None)
            if child is not None and not isinstance(child, nn.Module):
                child = own_config(child)
                setattr(owner, step, child)
            owner = child
        if not isinstance(getattr(owner, name, None), int):
            raise ValueError(f"{path}: {type(model).__name__} has no such int attribute.")
        setattr(owner, name, value)
    _update_sizes_(model)  # of grouped convolutions


def _tensors(model: nn.Module, names: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    if unknown := [name for name in names if name not in tensors]:
        raise ValueError(f"{type(model).__name__} has no parameter or buffer {', '.join(unknown)}.")
    return tensors


def stated_sizes(module: nn.Module) -> Iterator[tuple[str, Tensor, int]]:
    """What a module itself states about its weight: attribute, weight, and the dimension that has this size."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        weight = getattr(module, "running_mean", None)  # a batch norm without an affine map
    if not isinstance(weight, Tensor):
        return
    for owner, attributes in SIZE_ATTRIBUTES:
        if isinstance(module, owner):
            for name, dim in attributes.items():
                yield name, weight, dim


def _update_sizes_(model: nn.Module) -> None:
    """Make modules state the sizes that their tensors have."""
    for module in model.modules():
        for name, tensor, dim in stated_sizes(module):
            setattr(module, name, tensor.shape[dim])
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            continue
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.normalized_shape = tuple(weight.shape[-len(module.normalized_shape) :])
        if isinstance(module, nn.modules.conv._ConvNd):  # a filter has the channels of its group only
            name = "out_channels" if module.transposed else "in_channels"
            setattr(module, name, weight.shape[1] * module.groups)
    for module in model.modules():
        _update_experts_(module)


def _update_experts_(module: nn.Module) -> None:
    """Let experts whose rows are not aligned any more run one by one: torch's grouped product wants aligned rows.

    `group_divisible=8` keeps them aligned, and the grouped product.
    """
    config = getattr(module, "config", None)
    if getattr(config, "_experts_implementation_internal", None) != "grouped_mm":
        return
    stacks = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim == 3]
    if any(size % ROWS_PER_LINE for stack in stacks for size in stack.shape[1:]):
        module.config = own_config(config)
        module.config._experts_implementation_internal = "eager"  # type: ignore[union-attr]
