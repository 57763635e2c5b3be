"""The best bid and ask after every message of a replayed market, beside hftbacktest on the same events.

Both rebuild the book from level changes and look at its best prices after each message. The answers are compared
first: a benchmark of two things that differ measures nothing. hftbacktest also keeps an order queue and a clock,
which a book does not; it is the fastest published reader of the same events, not the same program.

    python benchmarks/book_replay.py [--json] [--seconds 14400] [--rounds 7]
"""

import sys
import time

import numpy as np
from common import header, options, rate_row, show, take_turns
from numba import njit

try:
    import hftbacktest
    from hftbacktest import types as hft
except ModuleNotFoundError:
    sys.exit("hftbacktest is not installed; it comes with: pip install 'tradebook[bench]'")

from tradebook.market.book import apply_events, new_book, top
from tradebook.market.events import FLAG_LAST, KIND_CLEAR, KIND_LEVEL, KIND_TRADE
from tradebook.market.quotes import QUOTE, quotes, replay_quotes
from tradebook.market.synthetic import synthetic_market

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
def hft_feed(hbt, ts, bid, ask):
    "Wait for each feed message, note the best prices; the number of messages"
    depth, n = hbt.depth(0), 0
    while hbt.wait_next_feed(False, 10**18) == 2:
        ts[n], bid[n], ask[n] = hbt.current_timestamp, depth.best_bid_tick, depth.best_ask_tick
        n += 1
    return n


class Peer:
    "One of hftbacktest's depths, ready to run again and again"

    def __init__(self, make, data, of, price_range, room):
        self.make, self.data, self.of, self.range = make, data, of, price_range
        self.out = [np.zeros(room, np.int64) for _ in range(3)]

    def __call__(self):
        asset = hftbacktest.BacktestAsset().data(self.data).linear_asset(1.0)
        asset.constant_order_latency(0, 0).risk_adverse_queue_model().no_partial_fill_exchange()
        asset.trading_value_fee_model(0.0, 0.0).tick_size(self.of.tick_size)
        asset.lot_size(self.of.lot_size).last_trades_capacity(0)
        if self.make is hftbacktest.ROIVectorMarketDepthBacktest:
            asset.roi_lb(self.range[0]).roi_ub(self.range[1])
        hbt = self.make([asset])
        began = time.perf_counter()
        self.n = hft_feed(hbt, *self.out)
        took = time.perf_counter() - began
        hbt.close()
        return took


def check_same(peer, ours):
    "Stop when a best price differs; the number of moments compared"
    ts, bid, ask = (column[: peer.n] for column in peer.out)
    last = np.append(ts[1:] != ts[:-1], True)
    at = np.searchsorted(ts[last], ours["ts_recv"])
    once = np.append(ours["ts_recv"][1:] != ours["ts_recv"][:-1], True) & (at < last.sum())
    once[once] = ts[last][at[once]] == ours["ts_recv"][once]
    is_same = (bid[last][at[once]] == ours["bid_ticks"][once]).all()
    is_same &= (ask[last][at[once]] == ours["ask_ticks"][once]).all()
    if not is_same or once.sum() < 0.99 * len(ours):
        sys.exit("the best prices differ; the benchmark compares nothing")
    return int(once.sum())


@njit
def replay_top(book, events, n, bid_ticks, bid_lots, ask_ticks, ask_lots):
    "Copy the first levels of both sides after every message"
    begin, seen = 0, 0
    for i in range(len(events)):
        if events[i].flags & FLAG_LAST:
            apply_events(book, events, begin, i + 1)
            seen += top(book, n, bid_ticks, bid_lots, ask_ticks, ask_lots)[0]
            begin = i + 1
    return seen


def main():
    "Measure and print"
    args = options(__doc__, seconds=14_400)
    market = synthetic_market(seed=7, duration_s=args.seconds)
    events, of = market.events, market.instrument
    data, n = to_hft(events, of), len(events)
    ours, out = quotes(events), np.empty(n, QUOTE)
    prices = of.price(events["price_ticks"][events["kind"] == KIND_LEVEL])
    span = (float(prices.min()) - 100, float(prices.max()) + 100)
    peers = {
        "hftbacktest ROIVector": hftbacktest.ROIVectorMarketDepthBacktest,
        "hftbacktest HashMap": hftbacktest.HashMapMarketDepthBacktest,
    }
    peers = {name: Peer(make, data, of, span, n) for name, make in peers.items()}
    levels = [np.zeros(20, np.int64) for _ in range(4)]
    cases = {
        "ours": lambda: replay_quotes(new_book(), events, out),
        "ours, 20 levels": lambda: replay_top(new_book(), events, 20, *levels),
        **peers,
    }
    took = take_turns(cases, args.rounds)
    compared = [check_same(peer, ours) for peer in peers.values()]
    fastest = min(peers, key=lambda name: np.median(took[name]))
    head = header(
        "numpy", "numba", "hftbacktest", events=n, messages=len(ours), compared=min(compared),
        rounds=args.rounds,
    )  # fmt: skip
    unit = "M events/s"
    rows = [
        rate_row("best prices after each message", took, "ours", n, unit, 10.0, fastest),
        rate_row("best prices, absolute", took, "ours", n, unit, 100.0),
        rate_row("20 levels after each message", took, "ours, 20 levels", n, unit, 10.0),
    ]
    show(head, rows, args.json)


if __name__ == "__main__":
    main()
