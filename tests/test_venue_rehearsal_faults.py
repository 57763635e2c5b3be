"""Every fault does on the wire what it says: seen by plain sockets and requests, on both wires, and by our decoders."""

import asyncio
import contextlib
import dataclasses
import gzip
import json
import os
import socket
import threading
import time
from itertools import pairwise

import aiohttp
import numpy as np
import pytest

from tradebook.collector.wire_files import read_frames
from tradebook.market.events import (
    KIND_CLEAR,
    KIND_GAP,
    KIND_LEVEL,
    KIND_QUOTE,
    KIND_TRADE,
    message_starts,
)
from tradebook.venue.binance import BinanceUsdmDecoder
from tradebook.venue.bybit import BybitDecoder
from tradebook.venue.rehearsal import Rehearsal, rehearse
from tradebook.venue.rehearsal_faults import KINDS
from tradebook.venue.rehearsal_source import listing, synthetic_listings

LISTINGS = synthetic_listings(duration_s=120)
BTC, ETH = "orderbook.50.BTCUSDT", "orderbook.50.ETHUSDT"
TRADES = "publicTrade.BTCUSDT"


class Client:
    "A socket that keeps every message with its time of receipt"

    def __init__(self, exchange, session, path="/v5/public/linear"):
        self.exchange, self.session, self.path = exchange, session, path
        self.got, self.end = [], None

    async def __aenter__(self):
        url = f"{self.exchange.ws_url}{self.path}"
        self.ws = await self.session.ws_connect(url, autoping=True)
        self.task = asyncio.ensure_future(self.read())
        return self

    async def __aexit__(self, *error):
        self.task.cancel()
        self.ws._response.close()

    async def read(self):
        "Read until the end"
        async for message in self.ws:
            self.got.append((time.time_ns(), message.data))
        self.end = self.ws.close_code

    async def ask(self, op, *topics):
        "Send an operation and give its answer"
        n = len(self.got)
        await self.ws.send_json({"op": op, "req_id": "q", "args": list(topics)})
        for _ in range(400):
            await asyncio.sleep(0.01)
            for _, text in self.got[n:]:
                with contextlib.suppress(ValueError, TypeError):
                    if "success" in json.loads(text):
                        return json.loads(text)
        raise TimeoutError(op)

    def messages(self, topic=None, since=0):
        "Readable messages of a topic"
        rows = []
        for _, text in self.got[since:]:
            with contextlib.suppress(ValueError, TypeError):
                body = json.loads(text)
                if isinstance(body, dict) and "topic" in body and topic in (None, body["topic"]):
                    rows.append(body)
        return rows

    def numbers(self, topic=BTC, since=0):
        "Numbers of the book messages"
        return [m["data"]["u"] for m in self.messages(topic, since)]

    async def wait(self, n, topic=BTC, since=0):
        "Wait until so many messages of a topic have come"
        for _ in range(1000):
            if len(self.messages(topic, since)) >= n:
                return
            await asyncio.sleep(0.01)
        raise TimeoutError(f"{len(self.messages(topic, since))} of {n} messages of {topic}")


def follows(numbers):
    "Steps between consecutive numbers"
    return np.diff(numbers).tolist()


def rehearsed(test, topics=(BTC, ETH, TRADES), venue="bybit", **more):
    "Run a test with an exchange and a client that is subscribed"

    async def run():
        settings = {"speed": 5, "max_s": 40, **more}
        async with (
            Rehearsal(venue, LISTINGS, **settings) as exchange,
            aiohttp.ClientSession() as session,
        ):
            async with Client(exchange, session) as client:
                assert (await client.ask("subscribe", *topics))["success"]
                await asyncio.wait_for(test(exchange, session, client), 30)
            assert not exchange.failure

    asyncio.run(run())


async def command(exchange, session, **body):
    "Give a command over HTTP, as another process would"
    async with session.post(f"{exchange.http_url}/rehearsal/fault", json=body) as answer:
        assert answer.status == 200, await answer.text()
        return await answer.json()


@pytest.mark.parametrize("code", ["drop", "duplicate", "reorder"])
def test_messages_are_lost_doubled_or_swapped(code):
    async def test(exchange, session, client):
        await client.wait(3)
        await command(exchange, session, code=code, symbol="BTCUSDT", count=1)
        await client.wait(len(client.numbers()) + 8)
        steps = follows(client.numbers())
        expected = {"drop": {1, 2}, "duplicate": {0, 1}, "reorder": {1, 2, -1}}[code]
        assert set(steps) == expected
        assert sum(s != 1 for s in steps) == (3 if code == "reorder" else 1)
        assert set(follows(client.numbers(ETH))) == {1}

    rehearsed(test)


@pytest.mark.parametrize("way", ["cut", "text", "binary", "word", "list"])
def test_a_malformed_frame_takes_the_place_of_a_good_one(way):
    async def test(exchange, session, client):
        await client.wait(3)
        await command(exchange, session, code="malformed", symbol="BTCUSDT", way=way)
        await client.wait(len(client.numbers()) + 8)
        decoder = BybitDecoder({"BTCUSDT": LISTINGS[0].of, "ETHUSDT": LISTINGS[1].of})
        found = []
        for ts, text in client.got:
            frame = text if isinstance(text, bytes) else text.encode()
            found += [d for d in decoder.decode(frame, ts) if d.code]
        codes = [d.code for d in found if d.code not in ("SUBSCRIBED", "")]
        assert "FRAME_MALFORMED" in codes
        assert {"SEQ_GAP", "NO_BOOK"} & set(codes)  # what comes after it does not follow

    rehearsed(test)


def test_silence_is_of_one_symbol_and_pings_are_answered():
    async def test(exchange, session, client):
        await client.wait(3)
        await command(exchange, session, code="silence", symbol="BTCUSDT", seconds=0.8)
        await asyncio.sleep(0.1)
        at = len(client.got)
        assert (await client.ask("ping"))["ret_msg"] == "pong"
        await asyncio.sleep(0.5)
        assert not client.messages(BTC, at) and not client.messages(TRADES, at)
        assert client.messages(ETH, at)
        await client.wait(2, BTC, at)
        assert max(follows(client.numbers())) > 1

    rehearsed(test)


@pytest.mark.parametrize("until", ["resubscribe", "reconnect"])
def test_a_silence_that_only_a_step_of_escalation_heals(until):
    async def test(exchange, session, client):
        await client.wait(2)
        await command(exchange, session, code="silence", symbol="BTCUSDT", until=until)
        await asyncio.sleep(0.1)
        at = len(client.got)
        assert (await client.ask("unsubscribe", BTC))["success"]
        assert (await client.ask("subscribe", BTC))["success"]
        await asyncio.sleep(0.4)
        assert bool(client.messages(BTC, at)) == (until == "resubscribe")
        async with Client(exchange, session) as other:
            await other.ask("subscribe", BTC)
            await other.wait(3)
            assert other.messages()[0]["type"] == "snapshot"

    rehearsed(test)


def test_times_stand_while_messages_come():
    async def test(exchange, session, client):
        await client.wait(3)
        await command(exchange, session, code="freeze_timestamps", symbol="BTCUSDT", seconds=0.6)
        at = len(client.got)
        await client.wait(10, BTC, at)
        assert len({m["ts"] for m in client.messages(BTC, at)[1:6]}) == 1
        assert len({m["ts"] for m in client.messages(ETH, at)}) > 1
        assert set(follows(client.numbers())) == {1}

    rehearsed(test)


def test_a_frozen_book_while_trades_go_on_and_the_truth_afterwards():
    async def test(exchange, session, client):
        await client.wait(3)
        await command(exchange, session, code="freeze_book", symbol="BTCUSDT", seconds=1)
        await asyncio.sleep(0.1)
        at = len(client.got)
        await asyncio.sleep(0.7)
        frozen = client.messages(BTC, at)
        assert len(frozen) > 5 and all(m["data"]["b"] == frozen[0]["data"]["b"] for m in frozen)
        assert all(len(m["data"]["b"]) == len(m["data"]["a"]) == 1 for m in frozen)
        assert client.messages(TRADES, at)
        assert any(m["data"]["b"] for m in client.messages(ETH, at))
        await asyncio.sleep(0.8)
        held = {"b": {}, "a": {}}
        for message in client.messages(BTC):
            for side in "ba":
                held[side] = {} if message["type"] == "snapshot" else held[side]
                for price, size in message["data"][side]:
                    held[side].pop(price, None)
                    if size != "0":
                        held[side][price] = size
        assert set(follows(client.numbers())) == {1}
        assert len(held["b"]) == len(held["a"]) == 50
        assert max(map(float, held["b"])) < min(map(float, held["a"]))

    rehearsed(test)


def test_half_open_says_nothing_and_does_not_close():
    async def test(exchange, session, client):
        await client.wait(3)
        await command(exchange, session, code="half_open")
        await asyncio.sleep(0.1)
        at = len(client.got)
        await client.ws.send_json({"op": "ping"})
        await asyncio.sleep(0.5)
        assert len(client.got) == at and client.end is None and not client.task.done()
        async with Client(exchange, session) as other:
            await other.ask("subscribe", BTC)
            await other.wait(3)

    rehearsed(test)


def test_stopping_does_not_wait_for_a_half_open_socket():
    async def run():
        async with aiohttp.ClientSession() as session:
            async with Rehearsal("bybit", LISTINGS, max_s=20) as exchange:
                async with Client(exchange, session) as client:
                    await client.ask("subscribe", BTC)
                    exchange.fault("half_open")
                    began = time.perf_counter()
                    await exchange.stop()
                    assert time.perf_counter() - began < 2

    asyncio.run(run())


@pytest.mark.parametrize(("code", "expected"), [("close", 1000), ("abort", 1006)])
def test_connections_end_cleanly_or_not(code, expected):
    async def test(exchange, session, client):
        await client.wait(2)
        await command(exchange, session, code=code)
        await asyncio.wait_for(client.task, 5)
        assert client.end == expected
        async with Client(exchange, session) as other:
            await other.ask("subscribe", BTC)
            await other.wait(2)

    rehearsed(test)


def test_accepted_and_closed_at_once():
    async def test(exchange, session, client):
        found = await command(exchange, session, code="accept_then_close", seconds=30)
        for _ in range(3):
            async with Client(exchange, session) as other:
                await asyncio.wait_for(other.task, 5)
                assert not other.got
        async with session.get(f"{exchange.http_url}/rehearsal/faults") as answer:
            assert (await answer.json())[found["number"] - 1]["n_touched"] == 3
        await client.wait(3)

    rehearsed(test)


def test_a_refused_subscription_names_the_topic_and_opens_none():
    async def test(exchange, session, client):
        await command(
            exchange, session, code="refuse_subscription", symbol="ETHUSDT", stream="tickers"
        )
        async with Client(exchange, session) as other:
            answer = await other.ask("subscribe", BTC, "tickers.ETHUSDT")
            assert not answer["success"] and "tickers.ETHUSDT" in answer["ret_msg"]
            await asyncio.sleep(0.3)
            assert not other.messages()
            assert (await other.ask("subscribe", BTC))["success"]

    rehearsed(test)


def test_a_late_snapshot_comes_after_deltas():
    async def test(exchange, session, client):
        await command(
            exchange, session, code="late_snapshot", symbol="BTCUSDT", value=400, seconds=20
        )
        async with Client(exchange, session) as other:
            await other.ask("subscribe", BTC)
            await asyncio.sleep(0.8)
            kinds = [m["type"] for m in other.messages(BTC)]
            assert kinds[0] == "delta" and kinds.count("snapshot") == 1
            snapshot = next(m for m in other.messages(BTC) if m["type"] == "snapshot")
            assert snapshot["data"]["u"] < other.numbers()[kinds.index("snapshot") - 1]

    rehearsed(test)


@pytest.mark.parametrize("status", [429, 418])
def test_requests_are_turned_away_with_a_time_to_wait(status):
    async def test(exchange, session, client):
        await command(
            exchange, session, code="rate_limit", value=status, seconds=0.5, retry_after_s=0.5
        )
        url = f"{exchange.http_url}/v5/market/time"
        async with session.get(url) as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (status, "0.5")
        await asyncio.sleep(0.6)
        async with session.get(url) as answer:
            assert answer.status == 200
        await command(exchange, session, code="rate_limit", way="connect", count=1)
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await session.ws_connect(f"{exchange.ws_url}/v5/public/linear")
        assert refused.value.status == 429
        await client.wait(3)

    rehearsed(test)


def test_a_crossed_book_is_shown_and_taken_back():
    async def test(exchange, session, client):
        await client.wait(3)
        await command(exchange, session, code="cross_book", symbol="BTCUSDT", count=3)
        await client.wait(len(client.numbers()) + 10)
        bids, crossed, asks = {}, 0, {}
        for message in client.messages(BTC):
            for side, held in (("b", bids), ("a", asks)):
                for price, size in message["data"][side]:
                    held.pop(float(price), None)
                    if size != "0":
                        held[float(price)] = size
            crossed += max(bids) >= min(asks)
        assert crossed == 3 and max(bids) < min(asks)

    rehearsed(test)


def test_slow_is_late_in_order_and_complete():
    async def test(exchange, session, client):
        await client.wait(3)
        await command(exchange, session, code="slow", value=400, seconds=1)
        at = len(client.got)
        await client.wait(6, BTC, at)
        late = [ts / 1e6 - m["ts"] for (ts, text), m in
                ((row, json.loads(row[1])) for row in client.got[at:]) if m.get("topic") == BTC]  # fmt: skip
        assert max(late) > 380
        await asyncio.sleep(1)
        assert set(follows(client.numbers())) == {1}

    rehearsed(test)


def test_slow_keeps_a_new_subscription_in_order_and_others_on_time():
    "The snapshot comes before its deltas, and the symbol beside it on the same socket is not late"

    async def test(exchange, session, client):
        await command(exchange, session, code="slow", value=1000, seconds=1, symbol="BTCUSDT")
        async with Client(exchange, session) as other:
            await other.ask("subscribe", BTC, ETH)
            await other.wait(10)
            await asyncio.sleep(1.5)  # until after the end of the fault
            kinds = [m["type"] for m in other.messages(BTC)]
            assert kinds[0] == "snapshot" and set(kinds[1:]) == {"delta"}
            assert set(follows(other.numbers())) == {1}
            order = [m["topic"] for m in other.messages()]
            assert order[: order.index(BTC)].count(ETH) > 1  # more than its snapshot

    rehearsed(test)


def test_a_delisted_symbol_is_gone_from_every_door():
    async def test(exchange, session, client):
        async def ask(name, **query):
            query = "&".join(f"{k}={v}" for k, v in {"category": "linear", **query}.items())
            async with session.get(f"{exchange.http_url}/v5/market/{name}?{query}") as answer:
                return await answer.json()

        def listed(answer):
            return {row["symbol"]: row.get("status") for row in answer["result"]["list"]}

        await client.wait(3)
        assert set(listed(await ask("instruments-info"))) == {"BTCUSDT", "ETHUSDT"}
        told = await command(exchange, session, code="delist", symbol="BTCUSDT")
        assert told["is_active"] and told["seconds"] is None and told["count"] is None
        await asyncio.sleep(0.1)
        at = len(client.got)
        await asyncio.sleep(0.4)
        assert not client.messages(BTC, at)
        assert set(listed(await ask("instruments-info"))) == {"ETHUSDT"}
        assert listed(await ask("instruments-info", symbol="BTCUSDT")) == {"BTCUSDT": "Closed"}
        assert set(listed(await ask("tickers"))) == {"ETHUSDT"}
        for name in ("orderbook", "recent-trade", "tickers", "funding/history"):
            answer = await ask(name, symbol="BTCUSDT")
            assert answer["retCode"] == 10001 and "BTCUSDT" in answer["retMsg"], name
        refused = await client.ask("subscribe", BTC)
        assert not refused["success"] and BTC in refused["ret_msg"]
        status, found = exchange.engine.call(
            "create", {"category": "linear", "symbol": "BTCUSDT", "side": "Buy"}, 0
        )[:2]
        assert (status, found) == (110074, "This contract is not live")
        exchange.faults.heal(0)
        await asyncio.sleep(0.1)
        assert (await client.ask("subscribe", BTC))["success"]
        assert set(listed(await ask("instruments-info"))) == {"BTCUSDT", "ETHUSDT"}

    rehearsed(test)


def test_a_burst_is_real_data_ten_times_as_fast():
    async def test(exchange, session, client):
        await asyncio.sleep(0.5)
        at = len(client.got)
        await asyncio.sleep(0.5)
        usual = len(client.messages(BTC, at))
        await command(exchange, session, code="burst", value=10, seconds=0.5)
        at = len(client.got)
        await asyncio.sleep(0.5)
        assert len(client.messages(BTC, at)) > 3 * usual
        await asyncio.sleep(0.2)
        at = len(client.got)
        await asyncio.sleep(0.5)
        assert len(client.messages(BTC, at)) < 3 * usual
        assert set(follows(client.numbers())) == {1}

    rehearsed(test, speed=2)


def test_numbering_begins_again_with_a_snapshot():
    async def test(exchange, session, client):
        await client.wait(3)
        await command(exchange, session, code="restart_numbering", symbol="BTCUSDT")
        await client.wait(len(client.numbers()) + 6)
        kinds = [(m["type"], m["data"]["u"]) for m in client.messages(BTC)]
        at = kinds.index(("snapshot", 1))
        assert [u for _, u in kinds[at:]] == list(range(1, len(kinds) - at + 1))
        assert {kind for kind, _ in kinds[at + 1 :]} == {"delta"}
        assert 1 not in client.numbers(ETH)

    rehearsed(test)


def test_a_skewed_clock_shows_in_messages_and_in_the_time_asked_for():
    async def test(exchange, session, client):
        await command(exchange, session, code="clock_skew", value=5000, seconds=10)
        at = len(client.got)
        await client.wait(3, BTC, at)
        async with session.get(f"{exchange.http_url}/v5/market/time") as answer:
            server = int((await answer.json())["result"]["timeNano"]) // 10**6
        assert 4500 < server - time.time_ns() // 10**6 < 5500
        assert client.messages(BTC, at)[-1]["ts"] - time.time_ns() // 10**6 > 4000

    rehearsed(test)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            {"code": "checksum"},
            "bybit cannot have the fault checksum: its messages carry no checksum",
        ),
        ({"code": "drop", "symbol": "BTCUSD"}, "was 'BTCUSD'; did you mean 'BTCUSDT'?"),
        ({"code": "malformed", "way": "cat"}, "way of malformed must be of"),
    ],
)
def test_a_fault_that_could_not_happen_is_refused_and_nothing_is_broken(body, words):
    async def test(exchange, session, client):
        async with session.post(f"{exchange.http_url}/rehearsal/fault", json=body) as answer:
            assert answer.status == 400 and words in (await answer.json())["error"]
        await client.wait(len(client.numbers()) + 5)
        assert set(follows(client.numbers())) == {1} and not exchange.faults.all

    rehearsed(test)


def test_every_kind_of_fault_is_tried_here():
    text = open(__file__).read()
    untested = [code for code in KINDS if f'"{code}"' not in text]
    assert not untested


def test_an_order_whose_answer_is_lost_is_in_all_the_same():
    import ccxt.pro
    from test_venue_rehearsal_ccxt import settings

    async def test(exchange, session, client):
        trader = ccxt.pro.bybit(settings(exchange.port))
        try:
            await trader.load_markets()
            await command(exchange, session, code="lose_reply")
            with pytest.raises(ccxt.NetworkError):
                await trader.create_order(
                    "BTC/USDT:USDT", "limit", "buy", 0.01, 50_000, {"clientOrderId": "tb-7"}
                )
            found = await trader.fetch_open_orders("BTC/USDT:USDT")
            assert [o["clientOrderId"] for o in found] == ["tb-7"]
        finally:
            await trader.close()

    rehearsed(test)


def decoded(decoder, frames):
    "Events of the frames of one decoder, and what it complained of"
    rows, codes = [], []
    for ts, frame in frames:
        for d in decoder.decode(frame, ts):
            rows.append(d.events)
            codes += [d.code] if d.code and d.code != "SUBSCRIBED" else []
    return np.concatenate(rows), codes


def facts(events, kinds):
    "What must survive the wire: time (ms), kind, side, price and size of each row, message by message"
    rows = events[np.isin(events["kind"], kinds)]
    ms = rows["ts_event"] // 10**6
    names = ("kind", "side", "price_ticks", "size_lots")
    table = list(zip(ms.tolist(), *(rows[n].tolist() for n in names), strict=True))
    return sorted(table)


def test_healthy_bybit_gives_back_the_source_event_for_event():
    async def run():
        topics = ["orderbook.500.BTCUSDT", "publicTrade.BTCUSDT"]
        settings = {"speed": "max", "wait_topics": 2, "max_s": 60}
        async with (
            Rehearsal("bybit", LISTINGS[:1], **settings) as exchange,
            aiohttp.ClientSession() as session,
        ):
            async with Client(exchange, session) as client:
                await client.ask("subscribe", *topics)
                while not exchange.source.is_over:
                    await asyncio.sleep(0.05)
                await asyncio.sleep(0.5)
                return [(ts, text.encode()) for ts, text in client.got]

    frames = asyncio.run(run())
    events, codes = decoded(BybitDecoder({"BTCUSDT": LISTINGS[0].of}), frames)
    assert not codes and not (events["kind"] == KIND_GAP).any()
    first = facts(events, [KIND_CLEAR, KIND_LEVEL, KIND_TRADE])
    true = facts(LISTINGS[0].events, [KIND_CLEAR, KIND_LEVEL, KIND_TRADE])
    assert first == true


@pytest.mark.recordings
def test_recorded_usdm_frames_are_said_again_as_they_were(recordings):
    path = recordings / "binance/usdm_ethusdt_20240808.gz"
    imported = read_frames(path)
    events = imported.events
    events = events[events["ts_recv"] < events["ts_recv"][0] + 20 * 10**9]
    market = listing(events, dataclasses.replace(imported.instrument))

    async def run():
        settings = {"speed": "max", "wait_topics": 3, "max_s": 60}
        path = "/stream?streams=ethusdt@depth@0ms/ethusdt@trade/ethusdt@bookTicker"
        async with (
            Rehearsal("binance", [market], **settings) as exchange,
            aiohttp.ClientSession() as session,
        ):
            async with Client(exchange, session, path) as client:
                depth = {"symbol": "ETHUSDT", "limit": 1000}
                async with session.get(
                    f"{exchange.http_url}/fapi/v1/depth", params=depth
                ) as answer:
                    snapshot = await answer.read()
                while not exchange.source.is_over:
                    await asyncio.sleep(0.05)
                await asyncio.sleep(0.5)
                return snapshot, [(ts, text.encode()) for ts, text in client.got]

    snapshot, frames = asyncio.run(run())
    raw = [json.loads(f)["data"] for _, f in frames]
    changes = [d for d in raw if d["e"] == "depthUpdate"]
    said = {d["u"]: (d["pu"], d["b"], d["a"]) for d in changes}
    recorded = {}
    with gzip.open(path) as file:
        for line in file:
            body = json.loads(line.partition(b" ")[2])
            d = body.get("data", {})
            if d.get("e") == "depthUpdate":
                recorded[d["u"]] = (d["pu"], d["b"], d["a"])
    common = sorted(set(said) & set(recorded))
    assert len(common) > 300

    def grid(levels):
        return sorted((float(p), float(v)) for p, v in levels)

    for u in common[1:]:
        pu = recorded[u][0]
        while pu in recorded and not recorded[pu][1] + recorded[pu][2]:
            pu = recorded[pu][0]  # a change of nothing is no event, and so is not said again
        assert said[u][0] == pu
        assert [grid(x) for x in said[u][1:]] == [grid(x) for x in recorded[u][1:]]
    decoder = BinanceUsdmDecoder({"ETHUSDT": market.of})
    decoder.decode(frames[0][1], frames[0][0])
    decoder.reset()
    rows, codes = [], []
    for d in decoder.snapshot("ETHUSDT", snapshot, frames[0][0]):
        rows.append(d.events)
    more, codes = decoded(decoder, frames)
    assert "SEQ_GAP" not in codes
    kinds = [KIND_TRADE, KIND_QUOTE]
    later = events[
        message_starts(events)[1] :
    ]  # the first message happened before the doors opened
    assert facts(more, kinds) == facts(later, kinds)


def test_binance_snapshot_late_and_fault_by_its_own_stream_names():
    async def run():
        async with (
            Rehearsal("binance", LISTINGS, speed=5, max_s=30) as exchange,
            aiohttp.ClientSession() as session,
        ):
            async with Client(exchange, session, "/ws/btcusdt@depth@100ms/ethusdt@depth") as client:
                await command(exchange, session, code="late_snapshot", value=500, symbol="BTCUSDT")
                began = time.perf_counter()
                async with session.get(
                    f"{exchange.http_url}/fapi/v1/depth?symbol=BTCUSDT"
                ) as answer:
                    snapshot = await answer.json()
                assert time.perf_counter() - began > 0.45
                bodies = [json.loads(text) for _, text in client.got]
                btc = [b for b in bodies if b["s"] == "BTCUSDT"]
                assert btc[-1]["u"] > snapshot["lastUpdateId"]
                await command(exchange, session, code="drop", symbol="BTCUSDT")
                await asyncio.sleep(0.5)
                bodies = [json.loads(text) for _, text in client.got]
                broken = {}
                for s in ("BTCUSDT", "ETHUSDT"):
                    rows = [b for b in bodies if b["s"] == s]
                    broken[s] = sum(y["pu"] != x["u"] for x, y in pairwise(rows))
                assert broken == {"BTCUSDT": 1, "ETHUSDT": 0}

    asyncio.run(run())


def test_rehearse_runs_in_another_thread_and_ends_by_command():
    told = threading.Event()
    box = {}

    def tell(status):
        box.update(status)
        told.set()

    def run():
        box["result"] = rehearse(
            "bybit", LISTINGS, "5x", ("drop:BTCUSDT@0.1",), port=0, max_s=20, tell=tell
        )

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert told.wait(20)

    async def stop():
        async with aiohttp.ClientSession() as session:
            await asyncio.sleep(0.3)
            async with session.post(f"http://127.0.0.1:{box['port']}/rehearsal/stop") as answer:
                assert answer.status == 200

    asyncio.run(stop())
    thread.join(5)
    assert not thread.is_alive()
    assert [f["code"] for f in box["result"]["faults"]] == ["drop"]


@pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="needs Linux to list sockets")
def test_only_loopback_is_bound():
    async def run():
        async with Rehearsal("bybit", LISTINGS[:1], max_s=20) as exchange:
            assert exchange.runner.addresses == [("127.0.0.1", exchange.port)]
            with socket.socket() as other:
                other.settimeout(0.3)
                host = socket.gethostbyname(socket.gethostname())
                if not host.startswith("127."):
                    assert other.connect_ex((host, exchange.port)) != 0

    asyncio.run(run())
