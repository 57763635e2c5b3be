"""The scanner and the strict decoder are one: same answers, same state, for real frames and for mutilated ones.

python tests/test_venue_wires_scanner.py 1000000     the long run: that many mutated frames
"""

import gzip
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import orjson
import pytest

from tradebook.market.events import empty_events
from tradebook.market.instruments import Instrument, instrument
from tradebook.venue.binance import BinanceDecoder
from tradebook.venue.fast import DECODERS, fast_decoder, line_spans

BTC = Instrument("bybit", "BTC/USDT:USDT", 0.1, 0.001, 2.0, 5.5)
XRP = Instrument("bybit", "XRP/USDT:USDT", 0.0005, 1.0, 2.0, 5.5)
PIECES = [
    b'"',
    b",",
    b"[",
    b"]",
    b"{",
    b"}",
    b":",
    b".",
    b"-",
    b"e",
    b"0",
    b"1",
    b"9" * 20,
    b"\\",
    b"\n",
]
PIECES += [
    b" ",
    b"\x00",
    b"\xff",
    b"null",
    b"true",
    b"BTCUSDT",
    b'"u":1',
    b"snapshot",
    b'"a":[]',
    b"00",
]
PIECES += [b'[["1","1"]]', b'"seq":3,', b"0.0000001", b"u", b"U", b"pu", b'"s":"BTCUSDT",', b"1e5"]


def same(a, b):
    "Whether two lists of records say the same"
    return len(a) == len(b) and all(
        x._replace(events=None) == y._replace(events=None)
        and x.events.tobytes() == y.events.tobytes()
        for x, y in zip(a, b, strict=True)
    )


def mutate(frame, rng):
    "Damage a frame in one to three places"
    frame = bytearray(frame)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(frame) + 1)
        end = min(len(frame), at + rng.randrange(1, 12))
        how = rng.randrange(8)
        if how == 0 and at < len(frame):
            frame[at] = rng.randrange(256)
        elif how == 1:
            del frame[at:end]
        elif how == 2:
            frame[at:at] = rng.choice(PIECES)
        elif how == 3:
            frame[at:end] = rng.choice(PIECES)
        elif how == 4:
            frame[at:at] = frame[at:end]
        elif how == 5:
            del frame[at:]
        elif how == 6 and at < len(frame) and 48 <= frame[at] <= 57:
            frame[at] = rng.randrange(48, 58)
        elif how == 7:
            parts = bytes(frame).split(b",")
            i, j = rng.randrange(len(parts)), rng.randrange(len(parts))
            parts[i], parts[j] = parts[j], parts[i]
            frame = bytearray(b",".join(parts))
    return bytes(frame)


def bybit_frames(rng):
    "Books and trades of two markets, and a few others, as the venue writes them"
    out, stamp = [], 1_733_011_200_691
    for i in range(60):
        for symbol, tick, digits in (("BTCUSDT", 0.1, 1), ("XRPUSDT", 0.0005, 4)):

            def levels(base, n, tick=tick, digits=digits):
                return [
                    [f"{(base + rng.randrange(9)) * tick:.{digits}f}", str(rng.randrange(4))]
                    for _ in range(n)
                ]

            data = {
                "s": symbol,
                "b": levels(3000, rng.randrange(4)),
                "a": levels(3010, rng.randrange(4)),
            }
            frame = {
                "topic": f"orderbook.50.{symbol}",
                "type": "delta" if i else "snapshot",
                "ts": stamp + i,
            }
            frame |= {"data": data | {"u": 1 + i, "seq": 7 * i}, "cts": stamp + i - 1}
            out.append(frame)
            trade = {"T": stamp + i, "s": symbol, "S": rng.choice(("Buy", "Sell")), "v": "3"}
            trade |= {
                "p": levels(3000, 1)[0][0],
                "L": "PlusTick",
                "i": "20f43950-d8dd",
                "BT": False,
            }
            trade |= {"RPI": True, "seq": i} if i % 2 else {}
            frame = {"topic": f"publicTrade.{symbol}", "type": "snapshot", "ts": stamp + i}
            out.append(frame | {"data": [trade] * rng.randrange(1, 4)})
    ticker = {"symbol": "BTCUSDT", "markPrice": "300.33", "fundingRate": "0.0001"}
    out.append({"topic": "tickers.BTCUSDT", "type": "delta", "ts": stamp, "cs": 1, "data": ticker})
    best = {"s": "BTCUSDT", "b": [["300.1", "1"]], "a": [], "u": 9, "seq": 4}
    out.append({"topic": "orderbook.1.BTCUSDT", "type": "snapshot", "ts": stamp, "data": best})
    return [orjson.dumps(frame) for frame in out]


def binance_frames(rng, market):
    "Changes, trades, aggregates and quotes of one market of the venue, in its order of fields"
    out, last, is_spot = [], 1000, market == "spot"
    symbol, pair = ("BTCUSD_PERP", {"ps": "BTCUSD"}) if market == "coinm" else ("BTCUSDT", {})
    zeros = "000000" if is_spot else ""

    def levels(base, n):
        return [
            [f"{base + rng.randrange(9)}.{rng.randrange(10)}0{zeros}", f"{rng.randrange(4)}"]
            for _ in range(n)
        ]

    def wrap(name, data):
        out.append(
            {"stream": f"{symbol.lower()}@{name}", "data": data} if rng.random() < 0.8 else data
        )

    out.append({"lastUpdateId": last, "bids": levels(60000, 3), "asks": levels(60010, 3)})
    for i in range(60):
        ts, price, size = 1_723_161_255_208 + i, levels(60000, 1)[0][0], str(rng.randrange(1, 9))
        times = {"E": ts} if is_spot else {"E": ts, "T": ts - 1}
        change = {"e": "depthUpdate", **times, "s": symbol, **pair, "U": last + 1, "u": last + 3}
        change |= {} if is_spot else {"pu": last}
        wrap(
            "depth",
            change | {"b": levels(60000, rng.randrange(4)), "a": levels(60010, rng.randrange(4))},
        )
        last += 3
        head, maker = {"e": "trade", **times, "s": symbol}, {"m": rng.random() < 0.5}
        tail = {"T": ts, **maker, "M": True} if is_spot else {"X": "MARKET", **maker}
        wrap("trade", head | {"t": i, "p": price, "q": size} | tail)
        agg = {"e": "aggTrade", "E": ts, "s": symbol, "a": i, "p": price, "q": size, "f": 1, "l": 2}
        wrap("aggTrade", agg | {"T": ts, **maker})
        quote = {"u": last, "s": symbol, **pair, "b": price, "B": size, "a": price, "A": size}
        wrap("bookTicker", quote if is_spot else {"e": "bookTicker", **quote, "T": ts, "E": ts})
    out.append({"result": None, "id": 1})
    return [orjson.dumps(frame) for frame in out]


def cases(rng):
    "Wires with their markets and frames"
    coin = instrument("binance", "BTC/USD:BTC")
    return [
        ("bybit.v5", {"BTCUSDT": BTC, "XRPUSDT": XRP}, bybit_frames(rng)),
        (
            "binance.spot",
            {"BTCUSDT": instrument("binance", "BTC/USDT")},
            binance_frames(rng, "spot"),
        ),
        (
            "binance.usdm",
            {"BTCUSDT": instrument("binance", "BTC/USDT:USDT")},
            binance_frames(rng, "usdm"),
        ),
        ("binance.coinm", {"BTCUSD_PERP": coin}, binance_frames(rng, "coinm")),
    ]


def fuzz(n, seed):
    "Compare both decoders on at least n mutated frames; every book is put in order again after each of them"
    rng, n_mutated, seen, n_scanned = random.Random(seed), 0, Counter(), 0
    while n_mutated < n:
        for wire, markets, frames in cases(rng):
            fast, slow = fast_decoder(wire, markets), DECODERS[wire](markets)
            for i, frame in enumerate(frames):
                ts = 10**18 + i
                before = slow.state.copy()
                for _ in range(4):
                    mutated = mutate(frame, rng)
                    told = slow.decode(mutated, ts)
                    assert same(told, fast.decode(mutated, ts)), (wire, mutated)
                    assert (slow.state == fast.strict.state).all(), (wire, mutated)
                    for one in told:
                        seen[one.code] += 1
                    for decoder in (slow, fast.strict):
                        if isinstance(decoder, BinanceDecoder):
                            for join in decoder.joins.values():
                                join.clear()
                        decoder.state[:] = before
                    n_mutated += 1
                assert same(slow.decode(frame, ts), fast.decode(frame, ts)), (wire, frame)
            assert slow.counts == fast.counts
            n_scanned += fast.n_scanned
    return n_mutated, n_scanned, seen


def test_mutated_frames_are_read_alike_by_both():
    n_mutated, n_scanned, seen = fuzz(8_000, seed=5)
    assert n_mutated >= 8_000 and n_scanned > 1_000
    expected = {
        "",
        "FRAME_MALFORMED",
        "OFF_GRID",
        "UNKNOWN_SYMBOL",
        "UNKNOWN_TOPIC",
        "SEQ_GAP",
        "SEQ_DUP",
    }
    assert expected <= set(seen), seen


def test_every_single_byte_that_is_lost_changed_or_put_in_is_seen_alike():
    "Exhaustive where random damage is thin: each position of one frame of each shape, each byte that JSON is made of"
    for wire, markets, frames in cases(random.Random(2)):
        fast, slow = fast_decoder(wire, markets), DECODERS[wire](markets)
        for decoder in (slow, fast.strict):
            for frame in frames[: 4 if wire == "bybit.v5" else 1]:
                decoder.decode(frame, 1)
        state, shapes = slow.state.copy(), {}
        for frame in frames[4 if wire == "bybit.v5" else 1 : 60]:
            data = orjson.loads(frame).get("data", {})
            n = len(data) if type(data) is list else len(data.get("b", "")) > 1
            shapes.setdefault((frame[:30], frame[:12] == b'{"topic":"pu' and n > 1), frame)
        assert len(shapes) >= 3
        for frame in shapes.values():
            damaged = {frame[:i] + frame[i + 1 :] for i in range(len(frame))}
            for c in b'{}[],:".-e0 \\\n':
                damaged |= {frame[:i] + bytes([c]) + frame[i:] for i in range(len(frame) + 1)}
                damaged |= {frame[:i] + bytes([c]) + frame[i + 1 :] for i in range(len(frame))}
            for one in sorted(damaged):
                assert same(slow.decode(one, 10**18), fast.decode(one, 10**18)), (wire, one)
                assert (slow.state == fast.strict.state).all(), (wire, one)
                for decoder in (slow, fast.strict):
                    decoder.state[:] = state
                    for join in getattr(decoder, "joins", {}).values():
                        join.clear()


@pytest.mark.parametrize("seed", range(3))
def test_a_batch_with_everything_in_it_is_the_sum_of_its_frames(seed):
    rng = random.Random(seed)
    for wire, markets, frames in cases(rng):
        mixed = []
        for frame in frames:
            luck = rng.random()
            mixed += (
                [frame]
                if luck < 0.9
                else [[], [frame] * 2, [mutate(frame, rng)], [b"", frame]][rng.randrange(4)]
            )
        times = np.cumsum([rng.randrange(1, 10**6) for _ in mixed]) + 10**18
        slow, fast = DECODERS[wire](markets), fast_decoder(wire, markets)
        told = [
            (i, d)
            for i, (f, ts) in enumerate(zip(mixed, times.tolist(), strict=True))
            for d in slow.decode(f, ts)
        ]
        rows = {of.symbol: [empty_events(0)] for of in markets.values()}
        for _, one in told:
            if one.symbol:
                rows[one.symbol].append(one.events)
        batch = fast.decode_many(mixed, times)
        assert batch.events.tobytes() == np.concatenate([d.events for _, d in told]).tobytes()
        for symbol, own in batch.by_symbol().items():
            assert own.tobytes() == np.concatenate(rows[symbol]).tobytes()
        strictly = {i for i, _ in batch.told}
        assert all(
            same([d for i, d in told if i == k], [d for i, d in batch.told if i == k])
            for k in strictly
        )
        plain = [i for i in range(len(mixed)) if i not in strictly]
        assert all(d.code == "" for i, d in told if i in set(plain))
        assert [batch.sent[i] for i in plain] == [d.ts_venue for i, d in told if i in set(plain)]
        assert fast.counts == slow.counts and fast.n_scanned == len(plain)
        cut = fast_decoder(wire, markets)  # any cut of the stream gives the same
        parts, i = [], 0
        while i < len(mixed):
            j = i + rng.randrange(1, 9)
            parts.append(cut.decode_many(mixed[i:j], times[i:j]).events)
            i = j
        assert np.concatenate(parts).tobytes() == batch.events.tobytes()


@pytest.mark.recordings
@pytest.mark.parametrize(
    "name", ["spot_btcusdt_20240808", "usdm_ethusdt_20240808", "cm_btcusd_perp_20240808"]
)
def test_real_frames_are_scanned_nearly_all_and_mean_the_same(recordings, name):
    with gzip.open(recordings / "binance" / f"{name}.gz") as file:
        lines = b"".join(file.readlines()[:25_000])
    wire, id, symbol = {
        "spot": ("binance.spot", "BTCUSDT", "BTC/USDT"),
        "usdm": ("binance.usdm", "ETHUSDT", "ETH/USDT:USDT"),
        "cm": ("binance.coinm", "BTCUSD_PERP", "BTC/USD:BTC"),
    }[name.partition("_")[0]]
    markets = {id: instrument("binance", symbol)}
    fast, slow = fast_decoder(wire, markets), DECODERS[wire](markets)
    buffer, spans, wrong = line_spans(lines)
    batch = fast.decode_buffer(buffer, spans)
    told = [d for start, stop, ts in spans.tolist() for d in slow.decode(buffer[start:stop], ts)]
    assert batch.events.tobytes() == np.concatenate([d.events for d in told]).tobytes()
    assert not len(wrong) and fast.n_scanned > 0.998 * len(spans) and fast.counts == slow.counts


def test_frames_are_never_read_beyond_their_end():
    "A frame cut anywhere, with a good one behind it in the buffer, is not completed from its neighbour"
    for wire, markets, frames in cases(random.Random(1)):
        start, good = frames[0], frames[2]
        for cut in range(len(good)):
            fast, slow = fast_decoder(wire, markets), DECODERS[wire](markets)
            batch = fast.decode_many([start, good[:cut], good], [1, 2, 3])
            told = [
                d for i, f in enumerate((start, good[:cut], good)) for d in slow.decode(f, i + 1)
            ]
            assert batch.events.tobytes() == np.concatenate([d.events for d in told]).tobytes(), cut
            assert fast.counts == slow.counts


def test_torn_and_foreign_lines_are_given_by_number():
    lines = b"5 {}\nnot a line\n\n6 {\r\n7"
    buffer, spans, wrong = line_spans(lines)
    assert [(buffer[a:z], ts) for a, z, ts in spans.tolist()] == [(b"{}", 5), (b"{", 6)]
    assert wrong.tolist() == [1, 2, 4]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    n, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    n_mutated, n_scanned, seen = fuzz(n, seed)
    print(
        f"{n_mutated:,} mutated frames, {n_scanned:,} frames scanned, 0 differences; {dict(seen)}"
    )
