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

from hf_geta.checkpoint.saving import write_hint
from hf_geta.report.files import CARD_NAME, REPORT_NAME, hash_files, load_report, save_report
from hf_geta.report.metadata import join_card

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
    report = _report_of(working_dir, source, commit)
    if not report:
        logger.warning("%s has no report of these weights: they are published without one.", source)
        return type(model)._upload_modified_files(model, working_dir, repo_id, *args, **options)
    card = _file_of(source, commit, CARD_NAME)
    text = card.read_text(encoding="utf-8", errors="surrogateescape") if card else ""
    return _publish(model, report, _processor_of(source, commit), text, working_dir, repo_id, *args, **options)


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
        path.write_text(
            join_card(ModelCard.load(path).data.to_dict(), otherwise), encoding="utf-8", errors="surrogateescape"
        )
        return
    with contextlib.suppress(EntryNotFoundError):
        shutil.copyfile(huggingface_hub.hf_hub_download(repo_id, REPORT_NAME, token=token), folder / REPORT_NAME)


def _report_of(folder: str, source: str, commit: str | None) -> dict[str, Any]:
    """The report in `source` of the weights that lie in `folder`; empty without one."""
    path = _file_of(source, commit, REPORT_NAME)
    report = load_report(path.parent) if path else {}
    weights = {name: file for name, file in hash_files(folder).items() if name != "config.json"}
    return report if weights and weights.items() <= report.get("files", {}).items() else {}


def _file_of(source: str, commit: str | None, name: str) -> Path | None:
    found = cached_file(source, name, revision=commit, _raise_exceptions_for_missing_entries=False)
    return Path(found) if found else None


def _processor_of(source: str, commit: str | None) -> Any:
    try:
        return AutoProcessor.from_pretrained(source, revision=commit, trust_remote_code=False)
    except (OSError, ValueError, KeyError):  # none lies there
        return None
