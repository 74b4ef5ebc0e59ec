"""A model that is pushed to the Hub takes its card, its report and its processor along."""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoProcessor, PreTrainedModel
from transformers.utils import cached_file

from hf_geta.checkpoint.directory import CONFIG
from hf_geta.checkpoint.saving import write_hint
from hf_geta.report.files import CARD_NAME, REPORT_NAME, hash_files, read_earlier_report, save_report
from hf_geta.report.metadata import join_card, split_card

logger = logging.getLogger(__name__)


def publish_with_card_(model: PreTrainedModel, report: Mapping[str, Any], processing_class: Any = None) -> None:
    """Let `push_to_hub(repo_id)` and `save_pretrained(..., push_to_hub=True)` of a model upload all that belongs to it.

    Beside config and weights: the report, the card made from it, the picture, and the files of `processing_class`. A
    card that the repository has already is extended.
    """
    publish = functools.partial(_publish, model, dict(report), processing_class, "")
    model._upload_modified_files = publish  # type: ignore[method-assign]


def publish_again(
    model: PreTrainedModel,
    source: str,
    commit: str | None,
    working_dir: str,
    repo_id: str,
    *args: Any,
    **options: Any,
) -> Any:
    """Upload a model that was loaded, with the report, card and processor that lie where it was loaded from.

    Without them where the weights are not those that the report there is about.

    Args:
        source: the folder or the repository that it was loaded from, at `commit`.
        working_dir, repo_id, *args, **options: as `PushToHubMixin._upload_modified_files` takes them.
    """
    write_hint(Path(working_dir))
    find = functools.partial(_file_of, source, revision=commit, token=options.get("token"))
    report = _report_of(Path(working_dir), find(REPORT_NAME))
    if not report:
        logger.warning("%s has no report of these weights: they are published without one.", source)
        return type(model)._upload_modified_files(model, working_dir, repo_id, *args, **options)
    card = find(CARD_NAME)
    text = card.read_text(encoding="utf-8", errors="surrogateescape") if card else ""
    processor = _processor_of(source, revision=commit, token=options.get("token"))
    return _publish(model, report, processor, text, working_dir, repo_id, *args, **options)


def _publish(
    model: PreTrainedModel,
    report: dict[str, Any],
    processing_class: Any,
    card: str,
    working_dir: str,
    repo_id: str,
    *args: Any,
    **options: Any,
) -> Any:
    write_hint(Path(working_dir))  # before the report takes the hash of config.json
    if processing_class is not None:
        processing_class.save_pretrained(working_dir)
    _find_card(Path(working_dir), repo_id, options.get("token"), card)
    save_report(working_dir, {**report, "repo_id": repo_id})
    return type(model)._upload_modified_files(model, working_dir, repo_id, *args, **options)


def _find_card(folder: Path, repo_id: str, token: Any, otherwise: str) -> None:
    """Leave in `folder` the repository's card, and the report that it was made from: what it says is not the user's.

    Where there is none, transformers put a form to fill in here, of which only the metadata says something.

    Args:
        otherwise: the card of a repository that has none.
    """
    path = folder / CARD_NAME
    try:
        ModelCard.load(repo_id, token=token)
    except EntryNotFoundError:
        theirs, _, body = split_card(otherwise)
        metadata = ModelCard.load(path).data.to_dict() | (theirs or {})
        path.write_text(join_card(metadata, body), encoding="utf-8", errors="surrogateescape")
        return
    with contextlib.suppress(EntryNotFoundError):
        shutil.copyfile(huggingface_hub.hf_hub_download(repo_id, REPORT_NAME, token=token), folder / REPORT_NAME)


def _report_of(folder: Path, found: Path | None) -> dict[str, Any]:
    """The report in a file, if it is of the weights that lie in `folder`; else empty."""
    report = read_earlier_report(found.parent) if found else {}
    weights = {name: file for name, file in hash_files(folder).items() if name != CONFIG}
    return report if weights and weights.items() <= report.get("files", {}).items() else {}


def _file_of(source: str, name: str, **options: Any) -> Path | None:
    try:
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **options)
    except OSError:  # the folder is gone, the Hub cannot be reached
        return None
    return Path(found) if found else None


def _processor_of(source: str, **options: Any) -> Any:
    try:
        return AutoProcessor.from_pretrained(source, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, ImportError):  # none lies there, or not all that it needs is installed
        return None
