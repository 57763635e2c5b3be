"""Work spread over processes and over a real cluster: same answers, order kept, deaths named and survived."""

import os
import signal
import socket
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from clusters import until
from hypothesis import given, settings
from hypothesis import strategies as st

import tradebook
from tradebook.base.errors import DataError, SettingsError
from tradebook.training import cluster as cluster_module
from tradebook.training import scale
from tradebook.training.cluster import connect
from tradebook.training.learners import Learner, parameters
from tradebook.training.metrics import auc
from tradebook.training.one_big_model import fit_on_cluster
from tradebook.training.scale import run_each, values


def spread_of(seed, n=2_000):
    "A few thousand numbers from a seed, and what a reader would compute of them"
    drawn = np.random.default_rng(seed).normal(size=n)
    return {"mean": float(drawn.mean()), "sorted": np.sort(drawn)}


def refuse_odd(n):
    "A work that refuses some items with an error of ours, and breaks on one"
    if n == 7:
        return [][n]
    if n % 2:
        raise DataError(f"day {n} is odd; give an even one")
    return n * 10


def die_once(folder, n):
    "Kill the own process the first time that item 2 is tried"
    mark = Path(folder) / f"tried-{n}"
    if n == 2 and not mark.exists():
        mark.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    return n


def wait_for(folder, n):
    "Say who works on it, and stay long enough to be killed"
    (Path(folder) / f"{n}-{os.getpid()}").write_text("")
    time.sleep(0.4)
    return n * n


def same(a, b):
    "Bit-equal, arrays too"
    return a["mean"] == b["mean"] and a["sorted"].tobytes() == b["sorted"].tobytes()


def test_processes_answer_bit_for_bit_like_this_process_and_keep_the_order():
    seeds = list(range(7))
    here, there = run_each(spread_of, seeds, workers=0), run_each(spread_of, seeds, workers=2)
    assert [one.name for one in there] == [str(s) for s in seeds]
    assert all(same(a, b) for a, b in zip(values(here), values(there), strict=True))
    assert all(one.cpu_s >= 0 and one.peak_mb > 1 for one in there)


def test_bad_items_are_named_and_the_others_go_on():
    done = run_each(refuse_odd, list(range(9)), [f"day {n}" for n in range(9)], workers=2)
    assert [one.value for one in done] == [0, None, 20, None, 40, None, 60, None, 80]
    assert done[3].error == "DataError: day 3 is odd; give an even one"
    assert done[7].error.startswith("IndexError") and "test_training_scale.py:" in done[7].error
    with pytest.raises(DataError, match="4 of 9 items failed: day 1: DataError"):
        values(done)


def test_a_killed_worker_costs_one_attempt(tmp_path):
    done = run_each(partial(die_once, str(tmp_path)), [0, 1, 2, 3, 4, 5], workers=2)
    assert values(done) == [0, 1, 2, 3, 4, 5]
    assert [one.attempts for one in done] == [1, 1, 2, 1, 1, 1]


def test_with_one_attempt_a_killed_worker_is_named(tmp_path):
    done = run_each(partial(die_once, str(tmp_path)), [1, 2, 3], workers=1, attempts=1)
    assert [one.value for one in done] == [1, None, 3]
    assert "signal 9, 1 times" in done[1].error


def test_things_that_cannot_travel_are_named():
    with pytest.raises(SettingsError, match="function at the top of a module"):
        run_each(lambda n: n, [1, 2], workers=2)
    done = run_each(str, [1, lambda: 0, 3], ["a", "b", "c"], workers=2)
    assert [one.is_ok for one in done] == [True, False, True]
    assert "the item cannot be sent" in done[1].error
    done = run_each(eval, ["lambda: 0", "5"], workers=2)
    assert "the result cannot be sent" in done[0].error and done[1].value == 5
    assert not run_each(str, [lambda: 0], ["all of them"], workers=1)[0].is_ok


def test_no_process_is_left_behind():
    import multiprocessing

    stream = scale._on_processes(time.sleep, [0, 60, 60], 3, 2, None)
    assert next(stream)[0] == 0
    stream.close()
    assert not multiprocessing.active_children()


def test_progress_counts_every_item_once():
    seen = []
    run_each(refuse_odd, list(range(8)), workers=2, progress=lambda *a: seen.append(a))
    assert [done for done, _, _ in seen] == list(range(1, 9))
    assert {name for _, _, name in seen} == {str(n) for n in range(8)}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=30))
def test_every_item_has_its_own_outcome(items):
    done = run_each(refuse_odd, items, workers=0)
    assert len(done) == len(items)
    for one, n in zip(done, items, strict=True):
        assert one.is_ok == (n % 2 == 0)
        assert one.value == (n * 10 if one.is_ok else None)


def test_a_cluster_answers_bit_for_bit_like_this_process(cluster):
    address = cluster.ready(2)
    seeds = list(range(20))
    here, there = run_each(spread_of, seeds, workers=0), run_each(spread_of, seeds, dask=address)
    assert all(same(a, b) for a, b in zip(values(here), values(there), strict=True))
    done = run_each(refuse_odd, list(range(9)), dask=address)
    assert [one.value for one in done] == [0, None, 20, None, 40, None, 60, None, 80]
    assert done[3].error == "DataError: day 3 is odd; give an even one"


def test_a_cluster_of_other_versions_is_refused(cluster, monkeypatch, tmp_path):
    address = cluster.ready(2)
    monkeypatch.setattr(tradebook, "__version__", "another")
    with pytest.raises(SettingsError, match="would compute with other versions"):
        connect(address)
    monkeypatch.undo()
    (tmp_path / "__init__.py").write_text("# the same version, but another copy")
    monkeypatch.setattr(tradebook, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(SettingsError, match="other versions: code "):
        connect(address)


def test_no_scheduler_and_no_address_are_named():
    pytest.importorskip("distributed")
    with pytest.raises(SettingsError, match="no scheduler answered within"):
        connect("tcp://127.0.0.1:9", wait_s=1)
    with pytest.raises(SettingsError, match="must be the address of a scheduler"):
        run_each(str, [1], dask="cluster")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it listens, and never says a word
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(SettingsError, match=f"{address}: no scheduler answered within"):
            connect(address, wait_s=0.5)


def test_a_worker_that_stands_still_is_refused_within_a_bound(cluster):
    address = cluster.ready(2)
    still = cluster.alive()[0]
    still.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(SettingsError, match="not every worker said its versions within 2 s"):
            connect(address, wait_s=2)
    finally:
        still.send_signal(signal.SIGCONT)


def test_a_worker_killed_in_the_middle_costs_nothing_but_time(cluster, tmp_path):
    address = cluster.ready(2)
    victim, killed = cluster.alive()[0], []

    def kill_one(done, total, name):
        if done == 2:
            victim.send_signal(signal.SIGKILL)
            killed.append(name)

    done = run_each(partial(wait_for, str(tmp_path)), range(12), dask=address, progress=kill_one)
    assert killed and victim.wait(10) == -9
    assert values(done) == [n * n for n in range(12)]
    tried = [int(path.name.split("-")[0]) for path in tmp_path.iterdir()]
    assert len(tried) > len(set(tried)), "nothing was running on the worker that was killed"


def read_part(folder, k):
    "A part of a big matrix, and a mark that it was read"
    (Path(folder) / f"read-{k}-{os.getpid()}").write_text("")
    rng = np.random.default_rng(k)
    x = rng.normal(size=(4_000, 6))
    chance = 1 / (1 + np.exp(-(x[:, 0] + x[:, 1] * x[:, 2])))
    return x, (rng.random(len(x)) < chance).astype(float)


NAMES = [f"column_{k}" for k in range(6)]


def big(address, folder, rounds, attempts=2):
    "One forest on the cluster"
    learner = Learner(rounds=rounds, leaves=15)
    given = (24_000, NAMES, learner, address, attempts)
    return fit_on_cluster(partial(read_part, str(folder)), list(range(6)), *given)


def test_a_forest_survives_a_killed_worker_and_is_the_same_for_the_same_cluster(cluster, tmp_path):
    import lightgbm

    address = cluster.ready(2)
    first = big(address, tmp_path, 30)
    assert all(big(address, tmp_path, 30) == first for _ in range(2))
    assert len({p.name.split("-")[2] for p in tmp_path.iterdir()}) == 2, "one worker read it all"
    x, y = (
        np.concatenate(half)
        for half in zip(*map(partial(read_part, tmp_path), range(6)), strict=True)
    )
    learner = Learner(rounds=30, leaves=15)
    local = lightgbm.train(parameters(learner, len(x)), lightgbm.Dataset(x, y), 30)
    test_x, test_y = read_part(tmp_path, 99)
    forest = lightgbm.Booster(model_str=first)
    assert forest.feature_name() == NAMES
    ours, theirs = (auc(one.predict(test_x), test_y > 0) for one in (forest, local))
    assert ours > 0.7 and abs(ours - theirs) < 0.01

    marks, found = tmp_path / "killed", []
    marks.mkdir()
    fitting = threading.Thread(target=lambda: found.append(big(address, marks, 400)))
    fitting.start()
    until(lambda: len(list(marks.iterdir())) >= 6)
    time.sleep(1.0)
    assert fitting.is_alive(), "the fit was over before the worker could be killed"
    cluster.alive()[0].kill()
    fitting.join(60)
    assert not fitting.is_alive() and len(found) == 1
    assert lightgbm.Booster(model_str=found[0]).num_trees() == 400
    with pytest.raises(DataError, match="part 3 could not be read"):
        unreadable = refuse_odd
        fit_on_cluster(unreadable, [3], 1, NAMES, Learner(), address)


@pytest.mark.parametrize("part", ["workers", "scheduler"])
def test_a_lost_cluster_is_named_and_keeps_what_was_done(cluster, tmp_path, monkeypatch, part):
    monkeypatch.setattr(cluster_module, "PATIENCE_S", 2.0)
    address = cluster.ready(2)
    victims = {"workers": cluster.alive(), "scheduler": cluster.processes[:1]}[part]
    kill = lambda done, total, name: cluster.kill(victims if done == 3 else [])  # noqa: E731
    done = run_each(partial(wait_for, str(tmp_path)), range(12), dask=address, progress=kill)
    assert sum(one.is_ok for one in done) >= 3 and not done[-1].is_ok
    assert all(one.value == n * n for n, one in enumerate(done) if one.is_ok)
    told = {"workers": "all workers are gone, and none came", "scheduler": "the cluster is lost"}
    assert all(f"--dask {address}: {told[part]}" in one.error for one in done if not one.is_ok)
