"""A real cluster of separate processes on the loopback, for the tests that need one; it ends with its `with`."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tradebook.base.errors import SettingsError
from tradebook.training.cluster import connect

HERE = Path(__file__).resolve().parent


def until(is_so, wait_s=60):
    "Wait for something that will come"
    end = time.monotonic() + wait_s
    while not is_so():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


class Cluster:
    "A scheduler and worker processes of one thread each, without a dashboard"

    def __init__(self, folder, n_workers=2):
        self.folder, self.n_workers, self.processes = Path(folder), n_workers, []
        self.shared = ["--no-dashboard", "--host", "127.0.0.1"]
        self.log = open(self.folder / "log", "w")

    def __enter__(self):
        self.open()
        return self

    def open(self):
        "Start the scheduler and its workers"
        place = self.folder / f"scheduler-{time.monotonic_ns()}.json"
        options = ["--port", "0", "--scheduler-file", str(place), "--no-show"]
        self.start("dask_scheduler", *self.shared, *options)
        until(place.exists)
        until(lambda: place.read_text().strip().endswith("}"))
        self.address = json.loads(place.read_text())["address"]
        for _ in range(self.n_workers):
            self.worker()

    def __exit__(self, *_):
        self.kill(self.processes)
        self.log.close()

    def kill(self, processes):
        "Kill some of them"
        for process in processes:
            process.kill()
            process.wait()

    def start(self, *command):
        "Start one of Dask's own programs"
        env = {**os.environ, "OMP_NUM_THREADS": "1", "DASK_DISTRIBUTED__WORKER__DAEMON": "False"}
        env["PYTHONPATH"] = f"{HERE}{os.pathsep}{HERE.parent}"
        full = [sys.executable, "-m", "distributed.cli." + command[0], *command[1:]]
        given = {"cwd": self.folder, "env": env, "stdout": self.log, "stderr": self.log}
        self.processes.append(subprocess.Popen(full, **given))
        return self.processes[-1]

    def worker(self):
        "Add a worker"
        options = ["--nthreads", "1", "--no-nanny", "--local-directory", str(self.folder)]
        return self.start("dask_worker", self.address, *self.shared, *options)

    def alive(self):
        "Workers that were not killed"
        return [one for one in self.processes[1:] if one.poll() is None]

    def ready(self, n):
        "Wait until n workers are there and no others; start what is missing"
        if self.processes[0].poll() is not None:
            self.kill(self.processes)
            self.processes.clear()
            self.open()
        for _ in range(n - len(self.alive())):
            self.worker()

        def is_there():
            try:
                with connect(self.address) as client:
                    return len(client.nthreads()) == n
            except SettingsError:
                return False

        until(is_there)
        return self.address
