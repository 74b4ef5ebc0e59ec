"""Distillation: a student in training follows the outputs of a teacher, mostly the dense model it was made from.

    loss = (1 - w) task + w T^2 KL(teacher / T || student / T) + v |student - teacher|^2 / |teacher|^2

w `distillation_weight`, T `distillation_temperature`, v `distillation_hidden_weight` of GETAConfig; the last term is
over hidden states. This module is the two terms that the teacher gives, on tensors and on the outputs of models;
`GETATrainer` mixes them with its own loss.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_geta.config import GETAConfig

DECODER_INPUTS = {"decoder_input_ids", "decoder_inputs_embeds"}
IGNORED = -100  # the label that no loss of transformers counts
# Not all that ends so: Swin's `reshaped_hidden_states` are its `hidden_states` once more.
HIDDEN_STATES = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")


# -- on tensors ---------------------------------------------------------------------------------------------------


def soft_target_loss(student: Tensor, teacher: Tensor, temperature: float, counted: Tensor | None = None) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), the mean over the counted positions.

    T^2 keeps the size of the gradient while T changes (Hinton et al. 2015, arXiv 1503.02531, Sec. 2).

    Args:
        student, teacher: logits, (..., classes); compared in float32 or wider.
        counted: (...), True where a position counts; all of them if not given.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    log_p = F.log_softmax(student.to(dtype) / temperature, dim=-1)
    log_q = F.log_softmax(teacher.to(student.device, dtype) / temperature, dim=-1)
    divergence = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1) * temperature**2  # (...)
    if counted is None:
        return divergence.mean()
    # a batch without a counted position gives 0, not NaN; `where` and not an index, which would wait for the device
    return torch.where(counted, divergence, 0).sum() / counted.sum().clamp(min=1)


def relative_distance(student: Tensor, teacher: Tensor, counted: Tensor | None = None) -> Tensor:
    """|student - teacher|^2 / |teacher|^2 of each example, the mean over the examples.

    The squared error of hidden states (FitNets, Romero et al. 2015, arXiv 1412.6550, Eq. 3; TinyBERT, Jiao et al. 2020,
    arXiv 1909.10351, Eq. 8, both between equal widths), over the teacher's energy: no layer outweighs the others by its
    scale. Each example by itself, so that the mean over two halves of a batch is that over the batch.

    Args:
        student, teacher: hidden states, (batch, ...); compared in float32 or wider.
        counted: (batch, sequence) for states (batch, sequence, width), True where a position counts.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(dtype), teacher.to(student.device, dtype)
    error, energy = (student - teacher).square(), teacher.square()
    if counted is not None:
        error, energy = (torch.where(counted.unsqueeze(-1), x, 0) for x in (error, energy))
    error, energy = error.flatten(1).sum(1), energy.flatten(1).sum(1)  # (batch,)
    return (error / energy.clamp(min=torch.finfo(dtype).tiny)).mean()


def counted_labels(inputs: Mapping[str, Any], shifted: bool) -> Tensor | None:
    """True where the task's loss counts a label, aligned with the logits; None without a tensor of labels.

    Args:
        shifted: position i predicts the label of i + 1, as in causal language models; the last one predicts nothing.
    """
    if isinstance(labels := inputs.get("shift_labels"), Tensor):  # shifted by the collator
        return labels != IGNORED
    if not isinstance(labels := inputs.get("labels"), Tensor):
        return None
    counted = labels != IGNORED
    return F.pad(counted[..., 1:], (0, 1), value=False) if shifted and counted.dim() > 1 else counted


# -- on outputs of models -----------------------------------------------------------------------------------------


def distillation_loss(student: Any, teacher: Any, inputs: Mapping[str, Any], shifted: bool, c: GETAConfig) -> Tensor:
    """What the teacher adds to the loss: w T^2 KL over all logits, their mean, and v times that of all hidden states.

    Positions count as in the task's loss where labels are given for each, otherwise where the attention mask is set.

    Args:
        student, teacher: the ModelOutputs on the same `inputs`.
        inputs: the batch with its labels.
        shifted: as in `counted_labels`.

    Raises:
        ValueError: if nothing in the outputs can be compared.
    """
    terms = []
    labels, mask = counted_labels(inputs, shifted), _mask(inputs, "attention_mask")
    if c.distillation_weight > 0:
        losses = [
            soft_target_loss(s, t, c.distillation_temperature, _matching(s.shape[:-1], labels, mask))
            for s, t in paired_logits(student, teacher)
        ]
        terms.append(c.distillation_weight * torch.stack(losses).mean())
    if c.distillation_hidden_weight > 0:
        decoder = (_mask(inputs, "decoder_attention_mask"), labels)  # a decoder's labels tell its padding, too
        losses = [
            relative_distance(s, t, _matching(s.shape[:-1], *(decoder if name.startswith("decoder") else (mask,))))
            for name, s, t in paired_hidden_states(student, teacher)
        ]
        terms.append(c.distillation_hidden_weight * torch.stack(losses).mean())
    return torch.stack(terms).sum()


def paired_logits(student: Any, teacher: Any) -> list[tuple[Tensor, Tensor]]:
    """The fields of both outputs named "...logits", (batch, classes) or (batch, positions, classes), of equal shapes.

    Raises:
        ValueError: if there are none, with the shapes of both.
    """
    ours, theirs = ({name: x for name, x in _fields(o).items() if _is_logits(name, x)} for o in (student, teacher))
    pairs = [(ours[name], theirs[name]) for name in ours if name in theirs and ours[name].shape == theirs[name].shape]
    if not pairs:
        raise ValueError(
            f"no logits to follow: the model gives {_shapes(ours)}, the teacher_model {_shapes(theirs)}. Choose a "
            "teacher of the same task with the same labels or vocabulary, or write distillation_weight=0."
        )
    if all(s.shape[-1] == 1 for s, _ in pairs):
        raise ValueError(
            f"logits of one class, {_shapes(ours)}, are no distribution that a student could follow (a regression): "
            "write distillation_weight=0, and distillation_hidden_weight above 0."
        )
    return pairs


def paired_hidden_states(student: Any, teacher: Any) -> list[tuple[str, Tensor, Tensor]]:
    """(field, student's, teacher's) for the hidden states of equal shapes; a deeper teacher's at the same depth.

    Raises:
        ValueError: if there are none, with the shapes of both.
    """
    pairs, seen = [], []
    for field in HIDDEN_STATES:
        ours, theirs = (_fields(output).get(field) or () for output in (student, teacher))
        depth = (len(theirs) - 1) / max(len(ours) - 1, 1)  # first with first, last with last (TinyBERT's uniform map)
        for index, state in enumerate(ours if theirs else ()):
            other = theirs[round(index * depth)]
            seen.append(f"{tuple(state.shape)} and {tuple(other.shape)}")
            if state.shape == other.shape:
                pairs.append((field, state, other))
    if not pairs:
        shapes = "; ".join(dict.fromkeys(seen)) or "none given"
        raise ValueError(
            f"no hidden state has the same shape in the model and the teacher_model: {shapes}. Choose a teacher of the "
            "same width, or write distillation_hidden_weight=0."
        )
    return pairs


def _fields(output: Any) -> Mapping[str, Any]:
    if not isinstance(output, Mapping):
        raise ValueError("a model that returns a tuple has no named logits: set config.return_dict=True.")
    return output


def _is_logits(name: str, x: Any) -> bool:
    # classes are the last of two or three dimensions; those of a picture, (batch, classes, height, width), are not
    return name.endswith("logits") and isinstance(x, Tensor) and x.dim() in (2, 3)


def _shapes(fields: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(x.shape)}" for name, x in fields.items()) or "none"


def _mask(inputs: Mapping[str, Any], name: str) -> Tensor | None:
    return mask.bool() if isinstance(mask := inputs.get(name), Tensor) else None


def _matching(shape: torch.Size, *masks: Tensor | None) -> Tensor | None:
    """The first mask of that shape."""
    return next((mask for mask in masks if mask is not None and mask.shape == shape), None)


def teacher_inputs(inputs: Mapping[str, Any], label_names: Collection[str], teacher: PreTrainedModel) -> dict[str, Any]:
    """The batch without labels, so that the teacher computes no loss; with them where a decoder is fed by them."""
    if teacher.config.is_encoder_decoder and DECODER_INPUTS.isdisjoint(inputs):
        return dict(inputs)
    return {name: value for name, value in inputs.items() if name not in label_names}


def shifts_labels(model: PreTrainedModel) -> bool:
    """Whether position i of the logits is trained on the label of i + 1: causal models that have no encoder."""
    if getattr(model.config, "is_encoder_decoder", False):
        return False
    by_loss = LOSS_MAPPING.get(getattr(model, "loss_type", None) or "") is ForCausalLMLoss
    return by_loss or type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
