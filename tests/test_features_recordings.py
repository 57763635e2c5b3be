"""Batch equals stream, no look-ahead and no favourite side on real recordings of three venues."""

import numpy as np
import pytest

from tradebook.collector.wire_files import read_frames
from tradebook.features.checks import check_mirror, check_stream, check_truncation
from tradebook.features.rows import build_features
from tradebook.market.level2 import read_level2
from tradebook.market.snapshots import read_snapshots


def first_hours(imported, hours):
    "The first hours of a recording"
    events = imported.events
    stop = np.searchsorted(events["ts_recv"], events["ts_recv"][0] + int(hours * 3_600e9))
    return events[:stop], imported.instrument


@pytest.fixture(scope="module")
def standx(recordings):
    day = recordings / "standx"
    files = [day / f"BTC-USD_{kind}_2026-01-06.parquet" for kind in ("book20", "trades")]
    return first_hours(read_snapshots(*files), 2)


@pytest.fixture(scope="module")
def futures(recordings):
    return first_hours(read_frames(recordings / "binance/usdm_btcusdt_20240808.gz"), 1)


@pytest.fixture(scope="module")
def coinbase(recordings):
    name = "coinbase/coinbase_BTC-USD_{}_2018-04-24.parquet"
    files = [recordings / name.format(kind) for kind in ("snapshot", "l2update")]
    return first_hours(read_level2(*files), 0.25)


@pytest.mark.recordings
@pytest.mark.parametrize("name", ["standx", "futures", "coinbase"])
def test_checks_hold(name, request):
    events, of = request.getfixturevalue(name)
    for seed in range(2):
        assert check_stream(events, of, n_pieces=1_000, seed=seed)["n_rows"] > 300
    assert check_truncation(events, of, n_cuts=4)["n_rows"] > 500
    assert check_mirror(events, of)["n_values"] > 5_000


@pytest.mark.recordings
@pytest.mark.parametrize("name, least", [("standx", 0.6), ("futures", 0.95), ("coinbase", 0.95)])
def test_most_rows_are_ready(name, least, request):
    events, of = request.getfixturevalue(name)
    made = build_features(events, of)
    assert made.is_ready.mean() > least
    for k, f in enumerate(made.feature_set.features):
        assert np.isfinite(made.x[made.is_ready, k]).all(), f.name


@pytest.mark.recordings
def test_unsigned_trades_get_a_side(standx):
    events, of = standx
    made = build_features(events, of)
    share = made.column("trade_imbalance_60s")[made.is_ready]
    assert (share > 0.1).mean() > 0.1 and (share < -0.1).mean() > 0.1
