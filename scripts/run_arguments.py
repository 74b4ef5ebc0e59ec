"""One YAML file and the command line -> argument dataclasses. Flags override the file; unknown keys are refused."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from hf_geta import GETAConfig

GETA_SECTION = "geta"


def parse_run(dataclass_types: Sequence[Any], argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """The argument dataclasses of a run, and its GETAConfig as the last one.

    The YAML file of `--config` holds the fields of all `dataclass_types` as flat keys, and those of GETAConfig in a
    section `geta:`. On the command line every field is a flag; a GETAConfig field whose name another dataclass has too
    is written with the prefix `geta_` (`--geta_warmup_steps`, beside TrainingArguments' `--warmup_steps`). Widths that
    may be absent are `null` in the file and `none` as a flag (`--weight_bits none`).

    Args:
        argv: the command line; None takes the program's own.

    Raises:
        ValueError: for an unknown key or flag, with the nearest and all known names.
    """
    config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config", help="YAML file with the run's settings; flags override it.")
    config_path, flags = config_parser.parse_known_args(argv)

    flag_of = _geta_flags(dataclass_types)
    parser = HfArgumentParser(
        [*dataclass_types, _renamed_geta_config(flag_of)], parents=[config_parser], allow_abbrev=False
    )
    if config_path.config is not None:
        parser.set_defaults(**_defaults_from_file(config_path.config, dataclass_types, flag_of))
    unknown = [flag for flag in parser.parse_known_args(flags)[1] if flag.startswith("-")]
    names = [field.name for kind in dataclass_types for field in dataclasses.fields(kind)] + list(flag_of.values())
    _refuse_unknown("flag", [flag.lstrip("-").replace("-", "_") for flag in unknown], names)

    *arguments, geta, _ = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
    values: dict[str, Any] = {name: getattr(geta, flag) for name, flag in flag_of.items()}
    values |= {name: None for name, value in values.items() if value == [None]}
    return (*arguments, GETAConfig(**values))


def _geta_flags(dataclass_types: Iterable[Any]) -> dict[str, str]:
    """GETAConfig field -> its flag."""
    taken = {field.name for kind in dataclass_types for field in dataclasses.fields(kind)}
    names = [field.name for field in dataclasses.fields(GETAConfig)]
    return {name: f"{GETA_SECTION}_{name}" if name in taken else name for name in names}


def _renamed_geta_config(flag_of: dict[str, str]) -> Any:
    """A dataclass with the fields of GETAConfig, named by their flags; the checks wait for the whole."""
    types_of = typing.get_type_hints(GETAConfig)
    fields: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(GETAConfig):
        if field.default_factory is not dataclasses.MISSING:
            renamed = dataclasses.field(default_factory=field.default_factory, metadata=field.metadata)
        else:
            renamed = dataclasses.field(default=field.default, metadata=field.metadata)
        kind = types_of[field.name]
        if kind == list[int] | None:
            kind = types.GenericAlias(list, (_WholeOrNone,)) | None
        elif kind == int | None:
            kind = _WholeOrNone | None
        fields.append((flag_of[field.name], kind, renamed))
    return dataclasses.make_dataclass("GETAArguments", fields)


class _WholeOrNone:
    """The type of a flag that is a whole number or `none`; a class, for only classes make a `| None`."""

    def __new__(cls, text: str) -> int | None:  # type: ignore[misc]
        if text.lower() in ("none", "null"):
            return None
        try:
            return int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: write a whole number, or none.") from None


def _defaults_from_file(path: str, dataclass_types: Iterable[Any], flag_of: dict[str, str]) -> dict[str, Any]:
    values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    geta = values.pop(GETA_SECTION, None) or {}
    known = [field.name for kind in dataclass_types for field in dataclasses.fields(kind)]
    _refuse_unknown(f"key in {path}", values, [*known, GETA_SECTION])
    _refuse_unknown(f"key in the section {GETA_SECTION} of {path}", geta, list(flag_of))
    return values | {flag_of[name]: value for name, value in geta.items()}


def _refuse_unknown(what: str, names: Iterable[str], known: Sequence[str]) -> None:
    for name in names:
        if name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ValueError(f"unknown {what}: {name}{hint} Known are: {', '.join(sorted(known))}.")
