"""A self-contained page around the picture of a search space: legend, tables, light and dark; nothing is fetched."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from hf_geta.graph.blocks import Picture, fold_blocks
from hf_geta.graph.draw import TIMES, draw_svg, entries_of, kind_class, tie_label
from hf_geta.graph.folding import fold_names
from hf_geta.graph.qadg import QADG, Axis
from hf_geta.graph.table import (
    Tensors,
    axis_rows,
    explain_missing_rules,
    format_count,
    frozen_rows,
    totals,
)

THEME = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1c2230; --quiet: #69728a; --frozen: #9aa2b4;
  --line: #dfe3ec; --frame: #f6f7fa; --pile: #eceff5; --frame-line: #d5dae6;
  --attention_head: #4457d8; --kv_group: #1c7fc4; --mlp: #d9660b; --channel: #0b8a6d; --expert_hidden: #a23bb5;
  --embedding: #b8336a; --other: #7a6a10; }
@media (prefers-color-scheme: dark) { :root { --paper: #12151c; --ink: #e8ebf3; --quiet: #99a3ba; --frozen: #6d768b;
  --line: #2b313f; --frame: #191d27; --pile: #161a22; --frame-line: #333b4c;
  --attention_head: #8f9dff; --kv_group: #5cb8f5; --mlp: #ffa057; --channel: #3fcfab; --expert_hidden: #df8cf0;
  --embedding: #ff85b3; --other: #d8c35a; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 28px clamp(14px, 3vw, 44px) 60px; background: var(--paper); color: var(--ink);
  font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 22px; margin: 0; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 15px; margin: 34px 0 8px; }
p { margin: 4px 0 14px; color: var(--quiet); max-width: 78ch; }
code, pre, td.name { font-size: 12px;
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
main { display: flex; flex-wrap: wrap; gap: 26px; align-items: flex-start; }
figure { margin: 0; overflow-x: auto; max-width: 100%; }
aside { position: sticky; top: 16px; flex: 1 1 270px; max-width: 460px; min-width: 240px; padding: 14px 16px;
  border: 1px solid var(--line); border-radius: 10px; font-size: 13px; max-height: calc(100vh - 32px); overflow: auto; }
aside h2 { margin: 0 0 8px; } aside ul { list-style: none; margin: 0; padding: 0; } aside li { margin: 3px 0; }
aside li svg { vertical-align: -3px; margin-right: 7px; } aside code { overflow-wrap: anywhere; }
aside dl { margin: 8px 0 0; } aside dt { color: var(--quiet); margin-top: 7px; } aside dd { margin: 0; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); padding: 5px 10px 5px 0; }
th { color: var(--quiet); font-weight: 500; } .n { text-align: right; }
td.name { overflow-wrap: anywhere; } td.n { white-space: nowrap; font-variant-numeric: tabular-nums; }
pre { padding: 12px 14px; border: 1px solid var(--line); border-radius: 8px; overflow-x: auto; }
.swatch { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 7px; background: var(--c); }
figure svg { display: block; }
"""

PICTURE = """
svg text { fill: var(--ink); white-space: pre; font-size: 12px;
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
svg .title { font-weight: 600; }
svg .dim { fill: var(--quiet); font-weight: 400; } svg .frozen { fill: var(--frozen); } svg .small { font-size: 11px; }
svg .copies { fill: var(--quiet); font-weight: 600; }
svg .frame, svg .pile { fill: var(--frame); stroke: var(--frame-line); } svg .pile { fill: var(--pile); }
.k-attention_head { --c: var(--attention_head); } .k-kv_group { --c: var(--kv_group); } .k-mlp { --c: var(--mlp); }
.k-channel { --c: var(--channel); } .k-expert_hidden { --c: var(--expert_hidden); }
.k-embedding { --c: var(--embedding); } .k-other { --c: var(--other); }
svg .free { fill: var(--c); font-weight: 600; } svg .share, svg .bar { fill: var(--c); }
svg .leader { stroke: var(--line); fill: none; } svg .tie { cursor: pointer; outline: none; }
svg .track { stroke: var(--c); stroke-width: 2.5; fill: none; } svg .hit { stroke: transparent; stroke-width: 13; }
svg .stem { stroke: var(--c); stroke-dasharray: 1 3; fill: none; opacity: .8; }
svg .s1 .track { opacity: .62; } svg .first { fill: var(--c); }
svg .later { fill: var(--paper); stroke: var(--c); stroke-width: 2; } svg .axis { fill: var(--c); }
svg .row, svg .tie { transition: opacity .12s; }
.picking .row:not(.on), .picking .tie:not(.on) { opacity: .16; } .picking .free:not(.on) { fill: var(--frozen); }
.picking .on .track { stroke-width: 4; opacity: 1; }
tr[data-t] { cursor: pointer; } tr.on td { background: color-mix(in srgb, var(--c) 12%, transparent); }
"""

SCRIPT = """
const all = [...document.querySelectorAll("[data-t]")], figure = document.querySelector("figure"),
  panel = document.getElementById("panel"), legend = panel.innerHTML; let pinned = "";
const ties = element => element && element.dataset.t ? element.dataset.t.split(" ") : [];
function show(numbers) {
  figure.classList.toggle("picking", numbers.length > 0);
  for (const element of all) element.classList.toggle("on", ties(element).some(t => numbers.includes(t)));
  panel.innerHTML = numbers.length
    ? numbers.slice(0, 4).map(t => document.getElementById("tie-" + t).innerHTML).join("<hr>") : legend;
}
const under = event => event.target.closest("[data-t]:not([data-t=''])");
for (const kind of ["mouseover", "focusin"])
  document.addEventListener(kind, event => { if (!pinned) show(ties(under(event))); });
document.addEventListener("click", event => {
  const found = under(event);
  if (!found && event.target.closest("aside")) return;
  pinned = found && found !== pinned ? found : ""; show(ties(found && pinned));
});
document.addEventListener("keydown", event => { if (event.key === "Escape") { pinned = ""; show([]); } });
"""


def draw_html(qadg: QADG, tensors: Tensors, title: str) -> str:
    """A page of its own: the picture, its legend, and the tables of what is prunable and what is not, and why."""
    picture = fold_blocks(qadg, tensors)
    missing = explain_missing_rules(qadg)
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}: search space</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{THEME}{PICTURE}</style></head><body>",
        f"<header><h1>{escape(title)}</h1><p>{escape(totals(qadg, tensors))}</p></header>",
        f"<main><figure>{draw_svg(qadg, tensors, picture)}</figure>",
        f'<aside id="panel">{_legend(qadg)}</aside></main>',
        f"<h2>Operators without a rule</h2><pre>{escape(missing)}</pre>" if missing else "",
        _axes_table(qadg, tensors, picture),
        _frozen_table(qadg, tensors),
        *(
            f'<template id="tie-{number}">{_details([qadg.axes[axis] for axis in tie], tensors)}</template>'
            for number, tie in enumerate(picture.ties)
        ),
        f"<script>{SCRIPT}</script></body></html>",
    ]
    return "\n".join(filter(None, parts)) + "\n"


def _legend(qadg: QADG) -> str:
    kinds = dict.fromkeys(axis.kind for axis in qadg.axes)
    items = [f'<li><i class="swatch {kind_class(kind)}"></i>{escape(entries_of(kind))}</li>' for kind in kinds]
    dot = '<svg width="12" height="12"><circle class="{}" cx="6" cy="6" r="4"/></svg>'
    any_kind = kind_class(next(iter(kinds), ""))
    items += [
        f'<li class="{any_kind}">{dot.format("first")}cuts the first dimension: rows, filters, biases</li>',
        f'<li class="{any_kind}">{dot.format("later")}cuts a later one: columns, input channels</li>',
        '<li><svg width="26" height="12"><text class="frozen" x="0" y="10">768</text></svg>grey: not prunable; '
        "rest the pointer on it for the reason</li>",
    ]
    return (
        f"<h2>What goes together</h2><ul>{''.join(items)}</ul><p>A line is an axis: one of its groups is removed from "
        "all weights on it at once. Point at a line for its members, click to keep them; Escape lets go.</p>"
    )


def _details(axes: Sequence[Axis], tensors: Tensors) -> str:
    """All members of a tie."""
    words: dict[str, list[str]] = {}
    for axis in axes:
        for member in axis.members:
            entries = member.indices.shape[1]
            each = f"{entries} {'entry' if entries == 1 else 'entries'} per group"
            words.setdefault(f"dimension {member.dim}, {each}", []).append(member.tensor)
    colour, first = kind_class(axes[0].kind), axes[0]
    lists = (
        f"<dt>{escape(word)}</dt><dd>{'<br>'.join(_code(name) for name in fold_names(names, fold_words=True))}</dd>"
        for word, names in words.items()
    )
    names = "<br>".join(_code(name) for name in fold_names(axis.name for axis in axes))
    label = f"{tie_label(axes, tensors)}{', in each of them' if len(axes) > 1 else ''}"
    return (
        f'<h2><i class="swatch {colour}"></i>{escape(entries_of(first.kind))}</h2>{names}'
        f"<p>{escape(label)}</p><dl>{''.join(lists)}</dl>"
    )


def _axes_table(qadg: QADG, tensors: Tensors, picture: Picture) -> str:
    tie_of = {qadg.axes[axis].name: number for number, tie in enumerate(picture.ties) for axis in tie}
    rows = []
    for row in axis_rows(qadg, tensors):
        numbers = " ".join(str(number) for number in dict.fromkeys(tie_of[name] for name in row.axes if name in tie_of))
        size = f"{len(row.axes)} {TIMES} {row.size:,}" if len(row.axes) > 1 else f"{row.size:,}"
        cells = (
            f'<td class="name"><i class="swatch"></i>{escape(row.name)}</td><td>{escape(row.kind)}</td>'
            f'<td class="n">{size}</td><td class="n">{format_count(row.group_parameters)}</td>'
            f'<td class="n">{format_count(row.parameters)}</td><td class="name">{escape(row.ties)}</td>'
        )
        rows.append(f'<tr class="{kind_class(row.kind)}" data-t="{numbers}">{cells}</tr>')
    heads = (
        '<th>axis</th><th>kind</th><th class="n">groups</th><th class="n">per group</th><th class="n">parameters</th>'
    )
    return f"<h2>Prunable axes</h2><table><tr>{heads}<th>ties together</th></tr>{''.join(rows)}</table>"


def _frozen_table(qadg: QADG, tensors: Tensors) -> str:
    rows = [
        f'<tr><td class="n">{len(names)}</td><td>{escape(reason)}</td><td class="name">{escape(operator)}</td>'
        f'<td class="name">{"<br>".join(escape(name) for name in fold_names(names, fold_words=True))}</td></tr>'
        for reason, operator, names in frozen_rows(qadg, tensors)
    ]
    heads = '<th class="n">dimensions</th><th>because</th><th>says</th><th>which</th>'
    return f"<h2>Not prunable, and why</h2><table><tr>{heads}</tr>{''.join(rows)}</table>" if rows else ""


def _code(name: str) -> str:
    return f"<code>{escape(name)}</code>"
