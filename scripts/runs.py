"""What the run_* programs share: train, with GETA or without, load from disk, measure, write report and model card.

A program brings its arguments, its data, its Auto class and the scores of its task.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from torch.utils.data import IterableDataset
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

import hf_geta
from hf_geta import GETAConfig, GETAQuantizationConfig, GETATrainer
from hf_geta.checkpoint.directory import replace_text
from hf_geta.checkpoint.models import is_compressed, read_config
from hf_geta.checkpoint.overrides import override, read_overrides, refuse_other_weights
from hf_geta.report import load_report, metrics_table, save_report
from hf_geta.report.figures import DENSE

logger = logging.getLogger(__name__)

OUR_CODE = (Path(__file__).parent, Path(hf_geta.__file__).parent)

COST_KEYS = (
    "parameters",
    "relative_bops",
    "file_bytes",
    "mean_weight_bits",
    "mean_activation_bits",
    "group_sparsity",
    "latency_ms",
)


@dataclasses.dataclass
class ModelArguments:
    """Which model, and how it is trained; every program may add to it."""

    model_name_or_path: str | None = dataclasses.field(
        default=None, metadata={"help": "Weights to start from: a name on the Hub or a folder."}
    )
    config_overrides: dict | str | None = dataclasses.field(
        default=None,
        metadata={"help": "Fields of the model's config with other values while it trains; as a flag in JSON."},
    )
    dtype: str = dataclasses.field(
        default="float32",
        metadata={
            "help": "Of the weights that train. In bfloat16 small steps are lost; --bf16 true computes in it instead. "
            "auto: as they are stored.",
            "choices": ["float32", "bfloat16", "float16", "auto"],
        },
    )
    head_learning_rate: float | None = dataclasses.field(
        default=None, metadata={"help": "Learning rate of the new head, where it differs from learning_rate."}
    )
    teacher_model_name_or_path: str | None = dataclasses.field(
        default=None, metadata={"help": "Model whose outputs are followed while it trains, mostly the dense twin."}
    )
    compress: bool = dataclasses.field(
        default=True, metadata={"help": "false trains the dense twin: same model, data and steps, no compression."}
    )

    def __post_init__(self) -> None:
        if self.model_name_or_path is None:
            raise ValueError("write model_name_or_path: the weights to start from, a name on the Hub or a folder.")

    def pretrained_config(self) -> PreTrainedConfig:
        """That of `model_name_or_path`, with the overrides."""
        return override(read_config(str(self.model_name_or_path)), read_overrides(self.config_overrides))


def load_to_train(
    auto_class: Any, arguments: ModelArguments, pad_token_id: int | None = None, **options: Any
) -> PreTrainedModel:
    """The model of `arguments.model_name_or_path`, to be trained: a compressed one in float, at its pruned size.

    Args:
        pad_token_id: what its batches are padded with, where its config does not say: a classifier looks for it.
        options: of `from_pretrained`, beside those of `arguments`.

    Raises:
        ValueError: for a config override that the model does not take, or that would change which weights it has.
    """
    name, overrides = str(arguments.model_name_or_path), read_overrides(arguments.config_overrides)
    config = read_config(name)
    refuse_other_weights(config, overrides, auto_class.__name__, name)
    if pad_token_id is not None and getattr(config.get_text_config(), "pad_token_id", None) is None:
        options["pad_token_id"] = pad_token_id
    options |= {"dtype": arguments.dtype, **overrides}
    if is_compressed(name):
        logger.warning("%s is compressed: its weights are loaded in float, to be trained again.", name)
        options["quantization_config"] = GETAQuantizationConfig(dequantize=True)
    return auto_class.from_pretrained(name, **options)


def train(
    model: PreTrainedModel,
    arguments: ModelArguments,
    args: TrainingArguments,
    geta_config: GETAConfig,
    trainer_class: type[GETATrainer] = GETATrainer,
    **options: Any,
) -> GETATrainer:
    """Fine-tune `model`, or its dense twin, and save it in `args.output_dir`; returns the trainer that did.

    Args:
        options: of the trainer: train_dataset, eval_dataset, processing_class, data_collator, compute_metrics ...

    Raises:
        ValueError: for a streamed train_dataset without max_steps: it has no length, and the stages need one; for a
            dense twin that would lie beside the report and the card of a compressed model.
    """
    if args.log_level != "passive":
        logging.getLogger(hf_geta.__name__).setLevel(args.get_process_log_level())
    if isinstance(options["train_dataset"], IterableDataset) and args.max_steps < 1:
        raise ValueError("streaming=true has no length: write max_steps, the stages are planned over it.")
    if not arguments.compress and load_report(str(args.output_dir)):
        raise ValueError(f"{args.output_dir} holds a compressed model with its card: write another output_dir.")
    trainer = trainer_class(
        model=model,
        args=args,
        geta_config=geta_config if arguments.compress else None,
        teacher_model=arguments.teacher_model_name_or_path if arguments.compress else None,
        optimizers=(head_optimizer(model, args, arguments.head_learning_rate), None),
        **options,
    )
    trainer.train(resume_from_checkpoint=_checkpoint(args))
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()  # the main process saves, and all load what it saved
    return trainer


def _checkpoint(args: TrainingArguments) -> str | bool | None:
    """What `--resume_from_checkpoint` says: a folder, or true for the last one of output_dir."""
    given = args.resume_from_checkpoint
    looks = given is None and args.should_save  # elsewhere the folder may not be made yet
    if looks and (last := get_last_checkpoint(str(args.output_dir))) is not None:
        logger.warning("%s is there, and the run begins anew: --resume_from_checkpoint true goes on from it.", last)
    return {"true": True, "false": None}.get(str(given).lower(), given)


def head_optimizer(
    model: PreTrainedModel, args: TrainingArguments, head_learning_rate: float | None
) -> torch.optim.Optimizer | None:
    """Trainer's own optimizer with a learning rate for the head; None, for Trainer's own, where there is none.

    Raises:
        ValueError: for a model without a head of its own, such as one whose head is its embedding.
    """
    if head_learning_rate is None:
        return None
    body = model.base_model_prefix + "."
    if len({name.startswith(body) for name, _ in model.named_parameters()}) < 2:
        raise ValueError(f"head_learning_rate: {type(model).__name__} has no parameters of a head alone; leave it out.")
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        in_head = not name.startswith(body)
        learning_rate = head_learning_rate if in_head else args.learning_rate
        decay = args.weight_decay if name in decayed else 0.0
        groups.setdefault((learning_rate, decay), []).append(parameter)
    return kind([{"params": p, "lr": lr, "weight_decay": decay} for (lr, decay), p in groups.items()], **options)


def trained_folder(arguments: ModelArguments, args: TrainingArguments) -> str:
    """Where the checkpoint to measure lies: the run's own, or, with do_train=false, the one that was named.

    One that is named on the Hub is fetched.
    """
    folder = str(args.output_dir) if args.do_train else arguments.model_name_or_path
    if folder is None:
        raise ValueError("do_train=false evaluates a checkpoint: write model_name_or_path.")
    return folder if args.do_train or Path(folder).is_dir() else snapshot_download(folder)


def measure(
    folder: str,
    auto_class: Any,
    score: Callable[[PreTrainedModel], Mapping[str, float]],
    example: Mapping[str, torch.Tensor],
    args: TrainingArguments,
) -> dict[str, Any]:
    """The report's entry for the checkpoint in `folder`, loaded from there: the task's scores, then its costs.

    Args:
        score: the scores of a model in eval mode.
        example: inputs of one example, as a batch of one; its latency is measured.
    """
    model = auto_class.from_pretrained(folder).to(args.device).eval()
    costs = {
        **DENSE,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **report_of(folder).get("compressed", {}),
        "file_bytes": weight_bytes(folder),
        "latency_ms": latency_ms(model, example),
    }
    return {**score(model), **{key: costs[key] for key in COST_KEYS}}


def write_report(
    folder: str,
    entry: dict[str, Any],
    args: TrainingArguments,
    claim: Mapping[str, Any] | None = None,
    trainer: Trainer | None = None,
) -> None:
    """report.json in `args.output_dir`, {"dense" or "compressed": entry}; a run's own figures go on its card, too.

    Of several processes the main one writes.

    Args:
        claim: what the card says of the data, and how the figures are measured again.
        trainer: of the run; it publishes the card again where it published the model.
    """
    report, is_main = report_of(folder), args.process_index == 0
    name = "compressed" if report else "dense"
    if report and trainer is not None:
        if is_main:
            save_report(folder, report | {name: report[name] | entry} | dict(claim or {}))
        if args.push_to_hub:  # a call for all processes: the model may lie in pieces
            trainer.push_to_hub(commit_message="Figures of the saved model")
    if not is_main:
        return
    output = Path(str(args.output_dir))
    output.mkdir(parents=True, exist_ok=True)
    replace_text(output / "report.json", json.dumps({name: entry}, indent=2) + "\n")
    print(metrics_table({name: entry}))


def report_of(folder: str) -> dict[str, Any]:
    """What lies beside a compressed model; nothing beside a dense one, whatever an earlier model has left there."""
    return load_report(folder) if is_compressed(folder) else {}


def write_predictions(predictions: Any, args: TrainingArguments) -> None:
    """predictions.json in `args.output_dir`; of several processes the main one writes."""
    if args.process_index == 0:
        replace_text(Path(str(args.output_dir)) / "predictions.json", json.dumps(predictions, indent=1) + "\n")


def run_program(main: Callable[[], Any]) -> None:
    """A whole program: what its user can mend is said in one line, with status 1."""
    logging.basicConfig(format="%(levelname)s: %(name)s: %(message)s")
    try:
        main()
    except (ValueError, OSError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if not any(raised_in.is_relative_to(folder) for folder in OUR_CODE):  # nobody wrote it for this user
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    leave_processes()


def leave_processes() -> None:
    """Ends a program that ran in several processes: none leaves while another one writes, or the launcher kills it."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        gc.collect()  # gloo aborts a process that ends with a group in use, as a trainer not yet collected does
        dist.destroy_process_group()


@torch.no_grad()
def latency_ms(model: PreTrainedModel, example: Mapping[str, torch.Tensor], repeats: int = 50) -> float:
    """Median milliseconds of one forward on `example`, from host to host."""
    batch = {name: value.to(model.device) for name, value in example.items()}
    times = []
    for _ in range(repeats + 5):
        start = time.perf_counter()
        model(**batch).to_tuple()[0].cpu()  # .cpu() waits for an accelerator
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[5:])  # the first ones fill caches


def weight_bytes(folder: str | Path) -> int:
    """Bytes of the files that `from_pretrained` reads; what lies beside them in another layout does not count."""
    index = Path(folder) / SAFE_WEIGHTS_INDEX_NAME
    names = {SAFE_WEIGHTS_NAME}
    if not (Path(folder) / SAFE_WEIGHTS_NAME).exists() and index.exists():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return sum(file.stat().st_size for file in Path(folder).iterdir() if file.name in names)
