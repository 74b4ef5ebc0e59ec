"""QASSO, the quantization-aware structured sparse optimizer, around any torch optimizer (GETA, Algorithm 2).

The base optimizer computes its own step, with its schedule, clipping and decay; QASSO adds one rule per stage:

    warm-up      nothing: the base optimizer, bit for bit
    projection   d moves so that every width lies in [b_l, b_u]; b_u falls to its target (nothing without quantizers)
    joint        per period, the least salient groups become redundant: their entries are forgotten,
                 x <- x - gamma Q(x), and are exactly zero from the period's end on
    cool-down    widths moved once to the nearest allowed ones and fixed; everything else trains on
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_geta.config import MIXED_SALIENCIES, GETAConfig
from hf_geta.optim import saliency
from hf_geta.optim.choice import choose_least_salient, nearest_reachable
from hf_geta.optim.joint import forget_rate, joint_step_size
from hf_geta.optim.redundant import RedundantEntries
from hf_geta.optim.schedule import Schedule, Stage
from hf_geta.optim.space import PruningSpace
from hf_geta.optim.widths import WidthTable, nearest_allowed
from hf_geta.quantization.quantizers import Quantizer

logger = logging.getLogger(__name__)


class QASSO(torch.optim.Optimizer):
    """A torch optimizer that also prunes groups and projects bit widths.

    Args:
        base: any torch optimizer over the model's parameters. Parameters of quantizers are moved to a group of
            their own, with `config.quantizer_learning_rate` and no weight decay; a learning-rate scheduler made
            from this optimizer afterwards drives both.
        config: the targets.
        total_steps: optimizer steps of the whole run.
        space: the model's pruning groups.
        weight_quantizers: parameter name -> quantizer of that weight.
        input_quantizers: quantizers of activations.

    Raises:
        ValueError: when the stages do not fit `total_steps` or more groups are asked for than may go.

    Source: Qu et al., CVPR 2025, arXiv 2502.16638, Sec. 5.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        config: GETAConfig,
        total_steps: int,
        space: PruningSpace,
        weight_quantizers: Mapping[str, Quantizer],
        input_quantizers: Sequence[Quantizer] = (),
    ) -> None:
        self.config = config
        self.schedule = Schedule.from_config(config, total_steps)
        self.space = space
        weights = list({id(q): q for q in weight_quantizers.values()}.values())
        quantizers = [*weights, *input_quantizers]
        self.widths = WidthTable(quantizers, next((p.device for p in space.parameters), None))
        self.is_weight = torch.tensor([True] * len(weights) + [False] * len(input_quantizers), dtype=torch.bool)
        rows = {id(q): row for row, q in enumerate(quantizers)}
        self.quantizer_rows = [
            rows.get(id(weight_quantizers.get(name)), -1) for name in space.parameter_names
        ]  # one per parameter of the space
        self.groups_to_remove = _groups_to_remove(config, space)
        if isinstance(base, torch.optim.LBFGS):
            raise ValueError(
                "LBFGS takes several steps in one and cannot be followed by a rule: use another optimizer."
            )
        self.base = base
        _separate_quantizer_parameters_(base, quantizers, config.quantizer_learning_rate)
        super().__init__(base.param_groups, base.defaults)
        self._link_to_base()
        self.step_count = 0
        device = self.widths.signed.device
        self.is_weight = self.is_weight.to(device)
        space.to(device)
        self.observed = saliency.observed_kinds(config.saliency)
        self.scores = torch.zeros(len(self.observed), space.num_groups, device=device)  # since the last decision
        self.removed = torch.zeros(space.num_groups, dtype=torch.bool, device=device)  # exactly zero by now
        self.redundant = torch.zeros_like(self.removed)  # being forgotten in the present period
        self.final_bits: Tensor | None = None
        self._cache_index_sets()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One optimizer step: the base step, then the rule of the stage."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stage = self.schedule.stage_at(self.step_count)
        if stage is Stage.WARMUP:
            self.base.step()
        elif stage is Stage.PROJECTION:
            self._observe_saliency()
            self.base.step()
            self.widths.project_(*self.width_bounds())
        elif stage is Stage.JOINT:
            self._joint_step()
        else:
            self._cooldown_step()
        self.step_count += 1
        return loss

    def width_bounds(self) -> tuple[Tensor, Tensor]:
        """(lower, upper) in force after the present step, in bits, (quantizers,) each."""
        if self.final_bits is not None:
            return self.final_bits, self.final_bits
        if self.config.weight_bits is None:
            return self.widths.signed, self.widths.signed  # empty
        weight_bits, input_bits = self.config.weight_bits, self.config.activation_bits or self.config.weight_bits
        lower = self._per_quantizer(float(weight_bits[0]), float(input_bits[0]))
        upper = self._per_quantizer(
            float(self.schedule.upper_bits_at(self.step_count, weight_bits[-1])),
            float(self.schedule.upper_bits_at(self.step_count, input_bits[-1])),
        )
        return lower, upper

    def _per_quantizer(self, weight: float, activation: float) -> Tensor:
        values = torch.full_like(self.widths.signed, activation)
        return values.masked_fill_(self.is_weight, weight)

    def _observe_saliency(self) -> None:
        if self.observed and self.groups_to_remove:
            self.scores += saliency.observe(saliency.first_order(self.space), self.observed)

    def _ranking(self) -> Tensor:
        """What a decision ranks the groups by, (num_groups,)."""
        config, scores = self.config, dict(zip(self.observed, self.scores, strict=True))
        weights = {config.saliency: 1.0}
        if config.saliency == "mix":
            weights = dict(zip(MIXED_SALIENCIES, config.saliency_weights or (1, 1, 1), strict=True))
        if "magnitude" in weights:
            scores["magnitude"] = saliency.magnitude(self.space)
        return saliency.mix(scores, weights, self.space.axis_kinds, self.space.axis_sizes)

    def _joint_step(self) -> None:
        period = self.schedule.pruning_period_at(self.step_count)
        self._observe_saliency()
        if period.is_first_step:
            self._begin_period(period.index)
        if self._entries is None:
            self.base.step()
            self.widths.project_(*self.width_bounds())
        else:
            self._base_step_and_forget(self._entries, period.length_steps - period.offset_steps)
        self._zero_removed()
        if period.is_last_step:
            self._end_period()

    def _base_step_and_forget(self, entries: RedundantEntries, left_steps: int) -> None:
        """The base step; then x <- x - gamma (c + d r) on the redundant entries, with gamma and d as of `joint`."""
        bounds = self.width_bounds()
        before, gradient = entries.gather(), entries.gather_gradients()
        clipped, residual = entries.split_quantized(before)
        self.base.step()
        self.widths.project_(*bounds)
        grad_step = entries.sum(gradient * (entries.gather() - before))
        gamma = forget_rate(
            grad_step,
            entries.sum(gradient * clipped),
            entries.sum(clipped.square()).sqrt(),
            entries.parameter_norms(),
            left_steps,
        )
        grad_residual = entries.sum(gradient * residual)
        gamma, step_size = self._set_joint_step_sizes(entries, gamma, grad_step, grad_residual, bounds)
        entries.subtract_(entries.spread(gamma) * (clipped + entries.spread(step_size) * residual))

    def _set_joint_step_sizes(
        self,
        entries: RedundantEntries,
        gamma: Tensor,
        grad_step: Tensor,
        grad_residual: Tensor,
        bounds: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Apply `joint_step_size` to the tensors that are quantized; (gamma, d) per segment, d = 0 for the others."""
        segments, rows = entries.quantized_segments, entries.quantizer_rows
        finest, coarsest = (bound[rows].exp() for bound in self.widths.step_size_bounds(*bounds))
        log_step_size = self.widths.log_step_size()
        quantized_gamma, quantized_step_size = joint_step_size(
            gamma[segments],
            log_step_size[rows].exp(),
            grad_step[segments],
            grad_residual[segments],
            finest,
            coarsest,
        )
        log_step_size[rows] = quantized_step_size.log()
        self.widths.write_log_step_size_(log_step_size)
        self.widths.project_(*bounds)  # exp and log may have moved a bound by one ulp
        step_size = torch.zeros_like(gamma)
        gamma[segments], step_size[segments] = quantized_gamma, quantized_step_size
        return gamma, step_size

    def _begin_period(self, index: int) -> None:
        count = self.schedule.redundant_count(index, self.groups_to_remove)
        chosen = choose_least_salient(
            self._ranking(),
            self.removed,
            count,
            self.space.axis_sizes,
            self.config.min_groups,
            self.config.group_divisible,
            total=self.groups_to_remove,
        )
        self.redundant = _agreed(chosen.to(self.removed.device))
        self.scores.zero_()
        self._cache_index_sets()

    def _end_period(self) -> None:
        self.removed |= self.redundant
        self.redundant = torch.zeros_like(self.removed)
        self._cache_index_sets()
        self._zero_removed()

    def _cooldown_step(self) -> None:
        if self.final_bits is None:
            self.final_bits = self._nearest_allowed()
        self.widths.fold_step_size_gradients_()
        self.base.step()
        self.widths.project_(self.final_bits, self.final_bits)
        self._zero_removed()

    def _nearest_allowed(self) -> Tensor:
        """The allowed width nearest to each quantizer's own, (quantizers,)."""
        bits, allowed = self.widths.bits(), self.config.allowed_bits
        weights = nearest_allowed(bits, allowed("weight_bits"))
        inputs = nearest_allowed(bits, allowed("activation_bits") or allowed("weight_bits"))
        return weights.where(self.is_weight, inputs)

    def _zero_removed(self) -> None:
        for parameter, dim, positions in self._removed_positions:
            parameter.index_fill_(dim, positions, 0)

    def _cache_index_sets(self) -> None:
        """Index tensors of the removed and of the redundant groups; they change once a period."""
        self._removed_positions = self.space.owned_positions(self.removed)
        self._entries = RedundantEntries.build(self.space, self.redundant, self.widths, self.quantizer_rows)

    # -- what torch, accelerate and Trainer expect of an optimizer ------------------------------------------------

    def _link_to_base(self) -> None:
        self.param_groups, self.state, self.defaults = self.base.param_groups, self.base.state, self.base.defaults

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state and, under "qasso", the step, the groups and the fixed widths."""
        own = {"step": self.step_count, "scores": self.scores, "removed": self.removed, "redundant": self.redundant}
        if self.final_bits is not None:
            own["final_bits"] = self.final_bits
        return {**self.base.state_dict(), "qasso": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: when the state belongs to another search space or to a run without compression.
        """
        if "qasso" not in state_dict:
            raise ValueError("this optimizer state has no QASSO part: it was saved by a run without compression.")
        own = state_dict["qasso"]
        if own["removed"].shape != self.removed.shape:
            raise ValueError(
                f"this optimizer state has {len(own['removed'])} pruning groups, the model has {len(self.removed)}: "
                "resume with the model and the configuration that the run began with."
            )
        self.base.load_state_dict({key: value for key, value in state_dict.items() if key != "qasso"})
        self._link_to_base()
        device = self.removed.device
        self.step_count = int(own["step"])
        self.scores = own["scores"].to(device, copy=True)
        self.removed = own["removed"].to(device, copy=True)
        self.redundant = own["redundant"].to(device, copy=True)
        self.final_bits = own["final_bits"].to(device, copy=True) if "final_bits" in own else None
        self._cache_index_sets()

    def train(self) -> None:
        """For base optimizers with a mode (schedule-free ones)."""
        if hasattr(self.base, "train"):
            self.base.train()

    def eval(self) -> None:
        """For base optimizers with a mode (schedule-free ones)."""
        if hasattr(self.base, "eval"):
            self.base.eval()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer."""
        # torch.optim.Optimizer.__init__ hands over those that are there; by identity, since == would compare tensors
        if any(param_group is group for group in self.base.param_groups):
            self.param_groups.append(param_group)
            return
        self.base.add_param_group(param_group)


def _agreed(flags: Tensor) -> Tensor:
    """Rank 0's choice on every rank: sums on a device may differ in their last bit, and so may a ranking by them."""
    if not (dist.is_available() and dist.is_initialized()):
        return flags
    message = flags.to(torch.uint8)
    dist.broadcast(message, src=0)
    return message.bool()


def _groups_to_remove(config: GETAConfig, space: PruningSpace) -> int:
    """K: round(group_sparsity x groups), or the nearest number that whole blocks reach: half a block away at most."""
    asked = round((config.group_sparsity or 0.0) * space.num_groups)
    limits = space.axis_sizes, config.min_groups, config.group_divisible
    most = nearest_reachable(space.num_groups, *limits)
    if asked > most:
        raise ValueError(
            f"group_sparsity={config.group_sparsity} asks for {asked} of {space.num_groups} groups, but "
            f"min_groups={config.min_groups} and group_divisible={config.group_divisible} let at most {most} go: "
            f"lower group_sparsity to {most / max(space.num_groups, 1):.3f} or relax them."
        )
    count = nearest_reachable(asked, *limits)
    if count != asked:
        logger.warning(
            "group_sparsity=%s asks for %d of %d groups; in whole blocks (group_divisible=%d) %d go.",
            config.group_sparsity,
            asked,
            space.num_groups,
            config.group_divisible,
            count,
        )
    return count


def _separate_quantizer_parameters_(base: torch.optim.Optimizer, quantizers: Sequence[Quantizer], lr: float) -> None:
    """Move the quantizers' parameters out of the base optimizer's groups into one without weight decay."""
    parameters = list({id(p): p for q in quantizers for p in q.parameters() if p.requires_grad}.values())
    owned = {id(p) for p in parameters}
    for group in base.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in owned]
    if parameters:
        base.add_param_group({"params": parameters, "lr": lr, "weight_decay": 0.0})
