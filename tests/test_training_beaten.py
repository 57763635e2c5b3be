"""Opponents beside a model: the same rows, the same folds, and no knowledge of what comes later."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradebook.base.settings import load_settings
from tradebook.features.schema import feature_set
from tradebook.labels.horizon import LABEL
from tradebook.training.beaten import BEATEN, beaten_text, duel_rows, hold_up, model_folds
from tradebook.training.forward import walk_forward
from tradebook.training.learners import learner_of
from tradebook.training.model import fit_direction

QUICK = {"training.rounds": 5, "training.leaves": 4, "training.folds": 3, "training.min_rows": 100}
SETTINGS = load_settings(environment={}).with_overrides(QUICK)


def drawn(n, flat_share, hole_share, seed):
    rng, columns = np.random.default_rng(seed), feature_set()
    x = rng.normal(size=(n, len(columns)))
    x[rng.random(n) < 0.05, 0] = np.nan
    labels = np.zeros(n, LABEL)
    labels["ts_start"] = np.cumsum(rng.integers(1, 3, n)) * 10**9
    labels["ts_end"] = labels["ts_start"] + rng.integers(1, 20, n) * 10**9
    labels["gross_bps"] = rng.normal(size=n) + 0.5 * x[:, columns.names.index("ofi_5_5s")]
    labels["is_valid"] = rng.random(n) >= hole_share
    labels["label"] = np.sign(labels["gross_bps"]) * (rng.random(n) >= flat_share)
    return x, labels, columns


@given(
    st.integers(900, 1_500),
    st.floats(0, 0.5),
    st.floats(0, 0.3),
    st.integers(0, 9),
    st.integers(2, 6),
)
@settings(max_examples=12, deadline=None)
def test_folds_are_the_ones_the_model_was_measured_on(n, flat_share, hole_share, seed, folds):
    x, labels, columns = drawn(n, flat_share, hole_share, seed)
    chosen = SETTINGS.with_overrides({"training.folds": folds})
    places, cut = model_folds(x, labels, chosen)
    usable = np.flatnonzero(labels["is_valid"] & np.isfinite(x).all(axis=1))
    names = tuple(columns.names)
    found = walk_forward(x[usable], labels[usable], names, chosen, learner_of(chosen))
    base, fold = found.base, found.fold
    rows = labels[places]
    for k, (train, test) in enumerate(cut.folds):
        mine = usable[np.isfinite(base) & (fold == k)]
        assert np.array_equal(places[test], mine[labels["label"][mine] != 0])
        share = base[np.isfinite(base) & (fold == k)]
        assert abs((rows["label"][train] > 0).mean() - share[0]) < 1e-12  # the same past
        assert rows["ts_end"][train].max() <= rows["ts_start"][test].min()


def test_each_gain_is_the_model_less_the_opponent():
    x, labels, columns = drawn(1_200, 0.2, 0.1, 3)
    model = fit_direction(x, labels, columns, SETTINGS)
    fights = hold_up(model, x, labels, SETTINGS)
    assert [one.name for one in fights][:2] == ["majority class", "last sign"] and len(fights) == 4
    auc = model.metrics["auc"]["value"]
    for one in fights:
        assert one.auc_gain.value == pytest.approx(auc - one.auc, abs=1e-9)


def test_a_record_too_short_for_an_interval_beats_nobody():
    gain = {"value": 0.4, "low": None, "high": None, "n_blocks": 3}
    row = {"name": "last sign", "auc": None, "log_loss": None, "is_beaten": False}
    found = json.loads(json.dumps([row | {"auc_gain": gain, "loss_gain": gain}]))
    assert BEATEN not in duel_rows(found).verdict.tolist()
    assert beaten_text(found) == "On rows not seen, the model cannot be told apart from last sign."
