"""The honesty page: every backtest is counted, in the journal and in the report, and many markets train as one."""

from dataclasses import replace as changed

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tradebook.base.clock import NS_PER_S
from tradebook.base.settings import load_settings
from tradebook.market.synthetic import synthetic_market
from tradebook.ops.honesty import honesty_figures, honesty_section, honesty_text
from tradebook.ops.many import settings_words, stored_markets, train_many
from tradebook.ops.pipeline import collect_events
from tradebook.training.scale import values
from tradebook.training.trials import (
    MINUTE_NS,
    find_trials,
    honest_page,
    result_series,
    side_by_side,
)

DAY = 86_400 * NS_PER_S


def row(k, series, variant, kind="backtest"):
    "A row of the journal's runs"
    found = {"run_id": f"{k:05d}", "kind": kind, "venue": "v", "symbol": "S", "model_version": "m"}
    return found | {
        "settings_hash": variant,
        "code_version": "1",
        "summary": {"series": series} if series else {"error": "no data"},
    }


def drawn(seed, edge=0.0, n=400, days=1):
    "Trades of a made-up strategy"
    rng = np.random.default_rng(seed)
    ts = np.sort(rng.integers(0, days * DAY - 1, n))
    return rng.normal(edge, 8.0, n), ts


trades = st.lists(st.tuples(st.floats(-50, 50), st.integers(0, 3 * DAY - 1)), max_size=40)


@examples(max_examples=60, deadline=None)
@given(trades, st.integers(0, DAY), st.integers(3 * DAY, 5 * DAY))
def test_nothing_is_lost_between_trades_and_periods(made, start, stop):
    inside = [(r, t) for r, t in made if t >= start]
    net, ts = np.array([r for r, _ in inside]), np.array([t for _, t in inside], np.int64)
    series = result_series(net, ts, (start, stop))
    assert series["n_trades"] == len(net)
    np.testing.assert_allclose(sum(series["net_bps"]), net.sum(), atol=1e-4 * (len(net) + 1))
    table, period_s, first_ns = side_by_side([series], (start, stop))
    covered = first_ns + len(table) * int(period_s) * NS_PER_S
    np.testing.assert_allclose(
        table.sum(), net[ts < covered].sum(), atol=1e-4 * (len(net) + 1), err_msg=f"{period_s}"
    )
    assert first_ns // MINUTE_NS == start // MINUTE_NS and len(table) >= 128


@examples(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=40))
def test_variants_count_once_however_often_they_run(variants):
    runs = [row(k, result_series(*drawn(v), (0, DAY - 1)), f"{v}") for k, v in enumerate(variants)]
    found = find_trials(runs, ("v", "S"), (0, DAY - 1))
    assert len(found.names) == len(set(variants)) and found.n_runs == len(variants)
    assert found.returns.shape[1] == len(found.sharpes) == len(found.names)


def test_fifty_backtests_of_nothing_are_not_believed():
    believed = 0
    for world in range(3):
        made = [drawn(1_000 * world + k) for k in range(50)]
        runs = [row(k, result_series(*m, (0, DAY - 1)), f"{k}") for k, m in enumerate(made)]
        trials = find_trials(runs, ("v", "S"), (0, DAY - 1))
        net, ts = made[int(trials.sharpes.argmax())]
        page = honest_page(net, ts, ts, trials)
        alone = honest_page(net, ts, ts, find_trials(runs[:1], ("v", "S"), (0, DAY - 1)))
        assert page.deflated.n_trials == 50 and page.overfitting is not None
        assert alone.deflated.deflated > 0.9 > page.deflated.deflated
        believed += "speaks against" in honesty_text(page, trials)
    assert not believed


@examples(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=20))
def test_every_range_that_somebody_chose_is_a_look(places):
    hour, runs = 3600 * NS_PER_S, []
    for k, place in enumerate(places):
        span = place * 4 * hour, (place + 1) * 4 * hour
        ts = np.linspace(*span, 60, endpoint=False).astype(np.int64)
        net = np.random.default_rng(place).normal(0, 8, 60)
        runs.append(row(k, result_series(net, ts, (span[0], span[1] - 1)), "one"))
        runs[-1]["summary"]["asked"] = list(span)
    last = runs[-1]["summary"]["asked"]
    found = find_trials(runs, ("v", "S"), (last[0], last[1] - 1))
    assert len(found.names) == len(found.sharpes) == len(set(places))
    assert found.n_runs >= len(set(places)) and found.returns.shape[1] == 1
    whole = row(99, result_series(*drawn(1), (0, DAY - 1)), "one")  # nobody chose anything
    assert len(find_trials([whole, *[whole] * 3], ("v", "S"), (0, DAY - 1)).names) == 1


def test_the_best_of_many_ranges_is_believed_less():
    hour, runs = 3600 * NS_PER_S, []
    for k in range(20):
        span = k * 4 * hour, (k + 1) * 4 * hour
        ts = np.linspace(*span, 200, endpoint=False).astype(np.int64)
        net = np.random.default_rng(k).normal(0, 8, 200)
        runs.append((row(k, result_series(net, ts, (span[0], span[1] - 1)), "one"), net, ts, span))
        runs[-1][0]["summary"]["asked"] = list(span)
    best, net, ts, span = max(runs, key=lambda run: run[1].mean())
    given = ("v", "S"), (span[0], span[1] - 1)
    alone = honest_page(net, ts, ts, find_trials([best], *given))
    among = honest_page(net, ts, ts, find_trials([run for run, *_ in runs], *given))
    assert alone.deflated.n_trials == 1 and among.deflated.n_trials == 20
    assert among.deflated.deflated < alone.deflated.deflated - 0.3


def test_a_real_edge_among_many_trials_is_believed():
    made = [drawn(k, days=20, n=6_000) for k in range(30)] + [drawn(99, 0.9, 6_000, 20)]
    span = (0, 20 * DAY - 1)
    runs = [row(k, result_series(*m, span), f"{k}") for k, m in enumerate(made)]
    trials = find_trials(runs, ("v", "S"), span)
    net, ts = made[int(trials.sharpes.argmax())]
    page = honest_page(net, ts, ts, trials)
    assert page.deflated.deflated > 0.95 and page.overfitting.probability < 0.1
    assert page.significance.side == 1
    assert "Nothing" in honesty_text(page, trials)


def test_the_section_holds_with_little_and_with_nothing():
    assert "no trades" in honesty_section(None)
    net, ts = drawn(1, n=3)
    page = honest_page(net, ts, ts, find_trials([], ("v", "S"), (0, DAY - 1)))
    assert "Only 3 trades" in honesty_section(page)
    assert "overfitting" not in honesty_figures(page, None, net)
    leak = {"code": "LEAK_TWINS", "status": "pass", "value": "<b>0</b>", "bound": "at most 2"}
    text = honesty_section(page, None, [leak])
    assert "LEAK_TWINS" in text and "<b>0</b>" not in text and "&lt;b&gt;0" in text


@pytest.fixture(scope="module")
def two_markets(tmp_path_factory):
    "Two short markets in one store"
    root = tmp_path_factory.mktemp("many")
    for seed in (1, 2):
        market = synthetic_market(seed=seed, duration_s=900)
        of = changed(market.instrument, symbol=f"SYN{seed}/USDT:USDT")
        collect_events(root, market.events, of)
    quick = {"training.rounds": 10, "training.folds": 2, "labels.horizon_s": 10.0}
    return load_settings(environment={}, overrides={**quick, "paths.data": str(root)})


def test_many_markets_train_in_processes_as_they_do_here(two_markets):
    markets = stored_markets(two_markets)
    done = train_many(two_markets, [*markets, ("synthetic", "NONE/USDT")], workers=2)
    again = train_many(two_markets, markets, workers=0)
    assert [one.is_ok for one in done] == [True, True, False]
    assert "no events of synthetic NONE/USDT" in done[2].error
    for there, here in zip(done[:2], values(again), strict=True):
        assert there.value["version"].split("-")[1] == here["version"].split("-")[1]
        assert there.value["auc"] == here["auc"] and there.value["n_train"] == here["n_train"]


def test_no_secret_and_no_path_travels(two_markets, tmp_path):
    environment = {"TRADEBOOK__SECRETS__API_KEY": "do-not-send-me"}
    settings = load_settings(environment=environment, overrides={"paths.data": str(tmp_path)})
    words = " ".join(settings_words(settings))
    assert "do-not-send-me" not in words and "paths." not in words and "secrets." not in words
