"""`hf-geta verify`: does what was found hold on the model's own weights?"""

from __future__ import annotations

import argparse
from typing import Any

from hf_geta.checkpoint.models import load_model
from hf_geta.cli.search_space import add_command, find_search_space, import_rules


def add_to(commands: Any) -> None:
    """The command and its options."""
    add_command(
        commands,
        "verify",
        verify,
        "does the pruned model compute what the masked one does?",
        "Removes 40 % of the groups of all axes, on the model's own weights, and compares the outputs.",
    )


def verify(options: argparse.Namespace) -> int:
    """Run the law of the search space on a model with its weights: pruned computes what masked does."""
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
