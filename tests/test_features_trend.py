"""Candle columns: equal to TA-Lib and a slow reference, blind to the future and to unfinished bars, honest at holes."""

import importlib.metadata
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradebook.base.errors import DataError, ModelError, SettingsError
from tradebook.features import schema
from tradebook.features.hilbert import HilbertStream, build_hilbert
from tradebook.features.rows import FeatureStream
from tradebook.features.schema import SETS, feature_set
from tradebook.features.slow_columns import EMD_BARS, N_TREND
from tradebook.features.trend import TrendStream, build_trend
from tradebook.market.candles import (
    CANDLE,
    CANDLE_EMPTY,
    CANDLE_INCOMPLETE,
    CANDLE_OPEN,
    known_at,
    longer_candles,
    parse_interval,
)
from tradebook.market.freqtrade import read_candles
from tradebook.market.instruments import instrument

START = 1_735_689_600 * 10**9  # 2025-01-01, midnight
OHLC = ("open", "high", "low", "close")
PLAIN = [name for name in SETS if not set(SETS[name]) & set(schema.NEEDS)]


def made_candles(n, interval="30m", seed=0, late_s=1.0):
    "Candles of a random walk, each received a little after its end"
    rng, out, step = np.random.default_rng(seed), np.zeros(n, CANDLE), parse_interval(interval)
    path = 2_000 + np.cumsum(rng.integers(-8, 9, 8 * n)).reshape(n, 8) * 0.125
    out["ts_open"] = START + step * np.arange(n)
    out["ts_close"] = out["ts_open"] + step
    out["ts_recv"] = out["ts_close"] + rng.integers(1, int(late_s * 1e9), n)
    out["open"], out["close"] = path[:, 0], path[:, -1]
    out["high"], out["low"], out["volume"] = path.max(1), path.min(1), 1.0
    return out


def spoil(candles, start):
    "Other prices from one candle on"
    out = candles.copy()
    factor = 0.5 + 0.01 * (np.arange(len(out) - start) % 7)
    for name in OHLC:
        out[name][start:] *= factor
    return out


# --- values -----------------------------------------------------------------------------------


def slow_average(values, n, weight):
    "The definition in a loop: a plain mean of the first n, then a share of what is new"
    out, seen, last = np.full(len(values), np.nan), [], np.nan
    for i, value in enumerate(values):
        if np.isnan(value):
            continue
        seen.append(value)
        if len(seen) == n:
            out[i] = np.mean(seen)
        elif len(seen) > n:
            out[i] = (1 - weight) * last + weight * value
        last = out[i]
    return out


def slow_reference(bars):
    "All columns of one frame, the obvious way"
    o, h, lo, c = bars.T

    def ema(x, n):
        return slow_average(x, n, 2 / (n + 1))

    def rolling(x, n):
        return np.lib.stride_tricks.sliding_window_view(x, n)

    def padded(x):
        return np.r_[np.full(len(c) - len(x), np.nan), x]

    one, change = ema(c, 21), np.r_[np.nan, np.diff(c)]
    two, macd = ema(one, 21), ema(c, 12) - ema(c, 26)
    rise = slow_average(np.maximum(change, 0), 14, 1 / 14)
    fall = slow_average(np.maximum(-change, 0), 14, 1 / 14)
    up, down = np.r_[np.nan, np.diff(h)], np.r_[np.nan, -np.diff(lo)]
    plus = np.where((up > down) & (up > 0), up, 0.0)
    minus = np.where((down > up) & (down > 0), down, 0.0)
    before = np.r_[np.nan, c[:-1]]
    reach = np.maximum(h - lo, np.maximum(abs(h - before), abs(lo - before)))
    sums = np.zeros(3)
    gap, strength = np.full(len(c), np.nan), np.full(len(c), np.nan)
    for i in range(1, len(c)):
        sums = sums * (13 / 14 if i >= 14 else 1) + [plus[i], minus[i], reach[i]]
        if i >= 14:
            gap[i] = (sums[0] - sums[1]) / sums[2]
            both = sums[0] + sums[1]
            strength[i] = abs(sums[0] - sums[1]) / both if both else 0.0
    reach[0] = np.nan
    m, s = padded(rolling(c, 20).mean(1)), padded(rolling(c, 20).std(1))
    ranges, bodies = np.log(h / lo) ** 2, np.log(c / o) ** 2
    klass = 0.5 * ranges - (2 * np.log(2) - 1) * bodies
    return np.column_stack([
        *(1e4 * (c / np.r_[np.full(k, np.nan), c[:-k]] - 1) for k in (1, 4, 16)),
        *(1e4 * (c / ema(c, n) - 1) for n in (8, 21, 55)),
        1e4 * (c / (2 * one - two) - 1), 1e4 * (c / (3 * one - 3 * two + ema(two, 21)) - 1),
        1e4 * macd / c, 1e4 * (macd - ema(macd, 9)) / c,
        (rise - fall) / (rise + fall), 1e4 * slow_average(reach, 14, 1 / 14) / c,
        slow_average(strength, 14, 1 / 14), gap, (c - m) / (2 * s), 1e4 * 4 * s / m,
        1e4 * padded(np.sqrt(rolling(np.diff(np.log(c)) ** 2, 20).mean(1))),
        1e4 * padded(np.sqrt(rolling(ranges, 20).mean(1) / (4 * np.log(2)))),
        1e4 * padded(np.sqrt(np.maximum(rolling(klass, 20).mean(1), 0))),
    ])  # fmt: skip


def assert_close(ours, theirs, names, limit=1e-9):
    "Same unknown rows, and the same numbers relative to the size of the column"
    assert len(names) == ours.shape[1] == theirs.shape[1]
    for k, name in enumerate(names):
        assert (np.isnan(ours[:, k]) == np.isnan(theirs[:, k])).all(), name
        known = ~np.isnan(ours[:, k])
        assert known.sum() > 100, name
        off = np.abs(ours[known, k] - theirs[known, k]).max()
        assert off <= limit * max(1.0, np.abs(theirs[known, k]).max()), (name, off)


@pytest.mark.parametrize("seed", range(3))
def test_every_column_equals_a_slow_reference(seed):
    candles = made_candles(1_600, seed=seed)
    made = build_trend(candles)
    for k, frame in enumerate(("30m", "1h", "4h")):
        bars = candles if frame == "30m" else longer_candles(candles, frame)
        ends = np.searchsorted(candles["ts_close"], bars["ts_close"])
        part = slice(k * N_TREND, (k + 1) * N_TREND)
        told = slow_reference(np.column_stack([bars[n] for n in OHLC]))
        assert_close(made.x[ends, part], told, made.feature_set.names[part])


@pytest.mark.recordings
@pytest.mark.parametrize("symbol", ["BTC", "DOGE", "XRP"])
@pytest.mark.parametrize("frame", ["1h", "4h"])
def test_every_column_equals_talib_on_real_candles(recordings, symbol, frame):
    talib = pytest.importorskip("talib", reason="TA-Lib is not installed")
    path = recordings / f"candles/binance_spot_1h/{symbol}-USDT_1h.parquet"
    candles = read_candles(path, "binance").candles
    breaks = np.flatnonzero(np.diff(candles["ts_open"]) != 3600 * 10**9) + 1
    runs = np.split(candles, breaks)
    candles = max(runs, key=len)
    candles = candles[np.argmax(candles["ts_open"] % parse_interval("4h") == 0) :]
    made = build_trend(candles, feature_set("trend_hourly"))
    bars = candles if frame == "1h" else longer_candles(candles, frame)
    bars = bars[(bars["flags"] & CANDLE_INCOMPLETE) == 0]
    o, h, lo, c = (np.ascontiguousarray(bars[name]) for name in OHLC)
    macd = talib.EMA(c, 12) - talib.EMA(c, 26)
    gap = np.r_[np.full(25, np.nan), macd[25:] - talib.EMA(macd[25:], 9)]
    hand = slow_reference(np.column_stack([o, h, lo, c]))
    theirs = np.column_stack([
        *(1e4 * talib.ROCP(c, k) for k in (1, 4, 16)),
        *(1e4 * (c / talib.EMA(c, n) - 1) for n in (8, 21, 55)),
        1e4 * (c / talib.DEMA(c, 21) - 1), 1e4 * (c / talib.TEMA(c, 21) - 1),
        1e4 * macd / c, 1e4 * gap / c, talib.RSI(c, 14) / 50 - 1, 1e4 * talib.ATR(h, lo, c, 14) / c,
        talib.ADX(h, lo, c, 14) / 100,
        (talib.PLUS_DI(h, lo, c, 14) - talib.MINUS_DI(h, lo, c, 14)) / 100,
        hand[:, 14:],
    ])  # fmt: skip
    ends = np.searchsorted(candles["ts_close"], bars["ts_close"])
    columns = [i for i, n in enumerate(made.feature_set.names) if f"x{frame}" in n]
    names = [made.feature_set.names[i] for i in columns]
    ours = made.x[np.ix_(ends, columns)]
    assert_close(ours, theirs, names)
    # The library keeps running sums of squares, which lose digits that two passes keep.
    upper, middle, lower = talib.BBANDS(c, 20, 2, 2, 0)
    width = names.index(f"bollinger_width_20x{frame}_bps")
    assert np.nanmax(np.abs(1e4 * (upper - lower) / middle - ours[:, width])) < 1e-2


@pytest.mark.recordings
def test_all_recorded_symbols_stay_in_range(recordings):
    files = sorted((recordings / "candles/binance_spot_1h").glob("*.parquet"))
    assert len(files) > 20
    features = feature_set("trend_hourly")
    for path in files:
        made = build_trend(read_candles(path, "binance").candles, features)
        for name, limit in (("rsi_14", 1), ("adx_14", 1), ("di_gap_14", 1), ("bollinger_20", 2.2)):
            x = made.column(f"{name}x1h")
            assert np.nanmax(np.abs(x), initial=0) <= limit + 1e-12, (path.name, name)
        assert not np.isinf(made.x).any(), path.name
        if len(made.ts) > 200:
            assert (~np.isnan(made.column("tema_21x1h_bps"))).any(), path.name


# --- stream, future, unfinished bars -----------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_stream_equals_batch_whatever_comes(data):
    candles = made_candles(400, "10m", seed=data.draw(st.integers(0, 99)))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    candles["flags"] |= np.where(rng.random(400) < 0.03, CANDLE_OPEN, 0).astype(np.uint32)
    candles["flags"] |= np.where(rng.random(400) < 0.004, CANDLE_INCOMPLETE, 0).astype(np.uint32)
    empty = rng.random(400) < 0.05
    candles["flags"][empty] |= CANDLE_EMPTY
    for name in OHLC:
        candles[name][empty] = np.nan
    candles = candles[rng.random(400) > data.draw(st.sampled_from([0.0, 0.01]))]
    dtype = data.draw(st.sampled_from(["float64", "float32"]))
    features = feature_set("trend", dtype=dtype)
    cuts = np.sort(rng.integers(0, len(candles) + 1, data.draw(st.integers(0, 40))))
    stream = TrendStream(features)
    parts = [stream.push(piece) for piece in np.split(candles, cuts)]
    history = build_trend(candles, features)
    assert np.concatenate([p.x for p in parts]).tobytes() == history.x.tobytes()
    assert np.concatenate([p.ts for p in parts]).tolist() == history.ts.tolist()
    assert history.x.dtype == dtype


def look_ahead(build, candles, cuts):
    "Names of columns whose known rows change when the future is cut off or is another one"
    full, caught = build(candles), set()
    for cut in cuts:
        t = int(known_at(candles[:cut]).max())
        n = int(np.searchsorted(full.ts, t, side="right"))
        for other in (candles[:cut], spoil(candles, cut)):
            rows = build(other)
            differ = rows.x[:n].view(np.uint64) != full.x[:n].view(np.uint64)
            caught |= {full.feature_set.names[k] for k in np.flatnonzero(differ.any(axis=0))}
    return caught


def test_no_column_sees_the_future():
    candles = made_candles(1_000, "15m", seed=3)
    assert look_ahead(build_trend, candles, [300, 555, 640, 901]) == set()
    full, other = build_trend(candles), build_trend(spoil(candles, 640))
    later = full.ts > candles["ts_close"][800]
    changed = (full.x[later] != other.x[later]).any(axis=0)
    assert changed.all(), "the other future must be visible once it is the past"


def test_a_planted_look_ahead_is_caught():
    "The usual mistake: long bars joined by the hour at which they open"

    def leaky(candles):
        made = build_trend(candles)
        bars = longer_candles(candles, "4h")
        at = np.searchsorted(bars["ts_open"], candles["ts_open"][1::2], side="right") - 1
        k = made.feature_set.index("return_1x4h_bps")
        move = np.r_[np.nan, 1e4 * np.diff(np.log(bars["close"]))]
        made.x[:, k] = move[at[: len(made.ts)]]
        return made

    caught = look_ahead(leaky, made_candles(1_000, "15m", seed=3), [300, 555, 640, 901])
    assert caught == {"return_1x4h_bps"}


def test_an_unfinished_bar_is_never_used():
    candles = made_candles(2_000, "30m", seed=5)
    full = build_trend(candles)
    first = 1_600  # the first half hour of a block of four hours
    assert candles["ts_open"][first] % parse_interval("4h") == 0
    other = build_trend(spoil(candles, first))
    block = slice(first, first + 7)  # rows at the ends of seven half hours: the block is not over
    four = [k for k, n in enumerate(full.feature_set.names) if "x4h" in n]
    assert not np.isnan(full.x[block][:, four]).any()
    assert (full.x[block][:, four] == other.x[block][:, four]).all()
    assert (full.x[first + 7, four] != other.x[first + 7, four]).all()
    half = [k for k, n in enumerate(full.feature_set.names) if "x30m" in n]
    changed = (full.x[first, half] != other.x[first, half]).sum()
    assert changed >= N_TREND - 2, "all but the two that look at ranges within a bar only"


def test_an_open_candle_changes_nothing():
    candles = made_candles(300, "10m")
    wild = np.repeat(candles, 3)
    wild["flags"][0::3], wild["flags"][1::3] = CANDLE_OPEN, CANDLE_OPEN
    for name in OHLC:
        wild[name][1::3] *= 9
    assert build_trend(wild).x.tobytes() == build_trend(candles).x.tobytes()


def test_a_late_candle_makes_a_late_row():
    candles = made_candles(40)
    candles["ts_recv"][20] += 600 * 10**9
    made = build_trend(candles)
    assert made.ts.tolist() == known_at(candles).tolist()
    during = np.array([candles["ts_close"][20] + 300 * 10**9])
    assert made.known(during, 3_600).tobytes() == made.x[19:20].tobytes()
    after = np.array([candles["ts_recv"][20]])
    assert made.known(after, 3_600).tobytes() == made.x[20:21].tobytes()
    assert np.isnan(made.known(made.ts[:1] - 1, 3_600)).all()


# --- holes, warm-up, settling ------------------------------------------------------------------


def test_each_column_speaks_exactly_after_its_warm_up():
    candles = made_candles(1_700)
    hole = 803  # in the middle of an hour and of a block of four
    made = build_trend(np.delete(candles, hole))
    closes = np.delete(candles["ts_close"], hole)
    assert np.isnan(made.x[hole]).all()
    for k, f in enumerate(made.feature_set.features):
        frame = parse_interval(f.name.rpartition("x")[2].partition("_")[0])
        for begin, rows in ((START, slice(0, hole)), (int(closes[hole - 1]), slice(hole, None))):
            resumes = begin if begin == START else int(candles["ts_close"][hole])
            first_bar = -(-resumes // frame) * frame
            known = ~np.isnan(made.x[rows, k])
            assert known.any(), f.name
            speaks = int(closes[rows][known.argmax()])
            assert speaks - first_bar == f.warm_up_s * 1e9, f.name
            assert known[known.argmax() :].all(), f.name


@pytest.mark.parametrize("kind", ["incomplete", "missing", "no price", "infinite"])
def test_every_kind_of_hole_ends_every_window(kind):
    candles = made_candles(1_000)
    if kind == "incomplete":
        candles["flags"][700] = CANDLE_INCOMPLETE
    elif kind == "missing":
        candles = np.delete(candles, 700)
    else:
        candles["high"][700] = candles["close"][700] = np.nan if kind == "no price" else np.inf
    made = build_trend(candles)
    assert not np.isnan(made.x[699]).any()
    assert np.isnan(made.x[700]).all()
    resumes = 700 + (kind != "missing")
    early, later = build_trend(candles[resumes:]), made.x[resumes:]
    assert later.tobytes() == early.x.tobytes(), "nothing from before the hole may be left"


def test_a_candle_without_trades_is_flat_at_the_last_close():
    candles = made_candles(200)
    flat = candles.copy()
    for name in OHLC:
        flat[name][150] = flat["close"][149]
    candles["flags"][150] = CANDLE_EMPTY
    for name in OHLC:
        candles[name][150] = np.nan
    assert build_trend(candles).x.tobytes() == build_trend(flat).x.tobytes()


def test_a_late_start_is_forgotten_when_it_is_said_to_be():
    candles = made_candles(12_000)
    full, late = build_trend(candles), build_trend(candles[2_000:])
    for k, f in enumerate(full.feature_set.features):
        at = 2_000 + int(f.settles_s / 1_800)
        assert at < 12_000, f.name
        a, b = full.x[at:, k], late.x[at - 2_000 :, k]
        assert not np.isnan(b).any(), f.name
        assert np.abs(a - b).max() <= 1e-7 * max(np.abs(a).max(), 1.0), f.name


# --- mirror and scale --------------------------------------------------------------------------


def test_signed_columns_turn_in_the_mirror():
    candles = made_candles(1_000)
    for name in OHLC:
        candles[name] += 18_000  # far away, so that basis points compare
    turned = candles.copy()
    for name, image in zip(OHLC, ("open", "low", "high", "close"), strict=True):
        turned[name] = 40_000 - candles[image]
    a, b = build_trend(candles), build_trend(turned)
    for k, f in enumerate(a.feature_set.features):
        image = -b.x[:, k] if f.is_signed else b.x[:, k]
        known = ~np.isnan(image)
        limit = 0.05 if f.unit == "bps" else 1e-7  # basis points of another price
        size = np.abs(a.x[known, k]).mean()
        assert np.abs(a.x[known, k] - image[known]).mean() <= limit * max(size, 1e-9), f.name


def test_columns_do_not_depend_on_the_unit_of_price():
    candles, scaled = made_candles(700), made_candles(700)
    for name in OHLC:
        scaled[name] *= 2.0**-9
    assert build_trend(candles).x.tobytes() == build_trend(scaled).x.tobytes()


# --- sets and refusals -------------------------------------------------------------------------


def test_sets_are_refused_when_they_differ_by_one_character():
    ours = feature_set("trend")
    ours.require(ours.hash, ours.names)
    column = ours.features[10]
    other = replace(column, name=column.name.replace("30m", "30M"))
    theirs = replace(ours, features=(*ours.features[:10], other, *ours.features[11:]))
    with pytest.raises(ModelError, match="column 10 is 'rsi_14x30m' here and 'rsi_14x30M' there"):
        ours.require(theirs.hash, theirs.names)
    group = {**ours.params["trend_1h"], "strength": 15}
    for changed in (
        replace(ours, params={**ours.params, "trend_1h": group}),
        replace(ours, interval_ms=ours.interval_ms + 1),
        replace(ours, source="streams"),
        replace(ours, dtype="float32"),
    ):
        with pytest.raises(ModelError, match="same columns, other"):
            ours.require(changed.hash, changed.names)
    assert len({feature_set(n).hash for n in PLAIN}) == len(SETS) - 1


def test_some_columns_in_another_order():
    candles, full = made_candles(900), feature_set("trend")
    few = full.only("rsi_14x4h", "return_1x30m_bps")
    made, whole = build_trend(candles, few), build_trend(candles)
    assert made.x.shape[1] == 2
    assert made.ts.tolist() == whole.ts.tolist()
    for name in few.names:
        assert made.column(name).tobytes() == whole.column(name).tobytes()


def test_a_set_without_its_package_is_refused_by_name(monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "EMD-signal":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    words = r"'hilbert_huang' needs the package EMD-signal.*pip install 'EMD-signal>=1.10,<2'"
    for make in (lambda: feature_set("hilbert_huang"), HilbertStream):
        with pytest.raises(SettingsError, match=words):
            make()
    with pytest.raises(SettingsError, match=r"'default\+hilbert' needs the package EMD-signal"):
        feature_set("default+hilbert")
    for name in PLAIN:
        assert len(feature_set(name)) > 0


@pytest.mark.parametrize("version", ["0.2.13", "1.9.9", "2", "2.0.1", "10.1"])
@pytest.mark.parametrize("name", ["hilbert_huang", "default+trend_1h+hilbert"])
def test_a_version_outside_of_the_range_is_refused(monkeypatch, name, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    words = (
        rf"{re.escape(repr(name))} needs EMD-signal>=1.10,<2, found EMD-signal {version}; run: pip"
    )
    with pytest.raises(SettingsError, match=words):
        feature_set(name)
    assert len(feature_set("default+trend_1h")) == 63


def test_another_version_of_the_package_is_another_set(monkeypatch):
    hashes = set()
    for version in ("1.10.0", "1.10.1"):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, v=version: v)
        hashes.add(feature_set("hilbert_huang").hash)
    assert len(hashes) == 2


def test_what_is_made_of_something_else_is_refused():
    of = instrument("synthetic", "SYN/USDT:USDT")
    with pytest.raises(SettingsError, match="made of candles, here rows are made of events"):
        FeatureStream(of, feature_set("trend"))
    with pytest.raises(SettingsError, match="made of events, here rows are made of candles"):
        TrendStream(feature_set("default"))
    with pytest.raises(SettingsError, match="1800000 or left out, was 1000"):
        feature_set("trend", 1000)


def test_candles_that_would_be_misread_are_refused():
    candles = made_candles(50)
    bad = {
        "dtype CANDLE": candles["close"],
        "came too late": candles[::-1],
        "one length": np.r_[candles[:3], made_candles(9, "10m")[-2:]],
        "lie on the clock": candles.copy(),
    }
    bad["lie on the clock"]["ts_open"] += 60 * 10**9
    bad["lie on the clock"]["ts_close"] += 60 * 10**9
    for words, rows in bad.items():
        with pytest.raises(DataError, match=words):
            build_trend(rows)
    stream = TrendStream()
    stream.push(candles[:10])
    with pytest.raises(DataError, match="came too late"):
        stream.push(candles[9:11])
    assert len(stream.push(candles[10:]).ts) == 40, "a refused candle must leave the stream usable"
    assert len(build_trend(candles[:0]).ts) == 0


# --- Hilbert and Huang -------------------------------------------------------------------------


@pytest.fixture
def hours():
    pytest.importorskip("PyEMD", reason="EMD-signal is not installed")
    return made_candles(EMD_BARS + 24, "1h", seed=2)


def test_waves_do_not_see_the_future(hours):
    cut = EMD_BARS + 12
    full, other = build_hilbert(hours), build_hilbert(spoil(hours, cut))
    assert full.x[:cut].tobytes() == other.x[:cut].tobytes()
    assert (full.x[cut:] != other.x[cut:]).any(axis=0).all()
    assert np.isnan(full.x[: EMD_BARS - 1]).all()
    assert not np.isnan(full.x[EMD_BARS - 1 :]).any()


def test_waves_of_a_stream_equal_those_of_a_window_alone(hours):
    stream = HilbertStream()
    live = np.concatenate([stream.push(hours[i : i + 1]).x for i in range(len(hours))])
    assert live.tobytes() == build_hilbert(hours).x.tobytes()
    for end in (EMD_BARS + 5, EMD_BARS + 24):
        alone = build_hilbert(hours[end - EMD_BARS : end])
        assert alone.x[-1].tobytes() == live[end - 1].tobytes()


def test_waves_stop_at_a_hole(hours):
    made = build_hilbert(np.delete(hours, EMD_BARS + 3))
    assert not np.isnan(made.x[EMD_BARS + 2]).any()
    assert np.isnan(made.x[EMD_BARS + 3 :]).all()
