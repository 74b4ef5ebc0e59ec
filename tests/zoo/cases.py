"""Which model classes there are: the auto-mappings of transformers, one case per class."""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from tests.zoo.configs import tiny_config
from tests.zoo.inputs import make_inputs
from tests.zoo.law import Record, check_law
from tests.zoo.special import CLASSES
from tests.zoo.training import TRAININGS, check_training

# task -> its auto-mapping, in the order in which a class that several of them list gets its task
TASKS = {
    name.removeprefix("MODEL_FOR_").removesuffix("_MAPPING_NAMES").lower().replace("model_mapping_names", "base"): name
    for name in sorted(
        vars(modeling_auto), key=lambda name: (name == "MODEL_MAPPING_NAMES", "PRETRAINING" in name, name)
    )
    if name.startswith("MODEL_") and name.endswith("MAPPING_NAMES")
}
LAWS: dict[str, Callable[[PreTrainedModel, Any, Record], Record]] = {
    "structure": check_law,
    "training": check_training,
    "autocast": partial(check_training, training=TRAININGS["autocast"]),
}


@dataclass(frozen=True)
class Case:
    """A model class with a config of one model type."""

    task: str
    model_type: str
    model_class: str


def all_cases(types: Iterable[str] = (), tasks: Iterable[str] = (), one_per_type: bool = False) -> list[Case]:
    """Every distinct model class of the auto-mappings; with `one_per_type` the first of each model type only."""
    types, tasks = set(types), set(tasks)
    cases: dict[tuple[str, str], Case] = {}
    for task, mapping in TASKS.items():
        if tasks and task not in tasks:
            continue
        for model_type, names in getattr(modeling_auto, mapping).items():
            if types and model_type not in types:
                continue
            for name in (names,) if isinstance(names, str) else names:
                key = (model_type, "" if one_per_type else name)
                if not any(case.model_class == name for case in cases.values() if not one_per_type):
                    cases.setdefault(key, Case(task, model_type, name))
    return sorted(cases.values(), key=lambda case: (case.model_type, case.model_class))


def build(case: Case) -> PreTrainedModel:
    """A tiny model of a case, with random weights, in eval mode."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = tiny_config(case.model_type, **CLASSES.get(case.model_class, {}))
    model_class = getattr(transformers, case.model_class)
    return model_class(fitting(config, model_class)).eval()


def fitting(config: PreTrainedConfig, model_class: Any) -> PreTrainedConfig:
    """The config, or that of its parts which the class is made for, as the auto classes choose it."""
    waiting = [config]
    while waiting:
        part = waiting.pop(0)
        if model_class.config_class is None or isinstance(part, model_class.config_class):
            return part
        waiting += [value for value in vars(part).values() if isinstance(value, PreTrainedConfig)]
    return config


def run_case(case: Case, law: str = "structure") -> Record:
    """Hold one case to one of `LAWS`; the record says how far it came and why not further."""
    record = Record(case.model_class, case.model_type, case.task)
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = build(case)
            record.stage = "inputs"
            inputs = make_inputs(model)
            record.inputs = list(inputs)
            LAWS[law](model, inputs, record)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        record.reason = f"{type(error).__name__}: {text[:300]} ({where.filename.rsplit('/', 1)[-1]}:{where.lineno})"
    record.seconds = time.perf_counter() - start
    return record
