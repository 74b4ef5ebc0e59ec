"""Many names that differ in numbers only, written as one: "layers.{0..11}.mlp.hidden"."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence

Steps = tuple[tuple[str, ...], ...]  # per step of a dotted name, its alternatives


def fold_names(names: Iterable[str], fold_words: bool = False) -> list[str]:
    """Few folded names that stand for exactly these, in the order of first appearance.

    Steps that differ in numbers become "{0..11}" or "{0..3,7}" and, with `fold_words`, others "{q,k,v}".
    `unfold_name` is the inverse.
    """
    alike: dict[tuple[str, ...], list[Steps]] = {}
    for name in dict.fromkeys(names):
        steps = tuple(name.split("."))
        template = tuple("" if fold_words or step.isdecimal() else step for step in steps)
        alike.setdefault(template, []).append(tuple((step,) for step in steps))
    folded = []
    for rows in alike.values():
        for place in reversed(range(len(rows[0]))):
            rows = _merge(rows, place)
        folded += [".".join(map(_format, row)) for row in rows]
    return folded


def unfold_name(folded: str) -> list[str]:
    """The names that a folded name stands for."""
    parts = [
        list(_alternatives(part[1:-1])) if part.startswith("{") else [part]
        for part in re.split(r"(\{[^{}]*\})", folded)
    ]
    return ["".join(choice) for choice in itertools.product(*parts)]


def common_path(paths: Sequence[Sequence[str]]) -> list[str]:
    """The steps that all paths begin with."""
    alike = itertools.takewhile(lambda steps: len(set(steps)) == 1, zip(*paths, strict=False))
    return [steps[0] for steps in alike]


def format_numbers(numbers: Iterable[int]) -> str:
    """Whole numbers as ranges: "0..3,7"."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    pairs = (str(first) if first == last else f"{first}..{last}" for first, last in ranges)
    return ",".join(pairs)


def _merge(rows: Sequence[Steps], place: int) -> list[Steps]:
    """One row for all that differ in the alternatives at `place` only."""
    merged: dict[Steps, dict[str, None]] = {}
    for row in rows:
        others = (*row[:place], (), *row[place + 1 :])
        merged.setdefault(others, {}).update(dict.fromkeys(row[place]))
    return [(*others[:place], tuple(found), *others[place + 1 :]) for others, found in merged.items()]


def _format(alternatives: Sequence[str]) -> str:
    if len(alternatives) == 1:
        return alternatives[0]
    are_numbers = all(step.isdecimal() and step == str(int(step)) for step in alternatives)
    return "{" + (format_numbers(map(int, alternatives)) if are_numbers else ",".join(alternatives)) + "}"


def _alternatives(text: str) -> Iterable[str]:
    for part in text.split(","):
        first, dots, last = part.partition("..")
        yield from map(str, range(int(first), int(last) + 1)) if dots else [part]
