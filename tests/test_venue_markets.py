"""Instruments through the real ccxt, and the feed of last resort through the real ccxt.pro, against the rehearsal."""

import asyncio
import contextlib
import json
import socket
import threading
import time

import ccxt
import numpy as np
import pytest

from tradebook.base.errors import DataError, VenueError
from tradebook.market.events import (
    FLAG_SNAPSHOT,
    KIND_CLEAR,
    KIND_GAP,
    KIND_LEVEL,
    KIND_TRADE,
    check_events,
)
from tradebook.market.quotes import quotes
from tradebook.venue.last_resort import ccxt_batches
from tradebook.venue.markets import (
    ask_markets,
    cache_path,
    ccxt_class,
    ccxt_settings,
    instrument_of,
    load_instruments,
    read_instruments,
)
from tradebook.venue.rehearsal import Rehearsal
from tradebook.venue.rehearsal_server import in_thread
from tradebook.venue.rehearsal_source import synthetic_listings
from tradebook.venue.rehearsal_streams import Bybit, ccxt_urls

LISTINGS = synthetic_listings(("BTC/USDT:USDT", "ETH/USDT:USDT"), duration_s=300)
SPOT = synthetic_listings(("BTC/USDT",), duration_s=300, seed=11)
WANTED = {one.of.symbol: one.of for one in LISTINGS}
BTC, ETH = WANTED


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch):
    "Any name but this machine's is refused and remembered; the test fails when one was asked for"
    asked, real = [], socket.getaddrinfo

    def guard(host, *args, **kwargs):
        if host not in ("127.0.0.1", "localhost", b"127.0.0.1", None):
            asked.append(host)
            raise OSError(f"looked up {host}")
        return real(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", guard)
    yield
    assert not asked, f"names that are not this machine were looked up: {asked}"


@pytest.fixture(scope="module")
def exchange():
    "One rehearsal of Bybit for all tests of instruments"
    with in_thread(lambda: Bybit([*LISTINGS, *SPOT], warm_s=20, max_s=120)) as server:
        yield server


def test_what_ccxt_tells_is_what_the_exchange_trades(exchange, tmp_path):
    symbols = [BTC, ETH, "BTC/USDT"]
    loaded = load_instruments("bybit", symbols, ccxt_urls(exchange.port), tmp_path)
    assert not loaded.is_cached and not loaded.notes
    for listing in (*LISTINGS, *SPOT):
        ours, theirs = loaded.instruments[listing.of.symbol], listing.of
        for name in ("symbol", "tick_size", "lot_size", "contract_size", "is_inverse"):
            assert getattr(ours, name) == getattr(theirs, name), name
        assert ours.min_notional_quote == theirs.min_notional_quote
        assert ours.min_size_lots == theirs.min_size_lots
    assert loaded.instruments[BTC].can_short and not loaded.instruments["BTC/USDT"].can_short
    known = read_instruments(cache_path(tmp_path, "bybit"))
    assert {s: of for s, (of, _) in known.items()} == loaded.instruments


def test_binance_through_ccxt_too():
    def addresses(urls, http):
        for name, value in urls.items():
            if isinstance(value, dict):
                addresses(value, http)
            elif "fapi" in value:
                urls[name] = f"{http}/fapi/{value.rstrip('/').rsplit('/', 1)[1]}"
            else:
                urls[name] = http

    with in_thread(lambda: Rehearsal("binance", list(LISTINGS), max_s=60)) as exchange:
        client = ccxt_class("binanceusdm")(ccxt_settings([BTC]))
        addresses(client.urls["api"], exchange.http_url)
        markets = ask_markets(client, deadline_s=10)
        for symbol, of in WANTED.items():
            ours = instrument_of(markets[symbol], "binance", client.precisionMode)
            assert (ours.tick_size, ours.lot_size) == (of.tick_size, of.lot_size)


def test_a_venue_that_limits_is_obeyed_and_one_that_limits_too_long_is_left(exchange):
    client = ccxt_class("bybit")(ccxt_settings([BTC], ccxt_urls(exchange.port)))
    waits = []
    exchange.fault("rate_limit", count=2, retry_after_s=0.2)
    assert BTC in ask_markets(client, 20, lambda s: (waits.append(s), time.sleep(s)))
    assert waits == [0.2, 0.2]
    exchange.fault("rate_limit", seconds=30, retry_after_s=600)
    with pytest.raises(VenueError, match="RATE_LIMITED.*asks for 600 s") as told:
        ask_markets(client, 5, waits.append)
    exchange.faults.heal(2**62)
    assert told.value.is_retryable and len(waits) == 2


def test_a_symbol_that_is_not_there_is_named(exchange):
    with pytest.raises(VenueError, match="SYMBOL_UNKNOWN.*did you mean 'BTC/USDT:USDT'"):
        load_instruments("bybit", ["BTC/USDT:USDC"], ccxt_urls(exchange.port))
    with pytest.raises(VenueError, match="VENUE_UNKNOWN"):
        load_instruments("nowhere", [BTC])


def test_memory_serves_when_the_venue_is_gone_and_says_so(exchange, tmp_path, caplog):
    load_instruments("bybit", [BTC], ccxt_urls(exchange.port), tmp_path)
    path = cache_path(tmp_path, "bybit")
    body = json.loads(path.read_text())
    body["instruments"][BTC]["instrument"]["tick_size"] = (
        0.5  # as if the venue had changed it since
    )
    path.write_text(json.dumps(body))
    again = load_instruments("bybit", [BTC], ccxt_urls(exchange.port), tmp_path)
    assert any(n.startswith("GRID_CHANGED") and "0.5" in n for n in again.notes)
    gone = ccxt_urls(1)  # nobody listens there
    loaded = load_instruments("bybit", [BTC], gone, tmp_path, deadline_s=1)
    assert loaded.is_cached and loaded.instruments == again.instruments
    assert "INSTRUMENTS_CACHED" in caplog.text and "VENUE_UNREACHABLE" in caplog.text
    with pytest.raises(VenueError, match="nothing is remembered of"):
        load_instruments("bybit", [ETH], gone, tmp_path, deadline_s=1)
    path.write_text("{ torn")
    with pytest.raises(VenueError, match="was unreadable"):
        load_instruments("bybit", [BTC], gone, tmp_path, deadline_s=1)
    healed = load_instruments("bybit", [BTC], ccxt_urls(exchange.port), tmp_path)
    assert any(n.startswith("CACHE_DAMAGED") for n in healed.notes)
    assert set(read_instruments(path)) == {BTC}


@contextlib.contextmanager
def dripping():
    "A server that answers a byte at a time, for ever"
    server, over = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def drip(peer):
        with contextlib.suppress(OSError):
            peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
            while not over.wait(0.05):
                peer.sendall(b" ")
        peer.close()

    def run():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=drip, args=(server.accept()[0],), daemon=True).start()

    threading.Thread(target=run, daemon=True).start()
    try:
        yield server.getsockname()[1]
    finally:
        over.set()
        server.close()


def test_a_server_that_never_finishes_cannot_hold_us():
    with dripping() as port:
        began = time.monotonic()
        with pytest.raises(VenueError, match="VENUE_UNREACHABLE.*no answer within"):
            load_instruments("bybit", [BTC], ccxt_urls(port), deadline_s=2)
        assert time.monotonic() - began < 20  # bounded; without a bound it would never end


def test_what_an_instrument_cannot_say_is_refused():
    market = {"symbol": "BTC/USD:ETH", "contract": True, "type": "swap", "settle": "ETH",
              "linear": False, "inverse": False, "precision": {"price": 1, "amount": 1}}  # fmt: skip
    with pytest.raises(DataError, match="must be spot, linear or inverse"):
        instrument_of(market, "bybit")
    option = {**market, "linear": True, "option": True}
    with pytest.raises(DataError, match="must be spot, linear or inverse"):
        instrument_of(option, "bybit")
    for mode, price, tick in (
        (ccxt.DECIMAL_PLACES, None, 0.1),
        (ccxt.SIGNIFICANT_DIGITS, 321.5, 100.0),
    ):
        made = instrument_of({**market, "linear": True}, "bybit", mode, price)
        assert (made.tick_size, made.lot_size) == (tick, 0.1)


def watched(faults=(), n_before=40, n_after=200, slow_s=0.0, listings=LISTINGS, **settings):
    "Batches through the real ccxt.pro; the faults begin after so many, the end comes after more"

    async def run():
        batches, n_seen, begun = [], 0, set()
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        usual = {"idle_s": 1.5, "first_wait_s": 0.1, **settings}
        async with Bybit(list(listings), warm_s=100, speed=2, max_s=60) as exchange:
            feed = ccxt_batches("bybit", WANTED, ccxt_urls(exchange.port), **usual)
            async with contextlib.aclosing(feed):
                async for batch in feed:
                    batches.append(batch)
                    if (batch.events["kind"] == KIND_CLEAR).any():
                        begun.add(batch.symbol)
                    n_seen += len(batch.events) > 0 and len(begun) == len(WANTED)
                    if n_seen == n_before and len(batch.events):
                        for fault in faults:
                            exchange.fault(**fault)
                        await asyncio.sleep(slow_s)
                    if n_seen >= n_after:
                        break
        return batches

    batches = asyncio.run(asyncio.wait_for(run(), 40))
    events = {s: np.concatenate([b.events for b in batches if b.symbol == s]) for s in WANTED}
    codes = {s: [w.code for b in batches if b.symbol == s for w in b.told] for s in WANTED}
    for rows in events.values():
        check_events(rows)
        best = quotes(rows)
        both = (best["bid_ticks"] >= 0) & (best["ask_ticks"] >= 0)
        assert (best["bid_ticks"][both] <= best["ask_ticks"][both]).all()
        gaps = np.flatnonzero(rows["kind"] == KIND_GAP)
        for gap in gaps:  # a hole ends what was known: the book begins anew behind it
            book = rows[gap + 1 :]
            book = book[(book["kind"] == KIND_CLEAR) | (book["kind"] == KIND_LEVEL)]
            assert not len(book) or (
                book["kind"][0] == KIND_CLEAR and book["flags"][0] & FLAG_SNAPSHOT
            )
            assert (
                gap == 0
                or rows["ts_recv"][gap] - rows["size_lots"][gap] == rows["ts_recv"][gap - 1]
            )
    return events, codes


def n_gaps(events):
    "Holes in events"
    return int((events["kind"] == KIND_GAP).sum())


def test_a_healthy_feed_gives_books_and_trades_and_warns_that_it_proves_nothing():
    events, codes = watched(n_after=100)
    for symbol in WANTED:
        assert codes[symbol] == ["NOTICE"]
        assert n_gaps(events[symbol]) == 0 and (events[symbol]["kind"] == KIND_CLEAR).sum() == 1
        assert (events[symbol]["sequence"] == 0).all()
        trades = events[symbol][events[symbol]["kind"] == KIND_TRADE]
        assert (
            len(trades) > 3
            and (np.abs(trades["side"]) == 1).all()
            and (trades["ts_event"] > 0).all()
        )


def test_a_silent_symbol_is_named_and_the_other_one_does_not_notice():
    events, codes = watched([{"code": "silence", "symbol": "BTCUSDT", "seconds": 3}], n_after=250)
    assert codes[BTC][:2] == ["NOTICE", "WS_SILENT"] and n_gaps(events[BTC]) == 1
    assert codes[ETH] == ["NOTICE"] and n_gaps(events[ETH]) == 0


def test_a_frame_that_ends_ccxts_loop_ends_one_client_and_crossed_books_are_refused():
    faults = [
        {"code": "malformed", "symbol": "ETHUSDT", "count": 1},
        {"code": "cross_book", "symbol": "BTCUSDT", "count": 3},
    ]
    events, codes = watched(faults, n_after=200)
    assert "WS_SILENT" in codes[ETH] and "CROSSED_BOOK" not in codes[ETH]
    assert n_gaps(events[ETH]) == 1
    assert set(codes[BTC]) == {"NOTICE", "CROSSED_BOOK"} and n_gaps(events[BTC]) >= 1


def test_a_reader_that_is_too_slow_loses_updates_and_is_told():
    events, codes = watched(n_before=20, slow_s=2.0, n_after=80, queue=5)
    assert "BACKPRESSURE" in codes[BTC] + codes[ETH]
    assert n_gaps(events[BTC]) + n_gaps(events[ETH]) >= 1


def test_stopping_ends_a_feed_that_gets_nothing():
    async def run():
        stop = asyncio.Event()
        with dripping() as port:
            asyncio.get_running_loop().call_later(1.0, stop.set)
            feed = ccxt_batches("bybit", WANTED, ccxt_urls(port), stop, timeout_s=5)
            return [batch async for batch in feed]

    batches = asyncio.run(asyncio.wait_for(run(), 20))
    assert [w.code for b in batches for w in b.told] == ["NOTICE", "NOTICE"]


def test_nobody_there_is_told_again_and_again_without_end():
    async def run():
        told, feed = [], ccxt_batches("bybit", {BTC: WANTED[BTC]}, ccxt_urls(1), first_wait_s=0.05)
        async with contextlib.aclosing(feed):
            async for batch in feed:
                told += [w.code for w in batch.told]
                if len(told) == 4:
                    return told

    assert asyncio.run(asyncio.wait_for(run(), 30)) == ["NOTICE", *["CONNECT_FAILED"] * 3]
