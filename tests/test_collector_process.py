"""Recording as people run it: the command line in a process of its own, killed, started again, and through ccxt."""

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tradebook.base.errors import VenueError
from tradebook.collector.incidents import incident_file, read_incidents
from tradebook.collector.recorder import read_recorded
from tradebook.collector.segments import SUFFIX, read_segment
from tradebook.collector.session import Session, run_session
from tradebook.market.coverage import find_holes
from tradebook.market.events import KIND_GAP, check_events
from tradebook.market.store import Store
from tradebook.ops.answers import exit_code
from tradebook.venue.rehearsal_source import synthetic_listings

BTC, S = "BTC/USDT:USDT", 10**9
LISTINGS = synthetic_listings((BTC,), duration_s=60)


STARTED: list[subprocess.Popen] = []


def command(*words):
    "Start the command line"
    process = subprocess.Popen(
        [sys.executable, "-m", "tradebook", *map(str, words)], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    STARTED.append(process)
    return process


@pytest.fixture(autouse=True)
def nothing_is_left():
    "End what a failed test leaves behind"
    yield
    while STARTED:
        if (process := STARTED.pop()).poll() is None:
            process.kill()
            process.communicate()


@contextlib.contextmanager
def exchange(venue):
    "A rehearsal exchange in a process of its own; gives its address"
    process = command(
        "rehearse", "--venue", venue, "--port", 0, "--speed", "4x", "--for", "120s", "--json"
    )
    try:
        line = process.stderr.readline()
        if not line.startswith("{"):
            pytest.fail(line + process.stderr.read())
        yield json.loads(line)["url"]
    finally:
        process.terminate()
        process.communicate(timeout=20)


def recording(root, url, length, venue="bybit", symbols=BTC):
    words = ["--symbols", symbols, "--streams", "book,trade", "--for", length, "--at", url]
    more = ["--data", root, "--set", "collector.segment_s=86400", "--json"]
    return command("collect", "--venue", venue, *words, *more)


def wait_for(condition, seconds=40.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def has_begun(root, venue, n=200):
    "Tell whether some rows are on disk"
    return segments(root) and len(read_recorded(root, venue, BTC)) > n


def latest(root):
    "What happened last to the symbol, as the running collector tells it"
    status = json.loads(Path(root, "collector", "bybit.json").read_bytes())
    return status["feeds"][0]["symbols"][BTC]["latest"] or {}


def segments(root):
    return sorted(Path(root, "segments").rglob(f"*{SUFFIX}"))


def test_killed_at_any_moment_it_loses_a_second_at_most_and_goes_on_the_same_day(tmp_path):
    "CRASHED: files stay readable and are never overwritten, the hole says what it was"
    with exchange("bybit") as url:
        first = recording(tmp_path, url, "60s")
        wait_for(lambda: has_begun(tmp_path, "bybit"))
        time.sleep(1.5)
        killed_ns = time.time_ns()
        os.kill(first.pid, signal.SIGKILL)
        first.communicate(timeout=20)
        before = {path: hashlib.sha256(path.read_bytes()).digest() for path in segments(tmp_path)}
        kept = np.concatenate([read_segment(path)[0] for path in before])
        check_events(kept)
        lost_s = (killed_ns - int(kept["ts_recv"][-1])) / S
        assert lost_s < 2, f"{lost_s:.2f} s lost"  # one second, and one for a busy machine
        second = recording(tmp_path, url, "60s")
        wait_for(lambda: has_begun(tmp_path, "bybit", len(kept) + 200))
        still = {path: hashlib.sha256(path.read_bytes()).digest() for path in before}
        assert still == before
        second.send_signal(signal.SIGSTOP)  # a machine too busy to run it, or a laptop lid
        time.sleep(4)
        second.send_signal(signal.SIGCONT)
        wait_for(lambda: latest(tmp_path).get("code") == "STALLED")
        second.send_signal(signal.SIGTERM)  # what a supervisor sends
        out, err = second.communicate(timeout=60)
    assert second.returncode == 0, err
    assert json.loads(out)["is_ready"]
    store = Store(tmp_path / "market")
    rows = store.read("bybit", BTC)
    check_events(rows)
    assert (rows[: len(kept)] == kept).all()
    assert (rows["kind"] == KIND_GAP).sum() == 1 and rows["kind"][len(kept)] == KIND_GAP
    lines = read_incidents(incident_file(tmp_path, "bybit", BTC))
    assert [row["code"] for row in lines] == ["CRASHED", "STALLED", "STOPPED"]  # nothing torn
    (hole,) = find_holes(store.parts())
    assert (lines[0]["ts_ns"], lines[0]["until_ns"]) == (hole.start_ns, hole.end_ns)
    checked = command("data", "check", "--data", tmp_path, "--json")
    (market,) = json.loads(checked.communicate(timeout=60)[0])["markets"]
    assert market["n_holes"] == 1 and market["n_unexplained"] == 0


def test_a_venue_without_a_feed_of_its_own_is_recorded_through_ccxt(tmp_path):
    "The same verb, an unmodified ccxt client, Binance's rules; and a plain word that nothing is proved"
    with exchange("binance") as url:
        one = recording(tmp_path, url, "60s", "binanceusdm")
        wait_for(lambda: has_begun(tmp_path, "binanceusdm"))
        status = json.loads(Path(tmp_path, "collector", "binanceusdm.json").read_bytes())
        one.send_signal(signal.SIGINT)
        out, err = one.communicate(timeout=60)
    assert one.returncode == 0, err
    assert status["feeds"][0]["note"] == "no continuity is guaranteed"
    assert json.loads(out)["symbols"][BTC]["n_events"] > 200
    check_events(Store(tmp_path / "market").read("binanceusdm", BTC))


def test_a_venue_that_is_not_there_is_named_with_what_was_tried(tmp_path):
    "CONNECT_FAILED, in the error and beside the data; the verb says what to do"
    of = replace(LISTINGS[0].of, venue="binanceusdm")

    async def record():
        session = Session(tmp_path, "binanceusdm", {BTC: of}, address="http://127.0.0.1:9")
        return await run_session(session, for_s=3)

    with pytest.raises(
        VenueError, match="not one event came from binanceusdm.*CONNECT_FAILED"
    ) as e:
        asyncio.run(record())
    lines = read_incidents(incident_file(tmp_path, "binanceusdm", BTC))
    assert [row["code"] for row in lines] == ["CONNECT_FAILED", "STOPPED"]
    code, advice = exit_code(e.value)
    assert code == 7 and "tradebook venues" in advice


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("--for", "2x"), 2, "--for must be a time such as 90s, 15m, 1h or 2d, was '2x'"),
        (("--for", "0s"), 2, "was '0s'"),
        (("--streams", "book,trades"), 2, "was 'trades'; did you mean 'trade'?"),
        (("--streams", ","), 2, "--streams must name at least one"),
        (("--at", "nowhere"), 2, "--at must begin with http:// or https://, was 'nowhere'"),
        (("--at", "http://"), 2, "was 'http://'"),
    ],
)
def test_what_is_mistyped_is_refused_before_anybody_is_asked(tmp_path, words, code, told):
    from typer.testing import CliRunner

    from tradebook.ops.cli import app

    more = ("--venue", "bybit", "--symbols", "BTC/USDT:USDT", "--data", str(tmp_path), "--json")
    done = CliRunner().invoke(app, ["collect", *more, *words])
    assert done.exit_code == code and told in done.stderr and "Next: " in done.stderr
    assert json.loads(done.stdout)["code"] == code and not list(tmp_path.iterdir())
