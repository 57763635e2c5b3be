"""Triple-barrier labels of a synthetic market, beside the loop over rows that a pandas user writes.

The loop is the one of López de Prado's book (Advances in Financial Machine Learning, 2018, snippet 3.2): for each
row, take the path to its vertical barrier and find the first time it is above or below its level. It is given the
market as a table indexed by time and may slice it. Every row's outcome is compared first.

    python benchmarks/labels.py [--json] [--seconds 3600] [--rounds 5]
"""

import sys

import numpy as np
import pandas as pd
from common import header, options, rate_row, show, take_turns

from tradebook.features.rows import build_features
from tradebook.labels.sides import Costs, side_outcomes
from tradebook.labels.trend import trend_labels
from tradebook.labels.weights import sample_weights
from tradebook.market.quotes import quotes
from tradebook.market.synthetic import synthetic_market

HORIZON_S, PROFIT_BPS, STOP_BPS = 30.0, 6.03, 6.03


def with_pandas(rows, table):
    "Touch and end of a long a row, by a loop over rows"
    bid = pd.Series(table["bid_ticks"].astype(float), pd.to_datetime(table["ts_recv"]))
    times, entries = pd.to_datetime(rows["ts"]), rows["ask_ticks"].astype(float)
    horizon, touched, ends = pd.Timedelta(seconds=HORIZON_S), [], []
    for t0, entry in zip(times, entries, strict=True):
        path = bid.loc[t0 : t0 + horizon]
        path = path[path.index > t0]
        up = path[path >= entry * (1 + PROFIT_BPS / 1e4)].index.min()
        down = path[path <= entry * (1 - STOP_BPS / 1e4)].index.min()
        first = pd.Series({1: up, -1: down}).dropna()
        touched.append(first.idxmin() if len(first) else 0)
        ends.append(first.min() if len(first) else t0 + horizon)
    return np.array(touched), pd.DatetimeIndex(ends).as_unit("ns").astype("int64").to_numpy()


def with_ours(rows, table):
    "The same in one compiled pass"
    costs = Costs(taker_bps=2.0)
    return side_outcomes(rows, table, 1, PROFIT_BPS, STOP_BPS, HORIZON_S, costs, 10_000)


def main():
    "Measure and print"
    args = options(__doc__, seconds=3_600)
    market = synthetic_market(seed=7, duration_s=args.seconds)
    rows, table = build_features(market.events, market.instrument).rows, quotes(market.events)
    inside = rows["status"] <= 1
    inside &= rows["ts"] + round(HORIZON_S * 1e9) < table["ts_recv"][-1]
    rows = rows[inside]
    ours, (touched, ends) = with_ours(rows, table), with_pandas(rows, table)
    same = (ours["touched"] == touched) & (ours["ts_end"] == ends)
    if not (same.all() and ours["is_valid"].all() and (touched != 0).sum() > len(rows) // 20):
        sys.exit(f"{(~same).sum()} rows of {len(rows)} differ; the benchmark compares nothing")
    took = take_turns(
        {
            "ours": lambda: with_ours(rows, table),
            "pandas loop": lambda: with_pandas(rows, table),
            "weights": lambda: sample_weights(ours, table, 0.5),
            "trend": lambda: trend_labels(rows, table, 5.0, HORIZON_S, 4.0, 10_000),
        },
        args.rounds,
    )
    facts = {"rows": len(rows), "quotes": len(table), "compared": len(rows), "rounds": args.rounds}
    n = len(rows)
    results = [
        rate_row("triple barrier", took, "ours", n, "M rows/s", 20.0, "pandas loop"),
        rate_row("trend scan, 20 spans to 30 s", took, "trend", n, "M rows/s", 0.1),
        rate_row("weights by return and age", took, "weights", n, "M rows/s", 0.1),
    ]
    show(header("numpy", "pandas", "numba", **facts), results, args.json)


if __name__ == "__main__":
    main()
