"""A table's YAML file -> the runs that it takes. A row is data: a method's name and its changes to a GETAConfig.

    title:       one line
    task:        images (the default), texts or questions
    data, model, training, geta:    settings of every run; an experiment may change them
    budgets:     numbers (target_bops) or mappings of GETAConfig fields
    seeds:       how many
    methods:     NAME: {label, compress: false | geta: {...} | stages: [{geta: {...}}, ...], budgets, teacher,
                 group_sparsity_of}
    experiments: NAME: any of the keys above, over them
    quick:       any of the keys above, over both, for a CPU; `NAME: null` drops a method or an experiment

A run's GETAConfig is `geta`, then the budget, then the method's `geta`, then the stage's: the later one wins. The
stages of a method are runs of the same GETATrainer, one after the other, with equal parts of the steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hf_geta import GETAConfig
from hf_geta.config_checks import refuse_unknown

TABLES = Path(__file__).resolve().parents[2] / "configs" / "tables"
EXPERIMENT_KEYS = ("label", "task", "data", "model", "training", "geta", "budgets", "seeds", "methods")
TABLE_KEYS = (*EXPERIMENT_KEYS, "title", "answer", "experiments", "quick")
ROLES = ("teacher", "group_sparsity_of")  # keys of a method that name another one
METHOD_KEYS = ("label", "compress", "geta", "stages", "budgets", *ROLES)


@dataclasses.dataclass(frozen=True)
class Run:
    """One method at one budget with one seed."""

    name: str
    settings: dict[str, Any]  # plain values that decide the outcome; a finished run with the same ones is kept
    needs: tuple[str, ...]  # runs that must be finished before
    keeps_model: bool  # because another run takes it as its teacher


@dataclasses.dataclass(frozen=True)
class Plan:
    """All runs of a table, each after those that it needs."""

    name: str
    title: str
    quick: bool
    answer: dict[str, Any]  # what the closing table says
    labels: dict[str, str]  # of experiments and methods
    runs: tuple[Run, ...]


def table_names() -> list[str]:
    return sorted(file.stem for file in TABLES.glob("*.yaml"))


def load_plan(table: str | Path, quick: bool = False, seeds: int | None = None, rows: Sequence[str] = ()) -> Plan:
    """The plan of a table by its name, or of a YAML file.

    Args:
        seeds: instead of the file's.
        rows: methods, experiments or EXPERIMENT/METHOD to run, with what those need; all if empty.

    Raises:
        ValueError: for a key, a method or a row that there is not, for fewer than one seed, and for a GETAConfig that
            is refused.
    """
    path = TABLES / f"{table}.yaml" if isinstance(table, str) else table
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    refuse_unknown(f"key of {path.name}", values, TABLE_KEYS)
    labels: dict[str, str] = {}
    runs: dict[str, Run] = {}
    for experiment, spec in _experiments(values, quick).items():
        labels[experiment] = spec.get("label", experiment)
        for method in _methods(spec):
            labels[method] = spec["methods"][method].get("label", method)
        prefix = "quick-" if quick else ""  # both forms may share a folder
        count = spec.get("seeds", 1) if seeds is None else seeds
        if count < 1:
            raise ValueError(f"seeds={count}: write a whole number, 1 or more.")
        runs |= _runs(f"{prefix}{experiment}", experiment, spec, count)
    title, answer = values.get("title", path.stem), values.get("answer", {})
    return Plan(path.stem, title, quick, answer, labels, tuple(_chosen(runs, rows)))


def merged(base: Any, over: Any) -> Any:
    """`over` upon `base`: mappings key by key, anything else replaced."""
    if not (isinstance(base, Mapping) and isinstance(over, Mapping)):
        return over
    return {**base, **{key: merged(base[key], value) if key in base else value for key, value in over.items()}}


def _experiments(values: dict[str, Any], quick: bool) -> dict[str, dict[str, Any]]:
    """Experiment -> its settings: the table's, its own over them, the quick form's over both."""
    shared = {key: values[key] for key in EXPERIMENT_KEYS if key in values}
    specs = {name: merged(shared, own) for name, own in values["experiments"].items()}
    if quick:
        over = values.get("quick", {})
        own = over.get("experiments", {})
        refuse_unknown("key of quick", over, (*EXPERIMENT_KEYS, "experiments"))
        for name in {**specs, **own}:
            base = merged(specs.get(name, shared), {key: over[key] for key in over if key != "experiments"})
            specs[name] = merged(base, own.get(name, {}))
    specs = {name: spec for name, spec in specs.items() if spec is not None}
    for name, spec in specs.items():
        refuse_unknown(f"key of {name}", spec, EXPERIMENT_KEYS)
    return specs


def _methods(spec: Mapping[str, Any]) -> list[str]:
    return [name for name, method in spec["methods"].items() if method is not None]


def _runs(prefix: str, experiment: str, spec: dict[str, Any], seeds: int) -> dict[str, Run]:
    """The runs of one experiment by name, each after those that it needs."""
    methods = {name: spec["methods"][name] for name in _methods(spec)}
    _check_methods(experiment, methods)
    taught_by = {method.get("teacher") for method in methods.values()}
    order = sorted(methods, key=lambda name: _depth(name, methods))
    runs: dict[str, Run] = {}
    for seed in range(seeds):
        for name in order:
            method = methods[name]
            for budget in _budgets(method, spec):
                needs = {
                    role: _run_name(prefix, other, None if _is_dense(methods[other]) else budget, seed)
                    for role in ROLES
                    if (other := method.get(role)) is not None
                }
                settings = {
                    "experiment": experiment,
                    "method": name,
                    "budget": budget,
                    "seed": seed,
                    **({"task": spec["task"]} if "task" in spec else {}),
                    **{key: spec.get(key, {}) for key in ("data", "model", "training")},
                    "stages": _stages(method, spec, budget),
                    "needs": needs,
                }
                run = Run(_run_name(prefix, name, budget, seed), settings, tuple(needs.values()), name in taught_by)
                for other in run.needs:
                    if other not in runs:
                        raise ValueError(f"{run.name} needs {other}, which the table has not: give both one budget.")
                runs[run.name] = run
    return runs


def _check_methods(experiment: str, methods: Mapping[str, Any]) -> None:
    """Refuse unknown keys, and a teacher or another method that the experiment has not."""
    for name, method in methods.items():
        refuse_unknown(f"key of {experiment}, {name}", method, METHOD_KEYS)
        for role in ROLES:
            if (other := method.get(role)) is not None:
                refuse_unknown(f"{role} of {experiment}, {name}", [other], list(methods))


def _depth(name: str, methods: Mapping[str, Any], after: Sequence[str] = ()) -> int:
    """How many methods must have run before this one, which those of `after` need."""
    if name in after:
        raise ValueError(f"{name} needs itself, by way of {', '.join(after)}: drop one teacher or group_sparsity_of.")
    before = [other for role in ROLES if (other := methods[name].get(role)) is not None]
    return max((1 + _depth(other, methods, (*after, name)) for other in before), default=0)


def _is_dense(method: Mapping[str, Any]) -> bool:
    return not method.get("compress", True)


def _budgets(method: Mapping[str, Any], spec: Mapping[str, Any]) -> list[dict[str, Any] | None]:
    """The method's budgets as GETAConfig fields; one None for a dense method, which has none."""
    if _is_dense(method):
        return [None]
    budgets = method.get("budgets", spec.get("budgets", []))
    return [dict(budget) if isinstance(budget, Mapping) else {"target_bops": budget} for budget in budgets]


def _stages(
    method: Mapping[str, Any], spec: Mapping[str, Any], budget: dict[str, Any] | None
) -> list[dict[str, Any] | None]:
    """The GETAConfig fields of each stage; [None] for a run without compression."""
    if budget is None:
        return [None]
    common = {**spec.get("geta", {}), **budget, **method.get("geta", {})}
    stages = [{**common, **(stage.get("geta") or {})} for stage in method.get("stages", [{}])]
    for fields in stages:
        GETAConfig.from_dict(fields)  # refuses before a step is spent
    return list(stages)


def _chosen(runs: Mapping[str, Run], rows: Sequence[str]) -> Iterator[Run]:
    """The runs of the named rows and, before them, what they need."""
    if not rows:
        yield from runs.values()
        return
    keys = {name: _row_keys(run) for name, run in runs.items()}
    known = {key for run_keys in keys.values() for key in run_keys}
    if unknown := sorted(set(rows) - known):
        raise ValueError(f"no row {', '.join(unknown)}; there are {', '.join(sorted(known))}.")
    wanted: set[str] = set()
    for name in reversed(list(runs)):  # those that are needed stand before
        if name in wanted or keys[name] & set(rows):
            wanted |= {name, *runs[name].needs}
    yield from (run for name, run in runs.items() if name in wanted)


def _row_keys(run: Run) -> set[str]:
    experiment, method = run.settings["experiment"], run.settings["method"]
    return {experiment, method, f"{experiment}/{method}"}


def budget_label(budget: Mapping[str, Any] | None) -> str:
    """{"target_bops": 0.01} -> "bops=0.01"; None -> ""."""
    if budget is None:
        return ""
    short = {"target_bops": "bops", "target_size": "size"}
    return ",".join(f"{short.get(k, k)}={_plain(value)}" for k, value in budget.items())


def _plain(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)


def _run_name(prefix: str, method: str, budget: Mapping[str, Any] | None, seed: int) -> str:
    return "--".join(filter(None, [prefix, method, budget_label(budget), f"seed{seed}"]))
