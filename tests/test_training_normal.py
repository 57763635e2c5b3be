"""What was normal: every verb that trains keeps it, and drift can be asked of any champion."""

import pytest

from tradebook.base.settings import load_settings
from tradebook.market.synthetic import synthetic_market
from tradebook.ops import pipeline, renewal
from tradebook.training.normal import guard_of
from tradebook.training.registry import Registry, symbol_key


def test_a_version_of_the_train_verb_carries_guard_and_forecasts(tmp_path):
    market = synthetic_market(seed=5, duration_s=5_400)
    names = market.instrument.venue, market.instrument.symbol
    chosen = {"training.rounds": 15, "training.folds": 3, "paths.data": str(tmp_path)}
    settings = load_settings(environment={}).with_overrides(chosen)
    pipeline.collect_events(tmp_path, market.events, market.instrument)
    first = int(market.events["ts_recv"][0])
    facts = pipeline.train_symbol(settings, *names, None, first + 3_600 * 10**9)
    assert facts["opponents"][0]["name"] == "majority class"
    version = Registry(tmp_path / "models").current(symbol_key(*names))
    guard, kept = guard_of(version.facts), version.facts["note"]["normal"]["forecasts"]
    assert guard.names == tuple(version.feature_names)
    made = pipeline.build_training_set(
        settings, *names, None, None, pipeline.Stages(is_shown=False)
    )
    x = made.features.x[made.features.n_nan == 0]
    assert guard.share_outside(x) < 0.05  # the same market
    x = x[-1].copy()
    x[guard.names.index("spread_bps")] = 1e4
    assert guard.check(x).name == "spread_bps"
    assert len(kept["p_up"]) == len(kept["is_up"]) > 100
    p_up = renewal.unseen_forecast(version, made, 10**10)
    drift, why = renewal.champion_drift(settings, version, made, p_up)
    assert drift is not None and drift.truth is not None, why  # asked, since forecasts are there


def test_a_version_without_ranges_has_no_guard():
    assert guard_of({"feature_names": ["a"], "note": {}}) is None
    with pytest.raises(Exception, match="must name the model's columns"):
        guard_of({"feature_names": ["b"], "note": {"normal": {"ranges": {"a": [0, 1]}}}})
