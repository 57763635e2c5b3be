"""A feed of fifty levels, as Bybit's orderbook.50 sends it, cut from the synthetic market."""

import gzip
import json

import numpy as np
from numba import njit

from tradebook.market.book import apply_events, new_book, top
from tradebook.market.events import (
    EVENT,
    FLAG_LAST,
    KIND_CLEAR,
    KIND_LEVEL,
    KIND_TRADE,
    check_events,
)

LEVELS = 50


@njit
def changes(side, was, now, template, out, n):
    "Write what turns one view of a side (ticks, lots; best first) into another; the next free row"
    i = j = 0
    while i < LEVELS or j < LEVELS:
        old = was[0, i] * -side if i < LEVELS and was[0, i] >= 0 else np.int64(1 << 40)
        new = now[0, j] * -side if j < LEVELS and now[0, j] >= 0 else np.int64(1 << 40)
        if old == new == 1 << 40:
            break
        lots = now[1, j] if new <= old else 0
        if new != old or was[1, i] != lots:
            out[n] = template
            out[n].side, out[n].price_ticks, out[n].size_lots = side, min(old, new) * -side, lots
            n += 1
        i += old <= new
        j += new <= old
    return n


@njit
def cut(events, starts, every, book, template, out):
    "Publish the change of the best fifty levels after every few messages; trades pass through"
    was, now = np.full((2, 2, LEVELS), -1), np.full((2, 2, LEVELS), -1)
    n = seen = 0
    for m in range(len(starts) - 1):
        first, stop = starts[m], starts[m + 1]
        if events[first].kind == KIND_TRADE:
            out[n : n + stop - first] = events[first:stop]
            n += stop - first
            continue
        apply_events(book, events, first, stop)
        seen += 1
        if seen % every != 1 % every:
            continue
        begin, last = n, events[stop - 1]
        template.ts_event, template.ts_recv, template.sequence = (
            last.ts_event,
            last.ts_recv,
            last.sequence,
        )
        if seen == 1:
            out[n] = template
            out[n].kind = KIND_CLEAR
            n += 1
        top(book, LEVELS, now[0, 0], now[0, 1], now[1, 0], now[1, 1])
        n = changes(1, was[0], now[0], template, out, n)
        n = changes(-1, was[1], now[1], template, out, n)
        was[:] = now
        if n > begin:
            out[n - 1].flags = FLAG_LAST
    return n


def fifty_levels(events, every=5):
    "Events of a feed that shows the best fifty levels of each side, and every trade"
    starts = np.append(0, np.flatnonzero(events["flags"] & FLAG_LAST) + 1)
    template = np.zeros(1, EVENT)
    template["kind"] = KIND_LEVEL
    out = np.zeros(4 * len(events), EVENT)
    feed = out[: cut(events, starts, every, new_book(), template[0], out)].copy()
    check_events(feed)
    return feed


def frames(feed, of):
    "The same as the venue's JSON, a line a message, with the receive time before it"
    prices, sizes = of.price(feed["price_ticks"]).round(2), of.size(feed["size_lots"]).round(3)
    ends = np.flatnonzero(feed["flags"] & FLAG_LAST) + 1
    for first, stop in zip(np.append(0, ends[:-1]), ends, strict=True):
        row = feed[first]
        pairs = [[f"{prices[i]:.1f}", f"{sizes[i]:g}"] for i in range(first, stop)]
        if row["kind"] == KIND_TRADE:
            data = [{"T": int(row["ts_event"] // 10**6), "s": "BTCUSDT", "p": p, "v": v,
                     "S": "Buy" if row["side"] > 0 else "Sell", "BT": False} for p, v in pairs]  # fmt: skip
            body = {"topic": "publicTrade.BTCUSDT", "type": "snapshot", "data": data}
        else:
            by_side = {"b": [], "a": []}
            for i in range(first, stop):
                if feed["kind"][i] == KIND_LEVEL:
                    by_side["b" if feed["side"][i] > 0 else "a"].append(pairs[i - first])
            data = {
                "s": "BTCUSDT",
                **by_side,
                "u": int(row["sequence"]),
                "seq": int(row["sequence"]),
            }
            body = {"topic": "orderbook.50.BTCUSDT", "type": "delta", "data": data}
        body["ts"] = body["cts"] = int(row["ts_event"] // 10**6)
        yield f"{row['ts_recv']} {json.dumps(body, separators=(',', ':'))}\n".encode()


def gzip_bytes(feed, of):
    "Bytes of the feed as gzipped JSON lines"
    return len(gzip.compress(b"".join(frames(feed, of)), 6))
