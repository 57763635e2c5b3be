"""Purged splits: no shared time between training and test, for any intervals."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tradebook.base.errors import ModelError
from tradebook.training.combinatorial import (
    CombinatorialPurgedKFold,
    forecast_paths,
    path_table,
)
from tradebook.training.metrics import (
    auc,
    brier,
    information_coefficient,
    level_folds,
    log_loss,
    ranks,
    time_blocks,
)
from tradebook.training.splits import PurgedKFold, PurgedWalkForward, WithSpans


@st.composite
def intervals(draw):
    "Labels of random start and length, in order of their start, with ties"
    n = draw(st.integers(2, 80))
    starts = sorted(draw(st.lists(st.integers(0, 500), min_size=n, max_size=n)))
    lengths = draw(st.lists(st.integers(0, 120), min_size=n, max_size=n))
    start = np.array(starts, np.int64)
    return start, start + np.array(lengths, np.int64)


def folds_or_nothing(splitter, start, end):
    "All folds, or an empty list when one of them has nothing to train on"
    try:
        return list(splitter.split(start, end))
    except ModelError:
        return []


@settings(max_examples=500, deadline=None)
@given(intervals(), st.integers(2, 6), st.integers(0, 60))
def test_training_and_test_never_share_time(drawn, n_splits, embargo):
    start, end = drawn
    assume(len(start) >= n_splits)
    for train, test in folds_or_nothing(PurgedKFold(n_splits, embargo), start, end):
        overlap = (start[train][:, None] <= end[test]) & (start[test] <= end[train][:, None])
        assert not overlap.any()
        after = start[train] > start[test].max()
        assert (start[train][after] > end[test].max() + embargo).all()
        assert len(train) and len(test)


@settings(max_examples=200, deadline=None)
@given(intervals(), st.integers(2, 6))
def test_every_row_is_tested_once_in_order(drawn, n_splits):
    start, end = drawn
    folds = folds_or_nothing(PurgedKFold(n_splits), start, end)
    if folds:
        tested = np.concatenate([test for _, test in folds])
        np.testing.assert_array_equal(tested, np.arange(len(start)))


@settings(max_examples=300, deadline=None)
@given(intervals(), st.integers(1, 6), st.integers(0, 60))
def test_walking_forward_trains_on_the_past_only(drawn, n_splits, embargo):
    start, end = drawn
    assume(len(start) > n_splits)
    for train, test in folds_or_nothing(PurgedWalkForward(n_splits, embargo), start, end):
        assert end[train].max() + embargo < start[test].min()
        left_out = np.setdiff1d(np.arange(test[0]), train)
        assert (end[left_out] + embargo >= start[test[0]]).all()  # and on all of it


@settings(max_examples=200, deadline=None)
@given(intervals(), st.integers(1, 6), st.integers(0, 30), st.integers(31, 300))
def test_a_sliding_walk_is_the_expanding_one_without_its_oldest(drawn, n_splits, embargo, window):
    start, end = drawn
    assume(len(start) > n_splits)
    whole = {
        int(test[0]): train
        for train, test in folds_or_nothing(PurgedWalkForward(n_splits, embargo), start, end)
    }
    slid = folds_or_nothing(PurgedWalkForward(n_splits, embargo, window), start, end)
    for train, test in slid:
        kept = whole[int(test[0])]
        kept = kept[start[kept] >= start[test[0]] - window]
        np.testing.assert_array_equal(train, kept)


@settings(max_examples=300, deadline=None)
@given(intervals(), st.integers(2, 6), st.integers(1, 4), st.integers(0, 40))
def test_no_choice_of_tests_shares_time_with_its_training(drawn, n_folds, n_test_folds, embargo):
    start, end = drawn
    assume(n_test_folds < n_folds <= len(start))
    splitter = CombinatorialPurgedKFold(n_folds, n_test_folds, embargo)
    folds = np.array_split(np.arange(len(start)), n_folds)
    found = folds_or_nothing(splitter, start, end)
    for (train, test), chosen in zip(found, splitter.choices(), strict=False):
        np.testing.assert_array_equal(test, np.concatenate([folds[f] for f in chosen]))
        overlap = (start[train][:, None] <= end[test]) & (start[test] <= end[train][:, None])
        assert not overlap.any() and not np.intersect1d(train, test).size
        for f in chosen:
            after = train[train > folds[f][-1]]
            assert (start[after] > end[folds[f]].max() + embargo).all()
    if found:
        assert len(found) == splitter.get_n_splits()


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.integers(1, 6))
def test_every_path_holds_every_fold_once_and_every_forecast_is_used(n_folds, n_test_folds):
    assume(n_test_folds < n_folds)
    splitter = CombinatorialPurgedKFold(n_folds, n_test_folds)
    table, choices = path_table(splitter), splitter.choices()
    used = {(int(split), fold) for path in table for fold, split in enumerate(path)}
    assert used == {(k, fold) for k, chosen in enumerate(choices) for fold in chosen}
    assert table.size == len(used)
    start = np.arange(10 * n_folds)
    splits = [set(train.tolist()) for train, _ in splitter.split(start, start)]
    asked = iter(range(len(splits)))
    paths = forecast_paths(
        splitter, start, start, lambda train, test: np.full(len(test), next(asked))
    )
    for path in paths:  # no row was forecast by a model that had seen it
        assert all(row not in splits[int(k)] for row, k in enumerate(path))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(3, 8), st.integers(1, 4), st.integers(0, 6), st.integers(0, 6), st.integers(20, 40)
)
def test_fold_by_fold_like_skfolio(n_folds, n_test_folds, horizon, embargo, size):
    # Both are defined where every label has the same length and every fold the same number of rows.
    model_selection = pytest.importorskip("skfolio.model_selection")
    assume(2 <= n_test_folds < n_folds)  # skfolio wants two or more
    start = np.arange(size * n_folds)
    ours = CombinatorialPurgedKFold(n_folds, n_test_folds, embargo)
    theirs = model_selection.CombinatorialPurgedCV(
        n_folds, n_test_folds, purged_size=horizon, embargo_size=embargo
    )
    x = np.zeros((len(start), 1))
    pairs = zip(ours.split(start, start + horizon), theirs.split(x), strict=True)
    for (train, test), (their_train, their_tests) in pairs:
        np.testing.assert_array_equal(train, their_train)
        np.testing.assert_array_equal(test, np.sort(np.concatenate(their_tests)))
    assert ours.n_paths == theirs.n_test_paths
    assert ours.get_n_splits() == theirs.n_splits


@settings(max_examples=100, deadline=None)
@given(intervals(), st.integers(2, 5))
def test_scikit_learn_sees_the_same_splits(drawn, n_splits):
    start, end = drawn
    assume(len(start) > n_splits)
    x = np.zeros((len(start), 2))
    for splitter in (PurgedKFold(n_splits), PurgedWalkForward(n_splits)):
        expected = folds_or_nothing(splitter, start, end)
        if not expected:
            continue
        given_spans = WithSpans(splitter, start, end)
        found = list(given_spans.split(x, np.zeros(len(x)), None))
        assert given_spans.get_n_splits(x) == len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(np.concatenate(a), np.concatenate(b))


def test_nothing_is_purged_without_need():
    start = np.arange(0, 1_000, 10)
    for train, test in PurgedKFold(5).split(start, start + 9):
        assert len(train) == len(start) - len(test)


def test_an_embargo_takes_exactly_its_time():
    start = np.arange(1_000)
    for train, test in PurgedKFold(4, embargo_ns=25).split(start, start + 5):
        later = train[train > test[-1]]
        if len(later):
            assert later[0] == test[-1] + 5 + 25 + 1


weighted = st.integers(0, 2**32 - 1)


@settings(max_examples=100, deadline=None)
@given(weighted)
def test_weighted_measures_equal_scikit_learn(seed):
    from sklearn import metrics as sk

    rng = np.random.default_rng(seed)
    p = rng.integers(1, 20, 60) / 20  # many ties
    is_up, weight = rng.uniform(size=60) < p, rng.integers(0, 4, 60).astype(float)
    assume(0 < (is_up * weight).sum() < weight.sum())
    kept = weight > 0
    assert np.isclose(auc(p, is_up, weight), sk.roc_auc_score(is_up, p, sample_weight=weight))
    loss = sk.log_loss(is_up[kept], p[kept], sample_weight=weight[kept], labels=[False, True])
    assert np.isclose(log_loss(p, is_up, weight), loss)
    score = sk.brier_score_loss(is_up, p, sample_weight=weight, labels=[False, True])
    assert np.isclose(brier(p, is_up, weight), score)


@settings(max_examples=100, deadline=None)
@given(weighted)
def test_ranks_and_information_coefficient_equal_scipy(seed):
    from scipy import stats

    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 15, 50).astype(float), rng.normal(size=50)
    np.testing.assert_allclose(ranks(a), stats.rankdata(a) - 1)
    assert np.isclose(information_coefficient(a, b), stats.spearmanr(a, b).statistic)


def test_a_weight_is_a_repetition():
    rng = np.random.default_rng(1)
    p, is_up = rng.uniform(size=40), rng.uniform(size=40) < 0.5
    weight = rng.integers(0, 4, 40)
    again = np.repeat(np.arange(40), weight)
    for measure in (auc, log_loss, brier):
        assert np.isclose(measure(p, is_up, weight.astype(float)), measure(p[again], is_up[again]))


def test_blocks_are_whole_stretches_of_ten_labels():
    start = np.concatenate([np.arange(0, 5_000), np.arange(90_000, 95_000)]) * 1_000_000_000
    block = time_blocks(start, start + 30_000_000_000)
    assert (np.diff(block) >= 0).all() and set(block) == set(range(block.max() + 1))
    for k in range(block.max() + 1):
        inside = start[block == k]
        assert inside[-1] - inside[0] < 300_000_000_000


def test_levelled_folds_have_no_mean_of_their_own():
    rng = np.random.default_rng(2)
    fold = np.repeat([0, 1, 2], [10, 50, 5])
    level = level_folds(rng.normal(size=65) + fold, fold)
    assert all(abs(level[fold == k].mean()) < 1e-11 for k in range(3))


@pytest.mark.parametrize("n_splits, embargo", [(1, 0), (0, 0), (3, -1)])
def test_senseless_splitters_are_refused(n_splits, embargo):
    with pytest.raises(ModelError, match="must be >="):
        PurgedKFold(n_splits, embargo)
    if n_splits != 1:
        with pytest.raises(ModelError, match="must be >="):
            PurgedWalkForward(n_splits, embargo)
