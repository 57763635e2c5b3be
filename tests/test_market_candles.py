"""Candles: folded like a slow reference does it, equal to what venues say, stored once whatever happens."""

import threading
from itertools import pairwise

import numpy as np
import orjson
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradebook.base.clock import NS_PER_S
from tradebook.base.errors import DataError
from tradebook.market import stored_candles
from tradebook.market.candles import (
    CANDLE,
    CANDLE_EMPTY,
    CANDLE_INCOMPLETE,
    known_at,
    longer_candles,
    missing_spans,
    parse_interval,
    trade_candles,
    venue_candles,
)
from tradebook.market.events import FLAG_LAST, KIND_GAP, KIND_TRADE, make_events, merge_events
from tradebook.market.freqtrade import judge_rows, read_candles
from tradebook.market.funding import (
    FundingMissingError,
    funding_between,
    missing_payments,
    read_funding,
)
from tradebook.market.instruments import Instrument, instrument
from tradebook.market.snapshots import read_snapshots
from tradebook.market.stored_candles import CandleStore, merge_candles, same_candles

SYN = instrument("synthetic", "SYN/USDT:USDT")
START = 1_736_121_600 * NS_PER_S
VALUES = ("open", "high", "low", "close", "volume", "turnover", "n_trades")


@st.composite
def streams(draw, most=60):
    "Trades that come late and out of order, and holes, in order of receipt"
    n = draw(st.integers(1, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ts_event = START + rng.integers(0, 900, n) * NS_PER_S
    ts_recv = ts_event + rng.integers(0, 90, n) * NS_PER_S
    order = np.argsort(ts_recv, kind="stable")
    trades = make_events(
        ts_event=ts_event[order],
        ts_recv=ts_recv[order],
        kind=KIND_TRADE,
        price_ticks=rng.integers(1, 50, n),
        size_lots=rng.integers(1, 1000, n),
        flags=FLAG_LAST,
    )
    m = draw(st.integers(0, 3))
    if not m:
        return trades
    ends = np.sort(START + rng.integers(100, 900, m) * NS_PER_S)
    lengths = rng.integers(1, 100, m) * NS_PER_S
    holes = make_events(ts_recv=ends, kind=KIND_GAP, size_lots=lengths, flags=FLAG_LAST)
    return merge_events(trades, holes)


def equal(one, other, names=VALUES):
    "The same values; NaN equals NaN, sums of floats to twelve digits"
    for name in names:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-12, err_msg=name)


@settings(max_examples=60, deadline=None)
@given(streams())
def test_a_slow_reference_folds_the_same(events):
    candles = trade_candles(events, SYN, "1m")
    trades = events[events["kind"] == KIND_TRADE]
    for row in candles:
        own = trades[
            (trades["ts_event"] >= row["ts_open"]) & (trades["ts_event"] < row["ts_close"])
        ]
        assert row["n_trades"] == len(own)
        assert bool(row["flags"] & CANDLE_EMPTY) == (len(own) == 0)
        if not len(own):
            assert np.isnan(row["close"]) and row["volume"] == 0
            continue
        own = own[np.argsort(own["ts_event"], kind="stable")]
        price = SYN.price(own["price_ticks"])
        first = price[own["ts_event"] == own["ts_event"][0]][0]
        last = price[own["ts_event"] == own["ts_event"][-1]][-1]
        assert (row["open"], row["close"]) == (first, last)
        assert (row["high"], row["low"]) == (price.max(), price.min())
        assert row["volume"] == pytest.approx(SYN.size(own["size_lots"].sum()))
        assert row["turnover"] == pytest.approx((price * SYN.size(own["size_lots"])).sum())
    assert candles["n_trades"].sum() == len(trades)
    assert not missing_spans(candles)


@settings(max_examples=60, deadline=None)
@given(streams(), st.sampled_from(["event", "recv"]))
def test_long_candles_are_the_same_from_short_ones(events, clock):
    direct = trade_candles(events, SYN, "5m", clock)
    folded = longer_candles(trade_candles(events, SYN, "1m", clock), "5m")
    assert direct["ts_open"].tolist() == folded["ts_open"].tolist()
    equal(direct, folded)
    assert direct["flags"].tolist() == folded["flags"].tolist()


@settings(max_examples=60, deadline=None)
@given(streams())
def test_a_hole_marks_every_candle_that_it_touches_and_a_whole_one_is_never_marked(events):
    candles = trade_candles(events, SYN, "1m", clock="recv")
    gaps = events[events["kind"] == KIND_GAP]
    touched = np.zeros(len(candles), bool)
    for ts, length in zip(gaps["ts_recv"], gaps["size_lots"], strict=True):
        touched |= (candles["ts_open"] <= ts) & (candles["ts_close"] > ts - length)
    touched[0] |= events["ts_recv"][0] > candles["ts_open"][0]
    touched[-1] |= events["ts_recv"][-1] < candles["ts_close"][-1] - 1
    assert ((candles["flags"] & CANDLE_INCOMPLETE) > 0).tolist() == touched.tolist()


@settings(max_examples=40, deadline=None)
@given(streams(), st.floats(0, 1))
def test_what_is_known_of_a_candle_never_changes_later(events, share):
    now = int(events["ts_recv"][int(share * (len(events) - 1))])
    whole = trade_candles(events, SYN, "1m")
    then = trade_candles(events[events["ts_recv"] <= now], SYN, "1m")
    settled = whole[known_at(whole) <= now]
    settled = settled[settled["n_trades"] > 0]
    at = np.searchsorted(then["ts_open"], settled["ts_open"])
    equal(then[at], settled)


def test_pandas_folds_ordered_trades_the_same():
    rng = np.random.default_rng(2)
    n = 20_000
    ts = START + np.sort(rng.integers(0, 7200 * 10**9, n))
    ticks, lots = rng.integers(900, 1100, n), rng.integers(1, 100, n)
    events = make_events(
        ts_event=ts, ts_recv=ts, kind=KIND_TRADE, price_ticks=ticks, size_lots=lots, flags=FLAG_LAST
    )
    ours = trade_candles(events, SYN, "1m")
    frame = pd.DataFrame({"price": SYN.price(ticks), "size": SYN.size(lots)}, pd.to_datetime(ts))
    theirs = frame["price"].resample("1min").ohlc()
    for name in ("open", "high", "low", "close"):
        assert ours[name].tolist() == theirs[name].tolist()
    assert ours["volume"] == pytest.approx(frame["size"].resample("1min").sum().to_numpy())


def test_binance_candles_grow_by_exactly_the_trades_between_them(recordings):
    from tradebook.venue.binance import BinanceDecoder
    from tradebook.venue.captures import read_capture

    of = Instrument("binance", "CTK/USDT:USDT", 0.001, 1.0, 2.0, 5.0)
    decoder = BinanceDecoder({"CTKUSDT": of})
    candles, trades = [], []
    for one in read_capture(recordings / "wire" / "BINANCE_FUTURES.ws.1.0"):
        if one.direction != "received" or b"ctkusdt@" not in one.frame:
            continue
        data = orjson.loads(one.frame)["data"]
        for told in decoder.decode(one.frame, one.ts_recv):
            if told.stream == "candle":
                candles.append((data["k"]["L"], venue_candles(told.candles, of, one.ts_recv)[0]))
            elif told.stream == "trade":
                trades.append((data["f"], data["l"], told.events))
    n_compared = 0
    for (low, before), (high, after) in pairwise(candles):
        between = [events for first, last, events in trades if low < first <= last <= high]
        n_told = sum(last - first + 1 for first, last, _ in trades if low < first <= last <= high)
        if n_told != high - low or before["ts_open"] != after["ts_open"] or not between:
            continue  # an aggregate reaches over the edge, or a new minute began
        ours = trade_candles(np.concatenate(between), of, "1m")
        assert len(ours) == 1 and ours["ts_open"][0] == after["ts_open"]
        assert ours["volume"][0] == pytest.approx(after["volume"] - before["volume"])
        assert ours["turnover"][0] == pytest.approx(after["turnover"] - before["turnover"])
        assert ours["close"][0] == after["close"]
        assert after["low"] <= ours["low"][0] <= ours["high"][0] <= after["high"]
        n_compared += 1
    assert n_compared > 5


@pytest.mark.parametrize("coin", ["BTC", "ETH"])
def test_four_hours_of_hourly_candles_are_the_venues_four_hours(recordings, coin):
    hours = read_candles(recordings / f"candles/binance_spot_1h/{coin}-USDT_1h.parquet").candles
    venue = read_candles(recordings / f"candles/binance_spot_4h/{coin}USDT_4h.csv").candles
    ours = longer_candles(hours, "4h")
    ours = ours[(ours["flags"] & CANDLE_INCOMPLETE) == 0]
    _, a, b = np.intersect1d(ours["ts_open"], venue["ts_open"], return_indices=True)
    assert len(a) == 5_993
    same = same_candles(ours[a], venue[b])
    if coin == "BTC":  # its file was downloaded seconds before its last hour was over
        assert not same[-1] and ours["close"][a[-1]] == 42_361.12 != venue["close"][b[-1]]
        same = same[:-1]
    assert same.all()


def test_holes_of_a_real_recording_are_marked(recordings):
    folder = recordings / "standx"
    day = read_snapshots(
        folder / "BTC-USD_book20_2026-01-06.parquet", folder / "BTC-USD_trades_2026-01-06.parquet"
    )
    seconds = trade_candles(day.events, day.instrument, "1s", clock="recv")
    is_marked = (seconds["flags"] & CANDLE_INCOMPLETE) > 0
    gaps = day.events[day.events["kind"] == KIND_GAP]
    assert 0.15 < is_marked.mean() < 0.35
    assert is_marked.sum() >= (gaps["size_lots"] // NS_PER_S).sum()
    assert seconds["n_trades"].sum() == (day.events["kind"] == KIND_TRADE).sum()


def test_every_real_candle_file_is_accounted_for(recordings):
    files = sorted((recordings / "candles").glob("*/*"))
    n_candles = n_funding = 0
    for path in files:
        read = read_funding if "funding_rate" in path.name else read_candles
        made = read(path, "binance")
        assert made.report.n_rows_read == made.report.n_events + made.report.n_refused
        assert made.report.n_refused == 0
        n_funding += read is read_funding
        n_candles += read is read_candles
    assert (n_candles, n_funding) == (33, 4)
    ftt = read_candles(recordings / "candles/binance_spot_1h/FTT-USDT_1h.parquet")
    assert ftt.report.notes["longest_hole_h"] > 24 * 300
    luna = read_candles(recordings / "candles/binance_spot_1h/LUNA-USDT_1h.parquet")
    assert len(luna.report.notes["price_breaks"]) == 1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 12),
            st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0, np.nan]), min_size=5, max_size=5),
        ),
        min_size=1,
        max_size=20,
    )
)
def test_no_row_of_a_bad_file_goes_missing(rows):
    half_hour = parse_interval("30m")
    table = pd.DataFrame(
        [(START + k * half_hour, *values) for k, values in rows],
        columns=["ts_open", "open", "high", "low", "close", "volume"],
    )
    good = table[judge_rows(table, parse_interval("1h")) == 0]
    assert good["ts_open"].is_unique
    assert (good[["open", "high", "low", "close"]] > 0).all().all() and (good["volume"] >= 0).all()
    assert (good["low"] <= good[["open", "close"]].min(axis=1)).all()
    assert (good["high"] >= good[["open", "close"]].max(axis=1)).all()
    wrong = table.drop(good.index)
    for (
        _,
        row,
    ) in wrong.iterrows():  # each refused row has a fault of its own, or a twin that stayed
        values = row[["open", "high", "low", "close"]].to_numpy()
        is_bad = not (values > 0).all() or values.max() > row["high"] or values.min() < row["low"]
        is_bad |= not row["volume"] >= 0 or row["ts_open"] % parse_interval("1h") != 0
        assert is_bad or row["ts_open"] in set(good["ts_open"])


def minutes(n=90):
    "Complete candles of a minute"
    rng = np.random.default_rng(n)
    out = np.zeros(n, CANDLE)
    out["ts_open"] = START + np.arange(n) * 60 * NS_PER_S
    out["ts_close"] = out["ts_open"] + 60 * NS_PER_S
    for name in ("open", "high", "low", "close", "volume", "turnover"):
        out[name] = rng.integers(1, 10**6, n) / 100
    return out


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 89), st.integers(0, 89)), max_size=12), st.integers(0, 2**31)
)
def test_pieces_in_any_order_any_number_of_times_give_the_same_candles(pieces, seed):
    whole = minutes()
    rows, n_new = whole[:0], 0
    for a, b in [*pieces, (0, 90), *pieces]:
        part = np.random.default_rng(seed).permutation(whole[min(a, b) : max(a, b)])
        rows, done = merge_candles(rows, part)
        assert done.n_new + done.n_same == len(part) and not done.n_refused + done.n_replaced
        n_new += done.n_new
    assert rows.tobytes() == whole.tobytes() and n_new == 90


def test_a_finished_candle_that_changes_is_refused_and_kept(tmp_path):
    store, whole = CandleStore(tmp_path), minutes()
    store.write(whole, "v", "A/B", "first")
    wrong = whole.copy()
    wrong["close"][7] += 1
    done = store.write(wrong, "v", "A/B", "second")
    assert (done.n_refused, done.n_same) == (1, 89)
    assert done.refused[0]["told"]["close"] == pytest.approx(done.refused[0]["stored"]["close"] + 1)
    assert store.read("v", "A/B", "1m").tobytes() == whole.tobytes()
    assert same_candles(whole, wrong).sum() == 89


def test_a_crash_between_file_and_manifest_loses_nothing_that_was_there(tmp_path, monkeypatch):
    store, whole = CandleStore(tmp_path), minutes()
    store.write(whole[:50], "v", "A/B", "first")
    real = stored_candles.write_durably

    def crash(path, write):
        if path.name == "manifest.json":
            raise OSError("the power went out")
        real(path, write)

    monkeypatch.setattr(stored_candles, "write_durably", crash)
    with pytest.raises(OSError, match="power"):
        store.write(whole, "v", "A/B", "second")
    monkeypatch.undo()
    assert store.read("v", "A/B", "1m").tobytes() == whole[:50].tobytes()
    assert store.write(whole, "v", "A/B", "second").n_new == 40
    assert store.read("v", "A/B", "1m").tobytes() == whole.tobytes()
    assert len(list(tmp_path.rglob("*.parquet"))) == 1


def test_a_damaged_file_is_never_read_nor_built_upon(tmp_path):
    store, whole = CandleStore(tmp_path), minutes()
    store.write(whole[:50], "v", "A/B", "first")
    (path,) = tmp_path.rglob("*.parquet")
    other = whole[:50].copy()
    other["close"] += 1
    stored_candles._write(other, path)
    with pytest.raises(DataError, match="rows differ from the manifest"):
        store.read("v", "A/B", "1m")
    with pytest.raises(DataError, match="rows differ from the manifest"):
        store.write(whole, "v", "A/B", "second")


def test_several_writers_lose_nothing(tmp_path):
    whole = minutes()

    def write(k):
        CandleStore(tmp_path).write(whole[k::4], "v", "A/B", f"writer {k}")

    threads = [threading.Thread(target=write, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert CandleStore(tmp_path).read("v", "A/B", "1m").tobytes() == whole.tobytes()


def test_a_dropped_payment_is_an_error_by_name(recordings):
    path = (
        recordings / "candles/binance_usdm/binance__futures__BTC_USDT_USDT-8h-funding_rate.feather"
    )
    made = read_funding(path)
    start, stop = int(made.funding["ts_payment"][0]) - 1, int(made.funding["ts_payment"][-1])
    assert len(funding_between(made.funding, start, stop)) == len(made.funding) == 266
    for gone in (0, 100, 265):
        short = np.delete(made.funding, gone)
        with pytest.raises(FundingMissingError, match="FUNDING_MISSING: 1 of 266"):
            funding_between(short, start, stop)
        inside = 0 < gone < 265
        assert len(missing_payments(short, parse_interval("8h"))) == int(inside)
