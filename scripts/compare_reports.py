#!/usr/bin/env python
"""The reports of a dense and of a compressed run, side by side.

    python scripts/compare_reports.py DENSE_FOLDER COMPRESSED_FOLDER OUTPUT.json

Writes {"dense": {...}, "compressed": {...}} and prints the table. Where COMPRESSED_FOLDER holds the model itself, its
card gets the dense figures too.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hf_geta.checkpoint.directory import replace_text
from hf_geta.report import load_report, metrics_table, save_report


def compare(dense_folder: str, compressed_folder: str) -> dict[str, Any]:
    """Both entries of the reports that run_image_classification.py left in the two folders."""
    report: dict[str, Any] = {}
    for folder in (dense_folder, compressed_folder):
        report |= json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
    if set(report) != {"dense", "compressed"}:
        raise ValueError(f"{dense_folder} and {compressed_folder} hold {sorted(report)}: one of each is needed.")
    if card := load_report(compressed_folder):
        save_report(compressed_folder, card | {"dense": report["dense"]})
    return {name: report[name] for name in ("dense", "compressed")}


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    result = compare(sys.argv[1], sys.argv[2])
    replace_text(Path(sys.argv[3]), json.dumps(result, indent=2) + "\n")
    print(metrics_table(result))
