"""The search space as a table, and as plain JSON values: what a user reads of a QADG."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hf_geta.graph.folding import common_path, fold_names, unfold_name
from hf_geta.graph.qadg import QADG, Axis, Member
from hf_geta.graph.tracing import named_tensors

MAX_NAMES = 4  # folded names in one line about what is frozen
COLUMNS = ("axis", "kind", "groups", "per group", "parameters", "ties together")
RULE_EXAMPLE = """\
    from hf_geta.graph.rules import rule

    @rule("{operator}")
    def my_rule(axes, x, *others):       # the arguments of its schema: tensors as their axes
        axes.freeze(x[-1], "it mixes")   # dimensions whose entries depend on each other
        return x                         # the axes of the result, one per dimension"""


@dataclass(frozen=True)
class Tensors:
    """The shapes of a model's tensors by every name, in its order; which names are tied to an earlier one; buffers."""

    shapes: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str] = field(default_factory=dict)
    buffers: frozenset[str] = frozenset()

    @classmethod
    def of(cls, model: nn.Module) -> Tensors:
        """Those of `model`, which may be on the meta device."""
        tensors = named_tensors(model)
        first_names = {id(tensor): name for name, tensor in reversed(tensors.items())}
        tied = {name: first for name, tensor in tensors.items() if (first := first_names[id(tensor)]) != name}
        buffers = frozenset(name for name, tensor in tensors.items() if not isinstance(tensor, nn.Parameter))
        return cls({name: tuple(tensor.shape) for name, tensor in tensors.items()}, tied, buffers)

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Every parameter once."""
        return {
            name: shape for name, shape in self.shapes.items() if name not in self.tied and name not in self.buffers
        }


@dataclass(frozen=True)
class AxisRow:
    """Axes that are alike but for the number of their layer.

    Attributes:
        name: one folded name for all, such as "model.layers.{0..31}.mlp.hidden".
        axes: their own names.
        size: pruning groups of each.
        group_parameters: parameters of one group; what an axis of another dimension cuts too counts for both.
        ties: what goes together, in words.
    """

    name: str
    axes: tuple[str, ...]
    kind: str
    size: int
    group_parameters: int
    ties: str

    @property
    def parameters(self) -> int:
        """Parameters of all groups of all these axes."""
        return len(self.axes) * self.size * self.group_parameters


def axis_rows(qadg: QADG, tensors: Tensors) -> list[AxisRow]:
    """The axes in the order of the model, those of identical layers in one row."""
    alike: dict[Any, list[Axis]] = {}
    for axis in qadg.axes:
        alike.setdefault(_signature(axis, tensors), []).append(axis)
    rows = []
    for axes in alike.values():
        of_all = (axes[0].kind, axes[0].size, group_parameters(axes[0], tensors), describe_ties(axes[0], tensors))
        names = {axis.name for axis in axes}
        for folded in fold_names(axis.name for axis in axes):
            rows.append(AxisRow(folded, tuple(name for name in unfold_name(folded) if name in names), *of_all))
    order = {axis.name: number for number, axis in enumerate(qadg.axes)}
    return sorted(rows, key=lambda row: min(order[name] for name in row.axes))


def group_parameters(axis: Axis, tensors: Tensors) -> int:
    """Parameters that one entry of the axis owns; buffers do not count."""
    members = (member for member in axis.members if member.tensor not in tensors.buffers)
    return sum(_entries(member, tensors.shapes[member.tensor]) for member in members)


def prunable_parameters(qadg: QADG, tensors: Tensors) -> int:
    """Parameters that are in at least one group."""
    owned: Counter[tuple[str, int]] = Counter()
    for axis in qadg.axes:
        for member in axis.members:
            owned[member.tensor, member.dim] += math.prod(member.indices.shape)
    total = 0
    for name, shape in tensors.parameters.items():
        kept = math.prod(size - owned[name, dim] for dim, size in enumerate(shape))
        total += math.prod(shape) - kept
    return total


def describe_ties(axis: Axis, tensors: Tensors) -> str:
    """What an axis ties together, in words: "q_proj, k_proj, v_proj rows; o_proj columns"."""
    shared = _shared_steps(axis)
    described: dict[str, list[str]] = {}
    for member in axis.members:
        steps = member.tensor.split(".")
        is_vector = len(tensors.shapes[member.tensor]) == 1
        relative, tensor = steps[shared:-1], steps[-1]
        if not relative or (tensor != "weight" and not is_vector):
            relative = [*relative, tensor]
        described.setdefault(_word(member, tensors), []).append(".".join(relative))
    vectors = described.pop(VECTORS, [])
    matrices = {name for names in described.values() for name in names}
    if alone := [name for name in vectors if name not in matrices]:  # no biases of what is named anyway
        described[VECTORS] = alone
    return "; ".join(f"{_listed(names)} {word}" for word, names in described.items())


def frozen_rows(qadg: QADG, tensors: Tensors) -> list[tuple[str, str, tuple[str, ...]]]:
    """Reason, operator and the dimensions of parameters ("tensor[dim]") that it froze, the most first."""
    dimensions: dict[tuple[str, str], list[str]] = {}
    for frozen in qadg.frozen:
        found = [name for name in frozen.dimensions if name.rpartition("[")[0] not in tensors.buffers]
        if found:
            dimensions.setdefault((frozen.reason, frozen.operator), []).extend(found)
    rows = [(reason, operator, tuple(found)) for (reason, operator), found in dimensions.items()]
    return sorted(rows, key=lambda row: -len(row[2]))


def missing_rules(qadg: QADG) -> dict[str, list[str]]:
    """Operators without a rule that froze something -> the modules that call them."""
    modules: dict[str, dict[str, None]] = {}
    for frozen in qadg.frozen:
        if found := re.match(r"(?:no rule for|the rule for) ([^ ]+)", frozen.reason):
            modules.setdefault(found[1].rstrip(":"), {})[frozen.module or "the model itself"] = None
    return {operator: list(names) for operator, names in modules.items()}


def explain_missing_rules(qadg: QADG) -> str:
    """Which operators in which modules have no rule, what that costs, and how to add one; empty if all have."""
    lines = []
    for operator, modules in missing_rules(qadg).items():
        lines.append(f"No rule fits {operator}, called in {_some(fold_names(modules))}.")
    if not lines:
        return ""
    library, _, rest = next(iter(missing_rules(qadg))).partition(".")
    lines += [
        "That is safe: what these operators touch is not pruned, it only costs compression. To gain it, write a rule:",
        "",
        RULE_EXAMPLE.format(operator=f"{library}::{rest.partition('.')[0]}"),
        "",
        "in a file of your own, and pass it with --rules FILE.py (in Python: import it before build_qadg).",
    ]
    return "\n".join(lines)


def format_table(qadg: QADG, tensors: Tensors) -> str:
    """The whole search space as text: prunable axes, what is frozen and why, totals, operators without a rule."""
    cells = [COLUMNS]
    for row in axis_rows(qadg, tensors):
        size = str(row.size) if len(row.axes) == 1 else f"{len(row.axes)} x {row.size}"
        numbers = (format_count(row.group_parameters), format_count(row.parameters))
        cells.append((row.name, row.kind, size, *numbers, row.ties))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    table = [_line(row, widths) for row in cells]
    table.insert(1, _line(["-" * width for width in (*widths[:-1], len(COLUMNS[-1]))], widths))
    frozen = [_describe_frozen(*row) for row in frozen_rows(qadg, tensors)]
    sections = ["\n".join(table), totals(qadg, tensors)]
    if frozen:
        sections.append("\n".join(["Not prunable, and why:", *frozen]))
    return "\n\n".join(filter(None, [*sections, explain_missing_rules(qadg)]))


def totals(qadg: QADG, tensors: Tensors) -> str:
    """One sentence: how many groups on how many axes, and the share of parameters in them."""
    groups = sum(axis.size for axis in qadg.axes)
    total, prunable = sum(map(math.prod, tensors.parameters.values())), prunable_parameters(qadg, tensors)
    share = f"{100 * prunable / total:.1f} %" if total else "none"
    axes = "1 axis" if len(qadg.axes) == 1 else f"{len(qadg.axes)} axes"
    return f"{groups:,} groups on {axes}; {share} of {format_count(total)} parameters lie in prunable slices."


def to_dict(qadg: QADG, tensors: Tensors) -> dict[str, Any]:
    """The search space in plain JSON values, nothing folded."""
    return {
        "axes": [
            {
                "name": axis.name,
                "kind": axis.kind,
                "size": axis.size,
                "group_parameters": group_parameters(axis, tensors),
                "members": [
                    {"tensor": member.tensor, "dim": member.dim, "entries_per_group": member.indices.shape[1]}
                    for member in axis.members
                ],
            }
            for axis in qadg.axes
        ],
        "frozen": [
            {
                "reason": frozen.reason,
                "operator": frozen.operator,
                "module": frozen.module,
                "dimensions": list(frozen.dimensions),
            }
            for frozen in qadg.frozen
        ],
        "groups": sum(axis.size for axis in qadg.axes),
        "parameters": sum(map(math.prod, tensors.parameters.values())),
        "prunable_parameters": prunable_parameters(qadg, tensors),
    }


def format_count(number: float) -> str:
    """A count in four characters or so: 64, 1.23 k, 86.6 M, 7.24 B."""
    for unit, suffix in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= 0.9995 * unit:
            scaled = number / unit
            return f"{scaled:.{max(0, 2 - int(math.log10(max(scaled, 1))))}f}{suffix}"
    return str(int(number))


VECTORS = "entries"


def _signature(axis: Axis, tensors: Tensors) -> tuple[Any, ...]:
    """Equal for axes that differ only in where they are."""
    shared = _shared_steps(axis)
    members = tuple(
        (*member.tensor.split(".")[shared:], member.dim, tuple(member.indices.shape), tensors.shapes[member.tensor])
        for member in axis.members
    )
    return axis.kind, axis.size, members


def _shared_steps(axis: Axis) -> int:
    """How many steps the modules of an axis have in common, without a list whose entries differ."""
    paths = [member.tensor.split(".")[:-1] for member in axis.members]
    shared = len(common_path(paths))
    is_list = any(path[shared].isdecimal() for path in paths if len(path) > shared)
    return max(shared - 1, 0) if is_list else shared


def _listed(names: Sequence[str]) -> str:
    return ", ".join(
        ", ".join(unfold_name(name)) if name.startswith("{") and "." not in name else name
        for name in fold_names(names, fold_words=True)
    )


def _entries(member: Member, shape: Sequence[int]) -> int:
    return member.indices.shape[1] * math.prod(size for dim, size in enumerate(shape) if dim != member.dim)


def _word(member: Member, tensors: Tensors) -> str:
    dims = len(tensors.shapes[member.tensor])
    if dims == 1:
        return VECTORS
    if dims == 2:
        return ("rows", "columns")[member.dim]
    if member.dim < 2 and member.tensor.endswith(".weight"):
        return ("filters", "input channels")[member.dim]
    return f"dimension {member.dim}"


def _describe_frozen(reason: str, operator: str, dimensions: Sequence[str]) -> str:
    by = f" ({operator})" if operator and operator not in reason else ""
    return f"  {len(dimensions):>5}  {reason}{by}: {_some(fold_names(dimensions, fold_words=True))}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [
        cell.rjust(width) if number in (2, 3, 4) else cell.ljust(width)
        for number, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()
