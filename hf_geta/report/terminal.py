"""A compressed folder as text: dense against compressed, the groups of every axis, every layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from hf_geta.report.cost import FLOAT_BITS
from hf_geta.report.figures import METRICS, QUALITY, align, figure_rows, with_dense
from hf_geta.report.folder import Contents

TIMES = " x "
AXIS_HEADS = ["axis", "kind", "kept", "of", "share"]
LAYER_HEADS = ["layer", "kept", "of", "weight bits", "input bits", "bytes", "BOPs"]


def format_contents(contents: Contents) -> str:
    """The whole report as aligned text."""
    figures = figure_rows(with_dense(contents.dense, contents.compressed))
    tables = [
        f"{contents.model_class}, compressed by GETA",
        _table(figures),
        _table([AXIS_HEADS, *axis_cells(contents)]) if contents.axes else "",
        _table([LAYER_HEADS, *layer_cells(contents)]),
    ]
    return "\n\n".join(filter(None, tables))


def axis_cells(contents: Contents) -> list[list[str]]:
    """One row of text for each axis, in the columns of `AXIS_HEADS`."""
    return [
        [axis.name, axis.kind, f"{axis.kept:,}", f"{axis.groups:,}", f"{axis.kept / max(axis.groups, 1):.0%}"]
        for axis in contents.axes
    ]


def layer_cells(contents: Contents) -> list[list[str]]:
    """One row of text for each layer, in the columns of `LAYER_HEADS`; BOPs are those of the dense layer's."""
    return [
        [
            layer.name,
            _shape(layer.shape),
            _shape(layer.dense_shape),
            _bits(layer.bits),
            _bits(layer.activation_bits),
            f"{layer.bytes:,}",
            "" if layer.relative_bops is None else f"{layer.relative_bops:.2%}",
        ]
        for layer in contents.layers
    ]


def evaluation_command(folder: str | Path, contents: Contents) -> str | None:
    """The command that measures again what the card claims; None where it claims nothing that can be measured.

    Made of names and the report's task, never of a command that a report holds: anyone can write a report.
    """
    if not contents.evaluation or not any(key in contents.compressed for key in QUALITY):
        return None
    data = "" if contents.evaluation.get("dataset_name") else " --data_dir DATA"
    return f"python scripts/evaluate_checkpoint.py {quote(str(folder))}{data}"


def claims(contents: Contents) -> str:
    """The measured quality that the report claims, in words."""
    known = [(METRICS[key], contents.compressed[key]) for key in QUALITY if key in contents.compressed]
    return ", ".join(f"{label} {form.format(value)}" for (label, form), value in known)


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(align(list(row), widths)).rstrip() for row in rows)


def _shape(shape: Sequence[int]) -> str:
    return TIMES.join(map(str, shape))


def _bits(bits: int) -> str:
    return "float" if bits >= FLOAT_BITS else str(bits)
