"""Every verb that spreads work over a cluster: the same bytes as here, with a worker killed in the middle."""

import hashlib
import json
import shutil
import signal
import threading
from dataclasses import replace

import nbformat
import pytest
from clusters import until
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from typer.testing import CliRunner

from tradebook.base.clock import WallClock
from tradebook.base.journal import Journal
from tradebook.base.queue import Reason
from tradebook.base.settings import load_settings
from tradebook.market.store import Store
from tradebook.market.synthetic import synthetic_market
from tradebook.ops.cli import app
from tradebook.ops.renewal import renew
from tradebook.ops.spreading import retrain_spread
from tradebook.training.registry import Registry, symbol_key

N_MARKETS = 4


@pytest.fixture(scope="module")
def markets(tmp_path_factory):
    "A store with four short markets"
    store = Store(tmp_path_factory.mktemp("made") / "market")
    for seed in range(N_MARKETS):
        market = synthetic_market(seed=seed, duration_s=1_200)
        of = replace(market.instrument, symbol=f"SYN{seed}/USDT:USDT")
        store.write(market.events, of, "made")
    return store.root


@pytest.fixture
def roots(markets, tmp_path):
    "Two data roots with the same markets"
    made = [tmp_path / "here" / "data", tmp_path / "there" / "data"]
    for root in made:
        shutil.copytree(markets, root / "market")
    return made


def verb(*words):
    "Say a verb, and read its answer"
    done = CliRunner().invoke(app, [*map(str, words), "--json"])
    return done.exit_code, json.loads(done.stdout)


def in_the_middle(cluster, has_begun):
    "Kill a worker as soon as the work has begun; gives a list that then holds it"
    killed, victim = [], cluster.alive()[0]

    def kill():
        until(has_begun, 300)
        victim.send_signal(signal.SIGKILL)
        killed.append(victim)

    threading.Thread(target=kill, daemon=True).start()
    return killed


def pieces(root):
    "Hash of every file of columns below a data root, by its path there"
    files = sorted((root / "datasets").rglob("*.parquet"))
    return {str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


BUILD = ("dataset", "build", "--labels", "barriers", "--set", "labels.horizon_s=10")


def test_a_data_set_built_on_a_cluster_has_the_same_bytes_though_a_worker_died(cluster, roots):
    here, there = roots
    address = cluster.ready(2)
    has_begun = lambda: any((there / "datasets").rglob("*.parquet"))  # noqa: E731
    killed = in_the_middle(cluster, has_begun)
    code, found = verb(*BUILD, "--data", there, "--dask", address)
    assert code == 0 and killed and killed[0].wait(10) == -9
    code, same = verb(*BUILD, "--data", here, "--workers", "0")
    assert code == 0 and found["content_sha256"] == same["content_sha256"]
    assert found["n_valid"] == same["n_valid"] > 0 and found["id"] == same["id"]
    assert pieces(there) == pieces(here) and len(pieces(here)) >= 2 * N_MARKETS
    assert {p["word"] for p in found["pieces"]} == {"built"}
    code, again = verb(*BUILD, "--data", there, "--dask", address)
    assert {p["word"] for p in again["pieces"]} == {"kept"}


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "localhost:8786"])
def test_an_address_without_a_cluster_is_refused_by_name(roots, address):
    pytest.importorskip("distributed")
    code, found = verb(*BUILD, "--data", roots[0], "--dask", address)
    assert code == 2 and not found["ok"] and "--dask" in found["error"]
    assert address in found["error"]


RENEWAL = """
import json
from tradebook.base.settings import load_settings
from tradebook.ops.renewal import put_in_force, renew
from tradebook.ops.runner import keep
settings = load_settings(overrides={**json.loads(changes), "paths.data": data})
done = renew(settings, venue, symbol)
put_in_force(settings, done)
keep(version=done.version.version, is_promoted=done.decision.is_promoted)
"""
QUICK = {"training.rounds": "5", "training.folds": "2", "labels.horizon_s": "10"}


def forests(root):
    "The newest forest of each market, as text"
    registry = Registry(root / "models")
    newest = {key: registry.versions(key)[-1] for key in registry.symbols()}
    return {key: registry.load(key, one).text for key, one in newest.items()}


def test_markets_renewed_on_a_cluster_get_the_same_models_though_a_worker_died(cluster, roots):
    names = "\n".join(f"{n} = ''" for n in ("data", "venue", "symbol", "reasons", "changes"))
    cells = [
        new_markdown_cell("# Renewal"),
        new_code_cell(names, metadata={"tags": ["parameters"]}),
    ]
    template = roots[0].parent / "renewal.ipynb"  # all of the work, without the figures
    nbformat.write(new_notebook(cells=[*cells, new_code_cell(RENEWAL)]), template)
    address = cluster.ready(2)
    here, there = (root.parent for root in roots)
    settings = load_settings(environment={}, overrides={**QUICK, "paths.data": str(there / "data")})
    settings = settings.with_overrides({"paths.runs": str(there / "runs")})
    killed = in_the_middle(cluster, lambda: any((there / "data/datasets").rglob("*.parquet")))
    with Journal(there / "data" / "journal.db") as journal:
        for k in (0, 1):
            market = ("synthetic", f"SYN{k}/USDT:USDT")
            journal.want_training(*market, Reason.ASKED, WallClock().now_ns())
        found = retrain_spread(settings, journal, None, str(template), dask=address)
        assert [(one.state, one.error) for one in found] == [("done", "")] * 2
        assert [row["state"] for row in journal.queue()] == ["done"] * 2
        assert [row["status"] for row in journal.runs("retrain")] == ["ok"] * 2
    assert killed and killed[0].wait(10) == -9
    assert len(list((there / "runs").iterdir())) >= 3, "nobody was at work when it was killed"
    renew(settings.with_overrides({"paths.data": str(here / "data")}), *market)
    ((key, mine),), theirs = forests(here / "data").items(), forests(there / "data")
    assert len(theirs) == 2 and theirs[key] == mine and mine.startswith("tree")


def test_a_renewal_at_an_address_without_a_cluster_leaves_the_queue_alone(roots):
    pytest.importorskip("distributed")
    which = ("--symbol", "SYN0/USDT:USDT", "--dask", "localhost:8786", "--data", roots[0])
    code, found = verb("retrain", *which)
    assert code == 2 and "localhost:8786" in found["error"]
    with Journal(roots[0] / "journal.db") as journal:
        assert [(r["state"], r["attempts"]) for r in journal.queue()] == [("waiting", 0)]


KEY = symbol_key("synthetic", "SYN/USDT:USDT")


def test_one_model_of_a_whole_cluster_is_a_version_like_any_other(cluster, tmp_path):
    market = synthetic_market(seed=5, duration_s=1_200)
    root = tmp_path / "data"
    Store(root / "market").write(market.events, market.instrument, "made")
    train = ("train", "--data", root, "--one-model")
    for more in ("labels.horizon_s=5", "training.rounds=8", "training.folds=2"):
        train += ("--set", more)
    no_cluster, both = verb(*train), verb(*train, "--every", "--dask", "tcp://127.0.0.1:1")
    assert (
        no_cluster[0] and "needs a cluster: tradebook train --one-model" in no_cluster[1]["error"]
    )
    assert both[0] and "drop --every and --workers" in both[1]["error"]
    stopping = verb(*train, "--set", "training.patience=20", "--dask", "tcp://127.0.0.1:1")
    assert stopping[0] and "training.patience must be 0" in stopping[1]["error"]
    code, told = verb("retrain", "--data", root, "--set", "training.is_one_model=true")
    assert code and "must be false for retrain" in told["error"]
    assert not (root / "models").exists()

    address = cluster.ready(2)
    code, told = verb(*train, "--dask", address)
    assert code == 0, told
    version = Registry(root / "models").current(KEY)
    assert version.version == told["version"] and version.facts["note"]["n_workers"] == 2
    assert version.facts["settings"]["training"]["is_one_model"]
    assert "[num_machines: 2]" in version.texts()[0] and told["metrics"]["auc"]["value"] > 0.5
    here = verb("train", "--data", root, *train[4:], "--set", "training.patience=0")[1]
    assert abs(here["auc"] - told["auc"]) < 0.1 and here["n_test"] == told["n_test"]
    alone = Registry(root / "models").load(KEY, here["version"])
    assert "[num_machines: 1]" in alone.texts()[0] and "n_workers" not in alone.facts["note"]
