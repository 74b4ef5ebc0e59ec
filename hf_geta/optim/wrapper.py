"""An optimizer around an optimizer: what torch, accelerate and Trainer expect of one, handed to the base."""

from __future__ import annotations

from typing import Any

import torch


class OptimizerWrapper(torch.optim.Optimizer):
    """Shares parameter groups, state and defaults with `base`, so that schedulers and checkpoints see one optimizer.

    Raises:
        ValueError: for LBFGS, whose step is several.
    """

    def __init__(self, base: torch.optim.Optimizer) -> None:
        if isinstance(base, torch.optim.LBFGS):
            raise ValueError(
                "LBFGS takes several steps in one and cannot be followed by a rule: use another optimizer."
            )
        self.base = base
        super().__init__(base.param_groups, base.defaults)
        self._link_to_base()

    def _link_to_base(self) -> None:
        self.param_groups, self.state, self.defaults = self.base.param_groups, self.base.state, self.base.defaults

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.base.load_state_dict(state_dict)
        self._link_to_base()

    @property
    def has_modes(self) -> bool:
        """Whether the base optimizer trains one set of parameters and evaluates another (a schedule-free one)."""
        return hasattr(self.base, "train") and hasattr(self.base, "eval")

    def train(self) -> None:
        """The base optimizer's mode, where it has modes."""
        if self.has_modes:
            self.base.train()  # type: ignore[attr-defined]

    def eval(self) -> None:
        """The base optimizer's mode, where it has modes."""
        if self.has_modes:
            self.base.eval()  # type: ignore[attr-defined]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer."""
        # torch.optim.Optimizer.__init__ hands over those that are there; by identity, since == would compare tensors
        if any(param_group is group for group in self.base.param_groups):
            self.param_groups.append(param_group)
            return
        self.base.add_param_group(param_group)
