"""Labels over the whole chain: events, rows and quotes of one market, synthetic and recorded."""

import numpy as np
import pytest

from tradebook.base.errors import DataError
from tradebook.base.sections import Labels
from tradebook.features.rows import build_features
from tradebook.labels.barriers import make_labels
from tradebook.labels.horizon import horizon_labels
from tradebook.market.quotes import quotes
from tradebook.market.snapshots import read_snapshots
from tradebook.market.synthetic import synthetic_market


@pytest.fixture(scope="module")
def hour():
    "Rows and quotes of one synthetic hour"
    market = synthetic_market(seed=3, duration_s=3_600)
    return build_features(market.events, market.instrument), quotes(market.events)


@pytest.mark.parametrize("kind", ["horizon", "barriers"])
def test_labels_of_a_synthetic_hour(hour, kind):
    features, best = hour
    volatility = features.x[:, features.feature_set.index("volatility_60s_bps")]
    chosen = Labels(kind=kind, barrier_volatility_multiple=1.0)
    labels = make_labels(features.rows, best, chosen, 4.0, 2_000, volatility)
    assert len(labels) == len(features.rows)
    ok = labels[labels["is_valid"]]
    assert len(ok) > 0.9 * len(labels)
    assert (ok["ts_end"] > ok["ts_start"]).all()
    assert min((ok["label"] > 0).sum(), (ok["label"] < 0).sum()) > 100
    # both sides of one trade together pay twice the costs and the spread at both ends
    assert (ok["long_net_bps"] + ok["short_net_bps"] < -8).all()
    sides = ok["touched"] if kind == "barriers" else ok["label"]
    assert (np.sign(ok["gross_bps"][sides != 0]) == sides[sides != 0]).all()


def test_rows_of_another_market_are_refused(hour):
    features, _ = hour
    other = quotes(synthetic_market(seed=4, duration_s=600).events)
    with pytest.raises(DataError, match="must come from the same events"):
        horizon_labels(features.rows, other, 30.0, 0.5, 4.0, 2_000)


@pytest.mark.recordings
def test_imported_rows_and_quotes_agree_on_a_real_day(recordings):
    path = recordings / "standx" / "BTC-USD_book20_2026-01-06.parquet"
    imported = read_snapshots(path)
    features = build_features(imported.events, imported.instrument)
    labels = horizon_labels(features.rows, quotes(imported.events), 10.0, 0.5, 8.0, 2_000)
    assert 0.25 < labels["is_valid"].mean() < 0.6
