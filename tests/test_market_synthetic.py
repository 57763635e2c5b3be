"""The made market: well formed, repeatable, and predictable exactly where and as much as it was planted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradebook.base.clock import NS_PER_S
from tradebook.market.book import BOOK_OK, apply_event, level_count, new_book
from tradebook.market.events import (
    FLAG_LAST,
    FLAG_SNAPSHOT,
    KIND_CLEAR,
    KIND_LEVEL,
    KIND_TRADE,
    check_events,
)
from tradebook.market.quotes import quality, quotes
from tradebook.market.synthetic import MIN_LEVELS, TRUTH, expected_move_bps, synthetic_market

HALF_DAY_S = 43_200


@pytest.fixture(scope="module")
def markets():
    "Half a day of both: the null market and the one that can be predicted"
    return {s: synthetic_market(seed=11, duration_s=HALF_DAY_S, strength=s) for s in (0.0, 1.0)}


@pytest.fixture(scope="module")
def touches(markets):
    "Best quotes of both"
    return {s: quotes(market.events) for s, market in markets.items()}


def mid_bps(touch, ts):
    "Log mid in bps, as known at some times"
    last = np.searchsorted(touch["ts_recv"], ts, side="right") - 1
    return 1e4 * np.log((touch["bid_ticks"][last] + touch["ask_ticks"][last]) / 2.0)


def moves(market, touch, horizon_s):
    "Pressure, planted and realised move of the mid, each second"
    ts = market.truth["ts"][1:-horizon_s]
    found = mid_bps(touch, ts + horizon_s * NS_PER_S) - mid_bps(touch, ts)
    planted = expected_move_bps(market.truth, ts, horizon_s)
    return market.truth["pressure"][1:-horizon_s], planted, found


def block_error(x, y, seconds=300):
    "Standard error of mean(x * y), by blocks of time, because windows overlap"
    n = len(x) // seconds
    blocks = (x * y)[: n * seconds].reshape(n, seconds).mean(axis=1)
    return blocks.std(ddof=1) / np.sqrt(n)


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_messages_are_well_formed(markets, strength):
    events = markets[strength].events
    check_events(events)
    ends = events["ts_recv"][(events["flags"] & FLAG_LAST) > 0]
    assert (np.diff(ends) > 0).all()  # no two messages share a receive time
    assert (events["ts_recv"] > events["ts_event"]).all()
    assert set(np.unique(events["kind"])) == {KIND_CLEAR, KIND_LEVEL, KIND_TRADE}
    assert events["kind"][0] == KIND_CLEAR and (events["kind"] == KIND_CLEAR).sum() == 1
    assert events["flags"][0] & FLAG_SNAPSHOT
    trades = events[events["kind"] == KIND_TRADE]
    assert (np.abs(trades["side"]) == 1).all() and (trades["size_lots"] > 0).all()
    book_ids = events["sequence"][
        (events["kind"] == KIND_LEVEL) & (events["flags"] & FLAG_LAST > 0)
    ]
    assert (np.diff(book_ids) == 1).all()


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_the_book_is_never_crossed_and_the_spread_is_tight(markets, touches, strength):
    touch = touches[strength]
    assert set(np.unique(touch["status"])) == {BOOK_OK}
    spread = touch["ask_ticks"] - touch["bid_ticks"]
    assert ((spread == 1) | (spread == 2)).mean() > 0.9
    found = quality(markets[strength].events, markets[strength].instrument)
    assert (found["n_gaps"], found["n_unsigned_trades"], found["n_negative_latency"]) == (0, 0, 0)
    assert 8 < len(touch) / HALF_DAY_S < 10.5


def test_there_are_always_thirty_levels_a_side():
    market = synthetic_market(seed=3, duration_s=300)
    book, fewest = new_book(), 10**9
    for e in market.events:
        apply_event(
            book, int(e["kind"]), int(e["side"]), int(e["price_ticks"]), int(e["size_lots"])
        )
        if e["flags"] & FLAG_LAST and e["kind"] == KIND_LEVEL:
            fewest = min(fewest, level_count(book, 0), level_count(book, 1))
    assert fewest >= MIN_LEVELS >= 30


def test_levels_are_told_only_when_they_change():
    events = synthetic_market(seed=5, duration_s=60).events
    sizes = {}
    for e in events[events["kind"] == KIND_LEVEL]:
        key = (int(e["side"]), int(e["price_ticks"]))
        assert sizes.get(key, 0) != e["size_lots"]
        sizes[key] = int(e["size_lots"])


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    seconds=st.integers(1, 20),
    strength=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_a_seed_is_a_market(seed, seconds, strength):
    once = synthetic_market(seed, seconds, strength)
    again = synthetic_market(seed, seconds, strength)
    assert (once.events == again.events).all() and (once.truth == again.truth).all()
    longer = synthetic_market(seed, seconds + 5, strength)
    assert (longer.events[: len(once.events)] == once.events).all()  # the future changes no past
    other = synthetic_market(seed + 1, seconds, strength)
    assert len(other.events) != len(once.events) or (other.events != once.events).any()


def test_the_start_only_moves_the_times():
    here, there = (synthetic_market(1, 5, start_ns=t * NS_PER_S) for t in (1_000, 2_000))
    assert (there.events["ts_recv"] - here.events["ts_recv"] == 1_000 * NS_PER_S).all()
    assert (there.events["price_ticks"] == here.events["price_ticks"]).all()


def test_the_null_market_promises_nothing_and_keeps_it(markets, touches):
    for horizon_s in (5, 30, 120):
        pressure, planted, found = moves(markets[0.0], touches[0.0], horizon_s)
        assert (planted == 0).all()
        tilt = (pressure * found).mean()
        assert abs(tilt) < 3 * block_error(pressure, found), (horizon_s, tilt)


def test_the_null_market_leans_all_the_same(markets, touches):
    "The control is honest only if its book leans as much as the other's"
    touch, truth = touches[0.0], markets[0.0].truth
    lean = (touch["bid_lots"] - touch["ask_lots"]) / (touch["bid_lots"] + touch["ask_lots"])
    last = np.searchsorted(touch["ts_recv"], truth["ts"][1:], side="right") - 1
    assert np.corrcoef(lean[last], truth["pressure"][1:])[0, 1] > 0.2
    trades = markets[0.0].events[markets[0.0].events["kind"] == KIND_TRADE]
    second = np.clip((trades["ts_event"] - truth["ts"][0]) // NS_PER_S, 0, len(truth) - 1)
    assert np.corrcoef(trades["side"], truth["pressure"][second])[0, 1] > 0.1


def test_the_planted_move_is_found(markets, touches):
    _, planted, found = moves(markets[1.0], touches[1.0], 30)
    assert 6 < planted.std() < 8
    assert 0.8 < np.polyfit(planted, found, 1)[0] < 1.2
    assert np.corrcoef(planted, found)[0, 1] > 0.5


def test_half_the_strength_is_half_the_move():
    market = synthetic_market(seed=2, duration_s=600, strength=0.5)
    full = market.truth.copy()
    full["strength"] = 1.0
    ts = market.truth["ts"]
    half = expected_move_bps(market.truth, ts, 30.0)
    np.testing.assert_allclose(2 * half, expected_move_bps(full, ts, 30.0))


@given(st.floats(-3, 3), st.floats(0, 100), st.floats(0.1, 100), st.floats(0.1, 100))
def test_two_windows_make_one(pressure, age_s, first_s, second_s):
    "E over [t, a + b] is E over [t, a] and, from there, over [a, b]"
    truth = np.array([(0, 6e4, pressure, 1.0)], TRUTH)
    start = int(age_s * NS_PER_S)
    later = start + int(first_s * NS_PER_S)
    whole = expected_move_bps(truth, start, (later - start) / NS_PER_S + second_s)
    parts = expected_move_bps(truth, start, (later - start) / NS_PER_S)
    parts += expected_move_bps(truth, later, second_s)
    np.testing.assert_allclose(whole, parts, rtol=1e-9, atol=1e-9)


def test_trades_stand_where_the_book_stood():
    "Buyers pay an ask: every trade is at or beyond the touch that was published before it"
    market = synthetic_market(seed=9, duration_s=600)
    touch, trades = quotes(market.events), market.events[market.events["kind"] == KIND_TRADE]
    last = np.searchsorted(touch["ts_recv"], trades["ts_recv"]) - 1
    mid = (touch["bid_ticks"][last] + touch["ask_ticks"][last]) / 2
    towards = trades["side"] * (trades["price_ticks"] - mid)
    assert (towards > 0).mean() > 0.9  # the rest: the price moved within the same 100 ms


def test_half_a_day_has_millions_of_events():
    market = synthetic_market(duration_s=HALF_DAY_S)
    assert 2e6 < len(market.events) < 4e6
