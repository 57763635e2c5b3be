"""Every verb that spreads work over a cluster: the same bytes as here, with a worker killed in the middle."""

import hashlib
import json
import signal
import threading
from dataclasses import replace

import pytest
from clusters import Cluster, until
from typer.testing import CliRunner

from tradebook.market.store import Store
from tradebook.market.synthetic import synthetic_market
from tradebook.ops.cli import app

N_MARKETS = 4


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    "A scheduler and two worker processes, on the loopback only"
    pytest.importorskip("distributed")
    with Cluster(tmp_path_factory.mktemp("cluster")) as made:
        yield made


@pytest.fixture
def roots(tmp_path):
    "Two data roots with the same four short markets"
    made = [tmp_path / "here" / "data", tmp_path / "there" / "data"]
    for seed in range(N_MARKETS):
        market = synthetic_market(seed=seed, duration_s=900)
        of = replace(market.instrument, symbol=f"SYN{seed}/USDT:USDT")
        for root in made:
            Store(root / "market").write(market.events, of, "made")
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
