"""Real captures of six wires, and a slow second reading of each that shares no code with the decoders."""

import functools
from dataclasses import dataclass
from decimal import Decimal
from importlib import import_module
from pathlib import Path

import orjson

from tradebook.venue.captures import read_capture, recorded_instruments

FEEDS = {
    "kraken": ("kraken", "KRAKEN", ("ws.48.0", "ws.49.0", "ws.50.0"), "kraken:KrakenDecoder"),
    "krakenfutures": (
        "krakenfutures",
        "KRAKEN_FUTURES",
        ("ws.1.0",),
        "kraken_futures:KrakenFuturesDecoder",
    ),
    "coinbase": ("coinbase", "COINBASE", ("ws.28.0",), "coinbase:CoinbaseDecoder"),
    "okx": ("okx", "OKX", ("ws.1.0",), "okx:OkxDecoder"),
    "kucoin": ("kucoin", "KUCOIN", ("ws.1.0", "http.0.0"), "kucoin:KucoinDecoder"),
    "bybit_v2": ("bybit", "BYBIT", ("ws.25.0", "ws.26.0"), "bybit_v2:BybitV2Decoder"),
}


@dataclass(frozen=True)
class Item:
    "One frame or REST answer, and what the second reading says of it"

    ts: int
    frame: bytes
    rest: str = ""  # Market of a REST answer
    id: str = ""  # Market of a book message
    is_snapshot: bool = False
    levels: tuple = ()  # (0 bid or 1 ask, price, size) as Decimals
    number: int = 0


def _levels(*sides):
    "Decimals of levels, bids and then asks"
    return tuple(
        (k, Decimal(str(x[0])), Decimal(str(x[1]))) for k, rows in enumerate(sides) for x in rows
    )


def _read_kraken(d):
    if type(d) is not list or not d[-2].startswith("book"):
        return None
    if "as" in d[1]:
        return d[-1], True, _levels(d[1]["bs"], d[1]["as"]), 0
    sides = [[row for part in d[1:-2] for row in part.get(k, ())] for k in "ba"]
    return d[-1], False, _levels(*sides), 0


def _read_krakenfutures(d):
    if d.get("feed") == "book_snapshot":
        sides = [[(x["price"], x["qty"]) for x in d[k]] for k in ("bids", "asks")]
        return d["product_id"], True, _levels(*sides), d["seq"]
    if d.get("feed") == "book" and "seq" in d:
        one = [(d["price"], d["qty"])]
        return (
            d["product_id"],
            False,
            _levels(*((one, ()) if d["side"] == "buy" else ((), one))),
            d["seq"],
        )
    return None


def _read_coinbase(d):
    if d["type"] == "snapshot":
        return d["product_id"], True, _levels(d["bids"], d["asks"]), 0
    if d["type"] == "l2update":
        sides = [[c[1:] for c in d["changes"] if c[0] == side] for side in ("buy", "sell")]
        return d["product_id"], False, _levels(*sides), 0
    return None


def _read_okx(d):
    if d.get("arg", {}).get("channel") != "books" or "data" not in d:
        return None
    (x,) = d["data"]
    return d["arg"]["instId"], d["action"] == "snapshot", _levels(x["bids"], x["asks"]), 0


def _read_kucoin(d):
    if d.get("subject") != "trade.l2update":
        return None
    x = d["data"]
    sides = [[c for c in x["changes"][k] if float(c[0])] for k in ("bids", "asks")]
    return x["symbol"], False, _levels(*sides), x["sequenceEnd"]


def _read_bybit_v2(d):
    if not d.get("topic", "").startswith("orderBook"):
        return None
    id, data = d["topic"].rpartition(".")[2], d["data"]
    if d["type"] == "snapshot":
        rows = data["order_book"] if type(data) is dict else data
    else:
        rows = [x | {"size": 0} for x in data["delete"]] + data["update"] + data["insert"]
    sides = [[(x["price"], x["size"]) for x in rows if x["side"] == s] for s in ("Buy", "Sell")]
    return id, d["type"] == "snapshot", _levels(*sides), int(d["cross_seq"])


_READERS = {name: globals()[f"_read_{name}"] for name in FEEDS}


@functools.cache
def load(name: str, folder: Path):
    "Items of a capture in order of time, and the instruments of its markets"
    venue, stem, parts, _ = FEEDS[name]
    listed = recorded_instruments(venue, folder / f"{stem}.0")
    items = []
    for one in read_capture(*(folder / f"{stem}.{part}" for part in parts)):
        if one.direction == "rest":
            data, id = orjson.loads(one.frame)["data"], one.url.partition("symbol=")[2]
            sides = _levels(data["bids"], data["asks"])
            number = int(data["sequence"])
            items.append(Item(one.ts_recv, one.frame, id, id, True, sides, number))
        elif one.direction == "received":
            found = _READERS[name](orjson.loads(one.frame))
            items.append(Item(one.ts_recv, one.frame, "", *(found or ())))
    ids = sorted({item.id for item in items if item.id and item.is_snapshot})
    return items, {id: listed[id] for id in ids}


def make(name: str, instruments):
    "A decoder of a wire"
    module, _, class_name = FEEDS[name][3].partition(":")
    return getattr(import_module(f"tradebook.venue.{module}"), class_name)(instruments)


def feed(decoder, item: Item):
    "Give one item to a decoder"
    if item.rest:
        return decoder.snapshot(item.rest, item.frame, item.ts)
    return decoder.decode(item.frame, item.ts)


class Reference:
    "Books as dictionaries of decimals"

    def __init__(self):
        self.books, self.numbers = {}, {}

    def apply(self, item: Item):
        "Apply what the second reading says; REST books need the changes after them only"
        if item.is_snapshot and not (item.rest and item.id in self.books):
            self.books[item.id], self.numbers[item.id] = ({}, {}), item.number
        elif (
            item.rest
            or item.id not in self.books
            or (item.number and item.number <= self.numbers[item.id])
        ):
            return False
        self.numbers[item.id] = item.number
        for side, price, size in item.levels:
            if size:
                self.books[item.id][side][price] = size
            else:
                self.books[item.id][side].pop(price, None)
        return True

    def top(self, id: str, side: int, n: int):
        "Best levels of a side"
        best = sorted(self.books[id][side], reverse=side == 0)[:n]
        return [(price, self.books[id][side][price]) for price in best]
