"""A run's plan: what it can prune, when it does what, what is left in the end, and what a training step takes."""

from __future__ import annotations

import dataclasses
import itertools

from hf_geta.compress import make_layers_of_experts_
from hf_geta.config import WIDTHS, GETAConfig
from hf_geta.graph.qadg import QADG
from hf_geta.graph.table import Tensors
from hf_geta.optim.pricing import Pricing
from hf_geta.optim.qasso import QASSO
from hf_geta.optim.schedule import Schedule, Stage
from hf_geta.plan.devices import Communication, Memory, plan_communication, plan_memory
from hf_geta.plan.memory import tensor_bytes
from hf_geta.plan.outcome import Outcome, Outcomes
from hf_geta.plan.run import Run
from hf_geta.plan.skeleton import create_planned_optimizer, prepare_skeleton_
from hf_geta.preparation import preparation_of


@dataclasses.dataclass(frozen=True)
class PlannedStage:
    """One stage: optimizer steps first .. first + steps - 1."""

    name: str
    first: int
    steps: int
    what: str


@dataclasses.dataclass(frozen=True)
class BudgetPlan:
    """A budget that is within reach: its unit, the cost to end at, the least and the first, all in that unit."""

    unit: str
    target: float
    least: float
    start: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known of a run before it starts; `qadg` and `tensors` say what it can prune."""

    source: str
    architecture: str
    qadg: QADG
    tensors: Tensors
    processes: int
    batch: dict[str, list[int]]
    accumulation: int
    optimizer: str
    precision: str
    total_steps: int
    stages: list[PlannedStage]
    groups: int
    groups_to_remove: int | None
    budget: BudgetPlan | None
    dense: Outcome
    ends: list[Outcome]
    extremes: list[Outcome]
    memory: Memory
    communication: Communication | None
    notes: list[str]


def make_plan(run: Run, processes: int = 1) -> Plan:
    """The plan of a run in `processes` processes; the run's skeleton is prepared in place.

    Raises:
        ValueError: for everything that the trainer would refuse, as far as it needs no numbers.
    """
    model, config, args = run.model, run.geta, run.args
    total_steps = run.total_steps(processes)
    schedule = Schedule.from_config(config, total_steps)  # refuses before a trace is spent
    inputs = run.batch()
    make_layers_of_experts_(model, config)
    tensors = Tensors.of(model)
    dense_gradients = tensor_bytes(p for p in model.parameters() if p.requires_grad)
    prepare_skeleton_(model, config, inputs)
    qasso = create_planned_optimizer(model, total_steps)
    outcomes = Outcomes(model, qasso, tensors)
    budget = None
    if isinstance(targets := qasso.targets, Pricing):
        unit = "relative BOPs" if config.target_bops is not None else "bytes"
        budget = BudgetPlan(unit, targets.budget.target, targets.least, targets.start)
    ends, dense = outcomes.ends, outcomes.dense
    forgotten = (dense.parameters - ends[0].parameters) / config.pruning_periods if config.prunes else 0.0
    qadg, notes = preparation_of(model).qadg, []
    if run.has_teacher:
        notes.append("the teacher's weights and activations are not counted.")
    if config.granularity is None and config.weight_bits is not None:
        notes.append(f"granularity={preparation_of(model).config.granularity!r}, as usual for such a model.")
    if not qadg.can_be_cut:
        notes.append("these groups are zero in the end, not cut out: the file keeps the size of all.")
    return Plan(
        source=run.source,
        architecture=type(model).__name__,
        qadg=qadg,
        tensors=tensors,
        processes=processes,
        batch={name: list(value.shape) for name, value in inputs.items()},
        accumulation=args.gradient_accumulation_steps,
        optimizer=str(getattr(args.optim, "value", args.optim)),
        precision=str(run.precision or model.dtype).removeprefix("torch."),
        total_steps=total_steps,
        stages=plan_stages(schedule, qasso),
        groups=qasso.space.num_groups,
        groups_to_remove=qasso.targets.groups_to_remove,
        budget=budget,
        dense=dense,
        ends=ends,
        extremes=[] if budget else outcomes.extremes,
        memory=plan_memory(run, qasso, inputs, processes, forgotten),
        communication=plan_communication(model, qasso, dense_gradients) if processes > 1 else None,
        notes=notes,
    )


def plan_stages(schedule: Schedule, qasso: QASSO) -> list[PlannedStage]:
    """The stages with what happens in them, in words."""
    what = {
        Stage.WARMUP: "the base optimizer alone",
        Stage.PROJECTION: _falling_widths(schedule, qasso.config),
        Stage.JOINT: _periods(schedule, qasso),
        Stage.COOLDOWN: "groups gone, widths fixed",
    }
    steps = [schedule.warmup_steps, schedule.projection_steps, schedule.joint_steps]
    firsts = [0, *itertools.accumulate(steps)]
    steps.append(schedule.total_steps - firsts[-1])
    return [PlannedStage(stage.label, *row, what[stage]) for stage, row in zip(Stage, zip(firsts, steps), strict=True)]


def _falling_widths(schedule: Schedule, config: GETAConfig) -> str:
    steps = range(schedule.warmup_steps, schedule.warmup_steps + schedule.projection_steps)
    words = []
    for name, what in zip(WIDTHS, ("weights", "embeddings", "activations", "outlying activations"), strict=True):
        if allowed := config.allowed_bits(name):
            uppers = dict.fromkeys([schedule.initial_bits, *(schedule.upper_bits_at(s, allowed[-1]) for s in steps)])
            words.append(f"{what} at most {', '.join(map(str, uppers))} bits")
    return "; ".join(words) or "nothing: no layer is quantized"


def _periods(schedule: Schedule, qasso: QASSO) -> str:
    if not qasso.config.prunes:
        return "nothing: no group is removed"
    count, periods = qasso.targets.groups_to_remove, schedule.pruning_periods
    lengths = f"{periods} periods of {schedule.joint_steps / periods:.4g} steps"
    groups = "as many groups as a price decides" if count is None else f"{count / periods:,.4g} groups each"
    return f"{lengths}, {groups}"
