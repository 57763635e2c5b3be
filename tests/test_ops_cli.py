"""The command line by real processes: it opens at once, answers in one object, fails with its code and a next step."""

import json
import os
import resource
import signal
import subprocess
import sys

import pytest

from tradebook.base.journal import Journal
from tradebook.market.store import Store
from tradebook.market.synthetic import synthetic_market

PARTS = "demo config import train backtest trade why report".split()


def tradebook(*words, cwd=None, **environment):
    "Call the command line"
    command = [sys.executable, "-m", "tradebook", *map(str, words)]
    env = {k: v for k, v in os.environ.items() if not k.startswith("TRADEBOOK")} | environment
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=120)


def answer(done):
    "The one object on stdout"
    assert done.stdout.count("\n") == 1, done.stdout
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "A data root with half an hour of a market"
    folder = tmp_path_factory.mktemp("root")
    market = synthetic_market(seed=7, duration_s=1800)
    Store(folder / "market").write(market.events, market.instrument, "test")
    return folder


def cpu_of_children_s():
    "Processor time of all processes that were waited for: what a busy machine changes least"
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_lists_every_verb_and_opens_at_once():
    best = 99.0
    for _ in range(4):
        begun = cpu_of_children_s()
        done = tradebook("--help")
        best = min(best, cpu_of_children_s() - begun)
    assert done.returncode == 0 and all(verb in done.stdout for verb in PARTS)
    assert best < 0.6, f"{best:.2f} s of a processor at best of four"


@pytest.mark.parametrize("verb", [v for v in PARTS if v != "config"])
def test_every_verb_has_json_and_help(verb):
    done = tradebook(verb, "--help")
    assert done.returncode == 0 and "--json" in done.stdout


def test_version():
    assert tradebook("--version").stdout.startswith("tradebook 0.")


def test_origin_of_every_setting_is_told(tmp_path):
    (tmp_path / "settings.ini").write_text(
        "[labels]\nhorizon_s = 45\n[gates]\nmax_spread_bps = 3\n"
    )
    secret = "do-not-show-me"
    done = tradebook(
        *("config", "show", "--origin", "--json", "--set", "labels.horizon_s=60"),
        cwd=tmp_path,
        TRADEBOOK__GATES__MAX_SPREAD_BPS="4",
        TRADEBOOK__SECRETS__API_KEY=secret,
    )
    rows = {r["name"]: r for r in answer(done)["settings"]}
    assert (rows["labels.horizon_s"]["value"], rows["labels.horizon_s"]["source"]) == (
        "60.0",
        "command line",
    )
    assert [s[0] for s in rows["labels.horizon_s"]["shadowed"]] == ["settings.ini", "default"]
    assert rows["gates.max_spread_bps"]["where"] == "TRADEBOOK__GATES__MAX_SPREAD_BPS"
    assert secret not in done.stdout + done.stderr
    text = tradebook("config", "show", "--origin", cwd=tmp_path).stdout
    assert "settings.ini:2" in text and "instead of 30.0 (default)" in text


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("nonsense",), 2, "No such command"),
        (("demo", "--sed", "3"), 2, "No such option"),
        (("config", "show", "--set", "labels.horizn_s=1"), 2, "did you mean 'horizon_s'"),
        (("config", "show", "--set", "labels.horizon_s"), 2, "must be NAME=VALUE"),
        (("config", "show", "--set", "labels.horizon_s=-1"), 2, "must be greater than 0"),
        (("trade",), 2, "--paper"),
        (("import", "nowhere"), 3, "does not exist"),
        (("why", "--data", "nowhere"), 3, "no journal.db"),
        (("train", "--data", "nowhere"), 3, "is empty"),
        (("report", "diagnosiss"), 5, "did you mean 'diagnosis'"),
    ],
)
def test_mistakes_have_their_code_and_say_what_to_do(words, code, told, tmp_path):
    done = tradebook(*words, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert told in done.stderr and done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "Next: " in done.stderr or "--help" in done.stderr


def test_a_failure_is_one_object_too(tmp_path):
    done = tradebook("train", "--data", tmp_path, "--json")
    found = answer(done)
    assert done.returncode == found["code"] == 3 and found["ok"] is False
    assert found["kind"] == "DataError" and found["next"]


def test_jobs_one_by_one(root):
    quick = ("--set", "training.rounds=30", "--set", "training.folds=3", "--data", root, "--json")
    until = "2025-01-06T00:20:00Z"
    trained = answer(tradebook("train", "--to", until, *quick))
    assert trained["ok"] and trained["n_train"] > 300
    tested = answer(tradebook("backtest", "--from", until, *quick))
    assert tested["n_decisions"] == 601 and tested["model_version"] == trained["version"]
    traded = tradebook("trade", "--paper", "--from", until, *quick)
    paper = answer(traded)
    assert traded.stderr == "" and paper["n_decisions"] == 601
    asked = answer(tradebook("why", "--data", root, "--json"))
    assert asked["run"] == paper["run_id"] and asked["kind"] == "paper"
    asked = answer(tradebook("why", "--data", root, "--run", tested["run_id"], "--json"))
    assert asked["kind"] == "backtest" and asked["funnel"]["events"] > 0
    text = tradebook("why", "--data", root).stdout
    assert "events" in text and "candidates" in text and asked["causes"][0]["cause"] in text
    wrong = tradebook("why", "--data", root, "--run", tested["run_id"][:-1])
    assert wrong.returncode == 5 and "did you mean" in wrong.stderr


def test_too_little_to_train_on_is_a_model_error(root):
    done = tradebook("train", "--to", "2025-01-06T00:02:00Z", "--data", root)
    assert done.returncode == 4 and "training needs 300 rows" in done.stderr
    with Journal(root / "journal.db") as journal:
        assert journal.latest_run("training")["status"] == "failed"


def test_why_finds_the_newest_demo_of_the_project(tmp_path):
    (tmp_path / "settings.ini").write_text("[paths]\ndata = data\nruns = runs\n")
    place = tmp_path / "runs" / "20260101T000000Z_demo_abcdef" / "data"
    with Journal(place / "journal.db") as journal:
        start = dict(settings_hash="0" * 16, settings={}, code_version="0", symbol="S", venue="v")
        run_id = journal.start_run("paper", **start)
    done = tradebook("why", cwd=tmp_path)
    assert done.returncode == 0 and run_id in done.stdout and str(place) in done.stdout


def heed_ctrl_c():
    "A job in the background is started deaf to it, and its children too"
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_clean_with_130(root, number, tmp_path):
    "Stopped in the middle of work: a short message, no traceback, the run is on record"
    command = [
        sys.executable,
        "-m",
        "tradebook",
        "trade",
        "--paper",
        "--progress-lines",
        "--data",
        str(root),
    ]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes, preexec_fn=heed_ctrl_c)
    said = []
    for line in process.stderr:
        said.append(line)
        if '"progress"' in line or '"first book"' in line:
            process.send_signal(number)
            break
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors and "stopped" in errors
    with Journal(root / "journal.db") as journal:
        assert journal.latest_run("paper")["status"] in ("stopped", "failed")
