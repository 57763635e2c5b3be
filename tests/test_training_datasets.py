"""Data sets: days together are one pass, nothing is made twice, no damage stays unseen, kill -9 is survived."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tradebook.base.clock import NS_PER_S
from tradebook.base.errors import DataError, ModelError
from tradebook.features.rows import build_features
from tradebook.features.schema import feature_set, only
from tradebook.market.events import FLAG_LAST, KIND_GAP, make_events
from tradebook.market.part_files import stamps_path
from tradebook.market.quotes import quotes
from tradebook.market.store import DAY_NS, Store
from tradebook.market.synthetic import synthetic_market
from tradebook.training.building import Request, build_dataset
from tradebook.training.datasets import list_datasets, load_dataset, verify_dataset
from tradebook.training.label_sets import KINDS, LabelSet, label_rows

MIDNIGHT_NS = 20_000 * DAY_NS
MINUTE, BARRIERS = LabelSet("horizon", 60.0), LabelSet("barriers", 60.0)


def stretch(seed, start_ns, seconds, after=None):
    "Events of a made market, after a declared hole if something stands before them"
    events = synthetic_market(seed=seed, duration_s=seconds, start_ns=start_ns).events
    if after is None:
        return events
    hole_ns = int(events["ts_recv"][0] - after["ts_recv"][-1])
    first = events["ts_recv"][0]
    gap = make_events(ts_recv=first, kind=KIND_GAP, size_lots=hole_ns, flags=FLAG_LAST)
    return np.concatenate([gap, events])


@pytest.fixture(scope="module")
def three_days():
    "Events over two midnights with a hole of nearly a day between, and one that ends at midnight"
    first = stretch(1, MIDNIGHT_NS - 200 * NS_PER_S, 400)
    second = stretch(2, MIDNIGHT_NS + DAY_NS - 150 * NS_PER_S, 149, first)
    third = stretch(3, MIDNIGHT_NS + DAY_NS + 2 * NS_PER_S, 200, second)
    return np.concatenate([first, second, third])


OF = synthetic_market(seed=1, duration_s=1).instrument
MARKET = (OF.venue, OF.symbol)
EVERYTHING = Request((MARKET,), None, None, feature_set("default", 5_000), MINUTE)


@pytest.fixture
def home(tmp_path, three_days):
    "A data root whose store holds the three days, in uneven files"
    at = np.flatnonzero(three_days["flags"] & FLAG_LAST) + 1
    cuts = at[[len(at) // 7, len(at) // 3, len(at) // 2]]
    for piece in np.split(three_days, cuts):
        Store(tmp_path / "market").write(piece, OF, "test")
    return tmp_path


def build(home, request=EVERYTHING, **more):
    "Build in a data root"
    return build_dataset(home / "market", home / "datasets", request, **more)


def words(built):
    "What became of each piece: kind, day, word"
    return {(d.kind, d.date): d.word for found in built.done.values() for d in found}


def pieces(home):
    "Every file of every piece, with its content"
    files = (home / "datasets").rglob("date=*/*")
    return {p.relative_to(home): p.read_bytes() for p in files if p.name != ".lock"}


def same_labels(held, slow):
    "Labels are the same wherever there is an outcome, and there in the same rows"
    ok = slow["is_valid"]
    assert (held["is_valid"] == ok).all()
    assert all(held[name][ok].tobytes() == slow[name][ok].tobytes() for name in slow.dtype.names)


SETS = [feature_set("desk"), feature_set("default", 200, "float32"), feature_set("desk", 10_000)]


@pytest.mark.parametrize("features", SETS, ids=lambda f: f"{f.name}-{f.interval_ms}-{f.dtype}")
def test_days_put_together_are_one_pass(tmp_path, three_days, features):
    events = three_days
    if features.interval_ms < 10_000:  # without the long hole: a midnight is enough
        events = three_days[three_days["ts_recv"] < MIDNIGHT_NS + 250 * NS_PER_S]
    Store(tmp_path / "market").write(events, OF, "test")
    made = build(tmp_path, replace(EVERYTHING, features=features))
    data, whole = load_dataset(tmp_path / "datasets", made.id), build_features(events, OF, features)
    assert data.x.dtype == features.dtype and data.x.tobytes() == whole.x.tobytes()
    assert data.rows.tobytes() == whole.rows.tobytes()
    assert len(made.manifest["markets"][0]["days"]) == len(np.unique(events["ts_recv"] // DAY_NS))
    same_labels(data.labels, label_rows(MINUTE, whole, quotes(events), OF))


ASKED = {kind: LabelSet(kind, 60.0) for kind in KINDS}
ASKED["barriers, bps"] = LabelSet("barriers", 60.0, distance_bps=3.0)
ASKED["sides, maker"] = LabelSet("sides", 60.0, distance_bps=3.0, is_maker=True)


@pytest.mark.parametrize("kind", ASKED)
def test_labels_of_all_kinds_look_over_midnight(home, three_days, kind):
    asked = ASKED[kind]
    made = build(home, replace(EVERYTHING, labels=asked))
    data = load_dataset(home / "datasets", made.id)
    whole = build_features(three_days, OF, EVERYTHING.features)
    slow = label_rows(asked, whole, quotes(three_days), OF)
    same_labels(data.labels, slow)
    late = (data.ts < MIDNIGHT_NS) & (data.labels["ts_end"] > MIDNIGHT_NS)
    assert late.sum() > 5 or asked.kind in ("barriers", "sides")


def test_days_that_arrive_one_by_one_give_the_same(home, three_days, tmp_path):
    whole, other = build(home), tmp_path / "other"
    day, found = three_days["ts_recv"] // DAY_NS, []
    for date in np.unique(day):
        Store(other / "market").write(three_days[day == date], OF, "test")
        found.append(words(build(other)))
    last = load_dataset(other / "datasets", EVERYTHING.id)
    assert last.x.tobytes() == load_dataset(home / "datasets", whole.id).x.tobytes()
    assert whole.manifest["content_sha256"] == last.manifest["content_sha256"]
    first, second, third = sorted({date for _, date in found[-1]})
    # the first day had all its rows up to midnight: only its last labels waited for the next day
    assert found[1]["features", first] == "kept" and found[1]["labels", first] == "rebuilt"
    assert found[2]["features", first] == found[2]["labels", first] == "kept"
    assert found[2]["features", third] == "built" and found[2]["labels", second] == "rebuilt"


def test_what_is_unchanged_is_not_touched(home):
    build(home)
    before = pieces(home)
    again = build(home)
    assert set(words(again).values()) == {"kept"} and pieces(home) == before
    other = build(home, replace(EVERYTHING, labels=LabelSet("horizon", 61.0)))
    assert {w for (kind, _), w in words(other).items() if kind == "features"} == {"kept"}
    assert {w for (kind, _), w in words(other).items() if kind == "labels"} == {"built"}
    changed = replace(EVERYTHING.features, params={**EVERYTHING.features.params, "formulas": 99})
    third = build(home, replace(EVERYTHING, features=changed))
    assert set(words(third).values()) == {"built"}
    after = pieces(home)
    assert all(after[name] == content for name, content in before.items())


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(share=st.floats(0.02, 0.98), kind=st.sampled_from(sorted(ASKED)))
def test_a_stretch_knows_nothing_from_its_end_on(home, three_days, share, kind):
    events = three_days[three_days["ts_recv"] < MIDNIGHT_NS + 250 * NS_PER_S]
    first, last = int(events["ts_recv"][0]), int(events["ts_recv"][-1])
    stop_ns, asked = first + round(share * (last - first)), replace(ASKED[kind], horizon_s=50.0)
    made = build(home, replace(EVERYTHING, stop_ns=stop_ns, labels=asked))
    data = load_dataset(home / "datasets", made.id)
    earlier = events[events["ts_recv"] < stop_ns]
    slow = build_features(earlier, OF, EVERYTHING.features)
    assert data.x[: len(slow)].tobytes() == slow.x.tobytes()
    assert (data.ts < stop_ns).all() and (data.labels["ts_known"] < stop_ns).all()
    same_labels(data.labels[: len(slow)], label_rows(asked, slow, quotes(earlier), OF))
    assert not data.labels["is_valid"][len(slow) :].any()


def test_a_damaged_file_is_found_named_and_made_again(home):
    made = build(home)
    good, rng = pieces(home), random.Random(3)
    for name in rng.sample(sorted(good), 6):
        damage = rng.choice(["cut", "byte", "gone", "empty"])
        path, content = home / name, good[name]
        at = rng.randrange(len(content) // 4, len(content) // 2)
        broken = {"cut": content[:at], "empty": b""}
        broken["byte"] = content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]
        path.unlink() if damage == "gone" else path.write_bytes(broken[damage])
        date = path.parent.name.removeprefix("date=")
        is_memory = path.name.startswith("memory")
        if not is_memory:  # it is no part of what is loaded
            told = verify_dataset(home / "market", home / "datasets", made.id)
            if damage == "byte" and not told:  # a byte that says nothing: statistics of the file
                load_dataset(home / "datasets", made.id)
                path.write_bytes(content)
                continue
            assert all(date in sentence for sentence in told) and told
            with pytest.raises((DataError, ModelError)):
                load_dataset(home / "datasets", made.id)
        mended = build(home)
        kind = "labels" if "labels=" in str(path) else "features"
        assert words(mended)[kind, date] in ("rebuilt", "built"), (name, damage)
        others = {k: w for k, w in words(mended).items() if k != (kind, date)}
        assert set(others.values()) == {"kept"}, (name, damage)
        assert mended.manifest["content_sha256"] == made.manifest["content_sha256"]
        assert set(pieces(home)) == set(good)


def test_one_character_is_enough_to_refuse(home):
    made, place = build(home), home / "datasets"
    hash_ = EVERYTHING.features.hash
    for i in range(len(hash_)):
        other = hash_[:i] + ("0" if hash_[i] != "0" else "1") + hash_[i + 1 :]
        with pytest.raises(ModelError, match=f"holds features {hash_}, asked for {other}"):
            load_dataset(place, made.id, features=other)
    few = only(EVERYTHING.features, *EVERYTHING.features.names[:-1])
    with pytest.raises(ModelError, match="44 columns there|43 columns here"):
        load_dataset(place, made.id, features=few)
    with pytest.raises(ModelError, match="holds labels"):
        load_dataset(place, made.id, labels=LabelSet("horizon", 60.5))
    assert len(load_dataset(place, made.id, hash_, MINUTE)) == made.manifest["n_rows"]


def test_changed_sources_are_told_and_refused(home):
    made = build(home)
    late = stretch(9, MIDNIGHT_NS + DAY_NS + 300 * NS_PER_S, 60)
    Store(home / "market").write(late, OF, "later")
    told = verify_dataset(home / "market", home / "datasets", made.id)
    assert len(told) == 1 and "its sources in the store have changed" in told[0]
    assert (
        len(load_dataset(home / "datasets", made.id)) == made.manifest["n_rows"]
    )  # still those rows
    middle = replace(EVERYTHING, stop_ns=MIDNIGHT_NS)
    before = build(home, middle)
    grown = build(home)
    assert grown.id == made.id and grown.manifest["n_rows"] > made.manifest["n_rows"]
    assert load_dataset(home / "datasets", before.id).manifest == before.manifest
    assert {row["id"] for row in list_datasets(home / "datasets")} == {made.id, before.id}


def test_one_market_fails_and_the_others_go_on(home, three_days):
    names = [(OF.venue, f"{name}/USDT:USDT") for name in ("ONE", "TWO")]
    for _, symbol in names:
        of = replace(OF, symbol=symbol)
        Store(home / "market").write(three_days, of, "test")
    store = Store(home / "market")
    part = store.parts(*names[0])[1]
    path = store.day(*names[0], part.date) / part.file
    path.write_bytes(path.read_bytes()[:-2000])
    asked = replace(EVERYTHING, markets=(*names, MARKET))
    made = build(home, asked)
    (row,) = made.failed
    assert row["symbol"] == names[0][1] and part.date in row["error"] + path.parent.name
    assert [m["symbol"] for m in made.manifest["markets"]] == [names[1][1], MARKET[1]]
    data = load_dataset(home / "datasets", made.id)
    alone = load_dataset(home / "datasets", made.id, symbol=names[1][1])
    assert (np.diff(data.ts) >= 0).all() and data.x[data.market == 0].tobytes() == alone.x.tobytes()
    weights = data.weights[data.market == 1]
    assert (
        weights.tobytes()
        == load_dataset(home / "datasets", made.id, symbol=MARKET[1]).weights.tobytes()
    )
    with pytest.raises(DataError, match="has no ONE/USDT"):
        load_dataset(home / "datasets", made.id, symbol=names[0][1])


def test_rows_that_were_swapped_in_the_store_are_refused(home):
    store = Store(home / "market")
    part = store.parts(*MARKET)[0]
    path = store.day(*MARKET, part.date) / part.file
    other = store.parts(*MARKET)[-1]
    stranger = store.day(*MARKET, other.date) / other.file
    shutil.copy(stranger, path)
    with pytest.raises(DataError, match=r"\.stamps\.parquet must stand for"):
        build(home)
    shutil.copy(stamps_path(stranger), stamps_path(path))
    with pytest.raises(DataError, match="rows differ from the manifest"):
        build(home)
    assert not list((home / "datasets").rglob("*.parquet"))


def in_a_child(home, request):
    "Begin a build in a process of its own"
    child = multiprocessing.get_context("fork").Process(target=build, args=(home, request))
    child.start()
    return child


def manifests(home):
    "Manifests of finished pieces"
    return list((home / "datasets").rglob("date=*/manifest.json"))


def test_kill_9_in_the_middle_leaves_whole_days_and_goes_on(tmp_path):
    store, asked = Store(tmp_path / "market"), replace(EVERYTHING, labels=BARRIERS)
    for day in range(4):
        store.write(stretch(day, MIDNIGHT_NS + day * DAY_NS + 3600 * NS_PER_S, 30), OF, "test")
    for n_whole, wait_s in ((1, 0.01), (3, 0.05), (5, 0.03)):
        child, deadline = in_a_child(tmp_path, asked), time.monotonic() + 90
        while len(manifests(tmp_path)) < n_whole:  # kill it while the next piece is on its way
            assert time.monotonic() < deadline and child.is_alive()
            time.sleep(0.002)
        time.sleep(wait_s)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        for path in (tmp_path / "datasets").rglob("date=*/manifest.json"):
            assert (path.parent / json.loads(path.read_text())["file"]).is_file()
        assert not list((tmp_path / "datasets").glob("*.json"))
    n_whole, done = len(manifests(tmp_path)), build(tmp_path, asked)
    made = list(words(done).values())
    assert len(made) == 8 and made.count("kept") == n_whole >= 5 and "rebuilt" not in made
    assert not [p for p in (tmp_path / "datasets").rglob("*") if ".tmp" in p.name]
    fresh = build_dataset(tmp_path / "market", tmp_path / "fresh", asked)
    assert done.manifest["content_sha256"] == fresh.manifest["content_sha256"]


def test_two_builds_at_once_make_one_data_set(home):
    other = in_a_child(home, EVERYTHING)
    mine = build(home)
    other.join(120)
    assert other.exitcode == 0
    again = build(home)
    assert set(words(again).values()) == {"kept"}
    assert again.manifest["content_sha256"] == mine.manifest["content_sha256"]
    assert verify_dataset(home / "market", home / "datasets", mine.id) == []


def test_the_command_line_ends_with_7_and_names_who_failed(home, three_days):
    events = three_days[three_days["ts_recv"] < MIDNIGHT_NS]
    Store(home / "market").write(events, replace(OF, symbol="ONE/USDT:USDT"), "test")
    store = Store(home / "market")
    part = store.parts(OF.venue, "ONE/USDT:USDT")[0]
    (store.day(OF.venue, "ONE/USDT:USDT", part.date) / part.file).unlink()
    command = [sys.executable, "-m", "tradebook", "dataset", "build", "--workers", "0", "--json"]
    command += ["--set", "data.min_coverage=0", "--set", "features.interval_ms=5000"]
    done = subprocess.run([*command, "--data", home], capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert done.returncode == 7 and found["ok"] is False and done.stderr == ""
    assert [row["symbol"] for row in found["failed"]] == ["ONE/USDT:USDT"]
    assert [m["symbol"] for m in found["markets"]] == [OF.symbol]
    assert len(load_dataset(home / "datasets", found["id"])) == found["n_rows"]
