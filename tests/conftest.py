"""Shared fixtures: where the real recordings lie, and one thread for everybody."""

import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def recordings():
    "The folder of real recordings beside the project; tests that need it skip where it is absent"
    folder = ROOT.parent / "shared" / "data"
    if not folder.exists():
        pytest.skip(f"no real recordings at {folder.relative_to(ROOT.parent)} beside the project")
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    "A Dask scheduler and two worker processes, on the loopback only"
    pytest.importorskip("distributed")
    from clusters import Cluster

    with Cluster(tmp_path_factory.mktemp("cluster")) as made:
        yield made
