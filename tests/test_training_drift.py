"""Drift: quiet on more of the same, loud on change, in every one of its four questions; and the outlier guard."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradebook.base.clock import NS_PER_S
from tradebook.training.drift import adversary, calibration_change, decayed, measure_drift
from tradebook.training.metrics import time_blocks
from tradebook.training.outliers import OutlierGuard
from tradebook.training.stability import bin_edges, block_counts, psi, stability, stretch_psi

NAMES = ("slow", "fast", "level")


def spells(n, seed, memory=0.998):
    "Three columns of one market: a slow one, noise, and one that repeats a few values"
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=n)
    slow = np.empty(n)
    last = rng.normal()
    for i in range(n):
        last = memory * last + np.sqrt(1 - memory**2) * noise[i]
        slow[i] = last
    return np.column_stack([slow, rng.normal(size=n), rng.integers(0, 4, n)])


def cut(rows, n):
    "Split rows a second apart into what was learned and what came since"
    ts = np.arange(len(rows)) * NS_PER_S
    return rows[:n], ts[:n], rows[n:], ts[n:]


@pytest.mark.parametrize("times", [1, 10])
def test_ten_times_the_rows_of_the_same_market_give_no_alarm(times):
    "The same stretch, sampled ten times as often"
    alarms = 0
    for seed in range(12):
        then, ts_then, now, ts_now = cut(spells(11_000, seed), 10_000)
        step = np.tile(np.arange(times), len(now)) * (NS_PER_S // times)
        fine = np.repeat(now, times, axis=0), np.repeat(ts_now, times) + step
        alarms += bool(stability(then, ts_then, *fine, NAMES).moved)
    assert alarms <= 1


def test_rows_do_not_change_the_index():
    rng = np.random.default_rng(1)
    then, now = rng.integers(1, 1_000, (50, 11)), rng.integers(0, 1_000, (50, 11))
    np.testing.assert_allclose(psi(then, now), psi(then * 10, now * 1_000), rtol=1e-9)


@given(
    st.lists(st.integers(0, 500), min_size=2, max_size=12).filter(any),
    st.lists(st.integers(0, 500), min_size=2, max_size=12).filter(any),
)
@settings(max_examples=60, deadline=None)
def test_index_is_a_distance_of_shares(then, now):
    n = min(len(then), len(now))
    if not (any(then[:n]) and any(now[:n])):
        return
    one, other = psi(then[:n], now[:n]), psi(now[:n], then[:n])
    assert one >= 0 and one == pytest.approx(other) and psi(then[:n], then[:n]) == 0


def test_blocks_and_stretches_agree_with_plain_counting():
    rows = spells(3_000, 2)
    rows[::17, 1] = np.nan
    ts, edges = np.arange(3_000) * NS_PER_S, bin_edges(rows)
    counts = block_counts(rows, ts, edges, 100 * NS_PER_S)
    assert counts.shape == (3, 30, 11) and (counts.sum((1, 2)) == 3_000).all()
    found = stretch_psi(counts, 5)
    for k in (0, 7, 25):
        inside = (ts >= k * 100 * NS_PER_S) & (ts < (k + 5) * 100 * NS_PER_S)
        for j in range(3):
            parts = []
            for chosen in (~inside, inside):
                x = rows[chosen, j]
                known = x[np.isfinite(x)]
                binned = np.bincount(np.searchsorted(edges[j], known, side="right"), minlength=11)
                binned[10] += (~np.isfinite(x)).sum()
                parts.append(binned)
            assert found[j, k] == pytest.approx(float(psi(*parts)))


@pytest.mark.parametrize(
    "change, name",
    [
        (lambda now: now * [1, 3, 1], "fast"),
        (lambda now: now + [0, 1.5, 0], "fast"),
        (lambda now: now * [1, 1, 0], "level"),
        (lambda now: np.where([False, True, False], np.nan, now), "fast"),
    ],
)
def test_each_kind_of_change_is_found_by_name(change, name):
    then, ts_then, now, ts_now = cut(spells(11_000, 3), 10_000)
    assert stability(then, ts_then, change(now), ts_now, NAMES).moved == [name]


def test_short_reference_is_not_judged():
    then, ts_then, now, ts_now = cut(spells(3_000, 4), 2_000)
    one = stability(then, ts_then, now * 9, ts_now, NAMES)
    assert not one.is_judged and one.moved == []


def test_neighbours_do_not_give_the_answer_away():
    "A slow column makes windows look different to shuffled folds, and not to folds of time"
    alarms = [adversary(*np.split(spells(9_000, s), [8_000]), NAMES).is_moved for s in range(3)]
    assert sum(alarms) <= 1


def test_a_changed_relation_is_found_where_no_column_moved():
    rng = np.random.default_rng(5)
    base = rng.normal(size=(9_000, 2))
    rows = np.column_stack([base[:, 0], 0.8 * base[:, 0] + 0.6 * base[:, 1]])
    rows[8_000:, 1] = -0.8 * base[8_000:, 0] + 0.6 * base[8_000:, 1]
    ts = np.arange(9_000) * NS_PER_S
    found = measure_drift(rows[:8_000], ts[:8_000], rows[8_000:], ts[8_000:], ("a", "b"))
    assert found.columns.moved == [] and found.together.is_moved and not found.is_drifted
    assert [c.status for c in found.checks()] == ["note", "pass", "warn"]


def forecasts(n, seed, slope, horizon=10):
    "Forecasts of overlapping labels: one truth for each horizon of rows"
    rng = np.random.default_rng(seed)
    p = np.repeat(rng.uniform(0.3, 0.7, n // horizon), horizon)
    up = np.repeat(rng.uniform(size=n // horizon) < 0.5 + slope * (p[::horizon] - 0.5), horizon)
    ts = np.arange(n) * NS_PER_S
    return p, up, time_blocks(ts, ts + horizon * NS_PER_S)


def test_truth_is_quiet_on_the_same_and_loud_when_it_turns():
    then = forecasts(20_000, 1, 1.0)
    quiet = [calibration_change(*then, *forecasts(6_000, s, 1.0)).moved for s in range(2, 14)]
    assert sum(bool(words) for words in quiet) <= 1
    turned = calibration_change(*then, *forecasts(6_000, 2, -1.0))
    assert {"slope", "auc"} <= set(turned.moved)


def test_overlapping_labels_are_not_independent_evidence():
    "Each outcome told forty times over must not look like forty outcomes"
    then, alarms = forecasts(20_000, 1, 1.0, 10), 0
    for seed in range(10):
        alarms += bool(calibration_change(*then, *forecasts(6_000, seed + 50, 1.0, 40)).moved)
    assert alarms <= 2


def test_decay_needs_sure_losses():
    rng = np.random.default_rng(6)
    block = np.arange(600) // 6
    assert decayed(rng.normal(-3, 6, 600), block)
    assert not decayed(rng.normal(3, 6, 600), block)
    assert not decayed(np.full(10, -50.0), np.arange(10))
    one_bad_hour = np.where(block == 7, -500.0, 1.0)
    assert not decayed(one_bad_hour, block)


@given(st.integers(0, 2**32 - 1), st.floats(0, 1e6))
@settings(max_examples=40, deadline=None)
def test_guard_says_the_same_row_by_row_and_all_at_once(seed, far):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(400, 4)) * [1, 1e-6, 1e6, 0] + [0, 5, -3, 2]
    guard = OutlierGuard.fit(x, ("a", "b", "c", "d"))
    rows = x[:50] + far * rng.integers(0, 2, (50, 4))
    rows[::9, 0] = np.nan
    found = [guard.check(row) for row in rows]
    outside = (rows < guard.low) | (rows > guard.high)
    assert [one is not None for one in found] == outside.any(1).tolist()
    assert guard.share_outside(rows) == pytest.approx(outside.any(1).mean())
    for one, row, out in zip(found, rows, outside, strict=True):
        if one:
            j = guard.names.index(one.name)
            assert out[j] and one.value == row[j] and one.n_columns == out.sum()
            assert (one.low, one.high) == (guard.low[j], guard.high[j]) and one.distance > 0


def test_ordinary_rows_pass_the_guard_and_training_rows_nearly_all():
    rows = spells(20_000, 7)
    guard = OutlierGuard.fit(rows[:15_000], NAMES)
    assert guard.share_outside(rows[:15_000]) == 0 and guard.share_outside(rows[15_000:]) < 0.01
