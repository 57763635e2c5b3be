"""Planted faults are found by name, clean markets have none, holes have causes, a market of holes is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tradebook.base.errors import DataError, ReportError
from tradebook.base.settings import load_settings
from tradebook.market.coverage import (
    Hole,
    Incident,
    cover_hours,
    covered_share,
    explain_holes,
    find_holes,
    incidents_path,
    list_days,
    read_incidents,
    require_coverage,
)
from tradebook.market.data_checks import BOUNDS, new_watch, watch_events, watch_findings
from tradebook.market.events import (
    FLAG_LAST,
    KIND_CLEAR,
    KIND_GAP,
    KIND_LEVEL,
    KIND_TRADE,
    make_events,
    message_starts,
)
from tradebook.market.market_checks import check_market
from tradebook.market.part_files import stamps_path
from tradebook.market.snapshots import read_snapshots
from tradebook.market.store import Store
from tradebook.market.synthetic import synthetic_market
from tradebook.ops.cli import app
from tradebook.ops.quality import calendar_rows
from tradebook.ops.runner import run_report

S = 10**9
DAY = 86_400 * S


@pytest.fixture(scope="module")
def made():
    "Twenty minutes of a clean market"
    return synthetic_market(seed=11, duration_s=1200)


@pytest.fixture(scope="module")
def real(recordings):
    "The first hours of a real day: polled books of twenty levels, unnumbered, with trades"
    names = [
        recordings / f"standx/BTC-USD_{what}_2026-01-06.parquet" for what in ("book20", "trades")
    ]
    got = read_snapshots(*names)
    events = got.events[:300_000]
    return events[: np.flatnonzero(events["flags"] & FLAG_LAST)[-1] + 1], got.instrument


def findings(*pieces):
    "Findings by code, of events handed over in pieces"
    watch = new_watch()
    for events in pieces:
        watch_events(watch, events)
    return {f.code: f for f in watch_findings(watch)}


def split(events):
    "Whole messages"
    return np.split(events, message_starts(events)[1:])


def message_of(events, kind, after):
    "First and last row of a message of one kind, with two rows at least for a book, behind a row"
    starts = message_starts(events)
    for a, b in zip(starts, np.append(starts[1:], len(events)), strict=True):
        if a > after and events["kind"][a] == kind and (kind == KIND_TRADE or b - a > 1):
            return int(a), int(b)
    raise AssertionError("no such message")


def shifted(rows, seconds):
    "The same rows, received later"
    out = rows.copy()
    out["ts_recv"] += round(seconds * S)
    return out


def with_prices(rows, factor):
    "The same rows at other prices"
    out = rows.copy()
    out["price_ticks"] = (out["price_ticks"] * factor).astype(int)
    return out


# Each takes clean events and gives broken ones, with the code that must be found


def lose_a_stretch(e):
    t = (e["ts_recv"] - e["ts_recv"][0]) / S
    return e[(t < 300) | (t > 375)]


def lose_a_message(e):
    a, b = message_of(e, KIND_LEVEL, len(e) // 2)
    return np.concatenate([e[:a], e[b:]])


def book_twice(e):
    a, b = message_of(e, KIND_LEVEL, len(e) // 2)
    return np.concatenate([e[:b], e[a:b], e[b:]])


def trade_twice(e):
    a, b = message_of(e, KIND_TRADE, len(e) // 2)
    again = e[a:b].copy()
    at = b + int(message_starts(e[b:])[30])  # thirty messages later
    again["ts_recv"] = e["ts_recv"][at]
    return np.concatenate([e[:at], again, e[at:]])


def swap(e):
    a, b = message_of(e, KIND_LEVEL, len(e) // 2)
    c, d = message_of(e, KIND_LEVEL, b - 1)
    first, second = e[a:b].copy(), e[c:d].copy()
    first["ts_recv"], second["ts_recv"] = second["ts_recv"][0], first["ts_recv"][0]
    return np.concatenate([e[:a], second, e[b:c], first, e[d:]])


def time_goes_back(e):
    a, b = message_of(e, KIND_TRADE, len(e) // 2)
    out = e.copy()
    out["ts_event"][a:b] -= 5 * S
    return out


def level_at(e, side, ticks):
    "Put a level into the book in a message of its own, half way"
    a, b = message_of(e, KIND_LEVEL, len(e) // 2)
    row = {name: e[name][b - 1] for name in ("ts_recv", "ts_event")}
    row |= {"kind": KIND_LEVEL, "side": side, "price_ticks": ticks, "size_lots": 9}
    return np.concatenate([e[:b], make_events(**row, flags=FLAG_LAST), e[b:]])


def cross(e):
    return level_at(e, 1, int(e["price_ticks"][e["kind"] == KIND_LEVEL].max()) + 50)


def lock(e):
    "A snapshot whose bid was rounded up to the ask"
    a, b = message_of(e, KIND_LEVEL, len(e) // 2)
    row = {name: e[name][b - 1] for name in ("ts_recv", "ts_event")}
    kinds, sides = [KIND_CLEAR, KIND_LEVEL, KIND_LEVEL], [0, 1, -1]
    row |= {"price_ticks": [0, 600_000, 600_000], "size_lots": [0, 5, 5]}
    return np.concatenate(
        [e[:b], make_events(**row, kind=kinds, side=sides, flags=[0, 0, FLAG_LAST]), e[b:]]
    )


def freeze(e):
    "The book's messages stop for half a minute; trades go on; then a snapshot makes it whole again"
    t = (e["ts_recv"] - e["ts_recv"][0]) / S
    return e[~((t > 300) & (t < 330) & (e["kind"] != KIND_TRADE))]


def freeze_in_place(e):
    "The best prices stand, while the messages go on with new times"
    t = (e["ts_recv"] - e["ts_recv"][0]) / S
    is_book = (t > 300) & (t < 330) & (e["kind"] != KIND_TRADE)
    out = e.copy()
    out["side"][is_book], out["price_ticks"][is_book], out["size_lots"][is_book] = 1, 1, 1
    return out


def jump(e):
    end = int(e["ts_recv"][-1])
    return np.concatenate(
        [e, with_prices(synthetic_market(seed=4, duration_s=60, start_ns=end).events, 1.02)]
    )


def set_clock(e):
    out = e.copy()
    out["ts_event"][len(e) // 2 :] += 2 * S
    return out


def slow_clock(e):
    out = e.copy()
    out["ts_event"][len(e) // 2 :] -= 2 * S
    return out


def no_asks(e):
    return e[~((e["side"] < 0) & (e["kind"] == KIND_LEVEL))]


def declare(e):
    t = (e["ts_recv"] - e["ts_recv"][0]) / S
    before, after = e[t < 300], e[t > 900]
    lost = after["ts_recv"][0] - before["ts_recv"][-1]
    hole = make_events(ts_recv=after["ts_recv"][0], kind=KIND_GAP, size_lots=lost, flags=FLAG_LAST)
    return np.concatenate([before, hole, after])


PLANTED = {
    lose_a_stretch: "SILENT",
    lose_a_message: "SKIPPED",
    book_twice: "DUPLICATED",
    trade_twice: "DUPLICATED",
    swap: "OUT_OF_ORDER",
    time_goes_back: "OUT_OF_ORDER",
    cross: "CROSSED",
    lock: "LOCKED",
    freeze: "FROZEN",
    freeze_in_place: "FROZEN",
    jump: "PRICE_STEP",
    set_clock: "NEGATIVE_LATENCY",
    slow_clock: "CLOCK_DRIFT",
    no_asks: "EMPTY_SIDE",
    declare: "MISSING",
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda f: f.__name__)
def test_each_planted_fault_is_found_by_name(made, plant):
    found = findings(plant(made.events))
    code = PLANTED[plant]
    assert code in found, found
    finding = found[code]
    assert finding.count >= 1 and finding.worst_utc.startswith("2025-01-06T00:")
    assert 0 < finding.share <= 1


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_clean_market_has_no_finding(seed):
    assert findings(synthetic_market(seed=seed, duration_s=3600).events) == {}


def test_single_faults_are_counted_one_by_one(made):
    assert findings(book_twice(made.events))["DUPLICATED"].count == 1
    assert findings(trade_twice(made.events))["DUPLICATED"].count == 1
    assert set(findings(book_twice(made.events))) == {"DUPLICATED"}
    assert findings(swap(made.events))["OUT_OF_ORDER"].count == 1
    assert set(findings(lose_a_message(made.events))) <= {"SKIPPED", "CROSSED"}
    assert findings(lose_a_message(made.events))["SKIPPED"].count == 1
    assert findings(time_goes_back(made.events))["OUT_OF_ORDER"].worst > 4_000
    assert 74 < findings(lose_a_stretch(made.events))["SILENT"].worst < 76
    assert 1_900 < findings(slow_clock(made.events))["CLOCK_DRIFT"].worst < 2_100


def test_a_restart_of_the_numbers_behind_a_snapshot_is_no_fault(made):
    later = synthetic_market(seed=12, duration_s=300, start_ns=int(made.events["ts_recv"][-1]))
    found = findings(made.events, later.events)
    assert "SKIPPED" not in found and "DUPLICATED" not in found
    assert found["OUT_OF_ORDER"].count == 1  # of the trades, which have no snapshot


@settings(max_examples=12, deadline=None)
@given(cuts=st.lists(st.floats(0, 1), max_size=6))
def test_pieces_make_no_difference(made_small, cuts):
    "A file is judged the same however it is cut, in the middle of a message too"
    at = sorted(int(c * len(made_small)) for c in cuts)
    assert findings(*np.split(made_small, at)) == findings(made_small)


@pytest.fixture(scope="module")
def made_small():
    "Some faults in a few minutes"
    e = synthetic_market(seed=5, duration_s=240).events
    return cross(book_twice(set_clock(e)))


def test_a_real_recording_and_what_is_planted_in_it(real):
    events, _ = real
    clean = findings(events)
    assert set(clean) == {"MISSING", "LOCKED"}  # it stalls, and its prices are rounded
    t = (events["ts_recv"] - events["ts_recv"][0]) / S
    is_stretch = (t > 3600) & (t < 3700)
    assert findings(events[~is_stretch])["SILENT"].count == 1
    assert 95 < findings(events[~is_stretch])["SILENT"].worst < 105
    early = events.copy()
    early["ts_event"][t > 5000] += 20 * S
    assert findings(early)["NEGATIVE_LATENCY"].severity == "fail"
    assert "CLOCK_DRIFT" in findings(early)
    frozen = findings(events[~((t > 4000) & (t < 4060) & (events["kind"] != KIND_TRADE))])
    assert frozen["FROZEN"].count >= 1
    half = events.copy()
    half["price_ticks"] = np.where(t > 5000, half["price_ticks"] * 11 // 10, half["price_ticks"])
    stepped = set(findings(half)) - set(clean)
    assert stepped & {"PRICE_STEP", "CROSSED"}
    bids = (events["side"] > 0) & (events["kind"] == KIND_LEVEL) & (t > 5000) & (t < 5060)
    high = events.copy()
    high["price_ticks"][bids] += 500
    assert findings(high)["CROSSED"].count > 10


def test_repeated_books_of_a_real_recording(real):
    "Every book message twice: each but the snapshots is found, no trade is blamed"
    events, _ = real
    doubled, n = [], 0
    for message in split(events)[:12_000]:
        is_book = message["kind"][-1] == KIND_LEVEL and KIND_CLEAR not in message["kind"]
        doubled += [message, message] if is_book else [message]
        n += is_book
    assert findings(np.concatenate(doubled))["DUPLICATED"].count == n


# Holes and their causes


def brute_coverage(holes, start, stop):
    "The slow way: second by second"
    seen = np.ones(stop - start, bool)
    for h in holes:
        seen[max(h.start_ns - start, 0) : max(h.end_ns - start, 0)] = False
    return seen.mean()


spans = st.tuples(st.integers(0, 200), st.integers(1, 60)).map(lambda t: (t[0], t[0] + t[1]))


@given(st.lists(spans, max_size=8), spans)
def test_coverage_equals_the_slow_way(pairs, window):
    holes = [Hole(*p) for p in pairs]
    assert covered_share(holes, *window) == pytest.approx(brute_coverage(holes, *window))


@given(st.lists(spans, max_size=8), st.lists(spans, max_size=8), st.integers(0, 20))
def test_every_hole_is_explained_by_exactly_the_incidents_it_touches(holes, incidents, tolerance):
    codes = [Incident(*span, f"C{n}") for n, span in enumerate(incidents)]
    explained = explain_holes([Hole(*h) for h in holes], codes, tolerance)
    assert [(e.start_ns, e.end_ns) for e in explained] == sorted(holes)
    for e in explained:
        near = {
            i.code
            for i in codes
            if i.start_ns - tolerance <= e.end_ns and i.end_ns + tolerance >= e.start_ns
        }
        assert set(e.codes) == near and len(e.codes) == len(near)


def test_the_incident_that_shares_most_time_comes_first():
    incidents = [Incident(0, 11 * S, "EARLY", "a"), Incident(11 * S, 20 * S, "LONG", "b")]
    (hole,) = explain_holes([Hole(10 * S, 20 * S)], incidents, 0)
    assert (hole.codes, hole.detail) == (("LONG", "EARLY"), "b")


def test_incidents_survive_what_a_crash_leaves(tmp_path):
    path = tmp_path / "x.jsonl"
    good = {"ts_ns": 5, "until_ns": 9, "symbol": "S", "code": "STOPPED", "detail": "by hand"}
    lasting = {"ts_ns": 7, "until_ns": None, "code": "DISK_FULL"}
    bad = [
        "[1]",
        "null",
        '{"ts_ns": 1}',
        '{"ts_ns": 9, "until_ns": 1, "code": "X"}',
        '{"ts_',
        "\x00\x00",
    ]
    path.write_text("\n".join([json.dumps(good), *bad[:3], "", json.dumps(lasting), *bad[3:]]))
    found, refused = read_incidents(path)
    assert [i.code for i in found] == ["STOPPED", "DISK_FULL"] and refused == bad
    assert explain_holes([Hole(10**18, 2 * 10**18)], found, 0)[0].codes == ("DISK_FULL",)


def test_a_day_without_a_file_is_a_hole_and_a_row(tmp_path, made):
    store, start = Store(tmp_path / "market"), int(made.truth["ts"][0])
    for day in (0, 3):
        rows = synthetic_market(seed=day, duration_s=120, start_ns=start + day * DAY)
        store.write(rows.events, rows.instrument, f"day {day}")
    market = (made.instrument.venue, made.instrument.symbol)
    assert store.coverage(*market) == 1.0  # what made the other one necessary
    (hole,) = find_holes(store.parts(*market))
    assert not hole.is_declared and hole.length_ns > 2.9 * DAY
    days = list_days(store)
    assert [d["n_events"] > 0 for d in days] == [True, False, False, True]
    assert [d["coverage"] for d in days][1:3] == [0, 0]
    assert len(cover_hours([hole], start, start + 3 * DAY)) == 72
    assert {f.code for f in check_market(store, *market).findings} == {"MISSING"}


# A store, its files, the verbs


@pytest.fixture
def root(tmp_path, made):
    "A data root: one market, with a hole of ten minutes"
    Store(tmp_path / "market").write(declare(made.events), made.instrument, "test")
    return tmp_path


def call(root, *words):
    "The command line, in this process"
    return CliRunner().invoke(app, [*words, "--data", str(root)])


def write_incident(root, of, hole, code="WS_SILENT"):
    path = incidents_path(root, of.venue, of.symbol)
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {"ts_ns": hole.start_ns, "until_ns": hole.end_ns, "symbol": of.symbol, "code": code}
    path.write_text(json.dumps(row | {"detail": "no message"}) + "\n")


def test_check_tells_which_incident_explains_a_hole(root, made):
    of = made.instrument
    before = json.loads(call(root, "data", "check", "--json").stdout)["markets"][0]
    assert (before["n_unexplained"], before["n_incidents"], before["causes"]) == (1, 0, {"": 1})
    (hole,) = find_holes(Store(root / "market").parts())
    write_incident(root, of, hole)
    done = call(root, "data", "check", "--json")
    after = json.loads(done.stdout)["markets"][0]
    assert (after["n_unexplained"], after["causes"]) == (0, {"WS_SILENT": 1})
    assert after["holes"][0]["codes"] == ["WS_SILENT"] and done.exit_code == 6
    far = Hole(hole.end_ns + 60 * S, hole.end_ns + 70 * S)
    write_incident(root, of, far, "STOPPED")
    codes = [
        f["code"]
        for f in json.loads(call(root, "data", "check", "--json").stdout)["markets"][0]["findings"]
    ]
    assert "UNEXPLAINED" in codes
    text = call(root, "data", "check").stdout
    assert "unexplained" in text and "600" in text and "MISSING" in text


def test_exit_codes_of_check(tmp_path, made):
    store = Store(tmp_path / "market")
    store.write(book_twice(made.events), made.instrument, "one message twice")
    assert call(tmp_path, "data", "check").exit_code == 0
    done = call(tmp_path, "data", "check", "--strict", "--json")
    found = json.loads(done.stdout)
    assert (done.exit_code, found["severity"], found["ok"]) == (6, "warn", False)
    assert [f["code"] for f in found["markets"][0]["findings"]] == ["DUPLICATED"]
    assert (
        call(tmp_path, "data", "check", "--to", "2025-01-06T00:05:00Z", "--strict").exit_code == 0
    )
    assert call(tmp_path, "data", "check", "--symbol", "SYN/USDT").exit_code == 3
    assert call(tmp_path / "nowhere", "data", "list").exit_code == 3


@pytest.mark.parametrize(
    ("harm", "code"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-50]), "UNREADABLE"),
        (lambda path: path.unlink(), "UNREADABLE"),
        (lambda path: path.write_bytes(b""), "UNREADABLE"),
        (lambda path: stamps_path(path).unlink(), "UNREADABLE"),
        ("other rows", "HASH"),
    ],
)
def test_damaged_files_are_named_and_the_rest_is_still_checked(tmp_path, made, harm, code):
    store, of = Store(tmp_path / "market"), made.instrument
    first = synthetic_market(seed=1, duration_s=60, start_ns=int(made.truth["ts"][0]) - 100 * S)
    store.write(first.events, of, "first")
    store.write(made.events, of, "second")
    parts = store.parts()
    files = [store.day(p.venue, p.symbol, p.date) / p.file for p in parts]
    if harm == "other rows":
        for of_part in (Path, stamps_path):
            shutil.copy(of_part(files[-1]), of_part(files[0]))
    else:
        harm(files[0])
    checked = check_market(store, of.venue, of.symbol)
    assert checked.severity == "fail"
    (finding,) = [f for f in checked.findings if f.code == code]
    assert parts[0].file in finding.detail
    assert checked.facts["n_events"] >= len(made.events)
    assert call(tmp_path, "data", "list").exit_code == 0


def test_list_has_what_was_promised(root, made):
    rows = json.loads(call(root, "data", "list", "--json").stdout)["days"]
    assert len(rows) == 1
    row = rows[0]
    rows_stored = declare(made.events)
    assert row["n_events"] == len(rows_stored)
    assert row["n_messages"] == int((rows_stored["flags"] & FLAG_LAST).astype(bool).sum())
    assert row["coverage"] == pytest.approx(0.5, abs=0.01) and row["n_holes"] == 1
    assert row["longest_hole_s"] == pytest.approx(600, abs=1)
    assert row["bytes_per_message"] == pytest.approx(row["n_bytes"] / row["n_messages"])
    assert "test" in call(root, "data", "list").stdout


def test_list_and_check_of_real_days(tmp_path, recordings):
    names = [
        recordings / f"standx/BTC-USD_{what}_2026-01-06.parquet" for what in ("book20", "trades")
    ]
    got = read_snapshots(*names)
    Store(tmp_path / "market").write(got.events, got.instrument, "standx")
    found = json.loads(call(tmp_path, "data", "check", "--json").stdout)
    (market,) = found["markets"]
    assert found["code"] == 6 and market["n_events"] == len(got.events)
    assert market["coverage"] == pytest.approx(0.773, abs=0.002)
    assert {f["code"] for f in market["findings"] if f["severity"] == "fail"} == {
        "MISSING",
        "LOCKED",
    }


# The floor


def test_training_on_holes_is_refused_by_name_with_the_holes_listed(tmp_path, made):
    pieces, of = [], made.instrument
    for n in range(14):  # a minute in ten, so fourteen pieces and thirteen holes
        rows = synthetic_market(
            seed=n, duration_s=60, start_ns=int(made.truth["ts"][0]) + n * 600 * S
        )
        if pieces:
            hole = rows.events["ts_recv"][0] - pieces[-1]["ts_recv"][-1]
            gap = {"ts_recv": rows.events["ts_recv"][0], "kind": KIND_GAP, "size_lots": hole}
            pieces.append(make_events(**gap, flags=FLAG_LAST))
        pieces.append(rows.events)
    Store(tmp_path / "market").write(np.concatenate(pieces), of, "a minute in ten")
    for verb in ("train", "backtest"):
        done = call(tmp_path, verb)
        assert done.exit_code == 3, done.output
        for told in ("synthetic SYN/USDT:USDT", "data.min_coverage", "13 holes", "and 3 more"):
            assert told in done.stderr
        assert done.stderr.count(" to 2025-01-06T") == 11  # the window and ten holes
    store = Store(tmp_path / "market")
    assert 0.05 < require_coverage(store, of.venue, of.symbol, None, None, 0.05) < 0.15
    with pytest.raises(DataError, match="1 hole, longest first") as caught:
        start = int(made.truth["ts"][0])
        require_coverage(store, of.venue, of.symbol, start, start + 602 * S, 0.99)
    assert "540." in str(caught.value)


def test_the_default_floor_lets_the_recordings_pass(recordings, tmp_path):
    names = [
        recordings / f"standx/BTC-USD_{what}_2026-01-06.parquet" for what in ("book20", "trades")
    ]
    got = read_snapshots(*names)
    store = Store(tmp_path)
    store.write(got.events, got.instrument, "standx")
    floor = load_settings(environment={}).data.min_coverage
    share = require_coverage(store, got.instrument.venue, got.instrument.symbol, None, None, floor)
    assert floor < share < 0.8


def test_every_code_says_what_to_do():
    for code, bound in BOUNDS.items():
        assert code == code.upper() and bound.remedy and bound.meaning
        assert 0 <= bound.warn <= bound.fail <= 1


# The report


def test_report_says_what_the_check_says(root, made, tmp_path):
    (hole,) = find_holes(Store(root / "market").parts())
    write_incident(root, made.instrument, hole)
    done = run_report("data_quality", {"data": root}, out=tmp_path / "out")
    values = done.result["values"]
    assert values["verdict"]["status"] == "fail" and "MISSING" in values["verdict"]["detail"]
    assert {c["name"]: c["status"] for c in values["checks"]} == {
        "Coverage": "fail",
        "Causes": "pass",
        "Messages": "pass",
        "Book": "pass",
        "Clock": "pass",
        "Files": "pass",
    }
    page = done.html.read_text()
    assert "WS_SILENT" in page and "Coverage by day and hour" in page
    with pytest.raises(ReportError, match=r"unknown parameter 'symbols'.*did you mean 'symbol'"):
        run_report("data_quality", {"symbols": "x"}, out=tmp_path / "no")


def test_the_calendar_keeps_to_the_window_and_tells_markets_apart(made, tmp_path):
    store, hour_ns = Store(tmp_path), 3600 * S
    first = int(made.events["ts_recv"][0])
    for k, venue in enumerate(("one", "other")):
        events = made.events.copy()
        for name in ("ts_recv", "ts_event"):
            events[name] += k * 6 * hour_ns
        store.write(events, replace(made.instrument, venue=venue), venue)
    whole = calendar_rows(store)
    assert set(whole["row"].str.partition(" ")[0]) == {"one", "other"}
    cut = calendar_rows(store, first + hour_ns // 12, first + hour_ns // 6)
    assert len(cut) == 1 and cut["row"][0].startswith("one ") and cut["coverage"][0] == 1
    assert len(calendar_rows(store, first + 2 * hour_ns, first + 3 * hour_ns)) == 0
