"""DistillingTrainer: transformers' Trainer, whose model follows a teacher while it trains.

GETATrainer is one. It adds the loss of `hf_geta.distillation` to Trainer's own, with the same part of every optimizer
step, and to the logs; evaluation stays that of the task.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers import PreTrainedModel, Trainer

from hf_geta.config import GETAConfig
from hf_geta.distillation import counted_labels, distillation_loss, shifts_labels, teacher_inputs
from hf_geta.randomness import preserved_rng


class DistillingTrainer(Trainer):
    """Trainer with a teacher.

    Args:
        geta_config: its `distillation_*` fields weigh the teacher against the task's loss.
        teacher_model: a model, which is put in eval mode and frozen, or the name of a checkpoint; never saved.
        *args, **kwargs: as `transformers.Trainer` takes them.

    Raises:
        ValueError: for a teacher that the model cannot follow.
    """

    model: PreTrainedModel  # always there once Trainer.__init__ has run

    def __init__(
        self,
        *args: Any,
        geta_config: GETAConfig | None = None,
        teacher_model: PreTrainedModel | str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if teacher_model is not None and geta_config is None:
            raise ValueError(
                "teacher_model without geta_config: the weights of its loss are fields of GETAConfig; pass one, or "
                "drop the teacher."
            )
        self.geta_config = geta_config
        self.teacher_model: PreTrainedModel | None = None
        self._distilled: torch.Tensor | None = None  # since the last log: sums of (portion x loss, portion)
        super().__init__(*args, **kwargs)
        if teacher_model is not None:
            self._take_teacher(teacher_model)

    def _take_teacher(self, teacher_model: PreTrainedModel | str | os.PathLike[str]) -> None:
        if self.args.n_gpu > 1:
            raise ValueError(
                "a teacher_model under DataParallel would follow one part of the batch: start one process for each GPU "
                "(accelerate launch), or show one (CUDA_VISIBLE_DEVICES=0)."
            )
        with preserved_rng():  # loading may initialize
            self.teacher_model = load_teacher(teacher_model, self.model)
        self.teacher_model.config.use_cache = self.args.use_cache  # as Trainer does with the model
        if getattr(self.teacher_model, "hf_device_map", None) is None:
            self.teacher_model.to(self.args.device)  # type: ignore[arg-type]

    @property
    def _config(self) -> GETAConfig:
        assert self.geta_config is not None  # there is no teacher without it
        return self.geta_config

    @property
    def distils(self) -> bool:
        """Whether a teacher adds to the loss."""
        if self.teacher_model is None:
            return False
        return self._config.distillation_weight > 0 or self._config.distillation_hidden_weight > 0

    def try_teacher(self, inputs: dict[str, Any]) -> None:
        """Compare teacher and model on one batch, in eval mode: what cannot be compared is refused before any step.

        Raises:
            ValueError: if the teacher does not take the batch, or nothing in the outputs can be compared.
        """
        training = self.model.training
        with preserved_rng(), torch.no_grad():
            _, outputs = super().compute_loss(self.model.eval(), self._with_hidden_states(inputs), return_outputs=True)
            self.model.train(training)
            try:
                followed = self._teacher_outputs(inputs)
            except (LookupError, RuntimeError, TypeError, AttributeError, ValueError) as error:
                if should_reduce_batch_size(error):
                    raise
                raise ValueError(
                    f"{type(self.teacher_model).__name__}, the teacher_model, does not take a batch of "
                    f"{type(self.model).__name__}: {error!r}. Choose a teacher with the same inputs."
                ) from error
            distillation_loss(outputs, followed, inputs, shifts_labels(self.model), self._config)
        if self._config.distillation_weight > 0:
            _refuse_other_problems(self.model)

    def _with_hidden_states(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs | ({"output_hidden_states": True} if self._config.distillation_hidden_weight else {})

    def _teacher_outputs(self, inputs: dict[str, Any]) -> Any:
        assert self.teacher_model is not None
        seen = self._with_hidden_states(teacher_inputs(inputs, self.label_names, self.teacher_model))
        # accelerate wraps this autocast around the model's forward, too; inference_mode would break its backward
        with torch.no_grad(), self.accelerator.autocast():
            return self.teacher_model(**seen)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Trainer's loss; while it trains with a teacher, mixed with the distance from it."""
        if not (self.distils and model.training):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, self._with_hidden_states(inputs), True, num_items_in_batch)
        followed = self._teacher_outputs(inputs)
        distilled = distillation_loss(outputs, followed, inputs, shifts_labels(self.model), self._config)
        portion, scale = self._portion_of_step(distilled, inputs, num_items_in_batch)
        logged = torch.stack([distilled.detach() * portion, portion])
        self._distilled = logged if self._distilled is None else self._distilled + logged
        loss = (1 - self._config.distillation_weight) * loss + scale * distilled
        return (loss, outputs) if return_outputs else loss

    def _portion_of_step(
        self, loss: torch.Tensor, inputs: dict[str, Any], num_items: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(this batch's part of its optimizer step, the factor that gives a mean over the batch that part).

        Trainer divides the task's loss of a batch by the labels of the whole step, or, where the model cannot, the
        batch's mean by the number of batches.
        """
        steps = getattr(self, "current_gradient_accumulation_steps", 1)  # 1: called outside of train()
        portion = torch.full_like(loss, 1 / steps, requires_grad=False)  # filled on the device: no wait
        by_trainer = not (self.model_accepts_loss_kwargs and num_items is not None) and self.compute_loss_func is None
        if (given := getattr(self, "loss_is_scaled_for_ga", None)) is not None:  # newer transformers
            by_trainer = not given
        if by_trainer:
            return portion, torch.ones_like(portion)
        counted = counted_labels(inputs, shifts_labels(self.model))
        if num_items is None or counted is None:
            return portion, portion
        portion = (counted.sum() / num_items).to(loss.dtype)
        across = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1  # DDP takes the mean
        return portion, portion * across

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add "distillation_loss", the teacher's part of "loss", to the training logs."""
        if "loss" in logs and self._distilled is not None:
            total, portion = self.accelerator.reduce(self._distilled, "sum").tolist()
            logs["distillation_loss"] = total / max(portion, torch.finfo(torch.float32).tiny)
            self._distilled = None
        super().log(logs, start_time)


def load_teacher(teacher: PreTrainedModel | str | os.PathLike[str], student: PreTrainedModel) -> PreTrainedModel:
    """The teacher, in eval mode and without gradients: a model (changed in place), or what a name or folder holds.

    A name is loaded with the student's class, in the student's dtype.

    Raises:
        ValueError: for anything else; weights that the checkpoint lacks; parameters shared with the student; a smaller
            vocabulary; the same labels in another order.
    """
    if isinstance(teacher, str | os.PathLike):
        found: Any = type(student).from_pretrained(teacher, dtype=student.dtype, output_loading_info=True)
        loaded, info = found
        if info["missing_keys"]:
            raise ValueError(
                f"teacher_model={str(teacher)!r} has no weights for {', '.join(sorted(info['missing_keys'])[:3])} of "
                f"{type(student).__name__}: choose a model that was trained for this task."
            )
        teacher = loaded
    if not isinstance(teacher, PreTrainedModel):
        raise ValueError(f"teacher_model is a {type(teacher).__name__}: pass a PreTrainedModel, a folder or a Hub id.")
    _refuse_another_language(student, teacher)
    if {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}:
        raise ValueError(
            "teacher_model shares parameters with the model, it would change while it teaches: pass "
            "copy.deepcopy(model), or the name of the checkpoint."
        )
    return teacher.eval().requires_grad_(False)


def _refuse_another_language(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    configs = [getattr(model.config, "text_config", model.config) for model in (student, teacher)]
    ours, theirs = (getattr(config, "vocab_size", None) for config in configs)
    if isinstance(ours, int) and isinstance(theirs, int) and theirs < ours:  # on a GPU its embedding would assert
        raise ValueError(
            f"teacher_model reads a vocabulary of {theirs} tokens, the model one of {ours}: choose a teacher with the "
            "same tokenizer."
        )
    labels, teacher_labels = ({int(k): v for k, v in (m.config.id2label or {}).items()} for m in (student, teacher))
    if labels != teacher_labels and sorted(labels.values()) == sorted(teacher_labels.values()):
        raise ValueError(
            f"teacher_model has the model's labels in another order ({teacher_labels}, the model {labels}): its "
            "probabilities would teach the wrong classes. Number the data's labels as the teacher does."
        )


def _refuse_other_problems(student: PreTrainedModel) -> None:
    """ValueError for a model whose config (since its first batch) says that its logits are no distribution."""
    problem = getattr(student.config, "problem_type", None)
    if problem in ("regression", "multi_label_classification"):
        raise ValueError(
            f"problem_type={problem!r}: its logits are no distribution over classes that a student could follow; write "
            "distillation_weight=0, and distillation_hidden_weight above 0."
        )
