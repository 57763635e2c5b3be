"""The training queue: written once, taken once, and taken again when its worker is killed."""

import multiprocessing as mp
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from tradebook.base import tables
from tradebook.base.clock import NS_PER_S, WallClock
from tradebook.base.errors import DataError
from tradebook.base.journal import Journal
from tradebook.base.queue import Reason, TrainingQueue, owner_name, wait_s

MARKET = ("standx", "BTC/USD:USD")


@pytest.fixture
def queue(tmp_path):
    with TrainingQueue(tmp_path / "journal.db") as made:
        yield made


def _take_all(place, start, out):
    "Take rows until there is none, as a worker of its own process"
    with TrainingQueue(place) as queue:
        start.wait()
        while row := queue.take_training(owner_name(), 1_000, lease_s=60):
            out.put((row["symbol"], os.getpid()))
    out.put(None)


def test_no_two_processes_take_one_row(tmp_path):
    place, n_rows, n_workers = tmp_path / "journal.db", 24, 4
    with TrainingQueue(place) as queue:
        for i in range(n_rows):
            queue.want_training("v", f"S{i}", "never_trained", i)
    context = mp.get_context("spawn")
    start, out = context.Event(), context.Queue()
    workers = [
        context.Process(target=_take_all, args=(place, start, out)) for _ in range(n_workers)
    ]
    for worker in workers:
        worker.start()
    start.set()
    taken, ended = [], 0
    while ended < n_workers:
        item = out.get(timeout=60)
        ended, taken = (ended + 1, taken) if item is None else (ended, [*taken, item])
    for worker in workers:
        worker.join()
    assert Counter(symbol for symbol, _ in taken) == {f"S{i}": 1 for i in range(n_rows)}


def test_stale_view_loses(queue, monkeypatch):
    "A worker that read the queue before another took the row must not take it too"
    queue.want_training(*MARKET, "expired", 0)
    seen = queue.takeable(10, 4)
    assert queue.take_training("a:1:1", 10, 60)["owner"] == "a:1:1"
    monkeypatch.setattr(queue, "takeable", lambda *_: seen)
    assert queue.take_training("b:2:2", 10, 60) is None
    assert queue.queue()[0]["owner"] == "a:1:1"


def test_row_of_a_killed_worker_is_taken_after_its_lease(tmp_path):
    place = tmp_path / "journal.db"
    with TrainingQueue(place) as queue:
        queue.want_training(*MARKET, "drifted", 0)
        code = (
            "import sys, time; from tradebook.base.queue import *; "
            "q = TrainingQueue(sys.argv[1]); "
            "print(q.take_training(owner_name(), int(sys.argv[2]), 5)['attempts'], flush=True); "
            "time.sleep(600)"
        )
        now = WallClock().now_ns()
        command = [sys.executable, "-c", code, str(place), str(now)]
        worker = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert worker.stdout.readline().strip() == b"1"
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait()
        assert queue.queue()[0]["owner"].split(":")[-2] == str(worker.pid)
        assert queue.take_training("other:1:1", now + 4 * NS_PER_S, 5) is None
        again = queue.take_training("other:1:1", now + 6 * NS_PER_S, 5)
        assert (again["owner"], again["attempts"]) == ("other:1:1", 2)


def test_a_market_that_kills_its_workers_is_not_tried_for_ever(queue):
    queue.want_training(*MARKET, "expired", 0)
    now, n = 0, 0
    while queue.take_training(f"w:{n}:1", now, 10, most_attempts=3):
        n, now = n + 1, now + 11 * NS_PER_S
    assert n == 3
    assert queue.want_training(*MARKET, "expired", now + 1) is False
    assert queue.want_training(*MARKET, "asked", now, is_at_once=True)  # a person is not put off
    assert queue.take_training("w:9:1", now, 10)["attempts"] == 1


@pytest.mark.parametrize("state", ["done", "partial", "failed"])
def test_late_result_of_a_lost_lease_changes_nothing(queue, state):
    queue.want_training(*MARKET, "expired", 0)
    lost = queue.take_training("a:1:1", 0, 10)
    mine = queue.take_training("b:2:2", 11 * NS_PER_S, 10)
    assert queue.keep_training(lost, 12 * NS_PER_S, 10) is None
    assert not queue.end_training(lost, 12 * NS_PER_S, state, 900, model_version="old")
    assert queue.end_training(mine, 13 * NS_PER_S, state, 900, model_version="new")
    assert queue.queue()[0]["model_version"] == "new"


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["want", "now", "take", "keep", "end"]),
            st.sampled_from(list(Reason)),
            st.integers(1, 2_000),
        ),
        max_size=30,
    )
)
def test_any_order_of_calls_keeps_one_row_and_one_owner(tmp_path_factory, steps):
    place = tmp_path_factory.mktemp("q") / "journal.db"
    now, held = 0, []
    with TrainingQueue(place) as queue:
        for what, reason, seconds in steps:
            now += seconds * NS_PER_S
            if what in ("want", "now"):
                queue.want_training(*MARKET, reason, now, is_at_once=what == "now")
                assert queue.want_training(*MARKET, reason, now) is False
            elif what == "take":
                row = queue.take_training(f"w:{len(held)}:1", now, 600)
                held += [row] if row else []
            elif held and what == "keep":
                kept = queue.keep_training(held[-1], now, 600)
                held[-1] = kept or held[-1]
            elif held:
                queue.end_training(held[-1], now, "failed", 60)
            rows = queue.queue()
            assert len(rows) <= 1
            for row in rows:
                reasons = row["reasons"].split(",")
                assert len(reasons) == len(set(reasons)) and set(reasons) <= set(Reason)
                assert (row["state"] == "running") == (row["ts_lease"] is not None)


def test_waits_double_up_to_a_day_and_success_starts_anew(queue):
    queue.want_training(*MARKET, "expired", 0)
    now = 0
    for attempt in range(1, 5):
        row = queue.take_training("w:1:1", now, 60, most_attempts=9)
        queue.end_training(row, now, "failed", 900)
        due = queue.queue()[0]["ts_due"]
        assert due - now == wait_s(attempt, 900) * NS_PER_S
        assert queue.take_training("w:1:1", due - 1, 60, most_attempts=9) is None
        now = due
    queue.end_training(queue.take_training("w:1:1", now, 60, 9), now, "done", 900)
    assert queue.queue()[0]["attempts"] == 0


def test_reason_outside_the_list_is_refused_before_writing(queue):
    with pytest.raises(DataError, match="closed list"):
        queue.want_training(*MARKET, "bored", 0)
    assert queue.queue() == []


def test_queue_lives_in_the_journal_and_shares_its_transactions(tmp_path):
    with Journal(tmp_path / "journal.db") as journal:
        with pytest.raises(RuntimeError), journal.together():
            journal.want_training(*MARKET, "expired", 0)
            raise RuntimeError("a crash between two writes")
        assert journal.queue() == []
        assert journal.want_training(*MARKET, "expired", 0)


def test_postgresql_can_have_the_table():
    text = str(CreateTable(tables.QUEUE).compile(dialect=postgresql.dialect()))
    assert "PRIMARY KEY (venue, symbol)" in text and "ts_lease BIGINT" in text


def test_clock_that_goes_back_still_renews(queue):
    queue.want_training(*MARKET, "expired", 0)
    row = queue.take_training("w:1:1", 100 * NS_PER_S, 60)
    kept = queue.keep_training(row, 50 * NS_PER_S, 60)
    assert kept["ts_lease"] > row["ts_lease"]
    assert time.monotonic() > 0 and queue.end_training(kept, 200 * NS_PER_S, "done", 60)
