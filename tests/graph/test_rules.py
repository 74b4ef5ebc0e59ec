"""Every rule, on a few lines of forward: which axes it leaves, and that masked = pruned on them."""

from __future__ import annotations

import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_geta.graph.build import build_qadg
from hf_geta.graph.rules import RULES, rule

ROUNDING = {"rtol": 1e-4, "atol": 1e-5}  # another order of the sums

LAYERS = {
    "to_hidden": lambda: nn.Linear(5, 12),
    "to_hidden_again": lambda: nn.Linear(5, 12),
    "to_24": lambda: nn.Linear(5, 24),
    "to_6": lambda: nn.Linear(5, 6),
    "hidden_to_hidden": lambda: nn.Linear(12, 12),
    "from_hidden": lambda: nn.Linear(12, 3),
    "from_24": lambda: nn.Linear(24, 3),
    "from_18": lambda: nn.Linear(18, 3),
    "from_6": lambda: nn.Linear(6, 3),
    "conv": lambda: nn.Conv2d(2, 12, 3),
    "grouped": lambda: nn.Conv2d(12, 24, 3, groups=4),
    "regrouped": lambda: nn.Conv2d(24, 8, 1, groups=4),
    "depthwise": lambda: nn.Conv2d(12, 12, 3, groups=12),
    "last_conv": lambda: nn.Conv2d(12, 3, 1),
    "last_conv_24": lambda: nn.Conv2d(24, 3, 1),
    "transposed": lambda: nn.ConvTranspose2d(12, 8, 2),
    "grouped_transposed": lambda: nn.ConvTranspose2d(12, 24, 2, groups=4),
    "last_conv_8": lambda: nn.Conv2d(8, 3, 1),
    "batch_norm": lambda: nn.BatchNorm2d(12),
    "bare_batch_norm": lambda: nn.BatchNorm2d(12, affine=False),
    "group_norm": lambda: nn.GroupNorm(4, 12),
    "table": lambda: nn.Embedding(9, 4),
    "conv_48": lambda: nn.Conv2d(2, 48, 3),
    "recurrent": lambda: nn.LSTM(12, 12),
}


class Snippet(nn.Module):
    """A forward given as a function of the module and x, over the layers above."""

    def __init__(self, forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, make in LAYERS.items():
            self.add_module(name, make())
        self.scale = nn.Parameter(torch.randn(12))
        self.heads, self.half = 4, 12
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


ROW, IMAGE = torch.Size((2, 7, 5)), torch.Size((2, 2, 6, 6))


def attend(m, x, kv_heads=4, **options):
    q = m.to_hidden(x).view(*x.shape[:2], -1, 3).transpose(1, 2)
    k, v = (m.to_24(x) if kv_heads == 4 else m.to_6(x).repeat(1, 1, 2)).chunk(2, -1)
    k, v = (y.unflatten(-1, (-1, 3)).transpose(1, 2) for y in (k, v))
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2)


def eager_attention(m, x):
    q, k, v = (y.view(*x.shape[:2], m.heads, 3).transpose(1, 2) for y in (m.to_hidden(x), *m.to_24(x).chunk(2, -1)))
    scores = torch.matmul(q, k.transpose(-1, -2)).softmax(-1)
    return m.from_hidden((scores @ v).transpose(1, 2).reshape(*x.shape[:2], -1))


def drawing(m, x):
    torch.manual_seed(0)
    return m.from_hidden((hidden := m.to_hidden(x)) + torch.rand_like(hidden))


def put_at_places(m, x):
    hidden = m.to_hidden(x)
    written = torch.zeros_like(hidden)
    written[torch.tensor([1, 0]), torch.tensor([3, 2])] = hidden[:, 4]
    return m.from_hidden(written + hidden)


def merged_batch_attention(m, x):
    def split(y):
        return y.view(*x.shape[:2], -1, 3).transpose(1, 2).reshape(-1, x.shape[1], 3)

    q, k, v = map(split, (m.to_hidden(x), *m.to_24(x).chunk(2, -1)))
    y = torch.bmm(torch.baddbmm(torch.zeros(1), q, k.mT).softmax(-1), v)
    return m.from_hidden(y.view(x.shape[0], -1, x.shape[1], 3).transpose(1, 2).flatten(2))


def table_biased_attention(m, x):
    numbers = torch.arange(49).view(7, 7) % 9
    bias = m.table(numbers.flatten()).view(7, 7, -1).permute(2, 0, 1)
    return m.from_hidden(attend(m, x, attn_mask=bias.unsqueeze(0)))


def shifted(m, x):
    y = m.to_hidden(x)
    y[:, 1:] += y[:, :-1].clone()
    return m.from_hidden(y)


def written_by_pieces(m, x):
    y = x.new_zeros(*x.shape[:-1], 2 * m.half)
    y[..., : m.half] = m.to_hidden(x)
    return m.from_24(y)


def weight_changed_through_a_view(m, x):
    weight = m.from_hidden.weight.clone()
    weight[:, :].add_(1)
    return F.linear(m.to_hidden(x).sigmoid(), weight)


def view_of_a_weight_that_is_changed(m, x):
    weight = m.from_hidden.weight.clone()
    view = weight.unsqueeze(0)
    weight.add_(1)
    return F.linear(m.to_hidden(x).sigmoid(), view.squeeze(0))


# forward, shape of x, sizes of the axes that must be found
SNIPPETS = {
    "linear": (lambda m, x: m.from_hidden(m.to_hidden(x).relu()), ROW, [12]),
    "residual": (lambda m, x: m.from_hidden((h := m.to_hidden(x)) + m.hidden_to_hidden(F.gelu(h))), ROW, [12]),
    "gate": (lambda m, x: m.from_hidden(m.to_hidden(x).sigmoid() * m.to_hidden_again(x)), ROW, [12]),
    "scale": (lambda m, x: m.from_hidden(m.to_hidden(x) * m.scale), ROW, [12]),
    "in place": (lambda m, x: m.from_hidden(m.to_hidden(x).relu_().mul_(m.scale).add_(1)), ROW, [12]),
    "clamp, where, masked_fill": (
        lambda m, x: m.from_hidden(torch.where((h := m.to_hidden(x)) > 0, h.clamp(-1, 1), h.masked_fill(h < 0, 2))),
        ROW,
        [12],
    ),
    "split by an attribute": (
        lambda m, x: m.from_hidden(F.silu((p := m.to_24(x).split(m.half, -1))[0]) * p[1]),
        ROW,
        [12],
    ),
    "chunk": (lambda m, x: m.from_hidden((p := m.to_24(x).chunk(2, -1))[0] * p[1].sigmoid()), ROW, [12]),
    "uneven chunks": (lambda m, x: sum(p.mean(-1, True) for p in m.to_hidden(x).chunk(5, -1)), ROW, []),
    "slices by an attribute": (
        lambda m, x: m.from_hidden((y := m.to_24(x))[..., : m.half] * y[:, :, m.half :]),
        ROW,
        [12],
    ),
    "slices by half a size": (
        lambda m, x: m.from_hidden((y := m.to_24(x))[..., : y.shape[-1] // 2] * y[..., y.shape[-1] // 2 :]),
        ROW,
        [12],
    ),
    "slices at a constant": (lambda m, x: m.from_hidden((y := m.to_24(x))[..., :12] * y[..., 12:]), ROW, []),
    "slice with a step": (lambda m, x: m.from_hidden(m.to_24(x)[..., 1::2]), ROW, [12]),
    "slice with a step that leaves a rest": (lambda m, x: m.to_hidden(x)[..., ::5].sum(-1, keepdim=True), ROW, []),
    "view by an attribute": (
        lambda m, x: m.from_hidden(m.to_hidden(x).view(2, 7, m.heads, 3).flatten(2)),
        ROW,
        [4],
    ),
    "view by a constant": (lambda m, x: m.from_hidden(m.to_hidden(x).view(2, 7, 4, 3).flatten(2)), ROW, []),
    "view with the rest inferred": (lambda m, x: m.from_hidden(m.to_hidden(x).view(2, 7, -1, 3).flatten(2)), ROW, [4]),
    "permutations": (
        lambda m, x: m.from_hidden(m.to_hidden(x).permute(2, 0, 1).movedim(0, -1).unsqueeze(1).squeeze(1).mT.mT),
        ROW,
        [12],
    ),
    "cat": (lambda m, x: m.from_18(torch.cat((m.to_hidden(x), m.to_6(x)), -1)), ROW, [12, 6]),
    "stack": (lambda m, x: m.from_hidden(torch.stack((m.to_hidden(x), m.to_hidden_again(x))).sum(0)), ROW, [12]),
    "picked": (lambda m, x: m.from_hidden(m.to_hidden(x)[:, 0]), ROW, [12]),
    "unbind": (lambda m, x: m.from_hidden(m.to_24(x).view(2, 7, 2, -1).unbind(2)[0]), ROW, [12]),
    "picked entry": (lambda m, x: m.to_hidden(x)[..., 3], ROW, []),
    "expand": (lambda m, x: m.from_hidden(m.to_hidden(x).unsqueeze(0).expand(3, -1, -1, -1)), ROW, [12]),
    "repeat": (lambda m, x: m.from_24(m.to_hidden(x).repeat(1, 1, 2)), ROW, [12]),
    "repeat_interleave": (lambda m, x: m.from_24(m.to_hidden(x).repeat_interleave(2, -1)), ROW, [12]),
    "matmul with a weight": (lambda m, x: m.to_hidden(x) @ m.from_hidden.weight.t(), ROW, [12]),
    "einsum": (lambda m, x: torch.einsum("bti,oi->bto", m.to_hidden(x), m.from_hidden.weight), ROW, [12]),
    "einsum with dots": (lambda m, x: torch.einsum("...i,oi->...o", m.to_hidden(x), m.from_hidden.weight), ROW, [12]),
    "einsum of three": (
        lambda m, x: torch.einsum("bti,i,oi", m.to_hidden(x), m.scale, m.from_hidden.weight),
        ROW,
        [12],
    ),
    "einsum that sums": (lambda m, x: torch.einsum("bti->bt", m.to_hidden(x)), ROW, []),
    "einsum over a diagonal": (
        lambda m, x: torch.einsum("ii,bti->bt", m.hidden_to_hidden.weight, m.to_hidden(x)),
        ROW,
        [],
    ),
    "weight through a rounding": (
        lambda m, x: F.linear(m.to_hidden(x), (m.from_hidden.weight / 0.1).round().clamp(-3, 3) * 0.1),
        ROW,
        [12],
    ),
    "weight that is not zero at zero": (lambda m, x: F.linear(m.to_hidden(x), m.from_hidden.weight.exp()), ROW, []),
    "weight as an exponent": (lambda m, x: F.linear(m.to_hidden(x).sigmoid(), 2.0**m.from_hidden.weight), ROW, []),
    "weight as a divisor": (
        lambda m, x: F.linear(m.to_hidden(x), (1 - (w := m.from_hidden.weight)) / w),
        ROW,
        [],
    ),
    "weight changed through a view": (weight_changed_through_a_view, ROW, []),
    "view of a weight that is changed": (view_of_a_weight_that_is_changed, ROW, []),
    "matmul with a buffer": (
        lambda m, x: (m.to_hidden(x).sigmoid() @ m.bare_batch_norm.running_var)[..., None],
        ROW,
        [],
    ),
    "attention": (lambda m, x: m.from_hidden(attend(m, x)), ROW, [4]),
    "grouped queries by a flag": (lambda m, x: m.from_hidden(attend(m, x, kv_heads=2, enable_gqa=True)), ROW, [2]),
    "attention of plain products": (eager_attention, ROW, [4]),
    "attention with heads in the batch": (merged_batch_attention, ROW, [4]),
    "attention with a table of biases": (table_biased_attention, ROW, [4]),
    "sum over the axis": (lambda m, x: m.to_hidden(x).sum(-1), ROW, []),
    "softmax over the axis": (lambda m, x: m.from_hidden(m.to_hidden(x).softmax(-1)), ROW, []),
    "softmax over another": (lambda m, x: m.from_hidden(m.to_hidden(x).softmax(1)), ROW, [12]),
    "mean over another": (lambda m, x: m.from_hidden(m.to_hidden(x).mean(1)), ROW, [12]),
    "cumsum and roll over another": (lambda m, x: m.from_hidden(m.to_hidden(x).cumsum(1).roll(1, 1)), ROW, [12]),
    "roll over the axis": (lambda m, x: m.from_hidden(m.to_hidden(x).roll(1, -1)), ROW, []),
    "largest of another": (lambda m, x: m.from_hidden(m.to_hidden(x).max(1).values), ROW, [12]),
    "layer norm": (lambda m, x: m.from_hidden(F.layer_norm(m.to_hidden(x), (12,), m.scale)), ROW, []),
    "compared with a count": (lambda m, x: m.from_hidden(m.to_hidden(x) * torch.arange(12)), ROW, []),
    "added to ones of its size": (
        lambda m, x: m.from_hidden((h := m.to_hidden(x)) + torch.ones(h.shape[-1])),
        ROW,
        [12],
    ),
    "added to ones of a constant size": (lambda m, x: m.from_hidden(m.to_hidden(x) + torch.ones(12)), ROW, []),
    "chosen by number": (lambda m, x: m.from_hidden(m.to_hidden(x)[:, torch.tensor([1, 2])]), ROW, [12]),
    "chosen by number on the axis": (lambda m, x: m.to_hidden(x)[..., torch.tensor([1, 2])], ROW, []),
    "chosen by constant numbers from the end": (
        lambda m, x: m.from_hidden((h := m.to_hidden(x)) * h[..., [-1]]),
        ROW,
        [11],
    ),
    "weight norm for each entry": (
        lambda m, x: m.from_hidden(F.linear(x, torch._weight_norm(m.to_hidden.weight, m.scale[:, None], 0))),
        ROW,
        [],
    ),
    "written at chosen places of another": (put_at_places, ROW, [12]),
    "added at chosen places of another": (
        lambda m, x: m.from_hidden((h := m.to_hidden(x)).index_add(1, torch.tensor([0, 2]), h[:, :2])),
        ROW,
        [12],
    ),
    "chosen by a mask": (lambda m, x: m.from_hidden(m.to_hidden(x)[x[..., 0] > 0]).sum(0), ROW, [12]),
    "scattered by a mask": (
        lambda m, x: m.from_hidden((h := m.to_hidden(x)).masked_scatter(h > 0, h.detach())),
        ROW,
        [],
    ),
    "a recurrent layer": (lambda m, x: m.from_hidden(m.recurrent(m.to_hidden(x))[0]), ROW, []),
    "numbers drawn at random": (drawing, ROW, []),
    "a number of the forward": (
        lambda m, x: m.from_hidden((h := m.to_hidden(x)) * (1 / h.shape[-1])),
        ROW,
        [],
    ),
    "a number made of the size of a layer": (
        lambda m, x: m.from_hidden(m.to_hidden(x)) * m.to_hidden.out_features,
        ROW,
        [],
    ),
    "a number made of the channels of a layer": (
        lambda m, x: m.last_conv(m.conv(x)) * m.conv.out_channels,
        IMAGE,
        [],
    ),
    "view by the size of a layer": (
        lambda m, x: m.from_hidden(m.to_hidden(x).view(2, 7, m.to_hidden.out_features // 3, 3).flatten(2)),
        ROW,
        [4],
    ),
    "view by a number of all entries": (
        lambda m, x: m.from_hidden((h := m.to_hidden(x)).view(h.numel() // h.shape[-1], -1)).mean(0),
        ROW,
        [12],
    ),
    "tiles": (lambda m, x: m.from_24(m.to_hidden(x).tile(2)), ROW, [12]),
    "windows over another": (lambda m, x: m.from_hidden(m.to_hidden(x).unfold(1, 2, 1).mean(-1)), ROW, [12]),
    "windows of images": (
        lambda m, x: m.last_conv(F.fold(F.unfold((h := m.conv(x)), 3, padding=1), h.shape[-2:], 3, padding=1)),
        IMAGE,
        [12],
    ),
    "pixels from channels and back": (
        lambda m, x: m.last_conv(F.pixel_unshuffle(F.pixel_shuffle(m.conv_48(x), 2), 2)[:, ::4]),
        IMAGE,
        [12],
    ),
    "a loss": (
        lambda m, x: m.from_hidden(h := m.to_hidden(x)) * F.cross_entropy(h.flatten(0, 1), torch.arange(14) % 12),
        ROW,
        [],
    ),
    "strides": (lambda m, x: m.from_hidden((h := m.to_hidden(x)).as_strided(h.shape, h.stride())), ROW, []),
    "the largest of all": (lambda m, x: m.from_hidden((h := m.to_hidden(x)) / h.max()), ROW, []),
    "gather over another": (
        lambda m, x: m.from_hidden((h := m.to_hidden(x)).gather(1, torch.zeros_like(h, dtype=torch.long))),
        ROW,
        [12],
    ),
    "written in place by slices": (shifted, ROW, [12]),
    "written into zeros by pieces": (written_by_pieces, ROW, []),
    "convolution": (lambda m, x: m.last_conv(m.conv(x)), IMAGE, [12]),
    "grouped convolution": (lambda m, x: m.last_conv_24(m.grouped(m.conv(x))), IMAGE, [4]),
    "inner channels of grouped convolutions": (lambda m, x: m.regrouped(m.grouped(x)), torch.Size((2, 12, 6, 6)), [6]),
    "depthwise convolution": (lambda m, x: m.last_conv(m.depthwise(m.conv(x))), IMAGE, [12]),
    "transposed convolution": (lambda m, x: m.last_conv_8(m.transposed(m.conv(x))), IMAGE, [12, 8]),
    "grouped transposed": (lambda m, x: m.last_conv_24(m.grouped_transposed(m.conv(x))), IMAGE, [4]),
    "batch norm": (lambda m, x: m.last_conv(m.batch_norm(m.conv(x))), IMAGE, [12]),
    "batch norm without weights": (lambda m, x: m.last_conv(m.bare_batch_norm(m.conv(x))), IMAGE, [12]),
    "group norm": (lambda m, x: m.last_conv(m.group_norm(m.conv(x))), IMAGE, [4]),
    "pooling": (lambda m, x: m.last_conv(F.adaptive_avg_pool2d(F.max_pool2d(m.conv(x), 2), 1)), IMAGE, [12]),
    "padding that moves the axis": (lambda m, x: m.from_hidden(F.pad(m.to_hidden(x), (1, -1))), ROW, []),
    "padding to a constant": (
        lambda m, x: m.from_hidden(F.pad(h := m.to_hidden(x), (0, 12 - h.shape[-1]))),
        ROW,
        [],
    ),
    "a slope for each channel": (lambda m, x: m.last_conv(F.prelu(m.conv(x), m.scale)), IMAGE, [12]),
    "a slope for each channel, of as many places": (
        lambda m, x: m.last_conv(F.prelu(m.conv(x), m.scale)),
        torch.Size((2, 2, 14, 14)),
        [12],
    ),
    "one slope for all": (lambda m, x: m.from_hidden(F.prelu(m.to_hidden(x), m.table.weight[0, :1])), ROW, [12]),
    "padding and resizing": (
        lambda m, x: m.last_conv(F.interpolate(F.pad(m.conv(x), (1, 1)), scale_factor=2)),
        IMAGE,
        [12],
    ),
    "flattened places": (lambda m, x: m.from_hidden(m.conv(x).mean((2, 3), keepdim=True).flatten(1)), IMAGE, [12]),
    "squeeze and excite": (
        lambda m, x: m.last_conv((h := m.conv(x)) * m.hidden_to_hidden(h.mean((2, 3))).sigmoid()[..., None, None]),
        IMAGE,
        [12],
    ),
}


@pytest.mark.parametrize("name", SNIPPETS)
def test_a_rule_leaves_exactly_the_axes_on_which_pruned_equals_masked(name):
    forward, shape, sizes = SNIPPETS[name]
    model, inputs = Snippet(forward).eval(), {"x": torch.randn(shape)}
    qadg = build_qadg(model, inputs, verify=False)
    assert [axis.size for axis in qadg.axes] == sizes, str(qadg)
    draw = random.Random(0)
    removed = {axis.name: draw.sample(range(axis.size), max(1, axis.size // 3)) for axis in qadg.axes}
    dense = model(**inputs)
    small = qadg.prune(model, removed)
    qadg.zero_(model, removed)
    masked = model(**inputs)
    assert not removed or (masked - dense).abs().max() > 1e-3
    torch.testing.assert_close(small(**inputs), masked, **ROUNDING)


NUMBERS = {
    "a float": lambda h: h.shape[-1] * 0.5,
    "a quotient": lambda h: divmod(h.shape[-1], 3)[0],
    "a shift": lambda h: h.shape[-1] << 1,
    "bits": lambda h: h.shape[-1] & 7,
    "a square root": lambda h: math.sqrt(h.shape[-1]),
    "rounded": lambda h: round(h.shape[-1]),
    "a count": lambda h: h.numel(),
    "a length": lambda h: len(h.mT[0]),
    "a tensor": lambda h: torch.tensor(h.shape[-1]),
    "a filled tensor": lambda h: torch.full((3,), h.shape[-1]),
    "a tensor filled from another": lambda h: h.new_full((3,), h.shape[-1]),
    "a tensor filled like another": lambda h: torch.full_like(torch.zeros(3), h.shape[-1]),
    "numbers up to it": lambda h: torch.arange(h.shape[-1]).sum(),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_size_that_becomes_a_number_of_the_forward_stays(name):
    def forward(m, x):
        return m.from_hidden(h := m.to_hidden(x)) * NUMBERS[name](h)

    qadg = build_qadg(Snippet(forward), {"x": torch.randn(ROW)}, verify=False)
    assert qadg.axes == ()
    assert "a number of the forward cannot follow" in qadg.explain_frozen()


@torch.library.custom_op("hf_geta_tests::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@double.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def doubled(m, x):
    return m.from_hidden(torch.ops.hf_geta_tests.double(m.to_hidden(x)))


def test_an_unknown_operator_freezes_its_axes_and_is_named():
    qadg = build_qadg(Snippet(doubled), {"x": torch.randn(ROW)})
    assert qadg.axes == ()
    assert "no rule for hf_geta_tests.double.default by hf_geta_tests.double" in qadg.explain_frozen()


def test_a_rule_of_the_users_frees_what_an_unknown_operator_froze():
    operator = torch.ops.hf_geta_tests.double

    @rule(operator)
    def same_entries(axes, x):
        return x

    try:
        assert [axis.size for axis in build_qadg(Snippet(doubled), {"x": torch.randn(ROW)}).axes] == [12]
    finally:
        del RULES[operator]


def test_a_rule_that_does_not_fit_freezes_and_says_so():
    operator = torch.ops.hf_geta_tests.double

    @rule(operator)
    def wrong_entries(axes, x):
        return x[:-1]

    try:
        qadg = build_qadg(Snippet(doubled), {"x": torch.randn(ROW)})
    finally:
        del RULES[operator]
    assert qadg.axes == ()
    assert "the rule for hf_geta_tests.double.default does not fit" in qadg.explain_frozen()
