"""Funding beside the book: announced rows of the own feed, cut anywhere the same, learned, traded, refused by name."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradebook.backtest.parity import compare
from tradebook.base.clock import NS_PER_S
from tradebook.base.errors import DataError
from tradebook.base.journal import Journal
from tradebook.base.settings import load_settings
from tradebook.features.funding import with_announcements
from tradebook.features.rows import FeatureStream, build_features, join_rows
from tradebook.features.schema import feature_set
from tradebook.market.events import FUNDING_UNITS, KIND_FUNDING
from tradebook.market.store import DAY_NS, Store
from tradebook.market.worlds import make_world
from tradebook.ops.pipeline import backtest_symbol, train_symbol
from tradebook.trader.session import trade_paper
from tradebook.training.building import Request, build_dataset
from tradebook.training.datasets import load_dataset
from tradebook.training.label_sets import LabelSet
from tradebook.training.partitions import freeze, thaw

MIDNIGHT_NS = 20_000 * DAY_NS
TOLD = feature_set("minimal+funding")
COLUMNS = [f.name for f in TOLD.features[-3:]]


@pytest.fixture(scope="module")
def market():
    "Ten minutes around midnight, funding paid each minute"
    made = make_world("lead_lag", 7, 600.0, MIDNIGHT_NS - 300 * NS_PER_S).markets[0]
    return with_announcements(made.events, 3), made.instrument


@pytest.fixture(scope="module")
def home(tmp_path_factory, market):
    events, of = market
    folder = tmp_path_factory.mktemp("funding")
    free = replace(of, taker_fee_bps=0.0)
    Store(folder / "market").write(events, free, "made")
    silent = replace(free, symbol="MUTE/USDT:USDT")
    Store(folder / "market").write(events[events["kind"] != KIND_FUNDING], silent, "made")
    return folder


@pytest.fixture(scope="module")
def whole(market):
    return build_features(*market, TOLD)


def test_columns_are_what_a_slow_reading_of_the_announcements_says(market, whole):
    events = market[0][market[0]["kind"] == KIND_FUNDING]
    ts, pays = events["ts_recv"], events["sequence"] * 10**6
    bps = events["size_lots"] * 1e4 / FUNDING_UNITS
    last = np.flatnonzero(np.diff(pays) > 0)  # the last word before each payment
    for k in range(5, len(whole), 37):
        t = int(whole.rows["ts"][k])
        i = np.searchsorted(ts, t, side="right") - 1
        assert whole.x[k, -3] == pytest.approx(bps[i], abs=1e-9)
        assert whole.x[k, -1] == pytest.approx((max(pays[i], t) - t) / 1e9 or 60, abs=8 * 3600)
        paid = [j for j in last if pays[j] <= t]
        if len(paid) < 3:
            assert np.isnan(whole.x[k, -2])
        else:
            assert whole.x[k, -2] == pytest.approx(bps[paid[-3:]].sum(), abs=1e-9)


@settings(max_examples=8, deadline=None)
@given(places=st.lists(st.floats(0, 1), max_size=5), room=st.integers(1, 40), ice=st.booleans())
def test_a_feed_cut_anywhere_and_put_on_ice_is_the_recording(market, whole, places, room, ice):
    events, of = market
    parts, begin, stream = [], 0, FeatureStream(of, TOLD, room=room)
    for end in [*sorted(int(p * len(events)) for p in places), len(events)]:
        parts.append(stream.push(events, begin, end))
        begin = end
        if ice:
            stream = thaw(freeze(stream), of, TOLD, room=room)
    parts.append(stream.advance_to(int(events["ts_recv"][-1])))
    assert join_rows(*parts).x.tobytes() == whole.x.tobytes()


def chosen(folder, **more):
    "Settings of a small training with funding"
    return load_settings(
        environment={},
        overrides={
            "paths.data": str(folder), "features.set": "default+funding",
            "features.interval_ms": "500", "labels.horizon_s": "1", "labels.dead_zone_bps": "0",
            "training.embargo_s": "5", "training.rounds": "10", "training.folds": "3",
            "training.min_rows_leaf": "20", "gates.min_edge_bps": "0", **more,
        },
    )  # fmt: skip


def test_days_of_a_data_set_carry_the_payments_over_midnight(home, market, whole, tmp_path):
    of = market[1]
    request = Request((("synthetic", of.symbol),), None, None, TOLD, LabelSet("horizon", 2.0))
    built = build_dataset(home / "market", tmp_path, request)
    data = load_dataset(tmp_path, built.id)
    assert data.x.tobytes() == whole.x[: len(data)].tobytes() and len(data) >= len(whole) - 1


def test_it_is_learned_and_paper_equals_backtest(home, market):
    own, names = chosen(home), ("synthetic", market[1].symbol)
    made = train_symbol(own, *names, None, MIDNIGHT_NS + 200 * NS_PER_S)
    assert 0.4 < made["auc"] < 1
    span = MIDNIGHT_NS - 60 * NS_PER_S, MIDNIGHT_NS + 300 * NS_PER_S
    backtest, paper = backtest_symbol(own, *names, *span), trade_paper(own, *names, *span)
    with Journal(home / "journal.db") as journal:
        rows = [journal.decisions(r) for r in (backtest.run_id, paper["run_id"])]
        fills = [journal.fills(r) for r in (backtest.run_id, paper["run_id"])]
    parity = compare(*rows, *fills)
    assert parity.is_exact and paper["n_predictions"] > 500, parity.first_difference


def test_a_market_that_announces_nothing_is_refused_by_name(home):
    for use in (trade_paper, backtest_symbol, train_symbol):
        with pytest.raises(DataError, match="MUTE/USDT:USDT has none in the store"):
            use(chosen(home), "synthetic", "MUTE/USDT:USDT")
