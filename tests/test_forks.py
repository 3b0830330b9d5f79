"""What tests start in place of a new interpreter is a process like any other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from forks import Forked

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is forked")
TOLD = """
import json, os, sys
umask = os.umask(0)
print(json.dumps([os.getpid(), os.getppid(), os.getsid(0), os.getcwd(), os.environ["WHERE"], sys.argv[1:], umask]))
print(sys.stdin.read(), file=sys.stderr)
sys.exit(3)
"""


def test_it_has_all_that_popen_gives_and_is_a_child_of_who_asked(tmp_path: Path) -> None:
    pipe, umask = subprocess.PIPE, os.umask(0o027)
    try:
        process = Forked(
            [sys.executable, "-c", TOLD, "a", "b"], stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=tmp_path,
            env=os.environ | {"WHERE": "here"}, start_new_session=True,
        )  # fmt: skip
    finally:
        os.umask(umask)
    out, err = process.communicate("heard")
    pid, parent, session, folder, where, arguments, mask = json.loads(out)
    assert (process.returncode, err) == (3, "heard\n")
    assert pid == process.pid == session and parent == os.getpid()
    assert (folder, where, arguments, mask) == (str(tmp_path), "here", ["a", "b"], 0o027)


def test_what_it_starts_is_forked_too_and_a_fault_is_told() -> None:
    inner = "import sys; assert 'torch' not in sys.modules"  # which nobody here has imported
    outer = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {inner!r}]))"
    with Forked([sys.executable, "-c", outer], stderr=subprocess.PIPE, text=True) as process:
        err = process.communicate()[1]
    assert process.returncode == 1 and err.endswith("AssertionError\n")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it(number: signal.Signals) -> None:
    code = "import time; print(flush=True); time.sleep(600)"
    pipe = subprocess.PIPE
    with Forked([sys.executable, "-c", code], stdout=pipe, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(number)
        assert process.wait(60) == -number
