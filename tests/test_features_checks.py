"""Every check of features on synthetic, recorded and random events; planted faults are caught by the column's name."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numba import njit
from test_features_kernel import random_events

from tradebook.collector.wire_files import read_frames
from tradebook.features.checks import mirror_events, probe_mirror, probe_stream
from tradebook.features.claims import probe_holes, probe_scale, probe_warm_up, scale_events
from tradebook.features.columns import Feature
from tradebook.features.edges import AGAIN_S, ODD_S, SCENES, probe_edges, scene_events
from tradebook.features.futures import FUTURES, other_future, probe_future
from tradebook.features.health import FeatureHealth, range_from, range_record, training_range
from tradebook.features.messages import book_tops, features_of_tops, message_features
from tradebook.features.rows import build_features
from tradebook.features.schema import feature_set, plus
from tradebook.features.suite import CHECKS, piece_of, run_checks
from tradebook.market.book import BOOK_LOCKED, apply_events, new_book
from tradebook.market.events import check_events, message_starts
from tradebook.market.instruments import instrument
from tradebook.market.snapshots import read_snapshots
from tradebook.market.synthetic import synthetic_market

SYN = instrument("synthetic", "SYN/USDT:USDT")
DESK = feature_set("desk")
SMALL = feature_set("minimal").only("spread_bps", "imbalance_1", "imbalance_5", "return_5s_bps")


@pytest.fixture(scope="module")
def market():
    "Fourteen minutes of the synthetic market: longer than the slowest column takes to settle"
    return synthetic_market(seed=5, duration_s=840).events


@pytest.mark.parametrize("name", ["default", "desk"])
def test_all_checks_hold_on_a_made_market(market, name):
    found = run_checks(market, SYN, feature_set(name), n_rows=4, seed=3)
    idle = ("bars", "leader", "funding")
    assert [c.check for c in found] == [name for name in CHECKS if name not in idle]
    assert [f for c in found for f in c.findings] == []
    assert all(c.is_good and c.n_values > 1_000 for c in found)


@pytest.fixture(scope="module")
def standx(recordings):
    day = recordings / "standx"
    files = [day / f"BTC-USD_{kind}_2026-01-06.parquet" for kind in ("book20", "trades")]
    imported = read_snapshots(*files)
    return piece_of(imported.events, most_s=700), imported.instrument


@pytest.fixture(scope="module")
def frames(recordings):
    imported = read_frames(recordings / "binance/usdm_btcusdt_20240808.gz")
    return piece_of(imported.events, most_rows=150_000), imported.instrument


@pytest.mark.recordings
@pytest.mark.parametrize("name", ["standx", "frames"])
def test_all_checks_hold_on_recordings(name, request):
    events, of = request.getfixturevalue(name)
    found = run_checks(events, of, DESK, n_rows=3, seed=1)
    assert [str(f) for c in found for f in c.findings] == []
    assert all(c.is_good for c in found)


# --- planted faults -----------------------------------------------------------------------------------------------


def spoiled(column, change):
    "A builder that does something to one column"

    def build(events, of, features):
        made = build_features(events, of, features)
        k, x = features.index(column), made.x.copy()
        x[:, k] = change(x[:, k])
        return replace(made, x=x)

    return build


LEAKS = {
    "the next row": lambda v: np.append(v[1:], np.nan),
    "the mean of all": lambda v: v - np.nanmean(v),
    "the spread of all": lambda v: v / np.nanstd(v),
    "three rows ahead": lambda v: np.append(v[3:], [np.nan] * 3),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_a_leak_is_caught_by_name(market, leak):
    found = probe_future(market[:20_000], SYN, SMALL, 4, build=spoiled("imbalance_5", LEAKS[leak]))
    (finding,) = found.findings
    assert finding.feature == "imbalance_5" and "changes with the future" in finding.text
    assert finding.was != finding.must


def test_an_abs_in_a_formula_of_ones_own_is_caught_by_name(market):
    "Both are declared as signed; one of them lost its sign"

    @njit
    def lean(view):
        return (view.bid_lots - view.ask_lots) / (view.bid_lots + view.ask_lots)

    @njit
    def lean_without_sign(view):
        return abs(view.bid_lots - view.ask_lots) / (view.bid_lots + view.ask_lots)

    own = plus(SMALL, Feature("my_lean", "ratio", True, "Bid share at the touch"), lean)
    own = plus(own, Feature("my_abs_lean", "ratio", True, "The same, wrong"), lean_without_sign)
    found = probe_mirror(market[:20_000], SYN, own)
    assert [f.feature for f in found.findings] == ["my_abs_lean"]
    assert "change its sign" in found.findings[0].text
    assert probe_future(market[:20_000], SYN, own, 2).is_good
    assert probe_stream(market[:20_000], SYN, own, 50).is_good


def filled(v):
    "Fill what is unknown with the last known value, across a hole too"
    return v[np.maximum.accumulate(np.where(np.isnan(v), 0, np.arange(len(v))))]


def inverse(v):
    "Divide by a spread, which is zero while the book is locked"
    with np.errstate(divide="ignore"):
        return 1 / v


def in_ticks(events, of, features):
    "A builder that forgets to divide the spread by the mid"
    made = build_features(events, of, features)
    x = made.x.copy()
    x[:, features.index("spread_bps")] = made.rows["ask_ticks"] - made.rows["bid_ticks"]
    return replace(made, x=x)


def test_each_claim_is_tried(market):
    piece = market[:40_000]
    scale = probe_scale(piece, SYN, SMALL, in_ticks)
    assert [f.feature for f in scale.findings] == ["spread_bps"]
    early, _ = probe_warm_up(piece, SYN, SMALL, 2, spoiled("return_5s_bps", np.nan_to_num))
    assert [f.feature for f in early.findings] == ["return_5s_bps"]
    hole = probe_holes(piece, SYN, SMALL, 1, spoiled("return_5s_bps", filled))
    assert [f.feature for f in hole.findings] == ["return_5s_bps"]
    edge = probe_edges(SYN, SMALL, build=spoiled("spread_bps", inverse))
    assert "spread_bps" in [f.feature for f in edge.findings]


# --- random events ------------------------------------------------------------------------------------------------

QUICK = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


@settings(max_examples=25, **QUICK)
@given(st.data())
def test_no_random_events_upset_the_widest_set(data):
    events = random_events(data.draw)
    made = build_features(events, SYN, DESK)
    assert not np.isinf(made.x).any()
    assert np.isnan(made.x[made.rows["status"] > BOOK_LOCKED]).all()
    found = probe_stream(events, SYN, DESK, data.draw(st.integers(2, 9)))
    assert found.findings == ()


@settings(max_examples=15, **QUICK)
@given(st.data())
def test_no_random_events_let_a_column_see_ahead(data):
    found = probe_future(random_events(data.draw), SYN, DESK, 2, data.draw(st.integers(0, 99)))
    assert found.findings == ()


@settings(max_examples=25, **QUICK)
@given(st.data())
def test_random_events_in_the_mirror_and_in_finer_units(data):
    events = random_events(data.draw)
    exact = DESK.only(*(f.name for f in DESK.features if not f.is_near and not f.partner))
    assert probe_mirror(events, SYN, exact).findings == ()
    assert probe_scale(events, SYN, exact).findings == ()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_other_futures_are_valid_and_keep_the_past(data):
    events = random_events(data.draw)
    cut = int(data.draw(st.sampled_from(message_starts(events).tolist())))
    book, rng = new_book(), np.random.default_rng(data.draw(st.integers(0, 9)))
    apply_events(book, events, 0, cut)
    for kind in FUTURES:
        other = other_future(events, cut, book, kind, rng)
        check_events(other)
        assert other[:cut].tobytes() == events[:cut].tobytes()
        assert not len(events[cut:]) or (other["ts_recv"][cut:] >= events["ts_recv"][cut]).all()


def test_scenes_and_their_transforms_are_valid():
    for scene in SCENES:
        events = scene_events(scene)
        check_events(events)
        if max((p for _, p, _ in scene.levels), default=0) < 2_000:
            check_events(mirror_events(events))
            check_events(scale_events(events, 10, 10))


# --- health -------------------------------------------------------------------------------------------------------


@pytest.mark.recordings
def test_health_on_a_recording_with_holes(standx):
    events, of = standx
    made = build_features(events, of)
    half = len(made) // 2
    seen = training_range(made.x[:half], made.feature_set)
    seen = range_from(json.loads(json.dumps(range_record(seen))), made.feature_set)
    well, ill, k = FeatureHealth(seen), FeatureHealth(seen), made.feature_set.index("imbalance_5")
    for row, x in zip(made.rows[half:], made.x[half:], strict=True):
        well.update(int(row["ts"]), x)
        x = x.copy()
        x[k] = 7.0
        ill.update(int(row["ts"]), x)
    now = int(made.rows["ts"][-1])
    assert {f.code for f in well.findings(now)} <= {"FEATURE_RANGE"}
    assert "imbalance_5" not in {f.feature for f in well.findings(now)}
    assert "imbalance_5" in {f.feature for f in ill.findings(now)}


# --- the command --------------------------------------------------------------------------------------------------


def tradebook(*words):
    "Call the command line"
    env = {k: v for k, v in os.environ.items() if not k.startswith("TRADEBOOK")}
    command = [sys.executable, "-m", "tradebook", "features", *words]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


def test_features_as_commands():
    listed = json.loads(tradebook("list", "--features", "desk", "--json").stdout)
    assert [c["name"] for c in listed["columns"]] == list(DESK.names)
    assert all(c["unit"] and c["source"] for c in listed["columns"])
    words = ("--synthetic", "--features", "minimal", "--minutes", "2", "--rows", "2", "--json")
    done = tradebook("check", *words)
    assert done.returncode == 0, done.stderr
    assert {c["check"] for c in json.loads(done.stdout)["checks"]} == set(CHECKS) - {
        "bars",
        "leader",
        "funding",
    }
    assert tradebook("check", "--features", "nope").returncode == 2


@pytest.mark.parametrize("fault, check", [("leak", "future"), ("abs", "mirror")])
def test_a_fault_planted_through_the_command_ends_with_6_and_names_the_column(fault, check):
    words = ("--synthetic", "--features", "minimal", "--minutes", "2", "--rows", "2", "--json")
    done = tradebook("check", *words, "--plant", fault)
    told = json.loads(done.stdout)
    assert done.returncode == 6 and [c["check"] for c in told["checks"]] == [check]
    assert [f["feature"] for f in told["checks"][0]["findings"]] == ["microprice_offset_bps"]


def test_a_price_of_zero_and_huge_sizes_break_nothing():
    "A book at zero is unknown, in rows and at every message; what is far and large does not wrap"
    by_name = {scene.name: scene for scene in SCENES}
    for name in ("bid at zero", "locked at zero"):
        events = scene_events(by_name[name])
        made, (ts, x) = build_features(events, SYN, DESK), message_features(events)
        odd = (made.rows["ts"] >= ODD_S * 10**9) & (made.rows["ts"] < AGAIN_S * 10**9)
        assert np.isnan(made.x[odd]).all() and not np.isnan(made.x[~odd]).all()
        assert np.isnan(x[(ts >= ODD_S * 10**9) & (ts < AGAIN_S * 10**9)]).all()
        np.testing.assert_array_equal(x, features_of_tops(book_tops(events)))
        assert not np.isinf(made.x).any() and not np.isinf(x).any()
    far = build_features(scene_events(by_name["huge and far"]), SYN, DESK)
    for column in ("depth_distance_bps", "depth_20", "bid_queue", "bid_slope"):
        assert (far.column(column)[far.rows["status"] <= BOOK_LOCKED] >= 0).all(), column
