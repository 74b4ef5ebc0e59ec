"""What the commands about a model's search space share: the model, its example inputs, rules of the user's own."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from hf_geta.config_checks import OPTIONAL_AXES

if TYPE_CHECKING:
    from hf_geta.graph.qadg import QADG

logger = logging.getLogger(__name__)


def find_search_space(model: PreTrainedModel, options: argparse.Namespace) -> tuple[QADG, int]:
    """The search space, and the samples it was traced with: one if more fail, as without a padding token."""
    from hf_geta import build_qadg
    from hf_geta.graph.example_inputs import example_inputs

    def traced(batch: int) -> tuple[QADG, int]:
        inputs = example_inputs(model, batch, options.length, options.image_size)
        return build_qadg(model, inputs, optional=options.optional), batch

    try:
        return traced(options.batch)
    except ValueError:
        with contextlib.suppress(ValueError):
            alone = traced(1)
            logger.warning("Traced with one sample: %s does not take %d.", type(model).__name__, options.batch)
            return alone
        raise


def import_rules(file: Path) -> None:
    """Run a Python file of the user's, for the rules that it registers.

    Raises:
        ValueError: if there is no such file, or it does not run.
    """
    spec = importlib.util.spec_from_file_location(f"hf_geta_rules_{file.stem}", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise ValueError(f"--rules {file}: there is no such Python file.")
    try:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    except Exception as error:  # whatever the user's code raises
        raise ValueError(f"--rules {file}: {type(error).__name__}: {error}") from error


def add_command(commands: Any, name: str, run: Callable[..., int], what: str, more: str) -> argparse.ArgumentParser:
    """A sub-command about one model and its inputs."""
    command = commands.add_parser(name, help=what, description=f"{name}: {what}. {more}")
    command.set_defaults(run=run)
    command.add_argument("model", metavar="MODEL", help="a Hub id, or a folder with a config.json")
    command.add_argument(
        "--class",
        dest="model_class",
        metavar="CLASS",
        help="a model class of transformers, such as AutoModelForSequenceClassification (default: the config's own)",
    )
    command.add_argument("--batch", type=positive, default=2, help="samples of the batch (default: 2)")
    command.add_argument("--length", type=positive, default=16, help="tokens of each (default: 16)")
    command.add_argument("--image-size", type=positive, help="pixels a side (default: as the config says)")
    command.add_argument(
        "--optional",
        action="append",
        default=[],
        choices=OPTIONAL_AXES,
        help="a kind of axis instead of its rival: queries, not key-value groups; sizes of heads, not heads",
    )
    command.add_argument(
        "--rules", type=Path, action="append", default=[], metavar="FILE.py", help="rules of your own for operators"
    )
    return command


def positive(text: str) -> int:
    """A whole number of a command line, 1 or more."""
    with contextlib.suppress(ValueError):
        if (number := int(text)) >= 1:
            return number
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number, 1 or more")
