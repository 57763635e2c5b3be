"""Promotion: the gate keeps its word, the registry remembers every change, and a writer may die at any moment."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_training_model import QUICK, drawn
from typer.testing import CliRunner

from tradebook.base.errors import DataError, ModelError
from tradebook.ops.verbs_models import models_app
from tradebook.training.gate import (
    Bounds,
    Judgement,
    Outcome,
    Reason,
    gain_of,
    judge,
    looks_at,
    settle,
)
from tradebook.training.inspection import diff, flat, verify
from tradebook.training.ledger import add_line, only_writer, read_lines
from tradebook.training.model import fit_direction
from tradebook.training.publish import Dossier, promote, publish, rollback
from tradebook.training.registry import Registry

KEY, HOUR, DAY = "synthetic_SYN-USDT~USDT", 3_600 * 10**9, 86_400 * 10**9
WINDOW = (DAY, 2 * DAY)


@pytest.fixture(scope="module")
def model():
    "One small fitted model"
    return fit_direction(*drawn(), QUICK.with_overrides({"training.rounds": 4}))


def outcome(rng, name="a", n=200, mean=0.5, seen_ns=0):
    "What a model might have shown"
    ts = np.sort(rng.integers(WINDOW[0], WINDOW[1] - HOUR, n))
    p = rng.uniform(0.3, 0.7, 500)
    up = rng.uniform(size=500) < p
    net = rng.normal(mean, 3.0, n)
    return Outcome(name, seen_ns, p, up, net, ts, ts + rng.integers(1, 60 * 10**9, n))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.floats(-3, 3),
    st.floats(-3, 3),
    st.integers(0, 80),
    st.booleans(),
    st.sampled_from([(), (Reason.EXPIRED,), (Reason.FEATURES_DIFFER,)]),
)
def test_a_judgement_keeps_its_word(seed, mean, other, n, has_edge, known):
    rng = np.random.default_rng(seed)
    new, old = outcome(rng, "new", n, mean), outcome(rng, "old", 80, other)
    found = judge(new, old, WINDOW, known=known, has_edge=has_edge)
    against = [reason for reason in found.reasons if reason.side == "against"]
    assert found.is_promoted == (not against) and set(known) <= set(found.reasons)
    if found.is_promoted:
        assert found.low > 0 and n >= 20 and Reason.BETTER in found.reasons
        assert found.challenger["net_bps_hour"] > found.champion["net_bps_hour"]
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["reasons"] == [*found.reasons]
    turned = gain_of(old, new, WINDOW)
    assert np.isclose(turned.value, -found.gain_bps_hour, atol=1e-9)
    assert found == judge(new, old, WINDOW, known=known, has_edge=has_edge) or n == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 200))
def test_nobody_beats_himself_and_nobody_is_judged_on_what_he_saw(seed, n):
    rng = np.random.default_rng(seed)
    one = outcome(rng, "one", n, 2.0)
    assert Reason.NOT_BETTER in judge(one._replace(version="two"), one, WINDOW).reasons
    seen = one._replace(seen_until_ns=WINDOW[0] + 1)
    for pair in ((seen, one), (one, seen), (seen, None)):
        found = judge(*pair, WINDOW)
        assert Reason.WINDOW_SEEN in found.reasons and not found.is_promoted


def test_the_order_of_positions_does_not_matter_and_strangers_are_refused():
    rng = np.random.default_rng(4)
    new, old = outcome(rng, "new", 300, 1.0), outcome(rng, "old", 300, 0.0)
    order = rng.permutation(300)
    mixed = new._replace(**{k: getattr(new, k)[order] for k in ("net_bps", "ts_in", "ts_out")})
    assert np.allclose(gain_of(mixed, old, WINDOW), gain_of(new, old, WINDOW))
    with pytest.raises(DataError, match="new: positions must be opened within the window"):
        gain_of(new, old, (WINDOW[0], WINDOW[0] + HOUR))


def test_without_a_champion_a_model_without_edge_is_marked_and_one_with_edge_is_bounded():
    rng = np.random.default_rng(6)
    poor, rich = outcome(rng, "poor", 200, -1.0), outcome(rng, "rich", 200, 2.0)
    found = judge(poor, None, WINDOW)
    assert found.is_promoted and found.reasons == (Reason.NO_CHAMPION, Reason.NO_EDGE)
    assert judge(rich, None, WINDOW).reasons == (Reason.NO_CHAMPION,)
    assert judge(rich, None, WINDOW, has_edge=False).reasons[-1] == Reason.NO_EDGE
    hasty = judge(rich, None, WINDOW, Bounds(max_positions_hour=1))
    assert not hasty.is_promoted and Reason.TURNOVER in hasty.reasons
    loud = rich._replace(p_up=np.where(rich.p_up > 0.5, 0.95, 0.05))
    assert Reason.CALIBRATION in judge(loud, None, WINDOW).reasons
    nothing = judge(rich, None, None)
    assert nothing.is_promoted and nothing.reasons == (Reason.NO_CHAMPION, Reason.NO_EDGE)


@pytest.fixture
def five(model, tmp_path):
    "Five versions, none in force"
    made = [publish(model, tmp_path, KEY, (i + 1) * 10**9, is_promoted=False) for i in range(5)]
    return tmp_path, [version.version for version in made]


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=st.lists(st.integers(-1, 4), min_size=1, max_size=10))
def test_rollback_undoes_promotions_one_by_one(five, steps):
    root, names = five
    for name in ("current", "history.jsonl"):
        (root / KEY / name).unlink(missing_ok=True)
    registry, stack = Registry(root), []
    for step in steps:
        if step >= 0:
            promote(root, KEY, names[step])
            stack += [names[step]] if stack[-1:] != [names[step]] else []
        elif len(stack) < 2:
            with pytest.raises(ModelError, match="nothing was in force before"):
                rollback(root, KEY)
        else:
            stack.pop()
            assert rollback(root, KEY).version == stack[-1]
        assert registry.current_version(KEY) == (stack[-1] if stack else None)
        assert registry.in_force_before(KEY) == stack[:-1]
    assert [check.status for check in verify(registry, KEY)[:2]] == ["pass", "pass"]


def test_a_registry_from_before_the_history_goes_on(five):
    root, names = five
    facts = Registry(root).load(KEY, names[0]).facts
    marker = {"version": names[0], "digest": facts["digest"]}
    (root / KEY / "current").write_text(json.dumps(marker))
    registry = Registry(root)
    assert registry.current_version(KEY) == names[0] and registry.history(KEY) == []
    promote(root, KEY, names[1])
    assert registry.in_force_before(KEY) == [names[0]]
    assert rollback(root, KEY).version == names[0]


def test_promotion_leads_out_of_every_damage_it_can(five):
    root, names = five
    folder, registry = root / KEY, Registry(root)
    promote(root, KEY, names[0])
    promote(root, KEY, names[1])
    (folder / "current").write_text('{"version": ')  # a damaged marker
    with pytest.raises(ModelError, match="current: damaged"):
        registry.current(KEY)
    promote(root, KEY, names[2])
    assert registry.in_force_before(KEY) == names[:2]
    (folder / "history.jsonl").write_text("")  # a history that lost its lines
    with pytest.raises(ModelError, match="lines are missing"):
        registry.history(KEY)
    promote(root, KEY, names[3])
    assert registry.in_force_before(KEY) == [names[2]]
    assert "lines are missing" in registry.history(KEY)[0]["note"]
    (folder / "history.jsonl").write_text("{}\n")  # one that was edited is for a person to judge
    with pytest.raises(ModelError, match=r"history.jsonl, line 1: was edited.*move it away"):
        promote(root, KEY, names[4])
    assert registry.current_version(KEY) == names[3]
    (folder / "history.jsonl").unlink()
    assert promote(root, KEY, names[4]).version == registry.current_version(KEY)
    with pytest.raises(ModelError, match="no version|is not there"):
        promote(root, "typo_A-B", names[0])
    assert registry.symbols() == [KEY]


def test_a_reader_between_marker_and_line_is_not_alarmed(five):
    root, names = five
    promote(root, KEY, names[0])
    old = (root / KEY / "current").read_bytes()
    promote(root, KEY, names[1])
    (root / KEY / "current").write_bytes(old)  # as a reader who looked at the marker first
    assert [row["version"] for row in Registry(root).history(KEY)] == names[:2]


def test_who_comes_again_to_the_same_stretch_must_be_surer(tmp_path):
    other = fit_direction(*drawn(seed=3), QUICK.with_overrides({"training.rounds": 3}))
    more = fit_direction(*drawn(seed=4), QUICK.with_overrides({"training.rounds": 3}))
    first = fit_direction(*drawn(), QUICK.with_overrides({"training.rounds": 3}))
    names = [
        publish(one, tmp_path, KEY, k * 10**9).version for k, one in enumerate((first, other, more))
    ]
    again = publish(
        other, tmp_path, KEY, 9 * 10**9, is_promoted=False
    ).version  # the same forest once more
    promote(tmp_path, KEY, names[0])
    rng, registry, looks = np.random.default_rng(0), Registry(tmp_path), []
    old = outcome(rng, names[0], 300, 0.0)
    for name in (names[1], again, names[2]):
        looks.append(looks_at(registry.attempts(KEY), names[0], WINDOW, name))
        new = outcome(rng, name, 300, -1.0)
        settle(tmp_path, KEY, judge(new, old, WINDOW, n_looks=looks[-1]), "a test", 7)
    assert looks == [1, 1, 2] and [a["n_looks"] for a in registry.attempts(KEY)] == looks
    elsewhere = (WINDOW[1], WINDOW[1] + DAY)
    assert looks_at(registry.attempts(KEY), names[0], elsewhere, "later-ff") == 1
    # the same forest on a stretch that was asked for after it lost on another: a further look
    shopped = [looks_at(registry.attempts(KEY), names[0], elsewhere, name) for name in names[1:]]
    assert shopped == [2, 2] and looks_at(registry.attempts(KEY), names[0], WINDOW, again) == 2
    assert looks_at(registry.attempts(KEY), names[0], WINDOW, "later-ff") == 3
    lows, let_in = [], []
    for n_looks in (1, 2, 5, 40):  # a challenger that is better, but not by much
        rng = np.random.default_rng(5)
        close = old._replace(version="b", net_bps=old.net_bps + rng.normal(0.55, 3.0, 300))
        found = judge(close, old, WINDOW, n_looks=n_looks)
        lows.append(found.low)
        let_in.append(found.is_promoted)
    assert lows == sorted(lows, reverse=True) and let_in[0] and not let_in[-1]


def test_a_refused_attempt_changes_nothing_but_the_record(five):
    root, names = five
    promote(root, KEY, names[0])
    before = (root / KEY / "current").read_bytes(), (root / KEY / "history.jsonl").read_bytes()
    rng = np.random.default_rng(1)
    new, old = outcome(rng, names[1], 100, -1.0), outcome(rng, names[0], 100, 1.0)
    assert settle(root, KEY, judge(new, old, WINDOW), "a test", 7).version == names[0]
    after = (root / KEY / "current").read_bytes(), (root / KEY / "history.jsonl").read_bytes()
    attempt = Registry(root).attempts(KEY)[0]
    assert before == after and attempt["version"] == names[1] and attempt["who"] == "a test"
    assert "NOT_BETTER" in attempt["reasons"] and attempt["window"] == list(WINDOW)
    assert attempt["low"] <= attempt["gain_bps_hour"] <= attempt["high"] < 0
    (root / KEY / names[1] / "model.txt").write_text("tree")
    with pytest.raises(ModelError, match="cut short"):
        settle(root, KEY, judge(new, old, WINDOW), "a test", 8)
    assert len(Registry(root).attempts(KEY)) == 1


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_a_ledger_survives_a_cut_anywhere_and_no_other_damage(tmp_path_factory, n, seed):
    path, rng = tmp_path_factory.mktemp("ledger") / "lines.jsonl", random.Random(seed)
    with only_writer(path.parent):
        records = [add_line(path, {"n": i, "text": "é\n"}) for i in range(n)]
        whole = path.read_bytes()
        cut = rng.randrange(len(whole))
        path.write_bytes(whole[:cut])
        kept = read_lines(path)
        assert kept == records[: whole[:cut].count(b"\n")]
        added = add_line(path, {"n": "more"})
        assert read_lines(path) == [*kept, added]
    at = rng.randrange(len(whole) - 1)
    edited = bytearray(whole)
    edited[at] ^= 1
    path.write_bytes(edited)
    with pytest.raises(ModelError, match="line "):
        read_lines(path)


def write_on_and_on(model, root, n):
    "In a process of its own: publish, promote, refuse and roll back until somebody ends it"
    child = os.fork()
    if child:
        return child
    try:
        while True:
            n += 1
            made = publish(model, root, KEY, n * 10**9, is_promoted=n % 3 == 0)
            if n % 3 == 1:
                side, bounds = {"version": made.version}, Bounds()
                given = (side, None, 1.0, 0.5, 2.0, 20, (1, 2), bounds)
                settle(root, KEY, Judgement(True, (Reason.BETTER,), *given), "writer", n)
            if n % 7 == 0:
                rollback(root, KEY, "writer", n)
    finally:
        os._exit(1)


def test_a_writer_killed_at_random_moments_leaves_a_whole_registry(model, tmp_path):
    "kill -9 from outside, again and again: one model in force, each change on record once"
    rng, registry, n, n_changes, n_rounds = random.Random(5), Registry(tmp_path), 1, 1, 15
    first = publish(model, tmp_path, KEY, 10**9)
    for _ in range(n_rounds):
        writer = write_on_and_on(model, tmp_path, n)
        time.sleep(rng.uniform(0.02, 0.25))
        os.kill(writer, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]) == -signal.SIGKILL
        history = registry.history(KEY)
        assert registry.current(KEY).version == history[-1]["version"]
        assert len(history) >= n_changes
        promised = [attempt["version"] for attempt in registry.attempts(KEY)]
        by_gate = {r["version"] for r in history if "attempt" in r}
        assert by_gate <= set(promised) and len(promised) - len(by_gate) <= n_rounds
        versions = registry.versions(KEY)
        n, n_changes = registry.load(KEY, versions[0]).facts["created_ns"] // 10**9, len(history)
    assert {check.status for check in verify(registry, KEY)} <= {"pass", "warn"}
    assert n_changes > n_rounds and first.version in versions


PROMOTER = """
    import sys
    from tradebook.training.publish import promote
    root, key, names = sys.argv[1], sys.argv[2], sys.argv[3:]
    for i in range(12):
        promote(root, key, names[i % len(names)], who=names[0])
"""


def test_two_promoters_wait_for_each_other(five):
    root, names = five
    code = textwrap.dedent(PROMOTER)
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(root), KEY, *part])
        for part in (names[:2], names[2:4])
    ]
    assert [process.wait(60) for process in started] == [0, 0]
    history = Registry(root).history(KEY)
    assert len(history) == 24 and {row["who"] for row in history} == {names[0], names[2]}
    assert all(b["replaced"] == a["version"] for a, b in pairwise(history))
    assert read_lines(root / KEY / "history.jsonl") == history


def test_a_difference_is_found_whatever_it_is(model, tmp_path):
    old = publish(model, tmp_path, KEY, 10**9, dossier=Dossier(thresholds={"enter": 0.55}))
    more = Dossier(thresholds={"enter": 0.6}, trials={"study": "s", "n_trials": 40})
    new = publish(model, tmp_path, KEY, 2 * 10**9, note={"source": "x"}, dossier=more)
    found = {row.name: (row.heading, row.before, row.after) for row in diff(old, new)}
    assert found["thresholds.enter"] == ("use", 0.55, 0.6)
    assert found["trials.n_trials"] == ("trials", None, 40)
    assert found["note.source"] == ("data", None, "x") and not diff(new, new)
    assert {row.name for row in diff(new, old)} == set(found)
    assert not set(found) & {"version", "created_ns", "digest"}
    assert flat(new.facts)["thresholds.enter"] == 0.6


def told(root, *words):
    "Exit code and object of a verb"
    done = CliRunner().invoke(models_app, [*words, "--data", str(root.parent), "--json"])
    return done.exit_code, json.loads(done.stdout)


def test_verbs_end_with_stable_codes(model, tmp_path):
    root = tmp_path / "models"
    code, answer = told(root, "list")
    assert code == 4 and "there are no models" in answer["error"]
    names = [publish(model, root, KEY, i * 10**9).version for i in (1, 2)]
    code, answer = told(root, "list")
    assert code == 0 and [row["is_current"] for row in answer["versions"]] == [True, False]
    assert told(root, "show", "before")[1]["version"] == names[0]
    assert told(root, "show", "99999")[0] == 4
    assert told(root, "diff", *names)[0] == 0
    assert told(root, "list", "--symbol", "BTC/USD:USD")[0] == 2
    code, answer = told(root, "promote", names[0])
    assert code == 4 and "does not name its market" in answer["error"]
    assert (
        told(root, "promote", names[0], "--force", "the other learned from a broken feed")[0] == 0
    )
    assert Registry(root).history(KEY)[-1]["note"] == "the other learned from a broken feed"
    assert told(root, "rollback")[1]["version"] == names[1]
    assert told(root, "verify") == (0, told(root, "verify")[1])
    path = root / KEY / names[1] / "model.txt"
    path.write_bytes(path.read_bytes()[:-1])
    code, answer = told(root, "verify")
    assert code == 4 and [c["what"] for c in answer["checks"] if c["status"] == "fail"] == [
        "current",
        names[1],
    ]
    assert told(root, "rollback")[1]["version"] == names[0]
    assert told(root, "rollback")[0] == 4
