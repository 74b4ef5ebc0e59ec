"""Finished runs -> one row for each experiment, method and budget: mean and spread over the seeds. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tables.plan import budget_label

SCORES = {"accuracy": "accuracy", "f1": "F1"}  # metric -> its name in a table
AVERAGED = (
    "relative_bops",
    "group_sparsity",
    "mean_weight_bits",
    "mean_activation_bits",
    "parameters",
    "file_bytes",
    "seconds",
)


def summarize(runs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per (experiment, method, budget), in the order of the runs.

    Returns:
        rows with `metric`, `score` and `score_spread` (standard deviation over seeds; None for one seed), `difference`
        and `difference_spread` to the dense run of the same seed, the means of the other figures, `seconds_ratio` to
        the dense runs, and `outside` = share of the checked widths that lay outside their bounds; None where unknown.
    """
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    dense: dict[str, dict[int, Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["experiment"], run["method"], budget_label(run["budget"])), []).append(run)
        if run["budget"] is None:
            dense.setdefault(run["experiment"], {})[run["seed"]] = run["figures"]
    return [_row(members, dense.get(experiment, {})) for (experiment, _, _), members in groups.items()]


def _row(members: Sequence[Mapping[str, Any]], dense: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    figures = [member["figures"] for member in members]
    scores = [score_of(values)[1] for values in figures]
    paired = [(m["figures"], dense[m["seed"]]) for m in members if m["seed"] in dense]
    difference = [score_of(mine)[1] - score_of(theirs)[1] for mine, theirs in paired]
    checked = sum(values["widths_checked"] for values in figures)
    first = members[0]
    return {
        **{key: first[key] for key in ("experiment", "method", "budget")},
        "seeds": len(members),
        "metric": score_of(figures[0])[0],
        "score": statistics.mean(scores),
        "score_spread": spread(scores),
        "difference": statistics.mean(difference) if difference else None,
        "difference_spread": spread(difference),
        **{key: statistics.mean(v[key] for v in figures) for key in (*AVERAGED, "exact_match") if key in figures[0]},
        "seconds_ratio": statistics.mean(mine["seconds"] / theirs["seconds"] for mine, theirs in paired)
        if paired
        else None,
        "outside": sum(values["widths_outside"] for values in figures) / checked if checked else None,
    }


def score_of(figures: Mapping[str, Any]) -> tuple[str, float]:
    """(metric, share in [0, 1]) that the rows of an experiment are compared by."""
    metric = next(name for name in SCORES if name in figures)
    return metric, figures[metric]


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation over seeds; None for fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else None


def within_points(rows: Iterable[Mapping[str, Any]], points: float) -> list[dict[str, Any]]:
    """Per experiment and method: the row with the fewest BOPs whose score is at most `points` below dense."""
    best: dict[tuple[str, str], Mapping[str, Any] | None] = {}
    for row in rows:
        if row["budget"] is None:
            continue
        key = (row["experiment"], row["method"])
        before = best.setdefault(key, None)
        close = row["difference"] is not None and 100 * row["difference"] >= -points
        if close and (before is None or row["relative_bops"] < before["relative_bops"]):
            best[key] = row
    return [{"experiment": e, "method": m, "row": row} for (e, m), row in best.items()]


def ranking(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Methods by their mean difference to dense over all experiments and budgets that each of them has, best first."""
    found: dict[str, dict[tuple[str, str], float]] = {}
    for row in rows:
        if row["budget"] is not None and row["difference"] is not None:
            cell = (row["experiment"], budget_label(row["budget"]))
            found.setdefault(row["method"], {})[cell] = row["difference"]
    shared = set.intersection(*(set(cells) for cells in found.values())) if found else set()
    means = {method: statistics.mean(cells[c] for c in shared) for method, cells in found.items() if shared}
    return [
        {"method": method, "difference": value, "cells": len(shared)}
        for method, value in sorted(means.items(), key=lambda item: -item[1])
    ]
