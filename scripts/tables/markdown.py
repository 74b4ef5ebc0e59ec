"""results.json -> results.md: one row for each method and budget, and the answer that the table was made for."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from tables.plan import budget_label
from tables.summary import SCORES, ranking, within_points

COLUMNS = (  # after the scores
    "to dense (points)",
    "relative BOPs",
    "bytes",
    "groups removed",
    "weight bits",
    "activation bits",
    "widths out of range",
    "time / dense",
)
MISSING = "-"


def render(results: Mapping[str, Any], stem: str = "results") -> str:
    """The text of STEM.md, which shows STEM.png."""
    labels, rows = results["labels"], results["summary"]
    sections = [f"# {results['title']}", _circumstances(results)]
    for experiment in dict.fromkeys(row["experiment"] for row in rows):
        mine = [row for row in rows if row["experiment"] == experiment]
        sections.append(f"## {labels.get(experiment, experiment)}")
        sections.append(_extent([run for run in results["runs"] if run["experiment"] == experiment]))
        scores = (f"{SCORES[mine[0]['metric']]} (%)", *["exact match (%)"] * ("exact_match" in mine[0]))
        sections.append(table(("method", "budget", *scores, *COLUMNS), [_cells(row, labels) for row in mine]))
    sections += _answers(results)
    if failed := results["failed"]:
        sections.append("## Not finished\n\n" + "\n".join(f"- `{name}`: {why}" for name, why in failed.items()))
    sections.append(f"![Scores against relative BOPs]({stem}.png)")
    return "\n\n".join(sections) + "\n"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in (columns, *rows)) for i in range(len(columns))]
    lines = [_line(line, widths) for line in (columns, *rows)]
    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
    return f"| {' | '.join(padded)} |"


def _cells(row: Mapping[str, Any], labels: Mapping[str, str]) -> list[str]:
    return [
        labels.get(row["method"], row["method"]),
        budget_text(row["budget"]),
        _mean(100 * row["score"], row["score_spread"], "{:.2f}"),
        *[f"{100 * row.get('exact_match', 0):.2f}"] * ("exact_match" in row),
        MISSING
        if row["budget"] is None or row["difference"] is None
        else _mean(100 * row["difference"], row["difference_spread"], "{:+.2f}"),
        percent(row["relative_bops"]),
        f"{round(row['file_bytes']):,}",
        f"{row['group_sparsity']:.1%}",
        f"{row['mean_weight_bits']:.2f}",
        f"{row['mean_activation_bits']:.2f}",
        MISSING if row["outside"] is None else f"{row['outside']:.1%}",
        MISSING if row["seconds_ratio"] is None else f"{row['seconds_ratio']:.2f}x",
    ]


def _mean(value: float, spread: float | None, form: str) -> str:
    return form.format(value) + ("" if spread is None else f" ± {100 * spread:.2f}")


def percent(share: float) -> str:
    """0.0123 -> "1.23 %", with three significant digits."""
    return f"{100 * share:.3g} %"


def budget_text(budget: Mapping[str, Any] | None) -> str:
    """A budget as readers of the table see it."""
    if budget is None:
        return MISSING
    return f"BOPs {percent(budget['target_bops'])}" if set(budget) == {"target_bops"} else budget_label(budget)


def _circumstances(results: Mapping[str, Any]) -> str:
    where = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    form = "**Quick form**, for a CPU: a smaller model, less data or fewer steps. " if results["quick"] else ""
    return (
        f"{form}Measured on {where['date']} on {where['hardware']}; {versions}. Every figure is of the model loaded "
        "from disk, over all evaluation examples that are named below. "
        "All rows of an experiment take the same number of optimizer steps "
        "from the same start; ± is the standard deviation over seeds. Widths out of range: the share of the widths "
        "that lay outside their bounds at the logged steps from the joint stage on. Time / dense is rough: runs share "
        "the machine with one another and with whatever else it does.\n\n"
        f"```bash\n{shlex.join(['python', 'scripts/reproduce.py', *results['command']])}\n```"
    )


def _extent(runs: Sequence[Mapping[str, Any]]) -> str:
    """How many images or texts, steps and seeds."""
    first = runs[0]["figures"]
    examples = next(key.removeprefix("train_") for key in first if key.startswith("train_"))
    train, evaluation, steps = (f"{first[key]:,}" for key in (f"train_{examples}", f"eval_{examples}", "steps"))
    seeds = len({run["seed"] for run in runs})
    return (
        f"{train} training {examples}, {evaluation} evaluation {examples}, {steps} steps of batch "
        f"{first['batch_size']}, {seeds} seed{'s' * (seeds > 1)}."
    )


def _answers(results: Mapping[str, Any]) -> list[str]:
    answer, labels, rows = results["answer"], results["labels"], results["summary"]
    sections = []
    if (points := answer.get("within_points")) is not None:
        lines = [
            [
                labels.get(found["experiment"], found["experiment"]),
                labels.get(found["method"], found["method"]),
                "none of these budgets" if found["row"] is None else percent(found["row"]["relative_bops"]),
                MISSING if found["row"] is None else f"{100 * found['row']['difference']:+.2f}",
            ]
            for found in within_points(rows, points)
        ]
        head = ("experiment", "method", "fewest relative BOPs", "to dense (points)")
        sections.append(f"## Within {points:g} points of dense\n\n" + table(head, lines))
    if answer.get("ranking") and (ranked := ranking(rows)):
        lines = [[labels.get(r["method"], r["method"]), f"{100 * r['difference']:+.2f}"] for r in ranked]
        title = f"## Mean over the {ranked[0]['cells']} cells that every method has"
        sections.append(f"{title}\n\n" + table(("method", "to dense (points)"), lines))
    return sections
