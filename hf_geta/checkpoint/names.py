"""The names that a family's files use, and those of its modules: transformers maps between the two, and so do we.

Modules are renamed from one transformers release to the next; files keep the classic names, and every release maps
those. So config.json speaks in the file's names, and a checkpoint outlives the release that wrote it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming

Rename = Callable[[str], str]


def saving_conversions(model: nn.Module) -> list[Any]:
    """What `save_pretrained` reverts: the conversions that `model` was loaded with, or else its family's."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        return list(conversions)
    every = get_model_conversion_mapping(model, add_legacy=False)  # type: ignore[arg-type]
    return [conversion for conversion in every if not isinstance(conversion, PrefixChange)]


def file_to_module(model: nn.Module) -> Rename:
    """The name of a tensor in the model, given its name in a file, as `from_pretrained` maps it."""
    return _chain(get_model_conversion_mapping(model))  # type: ignore[arg-type]


def module_to_file(model: nn.Module) -> Rename:
    """The name of a tensor in the file that `save_pretrained` writes; one that would not be found again stays."""
    rename = _chain([each.reverse_transform() for each in _renamings(reversed(saving_conversions(model)))])
    invert = file_to_module(model)

    def renamed(name: str) -> str:
        in_file = rename(name)
        return in_file if invert(in_file) == name else name

    return renamed


def without_conversions_of(conversions: Iterable[Any], tensors: Iterable[str]) -> list[Any]:
    """The conversions between file and modules, without those that would change these tensors.

    Some families save q, k and v as one tensor, or with the rows of each head in another order. Codes of different
    widths cannot be joined, and rows cannot be sorted by numbers that the config has of the uncompressed model: what
    is packed or pruned is saved as it is. Renamings stay.
    """
    tensors = list(tensors)

    def reaches(conversion: Any) -> bool:
        if not isinstance(conversion, WeightConverter):
            return False
        try:
            reverse = conversion.reverse_transform()
        except NotImplementedError:
            return False  # it never wrote a file
        return any(reverse.rename_source_key(tensor)[1] is not None for tensor in tensors)

    return [conversion for conversion in conversions if not reaches(conversion)]


def packed_tensors(layers: Iterable[str]) -> list[str]:
    """The tensors of packed layers that a family's conversions may know; stacked experts are tensors themselves."""
    return [f"{name}{tensor}" for name in layers for tensor in ("", ".weight", ".bias")]


def save_as_they_are_(model: nn.Module, tensors: Iterable[str]) -> None:
    """Let `save_pretrained` write these tensors of the model, packed or pruned, without conversions.

    The list of conversions is set even where it is that of the family: with one, transformers sorts the tensors, and
    shards of the first save are those of any later one.
    """
    model._weight_conversions = without_conversions_of(saving_conversions(model), tensors)  # type: ignore[assignment]


@contextlib.contextmanager
def own_tensor_names(model: Any) -> Iterator[None]:
    """Let `save_pretrained` write the model's own tensor names instead of the hub's classic ones."""
    conversions = getattr(model, "_weight_conversions", None)
    model._weight_conversions = []
    try:
        yield
    finally:
        model._weight_conversions = conversions


def _renamings(conversions: Iterable[Any]) -> list[Any]:
    return [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]


def _chain(conversions: Iterable[Any]) -> Rename:
    """All renamings, one after the other."""
    renamings = _renamings(conversions)

    def renamed(name: str) -> str:
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        return name

    return renamed
