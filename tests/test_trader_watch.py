"""Rows outside of training and dead features open nothing, exits pass, and paper equals the backtest."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import test_trader_loop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_training_model import QUICK, drawn

from tradebook.backtest.parity import compare
from tradebook.backtest.replay import run_backtest
from tradebook.base.causes import Cause
from tradebook.base.journal import Journal
from tradebook.base.settings import load_settings
from tradebook.collector.folder import import_folder
from tradebook.features.health import range_of, range_record
from tradebook.features.rows import FeatureRows, build_features
from tradebook.features.schema import feature_set
from tradebook.market.events import KIND_TRADE, message_starts
from tradebook.market.instruments import instrument
from tradebook.market.store import Store
from tradebook.market.synthetic import synthetic_market
from tradebook.ops.checks import check_features
from tradebook.ops.funnel import funnel, ranked_causes
from tradebook.policy.account import Account
from tradebook.policy.decide import decide
from tradebook.policy.rules import NEVER, rules_from
from tradebook.policy.views import MarketView, Prediction
from tradebook.trader.feed import StoreFeed
from tradebook.trader.loop import PaperTrader, RunLog
from tradebook.trader.session import choose_model
from tradebook.trader.states import SymbolState
from tradebook.training.model import fit_direction
from tradebook.training.normal import normal_facts
from tradebook.training.outliers import FARTHEST, OutlierGuard
from tradebook.training.publish import publish
from tradebook.training.watch import Fitness, RowWatch

CHOSEN = load_settings(environment={}, overrides={"gates.max_spread_bps": 50})
COLUMNS = feature_set()


def record_of(x, columns=COLUMNS):
    "What a version keeps of its training, through JSON as on the disk"
    ranges = OutlierGuard.fit(x, columns.names).to_dict()
    seen = range_record(range_of(x, columns.hash, columns.names))
    facts = {"feature_names": columns.names, "note": {"normal": {"ranges": ranges, "seen": seen}}}
    return json.loads(json.dumps(facts))


class Leaning(test_trader_loop.Leaning):
    "The book's lean, loud enough to pass the gates, with a record of some training"

    def __init__(self, facts, slope_bps=60.0):
        super().__init__(slope_bps)
        self.at = COLUMNS.index("imbalance_5")
        self.model = type("Model", (), {"version": "leaning", "facts": facts})
        self.model.expires_ns = staticmethod(lambda days: NEVER)


def paper(journal, of, events, pieces, predictor, chosen=CHOSEN):
    "One paper run; its id and summary"
    start = dict(settings_hash=chosen.hash, settings=chosen.to_dict(), code_version="0")
    log = RunLog(journal, journal.start_run("paper", **start), chosen.trader.journal_flush_rows)
    summary = PaperTrader(chosen, of, log, predictor).run(events, pieces)
    journal.finish_run(log.run_id, "ok", summary)
    return log.run_id, summary


def replayed(of, events, rows, predictor, chosen=CHOSEN):
    "The backtest of the same stretch"
    return run_backtest(
        events,
        rows,
        *predictor.predict(rows.x),
        rules_from(chosen, of),
        initial_equity_quote=chosen.backtest.initial_equity_quote,
        latency_ns=chosen.backtest.order_latency_ms * 1_000_000,
        watched=RowWatch.of(predictor.model.facts, rows.feature_set).take(rows),
    )


def pieces_of(events, step=7):
    "Places of some messages at a time"
    starts = message_starts(events)[::step].tolist()
    return list(zip(starts, [*starts[1:], len(events)], strict=True))


@pytest.fixture(scope="module")
def market():
    return synthetic_market(seed=11, duration_s=1_200)


@pytest.fixture(scope="module")
def rows(market):
    return build_features(market.events, market.instrument)


@pytest.fixture
def journal(tmp_path):
    with Journal(tmp_path / "journal.db") as opened:
        yield opened


S = 1_000_000_000
OF = instrument("synthetic", "SYN/USDT:USDT")
RULES = rules_from(load_settings(environment={}), OF)
CALM = MarketView(100 * S, 100 * S, 600_000, 600_001, 0, 0.02, 4.0, 900.0, 0)
low_ends = st.floats(-1e6, 1e6)
lengths = st.sampled_from([0.0, 1e-9, 0.5, 1.0, 1e6])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(low_ends, lengths, st.floats(0, 1)), min_size=1, max_size=8), st.data())
def test_inside_is_never_outside_and_far_outside_always_is(columns, data):
    low, length, share = np.array(columns).T
    guard = OutlierGuard(tuple(f"c{k}" for k in range(len(low))), low, low + length)
    inside = np.clip(low + share * length, guard.low, guard.high)
    assert guard.check(inside) is None
    k = data.draw(st.integers(0, len(low) - 1))
    far = inside.copy()
    side = data.draw(st.sampled_from([-1, 1]))
    by = data.draw(st.floats(1.0, 1e9)) * max(guard.high[k] - guard.low[k], 1e-3)
    far[k] = guard.high[k] + by if side > 0 else guard.low[k] - by
    found = guard.check(far)
    assert found.name == f"c{k}" and found.n_columns == 1
    assert RULES.max_outside < found.distance <= FARTHEST and math.isfinite(found.distance)
    surely = Prediction(0.9, 90.0, found.distance, str(found), 0)
    assert decide(CALM, surely, Account(1e4), RULES).cause is Cause.FEATURE_OUTLIER
    fine = Prediction(0.9, 90.0, 0.0, "", 0)
    assert decide(CALM, fine, Account(1e4), RULES).cause is Cause.ENTER


@pytest.mark.parametrize("wild", [Prediction(0.9, 90.0, FARTHEST, "x was 9", 44, "x stood still")])
def test_an_exit_passes_and_the_gates_can_be_switched_off(wild):
    old = Account(1e4, 33, 60_000.0, 100 * S - RULES.max_holding_ns, 0.0)
    assert decide(CALM, wild, old, RULES).cause is Cause.EXIT_TIME
    assert decide(CALM, wild, Account(1e4), RULES).cause is Cause.FEATURE_DEAD
    alive = wild._replace(n_dead=0, dead="")
    assert decide(CALM, alive, Account(1e4), RULES).cause is Cause.FEATURE_OUTLIER
    off = {"gates.max_outside": 0, "gates.is_health_gate_on": False}
    free = rules_from(load_settings(environment={}, overrides=off), OF)
    assert decide(CALM, wild, Account(1e4), free).cause is Cause.ENTER
    unknown = decide(CALM, Prediction(0.9, 90.0), Account(1e4), RULES)
    assert unknown.cause is Cause.ENTER, "a model without a record stays tradable"
    assert [g.name for g in unknown.gates if "not known" in g.detail] == [
        "dead features",
        "outside training",
    ]


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_cut_of_the_rows_gives_the_same_verdicts_and_none_looks_ahead(rows, data):
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    x, table = rows.x[400:].copy(), rows.rows[400:].copy()
    x[random.random(x.shape) < 0.01] = np.nan
    k, at = random.integers(x.shape[1]), random.integers(len(x))
    x[at:, k] = random.choice([np.nan, x[at, k], 1e9])
    table["segment"] += np.cumsum(random.random(len(x)) < 0.003)
    table["ts_book"][random.random(len(x)) < 0.05] = 0  # a book nobody believes
    ill, facts = FeatureRows(table, x, COLUMNS), record_of(rows.x[:400])
    whole = RowWatch.of(facts, COLUMNS).take(ill)
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, len(x)), max_size=20))), len(x)]
    watch = RowWatch.of(facts, COLUMNS)
    parts = [watch.take(ill, a, b) for a, b in itertools.pairwise(cuts)]
    assert np.concatenate([p.verdicts for p in parts]).tobytes() == whole.verdicts.tobytes()
    head = RowWatch.of(facts, COLUMNS).take(ill[: len(x) // 2])
    assert head.verdicts.tobytes() == whole.verdicts[: len(x) // 2].tobytes()
    last = RowWatch.of(facts, COLUMNS).take(ill)
    assert str(last.at(len(x) - 1)) == str(whole.at(len(x) - 1))
    assert np.isfinite(whole.verdicts["outside"]).all()


def test_the_loop_and_the_backtest_refuse_the_same_rows(market, rows, journal):
    calm = int(np.argmin(rows.column("volatility_60s_bps")[60:540])) + 60
    predictor = Leaning(record_of(rows.x[calm : calm + 60]))  # knows one quiet minute
    given_ = market.instrument, market.events
    run_id, summary = paper(journal, *given_, pieces_of(market.events), predictor)
    done = replayed(*given_, rows, predictor)
    found = journal.decisions(run_id)
    parity = compare(done.decisions, found, done.fills, journal.fills(run_id))
    assert parity.n_differences == 0 and parity.n_decisions == len(rows), parity.first_difference
    refused = [d for d in found if d["cause"] == "FEATURE_OUTLIER"]
    assert len(refused) > 20 and journal.fills(run_id)
    for row in refused:
        gate = next(g for g in json.loads(row["gates"]) if g["name"] == "outside training")
        assert gate["value"] == row["outside"] > 0.5 and gate["detail"] == row["outlier"]
        assert row["outlier"].split()[0] in COLUMNS.names and "training knew" in row["outlier"]
    entered = [d for d in found if d["action"] == "enter"]
    assert entered and all(d["outside"] <= 0.5 for d in entered)
    verdicts = RowWatch.of(predictor.model.facts, COLUMNS).take(rows).verdicts
    assert summary["n_outside"] == (verdicts["outside"] > 0.5).sum()
    told = next(c for c in ranked_causes(journal, run_id) if c.cause == "FEATURE_OUTLIER")
    assert "Most often" in told.meaning and dict(funnel(journal, run_id))["outside training gate"]


def test_a_dead_feed_of_trades_stops_entries_by_name_and_lets_exits_go(market, journal):
    events = market.events
    half = int(events["ts_recv"][0]) + 600 * S
    events = events[(events["kind"] != KIND_TRADE) | (events["ts_recv"] < half)]
    rows = build_features(events, market.instrument)
    predictor = Leaning(record_of(rows.x[:500]))
    chosen = CHOSEN.with_overrides({"gates.max_outside": 0})  # deaths only
    run_id, summary = paper(
        journal, market.instrument, events, pieces_of(events), predictor, chosen
    )
    done = replayed(market.instrument, events, rows, predictor, chosen)
    found = journal.decisions(run_id)
    parity = compare(done.decisions, found, done.fills, journal.fills(run_id))
    assert parity.n_differences == 0, parity.first_difference
    died = min(d["ts_decided"] for d in found if d["n_dead"])
    assert half < died < half + 300 * S
    after = [d for d in found if d["ts_decided"] >= died]
    assert not [d for d in after if d["action"] == "enter"]
    assert [d for d in found if d["action"] == "enter" and d["ts_decided"] < died]
    blocked = [d for d in after if d["cause"] == "FEATURE_DEAD"]
    assert blocked and all(d["dead"].startswith("trade_") for d in blocked)
    assert summary["position_lots"] == 0, "the open position must have been closed"
    incident = next(e for e in journal.events(run_id) if e["code"] == "FEATURE_DEAD")
    assert incident["ts"] == died and "stood still" in incident["detail"]["detail"]
    assert summary["n_dead"] > 100 and "trade_flow" in summary["ill_features"]
    numbers = [[d[name] for d in after] for name in ("outside", "n_dead")]
    assert check_features(*numbers, 0.5).status == "fail"


def test_a_column_that_was_dead_in_training_is_healthy(rows):
    x = rows.x.copy()
    k = COLUMNS.index("trade_flow_5s")
    x[:, k] = 3.0
    still = FeatureRows(rows.rows, x, COLUMNS)
    verdicts = RowWatch.of(record_of(x[:600]), COLUMNS).take(still).verdicts
    assert not verdicts["n_dead"].any() and verdicts["outside"].max() < FARTHEST
    x[-1, k] = 3.1
    last = RowWatch.of(record_of(x[:600]), COLUMNS).take(FeatureRows(rows.rows, x, COLUMNS))
    told = last.at(len(x) - 1)
    assert told.outside == FARTHEST and told.outlier.startswith("trade_flow_5s was 3.1")


def test_a_version_without_a_record_says_so_and_is_traded(market, rows, journal):
    predictor = Leaning({"feature_names": list(COLUMNS.names)})
    watch = RowWatch.of(predictor.model.facts, COLUMNS)
    assert "no ranges and no health" in watch.missing
    assert str(watch.take(rows).at(500)) == str(Fitness(math.nan))
    given_ = market.instrument, market.events
    run_id, summary = paper(journal, *given_, pieces_of(market.events), predictor)
    found, done = journal.decisions(run_id), replayed(*given_, rows, predictor)
    parity = compare(done.decisions, found, done.fills, journal.fills(run_id))
    assert parity.n_differences == 0 and journal.fills(run_id), parity.first_difference
    assert {(d["outside"], d["n_dead"]) for d in found} == {(None, None)}
    gates = [json.loads(d["gates"]) for d in found if d["gates"] != "[]"]
    assert gates and all(sum("not known" in g.get("detail", "") for g in row) == 2 for row in gates)
    assert check_features([math.nan], [math.nan], 0.5).value == "not known"


def test_parity_holds_on_a_real_recording_with_holes(recordings, journal, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("BTC-USD_book20_2026-01-06.parquet", "BTC-USD_trades_2026-01-06.parquet"):
        (source / name).symlink_to(Path(recordings).resolve() / "standx" / name)
    store = Store(tmp_path / "market")
    import_folder(source, store, tmp_path)
    row = store.listing()[0]
    names, hour = (row["venue"], row["symbol"]), 3600 * S
    start = row["start_ns"] + 14 * hour
    seen = StoreFeed(store, *names, start - 3 * hour, start)
    learned = build_features(seen.events, seen.instrument)
    feed = StoreFeed(store, *names, start, start + 2 * hour)
    predictor = Leaning(record_of(learned.x), slope_bps=400.0)
    rows = build_features(feed.events, feed.instrument)
    run_id, summary = paper(journal, feed.instrument, feed.events, feed, predictor)
    done = replayed(feed.instrument, feed.events, rows, predictor)
    found = journal.decisions(run_id)
    parity = compare(done.decisions, found, done.fills, journal.fills(run_id))
    assert parity.n_decisions > 7_000 and parity.n_differences == 0, parity.first_difference
    assert len(journal.fills(run_id)) > 20 and summary["n_outside"] > 0
    share = np.mean([d["cause"] == "FEATURE_DEAD" for d in found])
    assert share < 0.01, "a market with holes and quiet minutes is not dead"


def test_a_record_that_cannot_be_read_stops_the_model_and_not_the_session(tmp_path, market):
    x, labels, columns = drawn()
    model = fit_direction(x, labels, columns, QUICK)
    normal = json.loads(json.dumps(normal_facts(x, labels, model)))
    broken = json.loads(json.dumps(normal))
    broken["seen"]["longest_run"].pop()
    wild = json.loads(json.dumps(normal))
    wild["ranges"][columns.names[0]] = [None, 1]
    now = int(labels["ts_end"].max()) // S * S
    chosen = load_settings(environment={}, overrides={"paths.data": str(tmp_path)})
    told = {}
    for name, kept in {"whole": normal, "broken": broken, "wild": wild, "none": None}.items():
        note = {"normal": kept} if kept else {}
        publish(model, tmp_path / "models", "synthetic_SYN-USDT~USDT", now + S * len(told), note)
        asked = (chosen, "synthetic", "SYN/USDT:USDT", SymbolState.TRAINED, now)
        told[name] = choose_model(*asked)
    assert [told[name].block for name in told] == [None, *[Cause.MODEL_CORRUPT] * 2, None]
    assert told["whole"].detail == "" and "train it again" in told["none"].detail
    assert "44 columns" in told["broken"].detail and told["wild"].predictor is None
