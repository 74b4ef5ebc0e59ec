"""The formats by name, and what they share: the checkpoint is loaded, written beside its target, then moved there.

A new format is a module here with one function, `write(model, folder)`, and one line in `FORMATS`. Packages that only
one format needs are imported inside its function, with an error that names the extra to install.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME

from hf_geta.checkpoint.directory import WEIGHTS_PATTERN, replace_files
from hf_geta.checkpoint.models import is_compressed, load_model
from hf_geta.export.compressed_tensors import write_compressed_tensors
from hf_geta.export.dense import write_dense
from hf_geta.export.gguf import write_gguf
from hf_geta.export.onnx import write_onnx

# Writes a loaded compressed model, in eval mode on the CPU, to a folder that has its tokenizer or processor.
Writer = Callable[[PreTrainedModel, Path], None]

FORMATS: dict[str, Writer] = {
    "dense": write_dense,
    "compressed-tensors": write_compressed_tensors,
    "onnx": write_onnx,
    "gguf": write_gguf,
}

# Which files of an earlier export are gone after the next one of its kind; other formats in the same folder stay.
WRITTEN = {"onnx": "model.onnx*", "gguf": "model.gguf"}

# What a processor saves beside a model: text and images go in the same way, whatever the model's format.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "*vocab*.*",
    "merges.txt",
    "*.model",
    "*.spm",
    "*.tokenizer",
    "bpe.codes",
    "normalizer.json",
    "word_shape.json",
    "word_pronunciation.json",
    "emoji.json",
    "byte_maps.json",
    "chat_template*",
    "*processor_config.json",
)


def export_checkpoint(source: str | Path, target: str | Path, form: str, dtype: str = "auto") -> None:
    """Write the compressed checkpoint in `source` to the folder `target`, in another format.

    Args:
        source: a folder that a compressed model was saved to.
        target: a folder, made if need be; it changes only when all is written.
        form: a name in `FORMATS`.
        dtype: of all that is float, such as "bfloat16"; "auto" is that of the checkpoint.

    Raises:
        ValueError: no compressed checkpoint there, no such format, `target` is `source`, or what the format cannot say.
    """
    source, target = Path(source).expanduser(), Path(target).expanduser()
    if form not in FORMATS:
        raise ValueError(f"format {form!r}: choose one of {', '.join(FORMATS)}.")
    if not (source / "config.json").is_file():
        raise ValueError(f"{source}: no config.json is there; give a folder that a compressed model was saved to.")
    if target.resolve() == source.resolve():
        raise ValueError(f"{target}: this would overwrite the checkpoint itself; give another folder.")
    if not is_compressed(source):
        is_run = (source / TRAINER_STATE_NAME).is_file()
        what = " but a checkpoint of a run in training; save_model() writes the compressed model" if is_run else ""
        raise ValueError(f"{source} is not a compressed model{what}.")
    model = load_model(source, dtype=dtype).eval()
    owned = WRITTEN.get(form, WEIGHTS_PATTERN)
    replace_files(target, lambda folder: _write(FORMATS[form], model, source, folder), owned)


def _write(write: Writer, model: PreTrainedModel, source: Path, folder: Path) -> None:
    for pattern in COMPANIONS:
        for file in filter(Path.is_file, source.glob(pattern)):
            shutil.copy(file, folder)
    write(model, folder)
