"""What a model carries with it while it is compressed, as its attribute `geta`: the targets and the pruning groups."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from hf_geta.config import GETAConfig
from hf_geta.graph.qadg import QADG
from hf_geta.graph.uniform import Family
from hf_geta.quantization.quantizers import Quantizer

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What `prepare_model` learned about a model; kept as its attribute `geta`."""

    config: GETAConfig
    qadg: QADG
    families: tuple[Family, ...] | None = None  # with `config.uniform`
    readers: tuple[tuple[str, ...], ...] = ()  # with `config.share_inputs`: layers that read one tensor, by name
    groups_to_remove: int | None = None  # K, once an optimizer has planned with it; None with a budget


def is_prepared(model: nn.Module) -> bool:
    """Whether `prepare_model` has been here."""
    return isinstance(getattr(model, "geta", None), Preparation)


def preparation_of(model: nn.Module) -> Preparation:
    """What `prepare_model` learned; ValueError if it has not been here."""
    if not is_prepared(model):
        raise ValueError("this model is not prepared: call prepare_model(model, config, inputs) first.")
    return model.geta  # type: ignore[return-value]


def forget_preparation_(model: nn.Module) -> None:
    """Leave nothing of `prepare_model` on a model but its layers."""
    del model.geta
    if getattr(vars(model).get("save_pretrained"), "__func__", None) is _save_in_training:  # else it is compressed now
        del model.save_pretrained


def warn_when_saved_(model: nn.Module) -> None:
    """Let `save_pretrained` of a prepared model say that it does not write the small one."""
    model.save_pretrained = types.MethodType(_save_in_training, model)  # type: ignore[assignment]


def _save_in_training(model: Any, *args: Any, **kwargs: Any) -> Any:
    logger.warning(
        "this model is in training, and saved as it is, neither pruned nor packed: finalize_model(model) gives the "
        "small one."
    )
    return type(model).save_pretrained(model, *args, **kwargs)


@contextlib.contextmanager
def saved_without_warning(model: nn.Module) -> Iterator[None]:
    """Meanwhile `save_pretrained` of a prepared model writes it as any other: for checkpoints."""
    warns = vars(model).pop("save_pretrained", None)
    try:
        yield
    finally:
        if warns is not None:
            model.save_pretrained = warns


def quantizer_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of all quantizers: a few numbers for each layer, which sharding has to leave whole.

    `fully_shard(module, ignored_params=quantizer_parameters(model))`
    """
    return {p for module in model.modules() if isinstance(module, Quantizer) for p in module.parameters()}


def prunable_parameters(model: nn.Module, remove_duplicate: bool = False) -> dict[str, nn.Parameter]:
    """Every parameter that is not a quantizer's, by each of its names (or by its first)."""
    owned = quantizer_parameters(model)
    named = model.named_parameters(remove_duplicate=remove_duplicate)
    return {name: p for name, p in named if p not in owned}
