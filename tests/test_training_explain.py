"""Explanation: contributions are exact, needs are measured out of fold, and every order says why."""

import json

import numpy as np
import pytest

from tradebook.base.errors import ModelError
from tradebook.base.journal import Journal
from tradebook.base.settings import load_settings
from tradebook.training.contributions import interactions, partner_of, summarise_pushes
from tradebook.training.importance import drop_needs, leaning, permutation_needs, spoilt
from tradebook.training.learners import Learner, Lesson, fit, fit_folds, fit_seeds
from tradebook.training.reasons import Reasons
from tradebook.training.splits import PurgedWalkForward
from tradebook.training.walking import fast, walk

QUICK = Learner(rounds=25, leaves=7, min_rows_leaf=20)
SPLITS = PurgedWalkForward(3, embargo_ns=10 * 10**9)


def drawn(n=2_400, seed=1, horizon=10):
    "Rows with two columns that matter, one that matters beside a third, and noise"
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 5))
    price = np.cumsum(rng.normal(size=n + horizon))
    price[:n] -= 2 * (x[:, 0] + x[:, 1] * (x[:, 2] > 0))
    start = np.arange(n) * 10**9
    is_up = price[horizon:] > price[:-horizon]
    return Lesson(x, is_up * 1.0, tuple("abcde"), start, start + horizon * 10**9)


def test_contributions_add_up_to_every_forecast_and_agree_with_shap():
    lesson = drawn(1_200)
    model = fit(QUICK, lesson)
    reasons, asked = Reasons(model.texts, lesson.names), lesson.x[:60].copy()
    asked[5, 0], asked[6, 1] = np.nan, 1e12
    push = reasons.contributions(asked)
    p = model.predict(asked)
    np.testing.assert_allclose(push.sum(axis=1), np.log(p / (1 - p)), atol=1e-9)
    import lightgbm
    import shap

    explainer = shap.TreeExplainer(lightgbm.Booster(model_str=model.texts[0]))
    theirs = explainer.shap_interaction_values(lesson.x[:60]).sum(axis=2)  # their own code
    np.testing.assert_allclose(reasons.contributions(lesson.x[:60])[:, :-1], theirs, atol=1e-6)
    plain = explainer.shap_values(lesson.x[:60])
    plain = plain[1] if isinstance(plain, list) else plain
    np.testing.assert_allclose(theirs, plain, atol=1e-6)


def test_one_row_alone_and_among_others_has_the_same_reasons():
    lesson = drawn(1_200)
    reasons = Reasons(fit_seeds(QUICK, lesson, 2).texts, lesson.names, n_top=3)
    together = reasons.contributions(lesson.x[:40])
    for i in range(40):
        np.testing.assert_array_equal(reasons.contributions(lesson.x[i : i + 1])[0], together[i])
        top = reasons.top(lesson.x[i])
        sizes = [abs(one["push"]) for one in top]
        assert sizes == sorted(sizes, reverse=True) and len(top) == 3
        assert sizes[0] == np.abs(together[i, :-1]).max()
    told = json.loads(reasons.text(np.array([np.nan, np.inf, 0.0, 0.0, 0.0])))
    assert all(one["value"] is None or np.isfinite(one["value"]) for one in told)


def test_pairs_and_pictures_name_what_was_planted():
    lesson = drawn(2_000)
    model = fit(QUICK, lesson)
    asked = lesson.x[:150]
    push = Reasons(model.texts, lesson.names).contributions(asked)
    assert summarise_pushes(asked, push, lesson.names)["name"][0] == "a"
    assert partner_of(asked, push, lesson.names, "b") == "c"
    pairs = interactions(model.texts[0], asked)
    alone = pairs - np.diag(np.diag(pairs))
    first, second = np.unravel_index(alone.argmax(), alone.shape)
    assert {lesson.names[first], lesson.names[second]} == {"b", "c"}


def test_a_spoilt_column_keeps_its_values_and_loses_its_time():
    rng = np.random.default_rng(1)
    column, block = np.arange(1_000.0), np.arange(1_000) // 50
    now = spoilt(column, block, rng)
    np.testing.assert_array_equal(np.sort(now), column)
    assert (np.diff(now) == 1).sum() >= 1_000 - 2 * 20 and (now != column).mean() > 0.8
    uneven = np.repeat([0, 1, 2], [500, 300, 200])
    assert set(spoilt(column, uneven, rng)) <= set(column)


def test_needs_are_found_by_both_measures_on_both_kinds_of_walk():
    lesson = drawn()
    for walked in (fit_folds(QUICK, lesson, SPLITS), walk(fast(QUICK), lesson, SPLITS)):
        found = permutation_needs(walked.forest, lesson, walked.fold, n_times=2, n_draws=50)
        needed = {one.name for one in found if one.is_needed}
        assert {"a", "b"} <= needed and not needed & {"d", "e"}
    dropped = {
        one.name: one for one in drop_needs(QUICK, lesson, SPLITS, ["a", "d", ("b", "c")], 50)
    }
    assert dropped["a"].is_needed and dropped["b + c"].is_needed and not dropped["d"].is_needed
    with pytest.raises(ModelError, match="must be some, not all"):
        drop_needs(QUICK, lesson, SPLITS, ["z"])


def test_needs_are_measured_on_rows_that_no_member_has_seen():
    lesson = drawn()
    walked = fit_folds(QUICK, lesson, SPLITS)
    was = permutation_needs(walked.forest, lesson, walked.fold, n_draws=20)
    untested = walked.fold < 0
    changed = lesson._replace(x=np.where(untested[:, None], 1e6, lesson.x))
    now = permutation_needs(walked.forest, changed, walked.fold, n_draws=20)
    assert [(o.name, o.loss) for o in was] == [(o.name, o.loss) for o in now]


def test_one_column_that_carries_everything_is_warned_of():
    lesson = drawn()
    planted = lesson._replace(
        x=np.column_stack([lesson.x, lesson.y]), names=(*lesson.names, "tomorrow")
    )
    walked = fit_folds(QUICK, planted, SPLITS)
    found = leaning(permutation_needs(walked.forest, planted, walked.fold, n_draws=20))
    assert found.name == "tomorrow" and found.warning.startswith("tomorrow carries")
    even = leaning(permutation_needs(walked.forest, planted, walked.fold, n_draws=20), most=1.0)
    assert not even.warning


def test_every_order_says_why_and_paper_says_what_the_backtest_says(tmp_path):
    from tradebook.backtest.parity import compare
    from tradebook.market.store import Store
    from tradebook.market.synthetic import synthetic_market
    from tradebook.ops.pipeline import backtest_symbol, collect_events, train_symbol
    from tradebook.trader.session import trade_paper

    changes = {"paths.data": str(tmp_path), "training.rounds": 30, "training.folds": 2}
    changes |= {"gates.is_edge_gate_on": False, "gates.max_spread_bps": 50}
    chosen = load_settings(environment={}, overrides=changes)
    market = synthetic_market(seed=7, duration_s=5_400)
    collect_events(tmp_path, market.events, market.instrument)
    row = Store(tmp_path / "market").listing()[0]
    names = row["venue"], row["symbol"]
    split = row["start_ns"] + (row["end_ns"] - row["start_ns"]) * 2 // 3
    train_symbol(chosen, *names, None, split)
    replayed = backtest_symbol(chosen, *names, split, None)
    paper = trade_paper(chosen, *names, split)
    with Journal(tmp_path / "journal.db") as journal:
        runs = [journal.decisions(run_id) for run_id in (replayed.run_id, paper["run_id"])]
        fills = [journal.fills(run_id) for run_id in (replayed.run_id, paper["run_id"])]
    assert compare(*runs, *fills).n_differences == 0
    assert [d["reasons"] for d in runs[0]] == [d["reasons"] for d in runs[1]]
    orders = [d for d in runs[1] if d["client_order_id"]]
    assert len(orders) >= 10
    for decision in runs[1]:
        is_told = decision["reasons"] is not None
        assert is_told == bool(decision["client_order_id"] and decision["p_up"] is not None)
    told = [json.loads(d["reasons"]) for d in orders if d["reasons"]]
    assert len(told) >= 10 and all(set(one) == {"name", "value", "push"} for t in told for one in t)


def test_models_of_other_columns_are_refused():
    lesson = drawn(600)
    text = fit(QUICK, lesson).texts[0]
    with pytest.raises(ModelError, match="has 5 columns, 4 names were given"):
        Reasons([text], lesson.names[:4])
    with pytest.raises(ModelError, match="must have 5 columns"):
        Reasons([text], lesson.names).contributions(lesson.x[:, :4])
    with pytest.raises(ModelError, match="had none"):
        Reasons([], lesson.names)
