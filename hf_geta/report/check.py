"""Is a compressed folder what it says? Its files, its codes, its widths and its figures, each against its own claim."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_geta.checkpoint.layers import PackedLayer
from hf_geta.checkpoint.models import dense_skeleton, load_model
from hf_geta.checkpoint.packing import highest_code, unpack_codes
from hf_geta.config import GETAConfig
from hf_geta.report.files import REPORT_NAME, hash_files
from hf_geta.report.folder import clean, describe, figures_of, read_report


@dataclass(frozen=True)
class Check:
    """What was looked at, and why it does not hold; `problem` is empty where it does."""

    what: str
    problem: str = ""

    @property
    def holds(self) -> bool:
        return not self.problem


def check_folder(folder: str | Path) -> Iterator[Check]:
    """One `Check` after the other: hashes, loading, codes, widths, figures; those without a claim are left out.

    The report says what was saved: it guards against files that were mixed up or damaged, not against someone who
    changes files and report alike.

    Raises:
        ValueError: for a model that is not compressed by GETA, or a report that cannot be read.
    """
    _, manifest = dense_skeleton(folder)
    report = read_report(folder)
    if "files" in report:
        yield from _check_files(Path(folder), report["files"])
    try:
        model = load_model(folder)
    except ValueError as error:
        yield Check("the model loads", clean(str(error)))
        return
    yield Check("the model loads")
    yield _check_numbers(model)
    if manifest.layers:
        yield _check_codes(model)
        if "geta" in report:
            yield from _check_widths(model, report["geta"])
    if report:
        yield from _check_figures(Path(folder), report)


def _check_files(folder: Path, recorded: Any) -> Iterator[Check]:
    here = hash_files(folder)
    if not isinstance(recorded, dict):
        yield Check("hashes", f"{REPORT_NAME}: files is no object.")
        return
    for name in sorted({*map(str, recorded), *here}):
        what, said = f"{clean(name)} has the bytes that were saved", recorded.get(name)
        if name not in here:
            yield Check(what, "the file is not here.")
        elif not isinstance(said, dict):
            yield Check(what, f"{REPORT_NAME} does not know the file: it is from another save.")
        elif said.get("sha256") != here[name]["sha256"]:
            yield Check(what, "its sha256 differs: it was damaged, changed, or is from another save.")
        else:
            yield Check(what)


def _check_numbers(model: PreTrainedModel) -> Check:
    what = "every float tensor is finite"
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return Check(what, f"{clean(name)} holds NaN or infinity.")
    return Check(what)


def _check_codes(model: PreTrainedModel) -> Check:
    """|code| <= 2^(bits-1) - 1: of the two's complement numbers all but the lowest."""
    what = "every code is within its width"
    for name, layer in _packed(model).items():
        bits, numel = layer.manifest.bits, torch.Size(layer.manifest.shape).numel()
        lowest = int(unpack_codes(layer.codes(), bits, numel).min())
        if lowest < -highest_code(bits):
            return Check(what, f"{clean(name)}.weight has the code {lowest} at {bits} bits.")
    return Check(what)


def _check_widths(model: PreTrainedModel, settings: Any) -> Iterator[Check]:
    try:
        config = GETAConfig.from_dict(settings)
    except (ValueError, TypeError, AttributeError) as error:
        yield Check("the settings of the compression", f"{REPORT_NAME}: geta: {clean(str(error))}")
        return
    packed = _packed(model)
    ends = {model.get_input_embeddings(), model.get_output_embeddings()} if config.quantize_embeddings else set()
    owners = ends | {owner for end in ends if isinstance(end, PackedLayer) for owner in end.shared_with}
    tables = {name for name, layer in packed.items() if owners & {layer, *layer.shared_with}}
    widths = {
        "weight_bits": {name: layer.manifest.bits for name, layer in packed.items() if name not in tables},
        "quantize_embeddings": {name: packed[name].manifest.bits for name in tables},
        "activation_bits": {
            name: bits for name, layer in packed.items() if (bits := layer.manifest.activation_bits) is not None
        },
    }
    for key, what in (("weight_bits", "weights"), ("quantize_embeddings", "embeddings"), ("activation_bits", "inputs")):
        allowed = config.allowed_bits(key)
        if key == "activation_bits" and allowed:
            allowed += config.allowed_bits("outlier_activation_bits") or ()
        if key == "quantize_embeddings" and not allowed:
            continue
        said = f"{', '.join(map(str, allowed))} bits" if allowed else "float"
        wrong = {name: bits for name, bits in widths[key].items() if bits not in (allowed or ())}
        problem = ", ".join(f"{clean(name)} has {bits}" for name, bits in list(wrong.items())[:3])
        yield Check(f"the widths of all {what} are allowed: {said}", problem)


def _check_figures(folder: Path, report: Mapping[str, Any]) -> Iterator[Check]:
    claimed, counted = figures_of(report, "compressed"), describe(folder, {}).compressed
    for key in ("parameters", "file_bytes"):
        if (said := claimed.get(key)) is not None and key in counted:
            yield Check(f"{key}: {said:,}", "" if said == counted[key] else f"counted: {counted[key]:,}.")


def _packed(model: PreTrainedModel) -> dict[str, PackedLayer]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLayer)}
