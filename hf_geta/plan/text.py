"""A plan as text, and as plain JSON values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from hf_geta.graph.table import axis_rows, format_count, frozen_rows, to_dict, totals
from hf_geta.plan.devices import Communication, Memory
from hf_geta.plan.plan import Plan

COLUMNS = ("axis", "kind", "groups", "per group", "parameters")
ESTIMATE = (
    "counted on a step without numbers; not counted: what the device, its libraries and its allocator take beside it"
)


def format_plan(plan: Plan) -> str:
    """The plan for a terminal."""
    sections = [
        f"{plan.architecture} ({plan.source}), {format_count(plan.dense.parameters)} parameters",
        _search_space(plan),
        _stages(plan),
        _outcomes(plan),
        _memory(plan, plan.memory),
        _communication(plan.communication) if plan.communication else "",
        "\n".join(f"Note: {note}" for note in plan.notes),
    ]
    return "\n\n".join(filter(None, sections))


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """The plan in plain JSON values; bytes are numbers, the search space is that of `hf-geta graph --json`."""
    fields = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    space = to_dict(fields.pop("qadg"), fields.pop("tensors"))
    return {**_plain(fields), "search_space": space}


def format_bytes(size: float) -> str:
    """Decimal: 640 B, 1.23 kB, 4.94 GB."""
    for unit, suffix in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= 0.9995 * unit:
            return f"{size / unit:.3g} {suffix}" if size < 999.5 * unit else f"{size / unit:,.0f} {suffix}"
    return f"{size:.0f} B"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def _search_space(plan: Plan) -> str:
    rows = [COLUMNS]
    for row in axis_rows(plan.qadg, plan.tensors):
        size = str(row.size) if len(row.axes) == 1 else f"{len(row.axes)} x {row.size}"
        rows.append((row.name, row.kind, size, format_count(row.group_parameters), format_count(row.parameters)))
    frozen = [
        f"{len(dimensions):>7}  {reason}" + (f" ({operator})" if operator and operator not in reason else "")
        for reason, operator, dimensions in frozen_rows(plan.qadg, plan.tensors)
    ]
    lines = [_table(rows, left=2), "", totals(plan.qadg, plan.tensors)]
    if frozen:
        lines += ["Dimensions that stay, and why:", *frozen]
    return "\n".join(lines)


def _stages(plan: Plan) -> str:
    rows = [("stage", "steps", "first", "what happens")]
    rows += [(stage.name, f"{stage.steps:,}", f"{stage.first:,}", stage.what) for stage in plan.stages]
    shapes = ", ".join(f"{name} {tuple(shape)}" for name, shape in plan.batch.items())
    times = f" x {plan.accumulation} batches" if plan.accumulation > 1 else ""
    processes = f" in each of {plan.processes} processes" if plan.processes > 1 else ""
    return f"{plan.total_steps:,} optimizer steps, each of {shapes}{times}{processes}:\n" + _table(
        rows, left=1, last=True
    )


def _outcomes(plan: Plan) -> str:
    columns = [plan.dense, *plan.ends]
    rows = [("the model", *(one.title for one in columns))]
    rows.append(("pruning groups", *(f"{one.groups:,}" for one in columns)))
    rows.append(("parameters", *(format_count(one.parameters) for one in columns)))
    rows.append(("weight file", *(format_bytes(one.file_bytes) for one in columns)))
    rows.append(("relative BOPs", *(f"{one.relative_bops:.2%}" for one in columns)))
    lines = [_table(rows, left=1)]
    if plan.budget:
        unit, target, least, start = dataclasses.astuple(plan.budget)
        values = [f"{one:.4g}" if unit != "bytes" else format_bytes(one) for one in (target, least, start)]
        name = "relative BOPs" if unit != "bytes" else "the weight file"
        lines.append(
            f"Budget: {name} at {values[0]}, within reach (from {values[1]} to {values[2]}); a price decides which "
            "groups and bits go."
        )
    elif plan.groups_to_remove:
        fewest, most = sorted(one.parameters for one in plan.extremes)
        smallest, largest = sorted(one.file_bytes for one in plan.extremes)
        lines.append(
            f"{plan.groups_to_remove:,} of {plan.groups:,} groups go, here the same share of every axis. Which ones is "
            f"learned: {format_count(fewest)} to {format_count(most)} parameters, {format_bytes(smallest)} to "
            f"{format_bytes(largest)} may be left."
        )
    return "\n".join(lines)


def _memory(plan: Plan, memory: Memory) -> str:
    rows = [("memory of a device", "bytes")]
    rows.append(("weights and quantizers", format_bytes(memory.weights)))
    rows.append(("gradients", format_bytes(memory.gradients)))
    if memory.buckets:
        rows.append(("DDP's copy of the gradients", format_bytes(memory.buckets)))
    rows.append((f"states of {plan.optimizer}", _known(memory.optimizer)))
    rows.append(("pruning groups of QASSO", format_bytes(memory.search_space)))
    rows.append(("entries that a period forgets", format_bytes(memory.redundant)))
    rows.append((f"activations of a batch, {plan.precision}", _known(memory.activations)))
    rows.append(("an optimizer step beside all that", _known(memory.optimizer_step)))
    rows.append(("peak", _known(memory.peak)))
    why = f"\nUnknown here: {memory.unknown}" if memory.unknown else ""
    sharded = f"\n{line}" if (line := _sharded(plan, memory)) else ""
    return f"{_table(rows, left=1)}\n({ESTIMATE}){why}{sharded}"


def _known(size: int | None) -> str:
    return "?" if size is None else format_bytes(size)


def _sharded(plan: Plan, memory: Memory) -> str:
    """What would be left of what DDP keeps whole on each device, if its processes shared it (FSDP, ZeRO)."""
    if plan.communication is None or memory.optimizer is None:
        return ""
    whole = memory.weights + memory.gradients + memory.optimizer
    return (
        f"Sharded over {plan.processes} devices, weights, gradients and states would take "
        f"{format_bytes(whole / plan.processes)} of each instead of {format_bytes(whole)}, without a copy of gradients."
    )


def _communication(sent: Communication) -> str:
    size = {name: format_bytes(count) for name, count in dataclasses.asdict(sent).items()}
    messages = "1 message" if sent.decision_messages == 1 else f"{sent.decision_messages} messages"
    return (
        f"Each step all-reduces {size['gradients']} of gradients without compression, and with it "
        f"{size['quantizer_gradients']} more; its forward broadcasts {size['buffers']} (0 B with "
        f"ddp_broadcast_buffers: false). Each pruning period broadcasts {size['decision']} in {messages}, the "
        f"cool-down {size['final_widths']} once. Calibration all-reduces {size['calibration']} before the first step.\n"
        "In pieces (FSDP2), beside what their engine sends, each step all-reduces the same of quantizers, in "
        f"projection and joint stage {size['scores']} of scores, and in the joint stage at most {size['forgotten']} of "
        f"what is forgotten; where widths move at once, weights are gathered, {size['moved_weights']} at most, in turn."
    )


def _table(rows: Sequence[Sequence[str]], left: int, last: bool = False) -> str:
    """Columns side by side: the first `left` (and the last, if so) flush left, numbers flush right; a rule below."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        words = [
            cell.ljust(width) if number < left or (last and number == len(widths) - 1) else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(words).rstrip()

    return "\n".join([line(rows[0]), line(["-" * width for width in widths]), *map(line, rows[1:])])
