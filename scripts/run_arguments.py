"""One YAML file and the command line -> argument dataclasses. Flags override the file; unknown keys are refused."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from splits import DataArguments
from transformers import HfArgumentParser

from hf_geta import GETAConfig
from hf_geta.config import SECTION, read_values
from hf_geta.config_checks import refuse_unknown


def parse_run(dataclass_types: Sequence[Any], argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """The argument dataclasses of a run, and its GETAConfig as the last one.

    The YAML file of `--config` holds the fields of all `dataclass_types` as flat keys, and those of GETAConfig in a
    section `geta:`. On the command line every field is a flag; a GETAConfig field whose name another dataclass has too
    is written with the prefix `geta_` (`--geta_warmup_steps`, beside TrainingArguments' `--warmup_steps`). What only
    evaluates a folder (`--do_train false`) has that as its output_dir, unless there is a flag `--output_dir`.

    Args:
        argv: the command line; None takes the program's own.

    Raises:
        ValueError: for an unknown key or flag, with the nearest and all known names; for do_predict.
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
    given, rest = parser.parse_known_args(flags)
    if not given.do_train:  # a report of another model has no place in the folder of the file's run
        parser.set_defaults(output_dir=_local_folder(given.model_name_or_path))
    if given.do_predict:
        raise ValueError("do_predict: a run ends with the figures of its evaluation split; leave it out.")
    unknown = [flag for flag in rest if flag.startswith("-")]
    names = [field.name for kind in dataclass_types for field in dataclasses.fields(kind)] + list(flag_of.values())
    refuse_unknown("flag", [flag.lstrip("-").replace("-", "_") for flag in unknown], names)

    *arguments, geta, _ = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
    for argument in arguments:
        if isinstance(argument, DataArguments):
            argument.trains = given.do_train
    return (*arguments, GETAConfig.from_dict({name: getattr(geta, flag) for name, flag in flag_of.items()}))


def _local_folder(name: str | None) -> str | None:
    return name if name is not None and Path(name).is_dir() else None


def _geta_flags(dataclass_types: Iterable[Any]) -> dict[str, str]:
    """GETAConfig field -> its flag."""
    taken = {field.name for kind in dataclass_types for field in dataclasses.fields(kind)}
    names = [field.name for field in dataclasses.fields(GETAConfig)]
    return {name: f"{SECTION}_{name}" if name in taken else name for name in names}


def _renamed_geta_config(flag_of: dict[str, str]) -> Any:
    """A dataclass with the fields of GETAConfig, named by their flags; the checks wait for the whole."""
    types_of = typing.get_type_hints(GETAConfig)
    fields: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(GETAConfig):
        if field.default_factory is not dataclasses.MISSING:
            renamed = dataclasses.field(default_factory=field.default_factory, metadata=field.metadata)
        else:
            renamed = dataclasses.field(default=field.default, metadata=field.metadata)
        fields.append((flag_of[field.name], types_of[field.name], renamed))
    return dataclasses.make_dataclass("GETAArguments", fields)


def _defaults_from_file(path: str, dataclass_types: Iterable[Any], flag_of: dict[str, str]) -> dict[str, Any]:
    values = read_values(path)
    geta = values.pop(SECTION, None) or {}
    known = [field.name for kind in dataclass_types for field in dataclasses.fields(kind)]
    refuse_unknown(f"key in {path}", values, [*known, SECTION])
    refuse_unknown(f"key in the section {SECTION} of {path}", geta, list(flag_of))
    return values | {flag_of[name]: value for name, value in geta.items()}
