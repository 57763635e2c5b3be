"""Prediction: the flat forest is LightGBM to the last bit, on any tree, on real rows, live and replayed."""

import threading

import lightgbm
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_training_model import QUICK, drawn

from tradebook.backtest.parity import compare
from tradebook.backtest.replay import run_backtest
from tradebook.base.causes import Cause
from tradebook.base.errors import ModelError
from tradebook.base.journal import Journal
from tradebook.base.settings import load_settings
from tradebook.features.rows import build_features
from tradebook.labels.barriers import make_labels
from tradebook.market.events import message_starts
from tradebook.market.quotes import quotes
from tradebook.market.snapshots import read_snapshots
from tradebook.market.synthetic import synthetic_market
from tradebook.policy.rules import rules_from
from tradebook.trader.loop import PaperTrader, RunLog
from tradebook.training.calibration import Calibration, read_calibration
from tradebook.training.forest import Forest
from tradebook.training.model import fit_direction
from tradebook.training.prediction import Predictor, model_rules
from tradebook.training.publish import Dossier, publish

ODD = [np.nan, np.inf, -np.inf, 0.0, -0.0, 5e-324, -5e-324, 1e-36, -1e-35, 1.1e-35, 1e300, -1e300]


def odd_rows(rng, n, f, bounds=()):
    "Rows of ordinary numbers, of numbers no market sends, and of the very bounds of the trees"
    x = rng.normal(size=(n, f)) * 10.0 ** rng.integers(-3, 4, (n, 1))
    pool = np.array([*ODD, *bounds, *np.nextafter(bounds, np.inf), *np.nextafter(bounds, -np.inf)])
    return np.where(rng.uniform(size=x.shape) < 0.4, rng.choice(pool, x.shape), x)


def grown(rng, rounds=6, n=300, f=6, **changes):
    "A small forest on drawn rows with missing values and zeros"
    x = rng.normal(size=(n, f)) * 10.0 ** rng.integers(-2, 3, f)
    x[rng.uniform(size=x.shape) < 0.1] = np.nan
    x[rng.uniform(size=x.shape) < 0.1] = 0.0
    y = (np.nan_to_num(x[:, 0]) + rng.normal(size=n) > 0).astype(float)
    chosen = {"objective": "binary", "verbosity": -1, "num_threads": 1, "min_data_in_leaf": 5}
    return lightgbm.train(chosen | changes, lightgbm.Dataset(x, y), rounds)


def assert_same(text, x):
    "Batch, single rows and LightGBM agree bit for bit"
    expected = lightgbm.Booster(model_str=text).predict(x, num_threads=1)
    forest = Forest(text)
    assert forest.ask(x)[0].tobytes() == expected.tobytes()
    rows = np.array([forest.ask_row(row) for row in x])
    assert rows[:, 0].tobytes() == expected.tobytes() and not rows[:, 1].any()


OBJECTIVES = "binary regression huber quantile poisson tweedie cross_entropy lambdarank".split()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([o for o in OBJECTIVES if o != "lambdarank"]),
    st.integers(2, 40),
    st.sampled_from([{}, {"use_missing": False}, {"zero_as_missing": True}]),
    st.sampled_from(["gbdt", "dart", "rf"]),
)
def test_forests_of_every_kind_answer_as_lightgbm(seed, objective, leaves, missing, boosting):
    rng = np.random.default_rng(seed)
    bagging = {"bagging_fraction": 0.7, "bagging_freq": 1}
    chosen = {"num_leaves": leaves, "boosting": boosting, "seed": seed % 1000, **missing, **bagging}
    text = grown(rng, objective=objective, **chosen).model_to_string()
    assert_same(text, odd_rows(rng, 200, 6))


TEXT = grown(np.random.default_rng(5), rounds=8, num_leaves=12).model_to_string()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_any_bound_and_any_way_to_treat_what_is_missing(seed):
    "Bounds and missing types are rewritten at random: zeros, infinities, the smallest numbers"
    rng = np.random.default_rng(seed)
    pool, bounds, lines = [0.0, -0.0, 5e-324, 1e-35, -1e-36, np.inf, -1e300, 1.5], [], []
    for line in TEXT.splitlines():
        name, _, words = line.partition("=")
        n = len(words.split())
        if name == "threshold":
            drawn_ = np.where(rng.uniform(size=n) < 0.5, rng.choice(pool, n), rng.normal(size=n))
            bounds += [float(v) for v in drawn_ if np.isfinite(v)]
            line = f"threshold={' '.join(repr(float(v)) for v in drawn_)}"
        if name == "decision_type":
            line = f"decision_type={' '.join(str(2 * rng.integers(2) + 4 * rng.integers(3)) for _ in range(n))}"
        lines.append(line)
    text = "\n".join(line for line in lines if not line.startswith("tree_sizes"))
    assert_same(text, odd_rows(rng, 150, 6, np.array(bounds)))


def test_a_ranker_gives_its_raw_score():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(400, 5))
    data = lightgbm.Dataset(x, rng.integers(0, 4, 400), group=[20] * 20)
    chosen = {"objective": "lambdarank", "verbosity": -1, "num_threads": 1}
    assert_same(lightgbm.train(chosen, data, 10).model_to_string(), odd_rows(rng, 300, 5))


def test_members_are_asked_together():
    rng = np.random.default_rng(8)
    texts = [grown(rng, seed=i, num_leaves=5 + 6 * i).model_to_string() for i in range(4)]
    x = odd_rows(rng, 500, 6)
    mean, spread = Forest(*texts).ask(x)
    answers = [lightgbm.Booster(model_str=t).predict(x, num_threads=1) for t in texts]
    total = np.zeros(500)
    for one in answers:
        total = total + one
    assert mean.tobytes() == (total / 4).tobytes()
    np.testing.assert_allclose(spread, np.std(answers, axis=0), rtol=1e-9, atol=1e-12)
    same = Forest(texts[0], texts[0]).ask(x)
    assert same[0].tobytes() == answers[0].tobytes() and not same[1].any()


def test_one_forest_serves_many_threads():
    rng = np.random.default_rng(3)
    forest, x = Forest(TEXT), odd_rows(rng, 4_000, 6)
    expected, wrong = forest.ask(x)[0], []

    def ask(rows):
        found = np.array([forest.ask_row(x[i])[0] for i in rows])
        wrong.extend(np.flatnonzero(found != expected[rows]))
        wrong.extend(np.flatnonzero(forest.ask(x)[0] != expected))

    threads = [threading.Thread(target=ask, args=(rng.permutation(4_000),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_cannot_be_answered_for_is_refused_by_name():
    with pytest.raises(ModelError, match="tree 0: linear leaves"):
        Forest(grown(np.random.default_rng(1), linear_tree=True).model_to_string())
    x = np.random.default_rng(1).integers(0, 20, (3_000, 2)).astype(float)
    data = lightgbm.Dataset(x, x[:, 0] % 2, categorical_feature=[0])
    chosen = {"objective": "binary", "verbosity": -1, "min_data_in_leaf": 5, "num_threads": 1}
    with pytest.raises(ModelError, match="tree 0: categorical splits"):
        Forest(lightgbm.train(chosen, data, 3).model_to_string())
    for cut in (0, 20, len(TEXT) // 2):
        with pytest.raises(ModelError, match="was cut"):
            Forest(TEXT[:cut])
    short = TEXT.replace("leaf_value=", "leaf_value=1 ", 1)
    with pytest.raises(ModelError, match="leaf_value of all trees must be"):
        Forest(short)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["platt", "isotonic"]))
def test_a_curve_is_applied_as_it_was_fitted(seed, kind):
    from tradebook.training.prediction import _correct, read_curve

    rng = np.random.default_rng(seed)
    curve = Calibration("platt", (float(rng.uniform(0.1, 3)), float(rng.normal())))
    if kind == "isotonic":
        x = np.unique(np.round(rng.uniform(size=rng.integers(2, 30)), 3))
        x = x if len(x) > 1 else np.array([0.2, 0.7])
        curve = Calibration("isotonic", tuple(x), tuple(np.sort(rng.uniform(size=len(x)))))
    p = np.concatenate([rng.uniform(size=300), [0.0, 1.0, 0.5], curve.x if kind != "platt" else []])
    found = [_correct(v, *read_curve(curve.to_dict())) for v in p]
    np.testing.assert_allclose(found, curve.apply(p), rtol=1e-13, atol=1e-15)


# What the loop trades is what the backtest says it would have traded.
CHOSEN = load_settings(
    environment={},
    overrides={
        "gates.max_spread_bps": 50,
        "gates.min_edge_bps": -50,
        "signal.min_confidence": 0.01,
        "labels.horizon_s": 10,
        "training.rounds": 20,
        "training.folds": 2,
    },
)


@pytest.fixture(scope="module")
def fitted():
    "A market, its rows, and a model that learned from its first half"
    market = synthetic_market(duration_s=2_400, seed=9)
    rows = build_features(market.events, market.instrument)
    labels = make_labels(rows.rows, quotes(market.events), CHOSEN.labels, 4.0, 2_000)
    half = len(rows) // 2
    part = labels[:half], rows.feature_set
    return market, rows, fit_direction(rows.x[:half], *part, CHOSEN)


def paper_and_backtest(market, rows, predictor, journal, settings=CHOSEN):
    "The same stretch message by message and at once"
    of, events = market.instrument, market.events
    run = journal.start_run(
        "paper", settings_hash=settings.hash, settings=settings.to_dict(), code_version="0"
    )
    log = RunLog(journal, run, settings.trader.journal_flush_rows)
    starts = np.append(message_starts(events), len(events))[::5]
    stops = np.append(starts[1:], len(events))
    PaperTrader(settings, of, log, predictor).run(events, zip(starts, stops, strict=True))
    p_up, edge = predictor.predict(rows.x)
    facts = {"settings_hash": settings.hash, "model_version": predictor.model.version}
    chosen = settings.backtest
    done = run_backtest(
        events,
        rows,
        p_up,
        edge,
        rules_from(settings, of, **model_rules(settings, predictor)),
        initial_equity_quote=chosen.initial_equity_quote,
        latency_ns=chosen.order_latency_ms * 1_000_000,
        facts=facts,
    )
    return compare(done.decisions, journal.decisions(run), done.fills, journal.fills(run)), done


@pytest.mark.parametrize("is_rich", [False, True])
def test_paper_and_backtest_agree_and_see_the_model_expire(fitted, tmp_path, is_rich):
    market, rows, model = fitted
    until = int(rows.rows["ts"][3 * len(rows) // 4])
    curve = Calibration("platt", (1.1, 0.01)).to_dict()
    more = {"members": (model.model_text,), "calibration": curve} if is_rich else {}
    dossier = Dossier(valid_until_ns=until, **more)
    version = publish(model, tmp_path / "models", "synthetic_SYN-USDT~USDT", 1, dossier=dossier)
    with Journal(tmp_path / "journal.db") as journal:
        found, done = paper_and_backtest(market, rows, Predictor(version), journal)
    assert found.n_differences == 0, found.first_difference
    assert found.n_decisions == len(rows)
    causes = [row["cause"] for row in done.decisions]
    late = [str(c) for c, ts in zip(causes, rows.rows["ts"], strict=True) if ts > until]
    before = [str(c) for c, ts in zip(causes, rows.rows["ts"], strict=True) if ts <= until]
    assert Cause.MODEL_EXPIRED not in before and "ENTER" in before
    assert "ENTER" not in late and late.count(Cause.MODEL_EXPIRED) > len(late) / 2


def test_what_the_second_model_skips_is_not_traded_whether_or_not_an_edge_is_asked_for(
    fitted, tmp_path
):
    market, rows, model = fitted
    x, noise = rows.x, np.random.default_rng(3)
    wide = np.column_stack([np.nan_to_num(x), noise.normal(size=(len(x), 2))])
    names = (*rows.feature_set.names, "primary_distance", "primary_side")
    asked = lightgbm.Dataset(wide, noise.integers(0, 2, len(x)), feature_name=list(names))
    text = lightgbm.train({"verbosity": -1, "objective": "binary"}, asked, 3).model_to_string()
    meta = {"calibration": None, "min_distance": 0.01, "min_chance": 0.5}
    dossier = Dossier(meta_text=text, meta_feature_names=names, meta=meta)
    version = publish(model, tmp_path / "models", "synthetic_SYN-USDT~USDT", 1, dossier=dossier)
    predictor, causes = Predictor(version), {}
    for is_on in (True, False):
        chosen = CHOSEN.with_overrides({"gates.is_edge_gate_on": is_on})
        with Journal(tmp_path / f"{is_on}.db") as journal:
            given = market, rows, predictor, journal, chosen
            found, done = paper_and_backtest(*given)
        assert found.n_differences == 0, found.first_difference
        causes[is_on] = [str(row["cause"]) for row in done.decisions]
        skipped = np.isnan(predictor.predict(rows.x)[1]) & (rows.n_nan == 0)
        entered = np.array([cause == "ENTER" for cause in causes[is_on]])
        assert entered.any() and not (entered & skipped).any()
    assert all(one.count(Cause.SKIPPED_BY_MODEL) > 5 for one in causes.values())


def test_every_row_of_a_recording_gets_lightgbms_answer(recordings):
    files = [
        recordings / f"standx/BTC-USD_{kind}_2026-01-06.parquet" for kind in ("book20", "trades")
    ]
    imported = read_snapshots(*files)
    events, of = imported.events, imported.instrument
    starts = message_starts(events)
    hours = np.searchsorted(events["ts_recv"][starts], events["ts_recv"][0] + 2 * 3_600 * 10**9)
    events = events[: starts[hours]]
    rows = build_features(events, of)
    labels = make_labels(rows.rows, quotes(events), CHOSEN.labels, 4.0, 2_000)
    model = fit_direction(rows.x, labels, rows.feature_set, CHOSEN)
    booster = lightgbm.Booster(model_str=model.model_text)
    expected = booster.predict(rows.x, num_threads=1)
    forest = Forest(model.model_text)
    assert forest.ask(rows.x)[0].tobytes() == expected.tobytes()
    assert [forest.ask_row(row)[0] for row in rows.x] == expected.tolist()
    assert len(rows) > 500 and len(np.unique(expected)) > 50


@pytest.mark.parametrize("kind", ["none", "platt", "isotonic"])
@pytest.mark.parametrize("n_seeds", [1, 3])
def test_a_model_of_direction_is_the_same_in_memory_and_published(tmp_path, kind, n_seeds):
    x, labels, columns = drawn(4_000)
    chosen = QUICK.with_overrides({"training.calibration": kind, "training.seeds": n_seeds})
    model = fit_direction(x, labels, columns, chosen)
    predictor = Predictor(publish(model, tmp_path, "a_B", 1))
    asked = [lightgbm.Booster(model_str=t).predict(x, num_threads=1) for t in model.texts]
    p_up, edge, spread = predictor.ask(x)
    rows = np.array([predictor.ask_row(row) for row in x])
    assert rows.T.tobytes() == np.stack([p_up, edge, spread]).tobytes()  # live as in history
    assert (len(model.texts), bool(model.calibration)) == (n_seeds, kind != "none")
    assert (spread.max() > 0) == (n_seeds > 1)
    if kind == "none" and n_seeds == 1:
        assert p_up.tobytes() == asked[0].tobytes()
    curve = read_calibration(model.calibration or {"kind": "none", "x": [], "y": []})
    np.testing.assert_allclose(p_up, curve.apply(np.mean(asked, axis=0)), rtol=0, atol=1e-12)
    np.testing.assert_array_equal(edge, model.move_slope_bps * (p_up - 0.5))
