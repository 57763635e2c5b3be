"""What a stored message weighs, how fast a file is read back, and the whole path from file to best prices.

The feed is the best fifty levels of the synthetic market after every second message, without trades: some seventeen
changed levels a message, as Bybit's orderbook.50 sends. Beside it: the same as gzipped JSON lines, and hftbacktest's
compressed npz of the same events, read by numpy and read by hftbacktest itself. What comes back is compared first.

A load is measured in three ways: as columns, which our replay takes; as rows of EVENT piece by piece, which a backtest
and a data set take; and as one array of rows. The last waits for fresh memory: 40 bytes a row, cleared by the kernel,
in huge pages. A virtual machine that reports free pages to its host (a balloon with feature bit 5) waits for the host,
too, up to half a second in one run of a hundred. So this row varies most with what else the machine does.
"one core" counts processor time; the other rows are by the clock, with all cores for whoever uses them.

    python benchmarks/storage.py [--json] [--seconds 14400] [--rounds 7]
"""

import sys
import tempfile
import time
from collections import deque
from pathlib import Path

import numpy as np
from book_replay import Peer, check_quotes, hft_quotes, hftbacktest, to_hft
from common import header, options, rate_row, show, take_turns
from feeds import fifty_levels, gzip_bytes
from numba import njit

from tradebook.market.events import FLAG_LAST, KIND_LEVEL, KIND_TRADE
from tradebook.market.part_files import (
    read_columns,
    read_part,
    read_pieces,
    stamps_path,
    write_part,
)
from tradebook.market.quotes import quotes
from tradebook.market.store import Store
from tradebook.market.stored_quotes import stored_quotes
from tradebook.market.synthetic import synthetic_market


@njit
def first_event(hbt):
    "Go to the first event: the file is read for it"
    return hbt.wait_next_feed(False, 10**18)


def spent(clock, work, *args):
    "Seconds of a clock that some work takes"
    began = clock()
    work(*args)
    return clock() - began


def size_row(row, ours, peer, peer_name, goal):
    "A result in bytes a message, where less is better"
    return {
        "row": row, "ours": ours, "peer": peer, "peer_name": peer_name, "unit": "bytes",
        "ratio": peer / ours, "goal": goal, "ok": bool(ours <= goal),
    }  # fmt: skip


def main():
    "Measure and print"
    args = options(__doc__, seconds=14_400)
    market = synthetic_market(seed=7, duration_s=args.seconds)
    of, events = market.instrument, fifty_levels(market.events, every=2)
    events = np.ascontiguousarray(events[events["kind"] != KIND_TRADE])
    n, messages = len(events), int((events["flags"] & FLAG_LAST).sum())
    prices = of.price(events["price_ticks"][events["kind"] == KIND_LEVEL])
    span = (float(prices.min()) - 100, float(prices.max()) + 100)
    room = [np.zeros(n, np.int64), np.zeros((n, 2), np.int64), np.zeros((n, 2))]
    with tempfile.TemporaryDirectory() as folder:
        store, theirs = Store(Path(folder) / "store"), Path(folder) / "data.npz"
        for part in store.write(events, of, "synthetic"):
            ours = store.day(of.venue, of.symbol, part.date) / part.file
        np.savez_compressed(theirs, data=to_hft(events, of))
        peer = Peer(hftbacktest.ROIVectorMarketDepthBacktest, [str(theirs)], of, span)

        def replay():
            "From the npz to the best prices, hftbacktest's own way"
            hbt = peer.open()
            peer.n = hft_quotes(hbt, *room)
            hbt.close()

        def load():
            "From the npz to the first event"
            hbt = peer.open()
            first_event(hbt)
            hbt.close()

        replay()
        if not (read_part(ours) == events).all():
            sys.exit("what was read differs from what was written")
        if not (stored_quotes(store, of.venue, of.symbol) == quotes(events)).all():
            sys.exit("the quotes from the file differ from those from the rows")
        check_quotes(peer, of, room, quotes(events))
        work = {
            "ours": lambda: read_part(ours),
            "ours, columns": lambda: deque(read_columns(ours), maxlen=0),
            "ours, pieces": lambda: deque(read_pieces(ours), maxlen=0),
            "numpy's npz": lambda: np.load(theirs)["data"],
            "hftbacktest's npz": load,
            "ours, quotes": lambda: stored_quotes(store, of.venue, of.symbol),
            "hftbacktest, quotes": replay,
            "ours, write": lambda: write_part(events, Path(folder) / "again.parquet"),
        }
        clocks = {"": time.perf_counter, ", one core": time.process_time}
        cases = {
            name + tag: (lambda f=f, clock=clock: spent(clock, f))
            for name, f in work.items()
            for tag, clock in clocks.items()
        }
        took = take_turns(cases, args.rounds)
        files = {".parquet": (ours, stamps_path(ours)), ".npz": (theirs,)}
        bytes_of = {
            name: sum(path.stat().st_size for path in paths) / messages
            for name, paths in files.items()
        }
    unit, rows = "M rows/s", []
    rows.append(size_row("a message of fifty levels", bytes_of[".parquet"],
                         gzip_bytes(events, of) / messages, "gzip JSON", 45))  # fmt: skip
    rows.append(
        size_row("the same", bytes_of[".parquet"], bytes_of[".npz"], "hftbacktest's npz", 45)
    )
    for tag in clocks:
        for name, what, goal, case in (
            ("load as columns", "hftbacktest's npz", 5.0, "ours, columns"),
            ("load as rows, in pieces", "hftbacktest's npz", 5.0, "ours, pieces"),
            ("load as one array of rows", "hftbacktest's npz", 5.0, "ours"),
            ("load as one array of rows", "numpy's npz", 5.0, "ours"),
            ("file to quotes", "hftbacktest, quotes", 6.0, "ours, quotes"),
        ):
            rows.append(rate_row(name + tag, took, case + tag, n, unit, goal, what + tag))
        rows.append(rate_row(f"write{tag}", took, f"ours, write{tag}", n, unit, 0.0))
    facts = {"events": n, "levels a message": round(n / messages, 1), "rounds": args.rounds}
    show(header("numpy", "numba", "pyarrow", "hftbacktest", **facts), rows, args.json)


if __name__ == "__main__":
    main()
