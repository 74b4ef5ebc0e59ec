"""The model card of a compressed checkpoint: a README.md, rendered from the plain values of its report.

What is written lies between two comments, and a later save replaces what lies between them: a user's own text and
metadata stay.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import transformers
import yaml

from hf_geta.report.figures import metrics_table, with_dense
from hf_geta.report.metadata import (
    card_metadata,
    hub_id,
    join_card,
    merge_metadata,
    split_card,
    task_of,
    what_was_done,
)
from hf_geta.report.picture import has_picture

PICTURE_NAME = "geta_layers.svg"
BEGIN, END = "<!-- hf_geta: begin; what stands up to the end is replaced by the next save -->", "<!-- hf_geta: end -->"
_SECTION = re.compile(r"<!-- hf_geta: begin.*?<!-- hf_geta: end -->", re.S)

CITATION = """\
@inproceedings{qu2025geta,
  title     = {Automatic Joint Structured Pruning and Quantization for Efficient Neural Network Training and
               Compression},
  author    = {Qu, Xiaoyi and Aponte, David and Banbury, Colby and Robinson, Daniel P. and Ding, Tianyu and
               Koishida, Kazuhito and Zharkov, Ilya and Chen, Tianyi},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2025},
  pages     = {15234--15244},
  eprint    = {2502.16638},
  archivePrefix = {arXiv}
}"""


def render_card(report: Mapping[str, Any], existing: str | None = None, before: Mapping[str, Any] | None = None) -> str:
    """The text of README.md: metadata that the Hub accepts, how to load, the figures, how it was made.

    Args:
        report: plain values, each optional but the first:
            architecture: the model's class name, such as "ViTForImageClassification".
            base_model: what it was fine-tuned from. Only a name on the Hub goes into the metadata, never a local path.
            repo_id: where it is published; the code of the card loads it from there.
            dataset: name of the training data on the Hub.
            dense, compressed: metrics by the keys of `METRICS`.
            evaluation: how the quality was measured: "task", "metric", "samples" and what names the data to a script.
            geta: the fields of GETAConfig.
            training: "hyperparameters", and "schedule": stage -> its optimizer steps.
            operations, axes: `Cost.rows()` and the groups of each axis; the picture shows them.
            versions: library -> version.
            auto_class: of a model with code of its own (`auto_map`), the Auto class that loads it.
            license, language, tags, model_name, pipeline_tag: of the metadata.
        existing: the card that this one extends.
        before: the report that `existing` was rendered from, if it was.
    """
    section = f"{BEGIN}\n\n" + "\n\n".join(_sections(report)) + f"\n\n{END}"
    ours = card_metadata(report)
    if not existing or not existing.strip():
        title = report.get("model_name") or f"{report['architecture']}, compressed by GETA"
        return join_card(ours, f"\n# {title}\n\n{section}\n")
    theirs, head, body = split_card(existing)
    body = _SECTION.sub(lambda _: section, body, count=1) if _SECTION.search(body) else _append(body, section)
    if theirs is None:
        return head + body
    merged = merge_metadata(theirs, ours, card_metadata(before) if before else {})
    return head + body if merged == theirs else join_card(merged, body if head else f"\n{body}")


def _append(body: str, section: str) -> str:
    return f"{body.rstrip()}\n\n{section}\n".lstrip() if body.strip() else f"\n{section}\n"


def _sections(report: Mapping[str, Any]) -> Iterable[str]:
    parts = (
        _introduction(report),
        _use(report),
        _figures(report),
        _picture(report),
        _training(report),
        _limits(report),
        f"### Citation\n\n```bibtex\n{CITATION}\n```",
    )
    return filter(None, parts)


def _introduction(report: Mapping[str, Any]) -> str:
    what = " and ".join(what_was_done(report)) or "compressed"
    base = hub_id(report.get("base_model"))
    return (
        f"## Compression\n\n{what.capitalize()} in one training run with `hf_geta`"
        f"{f', from [{base}](https://huggingface.co/{base})' if base else ''} (method: Qu et al., *Automatic Joint "
        "Structured Pruning and Quantization for Efficient Neural Network Training and Compression*, CVPR 2025, "
        "[arXiv 2502.16638](https://arxiv.org/abs/2502.16638))."
    )


def _use(report: Mapping[str, Any]) -> str:
    name = task_of(report)[0] or report["architecture"]
    place = f"from {'transformers' if hasattr(transformers, name) else 'my_module'} import {name}"
    if not report.get("auto_class") and not hasattr(transformers, report["architecture"]):
        place += f"  # once your module defines {report['architecture']}"
    source = hub_id(report.get("repo_id")) or "path/to/this/folder"
    options = ", trust_remote_code=True" if report.get("auto_class") else ""
    return (
        "### Use\n\n```python\nimport hf_geta  # registers the compressed format with transformers\n"
        f'{place}\n\nmodel = {name}.from_pretrained("{source}"{options})\n```'
    )


def _figures(report: Mapping[str, Any]) -> str:
    columns = with_dense(report.get("dense", {}), report.get("compressed", {}))
    if not columns:
        return ""
    text = f"### Figures\n\n{metrics_table(columns)}"
    evaluation = report.get("evaluation")
    if not evaluation:
        return text
    data = f"`{report['dataset']}`" if report.get("dataset") else "the evaluation data of its run"
    samples = f", {evaluation['samples']:,} samples" if evaluation.get("samples") else ""
    return f"{text}\n\nMeasured on the saved model, loaded from disk, on {data}{samples}."


def _picture(report: Mapping[str, Any]) -> str:
    if not has_picture(report):
        return ""
    return f"### Layers\n\n![Groups kept and bit widths, layer by layer]({PICTURE_NAME})"


def _training(report: Mapping[str, Any]) -> str:
    training = report.get("training", {})
    parts = []
    if hyperparameters := training.get("hyperparameters"):
        parts.append("\n".join(f"- {name}: {value}" for name, value in hyperparameters.items()))
    if schedule := training.get("schedule"):
        rows = [f"| {stage} | {steps:,} |" for stage, steps in schedule.items()]
        parts.append("\n".join(["| stage | optimizer steps |", "|---|---:|", *rows]))
    if settings := report.get("geta"):
        text = yaml.safe_dump(dict(settings), sort_keys=False)
        parts.append(f"<details><summary>Settings of the compression</summary>\n\n```yaml\n{text}```\n\n</details>")
    if versions := report.get("versions"):
        parts.append("Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".")
    return "\n\n".join(["### Training procedure", *parts]) if parts else ""


def _limits(report: Mapping[str, Any]) -> str:
    limits = ["It loads only where `hf_geta` is imported; elsewhere loading stops with an error."]
    if "quantized" in what_was_done(report):
        limits += [
            "Its weights are integers: to train it again, load it in float, with "
            "`quantization_config=hf_geta.GETAQuantizationConfig(dequantize=True)`.",
            "Layers whose weight and input have at most 8 bits run in integers on CPUs with AVX-512 VNNI; all others, "
            "and all of them elsewhere, compute with decoded float weights.",
        ]
    limits += [
        "Relative BOPs are counted (MACs x weight bits x input bits of the layers that hold a weight), not timed.",
        "A mean over all samples can hide what compression does to rare classes or inputs: measure those that matter "
        "to you. Biases of the dense model and of its data are here as well.",
    ]
    return "### Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)
