"""A plug-in for pytest: whatever says `from transformers import Trainer` gets GETATrainer, without a `geta_config`.

In a checkout of transformers, whose own tests of Trainer it is for:

    PYTHONPATH=HF_GETA/scripts python -m pytest -p as_trainer tests/trainer/test_trainer*.py
"""

import transformers
import transformers.trainer

from hf_geta import GETATrainer

transformers.Trainer = transformers.trainer.Trainer = GETATrainer  # type: ignore[misc]
