"""A model that is pushed to the Hub takes its card, its report and its processor along."""

from __future__ import annotations

import contextlib
import shutil
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers import PreTrainedModel

from hf_geta.report.files import CARD_NAME, REPORT_NAME, save_report
from hf_geta.report.metadata import join_card


def publish_with_card_(model: PreTrainedModel, report: Mapping[str, Any], processing_class: Any = None) -> None:
    """Let `push_to_hub(repo_id)` and `save_pretrained(..., push_to_hub=True)` of a model upload all that belongs to it.

    Beside config and weights: the report, the card made from it, the picture, and the files of `processing_class`. A
    card that the repository has already is extended.
    """
    upload = type(model)._upload_modified_files

    def _upload_modified_files(
        self: PreTrainedModel, working_dir: str, repo_id: str, *args: Any, **options: Any
    ) -> Any:
        if processing_class is not None:
            processing_class.save_pretrained(working_dir)
        _find_card(Path(working_dir), repo_id, options.get("token"))
        save_report(working_dir, {**report, "repo_id": repo_id})
        return upload(self, working_dir, repo_id, *args, **options)

    model._upload_modified_files = types.MethodType(_upload_modified_files, model)  # type: ignore[method-assign]


def _find_card(folder: Path, repo_id: str, token: Any) -> None:
    """Leave in `folder` the repository's card, and the report that it was made from: what it says is not the user's.

    Where there is none, transformers put a form to fill in here, of which only the metadata says something.
    """
    path = folder / CARD_NAME
    try:
        ModelCard.load(repo_id, token=token)
    except EntryNotFoundError:
        path.write_text(join_card(ModelCard.load(path).data.to_dict(), ""), encoding="utf-8")
        return
    with contextlib.suppress(EntryNotFoundError):
        shutil.copyfile(huggingface_hub.hf_hub_download(repo_id, REPORT_NAME, token=token), folder / REPORT_NAME)
