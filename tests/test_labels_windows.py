"""Labels against a slow, obvious reference: random markets, and every row of a real day."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from label_cases import recorded_day, rows_on_grid, short_market

from tradebook.base.clock import NS_PER_MS, NS_PER_S
from tradebook.labels.barriers import barrier_labels
from tradebook.labels.horizon import horizon_labels
from tradebook.market.book import BOOK_LOCKED, BOOK_OK

OUTCOMES = ("gross_bps", "long_net_bps", "short_net_bps")


def is_price(status):
    "Whether a book is a price"
    return status in (BOOK_OK, BOOK_LOCKED)


def net(quotes, a, b, cost_bps):
    "Gross, long and short of a trade from quote a to quote b, in bps, one by one"
    bid_0, ask_0 = float(quotes["bid_ticks"][a]), float(quotes["ask_ticks"][a])
    bid_h, ask_h = float(quotes["bid_ticks"][b]), float(quotes["ask_ticks"][b])
    to_bps = 1e4 / ((bid_0 + ask_0) / 2)
    gross = ((bid_h + ask_h) - (bid_0 + ask_0)) / 2 * to_bps
    return gross, (bid_h - ask_0) * to_bps - cost_bps, (bid_0 - ask_h) * to_bps - cost_bps


def reference(rows, quotes, horizon_ns, cost_bps, max_age_ns, dead_zone_bps=None, distance=None):
    "What a label is, said slowly: walk on from each row until something ends the window"
    ts, segment = quotes["ts_recv"].tolist(), quotes["segment"].tolist()
    status = quotes["status"].tolist()
    bid, ask = quotes["bid_ticks"].tolist(), quotes["ask_ticks"].tolist()
    found, n, first = [], len(ts), -1
    for i, (now, row_status) in enumerate(
        zip(rows["ts"].tolist(), rows["status"].tolist(), strict=True)
    ):
        while first + 1 < n and ts[first + 1] <= now:
            first += 1
        stop, label, touched, end, known = now + horizon_ns, 0, 0, now + horizon_ns, False
        last, k = first, first
        is_possible = first >= 0 and is_price(row_status) and is_price(status[first])
        far = distance[i] if distance is not None else np.inf
        while is_possible and np.isfinite(far) | (distance is None):
            if k + 1 < n and ts[k + 1] <= stop:
                if segment[k + 1] != segment[k] or ts[k + 1] - ts[k] > max_age_ns:
                    break  # a hole
                k += 1
                last = k
                if distance is None or not is_price(status[k]):
                    continue
                if bid[k] >= ask[first] + far:
                    touched, end, known = 1, ts[k], True
                elif ask[k] <= bid[first] - far:
                    touched, end, known = -1, ts[k], True
                if known:
                    break
            else:
                is_exact = ts[k] == stop
                follows = k + 1 < n and segment[k + 1] == segment[k]
                known = is_exact or (follows and ts[k + 1] - ts[k] <= max_age_ns)
                break
        is_valid = bool(is_possible and known and is_price(status[last]))
        values = net(quotes, first, last, cost_bps) if is_valid else (np.nan,) * 3
        if distance is None and is_valid:
            label = int(np.sign(values[0])) if abs(values[0]) > dead_zone_bps else 0
        elif is_valid:
            label = touched
        found.append((now, end, label, touched if is_valid else 0, is_valid, *values))
    return found


def same(labels, expected):
    "Compare every field of every row"
    for name, column in zip(labels.dtype.names, zip(*expected, strict=True), strict=True):
        if name == "ts_end":  # of an unknown outcome it means nothing
            ok = labels["is_valid"]
            np.testing.assert_array_equal(labels[name][ok], np.array(column)[ok], err_msg=name)
        else:
            np.testing.assert_array_equal(labels[name], np.array(column), err_msg=name)


HORIZON_S = st.sampled_from([0.1, 0.25, 1.0, 2.0, 5.0])


@settings(max_examples=300, deadline=None)
@given(short_market(), HORIZON_S, st.sampled_from([0.0, 0.5, 3.0]))
def test_horizon_labels_equal_the_slow_reference(drawn, horizon_s, dead_zone_bps):
    quotes, _ = drawn
    rows = rows_on_grid(quotes, 250 * NS_PER_MS)
    labels = horizon_labels(rows, quotes, horizon_s, dead_zone_bps, 4.0, 1_500)
    horizon_ns, hole_ns = round(horizon_s * NS_PER_S), 1_500 * NS_PER_MS
    same(labels, reference(rows, quotes, horizon_ns, 4.0, hole_ns, dead_zone_bps))


@settings(max_examples=300, deadline=None)
@given(short_market(), HORIZON_S, st.sampled_from([0.5, 1.0, 2.0]))
def test_barrier_labels_equal_the_slow_reference(drawn, horizon_s, multiple):
    quotes, rng = drawn
    rows = rows_on_grid(quotes, 250 * NS_PER_MS)
    volatility = rng.choice([np.nan, 0.0, 1.0, 2.5, 6.0], len(rows))
    labels = barrier_labels(rows, quotes, volatility, horizon_s, multiple, 4.0, 1_500)
    mid = (rows["bid_ticks"].astype(float) + rows["ask_ticks"]) / 2
    distance = mid * volatility * multiple / 1e4
    distance = np.where(distance > 0, distance, np.nan)
    horizon_ns, hole_ns = round(horizon_s * NS_PER_S), 1_500 * NS_PER_MS
    same(labels, reference(rows, quotes, horizon_ns, 4.0, hole_ns, distance=distance))


@settings(max_examples=100, deadline=None)
@given(short_market(), HORIZON_S)
def test_no_label_depends_on_what_comes_after_its_end(drawn, horizon_s):
    quotes, _ = drawn
    rows = rows_on_grid(quotes, 250 * NS_PER_MS)
    labels = horizon_labels(rows, quotes, horizon_s, 0.5, 4.0, 1_500)
    for i in np.flatnonzero(labels["is_valid"])[::5]:
        # one more quote, so that the window is known to be closed
        stop = np.searchsorted(quotes["ts_recv"], labels["ts_end"][i], side="right") + 1
        again = horizon_labels(rows[: i + 1], quotes[:stop], horizon_s, 0.5, 4.0, 1_500)
        assert again[i] == labels[i]


@settings(max_examples=100, deadline=None)
@given(short_market(), HORIZON_S)
def test_labels_of_a_mirrored_market_are_mirrored(drawn, horizon_s):
    quotes, _ = drawn
    quotes["bid_ticks"] += 1_000_000  # far up, so that a basis point is alike on both sides
    quotes["ask_ticks"] += 1_000_000
    mirrored = quotes.copy()
    mirrored["bid_ticks"] = 2_020_000 - quotes["ask_ticks"]
    mirrored["ask_ticks"] = 2_020_000 - quotes["bid_ticks"]
    args = (horizon_s, 0.0, 4.0, 1_500)
    ours = horizon_labels(rows_on_grid(quotes, 250 * NS_PER_MS), quotes, *args)
    theirs = horizon_labels(rows_on_grid(mirrored, 250 * NS_PER_MS), mirrored, *args)
    np.testing.assert_array_equal(ours["label"], -theirs["label"])
    np.testing.assert_array_equal(ours["is_valid"], theirs["is_valid"])
    np.testing.assert_allclose(ours["long_net_bps"], theirs["short_net_bps"], atol=1e-3)


@pytest.fixture(scope="module")
def standx_day(recordings):
    "Best quotes of a whole recorded day and rows once a second"
    quotes = recorded_day(recordings)
    return rows_on_grid(quotes, NS_PER_S), quotes


@pytest.mark.recordings
def test_every_row_of_a_real_day_equals_the_reference(standx_day):
    rows, quotes = standx_day
    labels = horizon_labels(rows, quotes, 10.0, 0.5, 8.0, 1_500)
    same(labels, reference(rows, quotes, 10 * NS_PER_S, 8.0, 1_500 * NS_PER_MS, 0.5))
    assert len(rows) > 86_000 and 0.3 < labels["is_valid"].mean() < 0.6


@pytest.mark.recordings
def test_every_barrier_of_a_real_day_equals_the_reference(standx_day):
    rows, quotes = standx_day
    volatility = np.full(len(rows), 0.8)
    labels = barrier_labels(rows, quotes, volatility, 10.0, 1.0, 8.0, 1_500)
    mid = (rows["bid_ticks"].astype(float) + rows["ask_ticks"]) / 2
    distance = mid * volatility / 1e4
    hole_ns = 1_500 * NS_PER_MS
    same(labels, reference(rows, quotes, 10 * NS_PER_S, 8.0, hole_ns, distance=distance))
    assert (labels["touched"] != 0).sum() > 1_000


@pytest.mark.recordings
def test_no_window_of_a_real_day_straddles_a_hole(standx_day):
    rows, quotes = standx_day
    labels = horizon_labels(rows, quotes, 10.0, 0.5, 8.0, 1_500)
    pause = np.flatnonzero(np.diff(quotes["ts_recv"]) > 1_500 * NS_PER_MS)
    opens, closes = quotes["ts_recv"][pause], quotes["ts_recv"][pause + 1]
    ok = labels[labels["is_valid"]]
    inside = np.searchsorted(closes, ok["ts_start"], side="right")  # first hole not yet over
    reaches = opens[np.minimum(inside, len(opens) - 1)] < ok["ts_end"]
    assert not (reaches & (inside < len(opens))).any()
    assert len(pause) > 2_000
