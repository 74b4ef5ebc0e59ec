"""Random models and random configurations keep the law of a run.

HF_GETA_FUZZ_EXAMPLES=500 draws as many, other ones each time; without it the same few dozen.
"""

import os
from collections import Counter

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from hf_geta import config_checks
from hf_geta.checkpoint import manifest_checks
from tests.fuzz.grammar import models, runs
from tests.fuzz.law import DIVERGED, check_cuts, run_or_refusal

LONG = int(os.environ.get("HF_GETA_FUZZ_EXAMPLES", "0"))


DRAWN = settings(
    max_examples=LONG or 40,
    derandomize=not LONG,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=bool(LONG),
)


@pytest.fixture(autouse=True)
def _blocks_of_4_inputs(monkeypatch):
    """So that matrices of few inputs have several blocks."""
    for module in (config_checks, manifest_checks):
        monkeypatch.setattr(module, "BLOCK_SIZES", (4, 32))


def test_a_random_run_is_refused_in_words_or_keeps_its_targets():
    outcomes = Counter()

    @DRAWN
    @given(runs())
    def law(run):
        outcome = run_or_refusal(*run)
        outcomes[outcome] += 1
        event(outcome[:60])

    law()
    kept, drawn = outcomes.pop("kept"), outcomes.total()
    for refusal, count in outcomes.most_common():
        print(count, refusal)  # shown by pytest -s
    assert kept > drawn / 2, "too few runs say anything"
    assert outcomes[DIVERGED] <= drawn / 20


def test_whichever_groups_of_a_random_model_go_the_cut_model_is_the_masked_one():
    found = Counter()

    @DRAWN
    @given(models(), st.integers(0, 2**32))
    def law(model, seed):
        found[bool(check_cuts(model, seed))] += 1

    law()
    assert found[True] > found[False]
