"""Run the command in forks of one process that has imported everything, and kill it at the n-th call of a function.

Requests come as lines of JSON on standard input: `arguments` of the command, `folder` to run in, `log` for its output
and optionally `kill`: `at` (MODULE:ATTRIBUTE.PATH), `call` (from 1), `when` (before or after the call) and `whom` (the
process, or its whole group). The answer is a line with the exit status, negative for a signal.

Processes that the command spawns import this file as their main module with the same `sys.argv`, and are armed too.
"""

import importlib
import json
import os
import signal
import sys
import traceback
from typing import Any


def arm(at: str, call: int, when: str, whom: str) -> None:
    """Wrap a function so that its `call`-th call kills the process or its group."""
    module, _, path = at.partition(":")
    *outer, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in outer:
        owner = getattr(owner, part)
    original, count = getattr(owner, name), 0

    def killing(*arguments: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count == call and when == "after":
            original(*arguments, **named)
        if count == call:
            kill(whom)
        return original(*arguments, **named)

    setattr(owner, name, killing)


def kill(whom: str) -> None:
    if whom == "group":
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def serve() -> None:
    import cnntrain.commands.train
    import cnntrain.plots.curves
    import cnntrain.sweep.sweep_run  # noqa: F401
    from cnntrain.cli import main

    for line in sys.stdin:
        request = json.loads(line)
        if (child := os.fork()) == 0:
            os.setsid()
            os.chdir(request["folder"])
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(log, stream)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.argv = [sys.argv[0], *([json.dumps(request["kill"])] if request.get("kill") else [])]
            if len(sys.argv) > 1:
                arm(**request["kill"])
            code = 1
            try:
                code = main(request["arguments"])
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    serve()
elif len(sys.argv) > 1 and sys.argv[1].startswith("{"):  # spawned by an armed process
    arm(**json.loads(sys.argv[1]))
