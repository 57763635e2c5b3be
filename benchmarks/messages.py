"""Forty-two features at every message: beside pandas and polars on rebuilt books, and beside hftbacktest on raw events.

First all columns of both peers are compared with ours, to one part in a million of each column's size: a benchmark of
things that differ measures nothing. On rebuilt books (twenty levels as columns) each side may use two threads. On raw
events ours keeps the book and writes all features on one core, where hftbacktest only replays the events; both are
measured in processor time there.

    python benchmarks/messages.py [--json] [--seconds 7200] [--rounds 7]
"""

import os
import sys
import time

os.environ.setdefault("POLARS_MAX_THREADS", "2")

import numpy as np
import pandas as pd
from book_replay import Peer, hftbacktest, to_hft
from common import header, options, rate_row, show, take_turns
from numba import njit

try:
    import polars as pl
except ModuleNotFoundError:
    sys.exit("polars is not installed; it comes with: pip install 'tradebook[bench]'")

from tradebook.features.columns import FLOW_MESSAGES, LONG_MESSAGES, MESSAGES, RETURN_MESSAGES
from tradebook.features.messages import book_tops, features_of_tops, message_features
from tradebook.market.events import KIND_LEVEL
from tradebook.market.synthetic import synthetic_market

NAMES = [f.name for f in MESSAGES]


def as_columns(tops):
    "The books the way a data frame has them: one column a level, side and quantity"
    prefixes = ("bp", "bq", "ap", "aq")
    table = {
        f"{name}{k}": tops.levels[:, row, k].astype(float)
        for row, name in enumerate(prefixes)
        for k in range(20)
    }
    return table | {"sv": tops.signed.astype(float), "tv": tops.volume.astype(float)}


def with_pandas(d):
    "What a notebook user writes: column arithmetic and rolling"
    x, mid = {}, (d.bp0 + d.ap0) / 2
    x["mid_ticks"], x["spread_ticks"] = mid, d.ap0 - d.bp0
    x["microprice_offset_ticks"] = (d.bp0 * d.aq0 + d.ap0 * d.bq0) / (d.bq0 + d.aq0) - mid
    for k in (1, 3, 5, 10, 20):
        bid = d[[f"bq{i}" for i in range(k)]].sum(axis=1)
        ask = d[[f"aq{i}" for i in range(k)]].sum(axis=1)
        x[f"imbalance_{k}"] = (bid - ask) / (bid + ask)
        if k in (5, 20):
            x[f"bid_depth_{k}_lots"], x[f"ask_depth_{k}_lots"] = bid, ask
    x["bid_distance_ticks"] = sum(d[f"bq{i}"] * (mid - d[f"bp{i}"]) for i in range(20)) / bid
    x["ask_distance_ticks"] = sum(d[f"aq{i}"] * (d[f"ap{i}"] - mid) for i in range(20)) / ask
    total = 0
    for i in range(10):
        b, q, a, v = d[f"bp{i}"], d[f"bq{i}"], d[f"ap{i}"], d[f"aq{i}"]
        b0, q0, a0, v0 = b.shift(), q.shift(), a.shift(), v.shift()
        push = (b >= b0) * q - (b <= b0) * q0 - (a <= a0) * v + (a >= a0) * v0
        x[f"ofi_level_{i + 1}_lots"] = push.fillna(0.0)
        total = total + push.fillna(0.0)
    for w in FLOW_MESSAGES:
        x[f"ofi_1_{w}m_lots"] = x["ofi_level_1_lots"].rolling(w, min_periods=1).sum()
        x[f"ofi_10_{w}m_lots"] = total.rolling(w, min_periods=1).sum()
    for w in RETURN_MESSAGES:
        x[f"return_{w}m_bps"] = 1e4 * mid.pct_change(w)
    squares = (mid.diff() ** 2).fillna(0.0)
    for w in LONG_MESSAGES:
        x[f"volatility_{w}m_ticks"] = squares.rolling(w, min_periods=1).sum().clip(lower=0) ** 0.5
        x[f"trade_flow_{w}m_lots"] = d.sv.rolling(w, min_periods=1).sum()
    for w in LONG_MESSAGES[:2]:
        x[f"trade_volume_{w}m_lots"] = d.tv.rolling(w, min_periods=1).sum()
    return pd.DataFrame(x)[NAMES]


def polars_steps():
    "The same as three steps of expressions, each using the columns of the one before"
    c, mid = pl.col, (pl.col("bp0") + pl.col("ap0")) / 2
    micro = (c("bp0") * c("aq0") + c("ap0") * c("bq0")) / (c("bq0") + c("aq0")) - mid
    one = {"mid_ticks": mid, "spread_ticks": c("ap0") - c("bp0"), "microprice_offset_ticks": micro}
    for k in (1, 3, 5, 10, 20):
        bid = pl.sum_horizontal([c(f"bq{i}") for i in range(k)])
        ask = pl.sum_horizontal([c(f"aq{i}") for i in range(k)])
        one[f"imbalance_{k}"] = (bid - ask) / (bid + ask)
        if k in (5, 20):
            one |= {f"bid_depth_{k}_lots": bid, f"ask_depth_{k}_lots": ask}
    away = pl.sum_horizontal([c(f"bq{i}") * (mid - c(f"bp{i}")) for i in range(20)])
    one["bid_distance_ticks"] = away / bid
    away = pl.sum_horizontal([c(f"aq{i}") * (c(f"ap{i}") - mid) for i in range(20)])
    one["ask_distance_ticks"] = away / ask

    def where(is_so, value):
        return pl.when(is_so).then(value).otherwise(0.0)

    for i in range(10):
        b, q, a, v = c(f"bp{i}"), c(f"bq{i}"), c(f"ap{i}"), c(f"aq{i}")
        push = where(b >= b.shift(), q) - where(b <= b.shift(), q.shift())
        push = push - where(a <= a.shift(), v) + where(a >= a.shift(), v.shift())
        one[f"ofi_level_{i + 1}_lots"] = push.fill_null(0.0)
    for w in RETURN_MESSAGES:
        one[f"return_{w}m_bps"] = 1e4 * (mid / mid.shift(w) - 1)
    two = {
        "total": pl.sum_horizontal([c(f"ofi_level_{i}_lots") for i in range(1, 11)]),
        "squares": (c("mid_ticks").diff() ** 2).fill_null(0.0),
    }

    def rolled(name, w):
        return c(name).rolling_sum(w, min_samples=1)

    three = {}
    for w in FLOW_MESSAGES:
        three[f"ofi_1_{w}m_lots"] = rolled("ofi_level_1_lots", w)
        three[f"ofi_10_{w}m_lots"] = rolled("total", w)
    for w in LONG_MESSAGES:
        three[f"volatility_{w}m_ticks"] = rolled("squares", w).clip(0).sqrt()
        three[f"trade_flow_{w}m_lots"] = rolled("sv", w)
    for w in LONG_MESSAGES[:2]:
        three[f"trade_volume_{w}m_lots"] = rolled("tv", w)
    return one, two, three


ONE, TWO, THREE = polars_steps()


def with_polars(d):
    "The three steps as one lazy query"
    return (
        d.lazy()
        .with_columns(**ONE)
        .with_columns(**TWO)
        .with_columns(**THREE)
        .select(NAMES)
        .collect()
    )


@njit
def bare_replay(hbt):
    "Let the peer take all messages into its book, and ask nothing; the number of messages"
    n = 0
    while hbt.wait_next_feed(False, 10**18) == 2:
        n += 1
    return n


def on_one_core(work, *args):
    "Seconds of processor time"
    began = time.process_time()
    work(*args)
    return time.process_time() - began


def compare(ours, theirs, who):
    "Stop when a value differs by more than 1e-6 of itself and of its column's typical size"
    for k, name in enumerate(NAMES):
        a, b = ours[:, k].astype(float), np.asarray(theirs[name], float)
        size = np.nanmean(np.abs(b))
        if not np.array_equal(np.isnan(a), np.isnan(b)):
            sys.exit(f"{who}: {name} is missing in other rows")
        if not np.nanmax(np.abs(a - b) / (np.abs(b) + size + 1e-12)) < 1e-6:
            sys.exit(f"{who}: {name} differs; the benchmark compares nothing")


def main():
    "Compare, measure, print"
    args = options(__doc__, seconds=7_200)
    market = synthetic_market(seed=7, duration_s=args.seconds)
    events, tops = market.events, book_tops(market.events)
    columns, n = as_columns(tops), len(tops.ts)
    frame, lazy = pd.DataFrame(columns), pl.DataFrame(columns)
    compare(features_of_tops(tops), with_pandas(frame), "pandas")
    compare(features_of_tops(tops), with_polars(lazy), "polars")
    prices = market.instrument.price(events["price_ticks"][events["kind"] == KIND_LEVEL])
    reach = float(prices.min()) - 100, float(prices.max()) + 100
    data, of = to_hft(events, market.instrument), market.instrument
    peer = Peer(hftbacktest.ROIVectorMarketDepthBacktest, data, of, reach)
    took = take_turns(
        {
            "ours": lambda: features_of_tops(tops),
            "ours, one thread": lambda: features_of_tops(tops, threads=1),
            "pandas": lambda: with_pandas(frame),
            "polars": lambda: with_polars(lazy),
            "fused": lambda: on_one_core(message_features, events),
            "hftbacktest, replay only": lambda: peer.timed(bare_replay),
        },
        args.rounds,
    )
    rows = [
        rate_row("books to 42 features", took, "ours", n, "M rows/s", 15, "pandas"),
        rate_row("books to 42 features", took, "ours", n, "M rows/s", 3.5, "polars"),
        rate_row("the same, one thread", took, "ours, one thread", n, "M rows/s", 3.5, "polars"),
        rate_row("events to 42 features, one core", took, "fused", len(events), "M events/s", 25),
        rate_row(
            "the same, beside a bare replay", took, "fused", len(events), "M events/s", 1,
            "hftbacktest, replay only",
        ),
    ]  # fmt: skip
    facts = {"events": len(events), "messages": n, "columns_compared": len(NAMES), "equal_to": 1e-6}
    show(header("numpy", "numba", "pandas", "polars", "hftbacktest", **facts), rows, args.json)


if __name__ == "__main__":
    main()
