"""Pictures draw, whatever the data: bounded cells, right numbers, holes that stay holes, named refusals."""

import importlib.util
import shutil

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradebook.base.clock import NS_PER_S
from tradebook.base.errors import DataError, ModelError
from tradebook.base.look import LINES, add_band
from tradebook.features.kernel import ROW
from tradebook.features.rows import FeatureRows
from tradebook.features.schema import feature_set
from tradebook.labels.horizon import LABEL
from tradebook.market.events import (
    FLAG_LAST,
    KIND_CLEAR,
    KIND_GAP,
    KIND_LEVEL,
    KIND_TRADE,
    make_events,
    merge_events,
)
from tradebook.market.instruments import instrument
from tradebook.market.pictures import (
    depth_map,
    is_in_hole,
    largest_trades,
    liquidity,
    plot_book,
    plot_liquidity,
)
from tradebook.market.worlds import make_world
from tradebook.training.curves import (
    mean_moves,
    plot_costs,
    plot_decay,
    plot_information,
    plot_information_map,
    plot_stability,
)
from tradebook.training.information import cost_table, ic_by_age, ic_by_group, information_table
from tradebook.training.pictures import correlation_matrix, plot_correlation, plot_distributions

OF = instrument("synthetic", "SYN/USDT:USDT")
NAMES = ("spread_bps", "imbalance_1", "imbalance_5", "ofi_1_1s", "ofi_5_5s")


def book_at(ts_s, bid=99, ask=101, lots=5):
    "A whole book of one level a side"
    ts = [int(ts_s * NS_PER_S)] * 3
    return make_events(
        ts_event=ts,
        ts_recv=ts,
        kind=[KIND_CLEAR, KIND_LEVEL, KIND_LEVEL],
        side=[0, 1, -1],
        price_ticks=[0, bid, ask],
        size_lots=[0, lots, lots],
        flags=[0, 0, FLAG_LAST],
    )


def one_event(ts_s, kind, **more):
    "A message of one row"
    ts, more = [int(ts_s * NS_PER_S)], {k: [v] for k, v in more.items()}
    return make_events(ts_event=ts, ts_recv=ts, kind=[kind], flags=[FLAG_LAST], **more)


@pytest.fixture(scope="module")
def market():
    return make_world("null", seed=3, duration_s=120.0).markets[0]


def made_rows(n=600, seed=0):
    "Feature rows of noise with NaN, and labels with holes"
    rng, features = np.random.default_rng(seed), feature_set().only(*NAMES)
    rows = np.zeros(n, ROW)
    rows["ts"] = rows["ts_book"] = (1 + np.arange(n)) * NS_PER_S
    rows["segment"] = np.arange(n) // 250
    x = rng.normal(size=(n, len(NAMES)))
    x[rng.random(x.shape) < 0.1] = np.nan
    labels = {}
    for h in (1.0, 2.0, 5.0):
        one = np.zeros(n, LABEL)
        one["ts_start"], one["ts_end"] = rows["ts"], rows["ts"] + round(h * NS_PER_S)
        one["is_valid"] = rng.random(n) < 0.9
        move = np.where(one["is_valid"], rng.normal(size=n) + np.nan_to_num(x[:, 1]), np.nan)
        one["gross_bps"], one["long_net_bps"], one["short_net_bps"] = move, move - 0.1, -move - 0.1
        labels[h] = one
    return FeatureRows(rows, x, features), labels


def all_tables(features, labels):
    "Every table that a picture is drawn from"
    x, group = features.x, np.arange(len(features)) * 4 // max(len(features), 1)
    middle = list(labels)[1]
    return {
        "information": information_table(x, NAMES, labels),
        "group": ic_by_group(x, NAMES, {middle: labels[middle]}, group),
        "cost": cost_table(x, NAMES, labels, 2.0, 1.0),
    }


def all_figures(features, labels):
    "Every picture of features"
    tables = all_tables(features, labels)
    return {
        "distributions": plot_distributions(features),
        "correlation": plot_correlation(features),
        "map": plot_information_map(tables["information"]),
        "bands": plot_information(tables["information"], 2.0),
        "decay": plot_decay(tables["information"]),
        "stability": plot_stability(tables["group"]),
        "costs": plot_costs(tables["cost"], mean_moves(labels), 2.0),
    }


@given(n_times=st.integers(1, 300), n_prices=st.integers(2, 80), around=st.sampled_from([None, 8]))
@settings(max_examples=6, deadline=None)
def test_a_map_has_no_more_cells_than_asked_for(market, n_times, n_prices, around):
    found = depth_map(market.events, OF, around, n_times, n_prices)
    assert found.bids.shape == found.asks.shape == (len(found.ts), len(found.price))
    assert len(found.ts) <= n_times and len(found.price) <= n_prices
    figure = plot_book(market.events, OF, around, n_times, n_prices, n_trades=10)
    assert figure.data[0].z.size <= n_times * n_prices
    assert sum(len(t.x) for t in figure.data[2:]) <= 10


def test_a_map_holds_the_value_that_rests_in_the_book():
    events = merge_events(book_at(1), book_at(11, bid=199, ask=201, lots=7))
    found = depth_map(events, OF, n_times=10, n_prices=400)
    tick, lot = OF.tick_size, OF.lot_size
    assert found.bids[0].sum() == pytest.approx(5 * lot * 99 * tick)
    assert found.asks[0].sum() == pytest.approx(5 * lot * 101 * tick)
    last = 0.75 * 5 * 99 + 0.25 * 7 * 199  # three of the last column's four looks see the old book
    assert found.bids[-1].sum() == pytest.approx(last * lot * tick)
    held = found.price[found.bids[0] > 0]
    assert held == pytest.approx([99 * tick])


def test_holes_are_white_and_only_holes():
    events = merge_events(
        book_at(0), book_at(10), one_event(30, KIND_GAP, size_lots=20 * NS_PER_S), book_at(30),
        book_at(40),
    )  # fmt: skip
    found = depth_map(events, OF, around_bps=500, n_times=40, n_prices=10)
    is_white = np.isnan(found.bids).all(axis=1)
    inside = (found.ts > 10 * NS_PER_S) & (found.ts < 29 * NS_PER_S)  # the 30th ends on a book
    assert np.array_equal(is_white, inside) and np.array_equal(np.isnan(found.mid), inside)
    table = liquidity(events, OF, n_times=40, bands_bps=(500,))
    assert table.depth_500bps.isna().equals(pd.Series(inside)) and table.mid.isna().sum() == 19
    assert not is_in_hole(events, np.array([10, 30, 40]) * NS_PER_S).any()
    for figure in (plot_book(events, OF, n_times=40), plot_liquidity(events, OF, 40)):
        assert figure.data


def test_trades_are_signed_by_the_venue_or_by_the_quote():
    prints = [(2, 101, 0), (3, 99, 0), (4, 100, 0), (5, 99, 1), (6, 102, -1)]
    trades = [
        one_event(t, KIND_TRADE, price_ticks=p, size_lots=1 + t, side=s) for t, p, s in prints
    ]
    table = largest_trades(merge_events(book_at(1), *trades), OF)
    assert table.side.tolist() == [1, -1, 0, 1, -1]
    assert table.offset_bps.round(6).tolist() == [100, -100, 0, -100, 200]
    assert largest_trades(merge_events(book_at(1), *trades), OF, 2).ts.tolist() == [
        5 * NS_PER_S,
        6 * NS_PER_S,
    ]


def test_one_row_draws():
    for events in (book_at(1)[-1:], book_at(1), one_event(1, KIND_GAP, size_lots=5)):
        assert plot_book(events, OF, around_bps=10).data
        assert plot_liquidity(events, OF).data
    assert plot_book(book_at(1), OF).data[0].z.size
    features, labels = made_rows(1)
    assert all(f.data is not None for f in all_figures(features, labels).values())


def test_nothing_is_refused_by_name(market):
    none = market.events[:0]
    for draw in (plot_book, plot_liquidity, depth_map, liquidity):
        with pytest.raises(DataError, match="events must hold at least one row, was empty"):
            draw(none, OF)
    with pytest.raises(DataError, match="dtype EVENT, was float64"):
        plot_book(np.zeros(3), OF)
    with pytest.raises(DataError, match="a book with both sides before stop_ns"):
        plot_book(book_at(1)[-1:], OF)
    with pytest.raises(DataError, match="around_bps must be > 0"):
        plot_book(market.events, OF, around_bps=-1)
    features, labels = made_rows(40)
    for draw in (plot_distributions, plot_correlation):
        with pytest.raises(DataError, match="features must have rows and columns, had 0"):
            draw(features[:0])
        with pytest.raises(ModelError, match="no feature is called 'imbalance_6'"):
            draw(features, ["imbalance_6"])
    tables = all_tables(features, labels)
    empty = tables["information"][:0]
    with pytest.raises(DataError, match="table must have at least one row, was empty"):
        plot_information_map(empty)
    with pytest.raises(DataError, match="table must have at least one row, was empty"):
        plot_decay(empty)
    with pytest.raises(DataError, match="table must have at least one row, was empty"):
        plot_costs(tables["cost"][:0], mean_moves(labels), 2.0)
    with pytest.raises(DataError, match=r"horizon_s must be one of \[\]"):
        plot_information(empty, 1.0)
    with pytest.raises(DataError, match="table must come from `ic_by_group`"):
        plot_stability(tables["information"])


def test_columns_that_are_missing_or_constant_draw():
    features, labels = made_rows(300)
    features.x[:, 0], features.x[:, 1] = np.nan, 3.0
    found = correlation_matrix(features)
    assert found.loc["spread_bps"].isna().all() and found.loc["imbalance_1"].isna().all()
    figures = all_figures(features, labels)
    assert len(figures["distributions"].data[0].x) == 0
    assert "spread_bps (100.0% missing)" in [
        a.text for a in figures["distributions"].layout.annotations
    ]
    assert figures["costs"].data


def test_bars_hold_all_known_rows_and_correlations_are_spearman():
    features, _ = made_rows(500)
    for bars in plot_distributions(features).data:
        assert np.asarray(bars.y, float).sum() == pytest.approx(100, abs=1e-3)
    frame = pd.DataFrame(features.x, columns=NAMES).corr("spearman")
    found = correlation_matrix(features).loc[list(NAMES), list(NAMES)]
    assert np.allclose(found, frame, atol=1e-12)


def test_found_is_filled_and_numbered_and_the_rest_is_not():
    features, labels = made_rows(900)
    table = information_table(features.x, NAMES, labels)
    assert 0 < table.is_found.sum() < len(table)
    cells = plot_information_map(table).data[0].text
    assert sum(bool(c) for row in cells for c in row) == table.is_found.sum()
    filled, hollow = plot_information(table, 1.0).data[2:]
    at = table[table.horizon_s == 1]
    assert set(filled.y) == set(at.feature[at.is_found]) and filled.marker.symbol == "circle"
    assert set(hollow.y) == set(at.feature[~at.is_found])
    for figure in (plot_information_map(table), plot_information(table, 1.0), plot_decay(table)):
        title = figure.layout.title.text
        assert str(len(table)) in title and "Bonferroni" in title


def test_the_cost_line_is_the_cost_of_the_table():
    features, labels = made_rows(600)
    table = cost_table(features.x, NAMES, labels, 2.0, 1.0)
    figure = plot_costs(table, mean_moves(labels), 2.0)
    lines = {t.name: t for t in figure.data}
    assert np.allclose(lines["taker: spread + fees"].y, 4.1)
    assert set(lines["maker: fees alone"].y) == {2.0}
    moves = [np.nanmean(np.abs(one["gross_bps"])) for one in labels.values()]
    assert np.allclose(lines["mean size of the move"].y, moves, atol=1e-4)


@given(st.lists(st.sampled_from([1.0, 2.0, np.nan]), max_size=12))
def test_a_band_is_drawn_once_for_each_unbroken_stretch(values):
    figure = add_band(go.Figure(), range(len(values)), values, [v + 1 for v in values], name="band")
    known = np.isfinite(values) if values else np.zeros(0, bool)
    assert len(figure.data) == np.sum(known & ~np.r_[False, known[:-1]])
    assert sum(len(t.x) for t in figure.data) == 2 * known.sum()
    assert sum(bool(t.showlegend) for t in figure.data) == min(len(figure.data), 1)


def test_line_colours_stay_apart_for_colour_blind_eyes():
    "Simulated after Machado et al. 2009: no two of the first five become alike"
    deutan = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])
    seen = []
    for color in LINES[:5]:
        rgb = np.array([int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)])
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        seen.append(np.clip(deutan @ linear, 0, 1))
    apart = [np.abs(a - b).sum() for i, a in enumerate(seen) for b in seen[:i]]
    assert min(apart) > 0.15


@pytest.mark.slow
def test_every_picture_is_drawn_by_a_real_browser(market, tmp_path):
    if importlib.util.find_spec("kaleido") is None or not shutil.which("chromium"):
        pytest.skip("needs kaleido and a system chromium to draw")
    features, labels = made_rows(400)
    figures = all_figures(features, labels)
    figures["age"] = plot_decay(ic_by_age(features, labels[2.0], (0, 1, 4)), by="age_s")
    figures["book"] = plot_book(market.events, OF, n_times=30, n_prices=20)
    figures["liquidity"] = plot_liquidity(market.events, OF, n_times=20)
    files = [tmp_path / f"{name}.svg" for name in figures]
    pio.write_images(fig=list(figures.values()), file=files, width=700)  # one browser for all
    for (name, figure), file in zip(figures.items(), files, strict=True):
        drawn = file.read_text()
        assert figure.layout.title.text.split("<br>")[0] in drawn, name
        assert "<image" in drawn or drawn.count("<path") > 10, name  # a map, or lines and points
