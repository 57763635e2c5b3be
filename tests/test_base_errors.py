"""Errors and causes: light to import, honest about what is missing, closed."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tradebook.base import causes, errors
from tradebook.base.causes import Cause, Stage
from tradebook.base.errors import MissingExtraError, TradebookError, nearest, require


@pytest.mark.parametrize("module", ["errors", "causes"])
def test_they_import_nothing_heavy(module):
    code = f"import sys, tradebook.base.{module}; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"pydantic", "numpy", "pandas", "sqlalchemy", "numba", "plotly", "rich", "typer"}
    assert not heavy & {name.split(".")[0] for name in out.stdout.split()}


def test_every_error_is_in_the_tree():
    named = [
        v for v in vars(errors).values() if isinstance(v, type) and v.__module__ == errors.__name__
    ]
    assert len(named) >= 8 and all(issubclass(kind, TradebookError) for kind in named)


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=12), max_size=6))
def test_a_suggestion_is_always_a_known_name(name, known):
    said = nearest(name, known)
    assert said == "" or said in {f"did you mean '{k}'?" for k in known}


def test_one_slip_of_the_finger_is_put_right():
    known = ["horizon_s", "max_spread_bps", "take_profit_bps"]
    for name in known:
        for i in range(len(name)):
            assert nearest(name[:i] + name[i + 1 :], known) == f"did you mean '{name}'?"


def test_a_broken_package_is_not_reported_as_missing(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import something_else_that_is_absent\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="something_else_that_is_absent"):
        require("half_installed", "lab")
    with pytest.raises(MissingExtraError, match=r"tradebook\[lab\]"):
        require("absent_altogether.inside", "lab")


def test_every_cause_is_complete_and_its_code_is_its_name():
    for cause in Cause:
        assert cause.value == cause.name and cause.meaning.endswith(".")
        assert bool(cause.remedy) == cause.is_block
        assert cause.stage in Stage


def test_remedies_name_settings_that_exist():
    import re

    from tradebook.base.sections import SECTIONS

    pattern = rf"\b({'|'.join(SECTIONS)})\.([a-z_]+)"
    named = [m for c in Cause for m in re.findall(pattern, c.remedy)]
    assert len(named) > 8
    assert all(key in SECTIONS[section].model_fields for section, key in named)


def test_the_funnel_never_widens():
    for cause in Cause:
        passed = [cause.reached(stage) for stage in Stage]
        assert passed == sorted(passed, reverse=True)
    assert causes.Cause.ENTER.reached(Stage.ORDERS) and not Cause.ORDER_REJECTED.reached(
        Stage.ORDERS
    )
