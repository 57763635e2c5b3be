"""The main job by a real process: one object on stdout, no edge in a null market, found beside planted."""

import json
import os
import subprocess
import sys

import pytest

from tradebook.base.clock import parse_utc
from tradebook.base.errors import SettingsError, TradebookError
from tradebook.base.journal import Journal
from tradebook.base.settings import load_settings
from tradebook.ops.child import TraderProcess
from tradebook.ops.demo import prepare_folder, run_demo
from tradebook.ops.progress import Stage
from tradebook.ops.verdicts import demo_text
from tradebook.training.registry import Registry

FIELDS = "ok seconds peak_mib data stages model backtest edge funnel causes parity report".split()
QUICK = {"training.rounds": 60, "training.folds": 3}


def demo(out, *words):
    "The command in a process of its own"
    options = [w for k, v in QUICK.items() for w in ("--set", f"{k}={v}")]
    command = [
        sys.executable,
        "-m",
        "tradebook",
        "demo",
        "--json",
        "--out",
        str(out),
        *options,
        *words,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def null(tmp_path_factory):
    "Two hours in which there is nothing to find, with the report"
    done = demo(tmp_path_factory.mktemp("demo") / "null", "--strength", "0", "--hours", "2")
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    "Three hours in which there is"
    settings = load_settings(environment={}, overrides=QUICK)
    folder = tmp_path_factory.mktemp("demo") / "planted"
    return run_demo(folder, duration_s=10_800, settings=settings, is_report_made=False)


def test_stdout_is_exactly_one_object_with_every_field(null):
    found = json.loads(null.stdout)  # fails on anything beside it
    assert null.stdout.count("\n") == 1 and null.stderr == ""
    assert set(FIELDS) <= set(found) and found["ok"] is True
    assert {"source", "start", "end", "n_events", "coverage"} <= set(found["data"])
    assert {"version", "auc", "log_loss", "brier", "n_train", "n_test"} <= set(found["model"])
    names = {"n_decisions", "n_trades", "gross_quote", "net_quote", "cost_quote"}
    assert names <= set(found["backtest"])
    names = {
        "claimed",
        "basis",
        "n",
        "gross_bps_per_trade",
        "net_bps_per_trade",
        "interval",
        "planted_bps",
    }
    assert names <= set(found["edge"])
    assert all({"name", "seconds", "rows"} <= set(stage) for stage in found["stages"])
    assert all({"code", "count"} <= set(cause) for cause in found["causes"])
    assert 0 < found["seconds"] and 100 < found["peak_mib"] < 2048


def test_a_null_market_claims_no_edge(null):
    found = json.loads(null.stdout)
    assert found["edge"]["claimed"] is False
    assert found["edge"]["planted_bps"] in (0.0, None)
    assert found["edge"]["n"] == 0 or found["edge"]["net_bps_per_trade"] < 0
    assert "No edge" in demo_text(found) or "No trade" in demo_text(found)


def test_backtest_and_paper_agree_exactly(null, planted):
    for found in (json.loads(null.stdout), planted):
        assert found["parity"]["n_differences"] == 0, found["parity"]["first_difference"]
        assert found["parity"]["n_decisions"] == found["backtest"]["n_decisions"] > 2000
        assert sum(c["count"] for c in found["causes"]) == found["parity"]["n_decisions"]


def test_the_report_is_one_file_that_loads_nothing(null):
    found = json.loads(null.stdout)
    page = open(found["report"], encoding="utf-8").read()
    assert page.startswith("<!doctype html>")
    for wrong in ('src="http', "src='http", 'href="http', "cdn."):
        assert wrong not in page.split('<script id="library"')[0], wrong
    assert (
        json.loads((open(os.path.join(found["folder"], "demo.json"))).read())["report"]
        == found["report"]
    )


def test_what_was_planted_stands_beside_what_was_found(planted):
    edge = planted["edge"]
    assert edge["n"] >= 30 and edge["planted_bps"] > 2
    assert abs(edge["gross_bps_per_trade"] - edge["planted_bps"]) < 5
    low, high = edge["interval"]
    assert low < edge["net_bps_per_trade"] < high
    assert edge["claimed"] == (edge["basis"] == "trades" and low > 0)


def test_nothing_of_the_traded_stretch_was_trained_on(planted):
    assert planted["model"]["ts_last"] <= parse_utc(planted["data"]["split"])
    with Journal(f"{planted['folder']}/data/journal.db") as journal:
        first = journal.decisions(planted["paper"]["run_id"])[0]["ts_decided"]
    assert first > planted["model"]["ts_last"]


def test_the_model_in_the_registry_is_the_one_that_traded(planted):
    version = Registry(f"{planted['folder']}/data/models").current_version(
        "synthetic_SYN-USDT~USDT"
    )
    assert version == planted["model"]["version"] == planted["paper"]["model_version"]


def test_money_is_told_the_same_way_everywhere(planted):
    b, paper = planted["backtest"], planted["paper"]
    assert abs(b["gross_quote"] - b["cost_quote"] - b["net_quote"]) < 1e-6
    if paper["position_lots"] == 0:
        assert abs(paper["equity_quote"] - 10_000 - b["net_quote"]) < 1e-6


def test_the_same_seed_gives_the_same_result(planted, tmp_path):
    settings = load_settings(environment={}, overrides=QUICK)
    again = run_demo(tmp_path / "again", duration_s=10_800, settings=settings, is_report_made=False)
    for name in ("backtest", "ungated", "edge", "funnel"):
        assert again[name] == planted[name]


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("ten years")
    done = demo(tmp_path, "--hours", "0.1")
    assert done.returncode == 2 and json.loads(done.stdout)["ok"] is False
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(SettingsError):
        prepare_folder(tmp_path, load_settings(environment={}))


def test_a_trader_that_is_stopped_says_so_and_leaves_its_decisions(planted):
    "The demo's own child, stopped as Ctrl-C would"
    root = f"{planted['folder']}/data"
    settings = load_settings(environment={}, overrides={**QUICK, "paths.data": root})
    process = TraderProcess(
        settings, "synthetic", "SYN/USDT:USDT", parse_utc(planted["data"]["start"])
    )
    moved = []
    process.on_event = lambda message: moved.append(message)
    while not any(m["event"] == "progress" for m in moved):
        assert process.reader.is_alive(), process.other
        process.reader.join(0.05)
    process.stop()
    assert process.process.returncode == 130
    with Journal(f"{root}/journal.db") as journal:
        run = journal.latest_run("paper")
        n = len(journal.decisions(run["run_id"]))
    assert run["status"] == "stopped" and n == run["summary"]["n_decisions"] > 0


def test_raw_frames_of_minutes_are_reported_as_what_they_are(recordings, tmp_path):
    found = run_demo(
        tmp_path / "frames",
        data=recordings / "binance",
        settings=load_settings(environment={}, overrides=QUICK),
        is_report_made=False,
    )
    assert found["data"]["symbol"] == "BTC/USDT:USDT" and len(found["data"]["markets"]) == 6
    assert found["edge"]["claimed"] is False and found["parity"]["n_differences"] == 0
    assert any("nothing about profit" in line for line in found["limits"])
    assert all(m["n_quote_mismatches"] == 0 for m in found["data"]["markets"])


def test_a_wait_for_the_trader_is_bounded(planted):
    "A process that says nothing is given up, by name"
    root = f"{planted['folder']}/data"
    settings = load_settings(environment={}, overrides={**QUICK, "paths.data": root})
    given = ("synthetic", "SYN/USDT:USDT", 1_736_121_600 * 10**9)
    process = TraderProcess(settings, *given, silence_s=0.05)
    with pytest.raises(TradebookError, match=r"the trader said nothing for 0\.05 s"):
        process.wait(Stage("paper"))
    assert process.process.poll() is not None
