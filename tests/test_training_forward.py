"""Walking forward: nothing is chosen by what came later, and a search through the verb survives a kill."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from test_training_model import QUICK, drawn

from tradebook.base.journal import Journal
from tradebook.market.synthetic import synthetic_market
from tradebook.ops.pipeline import collect_events
from tradebook.policy.rules import rules_from
from tradebook.training.gate import Outcome, Reason, bounds_of, judge
from tradebook.training.model import fit_direction
from tradebook.training.prediction import Predictor, least_confidence
from tradebook.training.publish import publish
from tradebook.training.registry import Registry, symbol_key

FULL = {"training.seeds": 2, "training.is_meta": True, "signal.min_confidence": 0.01}


def traded(n=3_000, strength=2.0, seed=1):
    "Drawn rows with results of both sides"
    x, labels, columns = drawn(n, strength=strength, seed=seed)
    move = np.nan_to_num(labels["gross_bps"])
    labels["long_net_bps"], labels["short_net_bps"] = move - 0.5, -move - 0.5
    return x, labels, columns


def test_nothing_of_a_stretch_reaches_its_own_curve_bound_or_skip():
    x, labels, columns = traded()
    chosen = QUICK.with_overrides(FULL)
    was = fit_direction(x, labels, columns, chosen)
    late = np.arange(len(x)) >= 2_500  # the newest of six stretches
    turned = labels.copy()
    turned["label"][late] *= -1
    for name in ("gross_bps", "long_net_bps", "short_net_bps"):
        turned[name][late] *= -1
    now = fit_direction(x, turned, columns, chosen)
    for name in ("p_up_out_of_fold", "raw_out_of_fold", "row_bounds", "is_skipped"):
        np.testing.assert_array_equal(getattr(was, name), getattr(now, name), err_msg=name)
    assert was.texts != now.texts and was.thresholds["by_fold"] == now.thresholds["by_fold"]


def test_a_search_sees_only_the_older_half(tmp_path):
    x, labels, columns = traded(1_800)
    chosen = QUICK.with_overrides({"training.tune_trials": 2})
    was = fit_direction(x, labels, columns, chosen, study=tmp_path / "a.db")
    late = np.arange(len(x)) >= 900
    other, turned = np.where(late[:, None], -x, x), labels.copy()
    turned["label"][late] *= -1
    now = fit_direction(other, turned, columns, chosen, study=tmp_path / "b.db")
    assert was.tuning["history"] == now.tuning["history"]
    assert was.tuning["learner"] == now.tuning["learner"] and was.tuning["n_trials"] == 2
    tested = np.isfinite(was.p_up_out_of_fold)
    assert not tested[:900].any() and tested[900:].any()
    again = fit_direction(x, labels, columns, chosen, study=tmp_path / "c.db")
    assert (again.texts, again.calibration) == (was.texts, was.calibration)


def test_seeds_curve_and_second_model_are_repeatable_and_the_same_row_by_row(tmp_path):
    x, labels, columns = traded()
    chosen = QUICK.with_overrides(FULL)
    one, two = (fit_direction(x, labels, columns, chosen) for _ in range(2))
    assert (one.texts, one.skipping.text, one.calibration, one.thresholds) == (
        *(two.texts, two.skipping.text),
        *(two.calibration, two.thresholds),
    )
    choosy = one.skipping._replace(
        facts=one.skipping.facts | {"min_chance": one.skipping.metrics["paid"]}
    )
    version = publish(replace(one, skipping=choosy), tmp_path, "a_B", 1)
    predictor = Predictor(version)
    found = np.stack(predictor.ask(x))
    assert found.T.tobytes() == np.array([predictor.ask_row(row) for row in x]).tobytes()
    p_up, edge, spread = found
    assert (len(version.texts()), spread.max() > 0) == (2, True)
    side = np.abs(p_up - 0.5) >= 0.01
    assert 0 < np.isnan(edge[side]).sum() < side.sum()  # some are skipped
    assert not np.isnan(edge[~side]).any()
    assert one.metrics["spread"]["median"] > 0


def test_the_threshold_in_force_is_the_settings_until_the_model_is_asked():
    x, labels, columns = traded()
    model = fit_direction(x, labels, columns, QUICK)
    facts = {"thresholds": model.thresholds}
    own = QUICK.with_overrides({"signal.threshold": "model"})
    bound = model.thresholds["min_confidence"]
    assert least_confidence(QUICK, facts) == QUICK.signal.min_confidence == 0.05
    assert least_confidence(own, facts) == (1.0 if bound is None else bound)
    of = synthetic_market(duration_s=10.0).instrument
    assert rules_from(own, of, min_confidence=bound).min_confidence == bound
    assert set(model.least_confidence(QUICK)) == {0.05}
    assert np.isinf(model.least_confidence(own)[:1_000]).all()  # nothing chosen before it


def test_settings_bound_the_gate():
    rng, n, hour = np.random.default_rng(1), 60, 3_600 * 10**9
    into = np.sort(rng.integers(0, hour, n))
    p_up = rng.uniform(0.2, 0.8, 3_000)
    mine = Outcome("new", 0, p_up, rng.uniform(size=3_000) < p_up, np.full(n, 2.0), into, into + 1)
    old = mine._replace(version="old", net_bps=np.zeros(n))
    for change, reason in (
        ({}, Reason.BETTER),
        ({"promotion.min_positions": 61}, Reason.TOO_FEW_POSITIONS),
        ({"promotion.min_gain_bps_hour": 1_000}, Reason.NOT_BETTER),
        ({"promotion.max_positions_hour": 10}, Reason.TURNOVER),
    ):
        bounds = bounds_of(QUICK.with_overrides(change))
        found = judge(mine, old, (0, hour), bounds)
        assert reason in found.reasons and found.is_promoted == (reason is Reason.BETTER), change
    assert bounds_of(QUICK) == judge(mine, old, (0, hour)).bounds


def tries(place):
    "State and value of each try of a study's file"
    if not place.exists():
        return []
    query = (
        "select t.number, t.state, v.value from trials t left join trial_values v "
        "on t.trial_id = v.trial_id order by t.number"
    )
    try:
        with sqlite3.connect(f"file:{place}?mode=ro", uri=True, timeout=5) as base:
            return base.execute(query).fetchall()
    except sqlite3.OperationalError:  # its tables are just being made
        return []


@pytest.fixture
def market(tmp_path):
    "A root with an hour of a made market"
    made = synthetic_market(seed=7, duration_s=1_500.0)
    collect_events(tmp_path, made.events, made.instrument)
    return tmp_path, (made.instrument.venue, made.instrument.symbol)


def test_a_search_through_the_verb_survives_a_kill(market):
    root, names = market
    changes = ["training.rounds=200", "training.patience=0", "training.folds=3"]
    command = [sys.executable, "-m", "tradebook", "train", "--data", str(root), "--json"]
    command += [part for change in changes for part in ("--set", change)]
    place = root / "studies" / f"{symbol_key(*names)}.db"
    ways = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    first = subprocess.Popen([*command, "--tune", "500"], **ways, start_new_session=True)
    until = time.monotonic() + 120
    while sum(state == "COMPLETE" for _, state, _ in tries(place)) < 2:
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    before = [row for row in tries(place) if row[1] in ("COMPLETE", "PRUNED")]
    n = len(before) + 2
    done = subprocess.run([*command, "--tune", str(n)], **ways, timeout=300)
    found = json.loads(done.stdout)
    assert found["ok"], (found, done.stderr)
    after = tries(place)
    assert [row for row in after if row in before] == before  # what was done stays done
    looked = [row for row in after if row[1] in ("COMPLETE", "PRUNED")]
    assert len(looked) == n and all(state != "RUNNING" for _, state, _ in after)
    version = Registry(root / "models").current(symbol_key(*names))
    assert version.facts["trials"]["search"]["n_trials"] == n
    with Journal(root / "journal.db") as journal:
        runs = journal.runs("training")
    assert len(runs) == 2  # the killed one was a try, too
    assert version.facts["trials"]["n_trials"] == n + len(runs)
    assert found["honesty"]["n_trials"] == n + 1
