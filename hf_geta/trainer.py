"""GETATrainer: transformers' Trainer, whose runs end with a small model.

It has no loop of its own. It prepares the model when the optimizer is created, hands QASSO to the loop, adds the
compression's state to the logs, and saves the finalized model. Without a `geta_config` it is Trainer.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers import PreTrainedModel, TrainingArguments

from hf_geta.checkpoint.directory import check_writable, replace_files
from hf_geta.checkpoint.layers import set_backend_
from hf_geta.checkpoint.names import own_tensor_names
from hf_geta.compress import create_optimizer, prepare_model, refuse_compressed, refuse_unfit
from hf_geta.config import GETAConfig
from hf_geta.engines import refuse_unsupported
from hf_geta.finalize import finalize_model, rounded_widths
from hf_geta.first_batches import first_batches, refuse_unreadable, without_labels
from hf_geta.hub import card_fields, describe_training, pickled_without_token, push_while_training
from hf_geta.measure import compression_report, float_inputs, measure_compression, output_difference
from hf_geta.optim.finite import refuse_not_finite
from hf_geta.optim.pricing import Pricing
from hf_geta.optim.schedule import Schedule, Stage
from hf_geta.preparation import is_prepared, preparation_of, saved_without_warning
from hf_geta.progress import CompressionProgress
from hf_geta.quantization.swap import settled
from hf_geta.randomness import preserved_rng
from hf_geta.report.cost import Cost
from hf_geta.report.files import load_report, save_report
from hf_geta.report.publish import publish_with_card_
from hf_geta.resuming import ResumableTrainer
from hf_geta.sharded_training import ShardedTrainer
from hf_geta.sharding import reshard_
from hf_geta.teacher import DistillingTrainer

logger = logging.getLogger(__name__)

# Sums are taken over fewer (zero) terms, in the model's dtype; a wrong slice moves the outputs by their own size.
FINALIZE_TOLERANCE = 0.05


class GETATrainer(ResumableTrainer, ShardedTrainer, DistillingTrainer):
    """Fine-tune and compress in one run.

    Args:
        geta_config: the targets; `None` trains without compression, exactly like `Trainer`.
        teacher_model: a model whose outputs the compressed one follows while it trains (the dense model, mostly), or
            the name of its checkpoint; put in eval mode, frozen, never saved. The `distillation_*` fields of
            `geta_config` weigh it against the task's loss.
        *args, **kwargs: as `transformers.Trainer` takes them. `optimizers=(optimizer, None)` wraps an optimizer of
            your own. `push_to_hub()` publishes the compressed model; what `args.hub_strategy` sends while a run
            compresses is told by `hf_geta.hub.push_while_training`.

    Raises:
        TypeError: for a `geta_config` that is none.
        ValueError: for a model that could not be saved compressed, or is compressed already (without a `geta_config`,
            too). At the start of `train()`, before any step: stages that do not fit the run, no prunable axis, no
            layer to quantize, NaN in calibration, an output folder that is not writable, a teacher that gives
            nothing to follow.
    """

    def __init__(
        self,
        *args: Any,
        geta_config: GETAConfig | None = None,
        teacher_model: PreTrainedModel | str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self._planned_steps = 0
        if geta_config is not None and not isinstance(geta_config, GETAConfig):
            raise TypeError(f"geta_config is a {type(geta_config).__name__}: write GETAConfig(**values).")
        model = args[0] if args else kwargs.get("model")
        if isinstance(model, torch.nn.Module):  # before Trainer, which knows less of what to do
            (refuse_compressed if geta_config is None else refuse_unfit)(model)
        given = args[1] if len(args) > 1 else kwargs.get("args")
        if geta_config is not None and isinstance(given, TrainingArguments):
            check_writable(str(given.output_dir))  # Trainer creates the folder, and says less if it cannot
        super().__init__(*args, geta_config=geta_config, teacher_model=teacher_model, **kwargs)
        if geta_config is not None:
            refuse_unsupported(self)
            self.add_callback(CompressionProgress(self))

    # -- before the first step ------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Quantize, calibrate and find the groups of `self.model`; once per model. `train()` calls it."""
        if self.geta_config is None:
            return
        if is_prepared(self.model):
            config, given = preparation_of(self.model).config, settled(self.geta_config, self.model)
            if names := config.different_fields(given):
                raise ValueError(
                    f"the model was prepared with {config.in_words(names)}, the trainer was given "
                    f"{given.in_words(names)}: pass the same config, or a fresh model."
                )
            return
        with preserved_rng():
            batches = self._calibration_batches(self.geta_config.calibration_batches)
            prepare_model(self.model, self.geta_config, batches[0], batches)

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """As in Trainer, for a run of `num_training_steps` optimizer steps."""
        self._planned_steps = num_training_steps
        super().create_optimizer_and_scheduler(num_training_steps)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer that `TrainingArguments` ask for, inside QASSO."""
        if self.geta_config is None:
            return super().create_optimizer(model)
        total_steps = self._planned_steps or self.state.max_steps
        if self.qasso is not None:
            if self.args.auto_find_batch_size:  # the loop began anew, with another batch size
                self.qasso.plan_(total_steps)
            return super().create_optimizer(model)
        if not total_steps:
            raise ValueError(
                "QASSO plans its stages over the whole run: call train(), or "
                "create_optimizer_and_scheduler(num_training_steps)."
            )
        Schedule.from_config(self.geta_config, total_steps)  # refuses before a calibration is spent
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            self.get_optimizer_cls_and_kwargs(self.args, self.model)  # so does one whose package is missing
        if not self.in_pieces:
            self._try_teacher()
        self.prepare()
        if self.in_pieces:
            self.cut_()
            self._try_teacher()  # now the model is where the teacher is
        self.optimizer = create_optimizer(self.model, super().create_optimizer(model), total_steps)
        self.remember_parameters()
        return self.optimizer

    def _try_teacher(self) -> None:
        if self.distils:
            with preserved_rng():
                batch = self._first_batches(1)[0]
            self.try_teacher(batch)
            reshard_(self.model)

    def _calibration_batches(self, count: int) -> list[dict[str, Any]]:
        """This process's share of the first batches of a shuffled pass over the training data, without labels.

        Together they are the first `count` batches of the size that all processes train on in a step.
        """
        batches = self._first_batches(count)
        return [without_labels(batch, self.model, self.label_names) for batch in batches]

    def _first_batches(self, count: int) -> list[dict[str, Any]]:
        if self.train_dataset is None:
            raise ValueError("GETATrainer sets the activation ranges from training data: pass train_dataset.")
        found = first_batches(
            self.train_dataset,
            self._get_collator_with_removed_columns(self.data_collator, "calibration"),
            self._train_batch_size // max(1, self.args.n_gpu),
            count,
            self.args.seed,
            self.args.world_size,
            self.args.process_index,
        )
        # a model that will be cut waits for it on the CPU
        batches = [send_to_device(self._prepare_inputs(batch), self.model.device) for batch in found]
        refuse_unreadable(batches, self.model, self.label_names, self.train_dataset)
        return batches

    # -- while it trains ------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add stage, group sparsity, mean widths and relative BOPs to the training logs; price and gap of a budget.

        Once optimizer steps were skipped, since their gradients held NaN or inf, the logs tell how many.
        The gap is the present cost over the budget, less 1: at most 0 from the cool-down on, where the budget was met.
        """
        if "loss" in logs and self.qasso is not None:
            cost = self.measure_compression()
            logs["stage"] = int(self.stage)
            logs["group_sparsity"] = cost.group_sparsity
            logs["weight_bits"] = cost.mean_weight_bits
            logs["activation_bits"] = cost.mean_activation_bits
            logs["relative_bops"] = cost.relative_bops
            if self._skipped_steps:
                logs["skipped_steps"] = self._skipped_steps
                refuse_not_finite(self.model)  # a forward pass may have left NaN in the statistics of a batch norm
            if isinstance(pricing := self.qasso.targets, Pricing):
                logs["price"] = pricing.price
                logs["budget_gap"] = pricing.gap(self.qasso.removed)
        super().log(logs, start_time)

    @property
    def _skipped_steps(self) -> int:
        """Optimizer steps of this run that left everything as it was: by a gradient scaler, or by QASSO."""
        return 0 if self.qasso is None else max(self.state.global_step - self.qasso.step_count, 0)

    @property
    def stage(self) -> Stage:
        """The stage of the optimizer step taken last."""
        if self.qasso is None:
            raise ValueError("this run has no stages: train() plans them, if there is a geta_config.")
        return self.qasso.stage_at(max(self.qasso.step_count - 1, 0))

    def measure_compression(self) -> Cost:
        """Operations, parameters, widths and group sparsity of the model as it is now."""
        return measure_compression(self.model)

    # -- what is saved --------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the compressed model: pruned shapes, packed codes, config, processor, card; written beside, then moved.

        Checkpoints inside a run keep the model in training (latent weights, quantizers), so that it can be resumed.
        """
        if self.geta_config is None or self._is_saving_checkpoint or not is_prepared(self.model):
            super().save_model(output_dir, _internal_call)
            return
        if self.args.should_save or self.in_pieces:
            self._save_compressed(Path(output_dir or str(self.args.output_dir)))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def finalize(self, is_main_process: bool = True) -> PreTrainedModel:
        """The small model, checked: on a calibration batch it computes what the masked model computes.

        Its `push_to_hub` publishes it with processor, report and card. Of a model in pieces (FSDP2) every process calls
        it, and gets the same; one that will not save it writes `is_main_process=False`, and gets it on the meta device.

        A run that ended before its targets held (stopped early, or with steps that a gradient scaler skipped) is
        finalized as it is, with a warning.

        Raises:
            ValueError: before `train()`.
            RuntimeError: if it does not, which is a bug in the search space; nothing is saved then.
        """
        if not is_prepared(self.model):
            raise ValueError("nothing is compressed yet: call train() first, with a geta_config.")
        self._warn_of_an_early_end()
        small = finalize_model(self.model, is_main_process)
        self._check_pruning(small, is_main_process)
        publish_with_card_(small, self._report(), self._processor)
        return small

    def _warn_of_an_early_end(self) -> None:
        if self.qasso is not None and (
            self.stage is not Stage.COOLDOWN or int(self.qasso.removed.sum()) != self.qasso.groups_to_remove
        ):
            logger.warning(
                "the run ended in its %s stage, after %d of %d planned optimizer steps%s: %d of %d groups are removed.",
                self.stage.label,
                self.qasso.step_count,
                self.qasso.schedule.total_steps,
                f" ({self._skipped_steps} were skipped, since gradients overflowed)" if self._skipped_steps else "",
                int(self.qasso.removed.sum()),
                self.qasso.groups_to_remove,
            )

    def _check_pruning(self, small: PreTrainedModel, here: bool) -> None:
        """Compare the small model with the masked one, both with the widths that are saved, on a calibration batch.

        The masked model is run by all processes that it lies on, the small one by those that have it here.
        """
        with preserved_rng():
            inputs = self._calibration_batches(1)[0]
        set_backend_(small, "packed")  # one decoded weight at a time: there may be no room for all
        # it is the graph that is checked, and not what rounds inputs
        in_float, precision = (float_inputs(self.model), float_inputs(small)), self.accelerator.autocast()
        with rounded_widths(self.model), in_float[0], in_float[1], precision:  # in which the masked model computes
            difference = output_difference(self.model, small if here else None, inputs)
        if self.in_pieces:  # each has looked at a batch of its own, or at none
            reshard_(self.model)
            each = self.accelerator.gather(torch.tensor([difference], device=self.args.device))
            difference = float(each.max())
        set_backend_(small, "auto")
        if not difference <= FINALIZE_TOLERANCE:
            raise RuntimeError(
                f"the pruned model's outputs differ from the masked model's by {difference:.1%}: the dependency graph "
                "is wrong for this model. Nothing was saved; please report the architecture."
            )

    def _save_compressed(self, directory: Path) -> None:
        small, report = self.finalize(is_main_process=bool(self.args.should_save)), self._report()
        if not self.args.should_save:  # it has added its pieces
            return
        self._finish_current_push()  # which reads the files that are replaced now

        def write(folder: Path) -> None:
            small.save_pretrained(folder)
            if self._processor is not None:
                self._processor.save_pretrained(folder)
            save_report(folder, report, previous=directory)

        replace_files(directory, write)

    @property
    def _processor(self) -> Any:
        """What prepares the model's inputs, as Trainer saves it."""
        collators = getattr(self.data_collator, "tokenizer", None)
        return collators if self.processing_class is None else self.processing_class

    def _report(self) -> dict[str, Any]:
        """What the card says of the model as it is now, and of its run."""
        return compression_report(self.model) | {
            "repo_id": self.hub_model_id or self.args.hub_model_id,
            "training": describe_training(self, self.qasso),
        }

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """A checkpoint keeps the model's own tensor names: `load_state_dict` resumes it, and maps none."""
        names = own_tensor_names(self.model) if is_prepared(self.model) else contextlib.nullcontext()
        with names, saved_without_warning(self.model), pickled_without_token(self.args):
            super()._save(output_dir, state_dict)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if is_prepared(self.model) and not self._is_saving_checkpoint:
            push_while_training(self, checkpoint_folder, self._save_compressed)
            return
        with pickled_without_token(self.args):
            super()._push_from_checkpoint(checkpoint_folder)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Only models that meet the targets compete for `load_best_model_at_end`: those of the cool-down."""
        if self.qasso is not None and self.stage is not Stage.COOLDOWN:
            return False
        return super()._determine_best_metric(metrics, trial)

    def create_model_card(self, **given: Any) -> None:  # type: ignore[override]
        """The compressed model's own card in `output_dir`, with this metadata; Trainer's, where nothing is compressed.

        Args:
            **given: as Trainer takes them: language, license (by default that of the base model's card), tags,
                model_name, finetuned_from, tasks, dataset_tags.
        """
        if not is_prepared(self.model):
            super().create_model_card(**given)
        elif self.is_world_process_zero():
            folder = str(self.args.output_dir)
            report = load_report(folder)
            if not report and self.in_pieces:
                raise ValueError(f"{folder} has no report of the model yet: call save_model() first, on every process.")
            report = report or self._report()
            save_report(folder, report | card_fields(report, given, self.args.hub_token))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.prepare()
        super()._load_from_checkpoint(resume_from_checkpoint, model)
