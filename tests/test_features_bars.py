"""Candle columns beside the book: bars as defined, blind to unfinished ones, one pass however cut, named if missing."""

import json
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tradebook.backtest.parity import compare
from tradebook.base.causes import Cause
from tradebook.base.clock import NS_PER_S
from tradebook.base.errors import DataError, SettingsError
from tradebook.base.journal import Journal
from tradebook.base.settings import load_settings
from tradebook.features import bars as bar
from tradebook.features.bar_checks import needed_minutes
from tradebook.features.claims import with_hole
from tradebook.features.findings import bits_differ
from tradebook.features.rows import FeatureStream, build_features, join_rows
from tradebook.features.schema import feature_set
from tradebook.features.suite import run_checks
from tradebook.features.trend import build_trend
from tradebook.market.candles import trade_candles
from tradebook.market.events import (
    FLAG_LAST,
    KIND_CLEAR,
    KIND_GAP,
    KIND_LEVEL,
    make_events,
    message_starts,
)
from tradebook.market.store import DAY_NS, Store
from tradebook.market.stored_candles import CandleStore
from tradebook.market.synthetic import synthetic_market
from tradebook.ops.pipeline import backtest_symbol, collect_events, train_symbol
from tradebook.policy.decide import model_block
from tradebook.policy.rules import rules_from
from tradebook.policy.views import ViewReader
from tradebook.trader.before import bars_before
from tradebook.trader.feed import StoreFeed
from tradebook.trader.session import trade_paper
from tradebook.training.building import Request, build_dataset
from tradebook.training.datasets import load_dataset, verify_dataset
from tradebook.training.label_sets import LabelSet
from tradebook.training.partitions import freeze, thaw

MIDNIGHT_NS = 20_000 * DAY_NS
STEP, MINUTE = NS_PER_S // 10, 60 * NS_PER_S
FEW = feature_set("minimal+trend_1m+trend_5m", 1000).only(
    "spread_bps", "return_1x1m_bps", "rsi_14x1m", "imbalance_5", "ema_8x1m_bps", "return_1x5m_bps"
)
BARS = [k for k, f in enumerate(FEW.features) if f.is_bridging]


@pytest.fixture(scope="module")
def market():
    "Forty minutes around midnight, with a hole of five seconds and one of two minutes"
    made = synthetic_market(seed=4, duration_s=2400, start_ns=MIDNIGHT_NS - 1200 * NS_PER_S)
    events = with_hole(made.events, len(made.events) // 4, 5.0)[0]
    return with_hole(events, len(events) * 3 // 4, 120.0)[0], made.instrument


@pytest.fixture(scope="module")
def whole(market):
    return build_features(*market, FEW)


# --- bars -------------------------------------------------------------------------------------


def slow_bars(mids, first, length):
    "The definition: group beats by the bar they lie in, and drop what was not seen whole"
    times, found = first + STEP * np.arange(len(mids)), []
    for end in range(-(-first // length) * length, int(times[-1]) + 1, length):
        inside = (times > end - length) & (times <= end)
        seen = mids[inside & (mids > 0)]
        n_known = len(seen) if times[0] - STEP <= end - length else 0
        ohlc = [seen[0], seen.max(), seen.min(), seen[-1]] if len(seen) else None
        found.append((end, ohlc, n_known))
    return found


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(0, 1500), st.integers(1, 3000), st.floats(0, 0.9))
def test_bars_are_what_their_definition_says(seed, late, n, gone):
    rng = np.random.default_rng(seed)
    mids = 2_000 + np.cumsum(rng.integers(-3, 4, n))
    mids[np.repeat(rng.random(-(-n // 40)) < gone, 40)[:n]] = 0
    first, lengths = MIDNIGHT_NS + late * STEP, (MINUTE, 5 * MINUTE)
    state, ended = bar.new_bars(lengths, STEP, NS_PER_S, n // 10 + 1)
    for i, mid in enumerate(mids):
        bar.bar_beat(state, ended, first + i * STEP, mid)
        if rng.random() < 0.05:  # the clock does not go back
            bar.bar_beat(state, ended, first + int(rng.integers(0, i + 1)) * STEP, 7)
    ended = ended[: state[-1, bar.N_ENDED]]
    for k, length in enumerate(lengths):
        mine, slow = ended[ended[:, bar.FRAME] == k], slow_bars(mids, first, length)
        assert mine[:, bar.ENDED].tolist() == [end for end, _, _ in slow]
        assert mine[:, bar.SEEN].tolist() == [n_known for _, _, n_known in slow]
        for row, (_, ohlc, _) in zip(mine, slow, strict=True):
            if ohlc:
                assert row[bar.OPEN : bar.CLOSE + 1].tolist() == ohlc


def test_columns_are_those_of_candles_made_of_the_same_mids(market, whole):
    events, of = market
    fast = build_features(events, of, feature_set("minimal", 100))  # a row a beat
    mid_2 = (fast.rows["bid_ticks"] + fast.rows["ask_ticks"]) * (fast.rows["status"] <= 1)
    state, ended = bar.new_bars((MINUTE,), STEP, STEP, len(fast))
    segment = fast.rows["segment"]
    until = int(np.flatnonzero(np.diff(segment))[0])  # before the first hole
    for ts, mid in zip(fast.rows["ts"][:until], mid_2[:until], strict=True):
        bar.bar_beat(state, ended, ts, mid)
    candles = bar.bar_candles(ended[: state[-1, bar.N_ENDED]], MINUTE, of.tick_size)
    one = replace(feature_set("trend"), interval_ms=60_000)
    columns = tuple(f for f in feature_set("trend_1m").features if f.name in FEW.names)
    timed = build_trend(candles, replace(one, features=columns))
    stop = int(fast.rows["ts"][until - 1])
    for name in ("return_1x1m_bps", "rsi_14x1m"):
        there = (whole.rows["ts"] <= stop) & (whole.rows["status"] <= 1)
        at = np.searchsorted(timed.ts, whole.rows["ts"][there], side="right") - 1
        known = np.r_[timed.column(name), np.nan][at]
        assert not bits_differ(known, whole.column(name)[there]).any()
    assert np.isfinite(known).any() or until < 9000


# --- one pass, however it is cut --------------------------------------------------------------


@settings(deadline=None, max_examples=8)
@given(st.lists(st.floats(0, 1), max_size=6), st.integers(1, 80), st.booleans())
def test_a_feed_cut_anywhere_and_put_on_ice_is_the_recording(market, whole, places, room, is_iced):
    events, of = market
    starts = message_starts(events)
    cuts = sorted({int(starts[round(p * (len(starts) - 1))]) for p in places})
    stream, parts, begin = FeatureStream(of, FEW, room=room), [], 0
    for end in [*cuts, len(events)]:
        parts.append(stream.push(events, begin, end))
        begin = end
        if is_iced:
            stream = thaw(freeze(stream), of, FEW, room=room + end % 7)
    parts.append(stream.advance_to(int(events["ts_recv"][-1])))
    made = join_rows(*parts)
    assert made.rows.tobytes() == whole.rows.tobytes()
    assert made.x.tobytes() == whole.x.tobytes()


def test_the_time_between_rows_does_not_change_the_bars(market, whole):
    for interval_ms in (100, 5_000, 60_000):
        other = build_features(*market, replace(FEW, interval_ms=interval_ms))
        at, mine = (
            np.isin(whole.rows["ts"], other.rows["ts"]),
            np.isin(other.rows["ts"], whole.rows["ts"]),
        )
        for k in BARS:
            assert not bits_differ(other.x[mine, k], whole.x[at, k]).any()
        assert mine.sum() > 20


def test_half_an_hour_between_rows(market):
    events, of = market
    features = feature_set("slow+trend_1m", 1_800_000)
    made = build_features(events, of, features)
    assert (made.rows["ts"] % (1_800 * NS_PER_S) == 0).all() and len(made) == 1
    live = FeatureStream(of, features)
    rows = join_rows(live.push(events), live.advance_to(int(events["ts_recv"][-1])))
    assert rows.x.tobytes() == made.x.tobytes()
    chosen = load_settings(environment={}, overrides={"features.interval_ms": 1_800_000})
    assert chosen.features.interval_ms == 1_800_000
    for wrong in (1_800_001, 1_800_010, 9):
        with pytest.raises(SettingsError, match="interval_ms"):
            feature_set("default", wrong)
    with pytest.raises(SettingsError, match="interval_ms"):
        load_settings(environment={}, overrides={"features.interval_ms": 1_800_001})


def test_a_short_hole_keeps_a_frame_and_a_long_one_begins_it_anew(market, whole):
    ts, segment = whole.rows["ts"], whole.rows["segment"]
    short, long = (ts[np.flatnonzero(np.diff(segment))[k] + 1] for k in (0, 1))
    one, five = whole.column("return_1x1m_bps"), whole.column("return_1x5m_bps")
    alive = whole.rows["status"] <= 1
    near = alive & (ts > short) & (ts < short + 300 * NS_PER_S)
    assert np.isfinite(one[near]).all()
    after = alive & (ts > long) & (ts < long + 50 * NS_PER_S)
    assert after.any() and np.isnan(one[after]).all()
    later = alive & (ts > long) & (ts <= ts[-1])
    assert np.isfinite(one[later]).any()
    assert np.isfinite(five[later]).any()  # two minutes of five are bridged


# --- look-ahead -------------------------------------------------------------------------------


def test_planted_leaks_are_caught_by_name(market):
    events, of = market
    events = events[events["ts_recv"] < MIDNIGHT_NS]

    def leaky(events, instrument, features):
        made = build_features(events, instrument, features)
        x, k, j = made.x.copy(), features.index("return_1x1m_bps"), features.index("rsi_14x1m")
        ts, mid = made.rows["ts"], made.rows["bid_ticks"] + made.rows["ask_ticks"]
        begin = np.searchsorted(ts, ts // MINUTE * MINUTE)
        x[:, k] = 1e4 * (mid / mid[begin] - 1)  # the bar being built
        x[:, j] = made.x[np.minimum(begin + 60, len(x) - 1), j]  # the bar that will end next
        return replace(made, x=x)

    honest = {c.check: c.findings for c in run_checks(events, of, FEW, ("future", "bars"), 6)}
    assert honest == {"future": (), "bars": ()}
    caught = run_checks(events, of, FEW, ("future", "bars"), 6, build=leaky)
    blamed = {c.check: {f.feature for f in c.findings} for c in caught}
    assert "return_1x1m_bps" in blamed["bars"] and "rsi_14x1m" in blamed["future"]
    assert blamed["bars"] | blamed["future"] == {"return_1x1m_bps", "rsi_14x1m"}


def test_the_command_checks_a_set_on_what_it_needs():
    asked = (
        "features check --features trend_1m --synthetic --rows 1 --check future --check bars --json"
    )
    done = subprocess.run(
        [sys.executable, "-m", "tradebook", *asked.split()], capture_output=True, text=True
    )
    found = json.loads(done.stdout)
    assert (done.returncode, found["ok"]) == (0, True), done.stderr
    assert [c["check"] for c in found["checks"]] == ["future", "bars"]
    assert needed_minutes(feature_set("trend_1m")) * 60 > found["checks"][1]["n_rows"] > 61 * 60


# --- data sets and sessions -------------------------------------------------------------------


def test_days_put_together_are_one_pass_and_nothing_is_made_twice(tmp_path, market, whole):
    events, of = market
    store, root = Store(tmp_path / "market"), tmp_path / "datasets"
    names = of.venue, of.symbol
    request = Request((names,), None, None, FEW, LabelSet("horizon", 10.0))
    store.write(events[events["ts_recv"] < MIDNIGHT_NS], of, "test")
    build_dataset(store.root, root, request)
    store.write(events[events["ts_recv"] >= MIDNIGHT_NS], of, "test")
    built = build_dataset(store.root, root, request)
    data = load_dataset(root, built.id)  # the set is found again by its name
    assert data.feature_set.hash == FEW.hash
    assert data.x.tobytes() == whole.x.tobytes()
    again = build_dataset(store.root, root, request)
    assert {d.word for found in again.done.values() for d in found} == {"kept"}
    assert verify_dataset(store.root, root, built.id) == []
    both = replace(request, features=feature_set("trend"))
    with pytest.raises(SettingsError, match=r"default\+trend_30m\+trend_1h\+trend_4h"):
        build_dataset(store.root, root, both)


@settings(deadline=None, max_examples=6)
@given(share=st.floats(0.02, 0.98))
@example(share=0.875)  # within a hole
@example(share=0.87)
def test_a_session_begins_with_the_columns_of_the_whole(tmp_path_factory, market, whole, share):
    events, of = market
    store = Store(tmp_path_factory.mktemp("store"))
    store.write(events, of, "test")
    names = of.venue, of.symbol
    start_ns = int(whole.rows["ts"][0] + share * np.ptp(whole.rows["ts"]))
    feed = StoreFeed(store, *names, start_ns)
    before = bars_before(store, *names, FEW, int(feed.events["ts_recv"][0]))
    rest = build_features(feed.events, of, FEW, before=before)
    old = whole[len(whole) - len(rest) :]
    assert rest.rows["ts"].tobytes() == old.rows["ts"].tobytes()
    alive = rest.rows["status"] <= 1
    for k in BARS:
        assert not bits_differ(rest.x[alive, k], old.x[alive, k]).any()


def test_bars_of_other_columns_do_not_go_on(market):
    _, of = market
    with pytest.raises(DataError, match="both must hold the same candle columns"):
        FeatureStream(of, FEW).go_on_from(FeatureStream(of, feature_set("minimal+trend_1m")))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A data root with two hours and a half of a market"
    folder = tmp_path_factory.mktemp("home")
    made = synthetic_market(seed=7, duration_s=9_000)
    collect_events(folder, made.events, made.instrument)
    return folder, made.instrument


def test_paper_says_what_the_backtest_says_with_candle_columns(home):
    folder, of = home
    changes = {"paths.data": str(folder), "training.rounds": 20, "training.folds": 2}
    changes |= {"gates.is_edge_gate_on": False, "gates.max_spread_bps": 50}
    chosen = load_settings(
        environment={}, overrides={**changes, "features.set": "default+trend_1m"}
    )
    row = Store(folder / "market").listing()[0]
    names, split = (of.venue, of.symbol), row["start_ns"] + 6_600 * NS_PER_S
    train_symbol(chosen, *names, None, split)
    replayed, paper = backtest_symbol(chosen, *names, split), trade_paper(chosen, *names, split)
    with Journal(folder / "journal.db") as journal:
        runs = [journal.decisions(run_id) for run_id in (replayed.run_id, paper["run_id"])]
        fills = [journal.fills(run_id) for run_id in (replayed.run_id, paper["run_id"])]
    found = compare(*runs, *fills)
    assert (found.n_differences, found.first_difference) == (0, "") and found.n_decisions > 2_000
    assert paper["waits"] == "" and paper["n_predictions"] > 2_000 and len(fills[0]) > 10


def test_a_session_without_a_past_waits_and_says_for_what(home):
    folder, of = home
    changes = {"paths.data": str(folder), "features.set": "default+trend_4h"}
    chosen = load_settings(environment={}, overrides=changes)
    row = Store(folder / "market").listing()[0]
    stop = row["start_ns"] + 120 * NS_PER_S
    made = trade_paper(chosen, of.venue, of.symbol, None, stop)
    assert made["waits"] == "trend_4h has 0 of 61 bars, 244 h more" and made["n_orders"] == 0
    with Journal(folder / "journal.db") as journal:
        told = [e for e in journal.events(made["run_id"]) if e["code"] == "FEATURES_WARMING_UP"]
    assert "trend_4h has 0 of 61 bars" in str(told)


def test_the_cause_of_waiting_is_not_a_fault(home):
    folder, of = home
    events = Store(folder / "market").read(of.venue, of.symbol)[:60_000]
    features = feature_set("default+trend_1m", 1000)
    made, reader = build_features(events, of, features), ViewReader(features)
    views = [reader.read(made.rows[i], made.x[i], int(made.n_nan[i])) for i in range(30, len(made))]
    assert len(views) > 100 and all(0 < v.n_waiting == v.n_nan for v in views)
    rules = rules_from(load_settings(environment={}), of)
    assert {model_block(v, None, rules) for v in views} == {Cause.FEATURES_WARMING_UP}


def test_a_hole_reported_twice_ends_a_frame_once():
    state, ended = bar.new_bars((MINUTE,), STEP, NS_PER_S, 200)
    for i in range(1, 1300):
        bar.bar_beat(state, ended, MIDNIGHT_NS + i * STEP, 2_000)
    for ts, hole_s in ((130, 65), (131, 66), (132, 1)):
        bar.bar_hole(state, ended, MIDNIGHT_NS + ts * NS_PER_S, hole_s * NS_PER_S)
    listed = ended[: state[-1, bar.N_ENDED]]
    assert listed[:, bar.IS_CUT].tolist() == [0, 0, 1]
    assert 0 <= state[0, bar.KNOWN] <= 99


def test_a_gap_event_reaches_the_bars(market):
    events, of = market
    early = events[events["ts_recv"] < MIDNIGHT_NS - 400 * NS_PER_S]
    last = int(early["ts_recv"][-1])
    gap = make_events(
        ts_recv=last + 200 * NS_PER_S, kind=KIND_GAP, size_lots=200 * NS_PER_S, flags=FLAG_LAST
    )
    stream = FeatureStream(of, FEW)
    stream.push(early)
    frame = stream.beside.frames[0].stream.state
    assert frame.marks[0, 1] > 0
    stream.push(gap)
    assert frame.marks[0, 1] == 0


@pytest.mark.parametrize("name", ["lead_lag", "carry", "default+lead", "trend_1m+lead_1h"])
def test_sets_of_several_markets_are_refused_by_name_at_the_start(home, name):
    folder, of = home
    chosen = load_settings(
        environment={}, overrides={"paths.data": str(folder), "features.set": name}
    )
    for use in (trade_paper, backtest_symbol, train_symbol):
        with pytest.raises(SettingsError, match="several feeds|second market|features.leader"):
            use(chosen, of.venue, of.symbol)


def test_stored_candles_stand_for_a_past_that_was_not_recorded(home, tmp_path):
    folder, of = home
    events, names = Store(folder / "market").read(of.venue, of.symbol), (of.venue, of.symbol)
    start_ns = int(events["ts_recv"][0]) + 6_630 * NS_PER_S  # half a minute into a bar
    later = StoreFeed(Store(folder / "market"), *names, start_ns).events
    store, features = Store(tmp_path), feature_set("default+trend_1m+trend_5m", 1000)
    store.write(later, of, "test")
    first_ns = int(later["ts_recv"][0])
    minutes = trade_candles(events, of, "1m", clock="recv", empty="carried")
    assert not bars_before(store, *names, features, None).state.bars[-1].tolist()[bar.LAST]
    CandleStore(tmp_path).write(minutes, *names, "test")
    before = bars_before(store, *names, features, None)
    used = before.state.bars[-1, bar.LAST]
    assert first_ns - MINUTE < used <= first_ns  # no candle that ended later, though all are stored
    warm = build_features(later, of, features, before=before)
    whole = build_features(events, of, features)
    old = whole[len(whole) - len(warm) :]
    for name in ("return_1x1m_bps", "rsi_14x1m", "ema_8x1m_bps", "return_1x5m_bps"):
        a, b = warm.column(name), old.column(name)
        assert np.isfinite(a).all()
        tail = slice(len(a) - 600, None)
        assert np.allclose(a[tail], b[tail], atol=0.05 * np.abs(b).max())
    few = replace(features, features=tuple(f for f in features.features if "return_1x1m" in f.name))
    changed = minutes.copy()
    changed["close"][changed["ts_close"] > first_ns] *= 3.0  # what came later does not matter
    CandleStore(tmp_path / "other").write(changed, *names, "test")
    Store(tmp_path / "other").write(later, of, "test")
    other = bars_before(Store(tmp_path / "other"), *names, few, None)
    mine = bars_before(store, *names, few, None)
    assert other.state.bars.tobytes() == mine.state.bars.tobytes()


# --- long frames ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weeks():
    "A week of a book that moves every ten minutes, with a hole of three hours"
    rng, n = np.random.default_rng(3), 7 * 144
    mids, parts = 10_000 + np.cumsum(rng.integers(-40, 41, n)), []
    for k, mid in enumerate(mids):
        ts = MIDNIGHT_NS + k * 600 * NS_PER_S
        if 57 < k < 76:
            continue
        if k == 76:
            hole = {"kind": KIND_GAP, "size_lots": 18 * 600 * NS_PER_S, "flags": FLAG_LAST}
            parts.append(make_events(ts_recv=ts, **hole))
        made = {"kind": [KIND_CLEAR, KIND_LEVEL, KIND_LEVEL], "side": [0, 1, -1], "ts_recv": ts}
        made |= {"price_ticks": [0, mid - 1, mid + 1], "size_lots": [0, 5, 5]}
        parts.append(make_events(**made, flags=[0, 0, FLAG_LAST]))
    return np.concatenate(parts), synthetic_market(seed=1, duration_s=1).instrument


def test_long_frames_and_waves_are_those_of_candles(weeks):
    pytest.importorskip("PyEMD")
    events, of = weeks
    features = feature_set("minimal+trend_1h+trend_4h+hilbert", 1_800_000)
    whole = build_features(events, of, features)
    for group in ("trend_1h", "trend_4h", "hilbert"):
        share = [
            np.isfinite(whole.column(f.name)).mean() for f in feature_set(group, 1000).features
        ]
        assert min(share) > 0 or (group == "trend_4h" and max(share) > 0.5), group
    # the same hours, folded from half-hourly ends by hand: the close of an hour is the last mid
    ts = whole.rows["ts"]
    mid = 0.5 * (whole.rows["bid_ticks"] + whole.rows["ask_ticks"]) * of.tick_size
    hours = np.flatnonzero(ts % (3_600 * NS_PER_S) == 0)
    move = 1e4 * (mid[hours[1:]] / mid[hours[:-1]] - 1)
    seen = whole.column("return_1x1h_bps")[hours[1:]]
    known = np.isfinite(seen)
    assert known.sum() > 140 and np.allclose(seen[known], move[known], rtol=1e-12, atol=1e-9)
    hole = int(np.flatnonzero(np.diff(whole.rows["segment"]))[0])
    for name in ("return_1x1h_bps", "return_1x4h_bps"):  # the last bar lay in the hole
        assert np.isfinite(whole.column(name)[hole]) and np.isnan(whole.column(name)[hole + 1])
    stream, parts, begin = FeatureStream(of, features, room=3), [], 0
    for end in [len(events) // 5, len(events) // 4 + 1, len(events) // 3]:
        parts.append(stream.push(events, begin, end))
        begin, stream = end, thaw(freeze(stream), of, features, room=5)
    made = join_rows(*parts)
    assert len(made) > 100 and made.x.tobytes() == whole.x[: len(made)].tobytes()


def test_sets_with_bars_travel_to_other_processes():
    sent = pickle.loads(pickle.dumps(FEW))
    assert sent == FEW and sent.hash == FEW.hash
    assert [f.warm_up_s for f in sent.features] == [f.warm_up_s for f in FEW.features]
