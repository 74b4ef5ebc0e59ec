"""The search space as a picture: the model's weights line by line, and its axes as coloured lines that tie them.

Everything is computed from names and shapes; `draw_svg` returns the picture, `draw_html` (page.py) a page around it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from hf_geta.graph.blocks import Block, Cell, Dimension, Picture, Row
from hf_geta.graph.folding import fold_names
from hf_geta.graph.qadg import QADG, Axis
from hf_geta.graph.table import Tensors, format_count, group_parameters

TIMES, TO = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"

# Pixels.
CHARACTER = 7.23  # the advance of a 12 px monospace font
LINE, TITLE, PADDING, INDENT, MARGIN = 21, 25, 7, 14, 14
LANE, MIN_LANE, MAX_LANES_WIDTH = 15, 4, 480
BAR, MAX_BARS = 3, 100  # of the sizes of an axis that differ from layer to layer

ENTRIES = {
    "attention_head": "attention heads",
    "kv_group": "key-value groups",
    "mlp": "hidden units",
    "channel": "channels",
    "expert_hidden": "hidden units of each expert",
    "embedding": "embedding entries",
    "query_head": "query heads of each group",
    "head_dim": "entries of each head",
}
COLOURS = ("attention_head", "kv_group", "mlp", "channel", "expert_hidden", "embedding")  # those of page.py


@dataclass(frozen=True)
class Placed:
    """A row and where its line is."""

    row: Row
    x: float
    y: float


@dataclass(frozen=True)
class Frame:
    """A block, its upper left and its lower edge, and how deep it lies within others."""

    block: Block
    x: float
    top: float
    bottom: float
    depth: int


@dataclass(frozen=True)
class Track:
    """The line of one tie: its dots as (number of the row, whether a first, whether a later dimension), its lane."""

    tie: int
    dots: tuple[tuple[int, bool, bool], ...]
    lane: int


def draw_svg(qadg: QADG, tensors: Tensors, picture: Picture) -> str:
    """One SVG element, styled by the classes of page.py; elements of a tie carry its number in `data-t`."""
    placed: list[Placed] = []
    frames: list[Frame] = []
    height = _place(picture.root, 0, MARGIN, placed, frames) + MARGIN
    tracks = place_tracks([rows_dots(one.row) for one in placed])
    lanes = 1 + max((track.lane for track in tracks), default=-1)
    gap = max(MIN_LANE, min(LANE, MAX_LANES_WIDTH / max(lanes, 1)))
    shapes_x = max((one.x + CHARACTER * (len(_label(one.row)) + 3) for one in placed), default=0)
    tracks_x = max((shapes_x + CHARACTER * (len(_shape_text(one.row)) + 3) for one in placed), default=0)
    labels_x = tracks_x + gap * lanes + 6
    axes = [[qadg.axes[number] for number in tie] for tie in picture.ties]
    labels = {tie: tie_label(of_tie, tensors) for tie, of_tie in enumerate(axes)}
    bars = max((_bars_width(of_tie) for of_tie in axes), default=0)
    width = labels_x + CHARACTER * max(map(len, labels.values()), default=0) + bars + 2 * MARGIN + INDENT
    classes = {tie: kind_class(of_tie[0].kind) for tie, of_tie in enumerate(axes)}
    parts = [_draw_frame(frame, width) for frame in sorted(frames, key=lambda frame: frame.depth)]
    lines: dict[int, float] = {}  # how far right the outermost track of each row is
    for track in tracks:
        for number, *_ in track.dots:
            lines[number] = max(lines.get(number, 0), tracks_x + gap * track.lane)
    parts += [_draw_row(one, shapes_x, lines.get(number), classes) for number, one in enumerate(placed)]
    taken: set[int] = set()
    for track in tracks:
        row = next((number for number, *_ in track.dots if number not in taken), track.dots[0][0])
        taken.add(row)
        x, ys = tracks_x + gap * track.lane, [one.y for one in placed]
        shade = f"{classes[track.tie]} s{track.lane % 2}"
        drawn = _draw_track(track, x, ys) + _draw_label(labels[track.tie], x, labels_x, ys[row], axes[track.tie])
        parts.append(f'<g class="tie {shade}" data-t="{track.tie}" tabindex="0">{drawn}</g>')
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size}>\n' + "\n".join(parts) + "\n</svg>"


def rows_dots(row: Row) -> dict[int, tuple[bool, bool]]:
    """Tie -> whether it cuts a first dimension (rows, filters, biases), and a later one (columns), of a row."""
    dots: dict[int, tuple[bool, bool]] = {}
    for cell in row.cells:
        for dim, dimension in enumerate(cell.dimensions):
            for tie, _ in dimension.ties:
                first, later = dots.get(tie, (False, False))
                dots[tie] = (first or dim == 0, later or dim > 0)
    return dots


def place_tracks(dots: Sequence[Mapping[int, tuple[bool, bool]]]) -> list[Track]:
    """A lane for each tie, so that no two lines meet: short ones next to the names, long ones further out."""
    found: dict[int, list[tuple[int, bool, bool]]] = {}
    for number, of_row in enumerate(dots):
        for tie, (first, later) in of_row.items():
            found.setdefault(tie, []).append((number, first, later))
    lanes: list[list[tuple[int, int]]] = []
    tracks = []
    for tie, places in sorted(found.items(), key=lambda item: (item[1][-1][0] - item[1][0][0], item[1][0][0])):
        start, end = places[0][0], places[-1][0]
        lane = next(
            (lane for lane, spans in enumerate(lanes) if all(end < low or high < start for low, high in spans)),
            len(lanes),
        )
        if lane == len(lanes):
            lanes.append([])
        lanes[lane].append((start, end))
        tracks.append(Track(tie, tuple(places), lane))
    return sorted(tracks, key=lambda track: (track.dots[0][0], track.lane))


def tie_label(axes: Sequence[Axis], tensors: Tensors) -> str:
    """How many groups there are and what one weighs, such as "12 attention heads of 197 k parameters"."""
    sizes = [axis.size for axis in axes]
    weights = [group_parameters(axis, tensors) for axis in axes]
    return f"{_span(sizes)} {entries_of(axes[0].kind)} of {_span(weights, format_count)} parameters"


def entries_of(kind: str) -> str:
    """What the entries of an axis of this kind are, in words."""
    return ENTRIES.get(kind, kind.replace("_", " "))


def kind_class(kind: str) -> str:
    """The class that colours a kind."""
    return f"k-{kind}" if kind in COLOURS else "k-other"


def _span(values: Sequence[int], words: Callable[[int], str] = str) -> str:
    low, high = min(values), max(values)
    return words(low) if low == high else f"{words(low)} to {words(high)}"


def _place(block: Block, depth: int, y: float, placed: list[Placed], frames: list[Frame]) -> float:
    """Give every row its line and every block its frame; returns the lower end."""
    x = MARGIN + INDENT * depth
    for item in block.items:
        if isinstance(item, Row):
            placed.append(Placed(item, x, y + LINE / 2))
            y += LINE
        else:
            top = y + PADDING / 2
            y = _place(item, depth + 1, top + TITLE, placed, frames) + PADDING / 2
            frames.append(Frame(item, x - PADDING, top, y, depth))
            y += PADDING + (4 if item.copies > 1 else 0)
    return y


def _label(row: Row) -> str:
    return row.path + (f" {TIMES}{row.copies}" if row.copies > 1 else "")


def _sizes(dimension: Dimension) -> str:
    low, high = min(dimension.sizes), max(dimension.sizes)
    return str(low) if low == high else f"{low}{TO}{high}"


def _attached(row: Row) -> list[Cell]:
    return list(row.cells[1:])


def _shape_text(row: Row) -> str:
    main = row.cells[0]
    if main.tied_to:
        return f"= {main.tied_to}"
    text = f" {TIMES} ".join(map(_sizes, main.dimensions)) or "1"
    names = ", ".join(_last_step(cell) for cell in _attached(row))
    return f"{text}  + {names}" if names else text


def _last_step(cell: Cell) -> str:
    return cell.names[0].rpartition(".")[2]


def _draw_frame(frame: Frame, width: float) -> str:
    x, right = frame.x, width - MARGIN + PADDING - INDENT * frame.depth
    rectangle = '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="8"/>'
    parts = []
    for behind in (2, 1) if frame.block.copies > 1 else ():  # a pile of layers
        shift = 3 * behind
        size = (right - x - 2 * shift, frame.bottom - frame.top)
        parts.append(rectangle.format("pile", x + shift, frame.top + shift, *size))
    parts.append(rectangle.format("frame", x, frame.top, right - x, frame.bottom - frame.top))
    title = f'<text class="title" x="{x + PADDING:.1f}" y="{frame.top + 17:.1f}">{_path(frame.block.path)}'
    if frame.block.copies > 1:
        title += f'<tspan class="copies" dx="8">{TIMES} {frame.block.copies}</tspan>'
    return "".join([*parts, title, "</text>"])


def _path(path: str) -> str:
    """A path with its last step standing out."""
    *before, last = re.split(r"(?<=[^.][.])(?=[^.])", path)  # at single dots, not at those of {0..11}
    return f'<tspan class="dim">{escape("".join(before))}</tspan>{escape(last)}'


def _draw_row(placed: Placed, shapes_x: float, line_end: float | None, classes: Mapping[int, str]) -> str:
    row, y = placed.row, placed.y + 4
    ties = sorted(rows_dots(row))
    copies = f'<tspan class="copies"> {TIMES}{row.copies}</tspan>' if row.copies > 1 else ""
    names = escape("\n".join(name for cell in row.cells for name in fold_names(cell.names)))
    parts = [f'<text x="{placed.x:.1f}" y="{y:.1f}">{_path(row.path)}{copies}<title>{names}</title></text>']
    if line_end is not None:
        start = shapes_x + CHARACTER * (len(_shape_text(row)) + 0.7)
        parts.append(f'<path class="leader" d="M{start:.1f} {placed.y:.1f}H{line_end:.1f}"/>')
    parts.append(f'<text x="{shapes_x:.1f}" y="{y:.1f}">{_draw_shape(row, classes)}</text>')
    parts += _draw_shares(row, shapes_x, y + 3.5, classes)
    return f'<g class="row" data-t="{" ".join(map(str, ties))}">{"".join(parts)}</g>'


def _draw_shape(row: Row, classes: Mapping[int, str]) -> str:
    main = row.cells[0]
    if main.tied_to:
        title = f"<title>{escape(f'the same tensor as {main.tied_to}')}</title>"
        return f'<tspan class="dim">{escape(_shape_text(row))}{title}</tspan>'
    numbers = [_draw_number(_sizes(dimension), dimension, classes) for dimension in main.dimensions]
    text = f'<tspan class="dim"> {TIMES} </tspan>'.join(numbers) or '<tspan class="frozen">1</tspan>'
    names = [
        _draw_number(_last_step(cell), cell.dimensions[0], classes, "small")
        if cell.dimensions
        else f'<tspan class="frozen">{escape(_last_step(cell))}</tspan>'
        for cell in _attached(row)
    ]
    return text + ('<tspan class="dim">  + </tspan>' + '<tspan class="dim">, </tspan>'.join(names) if names else "")


def _draw_number(text: str, dimension: Dimension, classes: Mapping[int, str], more: str = "") -> str:
    """Coloured where it can be pruned, else grey with the reason behind it."""
    if not dimension.ties:
        return (
            f'<tspan class="frozen {more}">{escape(text)}<title>{escape(f"frozen: {dimension.reason}")}</title></tspan>'
        )
    ties = " ".join(str(tie) for tie, _ in dimension.ties)
    colour = classes[dimension.ties[0][0]]
    return f'<tspan class="free {colour} {more}" data-t="{ties}">{escape(text)}</tspan>'


def _draw_shares(row: Row, x: float, y: float, classes: Mapping[int, str]) -> Iterator[str]:
    """Under a size that several axes share, or that one has in part, how much each has."""
    for dimension in row.cells[0].dimensions:
        width = CHARACTER * len(_sizes(dimension))
        if len(dimension.ties) > 1 or any(share < 0.999 for _, share in dimension.ties):
            start = x
            for tie, share in dimension.ties:
                size = f'x="{start:.1f}" y="{y:.1f}" width="{share * width:.1f}" height="2.5"'
                yield f'<rect class="share {classes[tie]}" data-t="{tie}" {size}/>'
                start += share * width
        x += width + 3 * CHARACTER


def _draw_track(track: Track, x: float, ys: Sequence[float]) -> str:
    top, bottom = ys[track.dots[0][0]], ys[track.dots[-1][0]]
    line = f'd="M{x:.1f} {top:.1f}V{bottom:.1f}"'
    parts = [f'<path class="hit" {line}/><path class="track" {line}/>']
    for number, first, later in track.dots:
        place = f'cx="{x:.1f}" cy="{ys[number]:.1f}"'
        if later:
            parts.append(f'<circle class="later" {place} r="4"/>')
        if first:
            parts.append(f'<circle class="first" {place} r="{2 if later else 4.5}"/>')
    return "".join(parts)


def _draw_label(label: str, x: float, labels_x: float, y: float, axes: Sequence[Axis]) -> str:
    names = escape("\n".join(fold_names(axis.name for axis in axes)))
    text = f'<text class="axis" x="{labels_x:.1f}" y="{y + 4:.1f}">{escape(label)}<title>{names}</title></text>'
    stem = f'<path class="stem" d="M{x:.1f} {y:.1f}H{labels_x - 5:.1f}"/>'
    bars_x = labels_x + CHARACTER * (len(label) + 1)
    return stem + text + _draw_bars(axes, bars_x, y + 6)


def _bars_width(axes: Sequence[Axis]) -> float:
    has_bars = len({axis.size for axis in axes}) > 1 and len(axes) <= MAX_BARS
    return BAR * len(axes) + CHARACTER if has_bars else 0


def _draw_bars(axes: Sequence[Axis], x: float, y: float) -> str:
    """The sizes of the axes of folded layers, where they differ."""
    if not _bars_width(axes):
        return ""
    largest = max(axis.size for axis in axes)
    bars = []
    for number, axis in enumerate(axes):
        height = 13 * axis.size / largest
        size = f'x="{x + BAR * number:.1f}" y="{y - height:.1f}" width="{BAR - 1}" height="{height:.1f}"'
        bars.append(f'<rect class="bar" {size}><title>{escape(f"{axis.name}: {axis.size}")}</title></rect>')
    return "".join(bars)
