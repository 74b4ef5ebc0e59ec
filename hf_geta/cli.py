"""`hf-geta`: what the library finds, on the command line.

    hf-geta graph MODEL [--html FILE] [--json] [--explain NAME]    what can be pruned, from the config alone
    hf-geta verify MODEL                                           is it so? on the model's weights

MODEL is a Hub id or a folder with a config.json.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import transformers
from transformers import PreTrainedModel

from hf_geta.checkpoint.models import build_skeleton, load_model
from hf_geta.config_checks import OPTIONAL_AXES

if TYPE_CHECKING:
    from hf_geta.graph.qadg import QADG

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 1 after an error that says what to do."""
    options = _parser().parse_args(arguments)
    _set_up_logs(options.run)
    try:
        return options.run(options)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stderr.close()
        return 1
    except (ValueError, OSError) as error:
        print(f"hf-geta: {str(error).strip().partition(chr(10))[0]}", file=sys.stderr)
        return 1


def graph(options: argparse.Namespace) -> int:
    """Print the search space of a model; with --html, draw it."""
    from hf_geta.graph.page import draw_html
    from hf_geta.graph.table import Tensors, format_table, to_dict

    if options.html and not options.html.absolute().parent.is_dir():
        raise ValueError(f"--html {options.html}: there is no such folder to write to.")
    for file in options.rules:
        import_rules(file)
    model = build_skeleton(options.model, options.model_class)
    qadg, _ = _search_space(model, options)
    tensors, name = Tensors.of(model), type(model).__name__
    if options.explain:
        print("\n\n".join(qadg.explain(one) for one in options.explain))
    elif options.json:
        print(json.dumps({"model": options.model, "class": name, **to_dict(qadg, tensors)}, indent=1))
    else:
        print(f"{name}\n\n{format_table(qadg, tensors)}")
    if options.html:
        title = Path(options.model).resolve().name if Path(options.model).exists() else options.model
        options.html.write_text(draw_html(qadg, tensors, f"{title} ({name})"), encoding="utf-8")
        print(f"wrote {options.html}", file=sys.stderr)
    return 0


def verify(options: argparse.Namespace) -> int:
    """Run the law of the search space on a model with its weights: pruned computes what masked does."""
    from hf_geta.graph.example_inputs import example_inputs
    from hf_geta.graph.verify import verify_qadg

    for file in options.rules:
        import_rules(file)
    model = load_model(options.model, options.model_class)
    qadg, batch = _search_space(model, options)
    others = example_inputs(model, batch + 1 if batch > 1 else 1, options.length + 3, options.image_size)
    result = verify_qadg(model, others, qadg)
    print(f"{'The law holds' if result.holds else 'The law does not hold'}: {result}")
    return 0 if result.holds else 1


def _search_space(model: PreTrainedModel, options: argparse.Namespace) -> tuple[QADG, int]:
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


def _set_up_logs(run: Callable[..., int]) -> None:
    """Only what the user should know beside the output, each once."""
    transformers.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()
    package = logging.getLogger("hf_geta")
    if not package.handlers:
        package.addHandler(logging.StreamHandler())
    package.propagate = False
    in_output = run is graph  # what the builder warns of
    logging.getLogger("hf_geta.graph.build").setLevel(logging.ERROR if in_output else logging.NOTSET)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-geta", description="Prune and quantize Hugging Face models in one run.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    command = _command(
        commands,
        "graph",
        graph,
        "what can be pruned in a model, what goes together, and what is frozen and why",
        "From the config alone: no weights are read.",
    )
    command.add_argument("--html", type=Path, metavar="FILE", help="write a picture, as one self-contained page")
    output = command.add_mutually_exclusive_group()
    output.add_argument(
        "--explain", action="append", metavar="NAME", help="only what is known of one axis, parameter or buffer"
    )
    output.add_argument("--json", action="store_true", help="print everything as JSON")
    _command(
        commands,
        "verify",
        verify,
        "does the pruned model compute what the masked one does?",
        "Removes 40 % of the groups of all axes, on the model's own weights, and compares the outputs.",
    )
    return parser


def _command(commands: Any, name: str, run: Callable[..., int], what: str, more: str) -> argparse.ArgumentParser:
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
    command.add_argument("--batch", type=_positive, default=2, help="samples of the batch (default: 2)")
    command.add_argument("--length", type=_positive, default=16, help="tokens of each (default: 16)")
    command.add_argument("--image-size", type=_positive, help="pixels a side (default: as the config says)")
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


def _positive(text: str) -> int:
    with contextlib.suppress(ValueError):
        if (number := int(text)) >= 1:
            return number
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number, 1 or more")


if __name__ == "__main__":
    sys.exit(main())
