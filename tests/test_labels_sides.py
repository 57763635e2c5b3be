"""Outcomes of one side against a slow, obvious reference: random markets, and every row of a real day."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from label_cases import recorded_day, rows_on_grid, short_market

from tradebook.base.clock import NS_PER_MS, NS_PER_S
from tradebook.labels.horizon import horizon_labels
from tradebook.labels.sides import Costs, better_side, side_outcomes
from tradebook.market.book import BOOK_LOCKED, BOOK_OK

HOLE_MS = 1_500
WAYS = [(a, b) for a in (False, True) for b in (False, True)]


class Tape:
    "Quotes as plain lists"

    def __init__(self, quotes):
        self.ts, self.segment = quotes["ts_recv"].tolist(), quotes["segment"].tolist()
        self.status = quotes["status"].tolist()
        self.bid, self.ask = quotes["bid_ticks"].tolist(), quotes["ask_ticks"].tolist()

    def is_price(self, k):
        "Whether a quote is a price"
        return self.status[k] in (BOOK_OK, BOOK_LOCKED)

    def walk(self, first, stop_ns, is_end):
        "Step on from a quote until `is_end`, a hole or the time: (place, why)"
        k = first
        while True:
            is_last = k + 1 >= len(self.ts)
            is_hole = not is_last and (
                self.segment[k + 1] != self.segment[k]
                or self.ts[k + 1] - self.ts[k] > HOLE_MS * NS_PER_MS
            )
            if is_last or self.ts[k + 1] > stop_ns:
                is_known = self.ts[k] == stop_ns or not (is_last or is_hole)
                return k, "time" if is_known else "hole"
            if is_hole:
                return k, "hole"
            k += 1
            if self.is_price(k) and (why := is_end(k)):
                return k, why


def one_outcome(tape, now, first, side, profit, stop, horizon_ns, costs):
    "Follow one position step by step: None, or (end, touched, filled, gross, net)"
    bid_0, ask_0 = tape.bid[first], tape.ask[first]
    mid, began, ts = (bid_0 + ask_0) / 2, first, now
    entry = ask_0 if side > 0 else bid_0
    if costs.is_entry_maker:
        entry = bid_0 if side > 0 else ask_0
        wait_ns = round(costs.patience_s * NS_PER_S)
        met = (lambda k: tape.ask[k] <= entry) if side > 0 else (lambda k: tape.bid[k] >= entry)
        began, why = tape.walk(first, now + wait_ns, lambda k: "fill" if met(k) else "")
        if why == "hole":
            return None
        if why == "time":
            return now + wait_ns, 0, False, 0.0, 0.0
        ts = tape.ts[began]
    up, down = entry * (1 + profit / 1e4), entry * (1 - stop / 1e4)
    if side < 0:
        up, down = entry * (1 - profit / 1e4), entry * (1 + stop / 1e4)

    def is_end(k):
        if side > 0:
            return "target" if tape.bid[k] >= up else "stop" if tape.bid[k] <= down else ""
        return "target" if tape.ask[k] <= up else "stop" if tape.ask[k] >= down else ""

    k, why = tape.walk(began, ts + horizon_ns, is_end)
    if why == "hole" or not tape.is_price(k):
        return None
    out = tape.bid[k] if side > 0 else tape.ask[k]
    is_maker = why == "target" and costs.is_target_maker
    if is_maker:
        out = np.ceil(up) if side > 0 else np.floor(up)
    fees = costs.fee_bps(costs.is_entry_maker) + costs.fee_bps(is_maker)
    gross = 1e4 * side * (out - entry) / mid
    touched = {"target": 1, "stop": -1, "time": 0}[why]
    end = tape.ts[k] if touched else ts + horizon_ns
    return end, touched, True, gross, gross - fees


def compare(rows, quotes, side, profit, stop, horizon_s, costs):
    "Hold every field of every row against the reference; returns the outcomes"
    found = side_outcomes(rows, quotes, side, profit, stop, horizon_s, costs, HOLE_MS)
    tape, first = Tape(quotes), -1
    profit, stop = np.broadcast_to(profit, len(rows)), np.broadcast_to(stop, len(rows))
    side, ts = np.broadcast_to(side, len(rows)), quotes["ts_recv"].tolist()
    for i, now in enumerate(rows["ts"].tolist()):
        while first + 1 < len(ts) and ts[first + 1] <= now:
            first += 1
        is_asked = side[i] and first >= 0 and tape.is_price(first)
        is_asked = is_asked and rows["status"][i] in (BOOK_OK, BOOK_LOCKED)
        expected = None
        if is_asked and profit[i] > 0 and stop[i] > 0:
            given = int(side[i]), profit[i], stop[i], round(horizon_s * NS_PER_S), costs
            expected = one_outcome(tape, now, first, *given)
        got = found[i]
        assert got["ts_start"] == now and got["is_valid"] == (expected is not None), (i, got)
        if expected is None:
            assert np.isnan(got["net_bps"]) and not got["label"] and not got["is_filled"]
            continue
        values = tuple(got[name].item() for name in ("ts_end", "touched", "is_filled"))
        assert values == expected[:3], (i, got, expected)
        assert np.isclose(got["gross_bps"], expected[3], rtol=0, atol=1e-9)
        assert np.isclose(got["net_bps"], expected[4], rtol=0, atol=1e-9)
        assert got["label"] == (got["net_bps"] > 0)
    return found


HORIZON_S = st.sampled_from([0.1, 0.25, 1.0, 2.0, 5.0])


@settings(max_examples=300, deadline=None)
@given(short_market(), HORIZON_S, st.sampled_from(WAYS), st.sampled_from([0.1, 0.75, 3.0]))
def test_outcomes_equal_the_slow_reference(drawn, horizon_s, way, patience_s):
    quotes, rng = drawn
    rows = rows_on_grid(quotes, 250 * NS_PER_MS)
    costs = Costs(4.0, -0.5, 0.25, *way, patience_s)
    side = rng.integers(-1, 2, len(rows))
    # never a whole tick at this price, so that rounding cannot decide a touch
    profit = rng.choice([np.nan, 0.0, 0.7, 2.3, 5.1, np.inf], len(rows))
    stop = rng.choice([0.7, 2.3, 5.1, np.inf], len(rows))
    compare(rows, quotes, side, profit, stop, horizon_s, costs)


@settings(max_examples=100, deadline=None)
@given(short_market(), HORIZON_S, st.sampled_from(WAYS))
def test_no_outcome_depends_on_what_comes_after_its_end(drawn, horizon_s, way):
    quotes, rng = drawn
    rows = rows_on_grid(quotes, 250 * NS_PER_MS)
    side = rng.choice([-1, 1], len(rows))
    args = (2.3, 2.3, horizon_s, Costs(4.0, 1.0, 0.0, *way, 1.0), HOLE_MS)
    found = side_outcomes(rows, quotes, side, *args)
    for i in np.flatnonzero(found["is_valid"])[::5]:
        # one more quote, so that the window is known to be closed
        stop = np.searchsorted(quotes["ts_recv"], found["ts_end"][i], side="right") + 1
        again = side_outcomes(rows[: i + 1], quotes[:stop], side[: i + 1], *args)[i]
        for name in ("ts_end", "touched", "is_valid", "is_filled", "gross_bps", "net_bps"):
            assert again[name] == found[i][name], name


@settings(max_examples=100, deadline=None)
@given(short_market(), HORIZON_S)
def test_without_barriers_a_taker_gets_the_horizon_labels(drawn, horizon_s):
    quotes, _ = drawn
    rows = rows_on_grid(quotes, 250 * NS_PER_MS)
    fixed = horizon_labels(rows, quotes, horizon_s, 0.0, 8.0, HOLE_MS)
    args = (np.inf, np.inf, horizon_s, Costs(4.0), HOLE_MS)
    for side, name in ((1, "long_net_bps"), (-1, "short_net_bps")):
        found = side_outcomes(rows, quotes, side, *args)
        np.testing.assert_array_equal(found["is_valid"], fixed["is_valid"])
        np.testing.assert_allclose(found["net_bps"], fixed[name], atol=1e-9)
        np.testing.assert_array_equal(found["is_valid"], found["is_whole"] & found["is_valid"])


@settings(max_examples=100, deadline=None)
@given(short_market(), HORIZON_S, st.sampled_from(WAYS))
def test_the_better_side_knows_only_what_both_sides_know(drawn, horizon_s, way):
    quotes, _ = drawn
    rows = rows_on_grid(quotes, 250 * NS_PER_MS)
    args = (2.3, 5.1, horizon_s, Costs(0.1, 0.0, 0.0, *way, 1.0), HOLE_MS)
    long, short = (side_outcomes(rows, quotes, side, *args) for side in (1, -1))
    chosen = better_side(long, short)
    np.testing.assert_array_equal(chosen["is_valid"], long["is_valid"] & short["is_valid"])
    ok = chosen[chosen["is_valid"]]
    best = np.maximum(ok["long_net_bps"], ok["short_net_bps"])
    up, down = ok["label"] > 0, ok["label"] < 0
    assert (ok["long_net_bps"][up] == best[up]).all() and (best[up | down] > 0).all()
    assert (ok["short_net_bps"][down] == best[down]).all()
    assert (chosen["ts_end"] >= long["ts_end"]).all() and (
        chosen["ts_end"] >= short["ts_end"]
    ).all()


@pytest.fixture(scope="module")
def standx_day(recordings):
    "Best quotes of a whole recorded day and rows once a second"
    quotes = recorded_day(recordings)
    return rows_on_grid(quotes, NS_PER_S), quotes


@pytest.mark.recordings
@pytest.mark.parametrize("way", [WAYS[0], WAYS[3]])
def test_every_row_of_a_real_day_equals_the_reference(standx_day, way):
    rows, quotes = standx_day
    side = np.random.default_rng(1).choice([-1, 1], len(rows))
    volatility = 0.5 + np.abs(np.sin(np.arange(len(rows)) / 777))
    costs = Costs(4.0, 1.0, 0.0, *way, 5.0)
    found = compare(rows, quotes, side, 1.01 * volatility, 2.03 * volatility, 10.0, costs)
    ok = found[found["is_valid"]]
    assert len(rows) > 86_000 and len(ok) > 25_000
    assert min((ok["touched"] == t).sum() for t in (-1, 0, 1)) > 400
    assert ok["is_filled"].all() != way[0]
