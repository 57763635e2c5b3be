"""What features know: the number is scipy's, the bands keep their promise, what was planted is found, luck is not."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from tradebook.base.clock import NS_PER_S
from tradebook.base.errors import DataError
from tradebook.features.rows import build_features
from tradebook.features.schema import feature_set
from tradebook.labels.horizon import LABEL
from tradebook.market.quotes import quotes
from tradebook.market.worlds import make_world
from tradebook.training.information import (
    bands,
    block_correlation,
    chances,
    cost_table,
    ic_by_age,
    ic_by_group,
    information_table,
    labels_by_horizon,
    ranks_in_order,
)
from tradebook.training.metrics import bootstrap, information_coefficient, ranks, time_blocks

HORIZONS = (1, 2, 5, 10)


def labels_of(move_bps, horizon_s, spread_bps=0.0):
    "Labels of rows a second apart with these moves; NaN: no outcome"
    out = np.zeros(len(move_bps), LABEL)
    out["ts_start"] = np.arange(len(out)) * NS_PER_S
    out["ts_end"] = out["ts_start"] + round(horizon_s * NS_PER_S)
    out["is_valid"] = np.isfinite(move_bps)
    out["gross_bps"] = move_bps
    out["long_net_bps"], out["short_net_bps"] = move_bps - spread_bps, -move_bps - spread_bps
    return out


def path_labels(steps_bps, horizons):
    "Labels of a price that takes these steps, one a second"
    price = np.concatenate([[0.0], np.cumsum(steps_bps)])
    out = {}
    for h in horizons:
        move = np.full(len(steps_bps), np.nan)
        move[: len(price) - h] = (price[h:] - price[:-h])[: len(steps_bps)]
        out[float(h)] = labels_of(move, h)
    return out


@pytest.fixture(scope="module")
def worlds():
    "Features and labels of a world with a planted imbalance and of one with nothing, and the truth"
    found = {}
    for name, settings in (("imbalance", {"strength": 3.0}), ("null", {})):
        market = make_world(name, seed=11, duration_s=900.0, **settings).markets[0]
        features = build_features(market.events, market.instrument, feature_set())
        labels = labels_by_horizon(features, quotes(market.events), HORIZONS)
        table = information_table(features.x, features.feature_set.names, labels)
        found[name] = features, labels, table, market.truth
    return found


@pytest.mark.parametrize("seed", range(4))
def test_ic_is_spearman_with_ties_and_nan(seed):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 9, (400, 2)).astype(float)
    x[rng.random((400, 2)) < 0.2] = np.nan
    move = np.round(np.nan_to_num(x[:, 0]) + rng.normal(0, 4, 400))
    move[rng.random(400) < 0.2] = np.nan
    table = information_table(x, ["a", "b"], {1.0: labels_of(move, 1)})
    for k in range(2):
        known = np.isfinite(x[:, k]) & np.isfinite(move)
        assert table.n[k] == known.sum()
        assert table.ic[k] == pytest.approx(spearmanr(x[known, k], move[known])[0], abs=1e-12)


def test_ranks_in_order_are_ranks_of_any_choice():
    rng = np.random.default_rng(0)
    for _ in range(50):
        value = rng.integers(0, 7, rng.integers(1, 60)).astype(float)
        keep = rng.random(len(value)) < 0.6
        mine = ranks_in_order(np.argsort(value), value, keep)
        assert np.array_equal(mine[keep], ranks(value[keep])) and not mine[~keep].any()


def test_error_is_that_of_redrawing_rows():
    rng = np.random.default_rng(3)
    block = np.sort(rng.integers(0, 30, 900))
    a, b = rng.normal(size=900), rng.normal(size=900) + rng.normal(size=30)[block]
    one = block_correlation(ranks(a), ranks(b), block, n_draws=400)
    drawn = []
    bootstrap(lambda w: drawn.append(information_coefficient(a, b, w)) or drawn[-1], block, 400)
    by_rows = np.std(drawn[:-1]) if len(drawn) == 401 else np.std(drawn)
    assert one.error == pytest.approx(by_rows * np.sqrt(30 / 29), rel=1e-3)


@pytest.mark.parametrize("horizon, memory", [(5, 20), (10, 5), (1, 60)])
def test_bands_cover_and_alarms_are_as_promised_without_any_signal(horizon, memory):
    "Persistent signals, overlapping moves, no connection; tolerances are four standard errors"
    n, n_worlds, held, alarms = 3_000, 250, 0, 0
    ts = np.arange(n, dtype=np.int64) * NS_PER_S
    block = time_blocks(ts, ts + horizon * NS_PER_S)
    rng = np.random.default_rng(42)
    for _ in range(n_worlds):
        steps = rng.standard_t(4, n + horizon)
        move = np.convolve(steps, np.ones(horizon), "valid")[1:][:n]
        slow = np.convolve(rng.normal(size=n + memory - 1), np.ones(memory), "valid")[: len(move)]
        one = block_correlation(ranks(slow), ranks(move), block[: len(move)], 100)
        (low,), (high,) = bands([one.value], [one.error], [one.n_blocks])
        held += low <= 0 <= high
        alarms += chances([one.value], [one.null_error], [one.n_blocks])[0] < 0.05
    slack = 4 * np.sqrt(0.05 * 0.95 / n_worlds)
    assert 0.95 - slack <= held / n_worlds <= 0.95 + slack
    assert alarms / n_worlds <= 0.05 + slack


def test_bands_widen_with_trials_and_never_narrow():
    width = [np.ptp(bands([0.2], [0.05], [40], n)) for n in (1, 2, 10, 200)]
    p = [chances([0.2], [0.05], [40], n)[0] for n in (1, 2, 10, 200)]
    assert width == sorted(width) and p == sorted(p) and p[1] == pytest.approx(2 * p[0])
    assert chances([0.2], [np.nan], [3])[0] != chances([0.2], [np.nan], [3])[0]


@pytest.mark.parametrize("delay", [1, 4, 9])
def test_the_planted_horizon_is_the_one_that_stands_out(delay):
    "A signal that moves the price exactly so many seconds later"
    rng = np.random.default_rng(delay)
    signal, steps = rng.normal(size=6_000), rng.normal(size=6_000)
    steps[delay - 1 :] += 0.5 * signal[: 6_000 - delay + 1]
    table = information_table(
        np.stack([signal, rng.normal(size=6_000)], axis=1),
        ["told", "noise"],
        path_labels(steps, range(1, 13)),
    )
    told = table[table.feature == "told"].set_index("horizon_s")
    assert told.index[told.is_found].min() == delay
    assert np.r_[told.ic.iloc[0], np.diff(told.ic)].argmax() == delay - 1  # it enters there
    assert not table[table.feature == "noise"].is_found.any()


def test_planted_world_is_found_and_the_null_world_is_not(worlds):
    _, _, planted, _ = worlds["imbalance"]
    _, _, nothing, _ = worlds["null"]
    found = planted[planted.is_found]
    assert {"ofi_1_1s", "ofi_5_1s"} <= set(found.feature[found.horizon_s == 1])
    assert (found[found.feature.str.startswith(("ofi", "imbalance"))].ic > 0).all()
    assert not nothing.is_found.any()
    assert planted.n_trials.eq(len(planted)).all()


def test_the_planted_world_grows_with_the_horizon_as_its_truth_does(worlds):
    "The pressure lasts for seconds, so its information in the true price rises with the horizon"
    _, _, planted, truth = worlds["imbalance"]
    labels = path_labels(np.append(np.diff(truth["fair_bps"]), 0.0), HORIZONS)
    true = information_table(truth["pressure"][:, None], ["pressure"], labels)
    seen = planted[planted.feature == "ofi_1_5s"].ic.to_numpy()
    assert true.is_found[0] and (true.ic > 0).all()
    assert (np.diff(true.ic[:3]) > 0).all() and (np.diff(seen[:3]) > 0).all()


def test_more_trials_of_the_caller_are_counted(worlds):
    features, labels, planted, _ = worlds["imbalance"]
    again = information_table(
        features.x, features.feature_set.names, labels, n_trials=10**9, n_draws=20
    )
    assert again.is_found.sum() < planted.is_found.sum()


def test_age_zero_is_the_table_itself_and_holes_are_not_crossed(worlds):
    features, labels, planted, _ = worlds["imbalance"]
    aged = ic_by_age(features, labels[2.0], (0, 3), ["ofi_5_5s"])
    now = planted[(planted.feature == "ofi_5_5s") & (planted.horizon_s == 2)].ic.iloc[0]
    assert aged.ic[0] == pytest.approx(now)
    broken = features[:]
    broken.rows["segment"][600:] += 1
    assert ic_by_age(broken, labels[2.0], (3,), ["ofi_5_5s"]).n[0] == aged.n[1] - 3
    broken.rows["segment"][600:] -= 1


def test_groups_are_the_table_of_their_rows(worlds):
    features, labels, _, _ = worlds["imbalance"]
    group = (np.arange(len(features)) > 500).astype(int)
    column, one = features.column("ofi_5_5s")[:, None], {1.0: labels[1.0]}
    table = ic_by_group(column, ["ofi_5_5s"], one, group)
    alone = information_table(column[group == 1], ["ofi_5_5s"], {1.0: labels[1.0][group == 1]})
    assert table.ic[1] == pytest.approx(alone.ic[0]) and table.n_trials.eq(2).all()


def test_costs_are_those_of_the_rows_that_are_traded():
    move = np.random.default_rng(1).normal(size=2_000)
    labels = {1.0: labels_of(move, 1, spread_bps=0.3)}
    for sign in (1, -1):
        one = cost_table(sign * move[:, None], ["told"], labels, 2.0, 1.0).iloc[0]
        best = np.sort(np.abs(np.r_[np.sort(move)[:200], np.sort(move)[-200:]])).mean()
        assert one.sign == sign and one.n == 400
        assert one.gross_bps == pytest.approx(best)
        assert one.spread_bps == pytest.approx(0.3)
        assert one.taker_bps == pytest.approx(best - 0.3 - 4)
        assert one.maker_most_bps == pytest.approx(best + 0.3 - 2)
        assert not one.survives
    free = cost_table(move[:, None], ["told"], {1.0: labels_of(move, 1)}, 0.0, 0.0).iloc[0]
    assert free.survives and free.taker_bps == free.gross_bps


def test_a_constant_or_missing_column_is_nan_and_not_found():
    move = np.random.default_rng(2).normal(size=300)
    x = np.stack([np.ones(300), np.full(300, np.nan)], axis=1)
    labels = {1.0: labels_of(move, 1)}
    table = information_table(x, ["flat", "missing"], labels)
    assert table.ic.isna().all() and not table.is_found.any() and list(table.n) == [300, 0]
    paid = cost_table(x, ["flat", "missing"], labels, 1.0, 1.0)
    assert paid.gross_bps.isna().all() and not paid.survives.any()


def test_what_does_not_fit_is_refused_by_name():
    labels = {1.0: labels_of(np.zeros(5), 1)}
    for x, names, given, text in (
        (np.zeros((5, 2)), ["a"], labels, "one column for each of 1 names"),
        (np.zeros((4, 1)), ["a"], labels, "labels at 1.0 s must have 4 rows, were 5"),
        (np.zeros((0, 1)), ["a"], labels, "at least one row"),
        (np.zeros((5, 1)), ["a"], {}, "at least one horizon"),
    ):
        with pytest.raises(DataError, match=text):
            information_table(x, names, given)
