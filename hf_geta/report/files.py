"""What lies beside a checkpoint: its report, its card, its picture; and the hashes of the files that they describe."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_geta.checkpoint.directory import CONFIG, WEIGHTS_PATTERN, replace_text
from hf_geta.report.card import PICTURE_NAME, render_card
from hf_geta.report.figures import LARGEST
from hf_geta.report.metadata import card_metadata
from hf_geta.report.picture import draw_report

logger = logging.getLogger(__name__)

REPORT_NAME = "geta_report.json"
CARD_NAME = "README.md"


def save_report(folder: str | Path, report: Mapping[str, Any], previous: str | Path | None = None) -> None:
    """Write geta_report.json, README.md and the picture beside a checkpoint; each beside its place, then renamed.

    The report takes the hashes of the weights and of config.json that lie in `folder` by then. A card that is there
    already is extended: its text and metadata stay, what an earlier save wrote is replaced.

    A NaN or an infinity, of which JSON has none, is left out with a warning, like a figure that no model can have.

    Args:
        report: as `render_card` takes it.
        previous: a folder that `folder` is to replace: its card is the one extended, and what was measured on the
            very same files, and is not in `report`, is taken over. By default `folder` itself, and nothing is.
    """
    folder, before = Path(folder), read_earlier_report(Path(previous or folder))
    report = dict(report)
    if files := hash_files(folder):
        if previous is not None and before.get("files") == files:
            compressed = before.get("compressed", {}) | report.get("compressed", {})
            report = before | report | {"compressed": compressed}
        file_bytes = sum(file["bytes"] for name, file in files.items() if name.endswith(".safetensors"))
        report |= {"files": files, "compressed": report.get("compressed", {}) | {"file_bytes": file_bytes}}
    if auto_class := _auto_class_of_code(folder / CONFIG, report["architecture"]):
        report["auto_class"] = auto_class
    report = _sayable(report)
    card, picture = render_card(report, _read_card(Path(previous or folder)), before), draw_report(report)
    if picture:
        replace_text(folder / PICTURE_NAME, picture)
    replace_text(folder / CARD_NAME, card)
    replace_text(folder / REPORT_NAME, json.dumps(report, indent=2, allow_nan=False) + "\n")


def load_report(folder: str | Path) -> dict[str, Any]:
    """The report beside a checkpoint; empty where there is none, as beside a dense model."""
    path = Path(folder) / REPORT_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def hash_files(folder: str | Path) -> dict[str, dict[str, Any]]:
    """{name: {"bytes", "sha256"}} of the files of weights and of config.json; empty without weights."""
    weights = sorted(path for path in Path(folder).glob(WEIGHTS_PATTERN) if path.is_file())
    config = Path(folder) / CONFIG
    paths = [config, *weights] if weights and config.is_file() else weights
    return {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths}


def sha256(path: Path) -> str:
    """The hash of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_earlier_report(folder: Path) -> dict[str, Any]:
    """The report of an earlier save; one that cannot be read counts as none, with a warning."""
    try:
        if report := load_report(folder):
            card_metadata(report)
    except (OSError, ValueError, RecursionError, TypeError, AttributeError, KeyError) as error:
        logger.warning("%s cannot be read (%r) and counts as none.", folder / REPORT_NAME, error)
        return {}
    return report or {}


def _auto_class_of_code(config: Path, architecture: str) -> str | None:
    """The Auto class that loads the model with code of its own, by the `auto_map` of its config; None without any."""
    auto_map = json.loads(config.read_text(encoding="utf-8")).get("auto_map") if config.is_file() else None
    codes = {str(code).rpartition(".")[2]: auto_class for auto_class, code in (auto_map or {}).items()}
    return codes.get(architecture)


def _sayable(value: Any, where: str = "report") -> Any:
    """Plain values as JSON has them, with None for each float that is no number of a model."""
    if isinstance(value, Mapping):
        return {key: _sayable(each, f"{where}.{key}") for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_sayable(each, where) for each in value]
    if isinstance(value, float) and not abs(value) <= LARGEST:
        logger.warning("%s = %s is no number that a report can hold: it is left out.", where, value)
        return None
    return value


def _read_card(folder: Path) -> str | None:
    path = folder / CARD_NAME
    return path.read_text(encoding="utf-8", errors="surrogateescape") if path.is_file() else None
