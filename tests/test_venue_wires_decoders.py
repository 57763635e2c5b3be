"""Bybit and Binance decoders on real frames: the venue's own quotes agree, and every lost message is seen."""

import gzip
import random
import zipfile

import numpy as np
import orjson
import pytest

from tradebook.collector.wire_files import read_frames
from tradebook.market.events import (
    FUNDING_UNITS,
    KIND_CLEAR,
    KIND_GAP,
    KIND_LEVEL,
    MARK_UNITS,
    check_events,
    empty_events,
    merge_events,
    message_starts,
)
from tradebook.market.instruments import Instrument, instrument
from tradebook.market.quotes import quality, quotes
from tradebook.venue.binance import BinanceUsdmDecoder
from tradebook.venue.bybit import BybitDecoder
from tradebook.venue.fast import DECODERS, fast_decoder

MS = 10**6
FEEDS = {
    "spot_btcusdt": ("binance.spot", "BTCUSDT", "BTC/USDT"),
    "spot_ethusdt": ("binance.spot", "ETHUSDT", "ETH/USDT"),
    "usdm_btcusdt": ("binance.usdm", "BTCUSDT", "BTC/USDT:USDT"),
    "usdm_ethusdt": ("binance.usdm", "ETHUSDT", "ETH/USDT:USDT"),
    "cm_btcusd_perp": ("binance.coinm", "BTCUSD_PERP", "BTC/USD:BTC"),
    "cm_ethusd_perp": ("binance.coinm", "ETHUSD_PERP", "ETH/USD:ETH"),
}
BTC = Instrument("bybit", "BTC/USDT:USDT", 0.1, 0.001, 2.0, 5.5)
XRP = Instrument("bybit", "XRP/USDT:USDT", 0.0001, 1.0, 2.0, 5.5)


def frames_of(recordings, name):
    "Frames and receive times of one recording, over midnight where it has two files"
    lines = []
    for path in sorted((recordings / "binance").glob(f"{name}_2024*.gz")):
        with gzip.open(path) as file:
            lines += [line.rstrip().partition(b" ") for line in file]
    return [(line[2], int(line[0])) for line in lines]


def decode_all(decoder, frames):
    "All records of all frames"
    return [d for frame, ts in frames for d in decoder.decode(frame, ts)]


def events_of(told):
    "The rows of all records"
    return np.concatenate([empty_events(0), *[d.events for d in told]])


# --- Binance, real frames


@pytest.mark.recordings
@pytest.mark.parametrize("name", FEEDS)
def test_the_rebuilt_book_agrees_with_every_quote_of_the_venue(recordings, name):
    wire, id, symbol = FEEDS[name]
    decoder = fast_decoder(wire, {id: instrument("binance", symbol)})
    frames, times = zip(*frames_of(recordings, name), strict=True)
    events = decoder.decode_many(frames, times).events
    check_events(events)
    judged = quality(events, decoder.markets[id].of)
    assert set(decoder.counts) <= {"NO_BOOK"}
    assert judged["n_quotes_compared"] > 500 and judged["n_trades"] > 400
    assert judged["n_quote_mismatches"] == judged["n_gaps"] == judged["n_crossed"] == 0


@pytest.mark.recordings
@pytest.mark.parametrize("name", ["spot_ethusdt", "usdm_ethusdt", "cm_ethusd_perp"])
def test_decoder_and_importer_give_the_same_events(recordings, name):
    wire, id, symbol = FEEDS[name]
    decoder = DECODERS[wire]({id: instrument("binance", symbol)})
    mine = events_of(decode_all(decoder, frames_of(recordings, name)))
    theirs = read_frames(sorted((recordings / "binance").glob(f"{name}_2024*.gz")))
    assert theirs.report.n_refused == 0  # sizes between two lots go to the nearer one in both
    assert len(mine) == len(theirs.events) and (mine == theirs.events).all()


@pytest.mark.recordings
@pytest.mark.parametrize("name", ["spot_ethusdt", "usdm_ethusdt"])
def test_losses_are_seen_and_healed_and_what_is_believed_is_true(recordings, name):
    "Drop, repeat and swap changes; each gap asks for a snapshot, which comes some frames later from a true book"
    wire, id, symbol = FEEDS[name]
    frames, rng = frames_of(recordings, name)[:9000], random.Random(11)
    truth = DECODERS[wire]({id: instrument("binance", symbol)})
    decoder = DECODERS[wire]({id: instrument("binance", symbol)})
    told, due, n_lost, book, last = [], None, 0, {1: {}, -1: {}}, 0
    held = None
    for i, (frame, ts) in enumerate(frames):
        for true in truth.decode(frame, ts):
            for e in true.events:
                if e["kind"] == KIND_CLEAR:
                    book = {1: {}, -1: {}}
                elif e["kind"] == KIND_LEVEL:
                    book[int(e["side"])][int(e["price_ticks"])] = int(e["size_lots"])
                last = max(last, int(e["sequence"]) if true.stream == "book" else 0)
        is_change, luck = b"depthUpdate" in frame[:90], rng.random()
        seen = [frame]
        if is_change and truth.lines[id].is_alive and i > 300:
            if luck < 0.01:
                seen, n_lost = [], n_lost + 1
            elif luck < 0.02:
                seen = [frame, frame]
            elif luck < 0.03 and held is None:
                held, seen = frame, []
            elif held is not None:
                seen, held = [frame, held], None
        for one in seen:
            got = decoder.decode(one, ts)
            told += got
            if any(d.action == "resync" for d in got) and truth.lines[id].is_alive:
                due = i + rng.randrange(1, 40)
        if due == i:
            of = truth.markets[id].of
            body = {"lastUpdateId": last}
            for side, key in ((1, "bids"), (-1, "asks")):
                levels = [(p, q) for p, q in book[side].items() if q]
                body[key] = [[f"{of.price(p):.2f}", f"{of.size(q):.5f}"] for p, q in levels]
            got = decoder.snapshot(id, orjson.dumps(body), ts)
            told += got
            due = i + 5 if any(d.action == "resync" for d in got) else None
    events = events_of(told)
    check_events(events)
    judged = quality(events, decoder.markets[id].of)
    assert (
        n_lost > 5 and decoder.counts["SEQ_GAP"] >= n_lost * 0.5 and decoder.counts["SEQ_DUP"] > 0
    )
    assert judged["n_gaps"] >= decoder.counts["SEQ_GAP"]
    assert judged["n_quotes_compared"] > 100
    assert judged["n_quote_mismatches"] == 0


def test_changes_that_come_while_the_snapshot_is_under_way_are_joined():
    of = instrument("binance", "BTC/USDT:USDT")

    def change(U, u, pu, price):
        data = {"e": "depthUpdate", "E": 9, "T": 8, "s": "BTCUSDT", "U": U, "u": u, "pu": pu}
        return orjson.dumps(data | {"b": [[price, "1.000"]], "a": []})

    decoder = BinanceUsdmDecoder({"BTCUSDT": of})
    asked = [
        decoder.decode(change(10 * i, 10 * i + 9, 10 * i - 1, f"{i}.0"), i)[0] for i in range(1, 6)
    ]
    assert [d.action for d in asked] == ["resync", "", "", "", ""]
    body = orjson.dumps({"lastUpdateId": 34, "bids": [["3.0", "5.000"]], "asks": []})
    (joined,) = decoder.snapshot("BTCUSDT", body, 100)
    assert joined.events["sequence"].tolist() == [34, 34, 39, 49, 59]
    assert set(joined.events["ts_recv"]) == {100} and len(message_starts(joined.events)) == 4
    # the hole is in what was kept: good up to there, then dead, with the rest kept for the next snapshot
    decoder.reset()
    for i in (6, 7, 9):
        decoder.decode(change(10 * i, 10 * i + 9, 10 * i - 1, f"{i}.0"), 200 + i)
    body = orjson.dumps({"lastUpdateId": 62, "bids": [], "asks": []})
    told = decoder.snapshot("BTCUSDT", body, 300)
    assert [(d.code, d.action) for d in told] == [("", ""), ("SEQ_GAP", "resync")]
    assert told[0].events["size_lots"][0] == 200 and told[1].events["kind"].tolist() == [KIND_GAP]
    body = orjson.dumps({"lastUpdateId": 95, "bids": [], "asks": []})
    (healed,) = decoder.snapshot("BTCUSDT", body, 400)
    assert healed.events["sequence"].tolist() == [0, 95, 99]


@pytest.mark.recordings
def test_a_capture_of_four_symbols_with_their_rest_books(recordings):
    "Requests go out and their answers come back in the middle of the stream"
    info = (recordings / "wire" / "BINANCE_FUTURES.0").read_text()
    answer = next(line for line in info.splitlines() if "exchangeInfo" in line)
    markets = {}
    for s in orjson.loads(answer[answer.index("{") :])["symbols"]:
        if s["symbol"] in ("SUSHIUSDT", "AKROUSDT", "KEEPUSDT", "CTKUSDT"):
            f = {f["filterType"]: f for f in s["filters"]}
            tick, lot = float(f["PRICE_FILTER"]["tickSize"]), float(f["LOT_SIZE"]["stepSize"])
            symbol = f"{s['baseAsset']}/USDT:USDT"
            markets[s["symbol"]] = Instrument("binance", symbol, tick, lot, 2.0, 5.0)
    capture = []
    for line in (recordings / "wire" / "BINANCE_FUTURES.ws.1.0").read_text().splitlines():
        stamp, found, frame = line.partition(": ")
        if found and frame.startswith("{"):
            capture.append((float(stamp), "", frame.encode()))
    for line in (recordings / "wire" / "BINANCE_FUTURES.http.0.0").read_text().splitlines():
        if "symbol=" in line:
            stamp, _, body = line.partition(" -> ")[2].partition(": ")
            id = line.partition("symbol=")[2].partition("&")[0]
            capture.append((float(stamp), id, body.encode()))
    decoder, told = BinanceUsdmDecoder(markets), []
    for stamp, id, frame in sorted(capture, key=lambda c: c[0]):
        ts = int(stamp * 10**9)
        told += decoder.snapshot(id, frame, ts) if id else decoder.decode(frame, ts)
    assert set(decoder.counts) <= {"NO_BOOK", "SEQ_DUP", "OFF_GRID"}
    old = [
        d for d in told if d.code == "OFF_GRID"
    ]  # an order from before the tick was made coarser
    assert old and {(d.symbol, d.stream, d.action) for d in old} == {("CTK/USDT:USDT", "book", "")}
    assert all(d.detail.startswith("set aside, between two ticks: 0.50579, 0.20562") for d in old)
    assert sum(len(d.candles) for d in told) > 50
    for id, of in markets.items():
        events = merge_events(*[d.events for d in told if d.symbol == of.symbol])
        check_events(events)
        judged = quality(events, of)
        assert judged["n_trades"] >= 5, id
        assert judged["n_book_messages"] > 100 and judged["n_gaps"] == judged["n_crossed"] == 0
        assert judged["n_quote_mismatches"] == 0 and judged["n_quotes_compared"] > 0


# --- Bybit, real frames and the vendor's samples


def fixture(recordings, name):
    "One of the vendor's samples"
    return (recordings / "bybit" / "fixtures" / f"{name}.json").read_bytes()


@pytest.mark.recordings
def test_the_archive_of_500_levels_is_read_whole(recordings):
    archive = zipfile.ZipFile(recordings / "bybit" / "xrpusdt-ob500.data.zip")
    lines = archive.read(archive.namelist()[0]).splitlines()
    decoder = BybitDecoder({"XRPUSDT": XRP})
    events = events_of(decode_all(decoder, [(f, orjson.loads(f)["ts"] * MS) for f in lines]))
    check_events(events)
    book = {"b": {}, "a": {}}  # a slow book of texts
    ours = quotes(events)
    assert len(ours) == len(lines) and not decoder.counts
    for line, row in zip(lines, ours, strict=True):
        frame = orjson.loads(line)
        if frame["type"] == "snapshot":
            book = {"b": {}, "a": {}}
        for side, levels in book.items():
            for price, size in frame["data"][side]:
                levels[price] = size
                if size == "0":
                    del levels[price]
        bid, ask = max(book["b"], key=float), min(book["a"], key=float)
        assert (row["bid_ticks"], row["ask_ticks"]) == (
            XRP.to_ticks(float(bid)),
            XRP.to_ticks(float(ask)),
        )
        assert (row["bid_lots"], row["ask_lots"]) == (float(book["b"][bid]), float(book["a"][ask]))
        assert row["ts_event"] == frame["cts"] * MS
    assert (events["sequence"] >= 20254869).all()


@pytest.mark.recordings
def test_every_lost_change_of_the_archive_ends_the_book(recordings):
    archive = zipfile.ZipFile(recordings / "bybit" / "xrpusdt-ob500.data.zip")
    lines = archive.read(archive.namelist()[0]).splitlines()
    for lost in range(1, len(lines) - 1):
        decoder = BybitDecoder({"XRPUSDT": XRP})
        kept = [(f, 10 + i) for i, f in enumerate(lines) if i != lost]
        told = decode_all(decoder, kept)
        codes = [d.code for d in told]
        assert codes == [""] * lost + ["SEQ_GAP"] + ["NO_BOOK"] * (len(kept) - lost - 1)
        assert told[lost].action == "resync" and told[lost].events["kind"].tolist() == [KIND_GAP]


@pytest.mark.recordings
def test_the_vendors_samples_are_understood(recordings):
    decoder = BybitDecoder({"BTCUSDT": BTC})

    def take(name, **changes):
        content = orjson.loads(fixture(recordings, name)) | changes
        return decoder.decode(orjson.dumps(content), 5)

    (best,) = take("ws_orderbook_snapshot")
    assert best.stream == "quote" and best.events["price_ticks"].tolist() == [274500, 274510]
    (book,) = take("ws_orderbook_snapshot", topic="orderbook.50.BTCUSDT")
    (change,) = take("ws_orderbook_delta", topic="orderbook.50.BTCUSDT")
    assert book.events["price_ticks"].tolist() == [0, 274500, 274495, 274510, 274515]
    assert change.events["size_lots"].tolist() == [400, 0] and not change.code
    (trade,) = take("ws_public_trade", topic="publicTrade.BTCUSDT")
    assert trade.events["side"].tolist() == [1] and trade.events["size_lots"].tolist() == [10]
    assert take("ws_public_trade")[0].code == "UNKNOWN_TOPIC"
    mark, funding, interest = take("ws_ticker_linear")
    assert mark.events["size_lots"][0] / MARK_UNITS == 17217.33
    assert funding.events["size_lots"][0] / FUNDING_UNITS == -0.000212
    assert funding.events["sequence"][0] == 1673280000000
    assert interest.events["size_lots"][0] == 68744761
    (candles,) = take("ws_kline")
    assert candles.candles[0].volume_lots == 2081 and not candles.candles[0].is_closed
    assert take("ws_ticker_option")[0].code == "UNKNOWN_SYMBOL"
    assert take("ws_subscription_ack")[0].code == "SUBSCRIBED"
    refused = take("ws_subscription_failure")[0]
    assert refused.code == "WS_SUB_REJECTED" and "invalid.topic.BTCUSDT" in refused.detail
    private = [d for n in ("ws_auth_success", "ws_account_order") for d in take(n)]
    assert all(d.stream == "control" for d in private)


def bybit(u, kind="delta", symbol="BTCUSDT", b=(("60000.0", "1"),)):
    "One book frame"
    data = {"s": symbol, "b": b, "a": [], "u": u, "seq": u}
    frame = {
        "topic": f"orderbook.50.{symbol}",
        "type": kind,
        "ts": 1_700_000_000_000 + u,
        "data": data,
    }
    return orjson.dumps(frame | {"cts": 1_700_000_000_000 + u})


def codes(decoder, *frames):
    "Codes of the records of these frames"
    return [d.code for i, f in enumerate(frames) for d in decoder.decode(f, 10**18 + i)]


def test_duplicates_reordering_and_restart():
    decoder = BybitDecoder({"BTCUSDT": BTC})
    start = bybit(10, "snapshot")
    assert codes(decoder, start, bybit(11), bybit(11), bybit(12)) == ["", "", "SEQ_DUP", ""]
    swapped = [bybit(14), bybit(13), bybit(15), bybit(20, "snapshot"), bybit(21)]
    assert codes(decoder, *swapped) == ["SEQ_GAP", "NO_BOOK", "NO_BOOK", "", ""]
    restart = [bybit(1, "snapshot"), bybit(2), bybit(3), bybit(1, "snapshot"), bybit(2)]
    assert codes(decoder, *restart) == ["SEQ_RESTART", "", "", "SEQ_RESTART", ""]


def test_a_reset_makes_the_next_change_worthless_and_the_next_snapshot_tell_the_hole():
    decoder = BybitDecoder({"BTCUSDT": BTC, "XRPUSDT": XRP})
    decoder.decode(bybit(5, "snapshot"), 1_000)
    decoder.decode(bybit(5, "snapshot", "XRPUSDT", b=[["1.5", "1"]]), 1_000)
    decoder.reset("BTCUSDT")
    assert codes(decoder, bybit(6), bybit(6, symbol="XRPUSDT", b=[])) == ["NO_BOOK", ""]
    (again,) = decoder.decode(bybit(9, "snapshot"), 5_000)
    assert again.events["kind"].tolist() == [KIND_GAP, KIND_CLEAR, KIND_LEVEL]
    assert again.events["size_lots"][0] == 4_000


def test_a_mixed_frame_and_a_price_between_ticks_end_only_their_book():
    decoder = BybitDecoder({"BTCUSDT": BTC, "XRPUSDT": XRP})
    decoder.decode(bybit(5, "snapshot"), 1_000)
    decoder.decode(bybit(5, "snapshot", "XRPUSDT", b=[["1.5", "1"]]), 1_000)
    mixed = bybit(6).replace(b'"s":"BTCUSDT"', b'"s":"XRPUSDT"')
    (told,) = decoder.decode(mixed, 2_000)
    assert (told.code, told.action, told.symbol) == ("FRAME_MALFORMED", "resync", BTC.symbol)
    assert codes(decoder, bybit(6, symbol="XRPUSDT", b=[["1.5", "2"]])) == [""]
    some = [["1.50005", "2"], ["1.5", "3"]]
    (off,) = decoder.decode(bybit(7, symbol="XRPUSDT", b=some), 3_000)
    assert off.code == "OFF_GRID" and "1.50005" in off.detail and not off.action
    assert off.events["size_lots"].tolist() == [3]
    many = [["1.50005", "2"], ["1.50015", "3"], ["1.50025", "3"], ["1.5", "3"]]
    (off,) = decoder.decode(bybit(8, symbol="XRPUSDT", b=many), 4_000)
    assert (off.code, off.action) == ("OFF_GRID", "resync")
    assert off.events["kind"].tolist() == [KIND_GAP]


@pytest.mark.parametrize(
    "frame",
    [b"", b"\x00", b"null", b"[]", b"1e400", b'{"topic":7}', b'{"topic":"orderbook"}', b'{"data":[]}',
     b'{"topic":"orderbook.50.BTCUSDT"}', b'{"topic":"tickers.BTCUSDT","data":{},"ts":1}', b'{"e":[],"s":1}',
     b'{"e":"trade","s":"BTCUSDT","m":[],"T":1,"t":1,"E":1}', b'{"stream":1,"data":"x"}', b"[" * 3000,
     b'{"e":"depthUpdate","s":"BTCUSDT","E":1,"U":1,"u":1,"pu":0,"b":{"x":1},"a":[]}', b'{"op":{}}',
     b'{"lastUpdateId":"1","bids":[],"asks":[]}', b'{"topic":"kline.1.BTCUSDT","ts":1,"data":7}'],
)  # fmt: skip
@pytest.mark.parametrize("wire", DECODERS)
def test_no_frame_raises_and_none_is_without_an_answer(wire, frame):
    decoder = DECODERS[wire]({"BTCUSDT": BTC})
    told = decoder.decode(frame, 10**18)
    assert told and all(d.code for d in told) and not len(events_of(told))
    assert sum(decoder.counts.values()) == len(told)
    assert decoder.snapshot("BTCUSDT", frame, 10**18) == [] or decoder.venue == "binance"
