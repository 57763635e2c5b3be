"""Candle columns and columns of two markets: a history against TA-Lib with pandas, one more bar, one more price.

TA-Lib computes 14 of the 19 columns of a frame, pandas the rest. Over a whole history it is faster than ours, which
reads the last 20 bars anew at each one so that no rounding gathers. One more bar is compared with TA-Lib over the
last 300 bars, which is what a live loop has to do with it.
"""

import numpy as np
import pandas as pd
import talib
from common import header, options, rate_row, show, take_turns

from tradebook.features.cross import CrossStream
from tradebook.features.schema import feature_set
from tradebook.features.trend import TrendStream, build_trend
from tradebook.market.candles import CANDLE

BEGIN = 1_735_689_600 * 10**9


def made_candles(n):
    "Half hours of a random walk"
    rng, out = np.random.default_rng(1), np.zeros(n, CANDLE)
    path = 50_000 * np.exp(np.cumsum(1e-3 * rng.standard_normal(8 * n))).reshape(n, 8)
    out["ts_open"] = BEGIN + 1_800 * 10**9 * np.arange(n)
    out["ts_close"] = out["ts_open"] + 1_800 * 10**9
    out["open"], out["close"] = path[:, 0], path[:, -1]
    out["high"], out["low"] = path.max(1), path.min(1)
    return out


def of_library(o, h, lo, c):
    "The columns of one frame by TA-Lib, and by pandas what it does not have"
    macd = talib.EMA(c, 12) - talib.EMA(c, 26)
    upper, middle, lower = talib.BBANDS(c, 20, 2, 2, 0)
    ranges, bodies = np.log(h / lo) ** 2, np.log(c / o) ** 2
    klass = pd.Series(0.5 * ranges - 0.386 * bodies)
    return [
        *(talib.ROCP(c, k) for k in (1, 4, 16)),
        *(c / talib.EMA(c, n) - 1 for n in (8, 21, 55)),
        c / talib.DEMA(c, 21) - 1, c / talib.TEMA(c, 21) - 1, macd / c,
        (macd - np.r_[np.full(25, np.nan), talib.EMA(macd[25:], 9)]) / c,
        talib.RSI(c, 14), talib.ATR(h, lo, c, 14) / c, talib.ADX(h, lo, c, 14),
        talib.PLUS_DI(h, lo, c, 14) - talib.MINUS_DI(h, lo, c, 14),
        (c - middle) / (upper - lower), (upper - lower) / middle,
        pd.Series(np.log(c)).diff().pow(2).rolling(20).mean() ** 0.5,
        pd.Series(ranges).rolling(20).mean() ** 0.5, klass.rolling(20).mean().clip(0) ** 0.5,
    ]  # fmt: skip


def main():
    "Measure and print"
    args = options(__doc__, candles=50_000)
    candles = made_candles(args.candles)
    one = feature_set("trend").only(*(f for f in feature_set("trend").names if "x30m" in f))
    arrays = [np.ascontiguousarray(candles[n]) for n in ("open", "high", "low", "close")]
    short = [a[-300:] for a in arrays]
    stream, at = TrendStream(one), [0]

    def live():
        for _ in range(100):
            at[0] = at[0] + 1 if at[0] + 1 < len(candles) else at[0]
            stream.push(candles[at[0] - 1 : at[0]])

    def library_live():
        for _ in range(100):
            of_library(*short)

    cross, clock = CrossStream(feature_set("lead_lag"), {"own": 9.0, "leader": 9.0}), [BEGIN]

    def beats():
        for _ in range(500):
            clock[0] += 50_000_000
            cross.push("own" if clock[0] // 50_000_000 % 2 else "leader", clock[0], 100.0)

    took = take_turns(
        {
            "ours": lambda: build_trend(candles, one), "talib": lambda: of_library(*arrays),
            "live": live, "talib, 300 bars": library_live, "beats": beats,
        },
        args.rounds,
    )  # fmt: skip
    n = len(candles)
    rows = [
        rate_row("19 columns, history", took, "ours", n, "M bars/s", 0.1, "talib"),
        rate_row("19 columns, one more bar", took, "live", 100, "bars/s", 3, "talib, 300 bars", 1),
        rate_row("two markets, one more price", took, "beats", 500, "prices/s", 2_000, None, 1),
    ]
    show(header("numpy", "numba", "TA-Lib", candles=n), rows, args.json)


if __name__ == "__main__":
    main()
