"""Break real captures one frame at a time: what is lost, repeated or swapped is found, and no frame raises."""

import gzip
import random
from collections import Counter

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wires2_cases import FEEDS, Reference, feed, load, make

from tradebook.market.events import check_events
from tradebook.market.instruments import Instrument
from tradebook.venue.bingx import BingxDecoder
from tradebook.venue.captures import read_lines
from tradebook.venue.kraken import KrakenDecoder, kraken_checksum
from tradebook.venue.ladder import Ladder
from tradebook.venue.venues import VENUES, answer_to, feeds_for, venue_rows
from tradebook.venue.wire import WireCode

NUMBERED = ("krakenfutures", "kucoin")
SUMMED = {"kraken": 10, "okx": 25}
BARE = ("coinbase", "bybit_v2")


@pytest.fixture(params=sorted(FEEDS))
def wire(request, recordings):
    "Name, items and instruments of one capture"
    return request.param, *load(request.param, recordings / "wire")


def book_places(items, instruments, n, seed):
    "Places of n changes in the later part of a capture that have a successor of the same market"
    places = [i for i, item in enumerate(items) if item.id in instruments and not item.is_snapshot]
    last = {items[i].id: i for i in places}
    places = [i for i in places[len(places) // 4 :] if i != last[items[i].id] and items[i].levels]
    return random.Random(seed).sample(places, n)


def successor(items, i):
    "Place of the next change of the same market"
    return next(
        k for k in range(i + 1, len(items)) if items[k].id == items[i].id and not items[k].rest
    )


def own(items, place):
    "The book frames of one market alone, the place among them, and the next change's place"
    mine = [item for item in items if item.id == items[place].id]
    i = mine.index(items[place])
    return mine, i, successor(mine, i)


def replay(name, items, instruments):
    "Codes of the book messages of each item, and the decoder"
    decoder = make(name, instruments)
    return [[d for d in feed(decoder, item) if d.stream == "book"] for item in items], decoder


def events_of(told):
    "All events of a replay"
    return np.concatenate([d.events for part in told for d in part])


# --- one frame is lost


@pytest.mark.recordings
@pytest.mark.parametrize("name", NUMBERED)
def test_a_lost_change_of_a_numbered_book_shows_at_the_next_one(recordings, name):
    items, instruments = load(name, recordings / "wire")
    for i in book_places(items, instruments, 6, 1):
        told, decoder = replay(name, items[:i] + items[i + 1 :], instruments)
        (found,) = told[successor(items, i) - 1]
        assert (found.code, found.action, len(found.events)) == (WireCode.SEQ_GAP, "resync", 1)
        assert decoder.counts[WireCode.SEQ_GAP] == 1
        assert not decoder.lines[items[i].id].is_alive
        assert all(line.is_alive for id, line in decoder.lines.items() if id != items[i].id)
        later = [
            d for part in told[successor(items, i) :] for d in part if d.symbol == found.symbol
        ]
        assert all(d.code == WireCode.NO_BOOK and not len(d.events) for d in later)
        for of in instruments.values():
            check_events(
                np.concatenate([d.events for part in told for d in part if d.symbol == of.symbol])
            )


@pytest.mark.recordings
@pytest.mark.parametrize("name", SUMMED)
def test_no_book_is_believed_whose_summed_levels_are_wrong(recordings, name):
    "A loss behind the summed levels may hide; a wrong level among them never does"
    items, instruments = load(name, recordings / "wire")
    depth, n_found = SUMMED[name], 0
    for i in book_places(items, instruments, 16, 2):
        id, decoder, truth = items[i].id, make(name, instruments), Reference()
        for k, item in enumerate(items):
            if item.id != id:
                continue
            truth.apply(item)
            if k == i:
                continue
            feed(decoder, item)
            if k > i and decoder.lines[id].is_alive:
                for side in (0, 1):
                    ours = [(float(p), float(s)) for p, s in decoder.ladders[id].top(side, depth)]
                    assert ours == [(float(p), float(s)) for p, s in truth.top(id, side, depth)]
        n_found += decoder.counts[WireCode.CHECKSUM_BAD] == 1
        assert decoder.counts[WireCode.CHECKSUM_BAD] <= 1
    assert n_found >= 8, n_found


@pytest.mark.recordings
@pytest.mark.parametrize("name", BARE)
def test_some_losses_of_a_bare_book_show_by_contradiction(recordings, name):
    "No promise is made here: this test says how much may be hoped for within half a minute"
    items, instruments = load(name, recordings / "wire")
    places = book_places(items, instruments, 40, 3)
    n_found = 0
    for i in places:
        mine = [item for item in items if item.id == items[i].id]
        told, decoder = replay(name, [m for m in mine if m is not items[i]], instruments)
        n_found += decoder.counts[WireCode.SEQ_GAP] == 1
        assert decoder.counts[WireCode.SEQ_GAP] <= 1
    assert n_found >= {"coinbase": 7, "bybit_v2": 15}[name], n_found


# --- one frame comes twice


def test_a_repeat_is_dropped_and_told(wire):
    name, items, instruments = wire
    whole, _ = replay(name, items, instruments)
    for i in book_places(items, instruments, 2, 4):
        twice = items[: i + 1] + [items[i]] + items[i + 1 :]
        told, decoder = replay(name, twice, instruments)
        assert told[i + 1][0].code == WireCode.SEQ_DUP and not len(told[i + 1][0].events)
        assert (events_of(told) == events_of(whole)).all()
        assert decoder.counts[WireCode.SEQ_GAP] == 0


# --- two frames change places


@pytest.mark.recordings
@pytest.mark.parametrize("name", ("krakenfutures", "kucoin", "bybit_v2"))
def test_a_swap_is_a_gap_at_the_first_of_the_two(recordings, name):
    items, instruments = load(name, recordings / "wire")
    for place in book_places(items, instruments, 10, 5):
        mine, i, k = own(items, place)
        swapped = mine[:i] + [mine[k]] + mine[i + 1 : k] + [mine[i]] + mine[k + 1 :]
        told, decoder = replay(name, swapped, instruments)
        assert decoder.counts[WireCode.SEQ_GAP] == 1
        at = i if name in NUMBERED or told[i][0].code else k
        assert told[at][0].code == WireCode.SEQ_GAP


@pytest.mark.recordings
@pytest.mark.parametrize("name", ("kraken", "coinbase"))
def test_a_swap_shows_by_the_venues_time(recordings, name):
    items, instruments = load(name, recordings / "wire")
    n_found = 0
    for place in book_places(items, instruments, 20, 6):
        mine, i, k = own(items, place)
        swapped = mine[:i] + [mine[k]] + mine[i + 1 : k] + [mine[i]] + mine[k + 1 :]
        told, decoder = replay(name, swapped, instruments)
        codes = {d.code for part in (told[i], told[k]) for d in part}
        found = codes & {WireCode.SEQ_GAP, WireCode.CHECKSUM_BAD}
        first, second = (orjson.loads(mine[x].frame) for x in (i, k))
        if name == "coinbase" and first["time"] == second["time"]:
            continue  # nothing tells them apart, and their order tells nothing
        assert found
        n_found += 1
    assert n_found >= 10


# --- frames that are broken


def broken(rng, frame):
    "One of many ways to break a frame"
    data, i = bytearray(frame), rng.randrange(len(frame))
    way = rng.randrange(8)
    if way == 0:
        return bytes(data[:i])
    if way == 1:
        data[i] = rng.randrange(256)
    elif way == 2:
        data[i:i] = rng.randbytes(rng.randrange(1, 9))
    elif way == 3:
        del data[i : i + rng.randrange(1, 30)]
    elif way == 4:
        k = rng.randrange(len(frame))
        data[i:i] = data[k : k + rng.randrange(1, 60)]
    else:
        words = (
            b"null",
            b"-1",
            b"1e999",
            b'"NaN"',
            b"[]",
            b"{}",
            b"99999999999999999999",
            b'""',
            b"true",
            b'"\xff"',
        )
        digits = [m for m in range(len(data)) if 48 <= data[m] <= 57 or data[m] in b'[]{}":,']
        at = rng.choice(digits) if digits else i
        data[at : at + rng.randrange(1, 12)] = rng.choice(words)
    return bytes(data)


def shaken(rng, value):
    "Valid JSON with one thing in it replaced"
    if type(value) in (list, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value)) if type(value) is dict else rng.randrange(len(value))
        value = value.copy()
        if rng.random() < 0.05:
            value.pop(key)
        else:
            value[key] = shaken(rng, value[key])
        return value
    return rng.choice(
        [
            None,
            -1,
            0,
            1.5,
            2**63,
            "",
            "x",
            "-0.1",
            "1e5",
            "0",
            [],
            {},
            [[]],
            [["1"]],
            True,
            "9" * 30,
        ]
    )


@pytest.mark.recordings
def test_no_broken_frame_raises_or_is_lost(wire):
    "Eight thousand broken frames a wire, and what comes out can always be stored"
    name, items, instruments = wire
    rng, codes = random.Random(name), Counter()
    frames = [item for item in items if len(item.frame) < 3_000 and not item.rest]
    snapshots = [item for item in items if item.is_snapshot]
    decoder = make(name, instruments)
    for n in range(8_000):
        if n % 200 == 0:
            for item in snapshots[:3]:
                feed(decoder, item)
        item = rng.choice(frames)
        if n % 2:
            frame = broken(rng, item.frame)
        else:
            frame = orjson.dumps(shaken(rng, orjson.loads(item.frame)))
        told = decoder.decode(frame, 10**18 + n)
        assert told, frame
        codes.update(str(d.code) for d in told)
        for d in told:
            check_events(d.events)
            assert d.symbol == "" or d.symbol in {of.symbol for of in instruments.values()}
    assert codes["FRAME_MALFORMED"] > 1_200 and codes["UNKNOWN_SYMBOL"] > 10


@pytest.mark.recordings
def test_no_broken_snapshot_raises(recordings):
    items, instruments = load("kucoin", recordings / "wire")
    rng = random.Random(9)
    bodies = [item for item in items if item.rest]
    for n in range(600):
        decoder, item = make("kucoin", instruments), rng.choice(bodies)
        body = (
            broken(rng, item.frame)
            if n % 2
            else orjson.dumps(shaken(rng, orjson.loads(item.frame)))
        )
        for d in decoder.snapshot(item.rest, body, 10**18):
            check_events(d.events)
            assert d.code in ("", "OFF_GRID") or d.action == "resync"
    assert make("kucoin", instruments).snapshot("DOGE", b"{}", 1)[0].code == WireCode.UNKNOWN_SYMBOL


def test_an_unreadable_frame_ends_unnumbered_books_only(wire):
    "Where no number would ever reveal the loss"
    name, items, instruments = wire
    decoder = make(name, instruments)
    for item in items[: len(items) // 2]:
        feed(decoder, item)
    alive = [id for id, line in decoder.lines.items() if line.is_alive]
    told = decoder.decode(b'{"half a fra', items[-1].ts)
    still = [id for id, line in decoder.lines.items() if line.is_alive]
    assert told[0].code == WireCode.FRAME_MALFORMED and len(alive) > 2
    if name in ("okx", *NUMBERED):
        assert still == alive and len(told) == 1
    else:
        assert still == [] and [d.action for d in told[1:]] == ["resync"] * len(alive)


def test_after_a_reset_nothing_is_applied_before_a_snapshot(wire):
    name, items, instruments = wire
    decoder, half = make(name, instruments), len(items) // 2
    for item in items[:half]:
        feed(decoder, item)
    decoder.reset()
    for item in items[half:]:
        for d in feed(decoder, item):
            assert d.stream != "book" or (d.code == WireCode.NO_BOOK and not len(d.events))


# --- parts


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(1, 30), st.integers(0, 2)), max_size=80),
    st.integers(1, 12),
)
def test_a_ladder_is_a_sorted_dictionary(changes, depth):
    ladder, plain = Ladder(), ({}, {})
    for side, ticks, lots in changes:
        was_there = ladder.put(side, ticks, str(ticks), str(lots), lots)
        assert was_there == (ticks in plain[side])
        plain[side].pop(ticks, None)
        if lots:
            plain[side][ticks] = str(lots)
    best = [sorted(plain[0], reverse=True), sorted(plain[1])]
    for side in (0, 1):
        assert ladder.top(side, 99) == [(str(t), plain[side][t]) for t in best[side]]
    assert ladder.is_crossed == bool(best[0] and best[1] and best[0][0] >= best[1][0])
    assert sorted(ladder.trim(depth)) == sorted((s, t) for s in (0, 1) for t in best[s][depth:])
    assert [len(ladder.top(side, 99)) for side in (0, 1)] == [min(depth, len(b)) for b in best]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.integers(1, 25), st.integers(0, 3)), min_size=1, max_size=60
    )
)
def test_kraken_keeps_the_window_that_the_venue_keeps(changes):
    "The venue's book of depth 5 against ours, through made frames; levels that come back are sent again"
    of = Instrument("kraken", "X/USD", 1.0, 1.0, 0.0, 0.0)
    decoder, whole, depth = KrakenDecoder({"X/USD": of}), ({}, {}), 5
    frames = [[1, {"as": [], "bs": []}, f"book-{depth}", "X/USD"]]
    shown = ({}, {})
    for n, (side, ticks, lots) in enumerate(changes):
        price = ticks if side == 0 else ticks + 25
        whole[side].pop(price, None)
        if lots:
            whole[side][price] = lots
        best = sorted(whole[side], reverse=side == 0)[:depth]
        window = {p: whole[side][p] for p in best}
        gone = [p for p in shown[side] if p not in whole[side]]
        rows = [[str(p), "0", f"{n + 1}.5"] for p in gone]
        rows += [
            [str(p), str(s), f"{n + 1}.5"] for p, s in window.items() if shown[side].get(p) != s
        ]
        shown[side].clear()
        shown[side].update(window)
        if not rows:
            continue
        mirror = Ladder()
        for k in (0, 1):
            for p, s in shown[k].items():
                mirror.put(k, p, str(p), str(s), s)
        frames.append(
            [1, {"ba"[side]: rows, "c": str(kraken_checksum(mirror))}, f"book-{depth}", "X/USD"]
        )
    told = [d for i, f in enumerate(frames) for d in decoder.decode(orjson.dumps(f), i + 1)]
    assert not decoder.counts
    levels = {}
    for e in np.concatenate([d.events for d in told]):
        key = (e["side"] < 0, int(e["price_ticks"]))
        levels.pop(key, None)
        if e["size_lots"]:
            levels[key] = int(e["size_lots"])
    assert levels == {(bool(k), p): s for k in (0, 1) for p, s in shown[k].items()}


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_bingx_reads_any_bytes_packed_or_not(junk):
    decoder = BingxDecoder({"BTC-USDT": Instrument("bingx", "BTC/USDT", 0.1, 1e-6, 0.0, 0.0)})
    for frame in (junk, gzip.compress(junk), b"\x1f\x8b" + junk):
        assert decoder.decode(frame, 1)
        answer_to(VENUES["bingx.spot"], frame)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=80), max_size=5))
def test_capture_lines_are_never_skipped(lines):
    lines = [line.replace(b"\n", b"").replace(b"\r", b"") for line in lines]
    assert len(list(read_lines(lines))) == sum(bool(line) for line in lines)


def test_every_feed_can_be_asked_and_decoded():
    symbols = {"spot": "BTC/USDT", "linear": "BTC/USDT:USDT", "inverse": "BTC/USD:BTC"}
    for name, spec in VENUES.items():
        for kind in spec.kinds:
            assert feeds_for(name, [symbols[kind]]) == {name: [symbols[kind]]}
            id = spec.name_of(symbols[kind])
            of = Instrument(spec.venue, symbols[kind], 0.1, 0.001, 0.0, 0.0)
            decoder = spec.make_decoder({id: of})
            assert decoder.decode(b"}", 1)[0].code == WireCode.FRAME_MALFORMED
            for frame in spec.subscribe([id, "OTHER"], spec.topics):
                assert orjson.loads(frame) and "{" not in frame[1:2]
        assert (spec.snapshot == "") == ("REST" not in spec.guarantees.snapshot_rule)
    rows = venue_rows()
    assert len(rows) == len(VENUES) + 1 and all(row.keys() == rows[0].keys() for row in rows)
    assert all(isinstance(value, str | list) for row in rows for value in row.values())
