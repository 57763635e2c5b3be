"""Tuning: a search that is killed goes on, nobody looks at outer rows, and bounds are chosen inside."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradebook.base.errors import DataError, ModelError
from tradebook.training.learners import Learner, Lesson
from tradebook.training.pairs import fit_pair, least_chance, meta_lesson, propose
from tradebook.training.splits import PurgedKFold, PurgedWalkForward
from tradebook.training.thresholds import (
    both_sides,
    choose_bound,
    nested_bounds,
    taken,
    try_bounds,
)
from tradebook.training.tuning import RANGES, tune

BASE = Learner(rounds=10, min_rows_leaf=50)
SPLITS = PurgedKFold(3, embargo_ns=10 * 10**9)
SEARCHED = {name: RANGES[name] for name in ("leaves", "learning_rate")}


def drawn(n=1_200, seed=1, horizon=10, lean=2.0):
    "Rows, one a second, with labels that reach ten seconds ahead, and the moves"
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 4))
    price = np.cumsum(rng.normal(size=n + horizon))
    price[:n] -= lean * (x[:, 0] + x[:, 1] * (x[:, 2] > 0))
    start = np.arange(n) * 10**9
    move = price[horizon:] - price[:-horizon]
    return Lesson(x, (move > 0) * 1.0, tuple("abcd"), start, start + horizon * 10**9), move


def search(place, n_trials):
    "The search of these tests"
    lesson, move = drawn()
    given = dict(net_bps=both_sides(move, 0.5), period_s=60.0, ranges=SEARCHED)
    return tune(BASE, lesson, SPLITS, place, "search", n_trials, **given)


def states(place):
    "What became of each try, read by plain sqlite"
    import sqlite3

    connection = sqlite3.connect(place)
    try:
        rows = connection.execute("SELECT state FROM trials ORDER BY number").fetchall()
    finally:
        connection.close()
    return [state for (state,) in rows]


def test_a_killed_search_goes_on_where_it_was(tmp_path):
    place, begun = tmp_path / "study.db", tmp_path / "begun"
    code = f"""
import sys, time; sys.path.insert(0, sys.argv[1])
import tradebook.training.tuning as tuning
from test_training_tuning import *
fit, n = tuning.fit, 0
def slow(*given):
    global n
    n += 1
    if n == 8:  # in the middle of the third try
        open({str(begun)!r}, "w").close()
        time.sleep(600)
    return fit(*given)
tuning.fit = slow
search({str(place)!r}, 50)
"""
    child = subprocess.Popen([sys.executable, "-c", code, os.path.dirname(__file__)])
    until = time.monotonic() + 120
    while not begun.exists() and child.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    assert child.poll() is None and begun.exists()
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert states(place) == ["COMPLETE", "COMPLETE", "RUNNING"]
    found = search(place, 4)
    # the dead try is marked, and its settings are tried again
    assert states(place)[2] == "FAIL" and "RUNNING" not in states(place)
    assert (found.n_trials, found.n_failed) == (4, 1)
    import optuna

    trials = optuna.load_study(study_name="search", storage=f"sqlite:///{place}").trials
    assert trials[3].params == trials[2].params
    assert trials[0].params["leaves"] == BASE.leaves  # the first try is the start
    assert len(found.sharpes) == 4 and found.score == max(found.history)


def test_a_study_counts_what_was_given_up_and_belongs_to_its_rows(tmp_path):
    place = tmp_path / "study.db"
    found = search(place, 9)
    kinds = states(place)
    assert found.n_trials == 9 == kinds.count("COMPLETE") + kinds.count("PRUNED")
    assert found.n_pruned == kinds.count("PRUNED") and len(found.history) == kinds.count("COMPLETE")
    assert found.to_dict()["learner"]["leaves"] == found.learner.leaves
    lesson, _ = drawn(seed=2)
    with pytest.raises(ModelError, match="was begun on other rows, folds or ranges"):
        tune(BASE, lesson, SPLITS, place, "search", 9, ranges=SEARCHED)
    with pytest.raises(ModelError, match="no fields of Learner"):
        tune(BASE, lesson, SPLITS, place, "other", 1, ranges={"leafs": (2, 3, "log")})


@given(
    n=st.integers(1, 120),
    bound=st.floats(0, 0.5),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=80, deadline=None)
def test_one_position_at_a_time(n, bound, seed):
    rng = np.random.default_rng(seed)
    p = np.where(rng.uniform(size=n) < 0.1, np.nan, rng.uniform(size=n))
    start = np.sort(rng.integers(0, 100, n))
    end = start + rng.integers(0, 20, n)
    places = taken(p, bound, start, end)
    expected, free = [], -1
    for i in range(n):
        if abs(p[i] - 0.5) >= bound and start[i] >= free:
            expected.append(i)
            free = end[i]
    assert places.tolist() == expected


def test_bounds_are_chosen_without_the_outer_rows():
    lesson, move = drawn(2_000)
    net, learner = both_sides(move, 1.0), replace(BASE, rounds=20)
    outer, inner = PurgedWalkForward(3, embargo_ns=10**10), PurgedKFold(2, embargo_ns=10**10)
    was = nested_bounds(learner, lesson, net, outer, inner, min_trades=10)
    last = was.fold == 2
    x = np.where(last[:, None], 1e6, lesson.x)
    turned = lesson._replace(x=x, y=np.where(last, 1 - lesson.y, lesson.y))
    now = nested_bounds(learner, turned, np.where(last[:, None], -net, net), outer, inner, 10)
    assert now.bounds == was.bounds and now.n_tried == was.n_tried
    np.testing.assert_array_equal(now.p_up[was.fold < 2], was.p_up[was.fold < 2])
    assert np.isfinite(was.bounds).any()
    held = lesson.ts_end[was.places][:-1] <= lesson.ts_start[was.places][1:]
    same_fold = was.fold[was.places][:-1] == was.fold[was.places][1:]
    assert held[same_fold].all()


def test_no_bound_without_enough_trades_or_profit():
    lesson, move = drawn(600)
    p = np.random.default_rng(1).uniform(size=600)
    tried = try_bounds(p, both_sides(move, 100.0), lesson.ts_start, lesson.ts_end)
    assert choose_bound(tried) == np.inf and max(one.total_bps for one in tried) < 0
    gift = try_bounds(p, np.ones((600, 2)), lesson.ts_start, lesson.ts_end)
    assert choose_bound(gift, 1) < 0.1 and choose_bound(gift, 601) == np.inf
    assert try_bounds(np.full(600, np.nan), np.ones((600, 2)), lesson.ts_start, lesson.ts_end) == []
    with pytest.raises(DataError, match="net_bps must have shape"):
        try_bounds(p, move, lesson.ts_start, lesson.ts_end)


@given(st.integers(1, 60), st.integers(1, 10), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_the_least_chance_is_the_best_of_all_by_trying(n, min_trades, seed):
    rng = np.random.default_rng(seed)
    p, net = rng.integers(0, 8, n) / 8, rng.normal(size=n)
    best, best_at = 0.0, 2.0
    for chance in np.unique(p):
        rows = p >= chance
        if rows.sum() >= min_trades and net[rows].sum() > best + 1e-12:
            best, best_at = net[rows].sum(), chance
    found = least_chance(p, net, min_trades)
    assert (found == 2.0) == (best_at == 2.0)
    if found < 2:
        assert abs(net[p >= found].sum() - best) < 1e-9 and (p >= found).sum() >= min_trades


def test_a_pair_follows_a_made_market_through_its_book():
    from tradebook.base.settings import load_settings
    from tradebook.features.rows import build_features
    from tradebook.labels.barriers import make_labels
    from tradebook.labels.meta import meta_labels
    from tradebook.labels.sides import Costs
    from tradebook.market.quotes import quotes
    from tradebook.market.synthetic import synthetic_market
    from tradebook.training.learners import direction_lesson

    market = synthetic_market(seed=11, duration_s=5_400)
    features, table = build_features(market.events, market.instrument), quotes(market.events)
    chosen = load_settings(environment={})
    labels = make_labels(features.rows, table, chosen.labels, 1.0, 2_000)
    lesson, places = direction_lesson(features.x, labels, features.feature_set.names)
    rows = features.rows[places]

    def follow(signal):
        everywhere = np.flatnonzero(signal)
        given = 8.0, 8.0, 30.0, Costs(taker_bps=0.5), 2_000
        return meta_labels(rows, table, signal, *given, place=everywhere)

    learner = Learner(rounds=25, leaves=7, min_rows_leaf=50)
    splits = PurgedKFold(3, embargo_ns=30 * 10**9)
    pair = fit_pair(learner, learner, lesson, splits, follow)
    asked = pair.ask(lesson.x)
    assert 0.05 < pair.meta_y.mean() < 0.95 and len(pair.out_of_fold) == len(pair.meta_y)
    assert (asked.side[asked.is_taken] != 0).all()
    np.testing.assert_array_equal(asked.side, propose(asked.p_up, 0.05))
    assert np.isnan(asked.p_paid[asked.side == 0]).all()
    proposals = follow(propose(asked.p_up))
    second, place = meta_lesson(lesson, asked.p_up, proposals)
    assert (np.diff(second.ts_start) >= 0).all() and (place < len(lesson.y)).all()
    np.testing.assert_array_equal(second.x[:, : lesson.x.shape[1]], lesson.x[place])
