"""Scripts of the project, started by a fork of a process that has imported torch.

Importing torch is two thirds of a short run's time. The fork has its own folder, environment,
arguments and streams, and runs the script from its first line; nothing of kiem is imported before.
"""

from __future__ import annotations

import functools
import json
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

_TIMEOUT_SECONDS = 600
_SERVER = """
import json, os, runpy, sys
import pyarrow.compute, torch._dynamo, torch.utils.checkpoint
for line in sys.stdin:
    order = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.chdir(order["cwd"])
        os.environ.clear()
        os.environ.update(order["env"])
        for number, (name, flags) in enumerate((("stdin", 0), ("stdout", 1), ("stderr", 1))):
            os.dup2(os.open(order[name], flags), number)
            setattr(sys, name, open(number, "rw"[flags], encoding="utf-8", closefd=False))
        script, *sys.argv[1:] = order["words"]
        sys.argv[0], sys.path[0] = script, os.path.dirname(os.path.abspath(script))
        runpy.run_path(script, run_name="__main__")
        sys.exit()
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def run_forked(
    words: Sequence[str], env: Mapping[str, str], stdin: str, cwd: Path
) -> subprocess.CompletedProcess[str]:
    """Runs a script with its arguments to its end, and returns its exit code and output."""
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with TemporaryDirectory() as folder:
        files = {name: Path(folder) / name for name in ("stdin", "stdout", "stderr")}
        for name, file in files.items():
            file.write_text(stdin if name == "stdin" else "", encoding="utf-8")
        streams = {name: str(file) for name, file in files.items()}
        order = {"words": list(words), "env": dict(env), "cwd": str(cwd), **streams}
        server.stdin.write(json.dumps(order) + "\n")
        server.stdin.flush()
        pid = int(server.stdout.readline())
        if not select.select([server.stdout], [], [], _TIMEOUT_SECONDS)[0]:
            subprocess.run(["kill", "-9", f"-{pid}"], check=True)
            raise subprocess.TimeoutExpired(list(words), _TIMEOUT_SECONDS)
        code = int(server.stdout.readline())
        output = [files[name].read_bytes().decode() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(list(words), code, *output)


@functools.cache
def _server() -> subprocess.Popen[str]:
    """Starts the process that forks; it ends with this one, which closes its input."""
    command = [sys.executable, "-c", _SERVER]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
