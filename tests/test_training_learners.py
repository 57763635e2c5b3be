"""Learners: the same bytes anywhere, nothing outside the lesson is felt, and opponents know no future."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradebook.base.errors import DataError, ModelError
from tradebook.training.calibration import fit_calibration, read_calibration
from tradebook.training.learners import (
    Learner,
    Lesson,
    blend,
    find_stop,
    fit,
    fit_folds,
    fit_seeds,
    grades,
    inner_split,
)
from tradebook.training.metrics import auc, log_loss
from tradebook.training.opponents import duels, last_known, opponents
from tradebook.training.splits import PurgedKFold, PurgedWalkForward
from tradebook.training.walking import fast, outgrown, walk

QUICK = Learner(rounds=20, leaves=7, min_rows_leaf=20)
SPLITS = PurgedWalkForward(4, embargo_ns=10 * 10**9)


def drawn(n=2_000, seed=1, horizon=10, lean=2.0, columns=6):
    "Rows, one a second, with labels that reach ten seconds ahead"
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, columns))
    price = np.cumsum(rng.normal(size=n + horizon))
    price[:n] -= lean * (x[:, 0] + x[:, 1] * (x[:, 2] > 0))
    start = np.arange(n) * 10**9
    names = ("imbalance_5", "ofi_5_5s", "return_5s_bps", *"uvwxyz")[:columns]
    is_up = price[horizon:] > price[:-horizon]
    return Lesson(x, is_up * 1.0, names, start, start + horizon * 10**9)


def every_kind():
    "A lesson for each kind of learner"
    lesson = drawn(1_200)
    group = np.arange(1_200) // 40
    ranked = lesson._replace(y=grades(lesson.x[:, 0], group) * 1.0, group=group)
    number = lesson._replace(y=lesson.x[:, 0] * 3)
    return [
        (QUICK, lesson),
        (replace(QUICK, patience=10, rounds=100), lesson),
        (fast(QUICK), lesson),
        (replace(QUICK, kind="regressor"), number),
        (replace(QUICK, kind="ranker"), ranked),
        (replace(QUICK, kind="ranker", patience=10, rounds=60), ranked),
    ]


def texts():
    "One text a kind"
    return [fit(learner, lesson).texts[0] for learner, lesson in every_kind()]


def test_another_process_writes_the_same_bytes():
    code = (
        "import sys, hashlib; sys.path.insert(0, sys.argv[1]); from test_training_learners import *;"
        "sys.stdout.write(hashlib.sha256(''.join(texts()).encode()).hexdigest())"
    )
    command = [sys.executable, "-c", code, os.path.dirname(__file__)]
    changed = {**os.environ, "PYTHONHASHSEED": "5"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=changed)
    import hashlib

    assert done.stdout == hashlib.sha256("".join(texts()).encode()).hexdigest()


def test_every_setting_of_a_learner_reaches_the_text():
    lesson = drawn(800)
    was = fit(QUICK, lesson).texts[0]
    for change in (
        {"rounds": 19},
        {"leaves": 5},
        {"learning_rate": 0.1},
        {"min_rows_leaf": 60},
        {"column_share": 0.9},
        {"row_share": 0.8},
        {"redraw": 4},
        {"l2": 1.0},
        {"bins": 15},
        {"is_quantised": True},
        {"seed": 8},
    ):
        now = fit(replace(QUICK, **change), lesson).texts[0]
        assert now.split("parameters:")[0] != was.split("parameters:")[0], change


@given(
    n=st.integers(20, 300),
    share=st.floats(0.05, 0.9),
    embargo_s=st.floats(0, 20),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=60, deadline=None)
def test_no_label_of_the_earlier_part_reaches_the_later(n, share, embargo_s, seed):
    rng = np.random.default_rng(seed)
    start = np.sort(rng.integers(0, 200 * 10**9, n))
    end = start + rng.integers(0, 60 * 10**9, n)
    lesson = Lesson(np.zeros((n, 1)), np.zeros(n), ("a",), start, end)
    try:
        earlier, later = inner_split(lesson, share, embargo_s)
    except ModelError as error:
        assert "no row ends before" in str(error)
        return
    assert len(later) and end[earlier].max() < start[later].min() - round(embargo_s * 1e9) + 1
    assert later[-1] == n - 1 and earlier[-1] < later[0]


def test_early_stopping_looks_at_nothing_outside_the_lesson():
    lesson, learner = drawn(2_000), replace(QUICK, rounds=300, patience=15)
    folds = fit_folds(learner, lesson, SPLITS)
    turned = lesson._replace(y=np.where(np.arange(2_000) >= 1_600, 1 - lesson.y, lesson.y))
    again = fit_folds(learner, turned, SPLITS)
    assert folds.forest.texts == again.forest.texts  # the last test is nobody's past
    assert 1 < find_stop(learner, lesson).rounds < 300


def test_early_stopping_feels_no_label_that_reaches_into_the_later_part():
    lesson, learner = drawn(1_000), replace(QUICK, rounds=200, patience=15)
    turned = lesson.y.copy()
    turned[790:800] = 1 - turned[790:800]  # these ten end when the later part has begun
    assert find_stop(learner, lesson).rounds == find_stop(learner, lesson._replace(y=turned)).rounds


def test_seeds_and_folds_are_put_together_in_order():
    lesson = drawn(800)
    seeds = fit_seeds(QUICK, lesson, 3)
    alone = [fit(replace(QUICK, seed=7 + k), lesson) for k in range(3)]
    assert seeds.texts == tuple(one.texts[0] for one in alone)
    np.testing.assert_array_equal(seeds.members(lesson.x), [one.predict(lesson.x) for one in alone])
    np.testing.assert_array_equal(seeds.spread(lesson.x), seeds.members(lesson.x).std(axis=0))
    assert blend([seeds, alone[0]]).texts == (*seeds.texts, alone[0].texts[0])


def test_a_short_lesson_makes_members_disagree_more():
    lesson, asked = drawn(4_000), drawn(500, seed=9).x
    spreads = [
        fit_folds(QUICK, lesson.take(np.arange(n)), PurgedKFold(4)).forest.spread(asked).mean()
        for n in (400, 4_000)
    ]
    assert spreads[0] > 1.3 * spreads[1]


@pytest.mark.parametrize("learner, lesson", every_kind())
def test_lessons_that_are_broken_are_refused(learner, lesson):
    with pytest.raises((DataError, ModelError)):
        fit(learner, lesson._replace(x=lesson.x[:, :2]))
    with pytest.raises(DataError, match="y must be finite"):
        fit(learner, lesson._replace(y=np.where(np.arange(len(lesson.y)) == 3, np.nan, lesson.y)))
    with pytest.raises(DataError, match="weight must be"):
        fit(learner, lesson._replace(weight=np.full(len(lesson.y), -1.0)))
    with pytest.raises(ModelError, match="must have rows"):
        fit(learner, lesson.take(np.arange(0)))


# --- walking forward ---


def test_a_walk_agrees_with_its_own_texts_and_any_number_of_workers():
    lesson = drawn(2_000)
    one, two = (walk(fast(QUICK), lesson, SPLITS, workers) for workers in (1, 3))
    assert one.forest.texts == two.forest.texts
    for k, said in enumerate(one.forest.members(lesson.x)):
        mine = one.fold == k
        np.testing.assert_array_equal(said[mine], one.out_of_fold[mine])


@given(st.integers(400, 1_900))
@settings(max_examples=5, deadline=None)
def test_nothing_later_reaches_a_forecast(cut):
    lesson = drawn(2_000)
    was = walk(fast(QUICK), lesson, SPLITS).out_of_fold
    x, y = lesson.x.copy(), lesson.y.copy()
    x[cut:] = 1e6 * np.random.default_rng(cut).normal(size=x[cut:].shape)
    y[cut:] = 1 - y[cut:]
    now = walk(fast(QUICK), lesson._replace(x=x, y=y), SPLITS).out_of_fold
    # a label is known ten seconds after its row; rows before the cut were forecast from before it
    np.testing.assert_array_equal(now[:cut], was[:cut])


def test_bins_see_rows_that_refits_would_see_alike():
    lesson = drawn(3_000)
    whole, quick = fit_folds(QUICK, lesson, SPLITS), walk(QUICK, lesson, SPLITS)
    tested = np.isfinite(whole.out_of_fold)
    scores = [auc(one.out_of_fold[tested], lesson.y[tested]) for one in (whole, quick)]
    assert scores[0] > 0.65 and abs(scores[0] - scores[1]) < 0.02
    assert whole.forest.texts[0] == quick.forest.texts[0]  # the first window's bins are its own


def test_a_column_that_wakes_later_is_used_and_one_that_gets_holes_is_seen():
    lesson = drawn(2_000)
    x = lesson.x.copy()
    x[:700, 0] = 0.0
    quick = walk(fast(QUICK), lesson._replace(x=x), SPLITS)
    splits = [booster.feature_importance()[0] for booster in quick.forest.boosters]
    assert splits[0] == 0 and splits[-1] > 0
    holes = lesson.x[:1_000].copy()
    holes[900, 3] = np.nan
    assert outgrown(holes, lesson.x[:500]).tolist() == [3]


def test_weights_walk_with_their_rows():
    lesson = drawn(1_500)
    weight = np.where(np.arange(1_500) < 200, 0.0, 1.0)
    turned = np.where(weight == 0, 1 - lesson.y, lesson.y)
    one, two = (
        walk(QUICK, lesson._replace(weight=weight, y=y), SPLITS).forest.predict(lesson.x)
        for y in (lesson.y, turned)
    )
    np.testing.assert_allclose(one, two, atol=1e-9)


# --- calibration ---


@given(seed=st.integers(0, 10_000), kind=st.sampled_from(["platt", "isotonic", "auto"]))
@settings(max_examples=40, deadline=None)
def test_a_curve_never_turns_the_order_and_survives_a_file(seed, kind):
    import json

    rng = np.random.default_rng(seed)
    p = rng.choice([rng.uniform(size=900), rng.integers(0, 3, 900) / 2])
    curve = fit_calibration(p, rng.uniform(size=900) < rng.uniform(0.2, 0.8), kind=kind)
    grid = np.linspace(0, 1, 101)
    bent = curve.apply(grid)
    assert (np.diff(bent) >= 0).all() and (bent > 0).all() and (bent < 1).all()
    assert read_calibration(json.loads(json.dumps(curve.to_dict()))) == curve


def test_the_trader_reads_the_curve_and_bends_alike():
    from tradebook.training.prediction import _correct_all, read_curve

    rng = np.random.default_rng(3)
    p = rng.uniform(0.2, 0.8, 6_000)
    happened = rng.uniform(size=6_000) < p**2
    for kind in ("platt", "isotonic"):
        curve, asked = fit_calibration(p, happened, kind=kind), np.linspace(0, 1, 301)
        live = asked.copy()
        _correct_all(live, *read_curve(curve.to_dict()))
        np.testing.assert_allclose(live, curve.apply(asked), rtol=0, atol=1e-12)
        assert log_loss(curve.apply(p), happened) < log_loss(p, happened)


# --- opponents ---


def test_the_last_known_outcome_knows_no_open_label():
    lesson = drawn(300)
    known = last_known(lesson)
    for i in range(300):
        ended = np.flatnonzero(lesson.ts_end <= lesson.ts_start[i])
        assert known[i] == (lesson.y[ended[-1]] if len(ended) else 0.5)


def test_opponents_forecast_the_same_rows_from_the_past_only():
    lesson = drawn(1_500)
    was = opponents(lesson, SPLITS)
    later = np.arange(1_500) >= 1_200  # the last test
    now = opponents(lesson._replace(y=np.where(later, 1 - lesson.y, lesson.y)), SPLITS)
    assert set(was) == {"majority class", "last sign", "order flow", "three features"}
    for name in set(was) - {"last sign"}:  # that one knows labels that ended within the test
        np.testing.assert_array_equal(was[name], now[name])
        assert (np.isfinite(was[name]) == np.isfinite(was["majority class"])).all()


def test_a_model_of_noise_beats_nobody():
    beaten = 0
    for seed in range(5):
        lesson = drawn(1_500, seed=seed, lean=0.0)
        found = fit_folds(QUICK, lesson, SPLITS)
        fights = duels(found.out_of_fold, opponents(lesson, SPLITS), lesson, found.fold)
        beaten += all(one.is_beaten for one in fights)
    assert beaten == 0
