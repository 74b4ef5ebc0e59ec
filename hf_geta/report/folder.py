"""What a compressed folder holds, layer by layer: from its config.json, and from its report where it has one.

A folder may come from anyone: its report is checked before anything is made of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_geta.checkpoint.manifest import LayerManifest, Manifest
from hf_geta.checkpoint.models import dense_skeleton
from hf_geta.checkpoint.packing import MULTIPLIER_BITS, packed_bytes
from hf_geta.report.cost import FLOAT_BITS
from hf_geta.report.figures import LARGEST, METRICS
from hf_geta.report.files import REPORT_NAME, load_report
from hf_geta.report.picture import Kept, Widths

STEP_SIZE_BYTES = 4


@dataclass(frozen=True)
class Layer:
    """A weight of two dimensions or more; 32 bits are float, `relative_bops` is None without a report."""

    name: str
    dense_shape: tuple[int, ...]
    shape: tuple[int, ...]
    bits: int
    activation_bits: int
    bytes: int  # of codes and step sizes, or of float numbers
    relative_bops: float | None = None


@dataclass(frozen=True)
class Contents:
    """A compressed folder. `dense` and `compressed` are figures by the keys of `METRICS`."""

    model_class: str
    dense: Mapping[str, float]
    compressed: Mapping[str, float]
    layers: tuple[Layer, ...]
    axes: tuple[Kept, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    evaluation: Mapping[str, str] = field(default_factory=dict)

    @property
    def widths(self) -> list[Widths]:
        """Of the layers that are quantized."""
        quantized = [layer for layer in self.layers if layer.bits < FLOAT_BITS or layer.activation_bits < FLOAT_BITS]
        return [Widths(layer.name, layer.bits, layer.activation_bits) for layer in quantized]


def read_folder(folder: str | Path) -> Contents:
    """All that a folder says of its model, without reading its weights.

    Raises:
        ValueError: for a model that is not compressed, a config.json that builds none, or a report that is no report.
    """
    return describe(folder, read_report(folder))


def describe(folder: str | Path, report: Mapping[str, Any]) -> Contents:
    """`read_folder` with a report from elsewhere; with an empty one all figures are counted, and none is claimed."""
    model, manifest = dense_skeleton(folder)
    layers = tuple(_layers(model, manifest, _relative_bops(report)))
    parameters, counted = _counted(model, manifest, layers)
    if files := list(Path(folder).glob("model*.safetensors")):
        counted["file_bytes"] = sum(path.stat().st_size for path in files)
    return Contents(
        model_class=type(model).__name__,
        dense={"parameters": parameters, **figures_of(report, "dense")},
        compressed={**counted, **figures_of(report, "compressed")},
        layers=layers,
        axes=tuple(_axis(row) for row in rows_of(report, "axes")),
        settings=_texts(report, "geta"),
        versions=_texts(report, "versions"),
        evaluation=_texts(report, "evaluation"),
    )


def read_report(folder: str | Path) -> dict[str, Any]:
    """The report of a folder; empty where there is none.

    Raises:
        ValueError: for a file that is no JSON object.
    """
    try:
        report = load_report(folder)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{REPORT_NAME} is no JSON: {clean(str(error))}") from error
    if not isinstance(report, dict):
        raise ValueError(f"{REPORT_NAME} holds no JSON object.")
    return report


def figures_of(report: Mapping[str, Any], name: str) -> dict[str, float]:
    """The figures of "dense" or "compressed", each a finite number."""
    values = mapping_of(report, name)
    return {key: number(f"{name}.{key}", values[key]) for key in METRICS if values.get(key) is not None}


def number(where: str, value: Any) -> float:
    """A value of a report that is a finite number.

    Raises:
        ValueError: for any other.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= LARGEST:
        raise ValueError(f"{REPORT_NAME}: {clean(where)} = {clean(repr(value))} is no number that a model can have.")
    return value


def whole(where: str, value: Any) -> int:
    """A value of a report that is a whole number, 0 or more; ValueError for any other."""
    if not isinstance(number(where, value), int) or value < 0:
        raise ValueError(f"{REPORT_NAME}: {clean(where)} = {clean(repr(value))} is no whole number.")
    return int(value)


def rows_of(report: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """The rows of "operations" or "axes"; ValueError where they are none."""
    rows = report.get(name, [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{REPORT_NAME}: {name} is no list of objects.")
    return rows


def mapping_of(report: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part of a report that is an object; ValueError for any other value."""
    values = report.get(name, {})
    if not isinstance(values, dict):
        raise ValueError(f"{REPORT_NAME}: {name} is no object.")
    return values


def clean(text: str, length: int = 200) -> str:
    """Text for a terminal: without control characters, escape codes, marks of direction; at most so long."""
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[: length + 1])
    return shown if len(shown) <= length else f"{shown[:length]}..."


def _layers(model: PreTrainedModel, manifest: Manifest, bops: Mapping[str, float]) -> list[Layer]:
    """One for each weight of two dimensions or more, once for all that share it."""
    layers = []
    for tensor, parameter in model.named_parameters():
        name = tensor.removesuffix(".weight")
        packed = manifest.layers.get(name) if tensor.endswith(".weight") else None
        if parameter.ndim < 2:
            continue
        dense = tuple(parameter.shape)
        shape = packed.shape if packed else manifest.shapes.get(tensor, dense)
        size = _packed_size(model, name, packed) if packed else math.prod(shape) * parameter.element_size()
        layers.append(
            Layer(
                name=name,
                dense_shape=dense,
                shape=tuple(shape),
                bits=packed.bits if packed else FLOAT_BITS,
                activation_bits=(packed and packed.activation_bits) or FLOAT_BITS,
                bytes=size,
                relative_bops=bops.get(tensor),
            )
        )
    return layers


def _packed_size(model: nn.Module, name: str, layer: LayerManifest) -> int:
    if layer.shared_with:
        return 0
    size = packed_bytes(math.prod(layer.shape), layer.bits)
    if layer.granularity != "tensor":
        size += STEP_SIZE_BYTES * layer.shape[1 if type(model.get_submodule(name)).__name__ == "Conv1D" else 0]
    if layer.granularity == "block":
        size += packed_bytes(math.prod(layer.block_shape), MULTIPLIER_BITS)
    return size


def _counted(model: nn.Module, manifest: Manifest, layers: tuple[Layer, ...]) -> tuple[int, dict[str, float]]:
    """(parameters of the dense model; figures of the compressed one that need no report)."""
    kept = {**manifest.shapes, **{f"{name}.weight": layer.shape for name, layer in manifest.layers.items()}}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    weights = [(math.prod(layer.shape), layer.bits) for layer in layers if layer.bits < FLOAT_BITS]
    inputs = [layer.activation_bits for layer in layers if layer.activation_bits < FLOAT_BITS]
    return sum(map(math.prod, shapes.values())), {
        "parameters": sum(math.prod(kept.get(name, shape)) for name, shape in shapes.items()),
        "mean_weight_bits": _mean(sum(n * bits for n, bits in weights), sum(n for n, _ in weights)),
        "mean_activation_bits": _mean(sum(inputs), len(inputs)),
    }


def _mean(total: int, count: int) -> float:
    return total / count if count else FLOAT_BITS


_OPERATION = ("macs", "dense_macs", "weight_bits", "activation_bits")


def _relative_bops(report: Mapping[str, Any]) -> dict[str, float]:
    """Weight -> BOPs over those of its dense layer; several operations may use one weight."""
    costs: dict[str, tuple[float, float]] = {}
    for row in rows_of(report, "operations"):
        if not isinstance(row.get("weight"), str):
            continue
        values = [number(f"operations.{key}", row.get(key)) for key in _OPERATION]
        bops, dense = costs.get(row["weight"], (0.0, 0.0))
        macs, dense_macs, weight_bits, activation_bits = values
        costs[row["weight"]] = bops + macs * weight_bits * activation_bits, dense + dense_macs * FLOAT_BITS**2
    return {name: bops / dense for name, (bops, dense) in costs.items() if dense}


def _axis(row: Mapping[str, Any]) -> Kept:
    kept, groups = (whole(f"axes.{key}", row.get(key)) for key in ("kept", "groups"))
    if kept > groups:
        raise ValueError(f"{REPORT_NAME}: an axis keeps {kept} of {groups} groups.")
    return Kept(clean(str(row.get("name"))), clean(str(row.get("kind"))), kept, groups)


def _texts(report: Mapping[str, Any], name: str) -> dict[str, str]:
    """A flat part of a report as text to read."""
    return {clean(str(key)): clean(str(value)) for key, value in mapping_of(report, name).items() if value is not None}
