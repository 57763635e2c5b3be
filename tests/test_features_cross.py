"""Columns of several markets: live equals history, blind to the future, a lead only where one was planted."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradebook.base.errors import DataError, SettingsError
from tradebook.collector.wire_files import read_frames
from tradebook.features.cross import (
    CrossStream,
    build_cross,
    funding_streams,
    mid_stream,
    roles_of,
)
from tradebook.features.schema import feature_set
from tradebook.features.trend import build_trend
from tradebook.market.alignment import Stream, as_of, candle_stream
from tradebook.market.candles import CANDLE, parse_interval
from tradebook.market.events import FUNDING_UNITS, KIND_FUNDING, make_events
from tradebook.market.freqtrade import read_candles
from tradebook.market.funding import FUNDING, funding_of_events, read_funding
from tradebook.market.worlds import make_world

BEGIN = 1_735_689_600 * 10**9  # 2025-01-01, midnight
SECOND = 10**9
SETS = ("lead_lag", "carry", "lead_lag_hourly")


def made_streams(
    features, seed=0, span_s=400.0, step_ns=10**6, n_holes=0, nan_share=0.0, n_values=4_000
):
    "Random feeds for the roles of a set, receipts on multiples of a step so that ties happen"
    rng, out = np.random.default_rng(seed), {}
    span_s = span_s * (3_600 if features.name == "lead_lag_hourly" else 1)
    for role in roles_of(features):
        n = n_values // 4 if role.startswith("funding") else n_values
        ts = BEGIN + np.sort(rng.integers(0, int(span_s * 1e9) // step_ns, n)) * step_ns
        value = 100 * np.exp(2e-4 * np.cumsum(rng.standard_normal(n)))
        if role.startswith("funding"):
            value = 1e-4 * rng.standard_normal(n)
        value[rng.random(n) < nan_share] = np.nan
        holes = BEGIN + np.sort(rng.integers(0, int(span_s * 1e9) // step_ns, n_holes)) * step_ns
        out[role] = Stream(ts, value, span_s / 20 * 1e3, holes)
    return out


def run_live(streams, features, until):
    "Push everything in the order of receipt; of a tie the holes come at random places"
    stream = CrossStream(features, {r: s.tolerance_ms / 1e3 for r, s in streams.items()})
    things = [
        (int(t), k, r, v)
        for r, s in streams.items()
        for k, (t, v) in enumerate(zip(s.ts_recv, s.value, strict=True))
    ]
    things += [(int(t), -1, r, None) for r, s in streams.items() for t in s.hole_ends]
    parts = []
    for t, _, role, v in sorted(things, key=lambda x: (x[0], x[1] % 3 if x[1] < 0 else x[1])):
        parts.append(stream.hole(role, t) if v is None else stream.push(role, t, float(v)))
    parts.append(stream.advance_to(until))
    return np.concatenate([p.ts for p in parts]), np.concatenate([p.x for p in parts])


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(SETS), st.integers(0, 999), st.sampled_from([1, 10**8, SECOND]),
    st.integers(0, 6), st.sampled_from([0.0, 0.02]), st.sampled_from(["float64", "float32"]),
)  # fmt: skip
def test_live_equals_history(name, seed, step_ns, n_holes, nan_share, dtype):
    features = feature_set(name, dtype=dtype)
    streams = made_streams(features, seed, 160.0, step_ns, n_holes, nan_share, 1_000)
    history = build_cross(streams, features)
    ts, x = run_live(streams, features, max(int(s.ts_recv[-1]) for s in streams.values()))
    assert ts.tolist() == history.ts.tolist()
    assert x.tobytes() == history.x.tobytes()
    assert x.dtype == dtype


def cut_stream(stream, t, spoil):
    "The stream without its future, or with another one"
    known = stream.ts_recv <= t
    holes = stream.hole_ends[stream.hole_ends <= t]
    if not spoil:
        return replace(
            stream, ts_recv=stream.ts_recv[known], value=stream.value[known], hole_ends=holes
        )
    value = np.where(known, stream.value, stream.value * 0.5 + 1e-3 * np.arange(len(known)) % 7)
    return replace(stream, value=value, hole_ends=np.r_[holes, t + 1])


@pytest.mark.parametrize("name", SETS)
def test_no_column_sees_the_future(name):
    features = feature_set(name)
    streams = made_streams(features, 3, 700.0, n_holes=1)
    full = build_cross(streams, features)
    assert not np.isnan(full.x[-1]).all()
    for row in (40, 333, 345, 501):
        t = int(full.ts[row])
        for spoil in (False, True):
            other = build_cross({r: cut_stream(s, t, spoil) for r, s in streams.items()}, features)
            n = min(row + 1, len(other.ts))
            assert n > row - 3
            assert other.x[:n].tobytes() == full.x[:n].tobytes()
    changed = other.x[502:] != full.x[502 : len(other.x)]
    clock = [f.name == "to_funding_s" for f in features.features]
    assert (changed.any(axis=0) | clock).all(), "the other future must show once it is the past"


def slow_row(streams, features, t, beat_ns, window):
    "Lag columns and returns of one row, from definitions"
    grid = t - beat_ns * np.arange(window + 700)[::-1]
    logs = []
    for role in ("own", "leader"):
        value = as_of(grid, streams[role]).value
        holes = np.searchsorted(streams[role].hole_ends, grid, side="right")
        logs.append((np.log(value), holes))
    moves = [np.r_[np.nan, np.where(np.diff(h) == 0, np.diff(v), np.nan)] for v, h in logs]
    last = np.arange(len(grid) - window, len(grid))
    both = ~np.isnan(moves[0][last] * moves[1][last])
    norm = np.sqrt(np.nansum(moves[0][last][both] ** 2) * np.nansum(moves[1][last][both] ** 2))
    rho = {
        lag: np.nansum(moves[0][last - max(-lag, 0)] * moves[1][last - max(lag, 0)]) / norm
        for lag in range(-20, 21)
    }
    best = max(rho, key=rho.get)
    squares = [sum(r**2 for lag, r in rho.items() if lag * s > 0) for s in (1, -1)]
    share = (squares[0] - squares[1]) / sum(squares)
    return best * beat_ns / 1e9, rho[best], share, 1e4 * (logs[1][0][-1] - logs[1][0][-11])


def test_lag_columns_equal_their_definition():
    features = feature_set("lead_lag")
    streams = made_streams(features, 11, 900.0, n_holes=4, nan_share=0.01)
    made = build_cross(streams, features)
    checked = 0
    for row in (450, 600, 750, 850):
        lag, rho, share, move = slow_row(streams, features, int(made.ts[row]), 10**8, 3_000)
        ours = made.x[row]
        assert abs(ours[-3] - lag) < 1e-9
        assert abs(ours[-2] - rho) < 1e-5
        assert abs(ours[-1] - share) < 1e-4
        if not np.isnan(ours[0]):
            assert abs(ours[0] - move) < 1e-3
            checked += 1
    assert checked > 1


@pytest.mark.parametrize("name", SETS)
def test_each_column_speaks_exactly_after_its_warm_up(name):
    features = feature_set(name)
    streams = made_streams(features, 6, 700.0)
    if name == "carry":
        streams = {r: streams[r] for r in ("own", "spot")}
        features = features.only("basis_bps", "basis_change_60s_bps", "basis_score_300s")
    made = build_cross(streams, features)
    first = max(int(s.ts_recv[0]) for s in streams.values())
    row_s = features.interval_ms / 1e3
    for k, f in enumerate(features.features):
        known = ~np.isnan(made.x[:, k])
        speaks_s = (int(made.ts[known.argmax()]) - first) / 1e9
        assert f.warm_up_s - 0.1 <= speaks_s <= f.warm_up_s + 2 * row_s, f.name
        assert known[known.argmax() :].all(), f.name


@pytest.mark.parametrize("role", ["own", "spot"])
def test_no_window_crosses_a_hole(role):
    features = feature_set("carry", 1_000).only("basis_change_60s_bps", "basis_score_300s")
    at = BEGIN + 500 * SECOND
    streams = made_streams(feature_set("carry"), 5, 1_200.0)
    streams = {r: streams[r] for r in ("own", "spot")}
    streams[role] = replace(streams[role], hole_ends=np.array([at]))
    made = build_cross(streams, features)
    back = int(streams[role].ts_recv[np.searchsorted(streams[role].ts_recv, at)])
    for k, window_s in ((0, 60), (1, 300)):
        unknown = np.isnan(made.x[:, k]) & (made.ts > at)
        until = int(made.ts[unknown][-1])
        assert back + (window_s - 2) * SECOND <= until <= back + (window_s + 1) * SECOND
        assert not np.isnan(made.x[(made.ts > BEGIN + 305 * SECOND) & (made.ts < at), k]).any()


def test_returns_end_at_a_hole_between_two_beats_while_the_correlation_goes_on():
    features, at = feature_set("lead_lag"), BEGIN + 500 * SECOND + 20_000_000
    streams = made_streams(features, 7, 900.0)
    again = np.searchsorted(streams["leader"].ts_recv, at)
    ts = np.insert(streams["leader"].ts_recv, again, at + 1)
    value = np.insert(streams["leader"].value, again, streams["leader"].value[again])
    streams["leader"] = Stream(ts, value, streams["leader"].tolerance_ms, np.array([at]))
    made = build_cross(streams, features)
    after = (made.ts > at) & (made.ts < at + 60 * SECOND)
    assert np.isnan(made.column("leader_return_60s_bps")[after]).all()
    assert np.isnan(made.column("leader_gap_60s_bps")[after]).all()
    assert not np.isnan(made.column("leader_return_60s_bps")[made.ts > at + 61 * SECOND]).any()
    assert not np.isnan(made.column("lead_lag_300s_s")[after]).any()


def test_an_old_price_is_no_price():
    features = feature_set("lead_lag")
    streams = made_streams(features, 8, 400.0)
    stops = BEGIN + 200 * SECOND
    keep = streams["leader"].ts_recv <= stops
    streams["leader"] = replace(
        streams["leader"],
        ts_recv=streams["leader"].ts_recv[keep], value=streams["leader"].value[keep],
        tolerance_ms=3_000.0,
    )  # fmt: skip
    made = build_cross(streams, features)
    last = int(streams["leader"].ts_recv[-1])
    move = made.column("leader_return_1s_bps")
    assert np.isnan(move[made.ts > last + 3 * SECOND]).all()
    assert not np.isnan(
        move[(made.ts > stops - 20 * SECOND) & (made.ts <= last + 3 * SECOND)]
    ).any()


# --- planted worlds ----------------------------------------------------------------------------


def mids(market):
    "A stream of the mids of a market"
    return mid_stream(market.events, market.instrument)


@pytest.mark.parametrize("seed, lag_s", [(7, 0.3), (8, 1.0)])
def test_a_planted_lead_is_found_with_its_sign_and_lag(seed, lag_s):
    first, second = make_world("lead_lag", seed, 200.0, lag_s=lag_s).markets
    features = feature_set("lead_lag").only(
        "lead_lag_300s_s", "lead_correlation_300s", "lead_share_300s"
    )
    for own, leader, sign in ((second, first, 1), (first, second, -1)):
        x = build_cross({"own": mids(own), "leader": mids(leader)}, features).x[-1]
        assert abs(x[0] - sign * lag_s) <= 0.101
        assert x[1] > 0.3
        assert sign * x[2] > 0.5


@pytest.mark.parametrize("seed", [7, 20])
def test_nothing_is_found_where_nothing_was_planted(seed):
    own, leader = (make_world("null", s, 200.0).markets[0] for s in (seed, seed + 1))
    x = build_cross({"own": mids(own), "leader": mids(leader)}, feature_set("lead_lag")).x[-1]
    assert abs(x[-2]) < 0.12
    assert abs(x[-1]) < 0.5


def test_in_the_mirror_signed_columns_turn():
    for name in SETS:
        features = feature_set(name)
        if name == "carry":
            features = features.only("basis_bps", "basis_change_60s_bps", "basis_score_300s")
        streams = made_streams(features, 4, 700.0, n_holes=0 if name == "carry" else 2)
        turned = {r: replace(s, value=1e4 / s.value) for r, s in streams.items()}
        a, b = build_cross(streams, features), build_cross(turned, features)
        for k, f in enumerate(features.features):
            known = ~np.isnan(a.x[:, k])
            assert known.sum() > 10, f.name
            sign = -1 if f.is_signed else 1
            assert np.abs(a.x[known, k] - sign * b.x[known, k]).max() < 2e-3, f.name


# --- funding -----------------------------------------------------------------------------------


def test_a_rate_is_not_known_before_it_was_told():
    eight = parse_interval("8h")
    table = np.zeros(6, FUNDING)
    table["ts_payment"] = BEGIN + eight * np.arange(6)
    table["ts_known"] = table["ts_payment"] - 90 * SECOND
    table["rate"], table["is_certain"] = 1e-4 * np.arange(1, 7), True
    features = feature_set("carry", 60_000)
    features = features.only("funding_rate_bps", "funding_day_bps", "to_funding_s")
    made = build_cross(funding_streams(table), features)
    changes = made.ts[1:][np.diff(made.column("funding_rate_bps")) != 0]
    assert (changes == table["ts_payment"][1:5] - 60 * SECOND).all(), "the first minute after it"
    assert np.isnan(made.column("funding_day_bps")[made.ts < table["ts_known"][2]]).all()
    day = made.column("funding_day_bps")[-1]
    assert abs(day - (3 + 4 + 5)) < 1e-9, (
        "the sixth is told with the last value, half a minute later"
    )
    left = made.column("to_funding_s") * SECOND
    assert ((made.ts + left.astype(np.int64)) % eight == 0).all()
    assert (left > 0).all() and (left <= eight).all()


def test_a_missing_payment_ends_the_day_sum():
    eight = parse_interval("8h")
    table = np.zeros(6, FUNDING)
    table["ts_payment"] = table["ts_known"] = BEGIN + eight * np.array([0, 1, 2, 4, 5, 6])
    table["rate"], table["is_certain"] = 1e-4, True
    day = funding_streams(table)["funding_day"].value
    assert np.isnan(day).tolist() == [True, True, False, True, True, False]
    table["is_certain"][5] = False
    assert np.isnan(funding_streams(table)["funding"].value[5])
    assert np.isnan(funding_streams(table)["funding_day"].value[5])


def test_funding_of_a_feed_is_known_from_its_receipt():
    eight = parse_interval("8h")
    pays = BEGIN + eight * np.arange(1, 4)
    recv = pays - 30 * SECOND
    size = np.round(np.array([1e-4, -2e-4, 3e-4]) * FUNDING_UNITS).astype(np.int64)
    events = make_events(
        ts_recv=np.r_[recv, pays[-1] + SECOND],
        ts_event=np.r_[recv, pays[-1] + SECOND],
        kind=KIND_FUNDING,
        size_lots=np.r_[size, size[-1]],
        sequence=np.r_[pays, pays[-1] + eight] // 10**6,
    )
    table = funding_of_events(events)
    assert len(table) == 3
    told = funding_streams(table)["funding"]
    before, after = as_of(np.array([recv[1] - 1, recv[1]]), told).value
    assert (before, after) == (1e-4, -2e-4)


@pytest.mark.recordings
def test_recorded_funding_and_candles_do_not_see_the_future(recordings):
    folder = recordings / "candles/binance_usdm"
    stem = "binance__futures__BTC_USDT_USDT-"
    told = read_funding(folder / f"{stem}8h-funding_rate.feather").funding
    features = feature_set("carry", 60_000).only("funding_rate_bps", "funding_day_bps")
    full = build_cross(funding_streams(told), features)
    other = told.copy()
    other["rate"][100:] = 0.5
    rows = build_cross(funding_streams(other), features)
    n = int(np.searchsorted(full.ts, told["ts_known"][100]))
    assert n > 1_000
    assert rows.x[:n].tobytes() == full.x[:n].tobytes()
    assert (rows.x[n:, 0] != full.x[n:, 0]).all()


@pytest.mark.recordings
def test_hourly_leader_on_real_candles(recordings):
    folder = recordings / "candles/binance_spot_1h"
    btc, eth = (read_candles(folder / f"{c}-USDT_1h.parquet", "b").candles for c in ("BTC", "ETH"))
    features = feature_set("lead_lag_hourly")
    streams = {
        "own": candle_stream(eth, "close", 1.8e6),
        "leader": candle_stream(btc, "close", 1.8e6),
    }
    made = build_cross(streams, features)
    assert (made.ts % parse_interval("1h") == 5 * SECOND).all()
    assert np.nanmedian(made.column("lead_correlation_168h")) > 0.7
    assert abs(np.nanmedian(made.column("lead_lag_168h_s"))) == 0
    k = 5_000
    at = int(np.searchsorted(made.ts, btc["ts_close"][k]))
    move = 1e4 * np.log(btc["close"][k] / btc["close"][k - 1])
    assert abs(made.column("leader_return_1h_bps")[at] - move) < 1e-3
    assert made.ts[at] - btc["ts_close"][k] == 5 * SECOND


@pytest.mark.recordings
def test_recorded_perpetual_and_spot(recordings):
    streams = {}
    for role, name in (("own", "spot_btcusdt"), ("leader", "usdm_btcusdt")):
        made = read_frames(recordings / f"binance/{name}_20240808.gz")
        streams[role] = mid_stream(made.events, made.instrument)
    begin = max(int(s.ts_recv[0]) for s in streams.values())
    minute = {r: cut_stream(s, begin + 60 * SECOND, False) for r, s in streams.items()}
    features = feature_set("lead_lag", 100)
    history = build_cross(minute, features)
    until = max(int(s.ts_recv[-1]) for s in minute.values())
    ts, x = run_live(minute, features, until)
    assert len(ts) > 500
    assert x.tobytes() == history.x.tobytes()
    full = build_cross(streams, features)
    assert full.x[: len(x)].tobytes() == x.tobytes(), "the recording's future changes nothing"
    assert np.nanmax(full.column("lead_correlation_300s")) > 0.4


def test_a_candle_that_comes_late_is_not_used_before():
    hours = np.zeros(200, CANDLE)
    hours["ts_open"] = BEGIN + parse_interval("1h") * np.arange(200)
    hours["ts_close"] = hours["ts_open"] + parse_interval("1h")
    hours["ts_recv"] = hours["ts_close"] + SECOND
    hours["close"] = 100 * np.exp(0.01 * np.random.default_rng(1).standard_normal(200).cumsum())
    hours["ts_recv"][150] += 60 * SECOND
    stream = candle_stream(hours, "close", 1.8e6)
    features = feature_set("lead_lag_hourly")
    made = build_cross({"own": stream, "leader": stream}, features)
    move, at = made.column("leader_return_1h_bps"), np.searchsorted(made.ts, hours["ts_close"])
    assert np.isnan(move[at[150]]), "at five seconds past the hour it was not there"
    assert np.isnan(move[at[151]]), "and a return over two hours is not one over one"
    assert not np.isnan(move[at[[149, 152]]]).any()


def test_a_long_silence_is_passed_in_stretches(monkeypatch):
    features = feature_set("lead_lag")
    streams = made_streams(features, 9, 60.0, n_values=300)
    until = max(int(s.ts_recv[-1]) for s in streams.values()) + 3_600 * SECOND
    whole = run_live(streams, features, until)
    monkeypatch.setattr("tradebook.features.cross.CHUNK", 777)
    parts = run_live(streams, features, until)
    assert len(whole[0]) > 3_600
    assert whole[0].tolist() == parts[0].tolist()
    assert whole[1].tobytes() == parts[1].tobytes()
    history = build_cross(streams, features)
    assert history.x.tobytes() == whole[1][: len(history.x)].tobytes()


# --- refusals ----------------------------------------------------------------------------------


def test_wrong_feeds_are_refused():
    features = feature_set("lead_lag")
    streams = made_streams(features)
    with pytest.raises(DataError, match="'leader' is missing"):
        build_cross({"own": streams["own"]}, features)
    with pytest.raises(DataError, match="'spot' is not one of them"):
        build_cross({**streams, "spot": streams["own"]}, features)
    with pytest.raises(SettingsError, match="made of streams, here rows are made of candles"):
        build_trend(np.zeros(0, CANDLE), features)
    with pytest.raises(SettingsError, match="made of candles, here rows are made of streams"):
        build_cross(streams, feature_set("trend"))
    live = CrossStream(features, {"own": 1.0, "leader": 1.0})
    with pytest.raises(DataError, match="did you mean 'leader'"):
        live.push("leaders", BEGIN, 1.0)
    live.push("own", BEGIN + 5, 1.0)
    with pytest.raises(DataError, match="push in the order of receipt"):
        live.push("leader", BEGIN + 3, 1.0)


@pytest.mark.parametrize("bad", [0.0, -5.0, np.inf, np.nan])
def test_a_price_that_is_none_breaks_and_does_not_spread(bad):
    features = feature_set("lead_lag")
    streams = made_streams(features, 2, 700.0)
    value = streams["own"].value.copy()
    value[2_000] = bad
    made = build_cross({**streams, "own": replace(streams["own"], value=value)}, features)
    assert not np.isinf(made.x).any()
    assert not np.isnan(made.x[-1]).any()


def test_another_coin_as_spot_does_not_overflow():
    features = feature_set("carry").only("basis_bps", "basis_change_60s_bps", "basis_score_300s")
    streams = made_streams(feature_set("carry"), 2, 700.0)
    wrong = replace(streams["spot"], value=streams["spot"].value * 1e6)
    made = build_cross({"own": streams["own"], "spot": wrong}, features)
    assert made.x[-1].tolist() == [pytest.approx(-1e4 * 2**25 / 1e8), 0.0, 0.0]
