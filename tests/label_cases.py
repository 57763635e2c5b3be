"""What the tests of labels share: short made markets, and a recorded day of best quotes."""

import numpy as np
import pandas as pd
from hypothesis import strategies as st

from tradebook.base.clock import NS_PER_MS, NS_PER_S
from tradebook.features.kernel import ROW
from tradebook.market.book import BOOK_INVALID, BOOK_LOCKED, BOOK_OK, BOOK_ONE_SIDED
from tradebook.market.quotes import QUOTE


def with_status(quotes):
    "Mark the quotes whose two prices are equal"
    locked = quotes["bid_ticks"] == quotes["ask_ticks"]
    quotes["status"] = np.where(locked, BOOK_LOCKED, BOOK_OK)
    return quotes


def rows_on_grid(quotes, step_ns):
    "Rows every step, each with the book that was known then"
    rows = np.zeros((int(quotes["ts_recv"][-1]) + 3 * step_ns) // step_ns + 1, ROW)
    rows["ts"] = np.arange(len(rows)) * step_ns
    at = np.searchsorted(quotes["ts_recv"], rows["ts"], side="right") - 1
    for name in ("bid_ticks", "ask_ticks", "segment", "status"):
        rows[name] = quotes[name][at]
    rows["ts_book"] = quotes["ts_recv"][at]
    rows["status"][at < 0] = BOOK_INVALID
    return rows


@st.composite
def short_market(draw, n_most=60, break_share=0.05):
    "A short market with pauses, holes, equal times and books without a price; and its generator"
    n = draw(st.integers(1, n_most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    quotes = np.zeros(n, QUOTE)
    shares = [0.1, 0.3, 0.3, 0.2 - break_share, 0.1, break_share]
    pauses = rng.choice([0, 100, 250, 500, 1_000, 3_000], n, p=shares)
    quotes["ts_recv"] = np.cumsum(pauses) * NS_PER_MS
    quotes["segment"] = np.cumsum(rng.uniform(size=n) < break_share)
    quotes["bid_ticks"] = 10_000 + np.cumsum(rng.integers(-3, 4, n))
    quotes["ask_ticks"] = quotes["bid_ticks"] + rng.integers(0, 3, n)
    with_status(quotes)["status"][rng.uniform(size=n) < break_share] = BOOK_ONE_SIDED
    return quotes, rng


def recorded_day(recordings):
    "Best quotes of a whole recorded day, straight from the file"
    names = ["ts_recv", "bid_px_0", "ask_px_0"]
    path = recordings / "standx" / "BTC-USD_book20_2026-01-06.parquet"
    day = pd.read_parquet(path, columns=names).sort_values("ts_recv", kind="stable")
    quotes = np.zeros(len(day), QUOTE)
    quotes["ts_recv"] = day.ts_recv.astype("datetime64[ns]").astype("int64")
    quotes["ts_recv"] -= quotes["ts_recv"][0] // NS_PER_S * NS_PER_S
    quotes["bid_ticks"] = (day.bid_px_0 * 100).round()
    quotes["ask_ticks"] = (day.ask_px_0 * 100).round()
    return with_status(quotes)
