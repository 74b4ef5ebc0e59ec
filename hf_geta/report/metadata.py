"""The YAML at the top of a model card: what the Hub reads of a compressed model, and how it joins a user's own."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from transformers.models.auto import modeling_auto

from hf_geta.report.cost import FLOAT_BITS
from hf_geta.report.figures import METRICS, QUALITY

logger = logging.getLogger(__name__)

# Auto class -> (transformers' name for the table of the classes that it loads, the Hub's pipeline tag for all of them).
# Where two have a class, the first is taken: what reads images or sound writes text as others do.
TASKS: dict[str, tuple[str, str | None]] = {
    "AutoModelForImageClassification": ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "image-classification"),
    "AutoModelForSemanticSegmentation": ("MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES", "image-segmentation"),
    "AutoModelForObjectDetection": ("MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES", "object-detection"),
    "AutoModelForDepthEstimation": ("MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES", "depth-estimation"),
    "AutoModelForVideoClassification": ("MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES", "video-classification"),
    "AutoModelForAudioClassification": ("MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES", "audio-classification"),
    "AutoModelForCTC": ("MODEL_FOR_CTC_MAPPING_NAMES", "automatic-speech-recognition"),
    "AutoModelForSpeechSeq2Seq": ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", None),
    "AutoModelForImageTextToText": ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "image-text-to-text"),
    "AutoModelForSequenceClassification": ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "text-classification"),
    "AutoModelForTokenClassification": ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", "token-classification"),
    "AutoModelForQuestionAnswering": ("MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES", "question-answering"),
    "AutoModelForMultipleChoice": ("MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES", None),
    "AutoModelForSeq2SeqLM": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", None),
    "AutoModelForMaskedLM": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "fill-mask"),
    "AutoModelForCausalLM": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "text-generation"),
    "AutoModel": ("MODEL_MAPPING_NAMES", None),
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\n(?P<yaml>.*?)\n?^---[ \t]*$\n?", re.S | re.M)
MODEL_INDEX = "model-index"


def task_of(report: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """(Auto class that loads the model of a report with its head, pipeline tag), each None where none surely does."""
    own = report.get("auto_class")
    for auto_class, (table, tag) in TASKS.items():
        if auto_class == own or (own is None and report["architecture"] in _classes(auto_class, table)):
            return auto_class, tag
    return own, None


def _classes(auto_class: str, table: str) -> Iterator[str]:
    """The names in a table of transformers, of which some model types have several, and those of registered classes."""
    for names in getattr(modeling_auto, table, {}).values():
        yield from (names,) if isinstance(names, str) else names
    registered = getattr(modeling_auto, auto_class)._model_mapping._extra_content
    yield from (model_class.__name__ for model_class in registered.values())


def hub_id(name: str | None) -> str | None:
    """`name` if it can be one on the Hub; None for a folder of this machine, which says nothing to anyone else."""
    return name if name and _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def what_was_done(report: Mapping[str, Any]) -> list[str]:
    """Of "pruned" and "quantized" those that the model is."""
    compressed = report.get("compressed", {})
    pruned, quantized = compressed.get("group_sparsity", 1) > 0, compressed.get("mean_weight_bits", 0) < FLOAT_BITS
    return ["pruned"] * pruned + ["quantized"] * quantized


def card_metadata(report: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a report (`render_card`), with the keys and values that the Hub knows."""
    done, base_model = what_was_done(report), hub_id(report.get("base_model"))
    metadata = {
        "library_name": "transformers",
        "license": report.get("license"),
        "language": report.get("language"),
        "base_model": base_model,
        "base_model_relation": base_model and ("quantized" if "quantized" in done else "finetune"),
        "datasets": [report["dataset"]] if report.get("dataset") else None,
        "pipeline_tag": report.get("pipeline_tag") or task_of(report)[1],
        "tags": list(dict.fromkeys(["geta", *done, *_width_tags(report), *_listed(report.get("tags"))])),
        "metrics": [key for key in QUALITY if report.get("compressed", {}).get(key) is not None],
        MODEL_INDEX: _model_index(report),
    }
    return {key: value for key, value in metadata.items() if value}


def merge_metadata(theirs: Mapping[str, Any], ours: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """`ours` in a card that says `theirs`: what an earlier save of ours had put there (`before`) is replaced.

    A user's own value stays, lists become unions, and results of one task and data set are ours where both have them.
    """
    merged = dict(theirs)
    for key in dict.fromkeys([*before, *ours]):
        mine, old, found = (values.get(key) for values in (ours, before, theirs))
        if key == MODEL_INDEX:
            merged[key] = _merge_results(found, mine, old)
        elif any(isinstance(value, list) for value in (mine, old, found)):
            kept = [value for value in _listed(found) if value not in _listed(old)]
            merged[key] = kept + [value for value in _listed(mine) if value not in kept]
        elif found is None or found == old:
            merged[key] = mine
        if not merged.get(key):
            merged.pop(key, None)
    return merged


def split_card(text: str) -> tuple[dict[str, Any] | None, str, str]:
    """(metadata, the lines that hold it, body) of a card; metadata is None where they are no YAML mapping."""
    match = _FRONT_MATTER.match(text)
    if match is None:
        return {}, "", text
    try:
        metadata = yaml.safe_load(match["yaml"])
    except yaml.YAMLError as error:
        metadata = str(error)
    if metadata is not None and not isinstance(metadata, dict):
        logger.warning("the metadata of the model card is no YAML mapping and stays as it is: correct it by hand.")
        return None, match[0], text[match.end() :]
    return metadata or {}, match[0], text[match.end() :]


def join_card(metadata: Mapping[str, Any], body: str) -> str:
    """The text of a card."""
    head = yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n{body}" if metadata else body


def _widths(report: Mapping[str, Any], name: str) -> list[float]:
    """The widths, ascending, that "weight_bits" or "activation_bits" have in layers that are not in float."""
    rows = (row for row in report.get("operations", ()) if row.get("weight") is not None)
    return sorted({row[name] for row in rows if row.get(name, FLOAT_BITS) < FLOAT_BITS})


def _width_tags(report: Mapping[str, Any]) -> Iterator[str]:
    """Such as "2-to-4-bit-weights"."""
    for name, what in (("weight_bits", "weights"), ("activation_bits", "activations")):
        if widths := _widths(report, name):
            ends = "-to-".join(f"{width:g}" for width in dict.fromkeys((widths[0], widths[-1])))
            yield f"{ends}-bit-{what}"


def _model_index(report: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The measured quality, where the Hub knows the task and the data."""
    task, dataset = report.get("pipeline_tag") or task_of(report)[1], report.get("dataset")
    compressed, evaluation = report.get("compressed", {}), report.get("evaluation", {})
    results = [
        EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_config=evaluation.get("dataset_config_name"),
            metric_type=key,
            metric_value=compressed[key],
            metric_name=METRICS[key][0],
        )
        for key in QUALITY
        if task and dataset and compressed.get(key) is not None
    ]
    return eval_results_to_model_index(report.get("model_name") or report["architecture"], results) if results else None


def _merge_results(theirs: Any, ours: Any, before: Any) -> list[dict[str, Any]] | None:
    if not ours and not before:
        return theirs
    name: str | None = None
    by_key: dict[Any, EvalResult] = {}
    for index, keep in ((theirs, True), (before, False), (ours, True)):
        for result_name, result in _results(index):
            by_key.pop(key := (result.unique_identifier, result.metric_type), None)
            if keep:
                by_key[key], name = result, result_name
    return eval_results_to_model_index(name, list(by_key.values())) if name and by_key else None


def _results(index: Any) -> Iterator[tuple[str, EvalResult]]:
    """The results in a model-index; none in one that the Hub could not read either."""
    if not index:
        return
    try:
        name, results = model_index_to_eval_results(index)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        logger.warning("the model-index of the model card is malformed and was replaced.")
        return
    yield from ((name, result) for result in results)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
