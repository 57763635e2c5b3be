"""The best sequence of positions against trying them all, and the outlook against plain counting."""

from itertools import combinations, pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tradebook.labels.horizon import LABEL
from tradebook.labels.outlook import accuracy_needed, best_sequence, outlook


@st.composite
def labels(draw):
    "A few labels of random length and worth"
    n = draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    out = np.zeros(n, LABEL)
    out["ts_start"] = np.sort(rng.integers(0, 30, n))
    out["ts_end"] = out["ts_start"] + rng.integers(0, 15, n)
    out["is_valid"] = rng.uniform(size=n) < 0.8
    out["gross_bps"] = rng.normal(0, 9, n)
    out["long_net_bps"], out["short_net_bps"] = out["gross_bps"] - 4, -out["gross_bps"] - 4
    return out


def by_trying(start, end, value):
    "Most that any set of labels pays in which none overlaps another"
    most = 0.0
    for k in range(1, len(value) + 1):
        for chosen in combinations(range(len(value)), k):
            if all(end[a] <= start[b] for a, b in pairwise(chosen)):
                most = max(most, value[list(chosen)].sum())
    return most


@settings(max_examples=300, deadline=None)
@given(labels())
def test_no_set_of_positions_pays_more_than_the_best_sequence(drawn):
    start, end = drawn["ts_start"].copy(), drawn["ts_end"].copy()
    value = np.maximum(drawn["long_net_bps"], drawn["short_net_bps"])
    most, taken = best_sequence(start, end, value)
    assert np.isclose(most, by_trying(start, end, value))
    assert np.isclose(value[taken].sum(), most)
    assert (end[taken[:-1]] <= start[taken[1:]]).all()


@settings(max_examples=200, deadline=None)
@given(labels())
def test_someone_right_that_often_earns_nothing(drawn):
    better = np.maximum(drawn["long_net_bps"], drawn["short_net_bps"])
    worse = np.minimum(drawn["long_net_bps"], drawn["short_net_bps"])
    a = accuracy_needed(better, worse)
    assert np.isclose(a * better.mean() + (1 - a) * worse.mean(), 0, atol=1e-6)


@settings(max_examples=200, deadline=None)
@given(labels())
def test_invalid_rows_change_nothing_but_the_count_of_rows(drawn):
    whole, kept = outlook(drawn), outlook(drawn[drawn["is_valid"]])
    assert whole.pop("n_rows") == len(drawn) and kept.pop("n_rows") == drawn["is_valid"].sum()
    np.testing.assert_equal(whole, kept)
