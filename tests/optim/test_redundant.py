"""Redundant entries in chunks: whatever their size, each entry once, and the same step."""

import pytest
import torch

from hf_geta import GETAConfig, create_optimizer
from hf_geta.optim import redundant
from hf_geta.optim.widths import WidthTable
from hf_geta.quantization.layers import quantized_layers
from hf_geta.quantization.quantizers import Quantizer
from tests.optim import test_block_runs
from tests.optim.test_qasso import CONFIG, TOTAL_STEPS, prepared, train
from tests.quantization.random_blocks import draw_multipliers_


@pytest.mark.parametrize("most", [1, 3, 10, 100])
def test_chunks_hold_every_entry_once_and_no_more_than_the_bound(most, monkeypatch):
    monkeypatch.setattr(redundant, "CHUNK_ENTRIES", most)
    generator = torch.Generator().manual_seed(most)
    for _ in range(20):
        sizes = torch.randint(0, 12, (5,), generator=generator).tolist()
        indices = [torch.randperm(50, generator=generator)[:size] for size in sizes]
        chunks = list(redundant._in_chunks(indices))
        for chunk in chunks:
            assert sum(len(piece.index) for piece in chunk) <= most
            segments = [piece.segment for piece in chunk]
            assert len(set(segments)) == len(segments)  # sums are written to each segment once
        pieces = [piece for chunk in chunks for piece in chunk]
        for segment, index in enumerate(indices):
            assert torch.equal(torch.cat([piece.index for piece in pieces if piece.segment == segment]), index)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_a_run_in_small_chunks_ends_as_one_in_large(granularity, monkeypatch):
    """Sums in another order, in float32; a gamma that is off by more would show."""
    config = GETAConfig(**{**CONFIG.to_dict(), "granularity": granularity})
    ended = []
    for most in (redundant.CHUNK_ENTRIES, 37):
        monkeypatch.setattr(redundant, "CHUNK_ENTRIES", most)
        model = prepared(config)
        optimizer = create_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1), TOTAL_STEPS)
        first = optimizer.schedule.warmup_steps + optimizer.schedule.projection_steps
        list(train(model, optimizer, range(first + 2)))
        assert (len(optimizer._entries.chunks) > 5) == (most == 37)
        ended.append(model.state_dict())
    for name, expected in ended[0].items():
        torch.testing.assert_close(ended[1][name], expected, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("shape", [(8, 1), (1, 8), (8, 8)])
def test_entries_of_a_layer_with_one_channel_are_known_by_it(shape):
    """Of a Conv1D with one output all dimensions of the scale are 1: none of them tells the channels' own."""
    weight, quantizer = torch.nn.Parameter(torch.randn(shape)), Quantizer((1, shape[1]))
    quantizer.initialize_(weight, 4)
    index = torch.arange(weight.numel())
    entries = redundant.RedundantEntries([weight], [index], [0], WidthTable([quantizer]))
    (chunk,), grids = entries.chunks, entries.grids()
    clipped, residual = chunk.split_quantized(chunk.gather(), grids)
    expected = quantizer(weight).detach().flatten()
    torch.testing.assert_close(clipped + grids.step_size * residual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", test_block_runs.FAMILIES)
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_what_is_forgotten_of_an_entry_is_what_its_layer_rounds_it_to(family, granularity, monkeypatch):
    """Q(x) = c + d r, of all entries of the groups, in chunks that end inside of a segment."""
    monkeypatch.setattr(redundant, "CHUNK_ENTRIES", 1000)
    values = {**test_block_runs.CONFIG.to_dict(), "granularity": granularity}
    model, optimizer = test_block_runs.started(family, GETAConfig(**values))
    for layer in quantized_layers(model).values():
        layer.weight_quantizer.set_bits_(4)
        layer.weight_quantizer.log_exponent.data.fill_(0.2)
        draw_multipliers_(layer, 4)
    groups = torch.ones(optimizer.space.num_groups, dtype=torch.bool)
    entries = redundant.RedundantEntries.build(optimizer.space, groups, optimizer.widths, optimizer.quantizer_rows)
    rounded = dict(zip(optimizer.space.parameters, optimizer.space.parameters, strict=True))
    rounded |= {layer.weight: layer.weight_quantizer(layer.weight) for layer in quantized_layers(model).values()}
    assert any(layer.weight in entries.parameters for layer in quantized_layers(model).values())
    for chunk, before in zip(entries.chunks, entries.gather(), strict=True):
        clipped, residual = chunk.split_quantized(before, entries.grids())
        found = clipped + chunk._spread_rows(entries.grids().step_size) * residual
        expected = torch.cat([rounded[entries.parameters[p.segment]].take(p.index) for p in chunk.pieces])
        # u / d of float32 logarithms may round to the other side of a tie
        differ = ~torch.isclose(found, expected, rtol=1e-4, atol=1e-6)
        assert differ.float().mean() < 1e-3
