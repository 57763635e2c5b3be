"""A replay is quick, sees nothing early, adds up, and equals a loop that takes one message after the other."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradebook.backtest.parity import compare
from tradebook.backtest.replay import run_backtest
from tradebook.backtest.results import block_interval
from tradebook.base.settings import load_settings
from tradebook.features.rows import FeatureStream, build_features
from tradebook.market.events import message_starts
from tradebook.market.instruments import instrument
from tradebook.market.synthetic import synthetic_market
from tradebook.policy.desk import Desk
from tradebook.policy.rules import rules_from
from tradebook.policy.views import Prediction, ViewReader
from tradebook.venue.paper import PaperVenue

MS = 1_000_000
SETTINGS = load_settings(
    environment={},
    overrides={
        "gates.is_edge_gate_on": "false",
        "signal.min_confidence": "0.3",
        "exits.max_holding_s": "7",
        "exits.take_profit_bps": "2",
        "exits.stop_loss_bps": "2",
        "exits.trailing_bps": "1",
    },
)


def guesses(features, seed):
    "Predictions without any skill, the same for the same rows however they were made"
    p = np.random.default_rng(seed).uniform(0, 1, len(features))
    return p, (p - 0.5) * 20


def replayed(events, of, seed=1, latency_ns=50 * MS, features=None):
    "A backtest of guesses"
    features = features or build_features(events, of)
    given = dict(initial_equity_quote=10_000.0, latency_ns=latency_ns)
    return run_backtest(
        events, features, *guesses(features, seed), rules_from(SETTINGS, of), **given
    )


def looped(events, of, seed=1, latency_ns=50 * MS):
    "The same, message by message, as a live loop would have it"
    stream, desk = FeatureStream(of), Desk(rules_from(SETTINGS, of), 10_000.0, "loop")
    venue, reader = PaperVenue(of, latency_ns), ViewReader(stream.feature_set)
    p_all, edge_all = guesses(build_features(events, of), seed)
    decisions, fills, waiting = [], [], []

    def decide_on(new):
        for row, x in zip(new.rows, new.x, strict=True):
            done = waiting + venue.advance_to(int(row["ts"]))
            waiting.clear()
            fills.extend(done)
            desk.settle(done, len(venue.pending))
            n_nan = int(np.isnan(x).sum())
            guess = Prediction(float(p_all[desk.n]), float(edge_all[desk.n]))
            decision, intent = desk.step(reader.read(row, x, n_nan), None if n_nan else guess)
            decisions.append(decision)
            if intent:
                venue.submit(intent)

    starts = message_starts(events).tolist()
    for start, stop in zip(starts, [*starts[1:], len(events)], strict=True):
        decide_on(stream.push(events, start, stop))
        waiting.extend(venue.advance(events, start, stop))
    decide_on(stream.advance_to(int(events["ts_recv"][-1])))
    return decisions, fills + waiting


@pytest.fixture(scope="module")
def market():
    return synthetic_market(seed=11, duration_s=1800)


def assert_same(events, of, latency_ns):
    whole = replayed(events, of, latency_ns=latency_ns)
    decisions, fills = looped(events, of, latency_ns=latency_ns)
    parity = compare(whole.decisions, decisions, whole.fills, fills)
    assert parity.n_differences == 0, parity.first_difference
    assert len(whole.fills) > 20
    return whole


@pytest.mark.parametrize("latency_ns", [0, 50 * MS, 2_500 * MS])
def test_replay_equals_the_loop(market, latency_ns):
    assert_same(market.events, market.instrument, latency_ns)


def test_replay_equals_the_loop_on_a_real_recording_with_holes(recordings):
    from tradebook.market.snapshots import read_snapshots

    events = read_snapshots(recordings / "standx/BTC-USD_book20_2026-01-06.parquet").events
    events = events[: message_starts(events)[25_000]]
    result = assert_same(events, instrument("standx", "BTC/USD:USD"), 50 * MS)
    assert {d["cause"] for d in result.decisions} >= {"DATA_STALE", "FEATURES_WARMING_UP", "ENTER"}


def test_the_past_does_not_depend_on_the_future(market):
    whole = replayed(market.events, market.instrument)
    for share in (0.31, 0.77):
        starts = message_starts(market.events)
        cut = market.events[: starts[int(len(starts) * share)]]
        part = replayed(cut, market.instrument)
        n = len(part.decisions) - 1
        assert n > 500
        known = [f for f in whole.fills if f.ts_fill <= part.decisions[n]["ts_decided"]]
        parity = compare(whole.decisions[:n], part.decisions[:n], known, part.fills[: len(known)])
        assert parity.n_differences == 0, parity.first_difference


@pytest.fixture(scope="module")
def features(market):
    return build_features(market.events, market.instrument)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10_000), latency_ms=st.integers(0, 3000))
def test_money_adds_up_whatever_is_traded(market, features, seed, latency_ms):
    r = replayed(market.events, market.instrument, seed, latency_ms * MS, features)
    t, account = r.trades, r.account
    assert len(t) > 20
    assert t.net_quote.sum() == pytest.approx(t.gross_quote.sum() - t.fee_quote.sum(), abs=1e-9)
    is_open = account.position_lots != 0
    paid_open = account.fees_quote - t.fee_quote.sum()
    assert account.equity_quote - 10_000 == pytest.approx(t.net_quote.sum() - paid_open, abs=1e-6)
    assert is_open or paid_open == pytest.approx(0, abs=1e-9)
    assert sum(f.side * f.size_lots for f in r.fills) == account.position_lots
    rows = [d for d in r.decisions if d["action"] != "none"]
    assert [d["client_order_id"] for d in rows] == [o.client_order_id for o in r.orders]
    assert len({o.client_order_id for o in r.orders}) == len(r.orders)
    assert all(f.ts_fill >= f.ts_sent + latency_ms * MS for f in r.fills)


def test_the_interval_is_seeded_and_rarely_finds_what_is_not_there():
    rng, ts = np.random.default_rng(0), np.arange(400) * 60 * 10**9
    values = rng.normal(0, 5, 400)
    assert block_interval(values, ts) == block_interval(values, ts)
    found = 0
    for _ in range(300):  # trades of one five-minute block share their luck: 80 independent blocks
        crowd = np.repeat(rng.normal(0, 5, 80), 5) + rng.normal(0, 1, 400)
        found += block_interval(crowd, ts, n_draws=300)[0] > 0
    assert found <= 20  # 2.5 % of 300 are 7.5; 20 would come by luck once in 10,000
