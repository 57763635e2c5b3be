"""The registry under fire: damage, concurrent readers, killed writers; and prediction bit for bit."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from test_training_model import QUICK, drawn

from tradebook.base.errors import ModelError
from tradebook.training.model import fit_direction
from tradebook.training.prediction import Predictor
from tradebook.training.publish import promote, publish, write_version
from tradebook.training.registry import Registry, facts_digest, facts_text, symbol_key

KEY = symbol_key("synthetic", "SYN/USDT:USDT")
CREATED_NS = 1_767_700_800_000_000_000


@pytest.fixture(scope="module")
def model():
    "One small fitted model"
    return fit_direction(*drawn(), QUICK)


@pytest.fixture
def published(model, tmp_path):
    "A registry with one version in force"
    return Registry(tmp_path), publish(model, tmp_path, KEY, CREATED_NS)


def test_what_was_published_is_what_is_read(published, model):
    registry, version = published
    assert registry.current(KEY) == version
    assert version.text == model.model_text
    assert version.feature_names == model.feature_names
    assert version.metrics["auc"] == model.metrics["auc"]
    assert version.facts["label_definition"]["horizon_s"] == QUICK.labels.horizon_s
    assert version.facts["settings_hash"] == QUICK.hash
    assert json.loads(json.dumps(version.facts)) == version.facts


def test_every_truncation_is_refused_by_name(published, tmp_path):
    registry, version = published
    for name in ("model.txt", "model.json"):
        path = tmp_path / KEY / version.version / name
        whole = path.read_bytes()
        for size in (0, 1, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(ModelError, match=name):
                registry.current(KEY)
            with pytest.raises(ModelError, match=name):
                registry.load(KEY, version.version)
        path.write_bytes(whole)
    assert registry.current(KEY) == version


def test_every_edited_byte_is_refused_by_name(published, tmp_path):
    registry, version = published
    rng = np.random.default_rng(1)
    for name in ("model.txt", "model.json"):
        path = tmp_path / KEY / version.version / name
        whole = path.read_bytes()
        for at in rng.integers(0, len(whole), 60):
            if whole[at : at + 1].isspace():
                continue
            edited = bytearray(whole)
            edited[at] ^= 1
            path.write_bytes(edited)
            with pytest.raises(ModelError, match=name):
                registry.current(KEY)
        path.write_bytes(whole)
    assert registry.current(KEY) == version


def test_a_missing_file_is_named(published, tmp_path):
    registry, version = published
    (tmp_path / KEY / version.version / "model.txt").unlink()
    with pytest.raises(ModelError, match=r"model\.txt: cannot be read"):
        registry.current(KEY)
    (tmp_path / KEY / version.version / "model.json").unlink()
    with pytest.raises(ModelError, match=f"no version '{version.version}'"):
        registry.current(KEY)


def test_files_swapped_between_versions_are_refused(published, tmp_path):
    registry, version = published
    other = publish(fit_direction(*drawn(seed=2), QUICK), tmp_path, KEY, CREATED_NS + 10**9)
    mine, theirs = (tmp_path / KEY / v.version for v in (version, other))
    (theirs / "model.txt").write_bytes((mine / "model.txt").read_bytes() + b"\n" * 20_000)
    with pytest.raises(ModelError, match=r"model\.txt: was edited"):
        registry.current(KEY)
    (theirs / "model.json").write_bytes((mine / "model.json").read_bytes())
    with pytest.raises(ModelError, match="lies in a folder"):
        registry.current(KEY)


def test_a_new_digest_over_edited_facts_does_not_fool_the_marker(published, tmp_path):
    registry, version = published
    facts = {**version.facts, "move_slope_bps": 999.0}
    facts["digest"] = facts_digest(facts)
    (tmp_path / KEY / version.version / "model.json").write_text(facts_text(facts))
    with pytest.raises(ModelError, match="means another"):
        registry.current(KEY)


def test_a_version_is_never_written_twice(published, model, tmp_path):
    _, version = published
    with pytest.raises(ModelError, match="never overwritten"):
        publish(model, tmp_path, KEY, CREATED_NS)
    with pytest.raises(ModelError, match="never overwritten"):
        write_version(tmp_path, version.facts, {"model.txt": "something else"})


def test_versions_sort_by_time_and_the_marker_can_go_back(model, tmp_path):
    moments = [CREATED_NS + d for d in (0, 1_000, 999_999_000, 10**9, 86_400 * 10**9)]
    made = [publish(model, tmp_path, KEY, m).version for m in moments]
    registry = Registry(tmp_path)
    assert registry.versions(KEY) == made[::-1] == sorted(made, reverse=True)
    assert registry.current_version(KEY) == made[-1]
    promote(tmp_path, KEY, made[1])
    assert registry.current(KEY).version == made[1]


def test_an_untrained_symbol_has_no_model_and_that_is_no_error(tmp_path):
    registry = Registry(tmp_path / "not" / "there")
    assert registry.current(KEY) is None and registry.versions(KEY) == []
    assert registry.symbols() == []


@pytest.mark.parametrize("symbol", ["../BTC", "a b", "BTC\n", "", "BTC/USD:USD/..", "."])
def test_symbols_cannot_climb_out_of_the_folder(symbol):
    if symbol == "":
        assert symbol_key("v", symbol) == "v_"
    else:
        with pytest.raises(ModelError, match="may hold letters"):
            symbol_key("v", symbol)


READER = """
    import sys
    from tradebook.training.registry import Registry
    registry, key, seen, n = Registry(sys.argv[1]), sys.argv[2], set(), 0
    print("ready", flush=True)
    while registry.current_version(key) != sys.argv[3] or n < 50:
        model = registry.current(key)  # raises on anything half done
        assert model.text.startswith("tree") and model.facts["version"] == model.version
        seen.add(model.version)
        n += 1
    print(n, len(seen))
"""


def test_a_reader_in_another_process_never_sees_half_a_model(model, tmp_path):
    first = publish(model, tmp_path, KEY, CREATED_NS)
    last = publish(model, tmp_path, KEY, CREATED_NS + 10**9, is_promoted=False)
    code = textwrap.dedent(READER)
    command = [sys.executable, "-c", code, str(tmp_path), KEY, last.version]
    reader = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert reader.stdout.readline() == "ready\n"
        until, n = time.monotonic() + 3, 0
        while time.monotonic() < until:
            publish(model, tmp_path, KEY, CREATED_NS + (n + 2) * 10**9)
            promote(tmp_path, KEY, first.version)
            n += 1
        time.sleep(0.1)
        promote(tmp_path, KEY, last.version)
        out, err = reader.communicate(timeout=30)
    finally:
        reader.kill()
    assert reader.returncode == 0, err
    reads, versions = map(int, out.split())
    assert reads >= 50 and versions > 2 and n > 20


def publish_and_die(model, root, created_ns, n_steps):
    "In a process of its own: publish, and drop dead before the n-th touch of a file"
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = n_steps

    def count(event, _):
        nonlocal left
        if event in {"open", "os.mkdir", "os.rename", "os.remove", "shutil.rmtree"}:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(count)
        publish(model, root, KEY, created_ns)
        os._exit(0)
    finally:
        os._exit(1)


def test_a_writer_killed_before_any_step_leaves_a_whole_registry(model, tmp_path):
    registry, codes, n = Registry(tmp_path), [], 0
    expected = publish(model, tmp_path, KEY, CREATED_NS)
    while not codes or codes[-1] == -signal.SIGKILL:
        n += 1
        moment = CREATED_NS + n * 10**9
        codes.append(publish_and_die(model, tmp_path, moment, n))
        versions = registry.versions(KEY)
        assert all(registry.load(KEY, v).text == model.model_text for v in versions)
        found = registry.current(KEY)
        assert found.version in {expected.version, versions[0]}
        expected = found
    assert codes[-1] == 0 and len(codes) > 10
    assert registry.current(KEY).facts["created_ns"] == CREATED_NS + n * 10**9


def test_single_rows_equal_the_batch_bit_for_bit(model, published):
    _, version = published
    predictor = Predictor(version)
    rng = np.random.default_rng(3)
    x = rng.normal(size=(6_000, predictor.n_columns)) * 10.0 ** rng.integers(-6, 7, (6_000, 1))
    x[rng.uniform(size=x.shape) < 0.05] = np.nan
    x[rng.uniform(size=x.shape) < 0.01] = 0.0
    x[:5] = np.nan
    x[5:10] = np.inf
    x[10:15] = -np.inf
    x[15:20] = 5e-324
    p_up, edge_bps = predictor.predict(x)
    single = np.array([predictor.predict_row(row) for row in x])
    assert single[:, 0].tobytes() == p_up.tobytes()
    assert single[:, 1].tobytes() == edge_bps.tobytes()
    for n in (1, 2, 999):  # and however the batch is cut
        assert predictor.predict(x[:n])[0].tobytes() == p_up[:n].tobytes()
    assert len(np.unique(p_up)) > 100


def test_single_rows_accept_any_layout(published):
    predictor = Predictor(published[1])
    x = np.random.default_rng(1).normal(size=(50, predictor.n_columns))
    expected = predictor.predict(x)[0]
    wide = np.zeros((50, 2 * predictor.n_columns))
    wide[:, ::2] = x
    for rows in (np.asfortranarray(x), wide[:, ::2]):
        assert [predictor.predict_row(r)[0] for r in rows] == expected.tolist()
        np.testing.assert_array_equal(predictor.predict(rows)[0], expected)


def test_many_predictors_come_and_go(published):
    x = np.random.default_rng(1).normal(size=Predictor(published[1]).n_columns)
    assert len({Predictor(published[1]).predict_row(x) for _ in range(200)}) == 1


def modules_after(statement):
    "Modules that a fresh interpreter has loaded after a statement"
    code = f"{statement}\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_reading_half_loads_nothing_that_can_train():
    registry = modules_after("import tradebook.training.registry")
    assert not {"lightgbm", "numpy", "sklearn"} & registry
    both = modules_after("import tradebook.training.registry, tradebook.training.prediction")
    assert "lightgbm" not in both
    forbidden = {f"tradebook.training.{m}" for m in ("splits", "metrics", "model", "publish")}
    assert not forbidden & both
    assert not {m for m in both if m.startswith("tradebook.labels")}
