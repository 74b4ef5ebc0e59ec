"""Laws of packed embeddings: a lookup is the decoded table's, without decoding the table."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import hf_geta.checkpoint
from hf_geta.checkpoint.embeddings import PackedEmbedding
from hf_geta.checkpoint.manifest import LayerManifest
from hf_geta.checkpoint.packing import pack_codes, unpack_rows


def codes_of(entries, width, bits):
    top = 2 ** (bits - 1) - 1
    return torch.randint(-top, top + 1, (entries, width), generator=torch.Generator().manual_seed(bits))


def packed_embedding(codes, bits, step_sizes):
    manifest = LayerManifest(bits=bits, shape=tuple(codes.shape), granularity="channel")
    packed = PackedEmbedding(nn.Embedding(*codes.shape), manifest)
    packed.get_buffer("step_size").copy_(step_sizes)
    packed._buffers["weight"] = pack_codes(codes, bits)
    return packed


@pytest.mark.parametrize("bits", range(2, 17))
@pytest.mark.parametrize("width", [1, 5, 8, 12, 24])
def test_rows_unpack_as_they_do_with_the_whole_table(bits, width):
    codes = codes_of(11, width, bits)
    rows = torch.tensor([10, 0, 3, 3, 9])
    assert torch.equal(unpack_rows(pack_codes(codes, bits), bits, width, rows), codes[rows].int())


def test_a_lookup_is_step_size_times_codes_of_its_rows():
    # Three rows of two 4-bit codes, (1, -1), (7, 0), (-7, 2): the format's own bytes.
    packed = packed_embedding(torch.tensor([[1, -1], [7, 0], [-7, 2]]), 4, torch.tensor([0.5, 2.0, 0.25]))
    assert bytes(packed.codes().tolist()) == bytes.fromhex("f10729")
    found = packed(torch.tensor([[2, 0], [1, 2]]))
    expected = [[[-1.75, 0.5], [0.5, -0.5]], [[14.0, 0.0], [-1.75, 0.5]]]
    assert torch.equal(found, torch.tensor(expected))


@pytest.mark.parametrize("width", [12, 16])
def test_a_lookup_decodes_no_table(width, monkeypatch):
    codes, ids = codes_of(40, width, 6), torch.tensor([[3, 39, 0]])
    packed = packed_embedding(codes, 6, torch.linspace(0.1, 1, 40)).to(torch.bfloat16)
    expected = packed.weight[ids]
    packed.forget_decoded()

    def refuse(*_):
        raise AssertionError("the whole table was decoded")

    monkeypatch.setattr(PackedEmbedding, "_decode", refuse)
    assert torch.equal(packed(ids), expected)
    assert packed(ids).dtype == torch.bfloat16


@pytest.mark.parametrize("outside", [-1, 40])
def test_an_id_outside_the_table_is_refused(outside):
    packed = packed_embedding(codes_of(40, 12, 4), 4, torch.ones(40))
    with pytest.raises(IndexError):
        packed(torch.tensor([0, outside]))


@pytest.mark.parametrize(("bits", "width"), [(2, 5), (4, 8), (8, 12), (11, 3)])
def test_numpy_reads_a_row_as_the_format_says(bits, width):
    page = (Path(hf_geta.checkpoint.__file__).parent / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(def row.*?)```", page, re.DOTALL)
    exec(code, {"np": np}, program := {})
    codes, step_sizes = codes_of(7, width, bits), torch.linspace(0.1, 1, 7)
    packed = packed_embedding(codes, bits, step_sizes)
    for i in range(7):
        found = program["row"](packed.codes().numpy(), step_sizes.numpy(), i, width, bits)
        assert np.array_equal(found, packed(torch.tensor([i])).detach().numpy()[0])
