"""ResumableTrainer: transformers' Trainer, whose checkpoints appear whole or not at all and are looked at before use.

GETATrainer is one. Trainer writes a checkpoint file by file where it will be read: a process that is killed meanwhile
leaves a part of one under the name of a whole one. Here it is written beside and then renamed.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, get_last_checkpoint, rotate_checkpoints

from hf_geta.agreement import is_distributed
from hf_geta.checkpoint.resumable import CONFIG_NAME, damage, last_whole_checkpoint, whole_checkpoints
from hf_geta.config import GETAConfig
from hf_geta.optim.finite import refuse_not_finite
from hf_geta.quantization.swap import settled

UNFINISHED = "_saving"  # no checkpoint's name; and what begins with an underscore is never pushed
# what another value changes nothing in that a checkpoint holds
MAY_CHANGE = (
    "distillation_weight",
    "distillation_temperature",
    "distillation_hidden_weight",
    "calibration_batches",
)
TORCH_COULD_NOT_WRITE = ("PytorchStreamWriter", "iostream error")  # torch.save raises RuntimeError for a full disk


class ResumableTrainer(Trainer):
    """Trainer, whose runs with compression survive a kill and a full disk.

    Attributes:
        geta_config: the targets; without them it is Trainer.
    """

    model: PreTrainedModel
    geta_config: GETAConfig | None
    _is_saving_checkpoint = False

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As Trainer's; with compression a checkpoint is looked at first: a crash may have cut it short.

        Args:
            resume_from_checkpoint: a folder, or `True` for the last whole one in `args.output_dir`, with a warning
                that names later ones that are damaged.
            *args, **kwargs: as in Trainer.

        Raises:
            ValueError: before any step: the folder is damaged, or there is none to go on from, or it is of a run with
                other targets.
            OSError: a checkpoint cannot be written; it names the last whole one.
            FloatingPointError: the gradients of many steps in a row held NaN or inf; likewise.
        """
        if self.geta_config is None:
            folder = resume_from_checkpoint
            _check_targets(
                get_last_checkpoint(str(self.args.output_dir)) if folder is True else folder, None, self.model
            )
            return super().train(resume_from_checkpoint, *args, **kwargs)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(str(self.args.output_dir))
        elif resume_from_checkpoint and (problem := damage(str(resume_from_checkpoint))):
            raise ValueError(
                f"{resume_from_checkpoint} cannot be gone on from: {problem}. Name an earlier checkpoint, or "
                "write resume_from_checkpoint=True for the last whole one."
            )
        _check_targets(resume_from_checkpoint, self.geta_config, self.model)
        if resume_from_checkpoint and self.args.auto_find_batch_size:  # Trainer looks later: once a model is calibrated
            state = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME))
            self._train_batch_size = state.train_batch_size or self._train_batch_size
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error} {_where_to_go_on(str(self.args.output_dir))}") from error

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Trainer's checkpoint, written into a folder beside, which is renamed once every process has written its part.

        Raises:
            OSError: if it cannot be written. Nothing of it is left then; the message names the last whole one.
            FloatingPointError: if the model holds NaN or inf, with which no run can go on.
        """
        if self.geta_config is None:
            super()._save_checkpoint(model, trial)
            return
        refuse_not_finite(self.model)
        run_folder = Path(output_dir := self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(run_folder / UNFINISHED, ignore_errors=True)  # of a process that was killed while it saved
        _wait_for_all()
        self._is_saving_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
            _wait_for_all()
            best = self.state.best_model_checkpoint
            is_best = best is not None and Path(best) == run_folder / UNFINISHED / name  # as a string, "./out" differs
            if is_best:  # by the path that it gets now
                self.state.best_model_checkpoint = os.path.join(output_dir, name)
            if self.args.should_save:
                settled(self.geta_config, self.model).save(run_folder / UNFINISHED / name / CONFIG_NAME)
                if is_best:
                    self.state.save_to_json(str(run_folder / UNFINISHED / name / TRAINER_STATE_NAME))
                self._put_in_place(run_folder, name)
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not any(text in str(error) for text in TORCH_COULD_NOT_WRITE):
                raise
            if self.args.should_save:
                shutil.rmtree(run_folder / UNFINISHED, ignore_errors=True)
            raise OSError(
                f"{run_folder / name} could not be written ({error}): free some space, or keep fewer checkpoints by "
                f"save_total_limit. {_where_to_go_on(run_folder)}"
            ) from error
        finally:
            self._is_saving_checkpoint = False
        _wait_for_all()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_folder / name))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(run_folder), self.args.save_total_limit, best, use_mtime=True)

    def _put_in_place(self, run_folder: Path, name: str) -> None:
        """Rename what was written."""
        written, place = run_folder / UNFINISHED / name, run_folder / name
        if place.exists():  # of an earlier run in the same folder
            place.rename(run_folder / UNFINISHED / "replaced")
        written.rename(place)
        shutil.rmtree(run_folder / UNFINISHED)

    def _get_output_dir(self, trial: Any) -> str:
        """As Trainer's, where checkpoints lie; while one is written, the folder beside."""
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._is_saving_checkpoint else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing while a checkpoint is written: it is sent from its place."""
        if not self._is_saving_checkpoint:
            super()._push_from_checkpoint(checkpoint_folder)


def _check_targets(checkpoint: str | bool | None, config: GETAConfig | None, model: nn.Module) -> None:
    """ValueError for a checkpoint of a run with other targets; one that does not say which is taken as it is."""
    if not checkpoint or not (file := Path(str(checkpoint)) / CONFIG_NAME).is_file():
        return
    if config is None:
        raise ValueError(
            f"{checkpoint} is of a run with compression, this one has none: pass "
            f"geta_config=GETAConfig.from_file({str(file)!r}), or start anew: train() without resume_from_checkpoint."
        )
    began, config = settled(GETAConfig.from_file(file), model), settled(config, model)
    if names := [name for name in began.different_fields(config) if name not in MAY_CHANGE]:
        raise ValueError(
            f"{checkpoint} is of a run with {began.in_words(names)}, this one has {config.in_words(names)}: resume "
            "with the same, or start anew: train() without resume_from_checkpoint."
        )


def _where_to_go_on(run_folder: str | os.PathLike[str]) -> str:
    found = next(whole_checkpoints(run_folder), None)
    if found is None:
        return f"There is no whole checkpoint in {run_folder} to go on from."
    return f"The last whole checkpoint is {found}; resume_from_checkpoint=True goes on from there."


def _wait_for_all() -> None:
    if is_distributed():
        dist.barrier()
