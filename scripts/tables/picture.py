"""results.json -> results.png and results.svg: accuracy (or F1) against relative BOPs, one curve for each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from tables.summary import SCORES

# Okabe and Ito's palette, which colour-blind readers can tell apart; yellow, too pale for lines, is left out.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#555555"
PANEL_INCHES = (5.2, 4.0)


def draw(results: Mapping[str, Any], folder: Path, stem: str = "results") -> None:
    """Write STEM.png and STEM.svg into `folder`."""
    rows, labels = results["summary"], results["labels"]
    experiments = list(dict.fromkeys(row["experiment"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows if row["budget"] is not None))
    width, height = PANEL_INCHES
    figure, panels = plt.subplots(
        1, len(experiments), figsize=(width * len(experiments), height + 0.6), squeeze=False, layout="constrained"
    )
    for panel, experiment in zip(panels[0], experiments, strict=True):
        mine = [row for row in rows if row["experiment"] == experiment]
        _draw_panel(panel, mine, methods, labels)
        panel.set_title(labels.get(experiment, experiment), fontsize=11)
        panel.set_ylabel(f"{SCORES[mine[0]['metric']]} (%)")
    found = {label: handle for panel in panels[0] for handle, label in zip(*panel.get_legend_handles_labels())}
    figure.legend(
        found.values(),
        found.keys(),
        loc="outside lower center",
        ncols=min(len(found), 2 * len(experiments)),
        frameon=False,
    )
    for ending in ("png", "svg"):
        figure.savefig(folder / f"{stem}.{ending}", dpi=160)
    plt.close(figure)


def _draw_panel(
    panel: Axes, rows: Sequence[Mapping[str, Any]], methods: Sequence[str], labels: Mapping[str, str]
) -> None:
    for row in rows:
        if row["budget"] is None:
            score, spread = 100 * row["score"], 100 * (row["score_spread"] or 0)
            panel.axhline(score, color=GREY, linestyle="--", linewidth=1.2, label=labels.get(row["method"], "dense"))
            panel.axhspan(score - spread, score + spread, color=GREY, alpha=0.12, linewidth=0)
    for number, method in enumerate(methods):
        mine = sorted((row for row in rows if row["method"] == method), key=lambda row: row["relative_bops"])
        if not mine:
            continue
        spreads = [row["score_spread"] for row in mine]
        panel.errorbar(
            [100 * row["relative_bops"] for row in mine],
            [100 * row["score"] for row in mine],
            yerr=None if None in spreads else [100 * spread for spread in spreads],
            color=COLORS[number % len(COLORS)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=5,
            linewidth=1.6,
            capsize=3,
            label=labels.get(method, method),
        )
    panel.set_xscale("log")
    panel.set_xlabel("relative BOPs (%), log scale")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
