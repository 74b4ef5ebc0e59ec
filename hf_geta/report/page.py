"""A compressed folder as one self-contained page: figures, picture, tables; light and dark; nothing is fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from hf_geta.graph.page import THEME
from hf_geta.report.figures import figure_rows, with_dense
from hf_geta.report.folder import Contents, clean
from hf_geta.report.picture import ON_PAGE, draw_layers
from hf_geta.report.terminal import AXIS_HEADS, LAYER_HEADS, axis_cells, layer_cells

OWN_STYLE = """
table { width: auto; } td, th { padding-right: 22px; } .figures td:last-child { font-weight: 600; }
details { margin-top: 30px; } summary { cursor: pointer; font-size: 15px; font-weight: 600; margin-bottom: 8px; }
"""
NAMES = {"axis", "kind", "layer"}  # columns of words


def draw_page(contents: Contents, title: str) -> str:
    """The page's text; whatever a folder says is shown as text, never as markup."""
    heading = escape(clean(title))
    figures = figure_rows(with_dense(contents.dense, contents.compressed))
    picture = draw_layers(contents.axes, contents.widths, ON_PAGE) if contents.axes or contents.widths else ""
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{heading}: compression</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{THEME}{OWN_STYLE}</style></head><body>",
        f"<header><h1>{heading}</h1><p>{escape(contents.model_class)}, compressed by GETA</p></header>",
        f'<div class="figures">{_table(figures[0], figures[1:])}</div>',
        f"<h2>Layer by layer</h2><figure>{picture}</figure>" if picture else "",
        _folded("Groups of every axis", _table(AXIS_HEADS, axis_cells(contents))) if contents.axes else "",
        _folded("Every layer", _table(LAYER_HEADS, layer_cells(contents))),
        _folded("Settings", _pairs({**contents.settings, **contents.versions})) if contents.settings else "",
        "</body></html>",
    ]
    return "\n".join(filter(None, parts)) + "\n"


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    classes = ["name" if number == 0 else "w" if head in NAMES else "n" for number, head in enumerate(heads)]
    head = "".join(f'<th class="{kind}">{escape(text)}</th>' for kind, text in zip(classes, heads, strict=True))
    body = (
        "".join(f'<td class="{kind}">{escape(cell)}</td>' for kind, cell in zip(classes, row, strict=True))
        for row in rows
    )
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{cells}</tr>' for cells in body)}</table>"


def _pairs(values: Mapping[str, str]) -> str:
    return _table(["setting", "value"], [[key, value] for key, value in values.items()])
