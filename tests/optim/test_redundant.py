"""Redundant entries in chunks: whatever their size, each entry once, and the same step."""

import pytest
import torch

from hf_geta import GETAConfig, create_optimizer
from hf_geta.optim import redundant
from tests.optim.test_qasso import CONFIG, TOTAL_STEPS, prepared, train


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
