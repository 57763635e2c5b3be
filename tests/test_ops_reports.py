"""Reports from end to end: papermill, the page, and a real browser that watches every request."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tradebook.base.errors import ReportError
from tradebook.ops.runner import check_parameters, run_report, templates

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
MARK = ".overplot .trace path, .overplot .hm image"  # A bar, line, point or map that plotly drew
REPORTS = ("backtest", "data_quality", "diagnosis", "labels", "retrain")
FIGURE = """
import plotly.graph_objects as go
go.Figure(go.Scatter(y=[1, 3, 2, value]))
"""


@pytest.fixture(scope="module")
def browser():
    "A headless Chromium that can resolve no name"
    if not CHROMIUM.exists():
        pytest.skip(f"no browser at {CHROMIUM}; install the system's chromium to run this test")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is in the dev extra")
    with playwright.sync_playwright() as play:
        running = play.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    "Every template run once, with its defaults"
    out = tmp_path_factory.mktemp("reports")
    return {name: run_report(name, out=out / name) for name in REPORTS}


@pytest.fixture
def small(tmp_path):
    "A report of one figure, which fails when its parameter is negative"
    cells = [
        new_markdown_cell("# Small"),
        new_code_cell("value: int = 2  # Last point", metadata={"tags": ["parameters"]}),
        new_code_cell("secret_code = 'in the code'"),
        new_code_cell("assert value >= 0, f'value must be >= 0, was {value}'"),
        new_code_cell(FIGURE),
    ]
    nbformat.write(new_notebook(cells=cells), tmp_path / "small.ipynb")
    return str(tmp_path / "small.ipynb")


def looked_at(browser, page_path, width=1280, height=900):
    "Open a page, bring each figure on the screen, and say what the page asked for and what it drew"
    page = browser.new_page(viewport={"width": width, "height": height})
    asked, wrong = [], []
    page.on("request", lambda r: asked.append(r.url))
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    page.goto(f"file://{page_path}")
    figures = page.locator(".figure")
    for i in range(figures.count()):
        figures.nth(i).scroll_into_view_if_needed()
        figures.nth(i).locator(MARK).first.wait_for(state="attached", timeout=60_000)
    drawn = f"[...document.querySelectorAll('.figure')].filter(f => f.querySelector('{MARK}'))"
    seen = {
        "figures": figures.count(),
        "plots": page.evaluate(f"{drawn}.length"),
        "asked": [u for u in asked if not u.startswith(("file:", "data:", "blob:"))],
        "wrong": wrong,
        "wide": page.evaluate("document.documentElement.scrollWidth"),
        "cloud": page.get_by_text("Share chart").count(),
    }
    page.close()
    return seen


def test_all_templates_are_tested():
    assert set(templates()) == set(REPORTS)


@pytest.mark.parametrize("name", REPORTS)
def test_template_runs_with_its_defaults(reports, name):
    done = reports[name]
    assert done.ok and {p.name for p in done.folder.iterdir()} >= {
        "report.html",
        "report.ipynb",
        "result.json",
    }
    result = json.loads((done.folder / "result.json").read_text())
    assert result["values"]["verdict"]["status"] in {"pass", "warn", "fail"}
    assert {c["status"] for c in result["values"]["checks"]} <= {"pass", "warn", "fail", "note"}


@pytest.mark.parametrize("name", REPORTS)
def test_page_shows_no_code(reports, name):
    page = reports[name].html.read_text()
    for cell in nbformat.read(reports[name].folder / "report.ipynb", 4).cells:
        for line in cell.source.splitlines() if cell.cell_type == "code" else ():
            if line.startswith("from tradebook"):
                assert line not in page
    assert not re.search(r"In \[|jp-Cell|highlight hl-", page)


@pytest.mark.parametrize("name", REPORTS)
def test_page_draws_with_no_network(browser, reports, name):
    seen = looked_at(browser, reports[name].html)
    assert seen["asked"] == [] and seen["wrong"] == []
    assert seen["figures"] >= (3 if name == "labels" else 5) and seen["plots"] == seen["figures"]
    assert seen["cloud"] == 0


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("width", [390, 1280])
def test_page_fits_its_window(browser, reports, name, width):
    assert looked_at(browser, reports[name].html, width)["wide"] <= width


def test_first_screen_of_the_diagnosis(browser, reports):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(f"file://{reports['diagnosis'].html}")
    page.wait_for_function("Number(document.body.dataset.drawn) >= 1", timeout=30_000)
    places = {
        what: page.locator(css).first.bounding_box()
        for what, css in {
            "verdict": ".verdict",
            "tile": ".tile",
            "funnel": ".figure",
            "causes": "table",
        }.items()
    }
    text = page.locator("main").inner_text()
    page.close()
    assert all(box["y"] < 900 for box in places.values())
    for what in ("verdict", "tile", "funnel"):
        assert places[what]["y"] + places[what]["height"] <= 900, what
    assert all(word in text for word in ("gross", "net", "bps", "trades"))


@pytest.mark.parametrize("name", ("backtest", "diagnosis"))
def test_unknown_parameter_is_refused_by_name(tmp_path, name):
    with pytest.raises(ReportError, match=r"unknown parameter 'fact'.*did you mean 'facts'"):
        run_report(name, {"fact": "x"}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parameter_of_the_wrong_type_is_refused(small):
    assert check_parameters(small, {"value": "3"}) == {"value": 3}
    with pytest.raises(ReportError, match="value must be int, was 'three'"):
        check_parameters(small, {"value": "three"})


def test_failing_report_keeps_what_it_made(small, tmp_path):
    with pytest.raises(ReportError, match="value must be >= 0, was -1") as caught:
        run_report(small, {"value": -1}, out=tmp_path / "out")
    assert str(tmp_path / "out") in str(caught.value)
    notebook = nbformat.read(tmp_path / "out" / "report.ipynb", 4)
    assert any(o.output_type == "error" for c in notebook.cells for o in c.get("outputs", []))
    assert "This report stopped here." in (tmp_path / "out" / "report.html").read_text()
    assert json.loads((tmp_path / "out" / "result.json").read_text())["ok"] is False


def test_report_that_takes_too_long_is_stopped(tmp_path):
    cells = [new_code_cell("import time\ntime.sleep(60)")]
    nbformat.write(new_notebook(cells=cells), tmp_path / "slow.ipynb")
    with pytest.raises(ReportError, match="took more than 1 s"):
        run_report(str(tmp_path / "slow.ipynb"), out=tmp_path / "out", timeout_s=1)


def test_small_page_in_the_browser(browser, small, tmp_path):
    done = run_report(small, {"value": 5}, out=tmp_path / "out")
    assert "in the code" not in done.html.read_text()
    seen = looked_at(browser, done.html)
    assert (seen["figures"], seen["plots"], seen["asked"], seen["wrong"]) == (1, 1, [], [])


def test_page_cannot_reach_a_network_even_if_it_tries(browser, tmp_path):
    from tradebook.ops.html import page_html

    evil = '<img src="http://127.0.0.1:9/x.png"><script>fetch("http://127.0.0.1:9/y")</script>'
    (tmp_path / "evil.html").write_text(page_html(f"<section>{evil}</section>", "evil"))
    seen = looked_at(browser, tmp_path / "evil.html")
    refused = [w for w in seen["wrong"] if "Content Security Policy" in w]
    assert len(refused) >= 2
