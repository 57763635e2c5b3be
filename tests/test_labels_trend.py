"""Trend scanning against a slow, obvious reference: every fit made anew."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from label_cases import recorded_day, rows_on_grid, short_market

from tradebook.base.clock import NS_PER_MS, NS_PER_S
from tradebook.labels.trend import MAX_T, trend_labels

HOLE_MS = 1_500


def t_of_slope(y):
    "The t of a straight line through equally spaced points, from the formulas of a textbook"
    x = np.arange(len(y)) - (len(y) - 1) / 2
    y = y - y.mean()
    slope = (x @ y) / (x @ x)
    left = y - slope * x
    error = np.sqrt((left @ left) / (len(y) - 2) / (x @ x))
    if abs(slope) < 1e-12:
        return 0.0
    return slope / error if left @ left > 1e-9 * (y @ y) else np.sign(slope) * MAX_T


def is_seen(rows, quotes, i, longest, step_ns):
    "Whether the longest span of a row is free of holes and books without a price"
    status = rows["status"]
    if i + longest >= len(rows) or not np.isin(status[i : i + longest + 1], (0, 1)).all():
        return False
    ts, stop = quotes["ts_recv"], rows["ts"][i] + longest * step_ns
    first = np.searchsorted(ts, rows["ts"][i], side="right") - 1
    last = np.searchsorted(ts, stop, side="left")  # a quote at or after the end
    if first < 0 or last >= len(ts):
        return False
    inside = quotes[first : max(np.searchsorted(ts, stop, side="right"), last + (ts[last] > stop))]
    is_close = (np.diff(inside["ts_recv"]) <= HOLE_MS * NS_PER_MS).all()
    return bool(is_close and (np.diff(inside["segment"]) == 0).all())


def compare(rows, quotes, step_ns, shortest, longest, least_t):
    "Hold every row against fits made one by one"
    spans = [k * step_ns / NS_PER_S for k in (shortest, longest)]
    found = trend_labels(rows, quotes, *spans, 4.0, HOLE_MS, least_t)
    stride = max(1, (longest - shortest) // 20)
    mid = (rows["bid_ticks"].astype(float) + rows["ask_ticks"]) / 2
    for i in range(len(rows)):
        got = found.labels[i]
        assert got["is_valid"] == is_seen(rows, quotes, i, longest, step_ns), i
        assert got["ts_end"] == rows["ts"][i] + longest * step_ns
        if not got["is_valid"]:
            assert np.isnan(found.t[i]) and not got["label"] and np.isnan(got["gross_bps"])
            continue
        tried = np.arange(shortest, longest + 1, stride)
        t = np.array([t_of_slope(mid[i : i + k + 1]) for k in tried])
        assert np.isclose(abs(found.t[i]), np.abs(t).max(), rtol=1e-6), (i, found.t[i], t)
        k = round(found.span_s[i] * NS_PER_S / step_ns)
        assert np.isclose(found.t[i], t[tried == k][0], rtol=1e-6, atol=1e-9)
        assert got["label"] == (np.sign(found.t[i]) if abs(found.t[i]) > least_t else 0)
        assert np.isclose(got["gross_bps"], 1e4 * (mid[i + k] / mid[i] - 1), atol=1e-7)
    return found


@settings(max_examples=150, deadline=None)
@given(short_market(80, 0.03), st.integers(2, 6), st.integers(0, 30), st.sampled_from([0.0, 2.0]))
def test_trends_equal_the_slow_reference(drawn, shortest, more, least_t):
    quotes, _ = drawn
    step_ns = 250 * NS_PER_MS
    compare(rows_on_grid(quotes, step_ns), quotes, step_ns, shortest, shortest + more, least_t)


@pytest.mark.recordings
def test_every_row_of_a_real_day_equals_the_reference(recordings):
    quotes = recorded_day(recordings)
    rows = rows_on_grid(quotes, NS_PER_S)
    found = compare(rows, quotes, NS_PER_S, 4, 6, 3.0)
    assert len(rows) > 86_000 and found.labels["is_valid"].sum() > 25_000
    assert min((found.labels["label"] == side).sum() for side in (-1, 0, 1)) > 1_000
