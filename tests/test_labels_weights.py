"""Weights and meta-labels against what the book says, counted bar by bar."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tradebook.base.clock import NS_PER_S
from tradebook.features.kernel import ROW
from tradebook.labels.meta import cusum_events, meta_labels, onsets
from tradebook.labels.sides import Costs, side_outcomes
from tradebook.labels.weights import (
    concurrency,
    return_weights,
    sample_weights,
    time_decay,
    uniqueness,
)
from tradebook.market.book import BOOK_OK, BOOK_ONE_SIDED
from tradebook.market.quotes import QUOTE


@st.composite
def intervals(draw):
    "Labels of random start and length, in order of their start, with ties and empty windows"
    n = draw(st.integers(1, 50))
    start = np.array(sorted(draw(st.lists(st.integers(0, 200), min_size=n, max_size=n))), np.int64)
    lengths = draw(st.lists(st.integers(0, 60), min_size=n, max_size=n))
    return start, start + np.array(lengths, np.int64)


def open_at(start, end, t):
    "Labels open in the bar from t to t + 1"
    return ((start <= t) & (t < end)).sum()


@settings(max_examples=200, deadline=None)
@given(intervals())
def test_uniqueness_is_the_mean_over_bars(drawn):
    start, end = drawn
    bars = np.array([open_at(start, end, t) for t in range(300)])
    for i, u in enumerate(uniqueness(start, end)):
        own = bars[start[i] : end[i]]
        assert np.isclose(u, (1 / own).mean() if len(own) else 1.0)


@settings(max_examples=200, deadline=None)
@given(intervals(), st.integers(0, 2**32 - 1))
def test_return_weights_are_the_sum_over_bars(drawn, seed):
    start, end = drawn
    rng = np.random.default_rng(seed)
    quotes = np.zeros(rng.integers(1, 80), QUOTE)
    quotes["ts_recv"] = np.sort(rng.integers(-20, 280, len(quotes)))
    quotes["bid_ticks"] = 1_000 + np.cumsum(rng.integers(-5, 6, len(quotes)))
    quotes["ask_ticks"] = quotes["bid_ticks"] + rng.integers(0, 3, len(quotes))
    quotes["status"] = np.where(rng.uniform(size=len(quotes)) < 0.1, BOOK_ONE_SIDED, BOOK_OK)
    priced = quotes[quotes["status"] == BOOK_OK]
    mid = (priced["bid_ticks"].astype(float) + priced["ask_ticks"]) / 2
    found = return_weights(start, end, quotes)
    for i in range(len(start)):
        total = 0.0
        for k in range(1, len(priced)):
            t = priced["ts_recv"][k]
            if start[i] < t <= end[i]:
                total += 1e4 * np.log(mid[k] / mid[k - 1]) / open_at(start, end, t - 1)
        assert np.isclose(found[i], abs(total), atol=1e-7)


@settings(max_examples=200, deadline=None)
@given(intervals())
def test_concurrency_adds_up_to_all_windows(drawn):
    start, end = drawn
    edges, n_open = concurrency(start, end)
    assert (np.diff(edges) * n_open).sum() == (end - start).sum() and (n_open >= 0).all()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=50), st.floats(-0.9, 1.0))
def test_decay_is_the_line_of_the_book(own, oldest):
    # Snippet 4.11, line by line
    age = np.cumsum(own)
    slope = (1 - oldest) / age[-1] if oldest >= 0 else 1 / ((oldest + 1) * age[-1])
    expected = 1 - slope * age[-1] + slope * age
    expected[expected < 0] = 0
    found = time_decay(np.array(own), oldest)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert found[-1] == 1.0 and (np.diff(found) >= 0).all()


def market(rng, n=300):
    "Quotes and rows, one a second, with a hole now and then"
    quotes, rows = np.zeros(n, QUOTE), np.zeros(n, ROW)
    mid = 10_000 + np.cumsum(rng.integers(-4, 5, n))
    for table in (quotes, rows):
        table["bid_ticks"], table["ask_ticks"] = mid - 1, mid + 1
        table["segment"] = np.arange(n) // 90
        table["status"] = BOOK_OK
    quotes["ts_recv"] = rows["ts"] = np.arange(n) * NS_PER_S
    return rows, quotes


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_weights_of_valid_rows_have_mean_one_and_others_none(seed):
    rng = np.random.default_rng(seed)
    rows, quotes = market(rng)
    found = side_outcomes(rows, quotes, 1, 8.3, 5.7, 20.0, Costs(1.0), 1_500)
    for weight in (sample_weights(found), sample_weights(found, quotes, 0.2)):
        ok = found["is_valid"]
        assert np.isclose(weight[ok].mean(), 1.0) and (weight[~ok] == 0).all()
        assert (weight >= 0).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(1.0, 12.0))
def test_proposals_are_the_outcomes_of_their_rows(seed, threshold_bps):
    rng = np.random.default_rng(seed)
    rows, quotes = market(rng)
    signal = np.repeat(rng.integers(-1, 2, 60), 5)
    args = 6.3, 6.3, 10.0, Costs(1.0), 1_500
    asked = meta_labels(rows, quotes, signal, *args)
    everything = side_outcomes(rows, quotes, signal, *args)
    for name in everything.dtype.names:
        np.testing.assert_array_equal(asked.outcomes[name], everything[name][asked.place])
    turned = [
        i
        for i in range(len(rows))
        if signal[i]
        and (i == 0 or signal[i] != signal[i - 1] or rows["segment"][i] != rows["segment"][i - 1])
    ]
    assert onsets(signal, rows["segment"]).tolist() == turned == asked.place.tolist()
    events = cusum_events(rows, threshold_bps)
    up = down = 0.0
    expected = []
    for i in range(1, len(rows)):
        if rows["segment"][i] != rows["segment"][i - 1]:
            up = down = 0.0
            continue
        a, b = (int(rows[k]["bid_ticks"]) + int(rows[k]["ask_ticks"]) for k in (i - 1, i))
        r = 1e4 * np.log(b / a)
        up, down = max(0.0, up + r), min(0.0, down + r)
        if up >= threshold_bps or down <= -threshold_bps:
            expected.append(i)
            up = down = 0.0
    assert events.tolist() == expected
