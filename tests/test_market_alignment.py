"""Nothing received later changes what stood before: joins, grids, prices and volatility, with another future."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradebook.base.clock import NS_PER_MS, NS_PER_S
from tradebook.market.alignment import ALIGN_REASONS, Stream, as_of, candle_stream, hole_ends
from tradebook.market.book_volatility import (
    compare_volatility,
    price_grid,
    volatility,
    volatility_windows,
)
from tradebook.market.candles import trade_candles
from tradebook.market.events import FLAG_LAST, KIND_GAP, KIND_LEVEL, make_events
from tradebook.market.prices import (
    PriceSeries,
    micro_prices,
    mid_prices,
    trade_prices,
    trades_through,
)
from tradebook.market.quotes import quotes
from tradebook.market.snapshots import read_snapshots
from tradebook.market.synthetic import synthetic_market

WORLD = synthetic_market(seed=21, duration_s=900, strength=0)


@st.composite
def joins(draw):
    "A stream with NaN and holes, and moments in any order, on few distinct times so that ties occur"
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, top = draw(st.integers(0, 40)), draw(st.sampled_from([10, 100, 1000]))
    value = np.where(rng.random(n) < 0.1, np.nan, rng.standard_normal(n))
    stream = Stream(
        np.sort(rng.integers(0, top, n)) * NS_PER_MS,
        value,
        float(draw(st.sampled_from([1, 5, 50, 10_000]))),
        np.sort(rng.integers(0, top, draw(st.integers(0, 4)))) * NS_PER_MS,
    )
    return stream, rng.integers(-2, top + 2, 30) * NS_PER_MS


@settings(max_examples=200, deadline=None)
@given(joins())
def test_a_slow_reference_looks_up_the_same(join):
    stream, times = join
    told = as_of(times, stream)
    for k, now in enumerate(times):
        reason, value = "none yet", np.nan
        for ts, v in zip(stream.ts_recv, stream.value, strict=True):
            if ts <= now:
                is_cut = any(ts < hole <= now for hole in stream.hole_ends)
                is_old = now - ts > stream.tolerance_ms * NS_PER_MS
                reason = (
                    "hole"
                    if is_cut
                    else "too old"
                    if is_old
                    else "unknown"
                    if np.isnan(v)
                    else "good"
                )
                value = v if reason == "good" else np.nan
        assert ALIGN_REASONS[told.reason[k]] == reason
        np.testing.assert_equal(told.value[k], value)


@settings(max_examples=200, deadline=None)
@given(joins(), st.integers(0, 2**32 - 1))
def test_no_future_changes_the_past(join, seed):
    stream, times = join
    before, rng = as_of(times, stream), np.random.default_rng(seed)
    now = int(times[0])
    past, n_new = stream.ts_recv <= now, int(rng.integers(0, 20))
    later = now + 1 + np.sort(rng.integers(0, 10**9, n_new))
    holes = stream.hole_ends[stream.hole_ends <= now]
    other = Stream(
        np.r_[stream.ts_recv[past], later],
        np.r_[stream.value[past], rng.standard_normal(n_new)],
        stream.tolerance_ms,
        np.r_[holes, now + 1 + np.sort(rng.integers(0, 10**9, 3))],
    )
    after = as_of(times, other)
    seen = times <= now
    np.testing.assert_equal(after.value[seen], before.value[seen])
    assert (after.reason[seen] == before.reason[seen]).all()
    assert (after.age_ns[seen] == before.age_ns[seen]).all()


@settings(max_examples=20, deadline=None)
@given(st.floats(0.1, 0.95))
def test_candles_join_the_table_only_when_they_are_known(share):
    events = WORLD.events
    now = int(events["ts_recv"][int(share * len(events))])
    whole = candle_stream(trade_candles(events, WORLD.instrument, "30s"), "close", 60_000, True)
    then = trade_candles(events[events["ts_recv"] <= now], WORLD.instrument, "30s")
    known = candle_stream(then, "close", 60_000, True)
    np.testing.assert_equal(
        as_of(np.array([now]), known).value, as_of(np.array([now]), whole).value
    )


@settings(max_examples=20, deadline=None)
@given(st.floats(0.05, 0.95))
def test_prices_of_a_part_are_the_part_of_the_prices(share):
    ends = np.flatnonzero(WORLD.events["flags"] & FLAG_LAST)
    stop = int(ends[int(share * len(ends))]) + 1
    part, whole = trades_through(WORLD.events[:stop]), trades_through(WORLD.events)
    assert part.tobytes() == whole[: len(part)].tobytes()
    cut, best_prices = quotes(WORLD.events[:stop]), quotes(WORLD.events)
    for prices in (mid_prices, micro_prices):
        one, other = prices(cut, WORLD.instrument), prices(best_prices, WORLD.instrument)
        np.testing.assert_equal(one.price, other.price[: len(one.price)])


@settings(max_examples=20, deadline=None)
@given(st.floats(0.2, 0.95))
def test_volatility_of_a_window_needs_nothing_behind_it(share):
    series = mid_prices(quotes(WORLD.events), WORLD.instrument)
    stop = int(share * len(series.ts_ns))
    cut = PriceSeries(*(column[:stop] for column in series))
    ends, bps = volatility_windows(cut, 60)
    all_ends, all_bps = volatility_windows(series, 60)
    assert (ends == all_ends[: len(ends)]).all()
    np.testing.assert_equal(bps, all_bps[: len(bps)])


def with_hole(events, at, seconds):
    "The same events without a stretch, and with the gap that tells of it"
    start, end = at, at + seconds * NS_PER_S
    starts = np.r_[True, (events["flags"][:-1] & FLAG_LAST) > 0]
    late = np.flatnonzero(starts & (events["ts_recv"] >= end))[0]
    gap = make_events(
        ts_recv=events["ts_recv"][late],
        kind=KIND_GAP,
        size_lots=seconds * NS_PER_S,
        flags=FLAG_LAST,
    )
    early = events[: np.flatnonzero(starts & (events["ts_recv"] >= start))[0]]
    return np.concatenate([early, gap, events[late:]])


def test_a_jump_over_a_hole_is_no_move():
    middle = int(WORLD.events["ts_recv"][len(WORLD.events) // 2])
    events = with_hole(WORLD.events, middle, 20)
    is_after = np.cumsum(events["kind"] == KIND_GAP) > 0
    prices = trade_prices(events, WORLD.instrument)
    usual = volatility(price_grid(prices))
    jumped = events.copy()
    jumped["price_ticks"][is_after & (jumped["kind"] >= KIND_LEVEL)] += 30_000  # 5 %, over the hole
    other = volatility(price_grid(trade_prices(jumped, WORLD.instrument)))
    assert other.bps == pytest.approx(usual.bps, rel=0.06)  # the level changed, the moves did not
    assert other.n_returns == usual.n_returns
    blind = PriceSeries(
        *trade_prices(jumped, WORLD.instrument)[:2], np.zeros(len(prices.ts_ns), int)
    )
    assert volatility(price_grid(blind)).bps > 5 * usual.bps
    grid = price_grid(prices)
    inside = (grid.ts_ns > middle + NS_PER_S) & (grid.ts_ns < middle + 19 * NS_PER_S)
    assert np.isnan(grid.log_price[inside]).all() and inside.sum() > 15
    assert len(hole_ends(events)) == 1


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.3, 3), st.floats(0, 3))
def test_two_scales_find_the_planted_volatility_under_any_noise(seed, sigma, noise):
    rng = np.random.default_rng(seed)
    n = 20_000
    value = np.cumsum(rng.standard_normal(n)) * sigma * 1e-4
    seen = np.exp(value + rng.standard_normal(n) * noise * 1e-4)
    ts = np.arange(n) * NS_PER_S
    told = volatility(price_grid(PriceSeries(ts, seen, np.zeros(n, int))))
    spread = 0.12 + 0.15 * (noise / sigma) ** 2 / 10
    assert told.bps == pytest.approx(sigma, rel=spread)


def test_the_book_of_a_real_day_tells_the_volatility_of_its_trades(recordings):
    folder = recordings / "standx"
    day = read_snapshots(
        folder / "BTC-USD_book20_2026-01-07.parquet", folder / "BTC-USD_trades_2026-01-07.parquet"
    )
    asked = {"window_s": 300, "min_share": 0.3}
    book = quotes(day.events)
    reference = volatility_windows(trade_prices(day.events, day.instrument), **asked)
    for prices in (mid_prices, micro_prices):
        facts = compare_volatility(
            volatility_windows(prices(book, day.instrument), **asked), reference
        )
        assert facts["n_windows"] > 150
        assert 0.93 < facts["ratio"] < 1.02 and facts["rank_correlation"] > 0.97
