"""The house keeps its shape: one notebook a module, imports point down, budgets hold, heavy things load late."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tradebook"
LAYERS = (
    "base market venue collector features labels training policy backtest trader learning ops"
).split()
# What the trader may take from training: the registry's reader and the prediction, nothing that can train.
TRADER_MAY_IMPORT = {
    f"tradebook.training.{name}"
    for name in (
        *("ledger", "registry", "forest", "prediction", "reasons"),
        *("normal", "outliers", "watch"),  # read what a version knows of its training
    )
}
HEAVY = {
    "vectorbt",
    "numba",
    "lightgbm",
    "ccxt",
    "shap",
    "plotly",
    "pandas",
    "sklearn",
    "papermill",
    "nbformat",
}
HAND_WRITTEN = {"__main__.py"}
MODULE_LINES, CELL_LINES = 400, 60


def notebooks():
    "Every chapter, without checkpoints"
    return sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def cells(path):
    "Type, source and outputs of each cell"
    content = json.loads(path.read_text())["cells"]
    return [(c["cell_type"], "".join(c["source"]), c.get("outputs", [])) for c in content]


def exporting():
    "Module name -> notebooks that say they write it"
    found = {}
    for path in notebooks():
        for kind, source, _ in cells(path):
            match = re.search(r"^#\| *default_exp (\S+)", source, re.M) if kind == "code" else None
            if match:
                found.setdefault(match.group(1), []).append(path)
    return found


def modules():
    "Module name -> file, for all that nbdev writes"
    return {
        ".".join(p.relative_to(PACKAGE).with_suffix("").parts): p
        for p in sorted(PACKAGE.rglob("*.py"))
        if p.name not in {"__init__.py", "_modidx.py", *HAND_WRITTEN}
    }


def imports_of(path):
    "Names of tradebook modules that a module imports, anywhere in it, late imports too"
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = (
                ["tradebook", *path.relative_to(PACKAGE).parts[: -node.level]] if node.level else []
            )
            base = ".".join([*parts, *(node.module or "").split(".")]).strip(".")
            found.add(base)
            found |= {f"{base}.{alias.name}" for alias in node.names}
    known = {f"tradebook.{name}" for name in modules()}
    return found & known


def export_cells(path):
    "Sources of the cells that go into the module"
    return [
        source
        for kind, source, _ in cells(path)
        if kind == "code" and re.search(r"^#\| *exporti?\b", source, re.M)
    ]


def code_lines(source):
    "Lines of code, without blanks and directives"
    return len([ln for ln in source.splitlines() if ln.strip() and not ln.startswith("#|")])


def test_top_level_is_as_agreed():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    top = {name.split("/")[0] for name in tracked}
    required = set("nbs settings.ini pyproject.toml README.md tradebook data runs tests".split())
    usual = set(
        ".ci benchmarks tools .gitignore .gitattributes CHANGELOG.md CONTRIBUTING.md LICENSE constraints.txt".split()
    )
    assert required <= top, f"missing: {required - top}"
    assert top <= required | usual, f"unexpected: {top - required - usual}"
    inside = {n for n in tracked if n.startswith(("data/", "runs/"))}
    assert inside == {"data/README.md", "runs/README.md"}


def test_one_notebook_per_module_and_the_reverse():
    from_notebooks, from_package = exporting(), modules()
    doubled = {m: [str(p) for p in ps] for m, ps in from_notebooks.items() if len(ps) > 1}
    assert not doubled, f"two notebooks write one module: {doubled}"
    assert set(from_notebooks) == set(from_package)
    for module, (path,) in from_notebooks.items():
        layer, name = module.split(".")
        assert path.parent.name == layer, f"{path} exports {module}: it belongs in nbs/{layer}"
        assert re.fullmatch(rf"\d\d_{name}\.ipynb", path.name), f"{path.name} exports {module}"


def test_every_layer_stands():
    assert {m.split(".")[0] for m in modules()} == set(LAYERS)


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_down(module):
    rank = LAYERS.index(module.split(".")[0])
    up = [n for n in imports_of(modules()[module]) if LAYERS.index(n.split(".")[1]) > rank]
    assert not up, f"{module} imports upwards: {up}"


def test_no_circular_imports():
    graph = {m: {n.removeprefix("tradebook.") for n in imports_of(p)} for m, p in modules().items()}
    done, path = set(), []

    def visit(module):
        assert module not in path, f"circle: {' -> '.join([*path, module])}"
        if module in done:
            return
        path.append(module)
        for other in sorted(graph[module]):
            visit(other)
        path.pop()
        done.add(module)

    for module in graph:
        visit(module)


def reachable(start):
    "Modules that importing these can ever load"
    seen, todo = set(), list(start)
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += [n.removeprefix("tradebook.") for n in imports_of(modules()[name])]
    return seen


def test_trader_imports_nothing_that_can_train():
    start = [m for m in modules() if m.startswith("trader.")]
    allowed = {n.removeprefix("tradebook.") for n in TRADER_MAY_IMPORT}
    training = {m for m in reachable(start) if m.startswith("training.")}
    assert training <= allowed, f"the trader can reach {sorted(training - allowed)}"


def test_reports_export_nothing_and_use_public_names():
    for path in [
        *(ROOT / "nbs/reports").glob("*.ipynb"),
        *(ROOT / "nbs/tutorials").glob("*.ipynb"),
    ]:
        assert not export_cells(path), f"{path.name} exports code"
        private = [
            s for k, s, _ in cells(path) if k == "code" and re.search(r"import .*\b_[a-z]", s)
        ]
        assert not private, f"{path.name} imports private names"


def test_budgets():
    over = []
    for module, paths in exporting().items():
        sizes = [code_lines(s) for s in export_cells(paths[0])]
        words = sum(len(s.split()) for k, s, _ in cells(paths[0]) if k == "markdown")
        if sum(sizes) > MODULE_LINES:
            over.append(f"{module}: {sum(sizes)} exported lines, at most {MODULE_LINES}")
        if max(sizes, default=0) > CELL_LINES:
            over.append(f"{module}: an export cell of {max(sizes)} lines, at most {CELL_LINES}")
        if words < 3 * sum(sizes):
            over.append(
                f"{module}: {words} words for {sum(sizes)} exported lines, 3 a line at least"
            )
    assert not over, "\n".join(over)


def test_stored_outputs_are_there_and_small():
    wrong = []
    for path in notebooks():
        is_long = path.parent.name in {"reports", "tutorials"}
        size = sum(len(json.dumps(o)) for _, _, o in cells(path))
        if size > (500_000 if is_long else 200_000):
            wrong.append(f"{path.name}: {size:,} bytes of outputs")
        has_code = any(k == "code" for k, _, _ in cells(path))
        if has_code and not any(outputs for _, _, outputs in cells(path)):
            wrong.append(f"{path.name}: shows no result")
    assert not wrong, "\n".join(wrong)


def loaded_by(statement):
    "Top-level packages that a fresh interpreter has loaded after a statement"
    code = f"{statement}\nimport sys; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_the_command_line_loads_nothing_heavy():
    heavy = loaded_by("import tradebook.ops.cli") & HEAVY
    assert not heavy, f"import tradebook.ops.cli loads {sorted(heavy)}"


def test_the_live_path_loads_no_training_or_plotting():
    heavy = loaded_by("import tradebook.trader.loop") & {
        "vectorbt",
        "shap",
        "papermill",
        "plotly",
        "optuna",
    }
    assert not heavy, f"import tradebook.trader.loop loads {sorted(heavy)}"


def test_the_main_job_loads_what_reads_notebooks_only_for_a_report():
    heavy = loaded_by("import tradebook.ops.demo") & {"papermill", "nbformat", "lightgbm"}
    assert not heavy, f"import tradebook.ops.demo loads {sorted(heavy)}"


def test_no_machine_paths_or_index_addresses_in_the_repository():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    wrong = []
    for name in tracked:
        text = (ROOT / name).read_text(errors="replace") if (ROOT / name).exists() else ""
        if str(ROOT.parent) + "/" in text:
            wrong.append(f"{name}: a path of this machine")
        if name == "constraints.txt" and "://" in text:
            wrong.append(f"{name}: an address")
    assert not wrong, "\n".join(wrong)
