"""Records as JSON lines, as a table and as a summary."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.zoo.law import Record

MAX_REASON = 120  # letters of an error in a table by type


def write_line(record: Record, path: Path) -> None:
    with path.open("a") as file:
        file.write(json.dumps(dataclasses.asdict(record)) + "\n")


def read_lines(path: Path) -> list[Record]:
    """The newest record of every class in a file of JSON lines."""
    newest = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        values = json.loads(line)
        newest[values["model_type"], values["model_class"]] = Record(**values)
    return list(newest.values())


def one_line(record: Record) -> str:
    axes = " ".join(f"{kind}:{count}" for kind, count in record.axes.items())
    names = f"{record.model_type:28} {record.model_class:44}"
    return f"{record.stage:12} {names} {record.seconds:6.1f}s  {axes}  {record.reason}"


def markdown(records: Sequence[Record]) -> str:
    """A table with a row for every model class."""
    lines = [
        "| model type | class | captured | seconds | axes by kind | parameters in prunable slices | equal | why not |",
        "| --- | --- | --- | ---: | --- | ---: | --- | --- |",
    ]
    for record in sorted(records, key=lambda record: (record.model_type, record.model_class)):
        axes = ", ".join(f"{count} {kind}" for kind, count in record.axes.items())
        equal = "yes" if record.lawful else "no" if record.captured else ""
        cells = (
            record.model_type, record.model_class,
            "yes" if record.captured else "no" if record.built else "not built",
            f"{record.build_seconds:.1f}" if record.captured else "", axes,
            f"{record.share:.0%}" if record.captured else "", equal,
            record.reason.replace("|", "\\|"),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def markdown_by_type(records: Sequence[Record]) -> str:
    """A table with a row for every model type; axes, seconds and share are those of its class with the most axes.

    Built, captured and equal count classes.
    """
    lines = [
        "| model type | built | captured | equal | seconds | axes by kind | parameters in prunable slices | why not |",
        "| --- | ---: | ---: | ---: | ---: | --- | ---: | --- |",
    ]
    for model_type, group in sorted(_by_type(records).items()):
        largest = max(group, key=lambda record: sum(record.axes.values()))
        shown = largest.captured
        reasons = dict.fromkeys(record.reason[:MAX_REASON] for record in group if not record.lawful)
        cells = (
            model_type,
            f"{sum(record.built for record in group)} of {len(group)}",
            str(sum(record.captured for record in group)),
            str(sum(record.lawful for record in group)),
            f"{largest.build_seconds:.1f}" if shown else "",
            ", ".join(f"{count} {kind}" for kind, count in largest.axes.items()),
            f"{largest.share:.0%}" if shown else "",
            "; ".join(reasons).replace("|", "\\|"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _by_type(records: Sequence[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.model_type, []).append(record)
    return groups


def summary(records: Sequence[Record]) -> str:
    """What share was built, captured and lawful; by model class and by model type."""
    lines = [_count("model classes", [[record] for record in records])]
    lines.append(_count("model types (all their classes)", list(_by_type(records).values())))
    stages = Counter(record.stage for record in records)
    lines.append("stages: " + ", ".join(f"{stage} {count}" for stage, count in stages.most_common()))
    return "\n".join(lines)


def _count(what: str, groups: Iterable[Sequence[Record]]) -> str:
    groups = list(groups)
    built = [kept for group in groups if (kept := [record for record in group if record.built])]
    captured = [group for group in built if all(record.captured for record in group)]
    counted = [kept for group in captured if (kept := [record for record in group if record.counts])]
    lawful = [group for group in counted if all(record.lawful for record in group)]
    wrong = sum(any(record.stage in ("wrong", "loaded wrong") for record in group) for group in built)
    parts = (
        f"built {len(built)} of {len(groups)}",
        f"captured {len(captured)} ({len(captured) / max(1, len(built)):.1%})",
        f"something to remove in {len(counted)} of them",
        f"lawful {len(lawful)} ({len(lawful) / max(1, len(counted)):.1%})",
        f"wrong without an error {wrong}",
    )
    return f"{what}: " + "; ".join(parts)
