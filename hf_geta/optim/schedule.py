"""The run's timetable: optimizer step -> stage, width bound, number of redundant groups. Pure.

Time is a function of the step alone, so resuming a run needs nothing but its step, and the timetable if its length
changes.
"""

from __future__ import annotations

import dataclasses
import enum
import math

from hf_geta.config import WIDTHS, GETAConfig


class Stage(enum.IntEnum):
    """The four stages of QASSO (GETA, Algorithm 2); the number is what the logs show."""

    WARMUP = 1
    PROJECTION = 2
    JOINT = 3
    COOLDOWN = 4

    @property
    def label(self) -> str:
        """The stage as users read it."""
        return {1: "warm-up", 2: "projection", 3: "joint", 4: "cool-down"}[self]


@dataclasses.dataclass(frozen=True)
class Period:
    """One of the equal parts of a stage: its number, this step's place in it, and its length in steps."""

    index: int
    offset_steps: int
    length_steps: int

    @property
    def is_first_step(self) -> bool:
        """Whether this step opens the period."""
        return self.offset_steps == 0

    @property
    def is_last_step(self) -> bool:
        """Whether this step closes the period."""
        return self.offset_steps == self.length_steps - 1


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Stages over the optimizer steps `0 .. total_steps - 1`, in this order; the cool-down takes what is left.

    Raises:
        ValueError: when the stages do not fit the run, or a stage is too short for its periods.
    """

    total_steps: int
    warmup_steps: int
    projection_steps: int
    joint_steps: int
    pruning_periods: int
    initial_bits: int
    bit_reduction: int

    @classmethod
    def from_config(cls, config: GETAConfig, total_steps: int) -> Schedule:
        """The timetable of a run of `total_steps` optimizer steps; shares become steps here."""

        def steps(value: float) -> int:
            return int(value) if value >= 1 else math.floor(value * total_steps)

        schedule = cls(
            total_steps=total_steps,
            warmup_steps=steps(config.warmup_steps),
            projection_steps=steps(config.projection_steps),
            joint_steps=steps(config.joint_steps),
            pruning_periods=config.pruning_periods,
            initial_bits=config.initial_bits,
            bit_reduction=config.bit_reduction,
        )
        schedule.check(config)
        return schedule

    def check(self, config: GETAConfig) -> None:
        """Refuse a run that could not reach the targets of `config`."""
        if (stages := self.first_cooldown_step) >= self.total_steps:
            raise ValueError(
                f"warm-up ({self.warmup_steps}), projection ({self.projection_steps}) and joint ({self.joint_steps}) "
                f"take {stages} of the run's {self.total_steps} optimizer steps and leave none for the cool-down: "
                "train longer (num_train_epochs, max_steps) or shorten the stages."
            )
        if config.prunes and self.joint_steps < self.pruning_periods:
            raise ValueError(
                f"pruning_periods={self.pruning_periods} do not fit the {self.joint_steps} steps of the joint stage: "
                "raise joint_steps (or train longer), or lower pruning_periods."
            )
        for name in WIDTHS:
            bits = config.allowed_bits(name)
            if bits is not None and self.projection_periods(bits[-1]) > self.projection_steps:
                raise ValueError(
                    f"{name}={bits}: from initial_bits={self.initial_bits} down to {bits[-1]} by "
                    f"bit_reduction={self.bit_reduction} takes {self.projection_periods(bits[-1])} periods, more than "
                    f"the {self.projection_steps} steps of the projection stage: raise projection_steps (or train "
                    "longer), raise bit_reduction, or lower initial_bits."
                )

    @property
    def first_joint_step(self) -> int:
        """The first step of the joint stage."""
        return self.warmup_steps + self.projection_steps

    @property
    def first_cooldown_step(self) -> int:
        """The first step of the cool-down."""
        return self.first_joint_step + self.joint_steps

    def resumed(self, step: int, began: Schedule) -> Schedule:
        """The timetable for a run of this one's length that got to `step` by the one that it `began` with.

        Where pruning begins after `step` in both, it is this one. From then on the stages keep their lengths, and only
        the cool-down gets longer or shorter: no pruning period is left out or comes twice. Without a step to go,
        nothing changes.

        Raises:
            ValueError: if no cool-down is left, so that the run would end before its targets hold.
        """
        if step <= min(self.first_joint_step, began.first_joint_step):
            return self
        if step >= self.total_steps:
            return began
        if began.first_cooldown_step >= self.total_steps:
            raise ValueError(
                f"this run got to step {step} of {began.total_steps} planned optimizer steps, and would miss its "
                f"targets with {self.total_steps}: its cool-down begins at step {began.first_cooldown_step}. Resume "
                "with more steps (max_steps, num_train_epochs), or start anew."
            )
        return dataclasses.replace(began, total_steps=self.total_steps)

    def stage_at(self, step: int) -> Stage:
        """The stage of optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return Stage.WARMUP
        if step < self.first_joint_step:
            return Stage.PROJECTION
        if step < self.first_cooldown_step:
            return Stage.JOINT
        return Stage.COOLDOWN

    def projection_periods(self, upper_bits: int) -> int:
        """How many times the upper bound falls on its way from `initial_bits` to `upper_bits`."""
        return math.ceil((self.initial_bits - upper_bits) / self.bit_reduction)

    def upper_bits_at(self, step: int, upper_bits: int) -> int:
        """The upper bound in force after step `step`, in bits; the last projection period has the target itself."""
        if step < self.warmup_steps:
            return self.initial_bits
        if step >= self.first_joint_step:
            return upper_bits
        periods = self.projection_periods(upper_bits)
        index = (step - self.warmup_steps) * periods // self.projection_steps
        return max(self.initial_bits - self.bit_reduction * (index + 1), upper_bits)

    def pruning_period_at(self, step: int) -> Period:
        """The pruning period of a step of the joint stage."""
        position = step - self.first_joint_step
        index = position * self.pruning_periods // self.joint_steps
        first = -(-index * self.joint_steps // self.pruning_periods)
        end = -(-(index + 1) * self.joint_steps // self.pruning_periods)
        return Period(index, position - first, end - first)

    def redundant_count(self, period: int, removed_groups: int) -> int:
        """How many groups are redundant or gone once pruning period `period` has begun, of `removed_groups` in all."""
        return removed_groups * (period + 1) // self.pruning_periods
