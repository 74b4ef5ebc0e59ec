"""Small models made from a text: `config.steps` spells out the forward, so that a saved model is built again from it.

Two kinds of values flow: sequences (batch, length, width) and images (batch, channels, height, width). A step is a
list, its name first; `grammar.py` says which there are and draws them.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

LABELS = 3
LENGTH, SIDE = 5, 8  # of a sequence; of an image


class Chain(nn.Module):
    """Steps one after the other; ["again", i] is step i of the same chain once more, with the same weights."""

    def __init__(self, steps, width):
        super().__init__()
        self.built = nn.ModuleList()
        self.order = []
        for name, *arguments in steps:
            if name == "again":
                self.order.append(arguments[0])
                width = self.built[arguments[0]].width
                continue
            self.order.append(len(self.built))
            self.built.append(STEPS[name](width, *arguments))
            width = self.built[-1].width
        self.width = width

    def forward(self, x):
        for number in self.order:
            x = self.built[number](x)
        return x


class Linear(nn.Module):
    """With a bias or without; or transformers' own layer, whose weight is (in, out)."""

    def __init__(self, width, out, kind):
        super().__init__()
        self.layer = Conv1D(out, width) if kind == "conv1d" else nn.Linear(width, out, bias=kind == "bias")
        self.width = out

    def forward(self, x):
        return self.layer(x.contiguous())  # conv1d takes a view


class Activation(nn.Module):
    def __init__(self, width, name):
        super().__init__()
        self.function, self.width = ACT2FN[name], width

    def forward(self, x):
        return self.function(x)


class Dropout(nn.Module):
    def __init__(self, width, share):
        super().__init__()
        self.layer, self.width = nn.Dropout(share), width

    def forward(self, x):
        return self.layer(x)


class Norm(nn.Module):
    """Over the width of a sequence ("layer", "rms") or over everything else ("batch")."""

    def __init__(self, width, kind):
        super().__init__()
        self.layer = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "batch": nn.BatchNorm1d}[kind](width)
        self.kind, self.width = kind, width

    def forward(self, x):
        return self.layer(x.transpose(1, 2)).transpose(1, 2) if self.kind == "batch" else self.layer(x)


class MLP(nn.Module):
    """Two layers; "gated" by a third, "fused" with gate and up in one weight, "glu" by torch's own operator."""

    def __init__(self, width, hidden, activation, kind):
        super().__init__()
        self.up = nn.Linear(width, 2 * hidden if kind in ("fused", "glu") else hidden)
        self.gate = nn.Linear(width, hidden, bias=False) if kind == "gated" else None
        self.down = nn.Linear(hidden, width)
        self.function, self.kind, self.width = ACT2FN[activation], kind, width

    def forward(self, x):
        up = self.up(x)
        if self.kind == "glu":
            return self.down(nn.functional.glu(up))
        if self.kind == "fused":
            gate, up = up.chunk(2, -1)
            return self.down(self.function(gate) * up)
        return self.down(self.function(up) if self.gate is None else self.function(self.gate(x)) * up)


class Attention(nn.Module):
    """`fused`: one weight for queries, keys and values. `how`: who shares keys, and who multiplies them."""

    def __init__(self, width, heads, kv_heads, head_dim, fused, how, causal):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.how, self.causal = heads, kv_heads, head_dim, how, causal
        sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        self.parts = sizes
        self.qkv = nn.Linear(width, sum(sizes)) if fused else None
        self.each = None if fused else nn.ModuleList(nn.Linear(width, size) for size in sizes)
        self.out, self.width = nn.Linear(heads * head_dim, width), width

    def forward(self, x):
        batch, length, _ = x.shape
        made = [layer(x) for layer in self.each] if self.qkv is None else self.qkv(x).split(self.parts, -1)
        if self.how == "explicit":
            counts = [self.heads, self.kv_heads, self.kv_heads]
            q, k, v = (y.view(batch, length, n, self.head_dim).transpose(1, 2) for y, n in zip(made, counts))
        else:
            q, k, v = (y.view(batch, length, -1, self.head_dim).transpose(1, 2) for y in made)
        groups = self.heads // self.kv_heads
        if self.how == "gqa":
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=groups > 1)
            return self.out(y.transpose(1, 2).reshape(batch, length, -1))
        if groups > 1:
            k, v = (y.repeat_interleave(groups, 1) if self.how == "matmul" else repeated(y, groups) for y in (k, v))
        if self.how == "matmul":
            scores = q @ k.transpose(2, 3) * self.head_dim**-0.5
            if self.causal:
                scores = scores + torch.full((length, length), -1e9).triu(1)
            y = scores.softmax(-1) @ v
        else:
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(batch, length, -1))


def repeated(x: Tensor, times: int) -> Tensor:
    batch, heads, length, size = x.shape
    return x[:, :, None].expand(batch, heads, times, length, size).reshape(batch, -1, length, size)


class Residual(nn.Module):
    def __init__(self, width, steps, scaled):
        super().__init__()
        self.branch = Chain(steps, width)
        self.scale = nn.Parameter(torch.ones(width)) if scaled else None
        self.width = width

    def forward(self, x):
        y = self.branch(x)
        if self.scale is not None:
            y = y * (self.scale if y.dim() == 3 else self.scale[:, None, None])
        return x + y


class Concatenation(nn.Module):
    """Branches beside each other; along the width."""

    def __init__(self, width, branches):
        super().__init__()
        self.branches = nn.ModuleList(Chain(steps, width) for steps in branches)
        self.width = sum(branch.width for branch in self.branches)

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], 1 if x.dim() == 4 else -1)


class Split(nn.Module):
    """Two halves, one of them through a branch; then joined again, added or multiplied."""

    def __init__(self, width, steps, join):
        super().__init__()
        self.branch, self.join = Chain(steps, width // 2), join
        self.width = width // 2 + self.branch.width if join == "cat" else width // 2

    def forward(self, x):
        dim = 1 if x.dim() == 4 else -1
        first, second = x.chunk(2, dim)
        first = self.branch(first)
        if self.join == "cat":
            return torch.cat([first, second], dim)
        return first + second if self.join == "add" else first.sigmoid() * second


class Regroup(nn.Module):
    """The width as `parts` pieces, each through the same layer; then flat again, with the pieces outside or inside."""

    def __init__(self, width, parts, out, inside):
        super().__init__()
        self.layer, self.parts, self.inside = nn.Linear(width // parts, out), parts, inside
        self.width = parts * out

    def forward(self, x):
        x = self.layer(x.unflatten(-1, (self.parts, -1)))
        return x.transpose(-1, -2).flatten(-2) if self.inside else x.flatten(-2)


class Mixer(nn.Module):
    """Two layers over the length of a sequence."""

    def __init__(self, width, hidden):
        super().__init__()
        self.up, self.down, self.width = nn.Linear(LENGTH, hidden), nn.Linear(hidden, LENGTH), width

    def forward(self, x):
        return x + self.down(self.up(x.transpose(1, 2)).relu()).transpose(1, 2)


class Slice(nn.Module):
    """A run of the width."""

    def __init__(self, width, start, out):
        super().__init__()
        self.start, self.width = start, out

    def forward(self, x):
        return x.narrow(1 if x.dim() == 4 else -1, self.start, self.width)


class Product(nn.Module):
    """Two branches of one width, multiplied entry by entry or added."""

    def __init__(self, width, one, other, adds):
        super().__init__()
        self.one, self.other, self.adds = Chain(one, width), Chain(other, width), adds
        self.width = self.one.width

    def forward(self, x):
        one, other = self.one(x), self.other(x)
        return one + other if self.adds else one * other.sigmoid()


class Convolution(nn.Module):
    def __init__(self, width, out, kernel, stride, groups, bias):
        super().__init__()
        self.layer = nn.Conv2d(width, out, kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.width = out

    def forward(self, x):
        return self.layer(x)


class TimeConvolution(nn.Module):
    """Over the length of a sequence."""

    def __init__(self, width, out, kernel, groups):
        super().__init__()
        self.layer, self.width = nn.Conv1d(width, out, kernel, padding=kernel // 2, groups=groups), out

    def forward(self, x):
        return self.layer(x.transpose(1, 2)).transpose(1, 2)


class ImageNorm(nn.Module):
    def __init__(self, width, kind, groups):
        super().__init__()
        self.layer = nn.BatchNorm2d(width) if kind == "batch" else nn.GroupNorm(groups, width)
        self.width = width

    def forward(self, x):
        return self.layer(x)


class Pool(nn.Module):
    def __init__(self, width, kind):
        super().__init__()
        self.layer = {"max": nn.MaxPool2d, "mean": nn.AvgPool2d}[kind](3, 1, 1)
        self.width = width

    def forward(self, x):
        return self.layer(x)


class Squeeze(nn.Module):
    """Squeeze and excite: a gate per channel from the image's mean."""

    def __init__(self, width, hidden):
        super().__init__()
        self.down, self.up = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, width, 1)
        self.width = width

    def forward(self, x):
        return x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Shuffle(nn.Module):
    """Channels dealt out anew over `groups`."""

    def __init__(self, width, groups):
        super().__init__()
        self.groups, self.width = groups, width

    def forward(self, x):
        return x.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)


class Tokens(nn.Module):
    """From here on the image is a sequence of its pixels."""

    def __init__(self, width):
        super().__init__()
        self.width = width

    def forward(self, x):
        return x.flatten(2).transpose(1, 2)


STEPS = {
    "linear": Linear,
    "act": Activation,
    "dropout": Dropout,
    "norm": Norm,
    "mlp": MLP,
    "attention": Attention,
    "residual": Residual,
    "cat": Concatenation,
    "split": Split,
    "regroup": Regroup,
    "time_conv": TimeConvolution,
    "mixer": Mixer,
    "slice": Slice,
    "product": Product,
    "conv": Convolution,
    "image_norm": ImageNorm,
    "pool": Pool,
    "squeeze": Squeeze,
    "shuffle": Shuffle,
    "tokens": Tokens,
}


class FuzzConfig(PreTrainedConfig):
    """`kind` is "text", "vectors" or "image"; `width` what the steps start from."""

    model_type = "fuzz"

    def __init__(self, kind="vectors", width=4, steps=(), tied=False, **kwargs):
        super().__init__(**kwargs)
        self.kind, self.width, self.steps, self.tied = kind, width, list(steps), tied
        self.vocab_size = 16
        self.tie_word_embeddings = tied


class FuzzModel(PreTrainedModel):
    """A text's next tokens, through the embedding's own weight if `tied`; or the class of vectors or of an image."""

    config_class = FuzzConfig
    base_model_prefix = "fuzz"
    main_input_name = "x"
    _tied_weights_keys: ClassVar = {"head.weight": "stem.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.stem = nn.Embedding(config.vocab_size, config.width) if config.kind == "text" else None
        self.body = Chain(config.steps, config.width)
        width = self.body.width
        if config.tied and width != config.width:
            self.back, width = nn.Linear(width, config.width), config.width
        else:
            self.back = None
        self.head = nn.Linear(width, config.vocab_size if config.kind == "text" else LABELS, bias=not config.tied)
        self.post_init()

    def _init_weights(self, module):
        """Weights that nothing cancels."""
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | Conv1D):
            fan_in = len(module.weight) if isinstance(module, Conv1D) else module.weight[0].numel()
            nn.init.normal_(module.weight, std=1.2 * fan_in**-0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)

    def get_input_embeddings(self):
        return self.stem

    def set_input_embeddings(self, value):
        self.stem = value

    def get_output_embeddings(self):
        return self.head if self.config.kind == "text" else None

    def forward(self, x, labels=None):
        x = self.body(x if self.stem is None else self.stem(x))
        x = x if self.back is None else self.back(x)
        if self.config.kind != "text":
            x = x.mean((2, 3)) if x.dim() == 4 else x.mean(1)
        logits = self.head(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten()), "logits": logits}


def make_model(kind, width, steps, tied=False):
    torch.manual_seed(0)
    return FuzzModel(FuzzConfig(kind, width, steps, tied))


def make_batch(kind, width, seed=0, count=4):
    """Inputs and labels."""
    draw = torch.Generator().manual_seed(seed)
    if kind == "text":
        x = torch.randint(0, 16, (count, LENGTH), generator=draw)
        return {"x": x, "labels": x.roll(1, 1)}
    shape = (count, LENGTH, width) if kind == "vectors" else (count, width, SIDE, SIDE)
    return {
        "x": torch.randn(shape, generator=draw),
        "labels": torch.randint(0, LABELS, (count,), generator=draw),
    }
