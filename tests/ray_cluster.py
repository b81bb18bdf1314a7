"""A Ray cluster on one machine whose nodes have addresses of their own, in network namespaces."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

_PORT = 6379
_RAY = str(Path(sys.executable).with_name("ray"))
_MOST_SECONDS = 200  # for the start of a node
# The least that Ray takes. Only the job and the answers go through it.
_OBJECT_STORE_BYTES = 80_000_000
# All nodes share this machine's processors, and Ray would wait for its others; and a token in the
# home directory would make only the head want one.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "OMP_NUM_THREADS": "1",
    "RAY_worker_niceness": "0",
}


class Cluster:
    """Nodes on a switch of their own; the first one is the head.

    Attributes:
        address: of the cluster.
    """

    def __init__(self, folder: Path):
        self._prefix = f"kiem-{os.getpid()}"
        self._folder = folder
        self._nodes: list[subprocess.Popen[bytes]] = []
        self.address = f"{_address(0)}:{_PORT}"

    def add_node(self, num_cpus: int = 1, before: str = "") -> int:
        """Starts a node with so many processors and returns its number.

        Args:
            num_cpus: how many tasks it takes at a time.
            before: shell commands to run first, which may change what the node sees of the disk.
        """
        number = len(self._nodes)
        name = self._name(number)
        _ip("netns", "add", name)
        _ip("-n", name, "link", "set", "lo", "up")
        if number == 0:
            _ip("-n", name, "link", "add", "switch", "type", "bridge")
            _ip("-n", name, "link", "set", "switch", "up")
            device = "switch"
        else:
            port, device = f"port{number}", "eth0"
            peer = ("peer", "name", device, "netns", name)
            _ip("-n", self._name(0), "link", "add", port, "type", "veth", *peer)
            _ip("-n", self._name(0), "link", "set", port, "master", "switch", "up")
            _ip("-n", name, "link", "set", device, "up")
        _ip("-n", name, "address", "add", f"{_address(number)}/24", "dev", device)
        head = ["--head", f"--port={_PORT}", "--include-dashboard=false"]
        what = [f"--address={self.address}"] if number else head
        command = [_RAY, "start", *what, f"--node-ip-address={_address(number)}", "--block"]
        command += [f"--num-cpus={num_cpus}", f"--object-store-memory={_OBJECT_STORE_BYTES}"]
        command += ["--disable-usage-stats"]
        words = self.within(number, "bash", "-euc", f"{before}\nexec {' '.join(command)}")
        environment = {**os.environ, **ENVIRONMENT}
        log = self._folder / f"node{number}.log"
        with log.open("wb") as output:
            node = subprocess.Popen(words, env=environment, stdout=output, stderr=output)
        self._nodes.append(node)
        ends = time.monotonic() + _MOST_SECONDS
        while "Ray runtime started" not in log.read_text():
            assert node.poll() is None, log.read_text()
            assert time.monotonic() < ends, log.read_text()
            time.sleep(0.1)
        return number

    def within(self, number: int, *command: str) -> list[str]:
        """Returns a command that runs on a node."""
        return ["ip", "netns", "exec", self._name(number), *command]

    def processes(self, number: int) -> list[psutil.Process]:
        """Returns the processes of a node, its tasks included."""
        done = subprocess.run(
            ["ip", "netns", "pids", self._name(number)], capture_output=True, text=True, check=True
        )
        found = []
        for pid in done.stdout.split():
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(pid)))
        return found

    def send(self, number: int, what: signal.Signals) -> None:
        """Sends a signal to all processes of a node."""
        for process in self.processes(number):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(what)

    def close(self) -> None:
        """Ends all that runs on the nodes, and removes them."""
        for number, node in enumerate(self._nodes):
            while self.processes(number):
                self.send(number, signal.SIGKILL)
                time.sleep(0.05)
            node.wait()
            _ip("netns", "delete", self._name(number))

    def _name(self, number: int) -> str:
        return f"{self._prefix}-{number}"


@contextmanager
def new_cluster(folder: Path) -> Iterator[Cluster]:
    """Yields a cluster without nodes; its logs go into a folder. Skips where that is impossible."""
    if shutil.which("ip") is None:
        pytest.skip("there is no program ip; install iproute2")
    cluster = Cluster(folder)
    try:
        yield cluster
    finally:
        cluster.close()


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0 and "Operation not permitted" in done.stderr:
        pytest.skip(f"not allowed to make network namespaces: {done.stderr.strip()}")
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


def _address(number: int) -> str:
    return f"10.99.0.{number + 1}"
