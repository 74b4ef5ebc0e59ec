"""Run in a process of its own, without hf_geta: load every exported folder, and save what the models compute.

python load_plain.py ROOT    ROOT/NAME/{exported/, inputs.pt} -> ROOT/NAME/outputs.pt, and a report on stdout
"""

import json
import logging
import sys
from pathlib import Path

import torch
import transformers


class Kept(logging.Handler):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def load(folder):
    name = json.loads((folder / "exported" / "config.json").read_text())["architectures"][0]
    model, found = getattr(transformers, name).from_pretrained(folder / "exported", output_loading_info=True)
    with torch.no_grad():
        outputs = model.eval()(**torch.load(folder / "inputs.pt"))
    torch.save(outputs.logits, folder / "outputs.pt")
    return {key: sorted(map(str, values)) for key, values in found.items() if values}


if __name__ == "__main__":
    handler = Kept()
    logging.getLogger("transformers").addHandler(handler)
    report = {folder.name: load(folder) for folder in sorted(Path(sys.argv[1]).iterdir())}
    print(json.dumps({"found": report, "warnings": handler.messages, "hf_geta": "hf_geta" in sys.modules}))
