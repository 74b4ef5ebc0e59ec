"""Random models and random configurations keep the law of a run.

HF_GETA_FUZZ_EXAMPLES=500 draws as many, other ones each time; without it the same few dozen.
"""

import os
from collections import Counter

from hypothesis import HealthCheck, event, given, settings

from tests.fuzz.grammar import runs
from tests.fuzz.law import DIVERGED, run_or_refusal

LONG = int(os.environ.get("HF_GETA_FUZZ_EXAMPLES", "0"))
EXAMPLES = LONG or 40


def test_a_random_run_is_refused_in_words_or_keeps_its_targets():
    outcomes = Counter()

    @settings(
        max_examples=EXAMPLES,
        derandomize=not LONG,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=bool(LONG),
    )
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
