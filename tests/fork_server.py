"""Run `cnntrain` commands in forks of one process that has imported everything, which saves their start-up time.

A request is a line of JSON on standard input: `arguments` of the command, `folder` to run in, `out` and `err` (files
for its output), `environment`, `timeout_s` and optionally `kill`: `at` (MODULE:ATTRIBUTE.PATH), `call` (from 1), `when`
(before or after the call) and `whom` (the process or its group). The response is a line with the exit status, negative
for a signal.

Processes that the command spawns import this file as their main module with the same `sys.argv`, so they also patch the
function of `kill`.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class ForkServer:
    """Client that starts the server and sends commands to it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(
        self,
        *arguments: str,
        environment: Mapping[str, str] = os.environ,
        timeout_s: float = 240,
        kill: Mapping[str, Any] | None = None,
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command in the current folder until it ends."""
        assert self._process.stdin and self._process.stdout
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            request = {
                "arguments": arguments,
                "folder": os.getcwd(),
                "out": str(out),
                "err": str(err),
                "environment": dict(environment),
                "timeout_s": timeout_s,
                "kill": kill,
            }
            print(json.dumps(request), file=self._process.stdin, flush=True)
            code = int(self._process.stdout.readline())
            return subprocess.CompletedProcess(["cnntrain", *arguments], code, out.read_text(), err.read_text())

    def close(self) -> None:
        self._process.communicate()


def serve() -> None:
    import cnntrain.commands.train
    import cnntrain.plots.curves
    import cnntrain.sweep.sweep_run  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        if (child := os.fork()) == 0:
            run(request)
        print(wait(child, request["timeout_s"]), file=sys.__stdout__, flush=True)


def run(request: Mapping[str, Any]) -> None:
    """Run the command of a request and end the process."""
    from cnntrain.cli import main

    os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for stream, name in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
        os.dup2(os.open(name, os.O_RDONLY if stream == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), stream)
    code = 1
    try:
        if request["kill"]:
            sys.argv = [sys.argv[0], json.dumps(request["kill"])]
            patch_to_kill(**request["kill"])
        code = main(request["arguments"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int, timeout_s: float) -> int:
    """Return the exit status of a child; kill its process group at the timeout."""
    deadline = time.monotonic() + timeout_s
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(ended[1])


def patch_to_kill(at: str, call: int, when: str, whom: str) -> None:
    """Patch a function so that its `call`-th call kills the process or its group."""
    module, _, path = at.partition(":")
    *outer, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in outer:
        owner = getattr(owner, part)
    original, count = getattr(owner, name), 0

    def call_or_kill(*arguments: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count == call and when == "after":
            original(*arguments, **named)
        if count == call:
            kill(whom)
        return original(*arguments, **named)

    setattr(owner, name, call_or_kill)


def kill(whom: str) -> None:
    if whom == "group":
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    serve()
elif __name__ == "__mp_main__" and len(sys.argv) > 1 and sys.argv[1].startswith("{"):  # spawned by a patched process
    patch_to_kill(**json.loads(sys.argv[1]))
