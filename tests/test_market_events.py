"""Events, instruments and quotes: round trips, whole messages, and the venue's own quotes."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tradebook.base.errors import DataError
from tradebook.market.book import apply_events, best, book_status, new_book, size_at
from tradebook.market.events import (
    EVENT,
    FLAG_LAST,
    KIND_CLEAR,
    KIND_GAP,
    KIND_LEVEL,
    KIND_TRADE,
    check_events,
    from_table,
    make_events,
    merge_events,
    message_starts,
    to_table,
)
from tradebook.market.instruments import CATALOGUE, instrument
from tradebook.market.quotes import quality, quotes


@st.composite
def streams(draw, max_messages=12, kinds=(KIND_GAP, KIND_CLEAR, KIND_LEVEL, KIND_TRADE)):
    "A proper stream: messages of 1-4 rows, time never decreasing, equal times now and then"
    sizes = draw(st.lists(st.integers(1, 4), max_size=max_messages))
    n = sum(sizes)
    events = np.zeros(n, EVENT)
    steps = draw(st.lists(st.integers(0, 2), min_size=len(sizes), max_size=len(sizes)))
    events["ts_recv"] = np.repeat(np.cumsum(steps, dtype=np.int64), sizes)
    pick = {"min_size": n, "max_size": n}
    events["kind"] = draw(st.lists(st.sampled_from(kinds), **pick))
    events["side"] = draw(st.lists(st.sampled_from([1, -1]), **pick))
    events["price_ticks"] = draw(st.lists(st.integers(100, 108), **pick))
    events["size_lots"] = draw(st.lists(st.integers(0, 3), **pick))
    events["sequence"] = np.repeat(np.arange(len(sizes)), sizes)
    events["flags"][np.cumsum(sizes, dtype=np.int64) - 1] = FLAG_LAST
    return events


@given(hnp.arrays(EVENT, st.integers(0, 50)))
def test_any_row_survives_the_table(events):
    assert from_table(to_table(events)).tobytes() == events.tobytes()


@given(st.tuples(streams(), streams(), streams()))
def test_merging_keeps_every_message_whole_and_every_stream_in_order(parts):
    for i, part in enumerate(parts):
        part["ts_event"] = i
    merged = merge_events(*parts)
    check_events(merged)
    assert (np.diff(merged["ts_recv"]) >= 0).all()
    for i, part in enumerate(parts):
        assert merged[merged["ts_event"] == i].tobytes() == part.tobytes()
    for message in np.split(merged, message_starts(merged)[1:]):
        assert len(set(message["ts_event"])) <= 1 and len(set(message["sequence"])) <= 1


@given(streams().filter(len), st.data())
def test_every_broken_promise_is_found(events, data):
    check_events(events)
    row = data.draw(st.integers(0, len(events) - 1))
    broken = events.copy()
    name, value = data.draw(
        st.sampled_from(
            [
                ("kind", 8),
                ("kind", 255),
                ("size_lots", -1),
                ("price_ticks", -1),
                ("side", 2),
                ("ts_recv", -9),
            ]
        )
    )
    if name == "ts_recv" and row == 0:
        row, value = len(events) - 1, -9
        broken["flags"][-1] = 0
    broken[name][row] = value
    with pytest.raises(DataError, match=r"row \d+ of"):
        check_events(broken)


@pytest.mark.parametrize("of", CATALOGUE.values(), ids=lambda of: f"{of.venue} {of.symbol}")
@given(ticks=st.integers(0, 1 << 31), lots=st.integers(0, 1 << 40))
@settings(max_examples=60, deadline=None)
def test_ticks_and_lots_survive_the_trip_to_money_and_back(of, ticks, lots):
    assert of.to_ticks(float(of.price(ticks))) == ticks
    if lots * of.lot_size < 1e6:
        assert of.to_lots(float(of.size(lots))) == lots
        assert of.round_size_down(float(of.size(lots))) == lots


@given(st.floats(0.001, 1e6), st.floats(0.02, 0.98))
def test_what_is_off_the_grid_is_refused(price, share):
    of = instrument("binance", "BTC/USDT")
    whole = np.round(price, 2)
    assert of.to_ticks(whole) == round(whole * 100)
    with pytest.raises(DataError, match=r"must be a multiple of 0\.01"):
        of.to_ticks(whole + share * of.tick_size)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.01])
def test_what_is_no_price_is_refused(bad):
    with pytest.raises(DataError, match="must be a multiple"):
        instrument("binance", "BTC/USDT").to_ticks([1.0, bad])


@settings(max_examples=80, deadline=None)
@given(streams(max_messages=25))
def test_quotes_are_the_book_after_each_message(events):
    rows, book, segment, n = quotes(events), new_book(), 0, 0
    bounds = [*message_starts(events), len(events)]
    for start, stop in pairwise(bounds):
        apply_events(book, events, start, stop)
        kinds = events["kind"][start:stop]
        segment += int((kinds == KIND_GAP).sum())
        if not np.isin(kinds, (KIND_CLEAR, KIND_LEVEL)).any():
            continue
        row, (bid, ask) = rows[n], (best(book, 0), best(book, 1))
        assert (row["bid_ticks"], row["ask_ticks"]) == (bid, ask)
        assert row["bid_lots"] == (size_at(book, 0, bid) if bid >= 0 else 0)
        assert row["ask_lots"] == (size_at(book, 1, ask) if ask >= 0 else 0)
        assert (row["segment"], row["status"]) == (segment, book_status(book))
        assert row["ts_recv"] == events["ts_recv"][stop - 1]
        n += 1
    assert n == len(rows)


def test_quality_of_nothing_and_of_one_hole():
    of = instrument("synthetic", "SYN/USDT:USDT")
    facts = quality(np.zeros(0, EVENT), of)
    assert facts["n_events"] == 0 and facts["coverage"] == 0 and facts["start_ns"] is None
    gap = make_events(ts_recv=10, kind=KIND_GAP, size_lots=4, flags=FLAG_LAST)
    facts = quality(gap, of)
    assert (facts["start_ns"], facts["end_ns"], facts["coverage"]) == (6, 10, 0.0)


@pytest.mark.parametrize("name", ["spot_btcusdt", "cm_ethusd_perp", "usdm_btcusdt"])
def test_the_rebuilt_book_agrees_with_the_venues_own_quotes(recordings, name):
    from tradebook.collector.wire_files import read_frames

    made = read_frames(sorted((recordings / "binance").glob(f"{name}_*.gz")))
    facts = quality(made.events, made.instrument)
    assert facts["n_quotes_compared"] > 1_000
    assert facts["n_quote_mismatches"] == 0
    assert facts["n_crossed"] == facts["n_one_sided"] == facts["n_invalid"] == 0
