"""The journal in a real PostgreSQL server: the same rows, the same refusals, several processes, a server that goes."""

import multiprocessing
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from test_base_journal import KILLED, decision, filled, four_write_at_once, order, start
from test_training_queue import _take_all

from tradebook.base import tables
from tradebook.base.errors import DataError
from tradebook.base.journal import Journal
from tradebook.base.queue import TrainingQueue

psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed")


def find_programs():
    "Folder of PostgreSQL's server programs, None where there is none"
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else Path("/usr/lib/postgresql").glob("*/bin")
    return next((f for f in sorted(folders, reverse=True) if (f / "initdb").exists()), None)


class Server:
    "One PostgreSQL server on loopback, with a password, in a folder of its own"

    def __init__(self, folder, programs):
        self.folder, self.programs, self.password = folder, programs, secrets.token_urlsafe(18)
        self.user = {}
        if os.getuid() == 0:  # it refuses to run as root
            nobody = pwd.getpwnam("nobody")
            self.user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        secret = folder / "password"
        secret.write_text(self.password)
        secret.chmod(0o644)
        self.data, self.process = folder / "data", None
        options = ["-D", self.data, "-U", "desk", "-A", "scram-sha-256", f"--pwfile={secret}"]
        command = [programs / "initdb", *options, "-E", "UTF8", "--no-sync", "--locale=C"]
        subprocess.run(command, check=True, capture_output=True, cwd=folder, **self.user)

    def start(self):
        "Start and wait until it answers"
        settings = ["listen_addresses=127.0.0.1", f"unix_socket_directories={self.folder}"]
        settings += ["max_connections=60", "shared_buffers=16MB"]
        options = [word for setting in settings for word in ("-c", setting)]
        command = [self.programs / "postgres", "-D", self.data, "-p", str(self.port), *options]
        with open(os.devnull, "wb") as quiet:
            self.process = subprocess.Popen(command, stderr=quiet, cwd=self.folder, **self.user)
        until = time.monotonic() + 60
        while True:
            try:
                return psycopg.connect(self.plain("postgres")).close()
            except psycopg.OperationalError:
                assert time.monotonic() < until and self.process.poll() is None
                time.sleep(0.05)

    def stop(self):
        "Stop at once, as when a machine goes down in order"
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(60)

    def plain(self, name):
        "Address of a database, for psycopg"
        return f"postgresql://desk:{self.password}@127.0.0.1:{self.port}/{name}"

    def new(self):
        "Make an empty database; its address for a journal"
        name = f"j{secrets.token_hex(6)}"
        with psycopg.connect(self.plain("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.plain(name).replace("postgresql:", "postgresql+psycopg:")


@pytest.fixture(scope="module")
def server():
    programs = find_programs()
    if programs is None:
        pytest.skip("no PostgreSQL server on this machine: initdb was not found")
    # Not below pytest's own folder: every run of pytest closes that to other users, the server among them
    with tempfile.TemporaryDirectory(prefix="postgresql-", ignore_cleanup_errors=True) as folder:
        made = Server(Path(folder), programs)
        made.start()
        yield made
        made.stop()


@pytest.fixture
def place(server):
    return server.new()


def test_every_row_comes_back_and_none_is_rewritten(place):
    with Journal(place) as journal:
        run = filled(journal)
        assert [row["n"] for row in journal.decisions(run)] == [0, 1]
        assert [row["state"] for row in journal.orders(run)] == ["sent"]
        assert journal.fills(run)[0]["fee_quote"] == 0.1
        assert journal.positions(run) == {"SYN/USDT:USDT": {"position_lots": 3}}
        assert journal.events(run)[0]["detail"] == {"hole_ns": 5}
        for table in tables.APPEND_ONLY:
            for attempt in (
                *(f"UPDATE {table.name} SET {c.name} = {c.name}" for c in table.columns),
                f"DELETE FROM {table.name}",
                f"TRUNCATE {table.name} CASCADE",
            ):
                with pytest.raises(DBAPIError, match="append-only"):
                    with journal._engine.begin() as connection:
                        connection.execute(text(attempt))
        with pytest.raises(DataError, match="the journal refused a row"):
            journal.record_decisions(run, [decision(2), decision(0)])
        assert [row["n"] for row in journal.decisions(run)] == [0, 1]  # whole or not at all
        with pytest.raises(DataError, match="the journal refused a row"):
            journal.record_intent(run, order("a-1"))


def test_processes_that_write_at_once_lose_nothing(place):
    four_write_at_once(place, 15)


def test_no_two_processes_take_one_market(place):
    with TrainingQueue(place) as queue:
        for i in range(12):
            queue.want_training("v", f"S{i}", "never_trained", i)
    context = multiprocessing.get_context("spawn")
    begin, out = context.Event(), context.Queue()
    workers = [context.Process(target=_take_all, args=(place, begin, out)) for _ in range(3)]
    for worker in workers:
        worker.start()
    begin.set()
    taken, ended = [], 0
    while ended < len(workers):
        item = out.get(timeout=60)
        ended, taken = (ended + 1, taken) if item is None else (ended, [*taken, item])
    for worker in workers:
        worker.join()
    assert Counter(symbol for symbol, _ in taken) == {f"S{i}": 1 for i in range(12)}


def test_an_intent_survives_a_sudden_end_of_the_program_and_of_the_server(server, place):
    done = subprocess.run([sys.executable, "-c", KILLED, place])
    assert done.returncode == -signal.SIGKILL
    server.process.send_signal(signal.SIGQUIT)  # gone at once, without writing anything more
    server.process.wait()
    server.start()
    with Journal(place) as journal:
        run = journal.latest_run()
        assert run["status"] == "running" and run["ts_end"] is None
        assert [o["state"] for o in journal.orders(run["run_id"])] == ["intent"]


def test_a_server_that_goes_is_named_without_its_password_and_may_come_back(server, place):
    with Journal(place) as journal:
        run = start(journal)
        server.stop()
        with pytest.raises(DataError) as caught:
            journal.record_intent(run, order("a-1"))
        with pytest.raises(DataError) as refused:
            Journal(place)
        server.start()
        for error in (caught, refused):
            assert server.password not in str(error.value) + repr(journal)
        assert "could not be written" in str(caught.value)
        assert "cannot be opened" in str(refused.value)
        for _ in range(2):  # the first may meet a connection of before
            try:
                journal.record_intent(run, order("a-2"))
                break
            except DataError:
                continue
        assert [o["client_order_id"] for o in journal.orders(run)] == ["a-2"]


def test_a_journal_of_an_older_version_grows(place):
    with Journal(place) as journal:
        run = filled(journal)
        column = [c for c in tables.DECISIONS.columns if c.nullable][-1].name
        with journal._engine.begin() as connection:
            connection.execute(text(f"DROP TRIGGER decisions_no_update ON {tables.DECISIONS.name}"))
            connection.execute(text(f"ALTER TABLE {tables.DECISIONS.name} DROP COLUMN {column}"))
    with Journal(place) as journal:
        journal.record_decisions(run, [decision(2)])
        assert [row[column] for row in journal.decisions(run)] == [None] * 3
        with pytest.raises(DBAPIError, match="append-only"):
            with journal._engine.begin() as connection:
                connection.execute(text(f"UPDATE {tables.DECISIONS.name} SET n = n"))


def test_a_wrong_password_is_refused_and_not_shown(server):
    wrong = server.new().replace(server.password, "certainly-wrong-s3cr3t")
    with pytest.raises(DataError, match="cannot be opened") as caught:
        Journal(wrong)
    assert "s3cr3t" not in str(caught.value)
