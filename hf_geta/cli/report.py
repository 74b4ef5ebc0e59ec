"""`hf-geta report`: what a compressed model has left, beside its dense original."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from hf_geta.checkpoint.directory import replace_text


def add_to(commands: Any) -> None:
    """The command and its options."""
    what = "what a compressed model has left: groups, widths, bytes and operations, layer by layer"
    command = commands.add_parser("report", help=what, description=f"report: {what}. No weights are read.")
    command.set_defaults(run=report)
    command.add_argument(
        "folder", metavar="DIR", help="a folder with a compressed model (of a Hub id: its config.json)"
    )
    command.add_argument("--html", type=Path, metavar="FILE", help="write it as one self-contained page, too")


def report(options: argparse.Namespace) -> int:
    """Print what a compressed folder holds; with --html, write it as a page."""
    from hf_geta.report.folder import read_folder
    from hf_geta.report.page import draw_page
    from hf_geta.report.terminal import format_contents

    if options.html and not options.html.absolute().parent.is_dir():
        raise ValueError(f"--html {options.html}: there is no such folder to write to.")
    contents = read_folder(options.folder)
    print(format_contents(contents))
    if options.html:
        replace_text(options.html, draw_page(contents, Path(options.folder).resolve().name))
        print(f"wrote {options.html}", file=sys.stderr)
    return 0
