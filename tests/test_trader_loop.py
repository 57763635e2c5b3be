"""The loop: any cut of the feed gives the same run, the backtest agrees exactly, nothing is lost when it breaks."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tradebook.backtest.parity import compare
from tradebook.backtest.replay import run_backtest
from tradebook.base.causes import Cause
from tradebook.base.journal import Journal
from tradebook.base.settings import load_settings
from tradebook.collector.folder import import_folder
from tradebook.features.rows import build_features
from tradebook.features.schema import feature_set
from tradebook.market.events import message_starts
from tradebook.market.store import Store
from tradebook.market.synthetic import synthetic_market
from tradebook.policy.rules import NEVER, rules_from
from tradebook.trader.feed import StoreFeed
from tradebook.trader.loop import PaperTrader, RunLog

# The book's lean, loud enough to pass the gates: what is tested is the loop, and it needs trades to be tested on.
CHOSEN = load_settings(environment={}, overrides={"gates.max_spread_bps": 50})


class Leaning:
    "Anything that predicts serves the loop"

    class model:
        version, facts = "leaning", {}

        def expires_ns(max_age_days):
            return NEVER  # nothing learned, nothing to forget

    def __init__(self, slope_bps=60.0):
        self.at, self.slope_bps = feature_set().index("imbalance_5"), slope_bps

    def predict(self, x):
        p = 0.5 + 0.3 * x[:, self.at]
        return p, self.slope_bps * (p - 0.5)

    def predict_row(self, x):
        p = 0.5 + 0.3 * float(x[self.at])
        return p, self.slope_bps * (p - 0.5)


def trade(journal, of, events, pieces, predictor, chosen=CHOSEN, block=None):
    "One paper run; its decisions, fills and summary"
    start = dict(settings_hash=chosen.hash, settings=chosen.to_dict(), code_version="0")
    log = RunLog(journal, journal.start_run("paper", **start), chosen.trader.journal_flush_rows)
    summary = PaperTrader(chosen, of, log, predictor, block).run(events, pieces)
    return journal.decisions(log.run_id), journal.fills(log.run_id), summary


def replay(of, events, predictor, chosen=CHOSEN):
    "The backtest of the same stretch"
    rows = build_features(events, of)
    p_up, edge = predictor.predict(rows.x)
    return run_backtest(
        events,
        rows,
        p_up,
        edge,
        rules_from(chosen, of),
        initial_equity_quote=chosen.backtest.initial_equity_quote,
        latency_ns=chosen.backtest.order_latency_ms * 1_000_000,
    )


def messages(events):
    "Places of the messages"
    starts = message_starts(events)
    return list(zip(starts.tolist(), [*starts[1:].tolist(), len(events)], strict=True))


@pytest.fixture(scope="module")
def market():
    return synthetic_market(seed=11, duration_s=420)


@pytest.fixture
def journal(tmp_path):
    with Journal(tmp_path / "journal.db") as opened:
        yield opened


def test_message_by_message_equals_the_backtest(market, journal):
    predictor = Leaning()
    run = trade(journal, market.instrument, market.events, messages(market.events), predictor)
    done = replay(market.instrument, market.events, predictor)
    parity = compare(done.decisions, run[0], done.fills, run[1])
    assert parity.n_decisions >= 419 and parity.n_differences == 0, parity.first_difference
    assert len(run[1]) >= 10, "a comparison without fills proves little"


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cuts=st.lists(st.integers(1, 10**9), min_size=0, max_size=60))
def test_any_cut_of_the_feed_gives_the_same_run(market, journal, cuts):
    events, predictor = market.events, Leaning()
    starts = message_starts(events)
    at = sorted({int(starts[c % len(starts)]) for c in cuts} | {0})
    pieces = list(zip(at, [*at[1:], len(events)], strict=True))
    run = trade(journal, market.instrument, events, pieces, predictor)
    done = replay(market.instrument, events, predictor)
    parity = compare(done.decisions, run[0], done.fills, run[1])
    assert parity.n_differences == 0, parity.first_difference


@pytest.mark.parametrize("latency_ms", [0, 999, 1000, 2500])
def test_parity_holds_at_any_latency(market, journal, latency_ms):
    "An order that is due exactly at a grid time, and one that is due after the next decision"
    chosen = CHOSEN.with_overrides({"backtest.order_latency_ms": latency_ms})
    predictor = Leaning()
    events = market.events[: int(message_starts(market.events)[2500])]
    run = trade(journal, market.instrument, events, messages(events), predictor, chosen)
    done = replay(market.instrument, events, predictor, chosen)
    parity = compare(done.decisions, run[0], done.fills, run[1])
    assert parity.n_differences == 0, parity.first_difference
    assert run[1], "no fill at this latency"
    assert all(f["ts_fill"] - f["ts_sent"] >= latency_ms * 1_000_000 for f in run[1])


def test_money_adds_up_and_no_order_stays_open(market, journal):
    run = trade(journal, market.instrument, market.events, messages(market.events), Leaning())
    decisions, fills, summary = run
    fees = sum(f["fee_quote"] for f in fills)
    assert np.isclose(summary["fees_quote"], fees)
    assert np.isclose(summary["equity_quote"], 10_000 + summary["gross_quote"] - fees)
    lots = sum(f["side"] * f["size_lots"] for f in fills)
    assert lots == summary["position_lots"]
    run_id = journal.latest_run("paper")["run_id"]
    states = [o["state"] for o in journal.orders(run_id)]
    assert states.count("intent") == summary["n_open_orders"] <= 1
    assert len(decisions) == summary["n_decisions"] == summary["n_rows"]


def test_every_intent_is_written_before_its_fill(market, journal):
    trade(journal, market.instrument, market.events, messages(market.events), Leaning())
    run_id = journal.latest_run("paper")["run_id"]
    intended = {o["client_order_id"]: o["ts_intent"] for o in journal.orders(run_id)}
    for fill in journal.fills(run_id):
        assert intended[fill["client_order_id"]] <= fill["ts_fill"]


def test_a_standing_block_and_a_freeze_stop_entries_by_name(market, journal):
    events = market.events[: int(message_starts(market.events)[1500])]
    given_ = (journal, market.instrument, events, messages(events), Leaning())
    decisions, fills, _ = trade(*given_, block=Cause.SYMBOL_SHORT_HISTORY)
    assert not fills and {d["cause"] for d in decisions} == {"SYMBOL_SHORT_HISTORY"}
    journal.freeze("OTHER/USDT", "not this one", "test", 1)
    assert trade(*given_)[1], "a freeze of another symbol must not stop this one"
    number = journal.freeze(market.instrument.symbol, "this one", "test", 1)
    decisions, fills, _ = trade(*given_)
    assert not fills and "FROZEN" in {d["cause"] for d in decisions}
    journal.lift(number, "test", 2)
    assert trade(*given_)[1]


def test_a_freeze_during_a_run_stops_entries_and_lets_exits_go(market, journal):
    events = market.events
    pieces, chosen = messages(events), CHOSEN.with_overrides({"trader.journal_flush_rows": 20})

    def freezing():
        for i, piece in enumerate(pieces):
            if i == len(pieces) // 2:
                journal.freeze(None, "half time", "test", 1)
            yield piece

    decisions, fills, summary = trade(
        journal, market.instrument, events, freezing(), Leaning(), chosen
    )
    entries = [d["n"] for d in decisions if d["action"] == "enter"]
    frozen = [d["n"] for d in decisions if d["cause"] == "FROZEN"]
    assert entries and frozen and max(entries) < min(frozen)
    assert summary["position_lots"] == 0, "the open position must have been closed"


def test_parity_on_real_recordings_with_holes(recordings, journal, tmp_path):
    "Holes, locked books, trades without a side: four hours of a real perpetual"
    store = Store(tmp_path / "market")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("BTC-USD_book20_2026-01-06.parquet", "BTC-USD_trades_2026-01-06.parquet"):
        (source / name).symlink_to(Path(recordings).resolve() / "standx" / name)
    import_folder(source, store, tmp_path)
    row = store.listing()[0]
    start = row["start_ns"] + 3600 * 10**9
    feed = StoreFeed(store, row["venue"], row["symbol"], start, start + 4 * 3600 * 10**9)
    predictor = Leaning(slope_bps=400.0)
    run = trade(journal, feed.instrument, feed.events, feed, predictor)
    done = replay(feed.instrument, feed.events, predictor)
    parity = compare(done.decisions, run[0], done.fills, run[1])
    assert parity.n_decisions > 14_000 and parity.n_differences == 0, parity.first_difference
    assert len(run[1]) > 20
    causes = {d["cause"] for d in run[0]}
    assert causes & {"DATA_STALE", "DATA_GAP"} and "FEATURES_WARMING_UP" in causes
