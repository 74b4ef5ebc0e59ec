"""`hf-geta verify`: is a model what is said of it? Of a dense one its search space, of a compressed one its files."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_geta.checkpoint.models import is_compressed, load_model
from hf_geta.cli.search_space import add_command, find_search_space, import_rules


def add_to(commands: Any) -> None:
    """The command and its options."""
    command = add_command(
        commands,
        "verify",
        verify,
        "does the pruned model compute what the masked one does? is a compressed folder what it says?",
        "Of a dense model: removes 40 % of the groups of all axes, on its own weights, and compares the outputs. Of a "
        "folder with a compressed one: its hashes, codes, widths and figures against config.json and its report; the "
        "options of the search space do not matter then.",
    )
    command.add_argument(
        "--evaluate",
        nargs=argparse.REMAINDER,
        metavar=("PROGRAM", "..."),
        help="of a compressed folder, the last option: measure the claim of its card, too, with this Python program, "
        "called with the folder and whatever follows; its status 0 says that the claim holds. "
        "scripts/evaluate_checkpoint.py is one",
    )


def verify(options: argparse.Namespace) -> int:
    """Check a compressed folder, or run the law of the search space on a dense model with its weights."""
    if is_compressed(options.model):
        return _verify_compressed(options.model, options.evaluate)
    if options.evaluate is not None:
        raise ValueError(f"{options.model} is not compressed: it claims nothing that --evaluate could measure again.")
    return _verify_law(options)


def _verify_compressed(source: str, evaluate: Sequence[str] | None) -> int:
    from hf_geta.report.check import check_folder
    from hf_geta.report.files import REPORT_NAME
    from hf_geta.report.folder import read_folder, read_report
    from hf_geta.report.terminal import claims, evaluation_command

    if not Path(source).is_dir():
        raise ValueError(f"{source} is compressed: verify a folder of it (hf download {source} --local-dir DIR).")
    if evaluate is not None and not Path(*evaluate[:1]).is_file():
        raise ValueError(f"--evaluate {' '.join(evaluate)}: name a Python program, as scripts/evaluate_checkpoint.py.")
    contents, failed = read_folder(source), 0
    for check in check_folder(source):
        failed += not check.holds
        print(f"ok      {check.what}" if check.holds else f"FAILED  {check.what}: {check.problem}")
    if evaluate:
        print(f"\nclaimed: {claims(contents) or 'nothing'}", flush=True)
        failed += subprocess.run([sys.executable, evaluate[0], source, *evaluate[1:]]).returncode != 0
    elif command := evaluation_command(source, contents):
        print(f"\nclaimed: {claims(contents)}; measure it again with\n    {command}")
    end = "Everything holds."
    if not read_report(source):
        end = f"The rest holds: no {REPORT_NAME} is here, so hashes, widths and figures were not checked."
    print(f"\n{failed} of the checks failed." if failed else f"\n{end}")
    return 1 if failed else 0


def _verify_law(options: argparse.Namespace) -> int:
    """Pruned computes what masked does."""
    from hf_geta.graph.example_inputs import example_inputs
    from hf_geta.graph.verify import verify_qadg

    for file in options.rules:
        import_rules(file)
    model = load_model(options.model, options.model_class)
    qadg, batch = find_search_space(model, options)
    others = example_inputs(model, batch + 1 if batch > 1 else 1, options.length + 3, options.image_size)
    result = verify_qadg(model, others, qadg)
    print(f"{'The law holds' if result.holds else 'The law does not hold'}: {result}")
    return 0 if result.holds else 1
