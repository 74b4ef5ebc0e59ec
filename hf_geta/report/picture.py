"""What is left of every layer, as a picture: the groups that an axis kept, the bits of weights and of inputs.

Drawn with presentation attributes alone: a Hub or a browser may refuse style sheets inside an image.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from hf_geta.report.cost import FLOAT_BITS

# Pixels.
CHARACTER, LINE, MARGIN, GAP = 6.7, 34, 18, 12  # the advance of an 11 px monospace font, rows, borders
CELLS, MAX_CELL, NUMBERED = 560, 30, 15  # all cells of a row, one of them, one that has room for a number
MAX_LABEL = 54  # characters
TALL, SHORT = 17, 9  # the height of a weight's cell, of an input's


@dataclass(frozen=True)
class Kept:
    """An axis: how many of its groups are left."""

    name: str
    kind: str
    kept: int
    groups: int


@dataclass(frozen=True)
class Widths:
    """A layer: the bits of its weight and of its input; 32 where they are in float."""

    name: str
    weight_bits: float
    activation_bits: float


@dataclass(frozen=True)
class Palette:
    """Colours: those of a page's style sheet, or, in a file of its own, those of a sheet of paper."""

    paper: str = "#fbfbfd"
    ink: str = "#1c2230"
    quiet: str = "#69728a"
    line: str = "#d5dae6"
    kept: str = "#0b8a6d"
    floats: str = "#c9ced9"


ON_PAGE = Palette("none", "var(--ink)", "var(--quiet)", "var(--line)", "var(--channel)", "var(--frozen)")
FEW, MANY = (214, 222, 255), (49, 64, 178)  # red, green, blue of 2 and of 16 bits


def has_picture(report: Mapping[str, Any]) -> bool:
    """Whether a report says anything of its layers."""
    return bool(report.get("axes") or report.get("operations"))


def draw_report(report: Mapping[str, Any]) -> str | None:
    """The picture of a report's axes and operations (`render_card`), a file of its own; None without them."""
    if not has_picture(report):
        return None
    kept = [Kept(row["name"], row["kind"], row["kept"], row["groups"]) for row in report.get("axes", ())]
    rows = {row["weight"]: row for row in report.get("operations", ()) if row.get("weight") is not None}
    widths = [
        Widths(name.removesuffix(".weight"), row["weight_bits"], row["activation_bits"]) for name, row in rows.items()
    ]
    return draw_layers(kept, widths) + "\n"


def draw_layers(axes: Sequence[Kept], layers: Sequence[Widths], palette: Palette | None = None) -> str:
    """One SVG element: a row for all axes of a kind, and one for all layers that play the same part, in their order."""
    colours = palette or Palette()
    quantized = any(min(layer.weight_bits, layer.activation_bits) < FLOAT_BITS for layer in layers)
    kept, widths = _by_part(axes), _by_part(layers if quantized else ())
    names = _shorten([*kept, *widths])
    left = MARGIN + CHARACTER * max(map(len, names.values()), default=0) + GAP
    parts, y = [], MARGIN + 12
    for title, rows, draw in (
        ("Groups kept", kept, _draw_kept),
        ("Bits of the weights, and below them of the inputs", widths, _draw_widths),
    ):
        if rows:
            parts.append(_text(MARGIN, y, title, colours.ink, bold=True))
            y += 14
        for part, row in rows.items():
            cell = min(MAX_CELL, CELLS / len(row))
            parts.append(_text(MARGIN, y + 16, names[part], colours.quiet))
            parts.append(draw(row, left, y, cell, colours))
            y += LINE
        y += 18 if rows else 0
    if widths:
        parts.append(_legend(layers, left, y, colours))
        y += 26
    cells = max((min(MAX_CELL * len(row), CELLS) for row in [*kept.values(), *widths.values()]), default=0)
    width, height = max(left + cells + CHARACTER * 18, 420) + MARGIN, y
    frame = f'<rect width="{width:.0f}" height="{height:.0f}" rx="10" fill="{colours.paper}"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-size="11" '
        f'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, DejaVu Sans Mono, monospace">\n'
        f"<title>Groups kept and bit widths, layer by layer</title>\n{frame}\n" + "\n".join(parts) + "\n</svg>"
    )


def _by_part(rows: Iterable[Any]) -> dict[str, list[Any]]:
    """Rows by their name with a star for each number: layers that differ in their number only play the same part."""
    parts: dict[str, list[Any]] = {}
    for row in rows:
        parts.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", row.name), []).append(row)
    return {part if len(row) > 1 else row[0].name: row for part, row in parts.items()}


def _shorten(names: Sequence[str]) -> dict[str, str]:
    """Names without the steps that all of them begin with, cut to their ends where they are long."""
    split = [name.split(".") for name in names]
    common = 0
    while split and all(len(steps) > common + 1 and steps[common] == split[0][common] for steps in split):
        common += 1
    short = {name: ".".join(steps[common:]) for name, steps in zip(names, split, strict=True)}
    return {name: text if len(text) <= MAX_LABEL else "…" + text[1 - MAX_LABEL :] for name, text in short.items()}


def _draw_kept(row: Sequence[Kept], left: float, y: float, cell: float, colours: Palette) -> str:
    height, parts = TALL + SHORT, []
    for number, axis in enumerate(row):
        share = axis.kept / axis.groups if axis.groups else 1.0
        x, full = left + number * cell, height * share
        parts.append(
            f"<g><title>{escape(axis.name)}: {axis.kept:,} of {axis.groups:,} groups</title>"
            + _rect(x, y, cell, height, "none", colours.line)
            + _rect(x, y + height - full, cell, full, colours.kept)
            + "</g>"
        )
    total, of = sum(axis.kept for axis in row), sum(axis.groups for axis in row)
    return "".join(parts) + _text(left + len(row) * cell + GAP, y + 17, f"{total:,} / {of:,}", colours.ink)


def _draw_widths(row: Sequence[Widths], left: float, y: float, cell: float, colours: Palette) -> str:
    parts = []
    for number, layer in enumerate(row):
        x, weights, inputs = left + number * cell, layer.weight_bits, layer.activation_bits
        title = f"{escape(layer.name)}: weights {_bits(weights)}, inputs {_bits(inputs)}"
        numbers = ""
        if cell >= NUMBERED and weights < FLOAT_BITS:
            ink = "#ffffff" if weights >= 7 else "#1c2230"
            numbers = _text(x + cell / 2, y + 13, f"{weights:g}", ink, middle=True)
        parts.append(
            f"<g><title>{title}</title>"
            + _rect(x, y, cell, TALL, _colour(weights, colours))
            + _rect(x, y + TALL + 1, cell, SHORT - 1, _colour(inputs, colours))
            + f"{numbers}</g>"
        )
    means = (_mean(row, "weight_bits"), _mean(row, "activation_bits"))
    return "".join(parts) + _text(left + len(row) * cell + GAP, y + 17, " / ".join(means), colours.ink)


def _legend(layers: Sequence[Widths], x: float, y: float, colours: Palette) -> str:
    used = sorted({min(bits, FLOAT_BITS) for one in layers for bits in (one.weight_bits, one.activation_bits)})
    shown = (
        used if len(used) <= 10 else [used[0], *(bits for bits in range(2, FLOAT_BITS, 2) if bits in used), used[-1]]
    )
    parts = []
    for bits in dict.fromkeys(shown):
        label = _bits(bits)
        parts += [_rect(x, y, 13, 11, _colour(bits, colours)), _text(x + 17, y + 10, label, colours.quiet)]
        x += 17 + CHARACTER * len(label) + GAP
    return "".join(parts)


def _mean(row: Sequence[Widths], name: str) -> str:
    """Over the layers that are not in float."""
    bits = [getattr(layer, name) for layer in row if getattr(layer, name) < FLOAT_BITS]
    return f"{sum(bits) / len(bits):.3g}" if bits else "float"


def _bits(bits: float) -> str:
    return "float" if bits >= FLOAT_BITS else f"{bits:g} bits"


def _colour(bits: float, colours: Palette) -> str:
    if bits >= FLOAT_BITS:
        return colours.floats
    share = min(max((bits - 2) / 10, 0.0), 1.0) ** 0.8  # 12 bits and more are alike to the eye
    return "#" + "".join(f"{round(few + (many - few) * share):02x}" for few, many in zip(FEW, MANY, strict=True))


def _rect(x: float, y: float, width: float, height: float, fill: str, stroke: str | None = None) -> str:
    inner = max(width - 2, width * 0.8)
    line = f' stroke="{stroke}"' if stroke else ""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{inner:.1f}" height="{height:.1f}" rx="2" fill="{fill}"{line}/>'


def _text(x: float, y: float, text: str, fill: str, bold: bool = False, middle: bool = False) -> str:
    extra = ' font-weight="600"' * bold + ' text-anchor="middle"' * middle
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}"{extra}>{escape(text)}</text>'
