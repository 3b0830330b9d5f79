from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from forks import PATIENCE

from operant.rewards import Bleu, RewardRunner, Sum, Ter
from operant.rewards.runner import IN_PLACE_CHARACTERS
from operant.types import Completion, OperantError, Prompt

LIMIT = 1.0


def pair(text: str, *references: str):
    ends = np.array([*range(1, len(text) + 1), len(text)], dtype=np.int64)
    row = Completion("c", "p", text, np.arange(len(ends)), ends)
    return Prompt("p", np.zeros(1, dtype=np.int64), references=references), row


def by_text(prompt, completion):
    """A reward that misbehaves as its text says."""
    match completion.text:
        case "raise":
            raise ValueError("broken\nreward")
        case "spin":
            while True:
                pass
        case "sleep":
            time.sleep(1000)
        case "die":
            os._exit(3)
        case "nan":
            return float("nan")
        case "none":
            return None
        case "long":
            return [1.0, 2.0]
        case "exit":
            sys.exit(1)
        case "child":
            subprocess.run([sys.executable, "-c", "import time; time.sleep(1000)"])
        case text if text.startswith("/"):
            beat = f"import time\nwhile True:\n    open({text!r}, 'a').write('.')\n    time.sleep(0.02)"
            subprocess.run([sys.executable, "-c", beat])
    return float(completion.text)


def process_id(prompt, completion):
    return float(os.getpid())


def batched(prompts, completions):
    if completions[0].text == "short":
        return [1.0]
    return [None if row.text == "none" else float(len(row.text)) for row in completions]


batched.batched = True


def test_order_is_kept_and_every_misbehaviour_is_a_missing_reward_with_a_reason():
    texts = [
        "0",
        "raise",
        "1",
        "spin",
        "2",
        "nan",
        "sleep",
        "none",
        "long",
        "die",
        "exit",
        "child",
        *map(str, range(3, 12)),
    ]
    with RewardRunner(by_text, workers=2, time_limit=LIMIT) as runner:
        trajectories = runner.run([pair(text) for text in texts])
        reasons = {text: t.missing for text, t in zip(texts, trajectories, strict=True) if t.missing}
        assert {text: reason.split(":")[0] for text, reason in reasons.items()} == {
            "raise": "raised", "spin": "timeout", "nan": "nan", "sleep": "timeout", "none": "none",
            "long": "wrong_length", "die": "crashed", "exit": "crashed", "child": "timeout",
        }  # fmt: skip
        assert reasons["raise"] == "raised: ValueError: broken reward"
        for text, trajectory in zip(texts, trajectories, strict=True):
            assert trajectory.completion.text == text
            if text not in reasons:
                assert trajectory.rewards[-1] == float(text) and trajectory.observed.all()
            else:
                assert not trajectory.observed.any()
        assert runner.counts == {"raised": 1, "timeout": 3, "nan": 1, "none": 1, "wrong_length": 1, "crashed": 2}
        assert runner.explain().startswith("9 of 21 rewards are missing (3 timeout, 2 crashed")
        assert runner.details["wrong_length"] == "wrong_length: 2 rewards for 5 tokens; return one number or 5"


def test_processes_are_started_once_and_are_not_this_one():
    with RewardRunner(process_id, workers=1) as runner:
        first = runner.run([pair("a"), pair("b")])
        second = runner.run([pair("c")])
        worker = first[0].rewards[-1]
        assert worker != os.getpid()
        assert first[1].rewards[-1] == second[0].rewards[-1] == worker
        # One that dies between batches costs no reward.
        os.kill(int(worker), signal.SIGKILL)
        os.waitid(os.P_PID, int(worker), os.WEXITED | os.WNOWAIT)  # it is dead, and the runner has not heard of it
        assert runner.run([pair("d")])[0].missing is None and not runner.counts
        worker = int(runner.run([pair("e")])[0].rewards[-1])
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_a_killed_reward_takes_what_it_started_with_it(tmp_path):
    beats = tmp_path / "beats"
    with RewardRunner(by_text, workers=1, time_limit=LIMIT) as runner:
        (found,) = runner.run([pair(str(beats))])
        assert found.missing.startswith("timeout")
        size = beats.stat().st_size
        time.sleep(0.3)
        assert beats.stat().st_size == size > 0


def test_closures_run_in_threads_and_a_hanging_one_is_abandoned():
    calls, forever = [], threading.Event()

    def reward(prompt, completion):
        calls.append(completion.text)
        if completion.text == "hang":
            forever.wait()
        return float(completion.text)

    with RewardRunner(reward, workers=2, time_limit=0.3) as runner:
        found = runner.run([pair(text) for text in ("1", "hang", "2", "x")])
        assert [t.missing and t.missing.split(":")[0] for t in found] == [None, "timeout", None, "raised"]
        assert found[2].rewards[-1] == 2.0
    # The closure's own list was appended to, not a copy in another process.
    assert set(calls) == {"1", "hang", "2", "x"}
    forever.set()


def test_calls_that_return_late_make_room_again_and_an_exit_is_told_at_once():
    late = threading.Event()

    def reward(prompt, completion):
        if completion.text == "exit":
            sys.exit("bad")
        if completion.text == "late":
            late.wait()
        return 1.0

    with RewardRunner(reward, workers=16, time_limit=0.1) as runner:
        assert all(t.missing.startswith("timeout") for t in runner.run([pair("late")] * 16))
        assert runner.run([pair("x")])[0].missing.startswith("stuck: 16 calls have not returned")
        late.set()
        for thread in threading.enumerate():
            if thread.name == "reward-reward":
                thread.join(10)
        runner.time_limit = 60.0
        exits, fine = runner.run([pair("exit"), pair("x")])
        assert exits.missing == "raised: SystemExit: bad" and fine.missing is None


def test_no_workers_means_threads_of_this_process():
    with RewardRunner(process_id, workers=0) as runner:
        assert runner.run([pair("a")])[0].rewards[-1] == os.getpid()


def test_a_batched_reward_is_called_once_for_the_batch():
    with RewardRunner(batched, workers=2) as runner:
        found = runner.run([pair("a"), pair("none"), pair("abc")])
        assert [t.parts["batched"] for t in found] == [1.0, None, 3.0]
        assert [t.missing is None for t in found] == [True, False, True]
        assert all(t.missing.startswith("wrong_length") for t in runner.run([pair("short"), pair("b")]))
        assert runner.counts == {"none": 1, "wrong_length": 2}


def test_linear_metrics_stay_in_place_unless_the_text_is_long():
    with RewardRunner(Bleu(), workers=1) as runner:
        found = runner.run([pair("the cat sat down", "the cat sat down"), pair("a b")])
        assert found[0].rewards[-1] == pytest.approx(1.0)
        assert found[1].missing.startswith("raised: OperantError: reward 'bleu' compares with references")
        assert not runner._pool.processes
        text = "word " * (IN_PLACE_CHARACTERS // 5 + 1)
        assert runner.run([pair(text, text)])[0].rewards[-1] == pytest.approx(1.0)
        assert runner._pool.processes


def test_only_leaves_are_sent_and_each_is_logged():
    with RewardRunner(Sum([Ter(), process_id, Bleu()], [1.0, 0.0, 1.0]), workers=1) as runner:
        (found,) = runner.run([pair("the cat sat down", "the cat sat down")])
        assert found.rewards[-1] == pytest.approx(2.0)
        assert found.parts["ter"] == 1.0 and found.parts["process_id"] not in (None, os.getpid())
        (found,) = runner.run([pair("x")])
        assert found.parts["ter"] is None and found.parts["process_id"] is not None


def test_an_input_that_cannot_travel_is_judged_here():
    prompt, row = pair("a")
    prompt = Prompt("p", prompt.tokens, inputs=threading.Lock())
    with RewardRunner(process_id, workers=1) as runner:
        assert [t.rewards[-1] == os.getpid() for t in runner.run([(prompt, row), pair("b")])] == [True, False]


def test_bad_settings_and_an_empty_batch():
    with pytest.raises(OperantError, match="time limit"):
        RewardRunner(by_text, time_limit=0)
    with pytest.raises(OperantError, match="workers"):
        RewardRunner(by_text, workers=-1)
    assert RewardRunner(by_text).run([]) == []
    assert RewardRunner(by_text).explain() == "no reward is missing"


def script(folder, reward: str, limit: float) -> subprocess.Popen:
    """A program that judges one completion with the reward of that source."""
    source = f"""
import os, re, signal
import numpy as np
from operant.rewards import RewardRunner
from operant.types import Completion, Prompt

def reward(prompt, completion):
    {reward}

row = Completion("c", "p", "a", np.arange(1), np.ones(1, dtype=np.int64))
with RewardRunner(reward, workers=1, time_limit={limit}) as runner:
    (found,) = runner.run([(Prompt("p", np.zeros(1, dtype=np.int64)), row)])
print(found.missing)
"""
    file = folder / "program.py"
    file.write_text(source)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, str(file)], env=environment, stdout=pipe, stderr=pipe, text=True)


def test_a_worker_that_holds_the_lock_does_not_outlive_a_killed_program(tmp_path):
    begun = tmp_path / "begun"
    reward = f"open({str(begun)!r}, 'w').write(str(os.getpid())); re.match('(a+)+$', 'a' * 60 + 'b')"
    program = script(tmp_path, reward, 3.0)
    while not (begun.exists() and begun.read_text()):
        assert program.poll() is None
        time.sleep(0.01)
    program.kill()
    try:
        # The worker has the pipes too: they end when it does.
        program.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.kill(int(begun.read_text()), signal.SIGKILL)
        raise


def test_what_a_reward_prints_is_on_stderr_also_when_it_is_killed(tmp_path):
    out, err = script(tmp_path, "print('thinking'); os.kill(os.getpid(), signal.SIGKILL)", 10.0).communicate(
        timeout=PATIENCE
    )
    assert out == "crashed: the worker process ended with -9\n" and err == "thinking\n"


def test_a_script_needs_no_main_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import os
        from dataclasses import dataclass
        import numpy as np
        from operant.rewards import RewardRunner
        from operant.types import Completion, Prompt

        @dataclass
        class Task:
            answer: str

        def reward(prompt, completion):
            assert isinstance(prompt.inputs, Task) and prompt.inputs.answer == completion.text
            return float(os.getpid())

        row = Completion("c", "p", "a", np.arange(1), np.ones(1, dtype=np.int64))
        with RewardRunner(reward, workers=1) as runner:
            (found,) = runner.run([(Prompt("p", np.zeros(1, dtype=np.int64), inputs=Task("a")), row)])
        assert found.missing is None, found.missing
        assert found.rewards[-1] != os.getpid()
        print("started once")
        """)
    )
    command, environment = [sys.executable, str(script)], os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "started once\n"
