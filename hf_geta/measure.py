"""WHAT does a prepared model cost, and does the small one compute the same? Of any moment of a run, also of its end."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from hf_geta import __version__
from hf_geta.checkpoint.layers import PackedLayer
from hf_geta.graph.qadg import QADG
from hf_geta.graph.tracing import float_tensors
from hf_geta.optim.quantizers import NumberedQuantizers
from hf_geta.optim.widths import WidthTable
from hf_geta.preparation import preparation_of, prunable_parameters
from hf_geta.quantization.layers import quantized_layers
from hf_geta.quantization.quantizers import Quantizer
from hf_geta.report.cost import Cost, measure_cost
from hf_geta.report.metadata import hub_id
from hf_geta.sharding import class_without_engine


@torch.no_grad()
def measure_compression(model: nn.Module, finalized: bool = False) -> Cost:
    """What a prepared model costs beside the dense one: BOPs, parameters, widths, group sparsity.

    Args:
        finalized: with the allowed widths that `finalize_model` gives it, instead of those that it has now.

    Raises:
        ValueError: if `model` is not prepared.
    """
    preparation = preparation_of(model)
    numbered = NumberedQuantizers.of(quantized_layers(model), preparation.readers)
    bits = numbered.nearest_bits(preparation.config) if finalized else WidthTable(numbered.quantizers).bits()
    bits_of = dict(zip(numbered.quantizers, bits.tolist(), strict=True))
    return cost_at(model, preparation.qadg.zero_groups(model), lambda quantizer: round(bits_of[quantizer], 4))


def cost_at(model: nn.Module, removed: Mapping[str, Sequence[int]], bits_of: Callable[[Quantizer], float]) -> Cost:
    """What a prepared model costs without the groups in `removed` (axis name -> indices).

    Where these can be zero but not be cut out, as in the ablation without QADG, they cost as before.

    Args:
        bits_of: width of a quantizer.
    """
    qadg = preparation_of(model).qadg
    dense = {name: p.numel() for name, p in prunable_parameters(model, remove_duplicate=True).items()}
    measured = {operation.weight for operation in qadg.operations}
    weight_bits, input_bits = {}, {}
    for name, layer in quantized_layers(model).items():
        weight_bits[f"{name}.weight"] = bits_of(layer.weight_quantizer)
        if layer.input_quantizer is not None and layer.input_quantizer.enabled:
            input_bits[f"{name}.weight"] = bits_of(layer.input_quantizer)
    return measure_cost(
        qadg.operations,
        dense,
        _kept_numel(model, qadg, removed, dense) if qadg.can_be_cut else dense,
        {name: bits for name, bits in weight_bits.items() if name in dense},
        {name: bits for name, bits in input_bits.items() if name in measured},
        {axis.name: axis.size for axis in qadg.axes},
        {axis.name: axis.size - len(removed.get(axis.name, ())) for axis in qadg.axes},
    )


def _kept_numel(
    model: nn.Module, qadg: QADG, removed: Mapping[str, Sequence[int]], dense: Mapping[str, int]
) -> dict[str, int]:
    """Elements of every parameter in `dense` once the groups in `removed` are gone."""
    gone: dict[tuple[str, int], set[int]] = {}
    for axis in qadg.axes:
        indices = list(removed.get(axis.name, ()))
        for member in axis.members if indices else ():
            gone.setdefault((member.tensor, member.dim), set()).update(member.indices[indices].reshape(-1).tolist())
    kept = dict(dense)
    for name in dense:
        shape = list(model.get_parameter(name).shape)
        for dim in range(len(shape)):
            shape[dim] -= len(gone.get((name, dim), ()))
        kept[name] = math.prod(shape)
    return kept


def compression_report(model: PreTrainedModel) -> dict[str, Any]:
    """What the card of the finalized model can say of a prepared one: plain values, as `render_card` takes them.

    Raises:
        ValueError: if `model` is not prepared.
    """
    preparation, cost = preparation_of(model), measure_compression(model, finalized=True)
    removed = preparation.qadg.zero_groups(model)
    axes = preparation.qadg.axes
    versions = {"hf_geta": __version__, "transformers": transformers.__version__, "torch": str(torch.__version__)}
    return {
        "architecture": class_without_engine(model).__name__,
        "base_model": hub_id(model.config._name_or_path),
        "compressed": cost.summary(),
        "operations": cost.rows(),
        "axes": [
            {"name": a.name, "kind": a.kind, "kept": a.size - len(removed.get(a.name, ())), "groups": a.size}
            for a in axes
        ],
        "geta": preparation.config.to_dict(),
        "versions": versions,
    }


@torch.no_grad()
def output_difference(model: nn.Module, small: nn.Module | None, inputs: Mapping[str, Any]) -> float:
    """||small(x) - model(x)|| / ||model(x)|| over all floating outputs, both in eval mode, each on its own device.

    Under an autocast of the model's device, `small` computes in the same precision.

    0 without `small`: then `model` computes for the processes that hold its other pieces, which have one to compare.
    """
    modes = [(module, module.training) for module in model.modules()]
    outputs = [list(float_tensors(model.eval()(**inputs)).values())]
    for module, training in modes:
        module.training = training
    if small is None:
        return 0.0
    home, device = next(model.parameters()).device.type, next(small.parameters()).device
    there = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    precision = torch.autocast(device.type, torch.get_autocast_dtype(home), torch.is_autocast_enabled(home))
    with precision:
        outputs.append(list(float_tensors(small.eval()(**there)).values()))
    pairs = [(a.float(), b.float().to(a.device)) for a, b in zip(*outputs, strict=True)]
    difference = sum(float((a - b).square().sum()) for a, b in pairs)
    norm = sum(float(a.float().square().sum()) for a in outputs[0])
    return (difference / max(norm, torch.finfo(torch.float32).tiny)) ** 0.5


@contextlib.contextmanager
def float_inputs(model: nn.Module) -> Iterator[None]:
    """Meanwhile no layer of a prepared or packed model rounds its input.

    A rounding that flips, for a sum was taken in another order, flips others behind it: where inputs have outliers, two
    models that compute the same function differ by as much as rounding changes the function.
    """
    quantizers = {layer.input_quantizer for layer in quantized_layers(model).values() if layer.input_quantizer}
    enabled = [(quantizer, quantizer.enabled) for quantizer in quantizers]
    manifests = [(layer, layer.manifest) for layer in model.modules() if isinstance(layer, PackedLayer)]
    try:
        for quantizer, _ in enabled:
            quantizer.enabled = False
        for layer, manifest in manifests:
            layer.manifest = dataclasses.replace(manifest, activation_bits=None)
        yield
    finally:
        for quantizer, was in enabled:
            quantizer.enabled = was
        for layer, manifest in manifests:
            layer.manifest = manifest
