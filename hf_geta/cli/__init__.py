"""`hf-geta`: what the library finds and makes, on the command line; one module for each command.

    hf-geta graph MODEL [--html FILE] [--json] [--explain NAME]    what can be pruned, from the config alone
    hf-geta verify MODEL                                           is it so? on the model's weights
    hf-geta report DIR [--html FILE]                               what a compressed model has left, layer by layer
    hf-geta verify DIR                                             is a compressed folder what it says?
    hf-geta plan CONFIG [--processes N] [--json]                   what a run will do, need and leave
    hf-geta export DIR OUT --format FORMAT                         a compressed model for other programs

MODEL is a Hub id or a folder with a config.json, CONFIG the YAML file of a run.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

import huggingface_hub
import transformers

from hf_geta.cli import export, graph, plan, report, verify
from hf_geta.report.folder import clean

COMMANDS = (graph, verify, plan, report, export)
LOGS = logging.StreamHandler()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 1 after an error that says what to do."""
    options = _parser().parse_args(arguments)
    _set_up_logs()
    try:
        return options.run(options)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stderr.close()
        return 1
    except (ValueError, OSError) as error:
        print(f"hf-geta: {clean(str(error).strip().partition(chr(10))[0], 1000)}", file=sys.stderr)
        return 1


def _set_up_logs() -> None:
    """Only what the user should know beside the output, each once."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()
    package = logging.getLogger("hf_geta")
    LOGS.stream = sys.stderr  # that of now: a program may call `main` more than once
    package.addHandler(LOGS)
    package.propagate = False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-geta", description="Prune and quantize Hugging Face models in one run.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_to(commands)
    return parser
