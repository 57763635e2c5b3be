"""Holding rows against a model's training: a recording at once, row by row, and the loop of a backtest around it.

An hour of the built-in market, 44 columns; the ranges and the health of its first half. Peers: the same ranges checked
with numpy (which knows nothing of health), and the backtest without a watch. The ranges' verdicts are compared before
anything is timed. Medians of the rounds, ratios within each round.
"""

import numpy as np
from common import header, options, rate_row, show, take_turns

from tradebook.backtest.replay import run_backtest
from tradebook.base.settings import load_settings
from tradebook.features.health import range_of
from tradebook.features.rows import build_features
from tradebook.market.synthetic import synthetic_market
from tradebook.policy.rules import rules_from
from tradebook.training.outliers import FARTHEST, OutlierGuard
from tradebook.training.watch import CLOCK, RowWatch


def by_numpy(x, low, high):
    "How far each row lies outside"
    beyond = np.fmax(np.fmax(low - x, x - high), 0.0)
    return np.nan_to_num(np.minimum(beyond / (high - low), FARTHEST)).max(1)


def main():
    given = options(__doc__, seconds=3_600)
    market = synthetic_market(seed=7, duration_s=given.seconds)
    rows = build_features(market.events, market.instrument)
    columns, half = rows.feature_set, len(rows) // 2
    known = OutlierGuard.fit(rows.x[:half], columns.names)
    seen = range_of(rows.x[:half], columns.hash, columns.names)
    low, high = known.low.copy(), known.high.copy()
    low[columns.index(CLOCK)], high[columns.index(CLOCK)] = -np.inf, np.inf

    def whole():
        return RowWatch(columns, known, seen).take(rows)

    def single():
        watch = RowWatch(columns, known, seen)
        for i in range(len(rows)):
            watch.take(rows, i, i + 1).at(0)

    assert np.allclose(whole().verdicts["outside"], by_numpy(rows.x, low, high), rtol=1e-12)
    settings = load_settings(environment={})
    p_up = 0.5 + 0.3 * rows.column("imbalance_5")
    asked = market.events, rows, p_up, 60 * (p_up - 0.5), rules_from(settings, market.instrument)
    money = {"initial_equity_quote": 1e4, "latency_ns": 50_000_000}
    cases = {
        "ours": whole,
        "numpy": lambda: by_numpy(rows.x, low, high),
        "live": single,
        "watched": lambda: run_backtest(*asked, **money, watched=whole()),
        "unwatched": lambda: run_backtest(*asked, **money),
    }
    took, n = take_turns(cases, given.rounds), len(rows)
    found = [
        rate_row("a recording at once", took, "ours", n, "M rows/s", 0.3, "numpy"),
        rate_row("row by row", took, "live", n, "rows/s", 50_000, scale=1),
        rate_row("a backtest with a watch", took, "watched", n, "rows/s", 0.8, "unwatched", 1),
    ]
    show(header("numpy", "numba", rows=n, columns=len(columns)), found, given.json)


if __name__ == "__main__":
    main()
