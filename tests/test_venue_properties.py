"""Walking the book against a slow reference, and fills that do not depend on how events are cut."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradebook.market.book import new_book, set_level
from tradebook.market.events import (
    FLAG_LAST,
    KIND_CLEAR,
    KIND_GAP,
    KIND_LEVEL,
    make_events,
    message_starts,
)
from tradebook.market.instruments import instrument
from tradebook.market.synthetic import synthetic_market
from tradebook.venue.fills import walk_book
from tradebook.venue.orders import OrderIntent
from tradebook.venue.paper import PaperVenue

MS = 1_000_000
OF = instrument("synthetic", "SYN/USDT:USDT")
BOOK = new_book()  # one for all: 130 MiB are promised for each


def slow_walk(levels, side, size):
    "The plainest way to take a size: sort, then take lot after lot"
    found, cost, worst = 0, 0, -1
    for ticks, lots in sorted(levels.items(), reverse=side < 0):
        take = min(lots, size - found)
        if take > 0:
            found, cost, worst = found + take, cost + take * ticks, ticks
    return found, cost, worst


@settings(max_examples=150, deadline=None)
@given(
    asks=st.dictionaries(st.integers(500_000, 600_000), st.integers(1, 10**12), max_size=12),
    bids=st.dictionaries(st.integers(0, 499_999), st.integers(1, 10**12), max_size=12),
    size=st.integers(1, 10**13),
)
def test_walk_equals_a_slow_reference_and_leaves_the_book_alone(asks, bids, size):
    for side, levels in ((1, asks), (0, bids)):
        for ticks, lots in levels.items():
            set_level(BOOK, side, ticks, lots)
    before = BOOK.head.copy()
    assert walk_book(BOOK, 1, size) == slow_walk(asks, 1, size)
    assert walk_book(BOOK, -1, size) == slow_walk(bids, -1, size)
    assert (BOOK.head == before).all()
    for side, levels in ((1, asks), (0, bids)):
        for ticks in levels:
            set_level(BOOK, side, ticks, 0)
    assert walk_book(BOOK, 1, size) == (0, 0, -1)


def holed_market(seed, n_holes):
    "Two minutes of a market, with holes: a gap message, half a second of lost rows, a new snapshot"
    events = synthetic_market(seed=seed, duration_s=120).events
    rng = np.random.default_rng(seed)
    starts = message_starts(events)
    is_lost, extra = np.zeros(len(events), bool), []
    book = {}
    cuts = np.sort(rng.choice(np.arange(50, len(starts) - 200), n_holes, replace=False))
    for at in cuts:
        lost = slice(starts[at], starts[at + 40])
        is_lost[lost] = True
        back = int(events["ts_recv"][starts[at + 40]])
        book.clear()
        for e in events[: starts[at + 40]]:
            if e["kind"] == KIND_CLEAR:
                book.clear()
            elif e["kind"] == KIND_LEVEL:
                key = (int(e["side"]), int(e["price_ticks"]))
                book[key] = int(e["size_lots"])
        levels = [(s, p, q) for (s, p), q in book.items() if q]
        side, price, lots = map(list, zip(*levels, strict=True))
        extra.append(make_events(kind=KIND_GAP, ts_recv=back, size_lots=[5], flags=FLAG_LAST))
        whole = make_events(
            kind=[KIND_CLEAR] + [KIND_LEVEL] * len(side),
            ts_recv=back + 30 * MS,
            side=[0, *side],
            price_ticks=[0, *price],
            size_lots=[0, *lots],
        )
        whole["flags"][-1] = FLAG_LAST
        extra.append(whole)
    rows = np.concatenate([events[~is_lost], *extra])
    return rows[np.argsort(rows["ts_recv"], kind="stable")]


EVENTS = holed_market(3, 12)
STARTS = message_starts(EVENTS)
SPAN = int(EVENTS["ts_recv"][0]), int(EVENTS["ts_recv"][-1])
GAPS = EVENTS["ts_recv"][EVENTS["kind"] == KIND_GAP]


def fills_of(orders, latency_ns, cuts, timers):
    "Send orders at their times, with the events cut at `cuts` and silence told at `timers`"
    venue, fills, cursor = PaperVenue(OF, latency_ns, 1.5), [], 0
    todo = [("send", ts, size) for ts, size in orders] + [("timer", ts, 0) for ts in timers]
    todo += [("timer", int(EVENTS["ts_recv"][c - 1]), 0) for c in cuts if c]
    for what, ts, size in sorted(todo, key=lambda x: (x[1], x[0] == "send", x[2])):
        stop = int(np.searchsorted(EVENTS["ts_recv"], ts, side="right"))
        for cut in [c for c in sorted(cuts) if cursor < c < stop] + [stop]:
            fills += venue.advance(EVENTS, cursor, cut)
            cursor = cut
        if what == "timer":
            fills += venue.advance_to(ts)
        else:
            side = 1 if size > 0 else -1
            venue.submit(OrderIntent(f"x{ts}", OF.symbol, side, abs(size), False, ts, "ENTER"))
    fills += venue.advance(EVENTS, cursor, len(EVENTS)) + venue.advance_to(SPAN[1] + 10**12)
    return fills, venue


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_cut_of_the_events_gives_the_same_fills(data):
    near_gap = st.sampled_from(GAPS.tolist()).flatmap(
        lambda ts: st.integers(ts - 200 * MS, ts + 50 * MS)
    )
    times = st.one_of(st.integers(*SPAN), near_gap)
    sizes = st.integers(1, 5000).flatmap(lambda s: st.sampled_from([s, -s]))
    orders = data.draw(
        st.lists(st.tuples(times, sizes), min_size=1, max_size=6, unique_by=lambda o: o[0])
    )
    latency = data.draw(st.sampled_from([0, 1, 7 * MS, 50 * MS, 400 * MS]))
    cuts = data.draw(st.lists(st.sampled_from(STARTS.tolist()), max_size=30))
    after = st.tuples(st.sampled_from([ts for ts, _ in orders]), st.integers(0, 80 * MS))
    close = after.map(lambda t: t[0] + latency + t[1])  # a timer between two messages, an order due
    timers = data.draw(st.lists(close | st.integers(*SPAN), max_size=20))
    timers = [min(ts, SPAN[1]) for ts in timers]
    whole, venue = fills_of(orders, latency, [], [])
    pieces, _ = fills_of(orders, latency, cuts, timers)
    assert whole == pieces
    assert not venue.pending and len(whole) == len(orders)
    assert all(f.ts_fill >= f.ts_sent + latency for f in whole)
    assert all(f.ts_fill == f.ts_sent + latency for f in whole if not f.is_late)


def test_message_by_message_equals_all_at_once():
    orders = [(int(ts) - 35 * MS, 40) for ts in GAPS] + [(SPAN[0] + 5_000 * MS, -700)]
    whole, _ = fills_of(orders, 50 * MS, [], [])
    single, _ = fills_of(orders, 50 * MS, STARTS.tolist(), [])
    assert whole == single
    assert any(f.is_late for f in whole)


def test_fill_is_worse_with_slippage_and_pays_the_taker_fee():
    ts = SPAN[0] + 10_000 * MS
    for side in (1, -1):
        plain, slipped = PaperVenue(OF, 0), PaperVenue(OF, 0, 10.0)
        for venue in (plain, slipped):
            venue.advance(EVENTS, 0, int(np.searchsorted(EVENTS["ts_recv"], ts, side="right")))
            venue.submit(OrderIntent("x", OF.symbol, side, 10, False, ts, "ENTER"))
        (a,), (b,) = plain.advance_to(ts), slipped.advance_to(ts)
        assert side * (b.price / a.price - 1) * 1e4 == pytest.approx(10.0)
        assert b.fee_quote == pytest.approx(b.notional_quote * 2.0 / 1e4)
        assert b.notional_quote == pytest.approx(b.price * 10 * OF.lot_size)


def test_real_recording_gives_the_same_fills_in_any_pieces(recordings):
    from tradebook.market.snapshots import read_snapshots

    events = read_snapshots(recordings / "standx/BTC-USD_book20_2026-01-06.parquet").events
    events = events[: message_starts(events)[60_000]]
    of = instrument("standx", "BTC/USD:USD")
    times = np.linspace(events["ts_recv"][5000], events["ts_recv"][-5000], 300).astype(int)

    def run(n_pieces):
        "Fills of three hundred orders"
        venue, fills, cursor = PaperVenue(of, 50 * MS), [], 0
        for i, ts in enumerate(times.tolist()):
            stop = int(np.searchsorted(events["ts_recv"], ts, side="right"))
            for cut in np.linspace(cursor, stop, n_pieces + 1).astype(int)[1:]:
                fills += venue.advance(events, cursor, int(cut))
                cursor = int(cut)
            fills += venue.advance_to(ts)
            side = 1 if i % 2 else -1
            venue.submit(OrderIntent(f"x{i}", of.symbol, side, 500, False, ts, "ENTER"))
        return fills + venue.advance(events, cursor) + venue.advance_to(times[-1] + 10**12)

    whole = run(1)
    assert whole == run(7) and len(whole) == len(times)
