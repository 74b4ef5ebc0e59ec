#!/usr/bin/env python
"""Regenerates the comparison tables: every method as a configuration of the same trainer, on real data.

    python scripts/reproduce.py TABLE [--quick] [--seeds N] [--data_dir DIR] [--rows NAME ...] [--workers 2]
    python scripts/reproduce.py TABLE [--quick] [--rows NAME ...] --render      Markdown and picture again

TABLE is a file of configs/tables. Runs are independent: each is one JSON in OUTPUT_DIR/TABLE/runs, and a table that was
interrupted goes on where it stopped. It ends with results.json, results.md, results.png and results.svg. Those of the
full form are results-full.*; some rows, ROWS, have results-ROWS.* or results-full-ROWS.*.
`--data_dir` is a folder with local copies (cifar10, fashion_mnist, vit_s14, ...); without it they come from the Hub.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# One thread for each run, one run for each core; threads that wait do not spin. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from runs import run_program
from tables import markdown, picture
from tables.plan import Plan, load_plan, table_names
from tables.run import Folders, execute, finished
from tables.summary import score_of, summarize
from tables.tasks import load_task
from tables.workers import devices, outcomes

from hf_geta.checkpoint.directory import replace_text


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what is missing of a table and write its results; returns them."""
    arguments = _parse(argv)
    folders = Folders(Path(arguments.output_dir) / arguments.table, arguments.data_dir)
    if arguments.workers < 1:
        raise ValueError(f"workers={arguments.workers}: write a whole number, 1 or more.")
    stem = _stem(arguments)
    if arguments.render:
        results = _read(folders.table, stem)
    else:
        plan = load_plan(arguments.table, arguments.quick, arguments.seeds, arguments.rows)
        results = run_table(plan, folders, arguments.workers, _command(arguments))
    write(results, folders.table, stem)
    print(markdown.render(results, stem))
    return results


def run_table(plan: Plan, folders: Folders, workers: int, command: Sequence[str] = ()) -> dict[str, Any]:
    """All results of the plan, from earlier runs or new ones."""
    done: dict[str, dict[str, Any]] = {}
    for run in plan.runs:
        if (result := finished(run, folders, done)) is not None:
            done[run.name] = result
    missing = [run for run in plan.runs if run.name not in done]
    print(f"{len(plan.runs)} runs, {len(done)} of them finished before.", flush=True)
    for settings in {run.settings["experiment"]: run.settings for run in missing}.values():
        load_task(
            settings, folders.data_dir, folders.prepared(settings["experiment"], plan.quick)
        )  # once, for all runs
    failed: dict[str, str] = {}
    job = functools.partial(execute, folders=folders, quick=plan.quick)
    for name, outcome in outcomes(missing, job, workers):
        if isinstance(outcome, dict):
            done[name] = outcome
            figures = outcome["figures"]
            text = f"{score_of(figures)[1]:.2%}, {figures['relative_bops']:.2%} BOPs, {figures['seconds']:.0f} s"
        else:
            failed[name] = text = outcome
        print(f"{len(done) + len(failed)}/{len(plan.runs)} {name}: {text}", flush=True)
    runs = [done[run.name] for run in plan.runs if run.name in done]
    if not runs:
        raise RuntimeError(f"no run of the table finished: {failed}")
    return {
        "table": plan.name,
        "title": plan.title,
        "quick": plan.quick,
        "answer": plan.answer,
        "labels": plan.labels,
        "command": list(command),
        "environment": environment(runs),
        "failed": failed,
        "summary": summarize(runs),
        "runs": runs,
    }


def write(results: dict[str, Any], folder: Path, stem: str = "results") -> None:
    """STEM.json, STEM.md and the picture."""
    replace_text(folder / f"{stem}.json", json.dumps(results, indent=1) + "\n")
    replace_text(folder / f"{stem}.md", markdown.render(results, stem))
    picture.draw(results, folder, stem)


def _read(folder: Path, stem: str) -> dict[str, Any]:
    """The results of an earlier command, with the summary of its runs."""
    path = folder / f"{stem}.json"
    if not path.exists():
        there = ", ".join(sorted(file.name for file in folder.glob("results*.json"))) or "none"
        raise ValueError(f"no {path.name} in {folder}; there is {there}. Add --render to the command that wrote it.")
    results = json.loads(path.read_text(encoding="utf-8"))
    return results | {"summary": summarize(results["runs"])}


def _stem(arguments: argparse.Namespace) -> str:
    """Of the results' files: neither some rows nor the other form may overwrite the results of a whole table."""
    rows = "+".join(sorted(set(arguments.rows))).replace("/", "--")
    return "-".join(["results", *["full"] * (not arguments.quick), *[rows] * bool(rows)])


def environment(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Where and when these runs were made, by which versions: plain values."""
    days = sorted({run["finished"][:10] for run in runs})  # of YYYY-MM-DDTHH:MM:SS
    devices = sorted({run["figures"]["device"] for run in runs} - {"cpu"})
    return {
        "date": " to ".join(dict.fromkeys((days[0], days[-1]))),
        "hardware": ", ".join([*sorted({run["hardware"] for run in runs}), *devices]),
        "versions": runs[0]["versions"],  # those of all, or they would have been repeated
    }


def _command(arguments: argparse.Namespace) -> list[str]:
    """The command line for the results; where folders lay on this machine helps nobody."""
    words = [arguments.table, *["--quick"] * arguments.quick]
    if arguments.seeds is not None:
        words += ["--seeds", str(arguments.seeds)]
    if arguments.rows:
        words += ["--rows", *arguments.rows]
    return words


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=table_names(), help="which table")
    parser.add_argument("--quick", action="store_true", help="small models and few steps, for two CPU cores")
    parser.add_argument("--seeds", type=int, help="number of seeds, instead of the table's")
    parser.add_argument("--data_dir", help="folder with a folder for each data set and pretrained model")
    parser.add_argument("--output_dir", default="outputs/tables", help="folder for the results (default: %(default)s)")
    parser.add_argument("--rows", nargs="+", default=[], metavar="NAME", help="METHOD, EXPERIMENT or EXPERIMENT/METHOD")
    default = len(devices()) or os.cpu_count()
    parser.add_argument("--workers", type=int, default=default, help="processes (default here: %(default)s)")
    parser.add_argument("--render", action="store_true", help="only render the results of this command again")
    return parser.parse_args(argv)


def _program() -> None:
    began = time.perf_counter()
    failures = main()["failed"]
    print(f"{time.perf_counter() - began:.0f} s")
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    run_program(_program)
