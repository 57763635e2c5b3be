"""The model of direction: repeatable, honest about nothing, and clear when it cannot be fitted."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from tradebook.base.clock import NS_PER_S
from tradebook.base.errors import ModelError
from tradebook.base.settings import load_settings
from tradebook.features.schema import feature_set
from tradebook.labels.horizon import LABEL
from tradebook.training.model import fit_direction, move_slope, usable_rows

QUICK = load_settings(environment={}).with_overrides(
    {"training.rounds": 30, "training.folds": 3, "training.leaves": 7}
)


def drawn(n=2_000, strength=1.0, seed=1, horizon=10):
    "Features and overlapping labels; column ofi_5_5s leans on the price when strength > 0"
    rng = np.random.default_rng(seed)
    columns = feature_set()
    x = rng.normal(size=(n, len(columns)))
    lean = np.zeros(n + horizon)
    lean[1 : n + 1] = x[:, columns.names.index("ofi_5_5s")]
    price = np.cumsum(rng.normal(size=n + horizon) + strength * lean)
    labels = np.zeros(n, LABEL)
    labels["ts_start"] = np.arange(n) * NS_PER_S
    labels["ts_end"] = labels["ts_start"] + horizon * NS_PER_S
    labels["gross_bps"] = price[horizon:] - price[:-horizon]
    labels["is_valid"] = True
    labels["label"] = np.sign(labels["gross_bps"]) * (np.abs(labels["gross_bps"]) > 0.5)
    return x, labels, columns


def test_the_same_seed_gives_the_same_model():
    first, again = fit_direction(*drawn(), QUICK), fit_direction(*drawn(), QUICK)
    assert first.model_text == again.model_text
    assert first.metrics == again.metrics
    np.testing.assert_array_equal(first.p_up_out_of_fold, again.p_up_out_of_fold)


def test_another_seed_gives_another_model():
    other = QUICK.with_overrides({"training.seed": 8})
    x, labels, columns = drawn()
    one, two = (fit_direction(x, labels, columns, s).model_text for s in (QUICK, other))
    assert one.split("parameters:")[0] != two.split("parameters:")[0]


def test_another_process_gives_the_same_model():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_training_model import *;"
        "sys.stdout.write(fit_direction(*drawn(), QUICK).model_text)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, os.path.dirname(__file__)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "5"},
    )
    assert done.stdout == fit_direction(*drawn(), QUICK).model_text


def test_rows_without_outcome_or_with_holes_in_them_teach_nothing():
    x, labels, columns = drawn()
    x[805, 3] = np.nan
    x[806, 4] = np.inf
    labels["is_valid"][910:920] = False
    labels["gross_bps"][910:920] = np.nan
    model = fit_direction(x, labels, columns, QUICK)
    missing = np.flatnonzero(np.isnan(model.raw_out_of_fold))
    assert {805, 806, *range(910, 920)} == set(missing[missing >= 600].tolist())
    assert (model.metrics["n_unknown"], model.metrics["n_nan"]) == (10, 2)
    # what stands in unusable rows cannot matter
    x[910:920] = 1e9
    labels["label"][910:920] = 1
    assert fit_direction(x, labels, columns, QUICK).model_text == model.model_text


def test_a_forecast_knows_nothing_of_its_own_stretch_nor_of_what_follows():
    x, labels, columns = drawn()
    was = fit_direction(x, labels, columns, QUICK)
    turned, other = labels.copy(), x.copy()
    turned["gross_bps"][1_000:] *= -1  # the last two of four stretches
    turned["label"][1_000:] *= -1
    other[1_500:] *= -1
    now = fit_direction(other, turned, columns, QUICK)
    for name in ("raw_out_of_fold", "p_up_out_of_fold"):
        before, after = (getattr(one, name) for one in (was, now))
        assert np.isnan(before[:500]).all() and np.isfinite(before[500:]).all()
        np.testing.assert_array_equal(after[500:1_500], before[500:1_500])
        assert (after[1_500:] != before[1_500:]).any()


def test_what_was_forecast_without_a_curve_is_in_no_score_and_no_trade():
    x, labels, columns = drawn(4_000)
    model, again = fit_direction(x, labels, columns, QUICK), labels.copy()
    again["gross_bps"][1_000:2_000] *= 3  # the stretch that has no curve before it
    for name in ("long_net_bps", "short_net_bps"):
        again[name][1_000:2_000] += 50
    other = fit_direction(x, again, columns, QUICK)
    assert np.isfinite(model.raw_out_of_fold[1_000:2_000]).all() and model.calibration
    assert model.metrics["n_scored_moves"] == 2_000
    for name in ("auc", "log_loss", "calibration", "move_slope", "baselines"):
        assert other.metrics[name] == model.metrics[name]
    assert other.thresholds == model.thresholds
    for some, chosen in ((4_000, {"training.calibration": "none"}), (2_000, {})):
        plain = fit_direction(*drawn(some), QUICK.with_overrides(chosen))  # or too short for one
        assert plain.calibration is None and plain.metrics["n_scored_moves"] == some * 3 / 4


def test_forecasts_cannot_see_labels_that_reach_into_the_test():
    x, labels, columns = drawn(horizon=100)
    was = fit_direction(x, labels, columns, QUICK).raw_out_of_fold
    labels["label"][340:500] *= -1  # these end within 60 s of the first test, at row 500, or later
    now = fit_direction(x, labels, columns, QUICK).raw_out_of_fold
    assert np.isfinite(was[500:]).all()
    np.testing.assert_array_equal(now[500:1_000], was[500:1_000])


def test_null_markets_claim_nothing():
    claimed = 0
    for seed in range(20):
        model = fit_direction(*drawn(1_500, strength=0.0, seed=seed), QUICK)
        claimed += model.move_slope_bps > 0
    assert claimed <= 1


def test_too_few_rows_say_where_they_went():
    x, labels, columns = drawn(400)
    labels["is_valid"][:150] = False
    x[150:200, 0] = np.nan
    with pytest.raises(ModelError, match="needs 300 rows with a direction, had") as caught:
        fit_direction(x, labels, columns, QUICK)
    assert "150 have no known outcome" in str(caught.value)
    assert "50 a missing feature" in str(caught.value)
    assert "labels.horizon_s" in str(caught.value)


def test_no_rows_at_all_are_an_error_of_ours():
    x, labels, columns = drawn(400)
    with pytest.raises(ModelError, match="had 0"):
        fit_direction(x[:0], labels[:0], columns, QUICK)


def test_one_class_only_is_refused():
    x, labels, columns = drawn()
    labels["label"] = -1
    with pytest.raises(ModelError, match="moves both ways, all 2000 were down"):
        fit_direction(x, labels, columns, QUICK)


def test_a_stretch_whose_past_moved_one_way_stays_untested():
    x, labels, columns = drawn(2_000)
    labels["label"][:450] = 1  # all that ends an embargo before the first test
    model = fit_direction(x, labels, columns, QUICK)
    assert np.isnan(model.p_up_out_of_fold[:1_000]).all()
    assert np.isfinite(model.p_up_out_of_fold[1_000:]).all()
    labels["label"] = 1
    labels["label"][1_700:] = -1
    with pytest.raises(ModelError, match="no stretch of time follows one that moved both ways"):
        fit_direction(x, labels, columns, QUICK)


def test_few_rows_still_fit():
    small = QUICK.with_overrides({"training.min_rows": 50, "training.embargo_s": 5.0})
    model = fit_direction(*drawn(150), small)
    assert np.isfinite(model.p_up_out_of_fold).sum() > 100
    # fifteen labels that do not overlap are no sample: nothing is claimed
    assert model.metrics["auc"]["n_blocks"] == 2 and model.metrics["auc"]["low"] is None
    assert model.move_slope_bps == 0.0


def test_columns_that_do_not_vary_give_no_edge():
    x, labels, columns = drawn()
    model = fit_direction(np.ones_like(x), labels, columns, QUICK)
    assert model.move_slope_bps == 0.0
    assert model.metrics["top_features"] == []


def test_a_drift_is_not_an_edge():
    x, labels, columns = drawn(4_000, strength=0.0)
    labels["gross_bps"] += 3  # rises all day, whatever the columns say
    labels["label"] = np.sign(labels["gross_bps"])
    assert fit_direction(x, labels, columns, QUICK).move_slope_bps == 0.0


def test_a_negative_slope_is_never_used():
    rng = np.random.default_rng(1)
    p = rng.uniform(size=4_000)
    move = -20 * (p - 0.5) + rng.normal(size=4_000)
    found = move_slope(p, move, np.arange(4_000) // 800, np.arange(4_000) // 100)
    assert found["slope_bps"] == 0.0 and found["raw_bps"] < -10


def test_slope_and_error_are_those_of_a_plain_regression_when_rows_are_independent():
    rng = np.random.default_rng(2)
    p = rng.uniform(size=6_000)
    move = 12 * (p - 0.5) + rng.normal(0, 3, 6_000)
    found = move_slope(p, move, np.zeros(6_000, int), np.arange(6_000))
    q = p - p.mean()
    error = 3 / np.sqrt((q**2).sum())
    assert abs(found["slope_bps"] - 12) < 3 * error
    assert abs(found["error_bps"] / error - 1) < 0.05


def test_null_slopes_pass_about_as_often_as_promised():
    passed = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        move = np.convolve(rng.normal(size=9_029), np.ones(30), "valid")
        p = 0.5 + 0.01 * np.convolve(rng.normal(size=9_029), np.ones(30), "valid")
        ts = np.arange(9_000)
        passed += move_slope(p, move, ts // 1_800, ts // 300)["slope_bps"] > 0
    assert passed <= 12  # four in a hundred; one is promised


def test_usable_rows_count_every_row_once():
    x, labels, _ = drawn(500)
    labels["is_valid"][:50] = False
    x[40:70, 0] = np.nan
    usable, counts = usable_rows(x, labels, 10)
    parts = sum(counts[k] for k in ("n_unknown", "n_nan", "n_flat", "n_up", "n_down"))
    assert parts == counts["n_rows"] == 500 and len(usable) == 430


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_a_planted_market_has_an_edge_and_a_null_market_has_none(strength):
    from tradebook.features.rows import build_features
    from tradebook.labels.barriers import make_labels
    from tradebook.market.quotes import quotes
    from tradebook.market.synthetic import synthetic_market

    market = synthetic_market(seed=11, duration_s=7_200, strength=strength)
    features = build_features(market.events, market.instrument)
    chosen = load_settings(environment={}).with_overrides({"training.rounds": 60})
    labels = make_labels(features.rows, quotes(market.events), chosen.labels, 4.0, 2_000)
    model = fit_direction(features.x, labels, features.feature_set, chosen)
    area = model.metrics["auc"]
    if strength:
        assert area["low"] > 0.6 and model.move_slope_bps > 5
    else:
        assert area["low"] < 0.5 < area["high"] and model.move_slope_bps == 0.0


def test_shapes_that_do_not_fit_are_refused():
    x, labels, columns = drawn(800)
    for wrong in (x[:-1], x[:, :-1], x[0]):
        with pytest.raises(ModelError, match="a row a label, a column a feature"):
            fit_direction(wrong, labels, columns, QUICK)
    assert replace(fit_direction(x, labels, columns, QUICK), metrics={}).metrics == {}
