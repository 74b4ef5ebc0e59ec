"""Hold a tiny model of every model class of transformers to a law, and write a table.

structure    masked = pruned = saved and loaded
training     trained by QASSO = finalized = saved and loaded, with SGD in float32
autocast     the same with rounded inputs, AdamW and bfloat16 autocast
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.zoo.cases import LAWS, TASKS, all_cases
from tests.zoo.sweep import sweep, work
from tests.zoo.table import markdown, markdown_by_type, one_line, read_lines, summary, write_line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--law", choices=LAWS, default="structure")
    parser.add_argument("--types", default="", help="model types, separated by commas; default: all")
    parser.add_argument("--tasks", default="", help=f"tasks, separated by commas; default: all of {', '.join(TASKS)}")
    parser.add_argument("--one-per-type", action="store_true", help="one model class per model type")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for one model")
    parser.add_argument("--output", type=Path, help="for zoo.jsonl, zoo.md and types.md; default: outputs/zoo-LAW")
    parser.add_argument("--retry", default="", help="only cases that ended at these stages in the output folder before")
    parser.add_argument("--missing", action="store_true", help="only cases that the output folder lacks")
    arguments = parser.parse_args()

    folder = arguments.output or Path(f"outputs/zoo-{arguments.law}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "zoo.jsonl"
    known = {(record.model_type, record.model_class): record for record in read_lines(path)}
    cases = all_cases(
        filter(None, arguments.types.split(",")), filter(None, arguments.tasks.split(",")), arguments.one_per_type
    )
    if arguments.missing:
        cases = [case for case in cases if (case.model_type, case.model_class) not in known]
    if stages := list(filter(None, arguments.retry.split(","))):
        chosen = {key for key, record in known.items() if record.stage in stages}
        cases = [case for case in cases if (case.model_type, case.model_class) in chosen]
    new = sweep(cases, arguments.workers, arguments.timeout, functools.partial(work, law=arguments.law))
    for number, record in enumerate(new, start=1):
        print(f"{number}/{len(cases)} {one_line(record)}", flush=True)
        write_line(record, path)
    records = read_lines(path)
    (folder / "zoo.md").write_text(f"{summary(records)}\n\n{markdown(records)}\n", encoding="utf-8")
    (folder / "types.md").write_text(f"{summary(records)}\n\n{markdown_by_type(records)}\n", encoding="utf-8")
    print(summary(records))


if __name__ == "__main__":
    main()
