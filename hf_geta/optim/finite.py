"""Steps whose gradients hold NaN or inf: told from the others before anything of them reaches a weight."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import get_total_norm

# One bad batch is skipped and said; so many in a row are a run that has broken.
MOST_SKIPPED_IN_A_ROW = 20

logger = logging.getLogger(__name__)


class FiniteSteps:
    """Which optimizer steps may be taken.

    Attributes:
        skipped_in_a_row: how many steps up to the present one were not.
    """

    def __init__(self) -> None:
        self.skipped_in_a_row = 0

    def allow(self, param_groups: Iterable[dict[str, Any]]) -> bool:
        """Whether all gradients are finite; one host read, whatever their number.

        Gradients that were summed over processes hold NaN or inf on each of them, so all decide alike.

        Raises:
            FloatingPointError: if so many steps in a row were skipped that more would be wasted.
        """
        if are_finite([p.grad for group in param_groups for p in group["params"] if p.grad is not None]):
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
    named = (*model.named_parameters(), *model.named_buffers())
    broken = [name for name, tensor in named if tensor.is_floating_point() and not are_finite([tensor.detach()])]
    if broken:
        raise FloatingPointError(
            f"the model holds NaN or inf in {', '.join(broken)}: there is nothing to go on with or to save. Go on "
            "from an earlier checkpoint, with a lower learning rate or without the samples that broke it."
        )
