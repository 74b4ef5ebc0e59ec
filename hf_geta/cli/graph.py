"""`hf-geta graph`: the search space of a model, from its config alone."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

from hf_geta.checkpoint.models import build_skeleton
from hf_geta.cli.search_space import add_command, find_search_space, import_rules


def add_to(commands: Any) -> None:
    """The command and its options."""
    command = add_command(
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


def graph(options: argparse.Namespace) -> int:
    """Print the search space of a model; with --html, draw it."""
    from hf_geta.graph.page import draw_html
    from hf_geta.graph.table import Tensors, format_table, to_dict

    if options.html and not options.html.absolute().parent.is_dir():
        raise ValueError(f"--html {options.html}: there is no such folder to write to.")
    for file in options.rules:
        import_rules(file)
    model = build_skeleton(options.model, options.model_class)
    builder = logging.getLogger("hf_geta.graph.build")
    builder.setLevel(logging.ERROR)  # what it warns of is in the output
    try:
        qadg, _ = find_search_space(model, options)
    finally:
        builder.setLevel(logging.NOTSET)
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
