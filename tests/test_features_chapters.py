"""Every column is defined in its chapter: formula, unit, source, NaN, a real picture, and what it did not predict."""

import json
import re
from pathlib import Path

import pytest

from tradebook.features.columns import FAMILIES, MESSAGES
from tradebook.features.slow_columns import SLOW_FAMILIES

FOLDER = Path(__file__).resolve().parents[1] / "nbs" / "features"
TREND = ("31_averages", "32_strength", "33_bands")
CHAPTERS = {group: (f"{k:02}_{group}",) for k, group in enumerate(FAMILIES, 1)}
CHAPTERS |= {g: TREND if g.startswith("trend") else ("35_hilbert",) for g in SLOW_FAMILIES}
CHAPTERS |= {"lead": ("37_leads",), "lead_1h": ("37_leads",), "basis": ("37_leads",)}
CHAPTERS |= {"funding": ("38_cross",), "messages": ("23_messages",)}
COLUMNS = FAMILIES | SLOW_FAMILIES | {"messages": MESSAGES}


def cells(chapter):
    "Kind, source and outputs of each cell"
    content = json.loads((FOLDER / f"{chapter}.ipynb").read_text())["cells"]
    return [(c["cell_type"], "".join(c["source"]), c.get("outputs", [])) for c in content]


def prose(chapter):
    "All markdown"
    return "\n".join(source for kind, source, _ in cells(chapter) if kind == "markdown")


def stem(name):
    "A column's name without side, numbers, window and unit: what all its relatives share"
    name = re.sub(r"x\d+[mhd](?=_|$)", "", name)
    words = [w for w in name.split("_") if w not in {"bid", "ask", "buy", "sell", "of"}]
    words = [
        w
        for w in words
        if not re.fullmatch(r"…|\{.*|\d+[a-z]*|[nkhwm]|wm|bps|s|lots|ticks|change", w)
    ]
    return "_".join(words)


@pytest.mark.parametrize("group", COLUMNS)
def test_every_column_stands_in_a_table_of_its_chapter(group):
    tables = [
        line for chapter in CHAPTERS[group] for line in prose(chapter).splitlines()
        if line.startswith("|")
    ]  # fmt: skip
    told = {stem(name) for line in tables for name in re.findall(r"`([^`]+)`", line.split("|")[1])}
    missing = [f.name for f in COLUMNS[group] if stem(f.name) not in told]
    assert not missing, f"{CHAPTERS[group]}: no row in a table for {missing}"


@pytest.mark.parametrize("chapter", sorted({c for names in CHAPTERS.values() for c in names}))
def test_a_chapter_of_columns_is_complete(chapter):
    text = prose(chapter).replace("*", "")
    for what in ("unit", "source", "NaN", "not predict|predict, and what not"):
        assert re.search(what, text, re.I), f"{chapter} does not say: {what}"
    pictures = [
        output
        for kind, source, outputs in cells(chapter)
        if kind == "code" and source.startswith("#| slow")
        for output in outputs
        if "image/png" in output.get("data", {})
    ]
    assert pictures, f"{chapter} has no picture on real data"
