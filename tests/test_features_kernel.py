"""The kernel against a slow reference, and the properties that must hold for any events."""

import io
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradebook.features.checks import check_mirror, check_stream, check_truncation, compare_rows
from tradebook.features.rows import FeatureStream, build_features, join_rows
from tradebook.features.schema import feature_set
from tradebook.market.events import (
    FLAG_LAST,
    KIND_CLEAR,
    KIND_GAP,
    KIND_LEVEL,
    KIND_TRADE,
    empty_events,
    message_starts,
)
from tradebook.market.instruments import instrument
from tradebook.market.quotes import quotes
from tradebook.market.synthetic import synthetic_market

SYN = instrument("synthetic", "SYN/USDT:USDT")
BEAT = 100_000_000


@pytest.fixture(scope="module")
def market():
    "Six minutes of the synthetic market"
    return synthetic_market(seed=5, duration_s=360).events


def with_hole(events, at_s=200, hole_s=7):
    "Cut a hole and put a gap and the snapshot of the book after it"
    start = int(events["ts_recv"][0]) + at_s * 10**9
    stop = start + hole_s * 10**9
    a = message_starts(events)
    a = int(a[np.searchsorted(events["ts_recv"][a], start)])
    b = message_starts(events)
    b = int(b[np.searchsorted(events["ts_recv"][b], stop)])
    book = slow_book(events[:b])
    levels = [(side, p, q) for side in (1, -1) for p, q in book[side].items()]
    fresh = empty_events(len(levels) + 2)
    fresh["ts_recv"] = events["ts_recv"][b] - 1_000
    fresh["kind"] = [KIND_GAP, KIND_CLEAR, *[KIND_LEVEL] * len(levels)]
    fresh["size_lots"][0] = fresh["ts_recv"][0] - events["ts_recv"][a - 1]
    fresh["flags"][[0, -1]] = FLAG_LAST
    for i, (side, price, lots) in enumerate(levels):
        row = fresh[i + 2]
        row["side"], row["price_ticks"], row["size_lots"] = side, price, lots
    return np.concatenate([events[:a], fresh, events[b:]]), a


def slow_book(events, book=None):
    "Apply events to two dictionaries"
    book = book or {1: {}, -1: {}}
    for e in events:
        if e["kind"] == KIND_CLEAR:
            book[1].clear(), book[-1].clear()
        elif e["kind"] == KIND_LEVEL:
            side = book[int(e["side"])]
            side.pop(int(e["price_ticks"]), None)
            if e["size_lots"]:
                side[int(e["price_ticks"])] = int(e["size_lots"])
    return book


def ladder(book, side, n):
    "The best n levels of a side, padded with what can be compared"
    best = sorted(book[side].items(), reverse=side > 0)[:n]
    return best + [(-1 if side > 0 else 10**12, 0)] * (n - len(best))


def pressure(was, now, side):
    "One level's push, written the way the paper writes it"
    (p0, q0), (p1, q1) = was, now
    up = (p1 >= p0) * q1 - (p1 <= p0) * q0 if side > 0 else (p1 >= p0) * q0 - (p1 <= p0) * q1
    return up


def slow_features(events):
    "All columns the slow way: dictionaries, lists, no state but the whole past; rows once a second"
    first, last = int(events["ts_recv"][0]), int(events["ts_recv"][-1])
    book, ladders, trades, messages, changes = {1: {}, -1: {}}, None, [], [], []
    pushes, mids, sizes, i, out = [], [], [], 0, []
    last_price, last_sign, start = None, 0, -(-first // BEAT) * BEAT
    for n, t in enumerate(range(start, last + 1, BEAT)):
        push = np.zeros(3)
        while i < len(events) and events["ts_recv"][i] <= t:
            e = events[i]
            if e["kind"] == KIND_TRADE:
                price, mid_2 = int(e["price_ticks"]), ladders[0][0][0] + ladders[1][0][0]
                by_quote = int(np.sign(2 * price - mid_2))
                if last_price is not None and price != last_price:
                    last_sign = int(np.sign(price - last_price))
                last_price = price
                sign = int(e["side"]) or by_quote or last_sign
                trades.append((int(e["ts_recv"]), sign * int(e["size_lots"])))
            slow_book(events[i : i + 1], book)
            if e["flags"] & FLAG_LAST and e["kind"] != KIND_TRADE:
                now = ladder(book, 1, 10), ladder(book, -1, 10)
                if ladders:
                    each = [
                        pressure(ladders[0][k], now[0][k], 1)
                        + pressure(ladders[1][k], now[1][k], -1)
                        for k in range(10)
                    ]
                    push += [sum(each[:1]), sum(each[:5]), sum(each)]
                    if any(now[s][0][0] != ladders[s][0][0] for s in (0, 1)):
                        changes.append(int(e["ts_recv"]))
                messages.append(int(e["ts_recv"]))
                ladders = now
            i += 1
        pushes.append(push)
        mids.append(ladders[0][0][0] + ladders[1][0][0])
        level = [q for side in ladders for _, q in side[:5] if q]
        sizes.append(np.mean(level))
        if t % 10**9 == 0:
            out.append(slow_row(t, n, book, trades, messages, changes, pushes, mids, sizes, first))
    return np.array(out)


def slow_row(t, n, book, trades, messages, changes, pushes, mids, sizes, first):
    "One row from the whole past"
    x, mid = {}, mids[-1] / 2
    bids, asks = [v for v in ladder(book, 1, 20) if v[1]], [v for v in ladder(book, -1, 20) if v[1]]
    weights = 0.5 ** (np.arange(n + 1)[::-1] / 600)
    typical = np.dot(weights, sizes) / weights.sum()
    (bid, bid_lots), (ask, ask_lots) = bids[0], asks[0]
    micro = (bid * ask_lots + ask * bid_lots) / (bid_lots + ask_lots)
    x["spread_bps"], x["microprice_offset_bps"] = (ask - bid) / mid * 1e4, (micro / mid - 1) * 1e4

    def lag(window_s):
        return min(n, window_s * 10) if n >= min(window_s, 5) * 10 else None

    def since(stamps, window_s):
        k = lag(window_s)
        if k is None:
            return None, None
        back = t - k * BEAT
        return [v for v in stamps if (v if isinstance(v, int) else v[0]) > back], k / 10

    for w in (1, 5, 20, 60):
        k = lag(w)
        x[f"return_{w}s_bps"] = np.nan if k is None else (mids[-1] - mids[-1 - k]) / mids[-1] * 1e4
        seen, _ = since(trades, w)
        x[f"trade_flow_{w}s"] = np.nan if seen is None else sum(v for _, v in seen) / typical
    for w in (20, 60):
        seen, _ = since(trades, w)
        total = sum(abs(v) for _, v in seen) if seen else 0
        share = sum(v for _, v in seen) / total if total else 0.0
        x[f"trade_imbalance_{w}s"] = np.nan if seen is None else share
    for w in (5, 60):
        seen, s = since(trades, w)
        known = seen is not None
        x[f"trade_volume_{w}s"] = sum(abs(v) for _, v in seen) / s / typical if known else np.nan
        x[f"trade_rate_{w}s"] = len(seen) / s if known else np.nan
    for levels in (1, 5, 20):
        b, a = [q for _, q in bids[:levels]], [q for _, q in asks[:levels]]
        x[f"imbalance_{levels}"] = (sum(b) - sum(a)) / (sum(b) + sum(a))
        name = {1: "touch_depth", 5: "depth_5", 20: "depth_20"}[levels]
        x[name] = np.mean(b + a) / typical
    away = [
        np.average([abs(p - mid) for p, _ in s], weights=[q for _, q in s]) for s in (bids, asks)
    ]
    x["depth_distance_bps"] = sum(away) / 2 / mid * 1e4
    x["distance_skew"] = (away[1] - away[0]) / sum(away)
    for k, levels in enumerate((1, 5, 10)):
        for life in (1, 5, 20):
            weights = 0.5 ** (np.arange(n + 1)[::-1] / (10 * life))
            value = np.dot(weights, np.array(pushes)[:, k]) / (levels * typical)
            x[f"ofi_{levels}_{life}s"] = value if lag(life) is not None else np.nan
    m = np.array(mids)
    moves = (m[10:] - m[:-10]) / 2
    for w in (10, 60, 300):
        used = moves[-min(w * 10, n) :] if n else moves[:0]
        value = 1e4 * math.sqrt(w * np.mean(used**2)) / mid if len(used) >= 40 else np.nan
        x[f"volatility_{w}s_bps"] = value
    long, middle = x["volatility_300s_bps"], x["volatility_60s_bps"]
    x["volatility_ratio"] = x["volatility_10s_bps"] / (long / math.sqrt(30)) if long else 1.0
    x["trend_20s"] = x["return_20s_bps"] / (middle / math.sqrt(3)) if middle else 0.0
    x["since_book_s"] = (t - messages[-1]) / 1e9
    x["since_trade_s"] = min(60.0, (t - max([first, *(v for v, _ in trades[-1:])])) / 1e9)
    x["since_quote_change_s"] = min(60.0, (t - max([first, *changes[-1:]])) / 1e9)
    x["since_gap_s"] = min(300.0, (t - first) / 1e9)
    for name, stamps in (("quote_rate_5s", changes), ("message_rate_5s", messages)):
        seen, s = since(stamps, 5)
        x[name] = np.nan if seen is None else len(seen) / s
    return [x[name] for name in feature_set().names]


def test_every_column_equals_a_slow_reference(market):
    stop = np.searchsorted(market["ts_recv"], market["ts_recv"][0] + 90 * 10**9)
    events = market[:stop].copy()
    events["side"][(events["kind"] == KIND_TRADE) & (np.arange(stop) % 3 == 0)] = (
        0  # let it sign some
    )
    made, slow = build_features(events, SYN), slow_features(events)
    names = feature_set().names
    assert len(slow) == len(made) >= 85
    for k, name in enumerate(names):
        np.testing.assert_array_equal(np.isnan(made.x[:, k]), np.isnan(slow[:, k]), err_msg=name)
        np.testing.assert_allclose(made.x[:, k], slow[:, k], rtol=1e-9, atol=1e-9, err_msg=name)


def test_rows_carry_the_quotes_received_by_then(market):
    made, q = build_features(market, SYN), quotes(market)
    at = np.searchsorted(q["ts_recv"], made.rows["ts"], side="right") - 1
    for name in ("bid_ticks", "ask_ticks", "bid_lots", "ask_lots", "segment", "status"):
        np.testing.assert_array_equal(made.rows[name], q[name][at])
    np.testing.assert_array_equal(made.rows["ts_book"], q["ts_recv"][at])


def test_checks_hold_across_a_hole(market):
    events, _ = with_hole(market)
    assert check_truncation(events, SYN)["n_rows"] > 1_000
    assert check_stream(events, SYN, n_pieces=3_000)["n_rows"] >= 359
    assert check_mirror(events, SYN)["n_values"] > 10_000


@pytest.mark.parametrize("interval_ms", [10, 250, 1000, 3000])
def test_any_interval_gives_the_same_numbers_at_the_same_time(market, interval_ms):
    events = market[: np.searchsorted(market["ts_recv"], market["ts_recv"][0] + 30 * 10**9)]
    features = feature_set(interval_ms=interval_ms)
    made = build_features(events, SYN, features)
    assert (np.diff(made.rows["ts"]) == interval_ms * 1_000_000).all()
    check_stream(events, SYN, features)
    if 100 % features.beat_ms == 0 and features.beat_ms == 100:
        seconds = build_features(events, SYN)
        shared, a, b = np.intersect1d(made.rows["ts"], seconds.rows["ts"], return_indices=True)
        assert len(shared) >= 9
        assert made.x[a].tobytes() == seconds.x[b].tobytes()


def test_after_a_hole_only_volatility_remembers(market):
    events, at = with_hole(market)
    full, fresh = build_features(events, SYN), build_features(events[at:], SYN)
    after = full[len(full) - len(fresh) :]
    for k, f in enumerate(full.feature_set.features):
        if f.name.startswith("volatility") or f.name == "trend_20s":
            continue
        assert after.x[:, k].tobytes() == fresh.x[:, k].tobytes(), f.name
    known = full.column("volatility_300s_bps")[len(full) - len(fresh) :]
    assert not np.isnan(known).any()
    assert np.isnan(fresh.column("volatility_300s_bps")[:4]).all()
    assert set(after.rows["segment"]) == {1} and set(fresh.rows["segment"]) == {1}


def test_a_hole_does_not_count_as_calm(market):
    events, _ = with_hole(market, at_s=100, hole_s=40)
    whole, holed = build_features(market, SYN), build_features(events, SYN)
    row = 145  # five seconds after the hole: 40 of the last 60 seconds were never seen
    ratio = holed.column("volatility_60s_bps")[row] / whole.column("volatility_60s_bps")[row]
    assert 0.6 < ratio < 1.6  # counted as calm it would be sqrt(20 / 60) of it


def test_an_old_process_equals_a_young_one(market):
    "Totals of years change nothing: windows are differences of integers"
    young, old = FeatureStream(SYN), FeatureStream(SYN)
    old.state.totals[1:] = old.state.ring[:, 1:] = 2**62 + 1
    assert compare_rows(old.push(market), young.push(market), "age") > 300


def plain_arrays(state):
    "All arrays of a state, those of what it holds too; a plain number in it never changes"
    parts = [plain_arrays(one) if isinstance(one, tuple) else [one] for one in state]
    return [array for part in parts for array in part if isinstance(array, np.ndarray)]


def test_a_stream_continues_from_a_snapshot_of_plain_arrays(market):
    half = int(message_starts(market)[len(message_starts(market)) // 2])
    whole = FeatureStream(SYN)
    parts = [whole.push(market, 0, half)]
    file = io.BytesIO()
    np.savez(
        file, **{f"{i}": v for i, v in enumerate((*plain_arrays(whole.state), whole.book.head))}
    )
    parts.append(whole.push(market, half))
    file.seek(0)
    saved = np.load(file, allow_pickle=False)
    other = FeatureStream(SYN)
    other.push(market, 0, half)  # for the pages of the book
    for i, array in enumerate((*plain_arrays(other.state), other.book.head)):
        array[...] = saved[str(i)]
    compare_rows(other.push(market, half), parts[1], "snapshot")


def random_events(draw):
    "Messages of any kind at any time, sensible or not"
    n = draw(st.integers(1, 60))
    seed = draw(st.integers(0, 2**32 - 1))
    rng, parts, ts = np.random.default_rng(seed), [], 10**15
    for _ in range(n):
        ts += int(rng.choice([0, 1, 50_000_000, 100_000_000, 999_999_999, 7_000_000_000]))
        kind = rng.choice(["gap", "snapshot", "levels", "trade"], p=[0.05, 0.15, 0.6, 0.2])
        if kind in ("gap", "trade"):
            e = empty_events(1)
            e["kind"] = KIND_GAP if kind == "gap" else KIND_TRADE
            e["size_lots"] = rng.integers(1, 10**10 if kind == "gap" else 50)
            e["side"] = 0 if kind == "gap" else rng.integers(-1, 2)
            e["price_ticks"] = 0 if kind == "gap" else rng.integers(990, 1011)
        else:
            e = empty_events(int(rng.integers(1, 30)))
            e["kind"] = KIND_LEVEL
            e["side"] = rng.choice([-1, 1], len(e))
            away = rng.integers(-1, 40, len(e))  # now and then locked or crossed
            e["price_ticks"] = 1000 - e["side"] * away
            e["size_lots"] = rng.integers(0, 30, len(e))
            if kind == "snapshot":
                e["kind"][0], e["size_lots"][0], e["side"][0], e["price_ticks"][0] = (
                    KIND_CLEAR,
                    0,
                    0,
                    0,
                )
        e["ts_recv"], e["flags"][-1] = ts, FLAG_LAST
        parts.append(e)
    return np.concatenate(parts)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_events_in_any_pieces_give_the_same_bits(data):
    events = random_events(data.draw)
    features = feature_set(interval_ms=data.draw(st.sampled_from([50, 200, 1000])))
    made = build_features(events, SYN, features)
    assert np.isnan(made.x[made.rows["status"] > 1]).all()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(events)), max_size=12)))
    stream = FeatureStream(SYN, features, room=data.draw(st.integers(1, 5)))
    edges = [0, *cuts, len(events)]
    parts = [stream.push(events, a, b) for a, b in pairwise(edges)]
    parts.append(stream.advance_to(int(events["ts_recv"][-1])))
    compare_rows(join_rows(*parts), made, "pieces")
    assert np.isfinite(made.x[made.n_nan == 0]).all()


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_events_in_the_mirror(data):
    check_mirror(random_events(data.draw), SYN, feature_set(interval_ms=500))
