"""Settings: one order, no unknown names, nothing secret ever shown, the same from everywhere."""

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tradebook.base.errors import SettingsError
from tradebook.base.sections import SECTIONS, settings_text
from tradebook.base.settings import find_root, load_settings

HUSH = "s3cr3t-do-not-show"


@pytest.fixture
def project(tmp_path):
    "A folder with a settings file to write on"

    def write(text=""):
        (tmp_path / "settings.ini").write_text(text)
        return tmp_path

    return write


def origin(settings, name):
    return next(o for o in settings.origins() if o.name == name)


def test_later_sources_win_and_remember_whom_they_overruled(project, monkeypatch):
    root = project("[labels]\nhorizon_s = 60\n")
    monkeypatch.chdir(root)
    variables = {"TRADEBOOK__LABELS__HORIZON_S": "90"}
    steps = [
        (load_settings(root.parent, {}), 30.0, "default"),
        (load_settings(None, {}), 60.0, "settings.ini"),
        (load_settings(None, variables), 90.0, "environment"),
        (load_settings(None, variables, {"labels.horizon_s": "120"}), 120.0, "command line"),
    ]
    for settings, value, source in steps:
        assert settings.labels.horizon_s == value
        assert origin(settings, "labels.horizon_s").source == source
    last = origin(steps[-1][0], "labels.horizon_s")
    assert last.value == "120.0"
    assert [s[:2] for s in last.shadowed] == [
        ("environment", "TRADEBOOK__LABELS__HORIZON_S"),
        ("settings.ini", "settings.ini:2"),
        ("default", "built in"),
    ]
    assert [s[2] for s in last.shadowed] == ["90", "60", "30.0"]


def test_every_key_has_an_origin(project):
    origins = load_settings(project(), {}).origins()
    assert len(origins) == sum(len(s.model_fields) for s in SECTIONS.values())
    assert {o.source for o in origins} == {"default"}


@pytest.mark.parametrize(
    "text, said",
    [
        (
            "[labels]\nhorizn_s = 60\n",
            r"settings\.ini:2: unknown key 'horizn_s'.*did you mean 'horizon_s'",
        ),
        (
            "[label]\nhorizon_s = 60\n",
            r"settings\.ini:1: unknown section 'label'; did you mean 'labels'",
        ),
        (
            "[labels]\nhorizon_s = 60\n\n[labels]\nhorizon_s=70\n",
            r"ini:5: labels\.horizon_s was set already at .*ini:2",
        ),
        ("horizon_s = 60\n", r"settings\.ini:1: 'horizon_s' stands before any \[section\]"),
        ("[labels]\nhorizon_s 60\n", r"settings\.ini:2: must be"),
        (
            "[labels]\nhorizon_s = soon\n",
            r"settings\.ini:2: labels\.horizon_s must be a valid number.*was 'soon'",
        ),
        (
            "[labels]\nhorizon_s = nan\n",
            r"settings\.ini:2: labels\.horizon_s must be a finite number",
        ),
        (
            "[labels]\nkind = tripple\n",
            r"labels\.kind must be 'horizon' or 'barriers', was 'tripple'",
        ),
        ("[training]\nfolds = 2.5\n", r"settings\.ini:2: training\.folds must be a valid integer"),
        (
            "[gates]\nmin_volatility_bps = 300\n",
            r"\[gates\] \(.*settings\.ini:2\): min_volatility_bps must be below",
        ),
        (
            "[signal]\nmin_confidence = 0.5\n",
            r"signal\.min_confidence must be less than 0\.5, was '0\.5'",
        ),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(project, text, said):
    with pytest.raises(SettingsError, match=said):
        load_settings(project(text), {})


@pytest.mark.parametrize(
    "variable, said",
    [
        (
            "TRADEBOOK__LABELS__HORIZN_S",
            r"TRADEBOOK__LABELS__HORIZN_S: unknown key.*did you mean 'horizon_s'",
        ),
        ("TRADEBOOK__LABEL__HORIZON_S", r"unknown section 'label'; did you mean 'labels'"),
        ("TRADEBOOK__LABELS", r"TRADEBOOK__LABELS: unknown key ''"),
        ("TRADEBOOK__", r"unknown section ''"),
        ("TRADEBOOK_LABELS__HORIZON_S", r"would be ignored"),
        ("TRADEBOOK_LABELS_HORIZON_S", r"would be ignored"),
    ],
)
def test_a_wrong_variable_is_refused_by_name(project, variable, said):
    with pytest.raises(SettingsError, match=said):
        load_settings(project(), {variable: "60"})


def test_other_programs_variables_are_left_alone(project):
    load_settings(project(), {"TRADEBOOK_COLOUR": "1", "TRADEBOOKS": "2", "PATH": "/bin"})


def test_a_wrong_override_is_refused(project):
    settings = load_settings(project(), {})
    for change in (
        lambda c: load_settings(settings.root, {}, c),
        settings.with_overrides,
    ):
        with pytest.raises(SettingsError, match=r"did you mean 'horizon_s'"):
            change({"labels.horizn_s": 60})
        with pytest.raises(
            SettingsError, match=r"labels\.horizon_s must be greater than 0, was '0'"
        ):
            change({"labels.horizon_s": 0})
    with pytest.raises(SettingsError, match="unknown key 'dat'"):
        settings.path("dat")


def test_secrets_never_show(project):
    root = project(f"[secrets]\napi_key = {HUSH}\n")
    settings = load_settings(
        root, {"TRADEBOOK__SECRETS__API_SECRET": HUSH}, {"secrets.api_key": HUSH}
    )
    assert settings.secrets.api_secret.get_secret_value() == HUSH
    shown = [
        repr(settings),
        str(settings),
        repr(settings.origins()),
        json.dumps(settings.to_dict()),
    ]
    shown += [repr(settings.layers), repr(settings.secrets), str(settings.secrets), settings.hash]
    assert not [text for text in shown if HUSH in text]
    assert HUSH in pickle.loads(pickle.dumps(settings)).secrets.api_key.get_secret_value()


@pytest.mark.parametrize(
    "text, variables",
    [
        (f"[secrets]\napi_secrt = {HUSH}\n", {}),
        (f"[secrets]\napi_secret {HUSH}\n", {}),
        (f"[secrets]\napi_key = {HUSH}\napi_key = {HUSH}\n", {}),
        ("", {"TRADEBOOK__SECRETS__API_SECRT": HUSH}),
        ("", {"TRADEBOOK_SECRETS_API_SECRET": HUSH}),
        ("[labels]\nhorizon_s = x", {"TRADEBOOK__SECRETS__API_SECRET": HUSH}),
    ],
)
def test_errors_do_not_tell_secrets(project, text, variables):
    import traceback

    with pytest.raises(SettingsError) as caught:
        load_settings(project(text), variables)
    assert HUSH not in "".join(traceback.format_exception(caught.value))


def test_secrets_and_paths_do_not_change_the_hash(project):
    settings = load_settings(project(), {})
    same = settings.with_overrides({"secrets.api_key": HUSH, "paths.data": "/elsewhere"})
    assert same.hash == settings.hash and re.fullmatch("[0-9a-f]{16}", settings.hash)
    assert settings.with_overrides({"labels.horizon_s": "30"}).hash == settings.hash


@pytest.mark.parametrize("section", [s for s in SECTIONS if s not in ("paths", "secrets")])
def test_each_section_changes_the_hash(project, section):
    changed = dict(
        collector={"sync_s": 2},
        features={"interval_ms": 500}, labels={"horizon_s": 31}, training={"seed": 8}, signal={"min_confidence": 0.1},
        data={"min_coverage": 0.6}, retrain={"every_days": 2}, promotion={"is_sure": False},
        gates={"is_edge_gate_on": "no"}, sizing={"risk_per_trade": 0.02}, exits={"trailing_bps": 31},
        backtest={"slippage_bps": 1}, trader={"symbols": "A/B"},
    )[section]  # fmt: skip
    settings = load_settings(project(), {})
    assert (
        settings.with_overrides({f"{section}.{k}": v for k, v in changed.items()}).hash
        != settings.hash
    )


def test_the_same_paths_from_every_folder(project):
    root = project("[paths]\ndata = store\nruns = /var/reports\n")
    (root / "a" / "b").mkdir(parents=True)
    code = (
        "from tradebook.base.settings import load_settings as l; s = l(None, {}); "
        "print(s.path('data'), s.path('runs'), s.hash)"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True
        ).stdout
        for cwd in (root, root / "a", root / "a" / "b")
    }
    assert len(said) == 1
    assert said.pop().split()[:2] == [str(root / "store"), "/var/reports"]


def test_windows_line_ends_and_byte_order_marks_are_read(project):
    root = project()
    (root / "settings.ini").write_bytes(b"\xef\xbb\xbf[labels]\r\nhorizon_s = 45\r\n")
    assert load_settings(root, {}).labels.horizon_s == 45.0
    (root / "settings.ini").write_bytes(b"[labels]\n# \xff\xfe\n")
    with pytest.raises(SettingsError, match="not UTF-8"):
        load_settings(root, {})


@given(st.floats(min_value=1e-6, max_value=86_400), st.integers(2, 50))
def test_what_is_written_is_what_is_read(horizon_s, folds):
    overrides = {"labels.horizon_s": repr(horizon_s), "training.folds": str(folds)}
    settings = load_settings("/", {}, overrides)
    assert (settings.labels.horizon_s, settings.training.folds) == (horizon_s, folds)


def test_the_projects_own_file_documents_every_key_and_shadows_none():
    root = Path(__file__).resolve().parents[1]
    assert (root / "settings.ini").read_text() == settings_text()
    assert find_root(root / "tests") == root
    assert {o.source for o in load_settings(root, {}).origins()} == {"default"}


def test_the_documented_defaults_can_be_uncommented(project):
    text = re.sub(r"^#(\w+ =)", r"\1", settings_text(), flags=re.M)
    settings = load_settings(project(text), {})
    assert settings.hash == load_settings("/", {}).hash
    assert {o.source for o in settings.origins()} == {"settings.ini"}


def test_settings_are_frozen(project):
    settings = load_settings(project(), {})
    with pytest.raises(Exception, match="frozen"):
        settings.labels.horizon_s = 5
    with pytest.raises(AttributeError):
        settings.labels = None
