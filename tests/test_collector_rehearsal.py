"""The real collector against the rehearsal exchange: what is stored, and what every fault of the wire is called."""

import asyncio
import itertools
import os
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tradebook.base.errors import VenueError
from tradebook.collector.clocks import Reading, read_clocks
from tradebook.collector.escalation import Escalation
from tradebook.collector.incidents import incident_file, read_incidents
from tradebook.collector.intake import Intake
from tradebook.collector.raw_frames import read_raw, replay
from tradebook.collector.recorder import Recorder
from tradebook.collector.session import Session, run_session
from tradebook.collector.vitals import Bounds
from tradebook.market.events import KIND_GAP, KIND_TRADE, check_events
from tradebook.market.quotes import quotes
from tradebook.market.store import Store
from tradebook.venue.rehearsal import Rehearsal, wire_frames
from tradebook.venue.rehearsal_source import synthetic_listings
from tradebook.venue.venues import VENUES

BTC, ETH = "BTC/USDT:USDT", "ETH/USDT:USDT"
LISTINGS = synthetic_listings((BTC, ETH), duration_s=900)
HASTY = partial(Escalation, patience_s=0.6, calm_s=2.0, retry_s=1.0)
BOUNDS = Bounds(
    first=(1.5, *[60] * 6), silence=(1.0, *[60] * 6), usual=3, stands=0.7, frozen=0.5, n_trades=3
)
WIRES = {"bybit": "bybit.linear", "binance": "binance.usdm"}


class Story:
    "One recording and what happened to it"

    def __init__(self, root, venue="bybit", listings=LISTINGS, **settings):
        self.root, self.venue, self.listings = root, venue, listings
        self.instruments = {one.of.symbol: replace(one.of, venue=venue) for one in listings}
        self.live: list[str] = []  # What was live when the market stood still at the end
        self.settings = {
            "bounds": BOUNDS,
            "escalation": lambda: Escalation(patience_s=1.0, calm_s=2.0, retry_s=3.0),
            "spec_changes": {"idle_s": 1.5},
            "streams": ("book", "trade"),
        } | settings

    async def run(self, script, speed="5x", for_s=25.0, **exchange):
        "Record while the script breaks things; the market stands still at the end"
        async with Rehearsal(self.venue, self.listings, speed, **exchange) as self.exchange:
            self.session = Session(
                self.root,
                self.venue,
                self.instruments,
                address=self.exchange.http_url,
                **self.settings,
            )
            self.feed = self.session.feeds[0]
            task = asyncio.ensure_future(run_session(self.session, for_s=for_s))
            try:
                await script(self)
                if self.exchange.source.pace.is_shifted:
                    self.exchange.source.speed = 1e-9  # what has been said arrives, no more is
                    await asyncio.sleep(0.5)
                    if not any(s.is_half_open for s in self.exchange.sockets.values()):
                        self.live = [s for s in self.instruments if self.feed.state(s) == "live"]
            finally:
                self.session.stopped.set()
                self.account = await asyncio.wait_for(task, 15)
            self.books = [quotes_of(book) for book in self.exchange.source.books]
            self.faults = self.exchange.faults.record(0)
        return self

    async def until(self, condition, seconds=15.0, what=""):
        "Wait for something, with a bound"
        for _ in range(int(seconds / 0.02)):
            if condition():
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"it did not happen: {what}; {self.feed.status()['symbols']}")

    async def ready(self):
        "Wait until everything is live"
        await self.until(self.feed.ready.is_set, what="ready")
        await asyncio.sleep(0.3)

    def tally(self, symbol, key):
        return self.feed.tallies[symbol][key]

    async def healed(self, symbol, key, n=1):
        "Wait until a code was counted and the symbol is live again"
        await self.until(lambda: self.tally(symbol, key) >= n, what=key)
        await self.until(lambda: self.feed.state(symbol) == "live", what=f"live after {key}")
        await asyncio.sleep(0.3)

    def stored(self, symbol):
        rows = Store(Path(self.root) / "market").read(self.venue, symbol)
        check_events(rows)
        return rows

    def lines(self, symbol):
        return read_incidents(incident_file(self.root, self.venue, symbol))

    def codes(self, symbol):
        "Codes of the holes, in order, repetitions of one hole left out"
        found = [row["code"] for row in self.lines(symbol) if row["until_ns"] > row["ts_ns"]]
        return [c for i, c in enumerate(found) if i == 0 or c != found[i - 1]]

    def check(self):
        "Each hole has its cause, no cause is unknown, and the book is right at the end"
        for number, symbol in enumerate(self.instruments):
            rows = self.stored(symbol)
            gaps = rows[rows["kind"] == KIND_GAP]
            holes = [(int(g["ts_recv"] - g["size_lots"]), int(g["ts_recv"])) for g in gaps]
            told = [(r["ts_ns"], r["until_ns"]) for r in self.lines(symbol) if "also" in r]
            assert holes == told, symbol
            assert "UNKNOWN" not in {r["code"] for r in self.lines(symbol)}, self.lines(symbol)
            assert all(b[0] >= a[1] for a, b in itertools.pairwise(holes)), "holes overlap"
            if symbol in self.live:
                last = quotes(rows)[-1]
                best = [int(last[n]) for n in ("bid_ticks", "bid_lots", "ask_ticks", "ask_lots")]
                assert best == self.books[number], symbol
        return self


def quotes_of(book):
    "Best prices and sizes of the exchange's own book"
    from tradebook.market.book import best, size_at

    prices = [int(best(book, side)) for side in (0, 1)]
    return [x for side, p in enumerate(prices) for x in (p, int(size_at(book, side, p)))]


def tell(tmp_path, script, **settings):
    "Run one story"
    run = {k: settings.pop(k) for k in ("speed", "for_s", "wait_topics") if k in settings}
    return asyncio.run(Story(tmp_path, **settings).run(script, **run)).check()


def tell_all(tmp_path, listings, **settings):
    "Record a whole source at full speed, both streams of two markets, to the last row"

    async def script(story):
        sockets = story.exchange.sockets
        await story.until(lambda: story.exchange.source.is_over, 60, "the end of the source")
        await story.until(lambda: not any(s.n_waiting for s in sockets.values()), 60, "delivery")
        await asyncio.sleep(0.5)

    whole = {"bounds": Bounds(), "speed": "max", "wait_topics": 4, "for_s": 60}
    return tell(tmp_path, script, listings=listings, **whole, **settings)


# ------------------------------------------------------------------ healthy


@pytest.mark.parametrize("venue", ["bybit", "binance"])
def test_what_is_stored_equals_the_source_event_for_event(tmp_path, venue):
    "At full speed, both streams of two markets, to the last row"
    listings = synthetic_listings((BTC, ETH), duration_s=300, seed=3)
    story = tell_all(tmp_path, listings, venue=venue)
    spec = VENUES[WIRES[venue]]
    topics = spec.topics_for([spec.name_of(s) for s in story.instruments], ("book", "trade"))
    decoder = spec.make_decoder({spec.name_of(s): of for s, of in story.instruments.items()})
    expected = {s: [] for s in story.instruments}
    for frame in wire_frames(venue, listings, topics):
        for record in decoder.decode(frame, 1):
            expected.get(record.symbol, []).append(record.events)
    names = ["ts_event", "size_lots", "price_ticks", "kind", "side"]
    for one in listings:
        rows = story.stored(one.of.symbol)
        source = one.events[one.events["kind"] == KIND_TRADE]
        ours = rows[rows["kind"] == KIND_TRADE]
        for name in ("price_ticks", "size_lots", "side"):
            assert (ours[name][-len(source) :] == source[name][-len(ours) :]).all()
        assert len(source) - len(ours) <= 2  # what was traded before the doors opened
        if venue == "bybit":  # Binance's book begins with a REST snapshot, whose moment is free
            want = np.concatenate(expected[one.of.symbol])
            assert len(rows) == len(want)
            for name in names:
                assert (rows[name] == want[name]).all(), name
            is_book = rows["kind"] != KIND_TRADE  # each exchange begins to number where it likes
            assert (np.diff(rows["sequence"][is_book]) == np.diff(want["sequence"][is_book])).all()
        theirs, last = quotes(one.events)[-1], quotes(rows)[-1]
        for name in ("bid_ticks", "bid_lots", "ask_ticks", "ask_lots"):
            assert last[name] == theirs[name]
        assert story.codes(one.of.symbol) == []


def test_raw_frames_read_again_give_the_stored_events(tmp_path):
    async def script(story):
        await story.ready()
        story.exchange.fault("drop", symbol="BTCUSDT")
        await story.healed(BTC, "SEQ_GAP")

    for venue in ("bybit", "binance"):
        story = tell(tmp_path / venue, script, venue=venue)
        (path,) = (tmp_path / venue / "raw" / venue / WIRES[venue]).glob("*.frames.zst")
        lines, torn = read_raw(path)
        assert torn == 0
        spec = VENUES[WIRES[venue]]
        decoder = spec.make_decoder({spec.name_of(s): of for s, of in story.instruments.items()})
        records = replay(lines, decoder)
        for symbol in story.instruments:
            again = np.concatenate([r.events for r in records if r.symbol == symbol])
            stored = story.stored(symbol)
            names = ["sequence", "price_ticks", "kind", "side", "ts_event"]
            book = [rows[rows["kind"] != KIND_GAP] for rows in (again, stored)]
            for name in names:
                assert (book[0][name] == book[1][name]).all(), (venue, symbol, name)


# ------------------------------------------------------------------ streams


def test_a_silent_symbol_is_found_on_a_living_socket_and_the_other_is_untouched(tmp_path):
    "WS_SILENT"

    async def script(story):
        await story.ready()
        story.exchange.fault("silence", symbol="BTCUSDT", until="resubscribe")
        await story.until(lambda: story.tally(BTC, "WS_SILENT"), 4, "found")
        await story.healed(BTC, "resubscribe")

    story = tell(tmp_path, script)
    assert story.codes(BTC) == ["WS_SILENT"] and story.codes(ETH) == []
    assert story.tally(ETH, "n_resyncs") == story.tally(ETH, "n_resubscribed") == 0
    assert sum(s.n_opened for s in story.feed.shards) == 1


def test_silence_that_resubscribing_does_not_end_moves_the_symbol_to_its_own_socket(tmp_path):
    async def script(story):
        await story.ready()
        story.exchange.fault("silence", symbol="BTCUSDT", until="reconnect")
        await story.healed(BTC, "new socket")

    story = tell(tmp_path, script)
    assert story.codes(BTC)[0] == "WS_SILENT" and story.codes(ETH) == []
    assert sorted(len(s.symbols) for s in story.feed.shards) == [1, 1]


@pytest.mark.parametrize("venue", ["bybit", "binance"])
def test_a_delisted_symbol_is_named_and_the_others_go_on(tmp_path, venue):
    "DELIST: its topics end; Bybit refuses new ones, Binance takes them and says nothing for ever"

    async def script(story):
        await story.ready()
        fault = story.exchange.fault("delist", symbol="BTCUSDT")
        gone = ("refused", "given up")
        await story.until(lambda: story.feed.state(BTC) in gone, 15, "gone")
        story.gone = story.feed.status()["symbols"][BTC]
        n = story.feed.status()["symbols"][ETH]["n_events"]
        await story.until(
            lambda: story.feed.status()["symbols"][ETH]["n_events"] > n, 5, "ETH goes on"
        )
        story.exchange.faults.heal(0, fault.number)
        await story.healed(BTC, "retry")

    story = tell(tmp_path, script, venue=venue, escalation=HASTY)
    assert story.gone["state"] == {"bybit": "refused", "binance": "given up"}[venue]
    if venue == "bybit":
        assert "BTCUSDT" in story.gone["why"]
    else:
        assert story.gone["why"] in ("WS_SILENT", "NEVER_STARTED", "SNAPSHOT_FAILED")
        assert story.tally(BTC, "GIVEN_UP") == 1
    assert story.codes(BTC)[0] == "WS_SILENT" and story.codes(ETH) == []
    assert story.tally(ETH, "n_resyncs") == story.tally(ETH, "n_resubscribed") == 0


def test_a_book_that_stands_while_trades_print_is_frozen_and_not_quiet(tmp_path):
    "BOOK_FROZEN_TRADES_MOVE"

    async def script(story):
        await story.ready()
        story.exchange.fault("freeze_book", symbol="BTCUSDT", seconds=2.5)
        await story.until(lambda: story.tally(BTC, "BOOK_FROZEN"), 4, "found")
        await asyncio.sleep(2.5)
        await story.until(lambda: story.feed.state(BTC) == "live", what="live")
        await asyncio.sleep(0.3)

    slow_to_call_silent = BOUNDS._replace(silence=(20.0, *[60] * 6), first=(20.0, *[60] * 6))
    story = tell(tmp_path, script, bounds=slow_to_call_silent, speed="20x")
    assert story.codes(BTC)[0] == "BOOK_FROZEN" and story.codes(ETH) == []


def test_times_that_stand_still_are_seen_although_messages_come(tmp_path):
    async def script(story):
        await story.ready()
        story.exchange.fault("freeze_timestamps", symbol="BTCUSDT", seconds=2.0)
        await story.until(lambda: story.tally(BTC, "TIMES_FROZEN"), 4, "found")
        await asyncio.sleep(2.0)
        await story.until(lambda: story.feed.state(BTC) == "live", what="live")
        await asyncio.sleep(0.3)

    story = tell(tmp_path, script, speed="10x")
    assert "TIMES_FROZEN" in story.codes(BTC) and story.codes(ETH) == []


def test_a_server_that_never_speaks_is_never_ready_and_fails_the_session(tmp_path):
    "FAKE_STREAM"

    async def script(story):
        await asyncio.sleep(3)
        assert not story.feed.ready.is_set()
        assert story.feed.state(BTC) != "live"
        assert story.tally(BTC, "NEVER_STARTED")

    with pytest.raises(VenueError, match="not one event came from bybit"):
        asyncio.run(_mute(Story(tmp_path), script))


async def _mute(story, script):
    "A story on an exchange that accepts everything and sends nothing of any symbol"

    async with Rehearsal("bybit", LISTINGS, "1x") as story.exchange:
        story.exchange.fault("silence", seconds=600)
        story.session = Session(
            story.root,
            "bybit",
            story.instruments,
            address=story.exchange.http_url,
            **story.settings,
        )
        story.feed = story.session.feeds[0]
        task = asyncio.ensure_future(run_session(story.session, for_s=20))
        await script(story)
        story.session.stopped.set()
        await asyncio.wait_for(task, 10)


def test_a_refused_topic_is_named_and_the_rest_is_recorded(tmp_path):
    "WS_SUB_REJECTED"

    async def script(story):
        await story.until(lambda: story.feed.state(ETH) == "live", what="ETH live")
        await story.until(lambda: BTC in story.feed.refused, what="BTC refused")
        await asyncio.sleep(0.5)
        assert not story.feed.ready.is_set()
        assert story.feed.state(BTC) == "refused" and "BTCUSDT" in story.feed.refused[BTC]

    async def begin(story):
        story.exchange.fault("refuse_subscription", symbol="BTCUSDT", seconds=600)
        await script(story)

    story = asyncio.run(Story(tmp_path).run(begin))
    assert len(story.stored(ETH)) > 100
    with pytest.raises(Exception, match="no events of bybit BTC"):
        story.stored(BTC)


def test_what_was_refused_is_asked_for_again(tmp_path):
    "A venue under maintenance refuses for a while; the hole says so"

    async def script(story):
        await story.ready()
        fault = story.exchange.fault("refuse_subscription", symbol="BTCUSDT", seconds=600)
        story.exchange.fault("abort")
        await story.until(lambda: BTC in story.feed.refused, what="BTC refused")
        latest = story.feed.status()["symbols"][BTC]["latest"]
        assert latest["code"] == "WS_SUB_REJECTED" and "BTCUSDT" in latest["words"]
        story.exchange.faults.heal(0, fault.number)
        await story.until(lambda: story.feed.state(BTC) == "live", what="BTC live again")
        await asyncio.sleep(0.3)

    story = tell(tmp_path, script)
    assert story.codes(BTC) == story.codes(ETH) == ["WS_LOST"]
    assert "WS_SUB_REJECTED" in next(r for r in story.lines(BTC) if "also" in r)["also"]


# ------------------------------------------------------------------ sockets


@pytest.mark.parametrize(
    ("fault", "code"),
    [("close", "WS_CLEAN_END"), ("abort", "WS_LOST"), ("half_open", "WS_HALF_OPEN")],
)
def test_a_socket_that_ends_is_opened_again(tmp_path, fault, code):
    async def script(story):
        await story.ready()
        story.exchange.fault(fault)
        await story.healed(BTC, code)
        await story.until(lambda: story.feed.state(ETH) == "live", what="ETH live")

    story = tell(tmp_path, script)
    assert story.codes(BTC) == story.codes(ETH) == [code]


def test_a_venue_that_accepts_and_closes_is_not_hammered(tmp_path):
    async def script(story):
        await story.ready()
        story.exchange.fault("accept_then_close", seconds=2.5)
        story.exchange.fault("abort")
        await asyncio.sleep(2.5)
        story.n_opened = story.feed.shards[0].n_opened
        await story.until(lambda: story.feed.state(BTC) == "live", what="live")
        await asyncio.sleep(0.3)
        assert story.feed.shards[0].backoff.n_failures == 0  # a valid message came

    story = tell(tmp_path, script)
    assert story.n_opened <= 7  # at a fixed short wait it would be dozens
    assert story.codes(BTC) == ["WS_LOST"]


def test_a_venue_that_says_too_many_is_obeyed(tmp_path):
    async def script(story):
        await story.ready()
        story.exchange.fault("rate_limit", way="connect", seconds=2.0, retry_after_s=1.5)
        story.exchange.fault("abort")
        await story.healed(BTC, "RATE_LIMITED")

    story = tell(tmp_path, script)
    lines = [row for row in story.lines(BTC) if "RATE_LIMITED" in row.get("also", ())]
    assert story.codes(BTC) == ["WS_LOST"] and lines
    assert story.tally(BTC, "RATE_LIMITED") <= 3


# ------------------------------------------------------------------ books


@pytest.mark.parametrize("venue", ["bybit", "binance"])
def test_a_lost_change_is_a_hole_and_a_new_book(tmp_path, venue):
    "SEQ_GAP"

    async def script(story):
        await story.ready()
        for n in (1, 2):
            story.exchange.fault("drop", symbol="BTCUSDT")
            await story.healed(BTC, "SEQ_GAP", n)

    story = tell(tmp_path, script, venue=venue)
    assert "SEQ_GAP" in story.codes(BTC) and story.codes(ETH) == []
    assert story.tally(BTC, "n_resyncs") == 2


@pytest.mark.parametrize("venue", ["bybit", "binance"])
def test_repeated_changes_are_dropped_and_swapped_ones_are_a_hole(tmp_path, venue):
    "SEQ_DUP, SEQ_REORDER"

    async def script(story):
        await story.ready()
        story.exchange.fault("duplicate", symbol="BTCUSDT", count=5)
        await story.until(lambda: story.tally(BTC, "SEQ_DUP") >= 5, what="duplicates")
        story.exchange.fault("reorder", symbol="ETHUSDT")
        await story.healed(ETH, "SEQ_GAP")

    story = tell(tmp_path, script, venue=venue)
    assert story.codes(BTC) == [] and story.codes(ETH) == ["SEQ_GAP"]
    numbers = story.stored(BTC)["sequence"][story.stored(BTC)["kind"] == 2]
    assert (np.diff(numbers) >= 0).all()


def test_a_refused_snapshot_is_waited_for_without_a_storm(tmp_path):
    "SNAPSHOT_429"

    async def script(story):
        await story.ready()
        n = story.exchange.n_requests
        story.exchange.fault("rate_limit", value=418, seconds=2.5, retry_after_s=1.0)
        story.exchange.fault("drop", symbol="BTCUSDT")
        await story.until(lambda: story.tally(BTC, "SNAPSHOT_FAILED"), what="refusal")
        assert story.feed.state(BTC) == "no book"
        await story.healed(BTC, "SEQ_GAP")
        story.n_requests = story.exchange.n_requests - n

    story = tell(tmp_path, script, venue="binance")
    assert story.codes(BTC) == ["SEQ_GAP"] and story.codes(ETH) == []
    assert story.n_requests <= 5


def test_a_late_snapshot_joins_the_changes_that_were_kept(tmp_path):
    async def script(story):
        await story.ready()
        story.exchange.fault("late_snapshot", symbol="BTCUSDT", value=800, seconds=3)
        story.exchange.fault("drop", symbol="BTCUSDT")
        await story.healed(BTC, "SEQ_GAP")

    for venue in ("bybit", "binance"):
        assert tell(tmp_path / venue, script, venue=venue).codes(BTC) == ["SEQ_GAP"]


@pytest.mark.parametrize("count", [3, 40])
def test_a_book_that_is_crossed_three_times_is_replaced(tmp_path, count):
    "CROSSED_BOOK: also when it has passed before anybody looked"

    async def script(story):
        await story.ready()
        story.exchange.fault("cross_book", symbol="BTCUSDT", count=count)
        await story.healed(BTC, "CROSSED_BOOK")
        await story.until(lambda: not story.exchange.faults.active(2**62, "cross_book"), what="end")
        await asyncio.sleep(1.5)
        await story.until(lambda: story.feed.state(BTC) == "live", what="live")

    story = tell(tmp_path, script)
    assert story.codes(BTC)[0] == "CROSSED_BOOK" and story.codes(ETH) == []
    assert story.feed.status()["symbols"][BTC]["n_crossed"] >= 3


def test_a_venue_that_numbers_anew_brings_a_snapshot_and_no_loop(tmp_path):
    async def script(story):
        await story.ready()
        story.exchange.fault("restart_numbering", symbol="BTCUSDT")
        await story.until(lambda: story.tally(BTC, "SEQ_RESTART"), what="restart")
        await asyncio.sleep(0.8)

    story = tell(tmp_path, script)
    assert story.codes(BTC) == [] and story.tally(BTC, "n_resyncs") == 0


@pytest.mark.parametrize("way", ["cut", "text", "binary", "word", "list"])
def test_an_unreadable_message_costs_one_book_at_most(tmp_path, way):
    async def script(story):
        await story.ready()
        story.exchange.fault("malformed", symbol="BTCUSDT", way=way)
        await story.healed(BTC, "n_resyncs")

    story = tell(tmp_path, script)
    assert story.codes(BTC)[0] == "FRAME_MALFORMED" and story.codes(ETH) == []


# ------------------------------------------------------------------ ourselves


def test_what_does_not_fit_is_dropped_counted_and_marked_as_a_hole(tmp_path):
    "BACKPRESSURE: ten times the messages into a queue of twenty kilobytes"

    async def script(story):
        await story.ready()
        story.exchange.fault("burst", value=100, seconds=1.5)
        await story.until(lambda: story.tally(BTC, "BACKPRESSURE"), what="backpressure")
        await asyncio.sleep(2.5)
        await story.until(
            lambda: story.feed.state(BTC) == "live" and not story.feed.torn, what="live"
        )
        await story.until(lambda: story.feed.state(ETH) == "live", what="ETH live")
        await asyncio.sleep(0.4)

    story = tell(tmp_path, script, queue_bytes=150_000, speed="3x")
    counts = story.account["recorders"][0]
    assert counts["n_events_dropped"] > 0 and story.session.recorders[0].queue.most_bytes <= 150_000
    assert "BACKPRESSURE" in story.codes(BTC)


def test_a_flood_that_the_disk_can_take_loses_nothing(tmp_path):
    "Before anything is dropped the feed leaves the processor to the thread that writes"
    of = replace(LISTINGS[0].of, venue="bybit")
    frames = wire_frames("bybit", LISTINGS[:1], ["orderbook.50.BTCUSDT", "publicTrade.BTCUSDT"])
    recorder = Recorder(tmp_path, {BTC: of}, "bybit.linear", queue_bytes=2_400_000)
    intake = Intake(VENUES["bybit.linear"], {BTC: of}, recorder)
    recorder.start()
    now = intake.clock.now_ns()
    for start in range(0, len(frames), 100):
        for i, frame in enumerate(frames[start : start + 100]):
            intake.queue.put(frame, now + start + i)
        intake.drain()
    counts = recorder.close()
    assert intake.counts["n_waits"] and not intake.torn
    assert (counts["n_frames"], counts.get("n_events_dropped", 0)) == (len(frames), 0)
    assert sum(map(len, frames)) > recorder.queue.limit_bytes >= recorder.queue.most_bytes


def test_a_full_disk_leaves_whole_segments_and_recording_goes_on_by_itself(tmp_path):
    "DISK_FULL, on a real file system of three megabytes"
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here (needs root)")
    filler = place / "filler"

    async def script(story):
        await story.ready()
        filler.write_bytes(b"x" * (1 << 20))
        with filler.open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(b"x" * 4096)
            except OSError:
                pass
        await story.until(lambda: story.session.recorders[0].blocked == "DISK_FULL", what="full")
        await story.until(lambda: story.tally(BTC, "DISK_FULL"), what="heard by the feed")
        await asyncio.sleep(2.5)  # longer than a stream may be silent, and twice as long as a step
        assert not story.tally(BTC, "WS_SILENT") and not story.tally(BTC, "resubscribe")
        filler.unlink()
        await story.until(story.session.recorders[0].has_room, what="room")
        await story.until(
            lambda: not story.feed.torn and story.feed.state(BTC) == "live", what="live"
        )
        await asyncio.sleep(0.8)

    try:
        story = tell(place, script, min_free_bytes=0, is_raw_kept=False, listings=LISTINGS[:1])
        assert "DISK_FULL" in story.codes(BTC)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


class Machine:
    "This machine's clocks, with somebody's hand on them"

    def __init__(self):
        self.wall, self.boot = 0, 0

    def __call__(self):
        now = read_clocks()
        return Reading(now.wall + self.wall + self.boot, now.mono, now.boot + self.boot)


def test_a_clock_that_is_moved_and_a_machine_that_slept_are_marked_and_begin_anew(tmp_path):
    "CLOCK_SKEW: +3 s, then -90 s, then ten minutes of sleep"
    machine = Machine()

    async def script(story):
        await story.ready()
        machine.wall += 3 * 10**9
        await story.healed(BTC, "CLOCK_STEP", 1)
        machine.wall -= 90 * 10**9
        await story.healed(BTC, "CLOCK_STEP", 2)
        machine.boot += 600 * 10**9
        await story.healed(BTC, "SUSPENDED", 1)

    story = tell(tmp_path, script, read=machine)
    assert story.codes(BTC) == story.codes(ETH) == ["CLOCK_STEP", "SUSPENDED"]
    assert (np.diff(story.stored(BTC)["ts_recv"]) >= 0).all()


def test_a_venue_clock_that_is_ahead_is_told_and_negative_latency_counted(tmp_path):
    async def script(story):
        await story.ready()
        await asyncio.sleep(2.5)
        story.exchange.fault("clock_skew", value=3000, seconds=4)
        await story.until(lambda: story.tally(BTC, "VENUE_CLOCK"), 8, "told")

    story = tell(tmp_path, script)
    assert story.feed.venue_clock.n_negative > 0
    assert story.codes(BTC) == []  # receive times are right, so there is no hole


def test_stopping_never_hangs_however_the_venue_behaves(tmp_path):
    async def script(story):
        await story.ready()
        story.exchange.fault("half_open")
        story.exchange.fault("rate_limit", way="both", seconds=600, retry_after_s=600)

    story = tell(tmp_path, script)
    assert story.account["ok"]


# ------------------------------------------------------------------ restarts


def test_a_restart_the_same_day_overwrites_nothing_and_says_why_there_is_a_hole(tmp_path):
    async def script(story):
        await story.ready()
        await asyncio.sleep(0.3)

    first = tell(tmp_path, script)
    before = first.stored(BTC)
    second = tell(tmp_path, script)
    rows = second.stored(BTC)
    assert (rows[: len(before)] == before).all() and len(rows) > len(before)
    assert second.codes(BTC) == ["STOPPED"]
    assert os.listdir(tmp_path / "raw" / "bybit" / "bybit.linear").__len__() == 2
