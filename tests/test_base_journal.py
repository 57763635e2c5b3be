"""The journal: nothing lost, nothing rewritten, nothing secret, also with several processes and a sudden end."""

import math
import multiprocessing
import shutil
import signal
import sqlite3
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.dialects import postgresql

from tradebook.base import tables
from tradebook.base.causes import Cause
from tradebook.base.errors import DataError, SettingsError
from tradebook.base.journal import Journal
from tradebook.base.rows import as_json, plain
from tradebook.base.settings import load_settings

HUSH = "s3cr3t-do-not-store"
SYMBOL = "SYN/USDT:USDT"


@pytest.fixture
def journal(tmp_path):
    with Journal(tmp_path / "deep" / "journal.db") as opened:
        opened.file = tmp_path / "deep" / "journal.db"
        yield opened


def start(journal, kind="paper", **more):
    return journal.start_run(kind, settings_hash="0" * 16, settings={}, code_version="0", **more)


def decision(n, **more):
    return dict(n=n, symbol=SYMBOL, ts_decided=n, cause=Cause.NO_SIGNAL) | more


def order(name, **more):
    return dict(client_order_id=name, symbol=SYMBOL, side=1, size_lots=3, ts_intent=5) | more


def fill(name, **more):
    row = dict(
        client_order_id=name, symbol=SYMBOL, side=1, size_lots=3, price=1.5, ts_fill=7, ts_sent=6
    )
    return row | dict(fee_quote=0.1, notional_quote=4.5) | more


def filled(journal):
    "One run with a row in every table"
    run = start(journal)
    journal.record_decisions(run, [decision(0), decision(1)])
    journal.record_intent(run, order("a-1"))
    journal.record_order_event(run, "a-1", 6, "sent")
    journal.record_fill(run, fill("a-1"))
    journal.save_position(run, SYMBOL, {"position_lots": 3})
    journal.freeze(None, "test", "me", 1)
    journal.record_event(run, 8, "GAP", {"hole_ns": 5})
    return run


@pytest.mark.parametrize("table", [t.name for t in tables.APPEND_ONLY])
def test_sqlite_itself_refuses_to_rewrite(journal, table):
    filled(journal)
    stranger = sqlite3.connect(journal.file, isolation_level=None)
    before = stranger.execute(f"SELECT * FROM {table}").fetchall()
    columns = [row[1] for row in stranger.execute(f"PRAGMA table_info({table})")]
    attempts = [f"UPDATE {table} SET {column} = {column}" for column in columns]
    attempts += [f"DELETE FROM {table}", f"REPLACE INTO {table} SELECT * FROM {table}"]
    attempts += [f"INSERT OR IGNORE INTO {table} SELECT * FROM {table}"]
    for attempt in attempts:
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            stranger.execute(attempt)
    assert len(before) >= 1 and stranger.execute(f"SELECT * FROM {table}").fetchall() == before
    stranger.close()


def test_an_intent_changes_its_state_and_nothing_else(journal):
    filled(journal)
    stranger = sqlite3.connect(journal.file, isolation_level=None)
    stranger.execute("UPDATE orders SET state = 'lost'")
    for column in (c.name for c in tables.ORDERS.columns if c.name != "state"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            stranger.execute(f"UPDATE orders SET {column} = {column}")
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        stranger.execute("DELETE FROM orders")
    stranger.close()


def test_postgresql_gets_the_same_guards():
    said = [str(s.compile(dialect=postgresql.dialect())) for s in tables.statements("postgresql")]
    for table in tables.APPEND_ONLY:
        mine = [s for s in said if "TRIGGER" in s and f" ON {table.name} " in s]
        for verb in ("UPDATE OF", "DELETE", "TRUNCATE"):
            assert any(f"BEFORE {verb}" in s for s in mine)
    assert all("BIGINT" in s for s in said if s.strip().startswith("CREATE TABLE") and " ts" in s)
    with pytest.raises(SettingsError, match="must be sqlite or postgresql"):
        tables.statements("mysql")


WRITER = """
import sys
from tradebook.base.journal import Journal
place, me, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
sys.stdin.readline()  # everybody starts together, on a file that is not there yet
with Journal(place) as journal:
    run = journal.start_run("paper", settings_hash="0", settings={}, code_version="0", note=me)
    for i in range(n):
        rows = [dict(n=i * 5 + k, symbol=me, ts_decided=0, cause="NO_SIGNAL") for k in range(5)]
        journal.record_decisions(run, rows)
        journal.record_intent(run, dict(client_order_id=f"{me}-{i}", symbol=me, side=1, size_lots=1, ts_intent=i))
        journal.record_order_event(run, f"{me}-{i}", i, "sent")
        journal.save_position(run, me, {"n": i})
"""


def writer(place, me, n):
    command = [sys.executable, "-c", WRITER, str(place), me, str(n)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def four_write_at_once(place, n):
    "Let four processes write n times each, and find every row of theirs"
    processes = [writer(place, name, n) for name in "abcd"]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
    with Journal(place) as journal:
        runs = journal.runs()
        assert sorted(run["note"] for run in runs) == ["a", "b", "c", "d"]
        for run in runs:
            assert [d["n"] for d in journal.decisions(run["run_id"])] == list(range(5 * n))
            assert {o["state"] for o in journal.orders(run["run_id"])} == {"sent"}
            assert (
                len(journal.orders(run["run_id"])) == len(journal.order_events(run["run_id"])) == n
            )
            assert journal.positions(run["run_id"]) == {run["note"]: {"n": n - 1}}


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    four_write_at_once(tmp_path / "journal.db", 30)


def open_and_write(folder, together, failed):
    "Open one new journal after another, at the same moment as the others"
    for i in range(20):
        together.wait(60)
        try:
            with Journal(folder / f"{i}.db") as journal:
                start(journal)
        except Exception as error:
            failed.put(repr(error))


def test_processes_may_create_a_journal_at_the_same_moment(tmp_path):
    context = multiprocessing.get_context("fork")
    together, failed = context.Barrier(5), context.SimpleQueue()
    arguments = (tmp_path, together, failed)
    processes = [context.Process(target=open_and_write, args=arguments) for _ in range(5)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert failed.empty(), failed.get()
    for file in tmp_path.glob("*.db"):
        with Journal(file) as journal:
            assert len(journal.runs()) == 5


KILLED = """
import os, signal, sys
from tradebook.base.journal import Journal
journal = Journal(sys.argv[1])
run = journal.start_run("paper", settings_hash="0", settings={}, code_version="0")
journal.record_intent(run, dict(client_order_id="x-1", symbol="S", side=1, size_lots=1, ts_intent=1))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_an_intent_survives_a_sudden_end(tmp_path):
    place = tmp_path / "journal.db"
    done = subprocess.run([sys.executable, "-c", KILLED, str(place)])
    assert done.returncode == -signal.SIGKILL
    with Journal(place) as journal:
        run = journal.latest_run()
        assert run["status"] == "running" and run["ts_end"] is None
        assert [o["state"] for o in journal.orders(run["run_id"])] == ["intent"]


def test_writes_wait_for_the_disk_unless_told_otherwise(journal):
    for options, level in (({}, 2), ({"is_durable": False}, 1), ({}, 2)):
        with journal._write(**options) as connection:
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == level


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
def test_the_intent_is_synced_before_it_returns(tmp_path):
    code = KILLED.replace("journal.record_intent", "os.write(2, b'ASKED'); journal.record_intent")
    code = code.replace("os.kill(os.getpid(), signal.SIGKILL)", "os.write(2, b'RETURNED')")
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-o", trace, "-e", "trace=fsync,fdatasync,write", sys.executable]
    subprocess.run([*command, "-c", code, tmp_path / "journal.db"], check=True, capture_output=True)
    lines = trace.read_text().splitlines()
    asked, returned = (
        next(i for i, s in enumerate(lines) if w in s) for w in ("ASKED", "RETURNED")
    )
    assert any("sync(" in line for line in lines[asked:returned])


def test_a_batch_is_written_whole_or_not_at_all(journal):
    run = start(journal)
    journal.record_decisions(run, [decision(0)])
    with pytest.raises(DataError, match="append-only"):
        journal.record_decisions(run, [decision(1), decision(2), decision(0)])
    assert [d["n"] for d in journal.decisions(run)] == [0]
    with pytest.raises(DataError, match="has no intent"):
        journal.record_order_event(run, "nobody", 1, "sent")
    assert journal.order_events(run) == []


def test_numpy_numbers_come_back_as_numbers(journal):
    run = start(journal)
    row = decision(
        np.int64(4), side=np.int8(-1), p_up=np.float32(0.5), edge_bps=np.nan, size_lots=np.uint16(9)
    )
    row |= dict(
        ts_book=np.int64(2**62),
        equity_quote=math.inf,
        gates=[dict(name="spread", value=np.float64(2))],
    )
    journal.record_decisions(run, [row])
    back = journal.decisions(run)[0]
    assert (back["n"], back["side"], back["p_up"], back["size_lots"], back["ts_book"]) == (
        4,
        -1,
        0.5,
        9,
        2**62,
    )
    assert (back["edge_bps"], back["equity_quote"]) == (None, None)
    assert back["gates"] == '[{"name":"spread","value":2.0}]'
    raw = sqlite3.connect(journal.file)
    kinds = raw.execute(
        "SELECT typeof(n), typeof(side), typeof(p_up), typeof(size_lots) FROM decisions"
    ).fetchone()
    raw.close()
    assert kinds == ("integer", "integer", "real", "integer")


@given(st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
))  # fmt: skip
def test_json_comes_back_the_same(value):
    import json

    assert json.loads(as_json(value)) == value


@given(
    st.sampled_from([np.int8, np.int32, np.int64, np.uint8, np.float32, np.float64, np.bool_]),
    st.integers(0, 1),
)
def test_plain_values_are_pythons_own(kind, value):
    assert type(plain(kind(value))) in (int, float, bool) and plain(kind(value)) == value


@pytest.mark.parametrize("cause", [None, "", "NO_SIGNALS", "no_signal"])
def test_no_row_without_a_cause_of_the_list(journal, cause):
    run = start(journal)
    with pytest.raises(DataError, match="cause must be one of the closed list"):
        journal.record_decisions(run, [decision(0) | {"cause": cause}])
    assert journal.decisions(run) == []


def test_unknown_columns_and_actions_are_refused(journal):
    run = start(journal)
    with pytest.raises(
        DataError, match="'spred_bps' is no column of decisions; did you mean 'spread_bps'"
    ):
        journal.record_decisions(run, [decision(0, spred_bps=1)])
    with pytest.raises(DataError, match="action must be none or enter or exit, was 'buy'"):
        journal.record_decisions(run, [decision(0, action="buy")])
    with pytest.raises(DataError, match=r"refused a row.*size_lots"):
        journal.record_intent(run, {k: v for k, v in order("a").items() if k != "size_lots"})
    with pytest.raises(DataError, match="stage, cause or action"):
        journal.count_by(run, "symbol")


def test_no_secret_reaches_the_disk(journal):
    settings = load_settings(
        "/", {"TRADEBOOK__SECRETS__API_SECRET": HUSH}, {"secrets.api_key": HUSH}
    )
    careless = {**settings.to_dict(), "secrets": {"api_key": HUSH, "api_secret": HUSH}}
    for given_settings in (settings.to_dict(), careless):
        run = journal.start_run(
            "paper", settings_hash=settings.hash, settings=given_settings, code_version="0"
        )
        assert journal.run(run)["settings"]["secrets"] == {
            "api_key": "*" * 10,
            "api_secret": "*" * 10,
        }
        assert journal.run(run)["settings"]["labels"] == settings.to_dict()["labels"]
    journal.close()
    for file in journal.file.parent.iterdir():
        assert HUSH.encode() not in file.read_bytes()


def test_runs_are_listed_newest_first(journal):
    runs = [start(journal, kind) for kind in ("training", "paper", "backtest", "paper")]
    assert runs == sorted(runs) and len(set(runs)) == 4
    assert [r["run_id"] for r in journal.runs()] == runs[::-1]
    assert (
        journal.latest_run("paper")["run_id"] == runs[3]
        and journal.latest_run()["run_id"] == runs[3]
    )
    assert journal.latest_run("demo") is None and journal.runs("demo") == []
    journal.finish_run(runs[0], "ok", {"n": np.int64(3)})
    assert journal.run(runs[0])["summary"] == {"n": 3} and journal.run(runs[0])["status"] == "ok"
    with pytest.raises(DataError, match="there is no run"):
        journal.run("x")


def test_counts_agree_with_the_rows(journal):
    run, other = start(journal), start(journal)
    causes = [Cause.NO_SIGNAL] * 5 + [Cause.SPREAD_TOO_WIDE] * 2 + [Cause.ENTER]
    journal.record_decisions(run, [decision(n, cause=c) for n, c in enumerate(causes)])
    journal.record_decisions(other, [decision(0)])
    assert journal.count_by(run, "cause") == {"NO_SIGNAL": 5, "SPREAD_TOO_WIDE": 2, "ENTER": 1}
    assert journal.count_by(run, "stage") == {"candidates": 5, "gates": 2, "orders": 1}
    assert journal.count_by(run, "action") == {"none": 8}


def test_freezes_outlive_the_run_and_are_lifted_once(journal):
    one, all_ = journal.freeze(SYMBOL, "stops", "risk", 1), journal.freeze(None, "panic", "anna", 2)
    with Journal(journal.file) as again:
        assert [(f["id"], f["symbol"]) for f in again.active_freezes()] == [
            (one, SYMBOL),
            (all_, None),
        ]
        again.lift(one, "anna", 3)
        with pytest.raises(DataError, match="not active"):
            again.lift(one, "anna", 4)
    assert [f["id"] for f in journal.active_freezes()] == [all_]


def test_addresses_are_understood_or_refused(tmp_path):
    with Journal(f"sqlite:///{tmp_path / 'a.db'}") as journal:
        assert journal.runs() == []
    with pytest.raises(SettingsError, match="must be a path or an address"):
        Journal("cloud://x")
    (tmp_path / "b.db").write_text("certainly not a database, but long enough to be looked at")
    with pytest.raises(DataError, match="cannot be opened: file is not a database"):
        Journal(tmp_path / "b.db")


def test_a_password_in_the_address_is_not_shown():
    try:
        shown = repr(Journal(f"postgresql://me:{HUSH}@127.0.0.1:1/x"))
    except (DataError, SettingsError) as error:  # no driver, or nobody there
        shown = str(error)
    assert HUSH not in shown and shown
