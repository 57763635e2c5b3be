"""Canaries: each planted leak fails the run by its name, and honest data of every kind fails none."""

import warnings
from dataclasses import replace

import numpy as np
import pytest

from tradebook.base.errors import DataError
from tradebook.base.journal import Journal
from tradebook.base.settings import load_settings
from tradebook.features.rows import build_features
from tradebook.features.schema import feature_set
from tradebook.labels.barriers import make_labels
from tradebook.market.instruments import Instrument
from tradebook.market.quotes import quotes
from tradebook.market.synthetic import synthetic_market
from tradebook.training.canaries import (
    CANARIES,
    LeakError,
    canaries,
    check_rebuilt,
    check_twins,
    fit_checked,
)
from tradebook.training.splits import PurgedKFold, PurgedWalkForward

QUICK = {"training.rounds": 15, "training.folds": 3, "training.leaves": 7, "training.min_rows": 50}
SETTINGS = load_settings(environment={}, overrides={**QUICK, "labels.horizon_s": 10.0})


def made(events, of, settings=SETTINGS):
    "Features and labels as the pipeline makes them, and what rebuilding them found"
    chosen = settings.features
    columns = feature_set(chosen.set, chosen.interval_ms)
    features = build_features(events, of, columns, chosen.max_age_ms)
    volatility = features.column("volatility_60s_bps")
    labels = make_labels(
        features.rows, quotes(events), settings.labels, 5.0, chosen.max_age_ms, volatility
    )
    return features, labels, check_rebuilt(features, events, of)


@pytest.fixture(scope="module")
def honest():
    "Three hours of a market with something to find"
    market = synthetic_market(seed=5, duration_s=10_800)
    return made(market.events, market.instrument)


def with_column(features, column):
    "The same rows, with their first column replaced"
    x = features.x.copy()
    x[:, 0] = column
    return replace(features, x=x)


def outcome(labels):
    "Moves without holes"
    return np.where(np.isfinite(labels["gross_bps"]), labels["gross_bps"], 0.0)


def failed(found):
    "Codes of the checks that failed"
    return {one.code for one in found if one.status == "fail"}


def noisy(labels, share):
    "The future under noise, share times as wide"
    move = outcome(labels)
    return move + np.random.default_rng(2).normal(0, share * move.std(), len(move))


PLANTS = {
    "the outcome": lambda f, l: outcome(l),
    "half as much noise": lambda f, l: noisy(l, 0.5),
    "as much noise": lambda f, l: noisy(l, 1.0),
    "the side": lambda f, l: l["label"],
    "against the side": lambda f, l: -l["label"].astype(float),
    "a price of 7 rows later": lambda f, l: np.roll(f.rows["bid_ticks"], -7),
    "a return of rows 3 to 6": lambda f, l: (
        np.roll(f.rows["ask_ticks"], -6) - np.roll(f.rows["ask_ticks"], -3)
    ),
    "a net of a long": lambda f, l: np.nan_to_num(l["long_net_bps"]),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_column_fails_by_name(honest, plant):
    features, labels, _ = honest
    leaking = with_column(features, PLANTS[plant](features, labels))
    with pytest.raises(LeakError, match="^LEAK_COLUMN: a column knows the future") as caught:
        fit_checked(leaking, labels, SETTINGS)
    assert f"'{features.feature_set.names[0]}'" in str(caught.value)
    assert "build it from what was received before" in str(caught.value)


@pytest.mark.parametrize("shift", [-40, -3, -1, 1, 3, 17])
def test_shifted_labels_fail_by_name(honest, shift):
    features, labels, _ = honest
    with pytest.raises(LeakError, match="LEAK_TIMES"):
        fit_checked(features, np.roll(labels, shift), SETTINGS)
    if abs(shift) > 20:
        return
    moved = labels.copy()
    for name in ("gross_bps", "label"):
        moved[name] = np.roll(labels[name], shift)
    moved["is_valid"] &= np.roll(labels["is_valid"], shift)
    assert "LEAK_SHIFT" in failed(canaries(features, moved, SETTINGS))
    moved = labels.copy()
    moved["label"] = np.roll(labels["label"], shift)
    assert "LEAK_SHIFT" in failed(canaries(features, moved, SETTINGS))


@pytest.mark.parametrize("shift", [1, 2, 5])
def test_features_that_are_early_fail_by_name(honest, shift):
    features, labels, _ = honest
    early = replace(features, x=np.roll(features.x, -shift, axis=0))
    assert "LEAK_COLUMN" in failed(canaries(early, labels, SETTINGS))


def test_labels_of_another_market_fail_by_name(honest):
    features, labels, _ = honest
    other = labels.copy()
    other["gross_bps"] = np.random.default_rng(0).permutation(outcome(labels))
    assert "LEAK_SHIFT" in failed(canaries(features, other, SETTINGS))


@pytest.mark.parametrize("splitter", [PurgedWalkForward(4, 10**9), PurgedKFold(4, 10**9)])
@pytest.mark.parametrize("n", [10, 500])
def test_duplicated_rows_across_folds_fail_by_name(honest, splitter, n):
    features, labels, _ = honest
    known = np.flatnonzero(labels["is_valid"] & np.isfinite(features.x).all(axis=1))
    x, labels = features.x[known].copy(), labels[known].copy()
    assert check_twins(x, labels, splitter).status == "pass"
    x[-n:] = x[:n] * (1 + 1e-9)  # written and read again by some tool
    for name in ("gross_bps", "label"):
        labels[name][-n:] = labels[name][:n]
    assert check_twins(x, labels, splitter).status == "fail"


def test_a_day_that_is_there_twice_fails_the_run(honest):
    features, labels, _ = honest
    n = len(features)
    twice = np.r_[np.arange(n), np.arange(n)]
    rows, doubled = features.rows[twice].copy(), labels[twice].copy()
    later = features.rows["ts"][-1] - features.rows["ts"][0] + 10**9
    rows["ts"][n:] += later
    rows["segment"][n:] += rows["segment"][n - 1] + 1
    for name in ("ts_start", "ts_end"):
        doubled[name][n:] += later
    again = replace(features, rows=rows, x=features.x[twice])
    with pytest.raises(LeakError, match="LEAK_TWINS"):
        fit_checked(again, doubled, SETTINGS)
    backwards = replace(features, rows=features.rows[twice], x=features.x[twice])
    with pytest.raises(LeakError, match="LEAK_TIMES: .* repeat the time of the row before"):
        fit_checked(backwards, labels[twice], SETTINGS)


def test_a_weak_look_ahead_is_found_by_building_again():
    market = synthetic_market(seed=6, duration_s=3_600)
    features, labels, rebuilt = made(market.events, market.instrument)
    assert rebuilt.status == "pass"
    x = features.x.copy()
    x[:, 3] += 1e-4 * outcome(labels).astype(x.dtype) * np.nanstd(x[:, 3])
    leaking = replace(features, x=x)
    assert not failed(canaries(leaking, labels, SETTINGS)), "the statistics see it: plant less"
    found = check_rebuilt(leaking, market.events, market.instrument)
    assert found.status == "fail"
    with pytest.raises(LeakError, match=f"LEAK_REBUILT.*'{features.feature_set.names[3]}'"):
        fit_checked(leaking, labels, SETTINGS, before=[found])


def test_every_code_has_a_meaning_and_a_remedy():
    for code, (meaning, remedy) in CANARIES.items():
        assert code.startswith("LEAK_") and len(meaning) > 10 and len(remedy) > 20


HONEST = [
    {"seed": s, "strength": k, "labels.kind": kind, "labels.horizon_s": h}
    for s, k, kind, h in [
        (1, 0.0, "horizon", 30.0),
        (2, 0.0, "barriers", 30.0),
        (3, 1.0, "horizon", 5.0),
        (4, 1.0, "barriers", 30.0),
        (5, 3.0, "horizon", 10.0),
        (6, 3.0, "barriers", 60.0),
        (7, 1.0, "horizon", 120.0),
        (8, 1.0, "horizon", 2.5),
    ]
]


@pytest.mark.parametrize("world", HONEST, ids=str)
def test_honest_synthetic_markets_raise_no_alarm(world):
    given = {k: v for k, v in world.items() if "." in k}
    settings = SETTINGS.with_overrides({**given, "labels.barrier_volatility_multiple": 1.5})
    market = synthetic_market(seed=world["seed"], strength=world["strength"], duration_s=5_400)
    features, labels, rebuilt = made(market.events, market.instrument, settings)
    found = canaries(features, labels, settings, [rebuilt])
    assert len(found) == 5 and not failed(found), found


@pytest.mark.recordings
@pytest.mark.parametrize("day", ["2026-01-06", "2026-01-07"])
@pytest.mark.parametrize("kind", ["horizon", "barriers"])
def test_honest_days_of_a_slow_venue_raise_no_alarm(recordings, day, kind):
    from tradebook.market.snapshots import read_snapshots

    files = [recordings / "standx" / f"BTC-USD_{kind}_{day}.parquet" for kind in ("book20",)]
    imported = read_snapshots(*files)
    events = imported.events
    # eight hours of the day, another part on each
    start = events["ts_recv"][0] + (2 if day.endswith("6") else 14) * 3_600 * 10**9
    first, stop = np.searchsorted(events["ts_recv"], [start, start + 8 * 3_600 * 10**9])
    first += np.argmax(events["kind"][first:] == 0)  # a snapshot
    settings = SETTINGS.with_overrides({"labels.kind": kind})
    features, labels, rebuilt = made(events[first:stop], imported.instrument, settings)
    model = fit_checked(features, labels, settings, before=[rebuilt])
    assert model.metrics["n_train"] > 1_000
    assert kind == "barriers" or model.metrics["auc"]["value"] > 0.8
    assert [one["status"] for one in model.metrics["canaries"]] == ["pass"] * 6


@pytest.mark.recordings
def test_honest_minutes_of_a_fast_venue_raise_no_alarm(recordings):
    from tradebook.collector.wire_files import read_frames

    names = ["usdm_ethusdt_20240808", "spot_btcusdt_20240808"]
    fast = {"features.interval_ms": 250, "labels.horizon_s": 5.0}
    for name in names:
        imported = read_frames(recordings / "binance" / f"{name}.gz")
        for kind in ("horizon", "barriers"):
            settings = SETTINGS.with_overrides({**fast, "labels.kind": kind})
            features, labels, rebuilt = made(imported.events, imported.instrument, settings)
            found = canaries(features, labels, settings, [rebuilt])
            assert not failed(found), (name, kind, found)


def test_the_train_verb_fails_by_name_and_publishes_nothing(tmp_path, monkeypatch):
    from tradebook.market.store import Store
    from tradebook.ops import pipeline

    market = synthetic_market(seed=9, duration_s=2_400)
    of: Instrument = market.instrument
    settings = SETTINGS.with_overrides({"paths.data": str(tmp_path)})
    pipeline.collect_events(tmp_path, market.events, of)
    assert Store(tmp_path / "market").listing()
    load = pipeline.load_dataset

    def shifted(*args):
        held = load(*args)
        return replace(held, labels=np.roll(held.labels, -1))

    monkeypatch.setattr(pipeline, "load_dataset", shifted)
    with pytest.raises(LeakError, match="LEAK_TIMES"):
        pipeline.train_symbol(settings, of.venue, of.symbol)
    assert not (tmp_path / "models").exists()
    with Journal(tmp_path / "journal.db") as journal:
        run = journal.latest_run("training")
    assert run["status"] == "failed" and run["summary"]["error"].startswith("LEAK_TIMES")


def test_nothing_warns_where_nothing_varies():
    market = synthetic_market(seed=3, duration_s=600)
    features, labels, _ = made(market.events, market.instrument)
    flat = replace(features, x=np.zeros_like(features.x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not failed(canaries(flat, labels, SETTINGS))
    with pytest.raises((DataError, LeakError, ValueError)):
        canaries(features, labels[:-1], SETTINGS)
