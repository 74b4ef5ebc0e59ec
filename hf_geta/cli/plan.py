"""`hf-geta plan`: what a run will do, need and leave, from its YAML file alone."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from hf_geta.cli.search_space import positive


def add_to(commands: Any) -> None:
    """The command and its options."""
    what = "what a run will prune, when, what is left of the model, and the memory that it takes"
    command = commands.add_parser(
        "plan", help=what, description=f"plan: {what}. From its file alone: no weights and no data are read."
    )
    command.set_defaults(run=plan)
    command.add_argument("config", type=Path, metavar="CONFIG", help="the YAML file of a run, as those in configs/")
    command.add_argument("--model", help="a Hub id, or a folder with a config.json, instead of the file's model")
    command.add_argument(
        "--class",
        dest="model_class",
        metavar="CLASS",
        help="a model class of transformers, such as AutoModelForTokenClassification (default: as the file suggests)",
    )
    command.add_argument("--samples", type=positive, metavar="N", help="training samples (default: max_train_samples)")
    command.add_argument("--processes", type=positive, default=1, metavar="N", help="devices, under DDP (default: 1)")
    command.add_argument("--length", type=positive, metavar="N", help="tokens of a sample (default: as the file says)")
    command.add_argument("--image-size", type=positive, metavar="N", help="pixels a side (default: as the file says)")
    command.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a key of the file, or geta.KEY of its section geta:, such as geta.weight_bits=[4,6]",
    )
    command.add_argument("--json", action="store_true", help="print everything as JSON")


def plan(options: argparse.Namespace) -> int:
    """Print the plan of a run."""
    from hf_geta.plan.plan import make_plan
    from hf_geta.plan.run import read_run
    from hf_geta.plan.text import format_plan, plan_to_dict

    run = read_run(
        options.config,
        options.settings,
        model=options.model,
        class_name=options.model_class,
        samples=options.samples,
        length=options.length,
        image_size=options.image_size,
    )
    builder = logging.getLogger("hf_geta.graph.build")
    builder.setLevel(logging.ERROR)  # what it warns of is in the output
    try:
        made = make_plan(run, options.processes)
    finally:
        builder.setLevel(logging.NOTSET)
    print(json.dumps(plan_to_dict(made), indent=1) if options.json else format_plan(made))
    return 0
