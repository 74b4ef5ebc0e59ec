"""Scores: what makes groups of different kinds comparable."""

import pytest
import torch

from hf_geta.optim.saliency import normalize_by_kind


def test_normalization_makes_kinds_comparable():
    scores = torch.tensor([100.0, 300.0, 1.0, 3.0])
    assert normalize_by_kind(scores, ["head", "mlp"], [2, 2]).tolist() == pytest.approx([0.5, 1.5, 0.5, 1.5])


def test_a_space_without_groups_has_no_scores():
    assert normalize_by_kind(torch.zeros(0), [], []).shape == (0,)
