"""Steps whose gradients hold NaN or inf: told from the others before anything of them reaches a weight."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from hf_geta.sharding import Shards, local, local_gradient

# One bad batch is skipped and said; so many in a row are a run that has broken.
MOST_SKIPPED_IN_A_ROW = 20

logger = logging.getLogger(__name__)


class FiniteSteps:
    """Which optimizer steps may be taken.

    Args:
        shards: where the parameters lie.

    Attributes:
        skipped_in_a_row: how many steps up to the present one were not.
    """

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self.skipped_in_a_row = 0

    def allow(self, param_groups: Iterable[dict[str, Any]]) -> bool:
        """Whether all gradients are finite; one host read, whatever their number.

        Gradients that were summed over processes hold NaN or inf on each of them, so all decide alike; about those that
        lie in pieces they agree.

        Raises:
            FloatingPointError: if so many steps in a row were skipped that more would be wasted.
            RuntimeError: if there is no gradient at all.
        """
        parameters = [p for group in param_groups for p in group["params"]]
        gradients = [gradient for p in parameters if (gradient := local_gradient(p)) is not None]
        if not gradients:
            raise RuntimeError(
                "no parameter has a gradient: call step() after backward() and before zero_grad(). Optimizers that "
                "step inside of backward() (LOMO, layer-wise GaLore) leave nothing to choose groups by: use another."
            )
        if not self._shards.any(not are_finite(gradients)):
            self.skipped_in_a_row = 0
            return True
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row == 1:
            logger.warning("the gradients hold NaN or inf: this optimizer step is skipped, and all until they do not.")
        if self.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"the gradients of {self.skipped_in_a_row} optimizer steps in a row held NaN or inf. The steps were "
                "skipped, but the weights give no finite loss any more: go on from an earlier checkpoint with a lower "
                "learning rate, clip gradients (max_grad_norm), or look at the data."
            )
        return False


def are_finite(tensors: list[Tensor]) -> bool:
    """Whether no tensor holds NaN or inf."""
    if get_total_norm(tensors).isfinite():
        return True
    return all(bool(tensor.isfinite().all()) for tensor in tensors)  # squares overflow where no entry has


def refuse_not_finite(model: nn.Module) -> None:
    """Nothing, for a model whose parameters and buffers are finite.

    Raises:
        FloatingPointError: with the names of those that hold NaN or inf.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    flags = [tensor.is_floating_point() and not are_finite([local(tensor)]) for _, tensor in named]
    shards = Shards(model.parameters())
    found = shards.sum_(torch.tensor(flags, dtype=torch.int32, device=shards.device))
    broken = [name for (name, _), count in zip(named, found.tolist(), strict=True) if count]
    if broken:
        raise FloatingPointError(
            f"the model holds NaN or inf in {', '.join(broken)}: there is nothing to go on with or to save. Go on "
            "from an earlier checkpoint, with a lower learning rate or without the samples that broke it."
        )
