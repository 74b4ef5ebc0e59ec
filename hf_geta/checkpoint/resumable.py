"""Can a run go on from a checkpoint folder? One that a crash or a full disk cut short is told from one that is whole.

Trainer writes a checkpoint file by file in its place, `trainer_state.json` last; what is asked here is answered from
the ends and the headers of the files, so that it costs no reading of weights.
"""

from __future__ import annotations

import json
import logging
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_geta.checkpoint.pieces import MODEL, OPTIMIZER, piece_files

logger = logging.getLogger(__name__)

CONFIG_NAME = "geta_config.json"  # the targets of the run, in its checkpoints; earlier versions wrote none


def damage(checkpoint: str | os.PathLike[str]) -> str:
    """What keeps a run with compression from going on from a folder, in words; empty where nothing does."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        return "there is no such folder"
    try:
        weights = _weight_files(folder)
        missing = [
            name
            for name in (*weights, OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME)
            if not (folder / name).is_file()
        ]
        if missing:
            return f"{', '.join(missing)} is missing (a save that was cut short, or save_only_model=True)"
        _read_object(folder / TRAINER_STATE_NAME)
        if (folder / CONFIG_NAME).is_file():
            _read_object(folder / CONFIG_NAME)
    except ValueError as error:
        return str(error)
    for name in weights:
        try:
            with safe_open(folder / name, framework="pt"):  # compares the header with the size
                pass
        except SafetensorError as error:
            return f"{name} is cut short or damaged ({error})"
    for path in sorted((*folder.glob("*.pt"), *folder.glob("rng_state*.pth"))):
        if not zipfile.is_zipfile(path):  # torch.save writes the directory of its archive last
            return f"{path.name} is cut short or damaged"
    return ""


def whole_checkpoints(run_folder: str | os.PathLike[str]) -> Iterator[Path]:
    """The folders `checkpoint-N` that a run can go on from, the latest first."""
    return (path for path in _checkpoints(run_folder) if not damage(path))


def last_whole_checkpoint(run_folder: str | os.PathLike[str]) -> str:
    """The latest `checkpoint-N` that a run can go on from; later ones that are damaged are warned of, and left there.

    Raises:
        ValueError: if there is none.
    """
    problems: list[str] = []
    for path in _checkpoints(run_folder):
        if not (problem := damage(path)):
            for text in problems:
                logger.warning("%s: the run goes on from %s instead.", text, path.name)
            return str(path)
        problems.append(f"{path}: {problem}")
    raise ValueError(
        f"there is no checkpoint in {run_folder} to go on from{''.join(f'; {text}' for text in problems)}. "
        "Start anew: train() without resume_from_checkpoint."
    )


def _checkpoints(run_folder: str | os.PathLike[str]) -> list[Path]:
    """Every `checkpoint-N`, the latest first."""
    numbered = {
        int(number): path
        for path in Path(run_folder).glob("checkpoint-*")
        if (number := path.name.removeprefix("checkpoint-")).isdecimal()
    }
    return [path for _, path in sorted(numbered.items(), reverse=True)]


def _weight_files(folder: Path) -> list[str]:
    """The safetensors files that a checkpoint must have: one, the shards that its index names, or each process's."""
    if pieces := piece_files(folder, MODEL):
        return [*pieces, *(name.replace(MODEL, OPTIMIZER, 1) for name in pieces)]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return [SAFE_WEIGHTS_NAME]
    shards = _read_object(index).get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError(f"{index.name} names no files")
    return sorted({str(name) for name in shards.values()})


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path.name} is cut short or damaged ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no object")
    return content
