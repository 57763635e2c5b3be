"""Worlds: the same seed is the same bytes, the events keep their promises, and what was planted is what is found."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradebook.base.clock import NS_PER_S
from tradebook.base.errors import DataError
from tradebook.market.book import BOOK_OK
from tradebook.market.events import (
    FLAG_LAST,
    KIND_CLEAR,
    KIND_GAP,
    KIND_LEVEL,
    KIND_TRADE,
    check_events,
)
from tradebook.market.excited import (
    STEP_NS,
    STEPS_PER_S,
    blank_plan,
    excited_market,
    usual_plan,
)
from tradebook.market.hawkes import (
    BASE_PER_S,
    CHILDREN,
    N_STREAMS,
    branching,
    hawkes_events,
    jump_table,
    mean_excess,
    mean_rates,
    rescaled_gaps,
)
from tradebook.market.quotes import quotes
from tradebook.market.stylised import (
    lagged_correlation,
    market_facts,
    mid_on_grid,
    returns_on_grid,
    takers,
)
from tradebook.market.synthetic import TRUTH, expected_move_bps
from tradebook.market.worlds import (
    WORLDS,
    make_world,
    measured_lag,
    mirror,
    realised_correlation,
)

ROOT = Path(__file__).resolve().parents[1]
HOUR_S = 3600


@pytest.fixture(scope="module")
def worlds():
    "Two minutes of each"
    return {name: make_world(name, seed=3, duration_s=120) for name in WORLDS}


@pytest.fixture(scope="module")
def hours():
    "Two hours of the experiment and its control"
    return {
        n: make_world(n, seed=5, duration_s=2 * HOUR_S).markets[0] for n in ("null", "imbalance")
    }


def digest(world):
    "One number for all bytes of a world"
    found = hashlib.sha256()
    for market in world.markets:
        found.update(market.events.tobytes())
        found.update(market.truth.tobytes())
    return found.hexdigest()


def seconds_mid(market):
    "Log mid at each second of the truth, bps"
    touch, start = quotes(market.events), int(market.truth["ts"][0])
    return mid_on_grid(market.events, touch, 1.0, start)[0]


def after(market, horizon_s):
    "Pressure, planted and realised move from each second on"
    mid = seconds_mid(market)
    n = len(mid) - horizon_s - 1
    planted = expected_move_bps(market.truth, market.truth["ts"][1 : n + 1], horizon_s)
    moves = (mid[horizon_s:] - mid[:-horizon_s])[1 : n + 1]
    return market.truth["pressure"][1 : n + 1], planted, moves


def block_error(values, seconds=300):
    "Standard error of a mean whose terms overlap"
    n = len(values) // seconds
    return values[: n * seconds].reshape(n, seconds).mean(axis=1).std(ddof=1) / np.sqrt(n)


def test_the_same_seed_is_the_same_bytes_in_another_process():
    code = (
        "import hashlib; from tradebook.market.worlds import make_world\n"
        "for n in ('lead_lag', 'correlated', 'mirrored', 'crash'):\n"
        "    h = hashlib.sha256()\n"
        "    for m in make_world(n, seed=3, duration_s=120).markets:\n"
        "        h.update(m.events.tobytes()); h.update(m.truth.tobytes())\n"
        "    print(n, h.hexdigest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    there = dict(line.split() for line in done.stdout.splitlines())
    for name, found in there.items():
        assert found == digest(make_world(name, seed=3, duration_s=120)), name


def test_another_seed_is_another_world(worlds):
    for name, world in worlds.items():
        assert digest(make_world(name, seed=4, duration_s=120)) != digest(world), name


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_a_longer_market_begins_with_the_shorter_one(seed, duration_s):
    short = excited_market(usual_plan(seed, duration_s), seed)
    long = excited_market(usual_plan(seed, duration_s + 4), seed)
    assert long.events[: len(short.events)].tobytes() == short.events.tobytes()
    assert (long.fair_bps[: len(short.fair_bps)] == short.fair_bps).all()


def test_the_start_only_moves_the_times():
    here, there = (make_world("null", 1, 5, start_ns=t * NS_PER_S) for t in (1_000, 2_000))
    first, second = here.markets[0].events, there.markets[0].events
    assert (second["ts_recv"] - first["ts_recv"] == 1_000 * NS_PER_S).all()
    assert (second["price_ticks"] == first["price_ticks"]).all()


@pytest.mark.parametrize("name", WORLDS)
def test_events_keep_their_promises(worlds, name):
    symbols = [m.instrument.symbol for m in worlds[name].markets]
    assert len(set(symbols)) == len(symbols)
    for market in worlds[name].markets:
        events = market.events
        check_events(events)
        assert set(np.unique(events["kind"])) == {KIND_CLEAR, KIND_LEVEL, KIND_TRADE}
        assert (events["kind"] == KIND_CLEAR).sum() == 1 and events["kind"][0] == KIND_CLEAR
        assert (events["kind"] == KIND_GAP).sum() == 0
        ends = events["ts_recv"][(events["flags"] & FLAG_LAST) > 0]
        assert (np.diff(ends) > 0).all() and (events["ts_recv"] > events["ts_event"]).all()
        trades = events[events["kind"] == KIND_TRADE]
        assert (np.abs(trades["side"]) == 1).all() and (trades["size_lots"] > 0).all()
        assert len(market.truth) == 120 and (np.diff(market.truth["ts"]) == NS_PER_S).all()
        assert market.truth["phase"].max() < len(worlds[name].phases)


@pytest.mark.parametrize("name", WORLDS)
def test_no_book_is_ever_crossed_or_one_sided(worlds, name):
    for market in worlds[name].markets:
        touch = quotes(market.events)
        assert set(np.unique(touch["status"])) == {BOOK_OK}
        assert (touch["ask_ticks"] > touch["bid_ticks"]).all()


@pytest.mark.parametrize("name", WORLDS)
def test_levels_are_told_only_when_they_change(worlds, name):
    sizes = {}
    events = worlds[name].markets[0].events
    for e in events[events["kind"] == KIND_LEVEL][:20_000].tolist():
        key = (e[7], e[4])
        assert sizes.get(key, 0) != e[3]
        sizes[key] = e[3]


def test_trades_take_what_stood_on_their_side(worlds):
    "A buyer pays an ask: no trade within the spread that stood before its step"
    market = worlds["null"].markets[0]
    touch, trades = quotes(market.events), market.events[market.events["kind"] == KIND_TRADE]
    at = np.searchsorted(touch["ts_recv"], trades["ts_recv"]) - 1
    best = np.where(trades["side"] > 0, touch["ask_ticks"][at], touch["bid_ticks"][at])
    assert (trades["side"] * (trades["price_ticks"] - best) >= -6).mean() > 0.98


def test_the_null_world_pays_nobody(hours):
    "Neither the hidden pressure nor the visible imbalance earns what a taker pays, at any horizon"
    market = hours["null"]
    assert (market.truth["strength"] == 0).all()
    touch, start = quotes(market.events), int(market.truth["ts"][0])
    for horizon_s in (1, 5, 30):
        pressure, planted, moves = after(market, horizon_s)
        assert (planted == 0).all()
        gain = pressure * moves
        assert abs(gain.mean()) < 3.5 * block_error(gain), horizon_s
        at = (
            np.searchsorted(
                touch["ts_recv"], start + np.arange(1, len(moves) + 1) * NS_PER_S, "right"
            )
            - 1
        )
        bid, ask = (touch[name][at].astype(float) for name in ("bid_lots", "ask_lots"))
        lean = (bid - ask) / (bid + ask)
        side = np.where(np.abs(lean) > 0.5, np.sign(lean), 0)
        earned = (side * moves)[side != 0]
        assert len(earned) > 1000
        assert earned.mean() < market.instrument.taker_fee_bps, horizon_s  # a round trip costs two


def test_takers_of_the_null_world_tell_nothing_about_its_fair_value(hours):
    "Signs remember, the fair value does not: the price moves by the surprise only"
    market = hours["null"]
    orders = takers(market.events, quotes(market.events))
    assert lagged_correlation(orders["side"].astype(float), orders["side"].astype(float), 1) > 0.2
    second = (orders["ts_event"] - market.truth["ts"][0]) // NS_PER_S
    flow = np.bincount(second, orders["side"], minlength=len(market.truth))[: len(market.truth)]
    moves = np.diff(market.truth["fair_bps"])
    assert lagged_correlation(flow[:-1], moves, 0) > 0.25  # within the second they push
    later = flow[:-2] * moves[1:]
    assert abs(later.mean()) < 3.5 * block_error(later)


def test_the_null_world_leans_as_much_as_the_other(hours):
    found = []
    for market in hours.values():
        orders = takers(market.events, quotes(market.events))
        second = np.minimum(
            (orders["ts_event"] - market.truth["ts"][0]) // NS_PER_S, 2 * HOUR_S - 1
        )
        found.append(np.corrcoef(orders["side"], market.truth["pressure"][second])[0, 1])
    assert min(found) > 0.1 and abs(found[0] - found[1]) < 0.05


def test_the_planted_imbalance_is_found(hours):
    _, planted, moves = after(hours["imbalance"], 30)
    assert 6 < planted.std() < 8
    assert 0.75 < np.polyfit(planted, moves, 1)[0] < 1.25
    assert np.corrcoef(planted, moves)[0, 1] > 0.4
    per_pressure = expected_move_bps(np.array([(0, 6e4, 1.0, 1.0)], TRUTH), 0, 30)
    assert np.std(planted) == pytest.approx(
        per_pressure * hours["imbalance"].truth["pressure"].std(), rel=0.05
    )


@pytest.mark.parametrize("lag_s", [0.2, 0.5, 1.5])
def test_the_planted_lag_is_found(lag_s):
    leader, follower = make_world("lead_lag", seed=2, duration_s=300, lag_s=lag_s).markets
    found, curve = measured_lag(leader, follower)
    assert abs(found - lag_s) <= 0.1
    assert measured_lag(follower, leader)[0] == pytest.approx(-found, abs=0.051)
    assert np.nanmax(curve) > 5 * np.nanmedian(np.abs(curve))


def test_the_follower_has_the_planted_share_of_its_leader():
    leader, follower = (
        m.truth["fair_bps"] for m in make_world("lead_lag", 2, 1200, lag_s=1.0, share=0.7).markets
    )
    assert lagged_correlation(np.diff(leader), np.diff(follower), 1) == pytest.approx(
        0.7**0.5, abs=0.05
    )
    assert np.diff(follower).std() == pytest.approx(np.diff(leader).std(), rel=0.1)


def test_quotes_stand_where_they_belong_when_the_door_opens():
    plan = blank_plan(3)
    plan["impact_bps"], plan["is_open"][20:40], plan["push_bps"][30] = 0.0, False, 5.0
    for seed in range(8):
        touch = quotes(excited_market(plan, seed).events)
        first = touch[21]  # a snapshot and 20 steps came before
        assert first["ts_event"] - touch["ts_event"][20] == 21 * STEP_NS
        assert abs((first["bid_ticks"] + first["ask_ticks"]) / 2 - 600_300) < 7, seed


def test_the_planted_correlation_is_found():
    wanted = np.array([[1, 0.7, -0.3], [0.7, 1, 0.0], [-0.3, 0.0, 1]])
    world = make_world("correlated", seed=2, duration_s=1800, correlation=wanted)
    assert np.abs(realised_correlation(world.markets, 2.0) - wanted).max() < 0.12
    fair = np.array([np.diff(m.truth["fair_bps"]) for m in world.markets])
    assert np.abs(np.corrcoef(fair) - wanted).max() < 0.08


def test_regimes_are_what_the_truth_says():
    market = make_world("regimes", seed=2, duration_s=1800).markets[0]
    fair, phase = np.diff(market.truth["fair_bps"]), market.truth["phase"][:-1]
    spread = [fair[phase == k].std() for k in range(3)]
    assert spread[0] < spread[1] < spread[2] and spread[2] > 2 * spread[0]
    trades = market.events[market.events["kind"] == KIND_TRADE]
    second = (trades["ts_event"] - market.truth["ts"][0]) // NS_PER_S
    per_s = np.bincount(second, minlength=1800)[:1799]
    rates = [per_s[phase == k].mean() for k in range(3)]
    assert rates[0] < rates[1] < rates[2]


def test_the_crash_falls_when_and_as_deep_as_planted():
    world = make_world("crash", seed=2, duration_s=600, at_s=200, fall_bps=500, fall_s=30)
    market, mid = world.markets[0], seconds_mid(world.markets[0])
    phase = market.truth["phase"]
    assert [world.phases[k] for k in phase[[100, 210, 300, 500]]] == list(world.phases)
    fallen = mid[230] - mid[200]
    assert -1.2 * 500 < fallen < -0.8 * 500
    sells = market.events[market.events["kind"] == KIND_TRADE]
    at = (sells["ts_event"] - market.truth["ts"][0]) / NS_PER_S
    assert sells["side"][(at > 200) & (at < 230)].mean() < -0.3
    touch = quotes(market.events)
    second = (touch["ts_event"] - market.truth["ts"][0]) / NS_PER_S
    in_fall = (second > 202) & (second < 230)
    assert np.median(touch["bid_lots"][in_fall]) < np.median(touch["bid_lots"][second < 200]) / 3


def test_a_halt_is_silence_with_a_standing_book():
    world = make_world("halt", seed=2, duration_s=120, at_s=40, halt_s=30)
    market = world.markets[0]
    start = market.truth["ts"][0]
    stop_ns, again_ns = start + 40 * NS_PER_S, start + 70 * NS_PER_S
    during = (market.events["ts_event"] > stop_ns) & (market.events["ts_event"] < again_ns)
    assert during.sum() == 0
    assert (market.events["kind"] == KIND_GAP).sum() == 0
    assert (~market.truth["is_open"]).sum() == 30 == (market.truth["phase"] == 1).sum()
    touch = quotes(market.events)
    last = np.searchsorted(touch["ts_event"], stop_ns, "right") - 1
    first = last + 1
    assert touch["status"][last] == BOOK_OK and touch["ts_event"][first] == again_ns + STEP_NS
    fair = 600_000 * (1 + market.truth["fair_bps"][71] * 1e-4)  # a second after
    after_ticks = (touch["bid_ticks"][first] + touch["ask_ticks"][first]) / 2
    assert abs(after_ticks - fair) < 400


@pytest.mark.parametrize("name", [n for n in WORLDS if n != "mirrored"])
def test_a_mirror_is_exact(worlds, name):
    plain = worlds[name].markets[-1]
    image = mirror(plain)
    check_events(image.events)
    here, there = quotes(plain.events), quotes(image.events)
    assert (np.diff(here["bid_ticks"]) == -np.diff(there["ask_ticks"])).all()
    assert (np.diff(here["ask_ticks"]) == -np.diff(there["bid_ticks"])).all()
    assert (here["bid_lots"] == there["ask_lots"]).all()
    assert (here["ts_recv"] == there["ts_recv"]).all()
    assert (image.truth["fair_bps"] == -plain.truth["fair_bps"]).all()
    again = mirror(image)
    assert again.events.tobytes() == plain.events.tobytes()
    assert again.truth["fair_bps"].tobytes() == plain.truth["fair_bps"].tobytes()


def test_the_mirrored_world_is_a_market_and_its_mirror(worlds):
    plain, image = worlds["mirrored"].markets
    assert image.events.tobytes() == mirror(plain).events.tobytes()
    assert image.instrument.symbol != plain.instrument.symbol
    other = make_world("mirrored", seed=3, duration_s=120, of="crash", fall_bps=100)
    assert (
        other.markets[1].truth["fair_bps"][65] > 50 > -50 > other.markets[0].truth["fair_bps"][65]
    )


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("cresh", {}, "did you mean"),
        ("null", {"strength": 1}, "strength"),
        ("crash", {"at_s": 115}, "must lie within"),
        ("halt", {"halt_s": 0}, "must lie within"),
        ("lead_lag", {"lag_s": 0}, "lag_s 0.05 or more"),
        ("lead_lag", {"share": 1.0}, "share"),
        ("correlated", {"correlation": 0.95}, "below 0.9"),
        ("correlated", {"correlation": [[1, 0.5], [0.4, 1]]}, "correlation matrix"),
        ("regimes", {"stay_s": 0}, "stay_s"),
        ("mirrored", {"of": "nil"}, "must be one of"),
    ],
)
def test_what_cannot_be_made_is_refused(name, wrong, says):
    with pytest.raises(DataError, match=says):
        make_world(name, duration_s=120, **wrong)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.floats(0, 0.12), min_size=18, max_size=18),
    st.lists(st.floats(0.5, 20), min_size=3, max_size=3),
)
def test_mean_rates_solve_their_equation(shares, base):
    children = np.zeros((3, 3, 2, 3))
    children[..., 1] = np.reshape(shares, (3, 3, 2))
    rates = mean_rates(np.array(base), children)
    np.testing.assert_allclose(rates, np.repeat(base, 2) + branching(children) @ rates, rtol=1e-9)
    excess = mean_excess(np.array(base), children)
    np.testing.assert_allclose(excess.sum(axis=1) + np.repeat(base, 2), rates, rtol=1e-9)


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_gaps_are_exponential_on_the_intensity_s_own_clock(seed):
    times, streams = hawkes_events(seed, 60)
    gaps = rescaled_gaps(times, streams, np.repeat(BASE_PER_S, 2), mean_excess(), jump_table())
    ordered, n = np.sort(gaps), len(gaps)
    distance = np.abs(1 - np.exp(-ordered) - (np.arange(n) + 0.5) / n).max() + 0.5 / n
    assert distance < 2.2 / np.sqrt(n)  # one in ten thousand
    assert abs(gaps.mean() - 1) < 5 / np.sqrt(n)


def test_streams_have_their_mean_rates():
    _, streams = hawkes_events(3, 1200)
    found = np.bincount(streams, minlength=N_STREAMS) / 1200
    assert np.abs(found / mean_rates() - 1).max() < 0.12
    with pytest.raises(DataError, match="die out"):
        hawkes_events(3, 1, children=CHILDREN * 2)


def test_the_fair_value_moves_as_planned_where_nobody_trades():
    plan = blank_plan(5)
    plan["push_bps"], plan["impact_bps"] = 0.25, 0.0
    made = excited_market(plan)
    np.testing.assert_allclose(np.diff(made.fair_bps), 0.25)
    touch = quotes(made.events)
    mid = (touch["bid_ticks"] + touch["ask_ticks"]) / 2
    assert abs(mid[-1] - 600_000 * (1 + 5 * STEPS_PER_S * 0.25e-4)) < 100


def test_the_made_market_has_the_facts_of_a_liquid_perpetual(hours):
    "Wide bounds: what every recording of a liquid perpetual has"
    facts = market_facts(hours["null"].events)
    assert facts["Fano factor, 1 s"] > 3 and facts["kurtosis, 1 s"] > 4
    assert 0.2 < facts["sign memory, lag 1"] < 0.6 and facts["sign memory, lag 10"] > 0.05
    assert facts["spread of one tick"] > 0.95
    assert 0.8 < facts["volatility at 1 s, bps/√s"] < 2
    assert abs(facts["memory of 1 s returns"]) < 0.1 < facts["memory of |1 s returns|"] + 0.08
    assert 0.1 < facts["impact after 0.1 s, bps"] <= facts["impact after 1 s, bps"] < 1


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 60), st.sampled_from([0.5, 1.0, 3.0]))
def test_no_return_crosses_a_hole(at_s, every_s):
    market = make_world("null", seed=1, duration_s=70).markets[0]
    cut = np.searchsorted(market.events["ts_recv"], market.truth["ts"][0] + (at_s + 1) * NS_PER_S)
    gap = np.zeros(1, market.events.dtype)
    gap["ts_recv"], gap["size_lots"] = market.events["ts_recv"][cut], NS_PER_S
    gap["kind"], gap["flags"] = KIND_GAP, FLAG_LAST
    holed = np.concatenate([market.events[:cut], gap, market.events[cut:]])
    whole = returns_on_grid(market.events, quotes(market.events), every_s)
    found = returns_on_grid(holed, quotes(holed), every_s)
    missing = np.isnan(found)
    assert 1 <= missing.sum() <= 2 + 1 / every_s and not np.isnan(whole).any()
    kept = min(len(whole), len(found))
    both = ~missing[:kept]
    np.testing.assert_allclose(found[:kept][both], whole[:kept][both])
