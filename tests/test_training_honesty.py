"""The statistics of honesty against plain counting, simulation and the numbers printed in the papers."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tradebook.base.clock import NS_PER_S
from tradebook.training.honesty import concentration, findings, honesty, performance_by
from tradebook.training.overfitting import backtest_overfitting, half_sharpes, halves
from tradebook.training.sharpe import (
    Record,
    deflate,
    deflated_sharpe,
    describe_record,
    expected_best_sharpe,
    least_track_record,
    period_returns,
    probabilistic_sharpe,
)
from tradebook.training.significance import block_significance, block_t

seeds = st.integers(0, 2**32 - 1)


def test_the_examples_of_the_papers():
    # Bailey and Lopez de Prado 2012, section on the probabilistic ratio: 24 months of a fund
    fund = Record(0.458, 24, -2.448, 10.164)
    assert round(probabilistic_sharpe(fund), 3) == 0.913
    assert round(probabilistic_sharpe(Record(0.458, 24, 0.0, 3.0)), 3) == 0.982
    # the same: years to show 2 above 1, from daily, weekly and monthly returns
    for a_year, years in ((252, 2.73), (52, 2.83), (12, 3.24)):
        seen = Record(2 / a_year**0.5, 0, 0.0, 3.0)
        assert round(least_track_record(seen, 1 / a_year**0.5) / a_year, 2) == years
    # Bailey and Lopez de Prado 2014, the numerical example
    seen = Record(2.5 / 250**0.5, 1_250, -3.0, 10.0)
    assert round(expected_best_sharpe(100, 0.5 / 250), 4) == 0.1132
    assert round(deflated_sharpe(seen, 100, 0.5 / 250), 4) == 0.9004
    assert round(deflated_sharpe(seen, 46, 0.5 / 250), 4) == 0.9505


@settings(max_examples=100, deadline=None)
@given(seeds)
def test_the_shape_of_a_record_is_scipys(seed):
    from scipy import stats

    r = np.random.default_rng(seed).standard_t(5, 60)
    one = describe_record(r)
    assert np.isclose(one.skewness, stats.skew(r))
    assert np.isclose(one.kurtosis, stats.kurtosis(r, fisher=False))
    assert np.isclose(one.sharpe, r.mean() / r.std(ddof=1))


@settings(max_examples=100, deadline=None)
@given(st.floats(0.01, 1), st.floats(-2, 2), st.floats(2, 12), st.floats(0.6, 0.99))
def test_the_needed_length_reaches_the_wanted_chance(sharpe, skewness, kurtosis, confidence):
    assume(kurtosis > 1 + skewness**2)  # no distribution has less
    one = Record(sharpe, 2, skewness, kurtosis)
    n = least_track_record(one, 0.0, confidence)
    assert (
        np.isclose(probabilistic_sharpe(one._replace(n=n + 1e-9)), confidence, atol=1e-6) or n < 2
    )


def test_the_chance_is_right_for_returns_that_are_not_normal():
    # The true ratio of these skewed returns is known; the 95 % chance must cover it 95 times in 100
    rng = np.random.default_rng(3)
    drawn = 0.2 + 1 - rng.exponential(size=(4_000, 400))  # mean 0.2, deviation 1, skewness -2
    above = np.array([probabilistic_sharpe(describe_record(r), 0.2) for r in drawn])
    assert 0.03 < (above > 0.95).mean() < 0.07
    assert 0.03 < (above < 0.05).mean() < 0.08


@settings(max_examples=100, deadline=None)
@given(seeds, st.integers(1, 40))
def test_periods_add_up_to_the_trades_inside_them(seed, period_s):
    rng = np.random.default_rng(seed)
    ts, net = rng.integers(-50, 500, 80) * NS_PER_S, rng.normal(size=80)
    found = period_returns(net, ts, period_s, 0, 450 * NS_PER_S)
    assert len(found) == 450 // period_s
    for k, value in enumerate(found):
        low, high = k * period_s * NS_PER_S, (k + 1) * period_s * NS_PER_S
        assert np.isclose(value, net[(ts >= low) & (ts < high)].sum())


def by_the_book(returns, n_blocks):
    "Symmetric cross-validation as the paper says it, choice by choice"
    blocks = np.array_split(np.arange(len(returns)), n_blocks)
    logit, lost = [], []
    for chosen in combinations(range(n_blocks), n_blocks // 2):
        inside = np.concatenate([blocks[b] for b in chosen])
        outside = np.concatenate([blocks[b] for b in range(n_blocks) if b not in chosen])
        ratio = [
            r.mean(axis=0) / r.std(axis=0, ddof=1) for r in (returns[inside], returns[outside])
        ]
        best = int(np.argmax(ratio[0]))
        rank = (ratio[1] <= ratio[1][best]).sum() / (returns.shape[1] + 1)
        logit.append(np.log(rank / (1 - rank)))
        lost.append(ratio[1][best] < 0)
    return np.array(logit), np.mean(lost)


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(2, 9), st.sampled_from([2, 4, 6]))
def test_overfitting_is_counted_as_in_the_paper(seed, n_settings, n_blocks):
    rng = np.random.default_rng(seed)
    returns = rng.normal(size=(rng.integers(4 * n_blocks, 90), n_settings)) + 1e4 * (seed % 2)
    logit, lost = by_the_book(returns, n_blocks)
    found = backtest_overfitting(returns, n_blocks)
    np.testing.assert_allclose(found.logit, logit, atol=1e-9)
    assert found.probability == (logit <= 0).mean() and found.share_of_losses == lost


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_the_first_half_of_a_choice_is_the_second_of_its_mirror(seed):
    returns = np.random.default_rng(seed).normal(size=(70, 4))
    sides = halves(6)
    np.testing.assert_allclose(half_sharpes(returns, sides), half_sharpes(returns, ~sides)[::-1])


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(2, 15))
def test_the_t_of_a_redraw_is_that_of_the_redrawn_sample(seed, n_blocks):
    rng = np.random.default_rng(seed)
    block = np.sort(np.append(rng.integers(0, n_blocks, 40), np.arange(n_blocks)))
    x, weight = rng.normal(size=len(block)), rng.integers(0, 3, n_blocks)
    assume(weight.sum() > 1)
    drawn = np.concatenate(
        [np.flatnonzero(block == b) for b in range(n_blocks) for _ in range(weight[b])]
    )
    mean = x[drawn].mean()
    left = sum(weight[b] * (x[block == b] - mean).sum() ** 2 for b in range(n_blocks))
    assume(left > 1e-9)
    sums, counts = np.bincount(block, x), np.bincount(block).astype(float)
    found = block_t(sums, counts, weight[None].astype(float), 0.3)[0]
    assert np.isclose(found, (mean - 0.3) / (np.sqrt(left) / len(drawn)), rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(seeds, st.floats(-1, 1))
def test_turning_every_result_around_turns_the_side_around(seed, shift):
    rng = np.random.default_rng(seed)
    x, block = rng.normal(shift, 2, 150), np.repeat(np.arange(30), 5)
    up, down = block_significance(x, block), block_significance(-x, block)
    assert up.side == -down.side and up.p_up == down.p_down and up.p_down == down.p_up
    assert up.side == 0 or np.sign(up.mean) == up.side


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-20, 20), min_size=1, max_size=60), st.floats(0.01, 1))
def test_concentration_by_taking_trades_away(values, top):
    x = np.array(values, float)
    one = concentration(x, top)
    best = sorted(values, reverse=True)
    won = sum(v for v in best if v > 0)
    if won:
        assert np.isclose(one.top_share, sum(max(v, 0) for v in best[: one.n_top]) / won)
    else:
        assert np.isnan(one.top_share)
    n = 0
    while sum(best[n:]) > 0:
        n += 1
    assert one.n_needed == n and one.net_without_top == sum(best[one.n_top :])


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_groups_add_up_to_the_whole(seed):
    rng = np.random.default_rng(seed)
    ts = np.sort(rng.integers(0, 5_000, 120)) * NS_PER_S
    net, group = rng.normal(1, 3, 120), rng.integers(0, 4, 120)
    table = performance_by(net, group, ts, ts + NS_PER_S)
    assert table["n"].sum() == 120 and np.isclose(table["total"].sum(), net.sum())
    assert np.isclose(table["share"].sum(), 1.0)
    for row in table.itertuples():
        assert np.isclose(row.mean, net[group == row.group].mean())
        assert not np.isfinite(row.low) or row.low <= row.mean <= row.high


def test_a_page_without_a_trade_or_with_one_claims_nothing():
    span = (0, 86_400 * NS_PER_S)
    for n in (0, 1, 5):
        ts = np.arange(n) * 600 * NS_PER_S
        page = honesty(np.ones(n), ts, ts + NS_PER_S, span)
        assert not {"pass", "fail"} & {f.status for f in findings(page) if f.name == "Sign"}


@pytest.mark.parametrize("seed", range(5))
def test_the_best_of_many_useless_settings_does_not_pass(seed):
    rng = np.random.default_rng(seed)
    tried = rng.normal(size=(400, 100))
    ratios = tried.mean(axis=0) / tried.std(axis=0, ddof=1)
    one = deflate(tried[:, ratios.argmax()], ratios)
    assert one.probabilistic > 0.95 and one.deflated < 0.95
