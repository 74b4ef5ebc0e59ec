"""What GETATrainer sends to the Hub while it trains, what it says of its run, and the token that it never writes."""

from __future__ import annotations

import contextlib
import copyreg
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml
from transformers import Trainer, TrainingArguments
from transformers.modelcard import extract_hyperparameters_from_trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy
from transformers.utils import PushInProgress

from hf_geta.agreement import agreed_object
from hf_geta.optim.qasso import QASSO
from hf_geta.optim.schedule import Stage
from hf_geta.randomness import preserved_rng

logger = logging.getLogger(__name__)

OPTIMIZER_SETTINGS = ("betas", "momentum", "eps", "weight_decay")


def push_while_training(trainer: Any, checkpoint: str, save: Callable[[Path], None]) -> None:
    """What `hub_strategy` sends at a save of a compressing run; "end" sends nothing.

    The model's own files in the repository are always a compressed model that meets the targets: they are sent from
    the cool-down on, finalized for that save. Weights in training are no model to be loaded: they, with optimizer and
    quantizers, are sent only where checkpoints are asked for, in a folder of theirs: last-checkpoint/ ("checkpoint")
    or checkpoint-STEP/ ("all_checkpoints"), from the first save on.

    Args:
        checkpoint: the folder of the checkpoint that was just saved.
        save: writes the compressed model into a folder.
    """
    args = trainer.args
    pushing: Any = getattr(trainer, "push_in_progress", None)  # the main process has it
    is_main, is_busy = trainer.is_world_process_zero(), pushing is not None and not pushing.is_done()
    if trainer.in_pieces:
        is_busy = agreed_object(is_busy)  # for all have to save
    elif not is_main:
        return
    if args.hub_strategy == HubStrategy.END or (is_busy and not args.hub_always_push):
        return
    is_compressed = trainer.stage is Stage.COOLDOWN
    if is_compressed:
        with preserved_rng():
            save(Path(args.output_dir))
    if not is_main:
        return
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    by_epoch, step = args.save_strategy == SaveStrategy.EPOCH, trainer.state.global_step
    message = f"Training in progress, {f'epoch {int(trainer.state.epoch)}' if by_epoch else f'step {step}'}"
    jobs = []
    if is_compressed:
        jobs.append(_upload(trainer, args.output_dir, message, ignore_patterns=["_*", f"{PREFIX_CHECKPOINT_DIR}-*"]))
    else:
        logger.info("step %d is before the cool-down: the model is not compressed yet, and not sent.", step)
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        place = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else Path(checkpoint).name
        jobs.append(_upload(trainer, checkpoint, f"{message}, checkpoint", path_in_repo=place))
    if is_busy:
        pushing.jobs.extend(jobs)
    elif jobs:
        trainer.push_in_progress = PushInProgress(jobs)  # type: ignore[arg-type]


def _upload(trainer: Any, folder: str, message: str, **options: Any) -> Any:
    return huggingface_hub.HfApi().upload_folder(
        repo_id=trainer.hub_model_id,
        folder_path=folder,
        commit_message=message,
        token=trainer.args.hub_token,
        revision=trainer.args.hub_revision,
        run_as_future=True,
        **options,
    )


def card_fields(report: Mapping[str, Any], given: Mapping[str, Any], token: str | None = None) -> dict[str, Any]:
    """What `Trainer.create_model_card` is given, by the names of a report; of several tasks or data sets the first.

    Where neither has a licence, the base model's card is asked.
    """
    fields = {name: given.get(name) for name in ("language", "license", "tags", "model_name")}
    for ours, theirs in (("base_model", "finetuned_from"), ("pipeline_tag", "tasks"), ("dataset", "dataset_tags")):
        value = given.get(theirs)
        fields[ours] = value[0] if isinstance(value, list) and value else value
    if not (fields["license"] or report.get("license")):
        fields["license"] = _license_of(fields["base_model"] or report.get("base_model"), token)
    return {name: value for name, value in fields.items() if value}


def _license_of(model: str | None, token: str | None) -> str | None:
    """The licence that a model's card on the Hub names; None where it has none, or cannot be read now."""
    if model is None:
        return None
    try:
        return huggingface_hub.ModelCard.load(model, token=token).data.license
    except (OSError, ValueError, yaml.YAMLError) as error:
        logger.warning("the licence of %s could not be read (%s): add it to the card.", model, type(error).__name__)
        return None


def describe_training(trainer: Trainer, qasso: QASSO | None) -> dict[str, Any]:
    """The hyperparameters of a run and its stages, as plain values (`render_card`'s "training")."""
    hyperparameters = extract_hyperparameters_from_trainer(trainer)
    if qasso is None:
        return {"hyperparameters": hyperparameters}
    groups = qasso.base.param_groups  # not its defaults: Trainer gives the decay to the groups alone
    largest = {name: max((g[name] for g in groups if g.get(name)), default=None) for name in OPTIMIZER_SETTINGS}
    settings = ", ".join(f"{name}={value}" for name, value in largest.items() if value)
    hyperparameters["optimizer"] = f"QASSO around {type(qasso.base).__name__}({settings})"
    schedule = qasso.schedule
    stages = {
        Stage.WARMUP.label: schedule.warmup_steps,
        Stage.PROJECTION.label: schedule.projection_steps,
        Stage.JOINT.label: schedule.joint_steps,
        Stage.COOLDOWN.label: schedule.total_steps - schedule.first_cooldown_step,
    }
    return {"hyperparameters": hyperparameters, "schedule": stages}


@contextlib.contextmanager
def pickled_without_token(args: TrainingArguments) -> Iterator[None]:
    """Meanwhile `torch.save(args)`, training_args.bin beside each checkpoint, leaves `hub_token` out."""

    def reduce(args: TrainingArguments) -> Any:
        parts: Any = object.__reduce_ex__(args, 4)
        make, arguments, state, *_ = parts
        return make, arguments, {**state, "hub_token": None}

    kind = type(args)
    copyreg.pickle(kind, reduce)
    try:
        yield
    finally:
        copyreg.dispatch_table.pop(kind)
