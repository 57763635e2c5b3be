"""What came after a column: no move across a hole or on a stale book, and luck is not called a finding."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradebook.features.afterwards import followed, hourly_correlations, moves_after_bps, tenths_bps
from tradebook.features.columns import Feature
from tradebook.features.kernel import ROW
from tradebook.features.rows import FeatureRows
from tradebook.features.schema import FeatureSet

SECOND = 10**9


def made_rows(mid_2, columns, segment=None, age_s=None):
    "Rows a second apart"
    rows = np.zeros(len(mid_2), ROW)
    rows["ts"] = SECOND * (1_767_657_600 + np.arange(len(mid_2)))
    rows["ts_book"] = rows["ts"] - (0 if age_s is None else (age_s * SECOND).astype(np.int64))
    rows["bid_ticks"], rows["ask_ticks"] = mid_2 // 2, mid_2 - mid_2 // 2
    rows["segment"] = 0 if segment is None else segment
    features = tuple(Feature(name, "ratio", True, name) for name in columns)
    x = np.column_stack(list(columns.values()))
    return FeatureRows(rows, x, FeatureSet("made", features, 1_000, {}))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_move_is_known_only_where_it_could_have_been_traded(data):
    n, horizon_s = data.draw(st.integers(2, 60)), data.draw(st.integers(1, 70))
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    mid_2 = 20_000 + np.cumsum(rng.integers(-3, 4, n))
    segment, age_s = np.cumsum(rng.random(n) < 0.1), np.where(rng.random(n) < 0.2, 9.0, 0.5)
    made = made_rows(mid_2, {"x": np.zeros(n)}, segment, age_s)
    move = moves_after_bps(made, horizon_s)
    for i in range(n):
        j = i + horizon_s
        good = j < n and segment[i] == segment[j] and age_s[i] < 2 and age_s[j] < 2
        want = 1e4 * (mid_2[j] / mid_2[i] - 1) if good else np.nan
        np.testing.assert_allclose(move[i], want, rtol=1e-12)


def test_one_planted_column_is_found_and_forty_of_noise_are_not():
    rng, n = np.random.default_rng(5), 6 * 3_600
    days = {}
    for day in ("first", "second"):
        mid_2 = 200_000 + np.cumsum(rng.integers(-4, 5, n))
        ahead = np.r_[mid_2[5:] - mid_2[:-5], np.zeros(5)] + 20 * rng.standard_normal(n)
        slow = np.cumsum(
            rng.standard_normal((n, 40)), axis=0
        )  # noise that moves as slowly as prices
        columns = {"planted": ahead} | {f"noise_{k}": slow[:, k] for k in range(40)}
        days[day] = made_rows(mid_2, columns)
    table = followed(days, (5,), taker_fee_bps=4.0)
    assert table["found"].to_dict() == {n: "5 s" if n == "planted" else "no" for n in table.index}
    gross, net = table.loc["planted", ["ends_bps", "after_taker_bps"]]
    spread = 2e4 * np.mean(days["first"].rows["ask_ticks"] - days["first"].rows["bid_ticks"]) / 2e5
    assert gross > 0 and net == pytest.approx(gross - spread - 8, abs=0.1)


def test_no_day_chooses_its_own_side():
    rng, n, days = np.random.default_rng(6), 2 * 3_600, {}
    for day, sign in {"a": 1, "b": 1, "c": -1}.items():
        mid_2 = 200_000 + np.cumsum(rng.integers(-4, 5, n))
        ahead = np.r_[mid_2[5:] - mid_2[:-5], np.zeros(5)] + 9 * rng.standard_normal(n)
        days[day] = made_rows(mid_2, {"x": sign * ahead})
    ends = followed(days, (5,))["ends_bps"].iloc[0]  # a and b: together above c; c: against itself
    one = {day: followed({day: made}, (5,))["ends_bps"].iloc[0] for day, made in days.items()}
    value = {day: followed({day: made}, (5,))[f"5 s, {day}"].iloc[0] for day, made in days.items()}
    sides = [np.sign((sum(value.values()) - value[d]) * value[d]) for d in days]
    assert ends == pytest.approx(np.mean([s * one[d] for s, d in zip(sides, days, strict=True)]))
    assert sides[2] == -1


def test_a_column_that_does_not_vary_says_nothing():
    x, outcome = np.full((7_200, 1), 3.0), np.arange(7_200.0) % 7
    value, error = hourly_correlations(x, outcome, SECOND * np.arange(7_200))
    assert np.isnan(value[0]) and np.isnan(error[0])
    assert np.isfinite(tenths_bps(x[:, 0], outcome)).sum() == 1
