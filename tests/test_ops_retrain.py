"""Retraining out of process: real hangs, real kills, real hunger; the old model stays, the others train."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tradebook.base.clock import NS_PER_S, WallClock
from tradebook.base.journal import Journal
from tradebook.base.queue import Reason, process_start
from tradebook.base.settings import load_settings
from tradebook.ops.bounds import Bounds, End, Ended, run_bounded, tree_of
from tradebook.ops.retrain import name_end, queue_due, run_child, train_next, why_due
from tradebook.training.registry import Registry

FIRST = "print('first', 'cell', 'of', symbol)"
FAULTS = {
    "hangs": "import threading\nthreading.Event().wait()",
    "grows": "import time\nheld = []\nwhile True:\n    held.append(bytearray(2**24)); time.sleep(0.02)",
    "bad": "class DataError(Exception): pass\nraise DataError('rows must be more')",
}
ENDS = {"hangs": End.IDLE, "grows": End.MEMORY, "bad": End.BAD_DATA}
LIMITS = {"hangs": {"retrain.idle_s": "12"}, "grows": {"retrain.memory_mb": "600"}}


def template(folder, name, source):
    "Write a small report that keeps something and then does a thing"
    names = ("data", "venue", "symbol", "reasons", "changes")
    cells = [
        new_markdown_cell("# Small"),
        new_code_cell("\n".join(f"{n} = ''" for n in names), metadata={"tags": ["parameters"]}),
        new_code_cell(FIRST),
        new_code_cell(source),
    ]
    nbformat.write(new_notebook(cells=cells), folder / f"{name}.ipynb")
    return str(folder / f"{name}.ipynb")


def in_folder(folder, **changes):
    return load_settings(
        overrides={"paths.data": str(folder), "paths.runs": f"{folder}/runs", **changes}
    )


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    "Every fault done once, three children at a time, with a marker that stands for the old model"
    folder = tmp_path_factory.mktemp("retrain")

    def run(name):
        home = folder / name
        (home / "models" / "v_S").mkdir(parents=True)
        (home / "models" / "v_S" / "current").write_text('{"version": "old", "digest": "d"}')
        settings = in_folder(home, **LIMITS.get(name, {}))
        with Journal(home / "journal.db") as journal:
            journal.want_training("v", "S", "expired", 0)
            path = template(home, name, FAULTS[name])
            done = train_next(settings, journal, template=path)
            return done, journal.queue()[0], journal.latest_run("retrain"), home

    with ThreadPoolExecutor(3) as pool:
        return dict(zip(FAULTS, pool.map(run, FAULTS), strict=True))


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_ends_in_its_code(ended, name):
    done, row, run, _ = ended[name]
    assert (done.state, done.code) == ("failed", ENDS[name]), done.error
    assert (row["state"], row["code"], row["attempts"]) == ("failed", ENDS[name], 1)
    assert row["ts_due"] > row["ts_ended"] and run["status"] == "failed"


@pytest.mark.parametrize("name", FAULTS)
def test_the_partial_report_is_kept_and_the_old_model_stays(ended, name):
    done, _, _, home = ended[name]
    result = json.loads((Path(done.report) / "result.json").read_text())
    assert result["ok"] is False and result["code"] != "ok"
    assert "first cell of S" in (Path(done.report) / "report.html").read_text()
    assert Registry(home / "models").current_version("v_S") == "old"


def test_nothing_is_left_running(ended):
    "No kernel of a child may outlive it"
    mine = [Path(f"/proc/{pid}/cmdline") for pid in tree_of(os.getpid())]
    text = b"".join(p.read_bytes() for p in mine if p.exists())
    assert b"ipykernel" not in text


def kernel_below(pid):
    "Number of the kernel that a child runs; waits for it"
    for _ in range(600):
        for one in tree_of(pid):
            try:
                if b"ipykernel" in Path(f"/proc/{one}/cmdline").read_bytes():
                    return one
            except OSError:
                continue
        time.sleep(0.1)
    raise AssertionError("no kernel was started")


def test_kernel_killed_from_outside(tmp_path):
    "As the system does when memory runs out; the parent reads it from the report"
    path, settings = template(tmp_path, "waits", FAULTS["hangs"]), in_folder(tmp_path)
    found = {}

    def kill(watch):
        cells = Path(tmp_path).glob("runs/*/report.ipynb")
        if "pid" not in found and any("first cell of S" in c.read_text() for c in cells):
            found["pid"] = kernel_below(watch.pid)
            os.kill(found["pid"], signal.SIGKILL)
        return True

    row = {"venue": "v", "symbol": "S", "reasons": "expired"}
    done = run_child(settings, row, path, kill)
    assert (done.code, done.state) == (End.KERNEL_DIED, "failed")
    assert process_start(found["pid"]) == 0


def test_child_and_kernel_go_with_a_killed_worker(tmp_path):
    path = template(tmp_path, "hangs", FAULTS["hangs"])
    code = (
        "import sys; from tradebook.ops.retrain import run_child; "
        "from tradebook.base.settings import load_settings; "
        "s = load_settings(overrides={'paths.data': sys.argv[1], 'paths.runs': sys.argv[1]}); "
        "run_child(s, {'venue': 'v', 'symbol': 'S', 'reasons': 'asked'}, sys.argv[2])"
    )
    worker = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), path])
    kernel = kernel_below(worker.pid)
    family = {pid: process_start(pid) for pid in tree_of(worker.pid)}
    assert kernel in family and len(family) >= 3
    worker.kill()
    worker.wait()
    for _ in range(300):
        left = [p for p, start in family.items() if process_start(p) == start and not is_zombie(p)]
        if not left:
            break
        time.sleep(0.1)
    assert left == []


def is_zombie(pid):
    "A process that has ended and that nobody has asked about yet"
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_lost_lease_stops_the_child(tmp_path):
    "A worker whose row was taken over ends its child and leaves the row alone"
    settings = in_folder(tmp_path, **{"retrain.lease_s": "5"})
    path = template(tmp_path, "hangs", FAULTS["hangs"])
    with Journal(tmp_path / "journal.db") as journal, Journal(tmp_path / "journal.db") as other:
        journal.want_training("v", "S", "expired", 0)

        def take_over():
            while not other.queue()[0]["owner"]:
                time.sleep(0.05)
            later = WallClock().now_ns() + 3_600 * NS_PER_S
            while not other.take_training("thief:1:1", later, 600):
                time.sleep(0.05)

        thief = threading.Thread(target=take_over)
        thief.start()
        done = train_next(settings, journal, template=path)
        thief.join()
        row = journal.queue()[0]
    assert done.code == End.STOPPED
    assert (row["owner"], row["state"]) == ("thief:1:1", "running")


def test_huge_output_of_a_child_does_not_block_it(tmp_path):
    code = "import sys\nfor _ in range(2000): sys.stderr.write('x' * 1000)"
    ended = run_bounded([sys.executable, "-c", code], Bounds(wall_s=60), tmp_path / "log")
    assert ended.code is End.OK and (tmp_path / "log").stat().st_size == 2_000_000


def test_dead_kernel_is_memory_when_the_system_says_so():
    died = {"ok": False, "code": "kernel_died", "kind": "DeadKernelError", "error": "died"}
    failed = Ended(End.FAILED, "it ended with 1", 1.0, 90.0, 1)
    assert name_end(failed, died, True)[0] is End.MEMORY
    assert name_end(failed, {}, False)[0] is End.FAILED
    assert name_end(failed._replace(code=End.OK), {}, False)[0] is End.FAILED
    hungry = {**died, "code": "cell_failed", "kind": "_ArrayMemoryError"}
    assert name_end(failed, hungry, False)[0] is End.MEMORY


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    "A market of its own with a champion, and data that is newer than the champion"
    from tradebook.ops.renewal import example_market

    folder = tmp_path_factory.mktemp("market")
    quick = {"training.rounds": "10", "training.folds": "2"}
    return example_market(folder, in_folder(folder, **quick), duration_s=3_000.0)


def listing(settings):
    from tradebook.market.store import Store

    return Store(settings.path("data") / "market").listing()[0]


def test_every_reason_of_the_schedule(market):
    row = listing(market)
    with Journal(market.path("data") / "journal.db") as journal:
        end, day = row["end_ns"], 86_400 * NS_PER_S
        assert why_due(market, journal, row, end + 20 * day).reason is Reason.EXPIRED
        assert why_due(market, journal, row, end + 2 * day).reason is Reason.SCHEDULED
        assert why_due(market, journal, {**row, "end_ns": 0}, end + 20 * day) is None
        assert why_due(market, journal, row, end) is None  # as it was learned
        losing(journal, market, row)
        assert why_due(market, journal, row, end).reason is Reason.DECAYED


def losing(journal, settings, row):
    "Put a paper run into the journal that lost on every one of 60 trades"
    registry = Registry(settings.path("data") / "models")
    version = registry.current_version(registry.symbols()[0])
    what = {"model_version": version, "symbol": row["symbol"], "venue": row["venue"]}
    hashes = {"settings_hash": settings.hash, "settings": {}, "code_version": "1"}
    run_id, ts = journal.start_run("paper", **hashes, **what), row["start_ns"]
    for i in range(120):
        name, side, ts = f"o{i}", 1 if i % 2 == 0 else -1, ts + 20 * NS_PER_S
        order = {"client_order_id": name, "symbol": row["symbol"], "side": side, "size_lots": 10}
        journal.record_intent(run_id, {**order, "ts_intent": ts, "is_reduce_only": side < 0})
        price = 100.0 - (0.1 + 0.001 * (i % 7)) * (side < 0)
        fill = {**order, "ts_fill": ts, "price": price, "fee_quote": 0.01}
        journal.record_fill(run_id, {**fill, "notional_quote": 1_000.0})


def test_one_damaged_market_does_not_keep_others_from_the_schedule(market, tmp_path, monkeypatch):
    from tradebook.base.errors import DataError
    from tradebook.market.store import Store

    row = listing(market)
    both = [{**row, "symbol": "BAD/USDT"}, row]
    monkeypatch.setattr(Store, "listing", lambda self: both)
    first = why_due

    def damaged(settings, journal, one, now):
        if one["symbol"] == "BAD/USDT":
            raise DataError("the part is damaged")
        return first(settings, journal, one, now)

    monkeypatch.setattr("tradebook.ops.retrain.why_due", damaged)
    with Journal(tmp_path / "journal.db") as journal:
        late = row["end_ns"] + 20 * 86_400 * NS_PER_S
        due, wrong = queue_due(market, journal, late)
        assert [d.reason for d in due] == [Reason.EXPIRED]
        assert list(wrong.values()) == ["the part is damaged"]


def test_a_contest_is_void_when_the_champion_changed(market):
    from tradebook.ops.renewal import put_in_force, renew

    done = renew(market, "synthetic", "SYN/USDT:USDT")
    registry = Registry(market.path("data") / "models")
    key = registry.symbols()[0]
    before = registry.current_version(key)
    other = replace(done, champion=done.champion._replace(version="somebody-else"))
    assert put_in_force(market, other)[0] == before and registry.attempts(key) == []
    yes = replace(done, decision=done.decision._replace(is_promoted=True))
    assert put_in_force(market, yes)[0] == done.version.version
