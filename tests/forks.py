"""Programs that tests start in processes of their own, without the five seconds in which each would import torch.

One process imports the program and then forks for each that is asked for. `Forked` is `subprocess.Popen` of such a
fork: a child of the process that asks, with a process id, files, environment and session of its own, which a signal
ends like any other. What a fork starts in its turn (`operant serve` its learner) is forked too. That holds on Linux for
`python -m` of a module with a `main`, and for `python -c`; everything else is started as usual.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import inspect
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

IMPORTED = (
    "operant.cli", "operant.live.serve", "operant.live.learning.worker", "operant.rl.loop", "operant.stages",
    "jsonargparse", "safetensors.torch", "sacrebleu", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto", "transformers.models.gpt2.modeling_gpt2",
)  # fmt: skip
SUBREAPER = 36  # in <linux/prctl.h>: orphans below become children of this process
LONGEST = 200_000  # bytes of a request
PLAIN = {
    "executable": None, "preexec_fn": None, "pass_fds": (), "shell": False, "gid": None, "gids": None, "uid": None,
    "umask": -1, "process_group": -1,
}  # fmt: skip
PATIENCE = 300  # seconds after which a test that waits fails instead of hanging; a busy machine takes minutes
Popen = subprocess.Popen  # as it was before a fork put `Forked` in its place

_asking = threading.Lock()
_forker: socket.socket | None = None  # asked for forks


class Forked(subprocess.Popen):  # type: ignore[type-arg]
    """`subprocess.Popen` of a process that has imported the program already."""

    def _execute_child(self, *arguments: Any) -> None:
        given = inspect.signature(super()._execute_child).bind(*arguments).arguments
        command = given["args"]
        if (
            sys.platform != "linux"
            or any(given[name] != value for name, value in PLAIN.items())
            or list(command[:1]) != [sys.executable]
            or command[1] not in ("-m", "-c")
        ):
            super()._execute_child(*arguments)
            return
        environment = os.environ if given["env"] is None else given["env"]
        request = {
            "command": list(command[1:]), "directory": os.fspath(given["cwd"] or os.getcwd()),
            "environment": dict(environment), "session": given["start_new_session"], "umask": _umask(),
        }  # fmt: skip
        ends = [given[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        self.pid = _fork(request, [number if end == -1 else end for number, end in enumerate(ends)])
        self._child_created = True
        names = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[name] for name in names))


def _umask() -> int:
    """Of this process. Setting it, which tells it too, would be a moment in which another thread's files are open."""
    return int(re.search(r"(?m)^Umask:\s*(\d+)", Path("/proc/self/status").read_text())[1], 8)  # type: ignore[index]


def _fork(request: dict[str, Any], files: list[int]) -> int:
    """The process id of a new child. files: its standard input, output and error."""
    prctl = ctypes.CDLL(None).prctl
    with _asking:
        forker = _forker or _start()
        prctl(SUBREAPER, 1, 0, 0, 0)
        try:
            socket.send_fds(forker, [json.dumps(request).encode()], files)
            return int(forker.recv(LONGEST))
        finally:
            prctl(SUBREAPER, 0, 0, 0, 0)


def _start() -> socket.socket:
    """Start the process that forks. It ends when this one does."""
    global _forker
    _forker, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    here = Path(__file__)
    environment = os.environ | {"PYTHONPATH": str(here.parents[1])}
    with theirs:
        process = Popen(
            [sys.executable, str(here), str(theirs.fileno())], pass_fds=[theirs.fileno()], env=environment,
            stdin=subprocess.DEVNULL, cwd=here.parents[1],
        )  # fmt: skip

    @atexit.register
    def end() -> None:
        assert _forker is not None
        _forker.close()
        process.wait()

    return _forker


# --- in the process that forks ----------------------------------------------------------------------------------------


def _wait(asked: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """A request and its files. Returns in a fork alone, which is a child of the process that asks."""
    while True:
        message, files, _, _ = socket.recv_fds(asked, LONGEST, 3)
        if not message:
            os._exit(0)
        told, tell = os.pipe()
        held, go = os.pipe()
        between = os.fork()
        if between == 0:
            child = os.fork()
            if child:
                os.write(tell, str(child).encode())
                os._exit(0)
            for end in (told, tell, go):
                os.close(end)
            os.read(held, 1)  # until this is a child of theirs
            os.close(held)
            return json.loads(message), files
        for end in (tell, held):
            os.close(end)
        os.waitpid(between, 0)  # from now on the child is theirs
        os.close(go)
        asked.send(os.read(told, 32))
        for end in (told, *files):
            os.close(end)


def _become(request: dict[str, Any], files: list[int], paths: list[str]) -> None:
    """Run a program as a new interpreter would."""
    for number, end in enumerate(files):
        os.dup2(end, number)
    for end in files:
        os.close(end)
    os.umask(request["umask"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests in the background ignores it
    if request["session"]:
        os.setsid()
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    at_once = bool(os.environ.get("PYTHONUNBUFFERED"))
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=stream is sys.stderr, write_through=at_once)  # type: ignore[attr-defined]
    here = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = ["", *here, *paths]
    how, what, *arguments = request["command"]
    sys.argv = [how, *arguments]
    if how == "-m":
        importlib.import_module(what).main()
    else:
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(what, main.__dict__)


def main() -> None:
    global _forker
    ours = {str(Path(__file__).parent), *os.environ["PYTHONPATH"].split(os.pathsep)}
    asked = socket.socket(fileno=int(sys.argv[1]))
    for name in IMPORTED:
        importlib.import_module(name)
    paths = [path for path in sys.path if path not in ours]
    gc.freeze()
    while True:
        request, files = _wait(asked)
        asked.close()
        _forker, asked = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork():
            break
        _forker.close()  # this one forks for the program
        for end in files:
            os.close(end)
    asked.close()
    subprocess.Popen = Forked  # type: ignore[misc]
    _become(request, files, paths)


if __name__ == "__main__":
    main()
