"""Raw Bybit and Binance frames to events beside orjson to columns, the usual Python way.

The peer parses with orjson, turns texts into floats and appends to columns, which become arrays; it checks no sequence
and keeps one market only. Ours gives EVENT rows in ticks and lots, with the numbering of every book judged. The first
frames are also read by the strict decoder, and must give the same bytes. Measured is the stream: the snapshot that a
book begins with is taken beforehand, since the peer makes no rows of it.

    python benchmarks/frames.py [--json] [--minutes 60] [--rounds 7] [--recordings FOLDER]
"""

import gzip
import statistics
import sys
from pathlib import Path

import numpy as np
import orjson
from common import header, options, rate_row, show, take_turns

from tradebook.market.events import KIND_CLEAR, KIND_LEVEL, KIND_TRADE, message_starts
from tradebook.market.instruments import instrument
from tradebook.market.synthetic import synthetic_market
from tradebook.venue.fast import DECODERS, fast_decoder, line_spans

GOAL, MS = 15.0, 10**6


def level_texts(events, of):
    "Price and size of every row as the venue writes them"
    prices, sizes = of.price(events["price_ticks"]), of.size(events["size_lots"])
    pairs = zip(prices.tolist(), sizes.tolist(), strict=True)
    return [[f"{price:.1f}", f"{size:.3f}"] for price, size in pairs]


def bybit_frames(events, of):
    "The frames a Bybit socket would have sent for these events"
    frames, times, u, texts = [], [], 0, level_texts(events, of)
    starts = message_starts(events)
    for start, rows in zip(starts.tolist(), np.split(events, starts[1:]), strict=True):
        kind, ts = rows["kind"][-1], int(rows["ts_event"][-1]) // MS
        if kind == KIND_LEVEL:
            u += 1
            is_first = rows["kind"][0] == KIND_CLEAR
            b, a = [], []
            kinds, sides = rows["kind"].tolist(), rows["side"].tolist()
            for i, (k, side) in enumerate(zip(kinds, sides, strict=True)):
                if k == KIND_LEVEL:
                    (b if side > 0 else a).append(texts[start + i])
            data = {"s": "BTCUSDT", "b": b, "a": a, "u": u, "seq": 60_000_000_000 + 17 * u}
            frame = {"topic": "orderbook.50.BTCUSDT", "type": "snapshot" if is_first else "delta"}
            frame |= {"ts": ts, "data": data, "cts": ts - 2}
        elif kind == KIND_TRADE:
            data = [
                {
                    "T": ts, "s": "BTCUSDT", "S": "Buy" if e["side"] > 0 else "Sell", "v": size, "p": price,
                    "L": "PlusTick", "i": "20f43950-d8dd-5b31-9112-a178eb6023af", "BT": False, "RPI": False,
                }
                for e, (price, size) in zip(rows, texts[start : start + len(rows)], strict=True)
            ]  # fmt: skip
            frame = {"topic": "publicTrade.BTCUSDT", "type": "snapshot", "ts": ts, "data": data}
        else:
            continue
        frames.append(orjson.dumps(frame))
        times.append(int(rows["ts_recv"][-1]))
    return frames, times


def bybit_columns(frames, times):
    "Bybit frames to columns with orjson"
    when, kind, sent, price, size = [], [], [], [], []
    for frame, ts in zip(frames, times, strict=True):
        content = orjson.loads(frame)
        data = content["data"]
        if content["topic"].startswith("orderbook"):
            cts = content["cts"]
            for side, levels in ((0, data["b"]), (1, data["a"])):
                for p, q in levels:
                    when.append(ts)
                    kind.append(side)
                    sent.append(cts)
                    price.append(float(p))
                    size.append(float(q))
        else:
            for t in data:
                when.append(ts)
                kind.append(2 if t["S"] == "Buy" else 3)
                sent.append(t["T"])
                price.append(float(t["p"]))
                size.append(float(t["v"]))
    return as_columns(when, kind, sent, price, size)


def binance_columns(frames, times):
    "Binance frames to columns with orjson"
    when, kind, sent, price, size = [], [], [], [], []

    def add(ts, k, t, p, q):
        when.append(ts)
        kind.append(k)
        sent.append(t)
        price.append(float(p))
        size.append(float(q))

    for frame, ts in zip(frames, times, strict=True):
        d = orjson.loads(frame)
        d = d.get("data", d)
        e = d.get("e", "bookTicker")
        if e == "depthUpdate":
            t = d["E"]
            for side, levels in ((0, d["b"]), (1, d["a"])):
                for p, q in levels:
                    when.append(ts)
                    kind.append(side)
                    sent.append(t)
                    price.append(float(p))
                    size.append(float(q))
        elif e == "trade":
            add(ts, 3 if d["m"] else 2, d["T"], d["p"], d["q"])
        elif "A" in d:
            t = d.get("T", 0)
            add(ts, 4, t, d["b"], d["B"])
            add(ts, 5, t, d["a"], d["A"])
    return as_columns(when, kind, sent, price, size)


def as_columns(when, kind, sent, price, size):
    "Lists to arrays"
    return (
        np.array(when, np.int64), np.array(kind, np.uint8), np.array(sent, np.int64), np.array(price), np.array(size),
    )  # fmt: skip


def same_as_strict(wire, markets, frames, times, n=20_000):
    "Stop unless the strict decoder gives the same bytes for the first frames"
    strict = DECODERS[wire](markets)
    slow = [
        d.events for f, t in zip(frames[:n], times[:n], strict=True) for d in strict.decode(f, t)
    ]
    fast = fast_decoder(wire, markets)
    if fast.decode_many(frames[:n], times[:n]).events.tobytes() != np.concatenate(slow).tobytes():
        sys.exit(f"{wire}: scanner and strict decoder differ; the benchmark measures nothing")
    return fast.n_scanned / min(n, len(frames))


def join_first(wire, markets, frames, times):
    "Decode up to the first frame after the snapshot; gives its number and the books' state"
    decoder = DECODERS[wire](markets)
    for i, (frame, ts) in enumerate(zip(frames, times, strict=True)):
        if i and all(line.is_alive for line in decoder.lines.values()):
            return i, decoder.state.copy()
        decoder.decode(frame, ts)
    sys.exit(f"{wire}: no book begins in these frames; there is nothing to measure")


def measure(name, wire, markets, frames, times, columns, rounds):
    "Rows of one feed, from the first frame after the snapshot"
    scanned = same_as_strict(wire, markets, frames, times)
    first, state = join_first(wire, markets, frames, times)
    frames, times = frames[first:], times[first:]
    lines = b"".join(b"%d %s\n" % (t, f) for f, t in zip(frames, times, strict=True))
    (buffer, spans, _), stamps = line_spans(lines), np.array(times)
    n_rows, n_bytes = len(columns(frames, times)[0]), sum(map(len, frames))

    def joined():
        "A decoder whose books are as they were at the first frame"
        decoder = fast_decoder(wire, markets)
        decoder.strict.state[:] = state
        return decoder

    def in_batches(n=500):
        "As a collector does it: what has come since the last look"
        fast = joined()
        for i in range(0, len(frames), n):
            fast.decode_many(frames[i : i + n], stamps[i : i + n])

    def one_by_one():
        "A record for every frame"
        decode = joined().decode
        for frame, ts in zip(frames, times, strict=True):
            decode(frame, ts)

    if len(joined().decode_buffer(buffer, spans).events) != n_rows:
        sys.exit(f"{name}: both must give the same number of rows; the benchmark measures nothing")
    peer = f"orjson {orjson.__version__}"
    took = take_turns(
        {
            "ours": lambda: joined().decode_buffer(buffer, spans),
            "batch": in_batches,
            "one": one_by_one,
            peer: lambda: columns(frames, times),
        },
        rounds,
    )
    speed = statistics.median(n_bytes / 1e6 / s for s in took["ours"])
    print(f"{name}: {len(frames):,} frames, {n_bytes / len(frames):.0f} bytes each, {n_rows:,} rows, "
          f"{scanned:.2%} scanned, {speed:.0f} MB/s", file=sys.stderr)  # fmt: skip
    args = len(frames), "M frames/s"
    return [
        rate_row(f"{name}, from a buffer", took, "ours", *args, GOAL, peer),
        rate_row(f"{name}, in batches of 500", took, "batch", *args, 5.0, peer),
        rate_row(f"{name}, one at a time", took, "one", *args, 0.05),
    ]


def main():
    "Measure and print"
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    args = options(__doc__, minutes=60, recordings=str(beside))
    market = synthetic_market(seed=7, duration_s=args.minutes * 60)
    of = market.instrument
    frames, times = bybit_frames(market.events, of)
    rows = measure(
        "Bybit synthetic", "bybit.v5", {"BTCUSDT": of}, frames, times, bybit_columns, args.rounds
    )
    for name, wire, symbol, file in (
        ("Binance USD-M", "binance.usdm", "BTC/USDT:USDT", "usdm_btcusdt_*.gz"),
        ("Binance spot", "binance.spot", "BTC/USDT", "spot_btcusdt_*.gz"),
    ):
        if paths := sorted((Path(args.recordings) / "binance").glob(file)):
            lines = [line.rstrip().partition(b" ") for path in paths for line in gzip.open(path)]
            frames, times = [line[2] for line in lines], [int(line[0]) for line in lines]
            markets = {"BTCUSDT": instrument("binance", symbol)}
            rows += measure(name, wire, markets, frames, times, binance_columns, args.rounds)
    show(header("orjson", "numba", "numpy", rounds=args.rounds), rows, args.json)


if __name__ == "__main__":
    main()
