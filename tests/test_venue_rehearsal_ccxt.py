"""The real, unpatched ccxt.pro clients against the rehearsal of Bybit and Binance: only their addresses are set."""

import asyncio
import socket

import ccxt
import ccxt.pro
import pytest

from tradebook.venue.rehearsal import Rehearsal
from tradebook.venue.rehearsal_account import Key
from tradebook.venue.rehearsal_server import in_thread
from tradebook.venue.rehearsal_source import synthetic_listings
from tradebook.venue.rehearsal_streams import Bybit, ccxt_urls

LISTINGS = synthetic_listings(("BTC/USDT:USDT", "ETH/USDT:USDT"), duration_s=300)
SPOT = synthetic_listings(("BTC/USDT",), duration_s=300, seed=11)
BTC = "BTC/USDT:USDT"
KEYS = (Key("rehearsal", "secret"), Key("eye", "secret", is_read_only=True))


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


def settings(port, **more):
    "Settings of a ccxt client; nothing but addresses and credentials"
    types = {"types": ["spot", "linear"]}
    options = {"defaultType": "linear", "fetchMarkets": types, "fetchCurrencies": False}
    usual = {"apiKey": "rehearsal", "secret": "secret", "enableRateLimit": False}
    return {**usual, "urls": ccxt_urls(port), "options": options, **more}


def rehearsed(test, listings=(*LISTINGS, *SPOT), **more):
    "Run an async test against a fresh exchange and a fresh client"

    async def run():
        fields = {"warm_s": 200, "speed": 1, "keys": KEYS, "max_s": 60, **more}
        async with Bybit(list(listings), **fields) as exchange:
            client = ccxt.pro.bybit(settings(exchange.port))
            try:
                await asyncio.wait_for(test(exchange, client), 30)
            finally:
                await client.close()
            assert not exchange.failure

    asyncio.run(run())


def test_markets_time_candles_and_book():
    async def test(exchange, client):
        markets = await client.load_markets()
        assert set(markets) == {"BTC/USDT:USDT", "ETH/USDT:USDT", "BTC/USDT"}
        assert markets[BTC]["precision"] == {
            **markets[BTC]["precision"],
            "price": 0.1,
            "amount": 0.001,
        }
        assert abs(await client.fetch_time() - exchange.now_ms()) < 1000
        candles = await client.fetch_ohlcv(BTC, "1m", limit=3)
        assert len(candles) == 3 and candles[0][0] < candles[-1][0]
        assert all(low <= min(o, c) <= max(o, c) <= high for _, o, high, low, c, _ in candles)
        book = await client.fetch_order_book(BTC, 50)
        assert len(book["bids"]) > 40 and book["bids"][0][0] < book["asks"][0][0]
        trades = await client.fetch_trades(BTC, limit=20)
        assert len(trades) == 20 and {t["side"] for t in trades} <= {"buy", "sell"}
        ticker = await client.fetch_ticker(BTC)
        assert ticker["bid"] < ticker["ask"] and ticker["last"] > 0

    rehearsed(test)


def test_public_streams_of_perpetual_and_spot():
    async def test(exchange, client):
        for _ in range(5):
            book = await client.watch_order_book(BTC, 50)
        assert len(book["bids"]) == 50 and book["bids"][0][0] < book["asks"][0][0]
        spot = await client.watch_order_book("BTC/USDT", 50)
        assert spot["bids"][0][0] != book["bids"][0][0] or spot["bids"] != book["bids"]
        trades = await client.watch_trades(BTC)
        assert trades[0]["symbol"] == BTC and trades[0]["amount"] > 0
        ticker = await client.watch_ticker(BTC)
        assert ticker["bid"] < ticker["ask"]
        candles = await client.watch_ohlcv(BTC, "1m")
        assert candles[-1][2] >= candles[-1][3]

    rehearsed(test, speed=3)


def test_book_over_the_stream_is_the_books_window():
    async def test(exchange, client):
        market = exchange.by_key["linear", "BTCUSDT"]
        await client.watch_order_book(BTC, 50)
        while not exchange.source.is_over:
            await client.watch_order_book(BTC, 50)
            await asyncio.sleep(0)
        await asyncio.sleep(0.3)
        book, (ticks, lots) = client.orderbooks[BTC], market.channels[50].shown[0]
        assert [b[0] for b in book["bids"]] == [round(t * 0.1, 1) for t in ticks]
        assert [b[1] for b in book["bids"]] == [round(n * 0.001, 3) for n in lots]

    rehearsed(test, LISTINGS[:1], warm_s=290, speed=5)


def test_a_limit_order_rests_is_seen_and_is_cancelled():
    async def test(exchange, client):
        await client.load_markets()
        orders = asyncio.ensure_future(client.watch_orders())
        await asyncio.sleep(0.5)
        placed = await client.create_order(
            BTC, "limit", "buy", 0.01, 50_000, {"clientOrderId": "tb-1"}
        )
        seen = (await asyncio.wait_for(orders, 5))[-1]
        assert (seen["id"], seen["status"], seen["clientOrderId"]) == (placed["id"], "open", "tb-1")
        assert [o["id"] for o in await client.fetch_open_orders(BTC)] == [placed["id"]]
        locked = (await client.fetch_balance())["USDT"]["free"]
        assert locked < 100_000
        orders = asyncio.ensure_future(client.watch_orders())
        await asyncio.sleep(0)
        await client.cancel_order(placed["id"], BTC)
        assert (await asyncio.wait_for(orders, 5))[-1]["status"] == "canceled"
        assert await client.fetch_open_orders(BTC) == []
        assert (await client.fetch_balance())["USDT"]["free"] == 100_000

    rehearsed(test)


def test_market_order_gives_fills_position_and_balance():
    async def test(exchange, client):
        await client.load_markets()
        fills = asyncio.ensure_future(client.watch_my_trades())
        assert await client.watch_positions([BTC]) == []  # the snapshot comes first
        positions = asyncio.ensure_future(client.watch_positions([BTC]))
        balance = asyncio.ensure_future(client.watch_balance())
        await asyncio.sleep(0.7)
        await client.create_order(BTC, "market", "buy", 0.02)
        fill = (await asyncio.wait_for(fills, 5))[-1]
        assert fill["side"] == "buy" and fill["fee"]["cost"] > 0 and fill["takerOrMaker"] == "taker"
        held = (await asyncio.wait_for(positions, 5))[-1]
        assert (held["side"], held["contracts"]) == ("long", 0.02)
        assert (await asyncio.wait_for(balance, 5))["USDT"]["total"] < 100_000
        true = (await client.fetch_positions([BTC]))[0]
        mine = await client.fetch_my_trades(BTC)
        assert true["contracts"] == pytest.approx(sum(t["amount"] for t in mine)) == 0.02
        value = sum(t["price"] * t["amount"] for t in mine)
        assert true["entryPrice"] == pytest.approx(value / 0.02)
        await client.create_order(BTC, "market", "sell", 0.02, None, {"reduceOnly": True})
        assert all(not p["contracts"] for p in await client.fetch_positions([BTC]))
        fees = sum(t["fee"]["cost"] for t in await client.fetch_my_trades(BTC))
        gained = exchange.account.positions["BTCUSDT"].realised_quote + fees
        left = (await client.fetch_balance())["USDT"]["total"]
        assert left == pytest.approx(100_000 - fees + gained)

    rehearsed(test)


def test_orders_over_the_trading_socket():
    async def test(exchange, client):
        await client.load_markets()
        placed = await client.create_order_ws(BTC, "limit", "buy", 0.01, 50_000)
        assert exchange.account.orders[placed["id"]].is_open
        await client.edit_order_ws(placed["id"], BTC, "limit", "buy", 0.02, 50_100)
        assert exchange.account.orders[placed["id"]].size_lots == 20
        await client.cancel_order_ws(placed["id"], BTC)
        assert exchange.account.orders[placed["id"]].status == "Cancelled"

    rehearsed(test)


def test_spot_trades_coin_against_coin():
    async def test(exchange, client):
        await client.load_markets()
        await client.create_order("BTC/USDT", "limit", "buy", 0.1, 70_000, {"timeInForce": "IOC"})
        balance = await client.fetch_balance()
        assert balance["BTC"]["total"] == pytest.approx(0.1 * (1 - 2e-4))
        assert balance["USDT"]["total"] < 100_000 - 5_000

    rehearsed(test)


def test_refusals_become_the_right_errors():
    async def test(exchange, client):
        await client.load_markets()
        with pytest.raises(ccxt.InsufficientFunds):
            await client.create_order(BTC, "market", "buy", 500)
        with pytest.raises(ccxt.OrderNotFound):
            await client.cancel_order("nope", BTC)
        with pytest.raises(ccxt.InvalidOrder):
            await client.create_order(BTC, "market", "sell", 1, None, {"reduceOnly": True})
        await client.create_order(BTC, "limit", "buy", 0.01, 50_000, {"clientOrderId": "twin"})
        with pytest.raises(ccxt.InvalidOrder, match="duplicate"):
            await client.create_order(BTC, "limit", "buy", 0.01, 50_000, {"clientOrderId": "twin"})

    rehearsed(test)


@pytest.mark.parametrize(
    ("credentials", "expected"),
    [
        ({"secret": "wrong"}, ccxt.AuthenticationError),
        ({"apiKey": "nobody"}, ccxt.AuthenticationError),
    ],
)
def test_a_bad_signature_is_refused_everywhere(credentials, expected):
    async def test(exchange, client):
        stranger = ccxt.pro.bybit(settings(exchange.port, **credentials))
        try:
            for call in (
                stranger.fetch_balance,
                lambda: stranger.create_order(BTC, "market", "buy", 0.01),
            ):
                with pytest.raises(expected):
                    await call()
            with pytest.raises(expected):
                await asyncio.wait_for(stranger.watch_orders(), 5)
        finally:
            await stranger.close()
        assert not exchange.account.orders

    rehearsed(test)


def test_a_clock_that_is_off_and_a_key_that_may_only_look():
    async def test(exchange, client):
        await client.fetch_balance()
        exchange.fault("clock_skew", value=-10_000)
        with pytest.raises(ccxt.InvalidNonce):
            await client.fetch_balance()
        exchange.faults.heal(2**62)
        client.apiKey = "eye"
        await client.fetch_balance()
        with pytest.raises(ccxt.ExchangeError):
            await client.create_order(BTC, "market", "buy", 0.01)

    rehearsed(test)


def test_the_synchronous_client_works_too():
    with in_thread(lambda: Bybit(LISTINGS[:1], warm_s=100, keys=KEYS, max_s=60)) as exchange:
        client = ccxt.bybit(settings(exchange.port))
        assert len(client.fetch_ohlcv(BTC, "1m")) >= 2
        client.create_order(BTC, "market", "buy", 0.01)
        assert client.fetch_positions([BTC])[0]["contracts"] == 0.01
    with pytest.raises(ccxt.NetworkError):
        client.fetch_time()


def addresses(urls, http, ws):
    "Every address of a client, turned to this machine"
    for name, value in urls.items():
        if isinstance(value, dict):
            addresses(value, http, ws)
        elif "fapi" in value:
            urls[name] = f"{http}/fapi/{value.rstrip('/').rsplit('/', 1)[1]}"
        else:
            urls[name] = f"{ws}/ws" if value.startswith("wss") else http


def test_binance_follows_the_rule_that_ccxt_checks_and_breaks_it_on_command():
    async def run():
        async with Rehearsal("binance", LISTINGS, 3, max_s=60) as exchange:
            options = {"fetchMarkets": {"types": ["linear"]}, "fetchCurrencies": False}
            client = ccxt.pro.binanceusdm({"enableRateLimit": False, "options": options})
            addresses(client.urls["api"], exchange.http_url, exchange.ws_url)
            try:
                await client.load_markets()
                for _ in range(30):
                    book = await asyncio.wait_for(client.watch_order_book(BTC), 5)
                assert book["bids"][0][0] < book["asks"][0][0]
                assert (await asyncio.wait_for(client.watch_trades(BTC), 5))[0]["price"] > 0
                exchange.fault("drop", symbol="BTCUSDT")
                with pytest.raises(ccxt.ChecksumError):
                    for _ in range(30):
                        await asyncio.wait_for(client.watch_order_book(BTC), 5)
            finally:
                await client.close()

    asyncio.run(run())
