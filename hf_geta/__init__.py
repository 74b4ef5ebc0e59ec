"""hf_geta: one training run that prunes structure and lowers bit widths together, for Hugging Face models.

Importing it registers `quant_method: "geta"` with transformers, so that compressed checkpoints load with
`from_pretrained`.
"""

from hf_geta.config import GETAConfig

__version__ = "0.1.0"
__all__ = ["GETAConfig"]
