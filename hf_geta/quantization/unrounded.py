"""Which weights of a model does nothing round? Nobody asked for that, so it is said."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence

from torch import nn
from torch.nn.modules.conv import _ConvNd

from hf_geta.quantization.experts import stacked_parameters
from hf_geta.quantization.layers import QuantizedLayer

logger = logging.getLogger(__name__)

WORTH_SAYING = 0.01  # of a model's parameters
SHOWN = 3  # names


def say_what_is_not_called(names: Sequence[str]) -> None:
    """Warn of layers whose weight the model reads without calling them."""
    if names:
        logger.warning(
            "%d layers (%s) stay in float: the model reads their weights without calling them, and training would not "
            "see them rounded.",
            len(names),
            ", ".join(sorted({name.rpartition(".")[2] for name in names})),
        )


def say_what_has_no_quantizer(model: nn.Module, known: Collection[str]) -> None:
    """Warn of the weights for which there is no quantized layer, where they are many of the model's.

    Args:
        known: names of modules that stay in float for another reason.
    """
    numels = dict(_without_quantizer(model, known))
    share = sum(numels.values()) / max(1, sum(parameter.numel() for parameter in model.parameters()))
    if share >= WORTH_SAYING:
        more = f", and {len(numels) - SHOWN} more" if len(numels) > SHOWN else ""
        logger.warning(
            "%.0f %% of the parameters stay in float, in layers that have no quantized form: %s%s.",
            100 * share,
            ", ".join(list(numels)[:SHOWN]),
            more,
        )


def _without_quantizer(model: nn.Module, known: Collection[str]) -> Iterator[tuple[str, int]]:
    """(name, entries) of what is multiplied with inputs: layers of all kinds, experts, weights made anew by a norm."""
    stacks = set(stacked_parameters(model))  # of which is said elsewhere that they stay
    for path, module in model.named_modules():
        is_layer = isinstance(module, (nn.Linear, nn.Bilinear, _ConvNd, nn.RNNBase))
        if path in known or isinstance(module, QuantizedLayer):
            continue
        for name, parameter in module.named_parameters(path, recurse=False):
            is_weight = is_layer or "expert" in name or ".parametrizations.weight" in name
            if parameter.ndim > 1 and is_weight and name not in stacks:
                yield name, parameter.numel()
