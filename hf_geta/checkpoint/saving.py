"""What a compressed model adds to its config.json as it is saved: a hint, and the dtypes that a loaded model has.

The hint is what transformers says where hf_geta was not imported: an error with what to do. config.json may name the
file of weights (`transformers_weights`), and before transformers builds a model it refuses a name that no safetensors
file can have, and repeats it. A compressed checkpoint has a sentence there: so no model type starts from random
weights, not even with `ignore_mismatched_sizes=True`. Loading with hf_geta takes it away.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from hf_geta.checkpoint.directory import CONFIG, replace_text
from hf_geta.checkpoint.manifest_checks import QUANT_METHOD

KEY = "transformers_weights"
HINT = "this model is compressed by hf_geta: pip install hf-geta, and `import hf_geta` before from_pretrained"


def take_hint_(config: PreTrainedConfig) -> None:
    """Let transformers look for the weights by their ordinary names; another release's hint may have other words."""
    named = getattr(config, KEY, None)
    if named and not named.endswith((".safetensors", ".safetensors.index.json")):
        delattr(config, KEY)


def write_hint(folder: Path) -> None:
    """Leave the hint in config.json, where that is of a compressed model; else nothing changes."""
    path = folder / CONFIG
    if not path.is_file():  # another process writes it
        return
    values = json.loads(path.read_text(encoding="utf-8"))
    if (values.get("quantization_config") or {}).get("quant_method") == QUANT_METHOD and values.get(KEY) != HINT:
        replace_text(path, json.dumps(values | {KEY: HINT}, indent=2, sort_keys=True) + "\n")


def save_compressed_(model: PreTrainedModel) -> None:
    """From now on `save_pretrained` and `push_to_hub` of this model leave the hint, and the dtypes of a loaded model.

    They refuse to save it once one of its packed layers is gone.

    transformers drops the key of the hint when it saves, and gives the configs inside of a config their dtype when it
    loads: the first save would have other bytes than the second.
    """
    model.save_pretrained = functools.partial(_save_pretrained, model, _packed_layers(model))  # type: ignore[method-assign]
    model._upload_modified_files = functools.partial(_upload_modified_files, model)  # type: ignore[method-assign]


def forget_saving_(model: PreTrainedModel) -> None:
    """Take back what `save_compressed_` has done, and who set other ways to save since."""
    for name in ("save_pretrained", "_upload_modified_files"):
        vars(model).pop(name, None)


def _save_pretrained(model: PreTrainedModel, packed: set[str], save_directory: Any, *args: Any, **kwargs: Any) -> None:
    replaced = packed - _packed_layers(model)
    if replaced and not model._hf_peft_config_loaded:  # else transformers saves the adapter alone
        raise ValueError(
            f"{min(replaced)} was replaced and is no packed layer any more, as the model's config says: what is saved "
            "would not load. Call model.dequantize() first, which makes all layers float (or unload the adapter)."
        )
    for name in model.config.sub_configs:
        if (inner := getattr(model.config, name, None)) is not None:
            inner.dtype = model.dtype
    type(model).save_pretrained(model, save_directory, *args, **kwargs)
    if args[0] if args else kwargs.get("is_main_process", True):
        write_hint(Path(save_directory))


def _packed_layers(model: PreTrainedModel) -> set[str]:
    from hf_geta.checkpoint.packed_weight import PackedWeight  # which imports this module

    return {name for name, module in model.named_modules() if isinstance(module, PackedWeight)}


def _upload_modified_files(model: PreTrainedModel, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
    write_hint(Path(working_dir))
    return type(model)._upload_modified_files(model, working_dir, *args, **kwargs)
