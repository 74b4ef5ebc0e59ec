"""All quantizers of a model in one order, by which every vector over them is indexed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from hf_geta.config import GETAConfig
from hf_geta.optim.widths import WidthTable, equalize_, nearest_allowed
from hf_geta.quantization.layers import QuantizedLayer
from hf_geta.quantization.quantizers import Quantizer


@dataclasses.dataclass(frozen=True)
class NumberedQuantizers:
    """The enabled quantizers, each once: those of weights, then those of inputs.

    Attributes:
        quantizers: row -> quantizer.
        weights: row -> the weight that it rounds; None for an input.
        weight_rows, input_rows: name of a layer's weight -> row of the quantizer of that weight, of the layer's input.
        width_sets: rows of weights that end with one width, in sets of two and more.
    """

    quantizers: list[Quantizer]
    weights: list[Tensor | None]
    weight_rows: dict[str, int]
    input_rows: dict[str, int]
    width_sets: list[list[int]]

    @classmethod
    def of(cls, layers: Mapping[str, QuantizedLayer], readers: Iterable[Sequence[str]] = ()) -> NumberedQuantizers:
        """Number the quantizers of layers by module name; a shared one has one row.

        Args:
            readers: names of layers whose weights end with one width, where they may have the same ones.
        """
        of_weights = {f"{name}.weight": layer.weight_quantizer for name, layer in layers.items()}
        inputs = {f"{name}.weight": layer.input_quantizer for name, layer in layers.items()}
        of_inputs = {
            name: quantizer for name, quantizer in inputs.items() if quantizer is not None and quantizer.enabled
        }
        quantizers = list({id(q): q for q in (*of_weights.values(), *of_inputs.values())}.values())
        row_of = {id(quantizer): row for row, quantizer in enumerate(quantizers)}
        weight_of = {row_of[id(layer.weight_quantizer)]: layer.weight for layer in layers.values()}
        width_sets: dict[tuple[int, str], set[int]] = {}
        for number, name in ((number, name) for number, names in enumerate(readers) for name in names):
            quantizer = layers[name].weight_quantizer
            width_sets.setdefault((number, quantizer.widths), set()).add(row_of[id(quantizer)])
        return cls(
            quantizers,
            [weight_of.get(row) for row in range(len(quantizers))],
            {name: row_of[id(quantizer)] for name, quantizer in of_weights.items()},
            {name: row_of[id(quantizer)] for name, quantizer in of_inputs.items()},
            [sorted(rows) for rows in width_sets.values() if len(rows) > 1],
        )

    def refuse_bypassed(self) -> None:
        """After a backward: a weight with a gradient whose quantizer has none is read by the model, and not rounded.

        Raises:
            ValueError: naming the layers.
        """
        names = [
            name.removesuffix(".weight")
            for name, row in self.weight_rows.items()
            if (weight := self.weights[row]) is not None
            and weight.grad is not None
            and (step_size := self.quantizers[row].log_step_size).requires_grad
            and step_size.grad is None
        ]
        if names:
            raise ValueError(
                f"in training the model reads the weights of {', '.join(names)} without calling these layers, so that "
                "nothing rounds them, while the saved model would: write "
                f"modules_to_not_convert={sorted({name.rpartition('.')[2] for name in names})}."
            )

    def nearest_bits(self, config: GETAConfig) -> Tensor:
        """The allowed width nearest to each quantizer's own, (quantizers,); in a set the widest of them."""
        bits = WidthTable(self.quantizers).bits()
        for row, quantizer in enumerate(self.quantizers):
            bits[row] = nearest_allowed(bits[row], config.allowed_bits(quantizer.widths))
        return equalize_(bits, self.width_sets)
