"""`python -m NAME` in a process of its own, forked from a server that has torch loaded.

A program that imports torch takes seconds to begin, on two cores most of many a test. What runs is the same: the module
as `__main__`, with its arguments, folder, environment and output. The server from which it forks its workers is forked
from itself in turn.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing import util
from pathlib import Path
from typing import Any


class WarmProgram:
    """A program that runs, in a session of its own; what it prints goes to a file."""

    def __init__(
        self, words: Sequence[str], *, cwd: Path, env: dict[str, str], stdout: Path, stderr: Path
    ) -> None:
        """words: the module and its arguments."""
        context: Any = multiprocessing.get_context("forkserver")
        arguments = (list(words), str(cwd), env, str(stdout), str(stderr))
        self._process = context.Process(target=_become, args=arguments)
        self._process.start()
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative is the signal that ended it."""
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        """Raises TimeoutExpired, and kills it then."""
        self._process.join(timeout)
        if self.returncode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired("a program", timeout)
        return self.returncode


def run_warm(
    words: Sequence[str], *, cwd: Path, env: dict[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` of `python -m` and `words`, its output captured. Raises TimeoutExpired."""
    outputs = [cwd.with_name(f"{cwd.name}.{name}") for name in ("stdout", "stderr")]
    code = WarmProgram(words, cwd=cwd, env=env, stdout=outputs[0], stderr=outputs[1]).wait(timeout)
    return subprocess.CompletedProcess(list(words), code, *(output.read_text() for output in outputs))


def _become(words: list[str], cwd: str, env: dict[str, str], stdout: str, stderr: str) -> None:
    """In the forked process: run the module as if the interpreter had begun with it."""
    os.setsid()
    for path, number in ((stdout, 1), (stderr, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[:0] = [cwd, *env.get("PYTHONPATH", "").split(os.pathsep)]
    sys.argv = list(words)
    util.spawnv_passfds = _fork_python  # of its own fork server
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    finally:
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as the interpreter does
        atexit._run_exitfuncs()
        sys.stdout.flush()


def _fork_python(_path: Any, words: Sequence[Any], kept: Sequence[int]) -> int:
    """In the place of `util.spawnv_passfds`: `python -c CODE`, forked."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in (int(path.name) for path in Path("/proc/self/fd").iterdir()):
            if number not in (0, 1, 2, nothing, *kept):
                os.dup2(nothing, number)  # not closed: what else has it here may close it when it goes
        exec(words[-1], {"__name__": "__main__"})
        code = 0
    finally:
        os._exit(code)
