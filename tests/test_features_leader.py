"""A second market beside the book: as received, blind to the future, one pass however cut, refused by name."""

import shutil
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradebook.backtest.parity import compare
from tradebook.base.causes import Cause
from tradebook.base.clock import NS_PER_S
from tradebook.base.errors import DataError, SettingsError
from tradebook.base.journal import Journal
from tradebook.base.settings import load_settings
from tradebook.features.cross import build_cross, mid_stream
from tradebook.features.leader import KIND_BESIDE, UNKNOWN
from tradebook.features.rows import FeatureStream, build_features, join_rows
from tradebook.features.schema import feature_set
from tradebook.features.suite import run_checks
from tradebook.features.two_feeds import LeaderFeed, need_leader, read_beside
from tradebook.market.events import (
    FLAG_LAST,
    KIND_CLEAR,
    KIND_GAP,
    KIND_LEVEL,
    make_events,
    merge_events,
    message_starts,
)
from tradebook.market.store import DAY_NS, Store
from tradebook.market.worlds import make_world
from tradebook.ops.pipeline import backtest_symbol, train_symbol
from tradebook.trader.session import trade_paper
from tradebook.training.building import Request, build_dataset
from tradebook.training.datasets import load_dataset, verify_dataset
from tradebook.training.label_sets import LabelSet
from tradebook.training.partitions import freeze, thaw

MIDNIGHT_NS = 20_000 * DAY_NS
LEADER = "synthetic:SYN/USDT:USDT"
LED = feature_set("minimal+lead+basis", leader=LEADER)
PAIRS = [k for k, f in enumerate(LED.features) if f.name.startswith(("lead", "basis"))]


@pytest.fixture(scope="module")
def world():
    "Ten minutes around midnight; the second market follows the first half a second later"
    return make_world("lead_lag", 7, 600.0, MIDNIGHT_NS - 300 * NS_PER_S).markets


@pytest.fixture(scope="module")
def both(world):
    first, second = world
    told = LeaderFeed(second.instrument, first.instrument).take(first.events)
    return merge_events(second.events, told)


@pytest.fixture(scope="module")
def whole(both, world):
    return build_features(both, world[1].instrument, LED)


def gap_at(events, share, length_s):
    "A hole in a feed: messages are lost, and a snapshot follows"
    starts = message_starts(events)
    at = int(starts[int(share * len(starts))])
    until = int(events["ts_recv"][at]) + round(length_s * NS_PER_S)
    clears = np.flatnonzero(events["kind"] == KIND_CLEAR)
    later = np.searchsorted(events["ts_recv"], until)
    clears = clears[clears >= later]
    end = int(clears[0]) if len(clears) else int(starts[np.searchsorted(starts, later)])
    ts = int(events["ts_recv"][end])
    gap = make_events(kind=KIND_GAP, ts_recv=ts, flags=FLAG_LAST)
    gap["size_lots"] = ts - int(events["ts_recv"][at])
    return np.concatenate([events[:at], gap, events[end:]])


# --- what the columns are -----------------------------------------------------------------------


def test_the_columns_are_those_of_another_program_and_the_book_does_not_notice(world, both, whole):
    first, second = world
    streams = {"own": mid_stream(second.events, second.instrument, 1e6)}
    streams["leader"] = mid_stream(first.events, first.instrument)
    known = build_cross(streams, feature_set("lead_lag"))
    _, ours, theirs = np.intersect1d(whole.rows["ts"], known.ts, return_indices=True)
    at = [LED.index(name) for name in known.feature_set.names]
    np.testing.assert_allclose(whole.x[ours][61:, at], known.x[theirs][61:], atol=5e-4)
    assert whole.column("lead_lag_300s_s")[-1] == 0.5
    plain = build_features(second.events, second.instrument, feature_set("minimal"))
    assert plain.x.tobytes() == whole.x[: len(plain), :14].tobytes()
    assert plain.rows.tobytes() == whole.rows[: len(plain)].tobytes()


def test_a_row_knows_what_was_received_and_nothing_that_was_only_stamped(world):
    first, second = world
    late = first.events.copy()
    late["ts_recv"] += 2 * NS_PER_S  # the same stamps, received two seconds later
    feeds = [LeaderFeed(second.instrument, first.instrument).take(e) for e in (first.events, late)]
    x, slow = (
        build_features(merge_events(second.events, f), second.instrument, LED) for f in feeds
    )
    k = LED.index("leader_return_20s_bps")
    n = min(len(x), len(slow))
    assert np.isfinite(slow.x[60:n, k]).all()
    np.testing.assert_allclose(slow.x[60:n, k], x.x[58 : n - 2, k], atol=1e-9)


def test_a_hole_or_a_silence_of_the_leader_is_unknown_and_the_rest_stays(world, whole):
    first, second = world
    cut = gap_at(first.events, 0.5, 20.0)
    told = LeaderFeed(second.instrument, first.instrument).take(cut)
    made = build_features(merge_events(second.events, told), second.instrument, LED)
    n = min(len(made), len(whole))
    assert made.x[:n, :14].tobytes() == whole.x[:n, :14].tobytes()
    gap = cut["ts_recv"][cut["kind"] == KIND_GAP][0]
    lost = gap - cut["size_lots"][cut["kind"] == KIND_GAP][0]
    ts = made.rows["ts"]
    dark = (ts > lost + 5 * NS_PER_S) & (ts <= gap)
    names = ("leader_return_1s_bps", "leader_gap_1s_bps", "basis_bps")
    assert dark.sum() >= 10 and np.isnan(made.x[dark][:, [LED.index(n) for n in names]]).all()
    score = made.column("basis_score_300s")
    assert np.isnan(score[ts > gap][:290]).all()
    assert not made.is_ready[dark].any()


# --- one pass, however cut ------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(places=st.lists(st.floats(0, 1), max_size=5), room=st.integers(1, 40), ice=st.booleans())
def test_a_feed_cut_anywhere_and_put_on_ice_is_the_recording(both, world, whole, places, room, ice):
    of, parts, begin = world[1].instrument, [], 0
    stream = FeatureStream(of, LED, room=room)
    for end in [*sorted(int(p * len(both)) for p in places), len(both)]:
        parts.append(stream.push(both, begin, end))
        begin = end
        if ice:
            stream = thaw(freeze(stream), of, LED, room=room)
    parts.append(stream.advance_to(int(both["ts_recv"][-1])))
    made = join_rows(*parts)
    assert made.x.tobytes() == whole.x.tobytes() and made.rows.tobytes() == whole.rows.tobytes()


@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.floats(0, 1), max_size=6))
def test_the_leaders_feed_may_be_cut_anywhere_too(world, whole, cuts):
    first, second = world
    ends = [0, *sorted(int(c * len(first.events)) for c in cuts), len(first.events)]
    feed = LeaderFeed(second.instrument, first.instrument)
    told = [feed.take(first.events[a:b]) for a, b in pairwise(ends)]
    made = build_features(merge_events(second.events, *told), second.instrument, LED)
    assert made.x.tobytes() == whole.x.tobytes()


def test_every_check_passes_and_a_later_leader_is_a_future(world, both):
    few = feature_set("default+lead+basis", leader=LEADER)
    found = run_checks(both, world[1].instrument, few, n_rows=6)
    assert [(f.check, f.findings) for f in found] == [(f.check, ()) for f in found]
    assert "leader" in [f.check for f in found]

    def early(events, instrument, features):
        rows = events.copy()
        told = np.flatnonzero(rows["kind"] == KIND_BESIDE)
        rows["size_lots"][told[:-9]] = rows["size_lots"][told[9:]]  # what it will say
        return build_features(rows, instrument, features)

    seen = run_checks(both, world[1].instrument, LED, ("future",), n_rows=4, build=early)
    assert "leader_return_1s_bps" in [f.feature for f in seen[0].findings]


# --- from the store -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory, world):
    folder = tmp_path_factory.mktemp("led")
    for market in world:
        free = replace(market.instrument, taker_fee_bps=0.0)  # so that something is traded
        Store(folder / "market").write(market.events, free, "made")
    return folder, world[1].instrument


def chosen(folder, **more):
    "Settings of a small training with a leader"
    return load_settings(
        environment={},
        overrides={
            "paths.data": str(folder),
            "features.set": "default+lead",
            "features.leader": LEADER,
            "features.interval_ms": "500",
            "labels.horizon_s": "1",
            "labels.dead_zone_bps": "0",
            "training.embargo_s": "5",
            "training.rounds": "25",
            "training.folds": "3",
            "training.min_rows_leaf": "20",
            "gates.min_edge_bps": "0",
            **more,
        },
    )


def test_days_of_a_data_set_go_on_over_midnight_and_change_with_the_leader(
    home, world, whole, tmp_path
):
    folder, of = tmp_path, home[1]
    shutil.copytree(home[0] / "market", folder / "market")
    labels = LabelSet("horizon", 2.0)
    request = Request((("synthetic", of.symbol),), None, None, LED, labels)
    built = build_dataset(folder / "market", folder / "datasets", request)
    data = load_dataset(folder / "datasets", built.id)
    n = len(data)
    assert data.x.tobytes() == whole.x[:n].tobytes() and n >= len(whole) - 1
    assert data.feature_set.leader == ("synthetic", "SYN/USDT:USDT")
    assert built.manifest["markets"][0]["leader"]["coverage"] > 0.99
    assert verify_dataset(folder / "market", folder / "datasets", built.id) == []
    again = build_dataset(folder / "market", folder / "datasets", request)
    assert {d.word for done in again.done.values() for d in done} == {"kept"}
    later = world[0].events[-200:].copy()  # the leader speaks on, the own market does not
    later["ts_recv"] += 10 * NS_PER_S
    later = later[message_starts(later)[1] :]
    Store(folder / "market").write(later, world[0].instrument, "made")
    wrong = verify_dataset(folder / "market", folder / "datasets", built.id)
    assert (
        len(wrong) == 1 and "files of its leader synthetic SYN/USDT:USDT have changed" in wrong[0]
    )
    again = build_dataset(folder / "market", folder / "datasets", request)
    told = [d for done in again.done.values() for d in done if d.kind == "features"]
    assert [(d.word, d.why) for d in told] == [("kept", ""), ("rebuilt", "leader changed")]
    assert load_dataset(folder / "datasets", again.id).x.tobytes() == data.x.tobytes()


def test_a_leader_that_is_missing_too_short_or_the_market_itself_is_refused_by_name(home):
    folder, of = home
    store, names = Store(folder / "market"), ("synthetic", of.symbol)
    start = MIDNIGHT_NS - 300 * NS_PER_S
    span = start, start + 600 * NS_PER_S
    with pytest.raises(DataError, match="features.leader okx BTC/USDT must be in the store"):
        need_leader(store, *names, feature_set("lead", leader="okx:BTC/USDT"), *span)
    with pytest.raises(DataError, match="another market than the own one"):
        need_leader(store, *names, feature_set("lead", leader=f"synthetic:{of.symbol}"), *span)
    with pytest.raises(DataError, match="choose a span within"):
        need_leader(store, *names, LED, start + DAY_NS, start + 2 * DAY_NS)
    assert need_leader(store, *names, feature_set(), *span) is None
    for use in (trade_paper, backtest_symbol, train_symbol):
        with pytest.raises(DataError, match="okx BTC/USDT must be in the store"):
            use(chosen(folder, **{"features.leader": "okx:BTC/USDT"}), *names)
        with pytest.raises(SettingsError, match="name it: features.leader"):
            use(chosen(folder, **{"features.leader": ""}), *names)


def test_the_planted_lead_is_learned_and_paper_equals_backtest(home):
    folder, of = home
    own, names = chosen(folder), ("synthetic", of.symbol)
    with_ = train_symbol(own, *names, None, MIDNIGHT_NS + 200 * NS_PER_S)
    plain = chosen(folder, **{"features.set": "default", "features.leader": ""})
    without = train_symbol(plain, *names, None, MIDNIGHT_NS + 200 * NS_PER_S, is_promoted=False)
    assert with_["auc"] > 0.6 and with_["auc"] > without["auc"] + 0.08
    span = MIDNIGHT_NS - 120 * NS_PER_S, MIDNIGHT_NS + 300 * NS_PER_S
    backtest = backtest_symbol(own, *names, *span)
    paper = trade_paper(own, *names, *span)
    with Journal(folder / "journal.db") as journal:
        rows = [journal.decisions(r) for r in (backtest.run_id, paper["run_id"])]
        fills = [journal.fills(r) for r in (backtest.run_id, paper["run_id"])]
    parity = compare(*rows, *fills)
    assert parity.is_exact and paper["n_predictions"] > 200, parity.first_difference
    assert paper["n_orders"] == backtest.facts["n_orders"]
    assert paper["leader"]["symbol"] == "SYN/USDT:USDT"


def test_a_model_of_one_leader_is_refused_with_another(home, world):
    folder, of = home
    other = replace(world[0].instrument, symbol="ELSE/USDT:USDT")
    Store(folder / "market").write(world[0].events, other, "made")
    own = chosen(folder, **{"features.leader": "synthetic:ELSE/USDT:USDT"})
    told = trade_paper(own, "synthetic", of.symbol, MIDNIGHT_NS, MIDNIGHT_NS + 60 * NS_PER_S)
    assert told["block"] == str(Cause.FEATURE_SCHEMA_MISMATCH)
    assert "another leader" in told["detail"] and told["n_orders"] == 0


def test_pieces_of_the_store_are_the_two_feeds_and_hold_little(home, both, monkeypatch):
    folder, of = home
    store, ts = Store(folder / "market"), both["ts_recv"]
    pieces = list(read_beside(store, "synthetic", of.symbol, LED, int(ts[0]), int(ts[-1]) + 1))
    rows = np.concatenate(pieces)
    own = rows["kind"] != KIND_BESIDE
    assert rows[own].tobytes() == both[both["kind"] != KIND_BESIDE].tobytes()
    assert (np.diff(rows["ts_recv"]) >= 0).all() and (rows["size_lots"][~own] != UNKNOWN).all()
    assert not np.isin(rows["kind"][~own], (KIND_LEVEL, KIND_CLEAR)).any()
    span_s = (int(ts[-1]) - int(ts[0])) / 1e9
    assert (~own).sum() <= 10 * span_s + len(pieces) + 1
