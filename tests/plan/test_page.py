"""The figures of configs/accelerate/README.md are what its commands print.

A plan of all their blocks takes minutes; to what is asked for here each block adds the same: one and two are planned.
"""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest

from hf_geta.cli import _parser as geta_parser
from hf_geta.plan.plan import make_plan
from hf_geta.plan.run import read_run
from hf_geta.plan.text import format_bytes

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "configs" / "accelerate" / "README.md").read_text()
MODELS = ("llama_2_7b", "llama_3_70b")  # the columns

# First words of a row -> the plan's value. An optimizer step and the peak are the largest of several: no sum of blocks.
ROWS = {
    "weights and quantizers": "weights",
    "gradients, and DDP's copy": "buckets",
    "states of AdamW": "optimizer",
    "activations": "activations",
    "QASSO: who owns what": "search_space",
    "QASSO: indices": "redundant",
    "weights, gradients and states if sharded": "sharded",
    "gradients, without compression": "gradients",
    "gradients of the quantizers, in the same": "quantizer_gradients",
    "what calibration saw": "buffers",
    "which groups go": "decision",
    "the final widths": "final_widths",
    "sums of calibration": "calibration",
    "gradients of the quantizers, and 8": "quantizer_gradients",
    "scores of the groups": "scores",
    "five sums": "forgotten",
    "weights, one at a time": "moved_weights",
}


def planned(model, folder, layers):
    """What the page's command plans of the page's model, with so many blocks."""
    command = next(
        line for line in PAGE.splitlines() if line.startswith("hf-geta plan") and f"--model {model} " in line
    )
    options = geta_parser().parse_args(shlex.split(command)[1:])
    config = json.loads(re.search(rf"^echo '(.*)' > {model}/config.json$", PAGE, re.MULTILINE)[1])
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    plan = make_plan(read_run(ROOT / options.config, options.settings, model=str(folder)), options.processes)
    memory = plan.memory
    whole = memory.weights + memory.gradients + memory.optimizer
    values = dataclasses.asdict(memory) | dataclasses.asdict(plan.communication)
    return values | {"sharded": whole / options.processes, "file": plan.ends[0].file_bytes}, config["num_hidden_layers"]


@pytest.mark.parametrize("model", MODELS)
def test_the_figures_of_the_page_are_those_of_its_commands(model, tmp_path):
    (one, layers), (two, _) = (planned(model, tmp_path, blocks) for blocks in (1, 2))

    def of_all_blocks(name):
        return format_bytes(one[name] + (layers - 1) * (two[name] - one[name]))

    for words, name in ROWS.items():
        (row,) = re.findall(rf"^\| {re.escape(words)}.*\|$", PAGE, re.MULTILINE)
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[len(cells) - len(MODELS) + MODELS.index(model)] == of_all_blocks(name), words
    (files,) = re.findall(r"holds the small one, (.*) and (.*); with", PAGE)
    assert files[MODELS.index(model)] == of_all_blocks("file")
