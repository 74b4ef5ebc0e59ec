"""QASSO, the quantization-aware structured sparse optimizer, around any torch optimizer (GETA, Algorithm 2).

The base optimizer computes its own step, with its schedule, clipping and decay; QASSO adds one rule per stage:

    warm-up      nothing: the base optimizer, bit for bit
    projection   d moves so that every width lies in [b_l, b_u]; b_u falls to its target
    joint        per period, the least salient groups become redundant: their entries are forgotten,
                 x <- x - gamma Q(x), and are exactly zero from the period's end on
    cool-down    widths moved once to allowed ones and fixed; everything else trains on

Which groups become redundant and which widths are fixed is decided by a `Share` (exactly K groups) or, with a budget,
by a `Pricing` (as many groups and bits as one price leaves).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_geta.agreement import agreed
from hf_geta.config import GETAConfig
from hf_geta.optim.budget import Budget
from hf_geta.optim.clips import move_clips_
from hf_geta.optim.finite import FiniteSteps
from hf_geta.optim.forgetting import step_and_forget_, step_and_forget_blindly_
from hf_geta.optim.pricing import Pricing
from hf_geta.optim.quantizers import NumberedQuantizers
from hf_geta.optim.redundant import RedundantEntries
from hf_geta.optim.schedule import Schedule, Stage
from hf_geta.optim.share import Share
from hf_geta.optim.space import PruningSpace
from hf_geta.optim.widths import WidthTable
from hf_geta.optim.wrapper import OptimizerWrapper
from hf_geta.quantization.quantizers import Quantizer
from hf_geta.sharding import is_cut

logger = logging.getLogger(__name__)


class QASSO(OptimizerWrapper):
    """A torch optimizer that also prunes groups and projects bit widths.

    Args:
        base: any torch optimizer over the model's parameters. Parameters of quantizers are moved to a group of
            their own, with `config.quantizer_learning_rate` and no weight decay; a learning-rate scheduler made
            from this optimizer afterwards drives both.
        config: the targets.
        total_steps: optimizer steps of the whole run.
        space: the model's pruning groups.
        numbered: the model's quantizers; there may be none.
        budget: the cost to end at or below, if a price decides instead of `config.group_sparsity`.

    Raises:
        ValueError: when the stages do not fit `total_steps`, more groups are asked for than may go, the budget is out
            of reach, or `base` cannot step the quantizers.

    Source: Qu et al., CVPR 2025, arXiv 2502.16638, Sec. 5.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        config: GETAConfig,
        total_steps: int,
        space: PruningSpace,
        numbered: NumberedQuantizers,
        budget: Budget | None = None,
    ) -> None:
        self.config, self.budget, self.space = config, budget, space
        self.numbered, self.weights, self.width_sets = numbered, numbered.weights, numbered.width_sets
        # one row per parameter of the space, -1 without a quantizer
        self.quantizer_rows = [numbered.weight_rows.get(name, -1) for name in space.parameter_names]
        _separate_quantizer_parameters_(base, numbered.quantizers, config.quantizer_learning_rate)
        super().__init__(base)
        self._read_grids_(numbered.quantizers)
        self.plan_(total_steps)

    def _read_grids_(self, quantizers: Sequence[Quantizer]) -> None:
        """Note which grids are signed and which widths they may have: a checkpoint of the model may have changed it."""
        # of a model on the meta device, groups and widths are real all the same
        self.widths = WidthTable(quantizers, next((p.device for p in self.space.parameters if not p.is_meta), None))
        device = self.widths.signed.device
        self.space.to(device)
        self.allowed_bits = [self.config.allowed_bits(quantizer.widths) or () for quantizer in quantizers]
        self._lower_bits = torch.tensor([float(bits[0]) for bits in self.allowed_bits], device=device)
        upper = torch.tensor([bits[-1] for bits in self.allowed_bits], device=device)
        self._rows_of_upper = {bits: upper == bits for bits in {bits[-1] for bits in self.allowed_bits}}

    def plan_(self, total_steps: int) -> None:
        """Begin a run of `total_steps` optimizer steps, with the weights, quantizers and base state as they are.

        Raises:
            ValueError: as the constructor.
        """
        self._begin_(Schedule.from_config(self.config, total_steps))

    def _begin_(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.step_count = 0
        self.finite_steps = FiniteSteps(self.space.shards)
        self._are_averaged = False
        # exactly zero by now
        self.removed = torch.zeros(self.space.num_groups, dtype=torch.bool, device=self.widths.signed.device)
        self.redundant = torch.zeros_like(self.removed)  # being forgotten in the present period
        self.final_bits: Tensor | None = None
        self.targets: Share | Pricing
        of_widths = self.widths, self.allowed_bits, self.width_sets
        if self.budget is None:
            self.targets = Share(self.config, self.schedule, self.space, *of_widths)
        else:
            self.targets = Pricing(self.config, self.space, self.weights, *of_widths, self.budget)
        self._cache_index_sets()

    @property
    def groups_to_remove(self) -> int:
        """K; with a budget, as many as the price has chosen so far."""
        asked = self.targets.groups_to_remove
        return int((self.removed | self.redundant).sum()) if asked is None else asked

    def stage_at(self, step: int) -> Stage:
        """The stage of a step, by the timetable; the cool-down, once widths are fixed."""
        return self.schedule.stage_at(step) if self.final_bits is None else Stage.COOLDOWN

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One optimizer step: the base step, then the rule of the stage. None of it where gradients hold NaN or inf.

        Raises:
            FloatingPointError: if they did in many steps in a row.
            ValueError: in the first one, for a layer that training goes around (`NumberedQuantizers.refuse_bypassed`).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._are_averaged:
            self.average_whole_gradients_()
        self._are_averaged = False
        if not self.finite_steps.allow(self.param_groups):
            return loss
        if self.step_count == 0:
            self.numbered.refuse_bypassed()
        stage = self.stage_at(self.step_count)
        if stage is Stage.WARMUP:
            self.base.step()
        elif stage is Stage.PROJECTION:
            self._projection_step()
        elif stage is Stage.JOINT:
            self._joint_step()
        else:
            self._cooldown_step()
        self.step_count += 1
        return loss

    def average_whole_gradients_(self) -> None:
        """Beside parameters in pieces, which their engine reduces: those of quantizers, by one message.

        `step()` does it, unless it was done since the last one: for who clips gradients, once backward has added all.
        """
        self._are_averaged = True
        if not self.space.shards.are_several:
            return
        parameters = [p for group in self.param_groups for p in group["params"] if not is_cut(p)]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients:
            flat = self.space.shards.mean_(torch.cat([gradient.reshape(-1) for gradient in gradients]))
            parts = flat.split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])

    def train(self) -> None:
        """The base optimizer's mode, where it has one; the zeros and the widths hold in both."""
        super().train()
        self._hold_()

    def eval(self) -> None:
        """As `train`."""
        super().eval()
        self._hold_()

    @torch.no_grad()
    def _hold_(self) -> None:
        """Zeros and widths again after a base optimizer with modes has exchanged the parameters for their average."""
        if self.has_modes and self.stage_at(self.step_count) in (Stage.JOINT, Stage.COOLDOWN):
            self.widths.project_(*self.width_bounds())
            self._zero_removed()

    def width_bounds(self) -> tuple[Tensor, Tensor]:
        """(lower, upper) in force after the present step, in bits, (quantizers,) each."""
        if self.final_bits is not None:
            return self.final_bits, self.final_bits
        upper = torch.zeros_like(self._lower_bits)
        for bits, rows in self._rows_of_upper.items():
            upper.masked_fill_(rows, float(self.schedule.upper_bits_at(self.step_count, bits)))
        return self._lower_bits, upper if self.targets.ceilings is None else upper.minimum(self.targets.ceilings)

    def _projection_step(self) -> None:
        self.targets.observe()
        bounds = self.width_bounds()
        if self._bounds_move():
            self._move_widths_(*bounds)
        self.widths.fold_step_size_gradients_(*bounds)
        self.base.step()
        self.widths.project_(*bounds)

    def _bounds_move(self) -> bool:
        """Whether the schedule moves a bound in this step."""
        at = self.schedule.upper_bits_at
        return any(at(self.step_count, bits) != at(self.step_count - 1, bits) for bits in self._rows_of_upper)

    def _move_widths_(self, lower: Tensor, upper: Tensor, kept: Mapping[int, Tensor] | None = None) -> None:
        """Into new bounds, clips and all; `kept` as in `move_clips_`."""
        move_clips_(self.widths, self.weights, lower, upper, kept)
        self.widths.project_(lower, upper)

    def _kept_inputs(self) -> dict[int, Tensor]:
        """Row of a quantizer with blocks -> which inputs of its weight are left, (in,) bool, where some have gone."""
        kept = {}
        for parameter, dim, flags in self.space.flags_along_dims(self.removed):
            row = self.quantizer_rows[parameter]
            blocks = None if row < 0 else self.widths.quantizers[row].blocks
            if blocks is not None and blocks.dim == dim:
                kept[row] = ~flags
        return kept

    def _joint_step(self) -> None:
        period = self.schedule.pruning_period_at(self.step_count)
        self.targets.observe()
        if period.is_first_step:
            self._begin_period(period.index)
        self.widths.fold_step_size_gradients_(*self.width_bounds())
        if self._entries is None:
            self.base.step()
            self.widths.project_(*self.width_bounds())
        else:
            left_steps = period.length_steps - period.offset_steps
            if "joint_rule" in self.config.without:
                step_and_forget_blindly_(self.base, self._entries, self.width_bounds(), left_steps)
            else:
                step_and_forget_(self.base, self._entries, self.width_bounds(), left_steps, self.space.shards)
        self._zero_removed()
        if period.is_last_step:
            self._end_period()

    def _begin_period(self, index: int) -> None:
        self.redundant = agreed(self.targets.decide(index, self.removed).to(self.removed.device))
        if self.targets.ceilings is not None:
            self.targets.ceilings = agreed(self.targets.ceilings)
            self._move_widths_(self.targets.ceilings, self.targets.ceilings)  # wider ones, too
        self._cache_index_sets()

    def _end_period(self) -> None:
        self.removed |= self.redundant
        self.redundant = torch.zeros_like(self.removed)
        self._cache_index_sets()
        self._zero_removed()

    def _cooldown_step(self) -> None:
        if self.final_bits is None:
            self.targets.observe()
            self.final_bits = agreed(self.targets.final_bits(self.removed))
            self._move_widths_(self.final_bits, self.final_bits, self._kept_inputs())
        self.widths.fold_step_size_gradients_(self.final_bits, self.final_bits)
        self.base.step()
        self.widths.project_(self.final_bits, self.final_bits)
        self._zero_removed()

    def _zero_removed(self) -> None:
        for parameter, dim, positions in self._removed_positions:
            parameter.index_fill_(dim, positions, 0)

    def _cache_index_sets(self) -> None:
        """Index tensors of the removed and of the redundant groups; they change once a period."""
        self._removed_positions = self.space.owned_positions(self.removed)
        self._entries = RedundantEntries.build(self.space, self.redundant, self.widths, self.quantizer_rows)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state and, under "qasso", step and timetable, groups, targets and fixed widths."""
        own = {
            "step": self.step_count,
            "schedule": dataclasses.asdict(self.schedule),
            "removed": self.removed,
            "redundant": self.redundant,
            "targets": self.targets.state_dict(),
        }
        if self.final_bits is not None:
            own["final_bits"] = self.final_bits
        return {**super().state_dict(), "qasso": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, for a run of the `total_steps` that this optimizer was made with.

        Raises:
            ValueError: when the state belongs to another search space or to a run without compression, or so few steps
                are left that the targets would be missed (`Schedule.resumed`).
        """
        if "qasso" not in state_dict:
            raise ValueError("this optimizer state has no QASSO part: it was saved by a run without compression.")
        own = state_dict["qasso"]
        if own["removed"].shape != self.removed.shape:
            raise ValueError(
                f"this optimizer state has {len(own['removed'])} pruning groups, the model has {len(self.removed)}: "
                "resume with the model and the configuration that the run began with."
            )
        if set(own["targets"]) != set(self.targets.state_dict()):
            raise ValueError(
                "this optimizer state is of a run with other targets: a budget or a share of groups, as here."
            )
        schedule = self._resumed_schedule(own)
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "qasso"})
        self._read_grids_(self.widths.quantizers)
        self._begin_(schedule)
        device = self.removed.device
        self.step_count = int(own["step"])
        self.removed = own["removed"].to(device, copy=True)
        self.redundant = own["redundant"].to(device, copy=True)
        self.final_bits = own["final_bits"].to(device, copy=True) if "final_bits" in own else None
        self.targets.load_state_dict(own["targets"])
        self._cache_index_sets()

    def _resumed_schedule(self, own: Mapping[str, Any]) -> Schedule:
        planned = Schedule.from_config(self.config, self.schedule.total_steps)
        if "schedule" not in own:  # of an older version
            return planned
        resumed = planned.resumed(int(own["step"]), Schedule(**own["schedule"]))
        if resumed != planned:
            logger.warning(
                "the stages stay as the run began with them, but for the cool-down: from step %d to %d.",
                resumed.first_cooldown_step,
                resumed.total_steps,
            )
        return resumed


def _separate_quantizer_parameters_(base: torch.optim.Optimizer, quantizers: Sequence[Quantizer], lr: float) -> None:
    """Move the quantizers' parameters out of the base optimizer's groups into one without weight decay."""
    parameters = list({id(p): p for q in quantizers for p in q.parameters() if p.requires_grad}.values())
    owned = {id(p) for p in parameters}
    for group in base.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in owned]
    if parameters:
        if isinstance(base, torch.optim.Muon):
            raise ValueError("Muon steps matrices only, and a quantizer has single numbers: use another optimizer.")
        # Adafactor's steps are relative to the parameter, which is a logarithm here, and may choose their own size
        own_step = {name: False for name in ("scale_parameter", "relative_step") if name in base.defaults}
        base.add_param_group({"params": parameters, "lr": lr, "weight_decay": 0.0} | own_step)
