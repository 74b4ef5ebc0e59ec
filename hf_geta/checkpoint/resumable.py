"""Can a run go on from a checkpoint folder? One that a crash or a full disk cut short is told from one that is whole.

Trainer writes a checkpoint file by file in its place, `trainer_state.json` last; what is asked here is answered from
the ends and the headers of the files, so that it costs no reading of weights.
"""

from __future__ import annotations

import json
import logging
import os
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


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
        if not isinstance(json.loads((folder / TRAINER_STATE_NAME).read_bytes()), dict):
            return f"{TRAINER_STATE_NAME} holds no object"
    except ValueError as error:
        return f"a JSON file is cut short or damaged ({error})"
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


def last_whole_checkpoint(output_dir: str | os.PathLike[str]) -> str:
    """The latest `checkpoint-N` that a run can go on from; later ones that are damaged are warned of, and left there.

    Raises:
        ValueError: if there is none.
    """
    found = [path for path in Path(output_dir).glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)]
    problems: list[str] = []
    for path in sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        if not (problem := damage(path)):
            for text in problems:
                logger.warning("%s: the run goes on from %s instead.", text, path.name)
            return str(path)
        problems.append(f"{path}: {problem}")
    raise ValueError(
        f"there is no checkpoint in {output_dir} to go on from{''.join(f'; {text}' for text in problems)}. "
        "Start anew: train() without resume_from_checkpoint."
    )


def _weight_files(folder: Path) -> list[str]:
    """The files of weights that a checkpoint must have: one, or the shards that its index names."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return [SAFE_WEIGHTS_NAME]
    content = json.loads(index.read_bytes())
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict):
        raise ValueError(f"{index.name} names no files")
    return sorted({str(name) for name in shards.values()})
