"""`hf-geta export`: a compressed checkpoint in the format of another program."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_to(commands: Any) -> None:
    """The command and its options."""
    from hf_geta.export.formats import FORMATS

    what = "write a compressed checkpoint in the format of another program"
    command = commands.add_parser("export", help=what, description=f"export: {what}.")
    command.set_defaults(run=export)
    command.add_argument("folder", metavar="DIR", type=Path, help="a folder with a compressed model")
    command.add_argument("out", metavar="OUT", type=Path, help="the folder to write to")
    command.add_argument("--format", choices=tuple(FORMATS), default="dense", help="(default: dense)")
    command.add_argument("--dtype", choices=DTYPES, default="auto", help="of floats (default: the checkpoint's)")


def export(options: argparse.Namespace) -> int:
    """Write the checkpoint anew."""
    from hf_geta.export.formats import export_checkpoint

    export_checkpoint(options.folder, options.out, options.format, options.dtype)
    print(f"wrote {options.out}")
    return 0
