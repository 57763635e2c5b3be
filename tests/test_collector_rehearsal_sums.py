"""The real collector against the wire whose books are summed: what a checksum finds, and what becomes of the book."""

import asyncio
import zlib
from decimal import Decimal

import numpy as np
import orjson
from test_collector_rehearsal import HASTY, tell, tell_all

from tradebook.collector.raw_frames import read_raw, split_lines
from tradebook.market.book import apply_events, new_book, top_side
from tradebook.market.events import (
    FLAG_SNAPSHOT,
    KIND_CLEAR,
    KIND_GAP,
    KIND_LEVEL,
    KIND_TRADE,
)
from tradebook.venue.rehearsal_source import synthetic_listings

BTC, ETH = "BTC/USDT", "ETH/USDT"
LISTINGS = synthetic_listings((BTC, ETH), duration_s=900)
KRAKEN = {"venue": "kraken", "listings": LISTINGS}
PAIR = "XBT/USDT"


def raw_lines(root):
    "Everything that came over the socket, with its time"
    (path,) = (root / "raw" / "kraken" / "kraken").glob("*.frames.zst")
    lines, torn = read_raw(path)
    assert torn == 0
    return split_lines(lines)


def table(rows, kinds):
    "Rows as the wire can tell them: time in microseconds, kind, side, price and size, ordered"
    rows = rows[np.isin(rows["kind"], kinds)]
    names = ("kind", "side", "price_ticks", "size_lots")
    columns = [rows["ts_event"] // 1000, *(rows[name] for name in names)]
    return sorted(zip(*(column.tolist() for column in columns), strict=True))


# ------------------------------------------------------------------ healthy


def test_what_is_stored_equals_the_source_event_for_event(tmp_path):
    "At full speed, both streams of two markets, to the last row and microsecond"
    listings = synthetic_listings((BTC, ETH), duration_s=120, seed=3)
    story = tell_all(tmp_path, listings, venue="kraken")
    for one in listings:
        stored = story.stored(one.of.symbol)
        ts = one.events["ts_recv"]
        first = ts > ts[0]  # the first message is the snapshot that a subscriber is told
        assert len(stored) > 1000 and story.codes(one.of.symbol) == []
        later = stored[stored["flags"] & FLAG_SNAPSHOT == 0]
        assert table(later, (KIND_LEVEL, KIND_TRADE)) == table(
            one.events[first], (KIND_LEVEL, KIND_TRADE)
        )
        begun = stored[stored["flags"] & FLAG_SNAPSHOT > 0]
        mine = one.events[~first & (one.events["kind"] == KIND_LEVEL)]
        assert (begun["kind"] == KIND_CLEAR).sum() == 1
        names = ["side", "price_ticks", "size_lots"]
        levels = begun[begun["kind"] == KIND_LEVEL]
        assert sorted(levels[names].tolist()) == sorted(mine[names].tolist())


# ------------------------------------------------------------------ sums


def first_wrong(lines, pair):
    "Receive times of book messages whose sum is not that of the book, read without our decoder"
    sides, wrong, is_told = ({}, {}), [], False
    for ts, frame in lines:
        body = orjson.loads(frame)
        if type(body) is not list or body[-1] != pair or not body[-2].startswith("book"):
            continue
        parts = body[1:-2]
        is_snapshot = "as" in parts[0]
        if is_snapshot:
            sides, is_told = ({}, {}), False
        for part in parts:
            for name, side in (("a", 0), ("as", 0), ("b", 1), ("bs", 1)):
                for price, size, *_ in part.get(name, ()):
                    sides[side][Decimal(price)] = (price, size)
                    if not Decimal(size):
                        del sides[side][Decimal(price)]
        best = [side[p] for k, side in enumerate(sides) for p in sorted(side, reverse=k == 1)[:10]]
        text = "".join(t.replace(".", "").lstrip("0") for level in best for t in level)
        if not is_snapshot and zlib.crc32(text.encode()) != int(parts[-1]["c"]) and not is_told:
            wrong.append(ts)
            is_told = True  # what follows stands on the wrong book, until there is another
    return wrong


def levels(book):
    "Both sides of a whole book"
    found = []
    for side in range(2):
        ticks, lots = np.empty(5000, np.int64), np.empty(5000, np.int64)
        top_side(book, side, 5000, ticks, lots)
        found.append(list(zip(ticks[ticks >= 0].tolist(), lots[ticks >= 0].tolist(), strict=True)))
    return found


def check_whole_books(story):
    "What is stored makes the exchange's own books, level for level"
    for number, symbol in enumerate(story.instruments):
        book, rows = new_book(), story.stored(symbol)
        apply_events(book, rows, 0, len(rows))
        truth = levels(story.exchange.source.books[number])
        assert levels(book) == truth and min(map(len, truth)) > 20, symbol


def test_a_wrong_checksum_is_noticed_at_its_message_and_the_book_begins_anew(tmp_path):
    "CHECKSUM_BAD: a level that is told wrong, then a sum that is"

    async def script(story):
        await story.ready()
        for n, way in enumerate(("level", "sum"), 1):
            story.exchange.fault("checksum", symbol=PAIR, way=way)
            await story.healed(BTC, "CHECKSUM_BAD", n)

    story = tell(tmp_path, script, **KRAKEN)
    assert [(f["code"], f["n_touched"]) for f in story.faults] == [("checksum", 1)] * 2
    wrong = first_wrong(raw_lines(tmp_path), PAIR)
    holes = {row["until_ns"]: row["code"] for row in story.lines(BTC) if "also" in row}
    assert [holes.get(ts) for ts in wrong] == ["CHECKSUM_BAD"] * 2  # at that very message
    gaps = story.stored(BTC)[story.stored(BTC)["kind"] == KIND_GAP]
    assert set(wrong) <= set(gaps["ts_recv"].tolist())
    assert story.codes(BTC) == ["CHECKSUM_BAD"] and story.codes(ETH) == []
    assert story.tally(BTC, "n_resyncs") == 2 and story.tally(ETH, "n_resyncs") == 0
    assert sum(s.n_opened for s in story.feed.shards) == 1  # the socket stays
    check_whole_books(story)


def test_a_lost_and_a_swapped_change_are_found_and_a_repeated_one_is_dropped(tmp_path):
    "On a wire without numbers: SEQ_GAP, SEQ_REORDER, SEQ_DUP by sums and times"

    async def script(story):
        await story.ready()
        story.exchange.fault("duplicate", symbol="ETH/USDT", count=5)
        await story.until(lambda: story.tally(ETH, "SEQ_DUP") >= 5, what="duplicates")
        assert story.codes(ETH) == []
        for _ in range(20):  # one that lies behind the tenth level shows when it is needed
            story.exchange.fault("drop", symbol=PAIR)
            await asyncio.sleep(0.2)
            if story.tally(BTC, "CHECKSUM_BAD"):
                break
        await story.healed(BTC, "CHECKSUM_BAD")
        story.exchange.fault("reorder", symbol="ETH/USDT")
        await story.healed(ETH, "n_resyncs")

    story = tell(tmp_path, script, **KRAKEN)
    assert story.codes(BTC) == ["CHECKSUM_BAD"]
    assert story.codes(ETH) in (["CHECKSUM_BAD"], ["SEQ_GAP"])
    assert len(first_wrong(raw_lines(tmp_path), PAIR)) == story.tally(BTC, "CHECKSUM_BAD")
    check_whole_books(story)


# ------------------------------------------------------------------ other faults


def test_a_crossed_book_and_unreadable_messages_cost_one_book_each(tmp_path):
    "CROSSED_BOOK: the sum agrees with it, and it is not believed"

    async def script(story):
        await story.ready()
        story.exchange.fault("cross_book", symbol=PAIR, count=60)
        for n, way in enumerate(("cut", "text", "binary", "word", "list"), 1):
            story.exchange.fault("malformed", symbol="ETH/USDT", way=way)
            await story.healed(ETH, "FRAME_MALFORMED", n)
        await story.healed(BTC, "SEQ_GAP")
        await story.until(lambda: not story.exchange.faults.active(2**62, "cross_book"), what="end")
        await story.until(lambda: story.feed.state(BTC) == "live", what="live")
        await asyncio.sleep(0.3)

    story = tell(tmp_path, script, speed="15x", **KRAKEN)
    assert story.codes(BTC)[0] in ("SEQ_GAP", "FRAME_MALFORMED")
    assert "CHECKSUM_BAD" not in story.codes(BTC)
    crossed = story.tally(BTC, "SEQ_GAP")
    assert story.faults[0]["n_touched"] == 60 and crossed <= 12  # asked for in growing waits
    assert set(story.codes(ETH)) == {"FRAME_MALFORMED"}
    check_whole_books(story)


def test_silence_and_times_that_stand_are_found_in_spite_of_heartbeats(tmp_path):
    "WS_SILENT, TIMES_FROZEN, BOOK_FROZEN"

    async def script(story):
        await story.ready()
        story.exchange.fault("silence", symbol=PAIR, until="resubscribe")
        story.exchange.fault("freeze_timestamps", symbol="ETH/USDT", seconds=1.5)
        await story.healed(BTC, "WS_SILENT")
        await story.until(lambda: story.tally(ETH, "TIMES_FROZEN"), what="TIMES_FROZEN")
        await asyncio.sleep(0.5)
        await story.until(lambda: story.feed.state(ETH) == "live", what="live")
        story.exchange.fault("freeze_book", symbol=PAIR, seconds=1.5)
        story.exchange.fault("late_snapshot", symbol="ETH/USDT", value=300, seconds=1)
        story.exchange.fault("checksum", symbol="ETH/USDT")
        await story.until(lambda: story.tally(BTC, "BOOK_FROZEN"), what="BOOK_FROZEN")
        await asyncio.sleep(1.0)
        for symbol in (BTC, ETH):
            await story.until(lambda s=symbol: story.feed.state(s) == "live", what=f"live {symbol}")
        await asyncio.sleep(0.3)

    story = tell(tmp_path, script, speed="10x", **KRAKEN)
    assert story.codes(BTC)[0] == "WS_SILENT" and "TIMES_FROZEN" in story.codes(ETH)
    check_whole_books(story)


def test_sockets_that_end_refused_channels_and_a_wrong_clock(tmp_path):
    "WS_CLEAN_END, WS_LOST, WS_HALF_OPEN, RATE_LIMITED, WS_SUB_REJECTED"

    async def script(story):
        await story.ready()
        for fault, code in (("close", "WS_CLEAN_END"), ("abort", "WS_LOST")):
            story.exchange.fault("rate_limit", way="connect", count=1, retry_after_s=0.3)
            story.exchange.fault(fault)
            await story.healed(BTC, code)
        story.exchange.fault("refuse_subscription", symbol="ETH/USDT", stream="orderbook")
        story.exchange.fault("half_open")
        await story.healed(BTC, "WS_HALF_OPEN")
        assert story.feed.state(ETH) == "refused" and "ETH/USDT" in story.feed.refused[ETH]

    story = tell(tmp_path, script, **KRAKEN)
    found = story.codes(BTC)
    assert found == ["WS_CLEAN_END", "WS_LOST", "WS_HALF_OPEN"]
    assert story.tally(BTC, "RATE_LIMITED") == 2


def test_a_delisted_pair_is_refused_by_name_and_the_other_goes_on(tmp_path):
    "DELIST"

    async def script(story):
        await story.ready()
        fault = story.exchange.fault("delist", symbol=PAIR)
        await story.until(lambda: story.feed.state(BTC) == "refused", 15, "refused")
        story.why = story.feed.refused[BTC]
        story.exchange.faults.heal(0, fault.number)
        await story.healed(BTC, "retry")

    story = tell(tmp_path, script, escalation=HASTY, **KRAKEN)
    assert PAIR in story.why and "not supported" in story.why
    assert story.codes(BTC)[0] == "WS_SILENT" and story.codes(ETH) == []
    check_whole_books(story)


def test_what_the_collector_asks_for_at_the_start_is_answered(tmp_path):
    "Instruments through the unmodified ccxt, from a server that has a perpetual's recording"
    from tradebook.venue.markets import load_instruments, urls_at
    from tradebook.venue.rehearsal import Rehearsal
    from tradebook.venue.rehearsal_server import in_thread

    listings = synthetic_listings(("BTC/USDT:USDT", "DOGE/USD:USD"), duration_s=5)
    with in_thread(lambda: Rehearsal("kraken", listings, max_s=30)) as exchange:
        urls = urls_at("kraken", exchange.http_url)
        loaded = load_instruments("kraken", ("BTC/USDT", "DOGE/USD"), urls, tmp_path)
    for one, symbol in zip(listings, ("BTC/USDT", "DOGE/USD"), strict=True):
        of = loaded.instruments[symbol]
        names = ("tick_size", "lot_size", "maker_fee_bps", "taker_fee_bps", "min_size_lots")
        assert [getattr(of, n) for n in names] == [getattr(one.of, n) for n in names]
        assert not of.can_short
