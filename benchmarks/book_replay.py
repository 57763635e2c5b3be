"""The best prices and the best twenty levels after every message of a replayed market, beside hftbacktest.

Both rebuild the book from the same events and look at it after each message. The answers are compared first, all of
them: our best prices and sizes with a dictionary that is searched from end to end, hftbacktest's with ours. Measured
is processor time, since other programs may be running, and neither side's setting up. hftbacktest also keeps an order
queue and a clock, which a book does not; it is the fastest published reader of the same events, not the same program.
Its twenty levels are read in the fastest way it offers, from the arrays of its ROIVector depth.

Two feeds: the synthetic market's own (few levels a message, so much of the work is between messages), and the best
fifty levels of it after every second message, as a venue publishes them.

    python benchmarks/book_replay.py [--json] [--seconds 14400] [--rounds 7]
"""

import sys
import time

import numpy as np
from common import header, options, rate_row, show, take_turns
from feeds import fifty_levels
from numba import njit

try:
    import hftbacktest
    from hftbacktest import types as hft
except ModuleNotFoundError:
    sys.exit("hftbacktest is not installed; it comes with: pip install 'tradebook[bench]'")

from tradebook.market.book import LEAN, apply_event, new_book, set_level, top
from tradebook.market.events import FLAG_LAST, KIND_CLEAR, KIND_LEVEL, KIND_TRADE
from tradebook.market.quotes import QUOTE, quotes, replay_quotes
from tradebook.market.synthetic import synthetic_market

N_TOP = 20
HFT_KIND = {
    KIND_CLEAR: hft.DEPTH_CLEAR_EVENT,
    KIND_LEVEL: hft.DEPTH_EVENT,
    KIND_TRADE: hft.TRADE_EVENT,
}


def to_hft(events, of):
    "The same events in hftbacktest's format"
    out = np.zeros(len(events), hft.event_dtype)
    kind = np.array([HFT_KIND.get(k, 0) for k in range(5)], np.uint64)[events["kind"]]
    side = np.where(events["side"] > 0, hft.BUY_EVENT, hft.SELL_EVENT).astype(np.uint64)
    side[events["kind"] == KIND_CLEAR] = 0
    out["ev"] = kind | side | np.uint64(hft.EXCH_EVENT) | np.uint64(hft.LOCAL_EVENT)
    out["exch_ts"], out["local_ts"] = events["ts_event"], events["ts_recv"]
    out["px"], out["qty"] = of.price(events["price_ticks"]), of.size(events["size_lots"])
    return out


@njit
def hft_quotes(hbt, ts, ticks, sizes):
    "Wait for each feed message, note the best prices and what waits there; the number of messages"
    depth, n = hbt.depth(0), 0
    while hbt.wait_next_feed(False, 10**18) == 2:
        bid, ask = depth.best_bid_tick, depth.best_ask_tick
        ts[n], ticks[n, 0], ticks[n, 1] = hbt.current_timestamp, bid, ask
        sizes[n, 0], sizes[n, 1] = depth.bid_qty_at_tick(bid), depth.ask_qty_at_tick(ask)
        n += 1
    return n


@njit
def hft_top(hbt, ticks, sizes, is_kept):
    "Wait for each feed message, copy the first levels of both sides; the number of messages"
    depth, n = hbt.depth(0), 0
    sides, lowest = (depth.bid_depth, depth.ask_depth), depth.roi_lb_tick
    while hbt.wait_next_feed(False, 10**18) == 2:
        at, row = (depth.best_bid_tick - lowest, depth.best_ask_tick - lowest), n if is_kept else 0
        for side in range(2):
            lots, tick, step, i = sides[side], at[side], 2 * side - 1, 0
            while i < N_TOP and 0 <= tick < len(lots):
                ticks[row, side, i], sizes[row, side, i] = tick + lowest, lots[tick]
                i += lots[tick] > 0
                tick += step
        n += 1
    return n


class Peer:
    "One of hftbacktest's depths, ready to run again and again"

    def __init__(self, make, data, of, price_range):
        self.make, self.data, self.of, self.range = make, data, of, price_range

    def open(self):
        "A backtest that stands at its first event"
        asset = hftbacktest.BacktestAsset().data(self.data).linear_asset(1.0)
        asset.constant_order_latency(0, 0).risk_adverse_queue_model().no_partial_fill_exchange()
        asset.trading_value_fee_model(0.0, 0.0).tick_size(self.of.tick_size)
        asset.lot_size(self.of.lot_size).last_trades_capacity(0)
        if self.make is hftbacktest.ROIVectorMarketDepthBacktest:
            asset.roi_lb(self.range[0]).roi_ub(self.range[1])
        return self.make([asset])

    def timed(self, loop, *args):
        "Seconds of processor time that a loop over all messages takes"
        hbt = self.open()
        began = time.process_time()
        self.n = loop(hbt, *args)
        took = time.process_time() - began
        hbt.close()
        return took


@njit(**LEAN)
def replay_top(book, events, ticks, lots, is_kept):
    "Copy the first levels of both sides after every message; the number of messages"
    n = 0
    for i in range(len(events)):
        e = events[i]
        if e.kind == KIND_LEVEL:
            set_level(book, np.int64(e.side < 0), e.price_ticks, e.size_lots)
        else:
            apply_event(book, e.kind, e.side, e.price_ticks, e.size_lots)
        if e.flags & FLAG_LAST:
            row = n if is_kept else 0
            top(book, N_TOP, ticks[row, 0], lots[row, 0], ticks[row, 1], lots[row, 1])
            n += 1
    return n


def timed(loop, *args):
    "Seconds of processor time that a replay into a new book takes"
    book = new_book()
    began = time.process_time()
    loop(book, *args)
    return time.process_time() - began


def check_dictionary(events, ours):
    "Stop when a best price or size differs from a dictionary's"
    sides, n, is_changed = ({}, {}), 0, False
    columns = (
        events[name].tolist() for name in ("kind", "side", "price_ticks", "size_lots", "flags")
    )
    wanted = ours[["bid_ticks", "ask_ticks", "bid_lots", "ask_lots"]].tolist()
    for kind, side, ticks, lots, flags in zip(*columns, strict=True):
        if kind == KIND_LEVEL:
            levels = sides[side < 0]
            levels.pop(ticks, None)
            if lots:
                levels[ticks] = lots
        elif kind == KIND_CLEAR:
            sides = ({}, {})
        is_changed |= kind in (KIND_LEVEL, KIND_CLEAR)
        if is_changed and flags & FLAG_LAST:
            bid, ask = max(sides[0], default=-1), min(sides[1], default=-1)
            if (bid, ask, sides[0].get(bid, 0), sides[1].get(ask, 0)) != wanted[n]:
                sys.exit(f"quote {n} differs from the dictionary's; the benchmark compares nothing")
            n, is_changed = n + 1, False


def check_quotes(peer, of, room, ours):
    "Stop when a best price or size differs; the number of moments compared"
    ts, ticks, sizes = room[0][: peer.n], room[1][: peer.n], room[2][: peer.n]
    last = np.append(ts[1:] != ts[:-1], True)
    at = np.searchsorted(ts[last], ours["ts_recv"])
    once = np.append(ours["ts_recv"][1:] != ours["ts_recv"][:-1], True) & (at < last.sum())
    once[once] = ts[last][at[once]] == ours["ts_recv"][once]
    lots = np.rint(sizes[last][at[once]] / of.lot_size).astype(np.int64)
    is_same = all(
        (ticks[last][at[once], i] == ours[f"{side}_ticks"][once]).all()
        and (lots[:, i] == ours[f"{side}_lots"][once]).all()
        for i, side in enumerate(("bid", "ask"))
    )
    if not is_same or once.sum() < 0.99 * len(ours):
        sys.exit("the best prices differ; the benchmark compares nothing")
    return int(once.sum())


def check_top(peer, of, events):
    "Stop when one of the levels differs after any message"
    n = int((events["flags"] & FLAG_LAST).sum())
    ticks, lots = (np.zeros((n, 2, N_TOP), np.int64) for _ in range(2))
    peer_ticks, peer_sizes = np.zeros((n, 2, N_TOP), np.int64), np.zeros((n, 2, N_TOP))
    replay_top(new_book(), events, ticks, lots, True)
    peer.timed(hft_top, peer_ticks, peer_sizes, True)
    lots_seen = np.rint(peer_sizes / of.lot_size)
    is_same = (ticks[: peer.n] == peer_ticks[: peer.n]).all()
    is_same &= (lots[: peer.n] == lots_seen[: peer.n]).all()
    if peer.n < n - 1 or not is_same:  # it stops before the last message
        sys.exit("the first levels differ; the benchmark compares nothing")


def measure(feed, events, of, rounds):
    "Rows of results for one feed"
    data, n, ours = to_hft(events, of), len(events), quotes(events)
    prices = of.price(events["price_ticks"][events["kind"] == KIND_LEVEL])
    span = (float(prices.min()) - 100, float(prices.max()) + 100)
    peers = {
        "hftbacktest ROIVector": hftbacktest.ROIVectorMarketDepthBacktest,
        "hftbacktest HashMap": hftbacktest.HashMapMarketDepthBacktest,
    }
    peers = {name: Peer(make, data, of, span) for name, make in peers.items()}
    vector = peers["hftbacktest ROIVector"]
    out, room = (
        np.zeros(n, QUOTE),
        [np.zeros(n, np.int64), np.zeros((n, 2), np.int64), np.zeros((n, 2))],
    )
    levels = [np.zeros((1, 2, N_TOP), np.int64) for _ in range(2)]
    hft_levels = np.zeros((1, 2, N_TOP), np.int64), np.zeros((1, 2, N_TOP))
    check_dictionary(events, ours)
    for peer in peers.values():
        peer.timed(hft_quotes, *room)
        check_quotes(peer, of, room, ours)
    check_top(vector, of, events)
    cases = {
        "ours": lambda: timed(replay_quotes, events, out),
        **{k: (lambda p=p: p.timed(hft_quotes, *room)) for k, p in peers.items()},
        "ours, 20": lambda: timed(replay_top, events, *levels, False),
        "hftbacktest ROIVector, 20": lambda: vector.timed(hft_top, *hft_levels, False),
    }
    took = take_turns(cases, rounds)
    fastest = min(peers, key=lambda name: np.median(took[name]))
    unit = "M events/s"
    return [
        rate_row(f"{feed}: best prices", took, "ours", n, unit, 10.0, fastest),
        rate_row(f"{feed}: 20 levels", took, "ours, 20", n, unit, 5.0, "hftbacktest ROIVector, 20"),
    ]


def main():
    "Measure and print"
    args = options(__doc__, seconds=14_400)
    market = synthetic_market(seed=7, duration_s=args.seconds)
    of, feeds = market.instrument, {"small messages": market.events}
    feeds["fifty levels"] = fifty_levels(market.events, every=2)
    facts = {f"events, {name}": len(events) for name, events in feeds.items()}
    rows = [r for name, events in feeds.items() for r in measure(name, events, of, args.rounds)]
    show(header("numpy", "numba", "hftbacktest", rounds=args.rounds, **facts), rows, args.json)


if __name__ == "__main__":
    main()
