"""Makes the archives beside this file, which tests/test_old_data.py reads.

Made by commit 074712a; run it in a checkout of that commit, never with later code: python tests/old/make.py

  runs.tar.xz        training runs that were interrupted, with what the same runs measure when nothing interrupts them
  live.tar.xz        the root of a live server and its store, with what the server answered
  quickstart.tar.xz  the folder of a quickstart, shortened

All paths in them are relative: the program is run where they are unpacked. Models have about two thousand weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import socket
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import httpx
import torch
import transformers

from operant import policy, quickstart, quickstart_task, run
from operant.cli import main
from operant.config import ServeConfig
from operant.live.learning.worker import Worker
from operant.live.serve import _learner_config, live, server_of
from operant.live.serving.access import Keys
from operant.live.storage.store import Store
from operant.text import Codec
from operant.types import Feedback

HERE = Path(__file__).resolve().parent
# what a run writes anew, what belongs to one process, and what names the machine
LEFT_OUT = {"report.html", "curves", "serve.log"}
SPARED = {f"quickstart/{stage}/checkpoints" for stage in ("pretrain", "finetune", "continue")}  # nobody reads them
WORDS = "red blue green cat dog house sun moon".split()
CPU = ("--device", "cpu", "--threads", "1")
RUN = (*CPU, "--tensorboard", "false", "--keep", "1", "--seed", "3")
TRAIN = (
    "train", "--model", "start", "--data", "pairs.jsonl", "--dev_data", "dev.jsonl", "--reward", "chrf",
    "--reward_workers", "0", "--prompts_per_step", "3", "--group_size", "2", "--max_tokens", "8", "--eval_prompts", "3",
    "--eval_every", "2", "--log_samples", "1", "--lr", "0.003", *RUN,
)  # fmt: skip
SHORT = ("--batch_size", "4", "--eval_every", "2", "--lr", "0.003", "--warmup_steps", "1")
STOP = 3  # the step after which a run is interrupted
STEPS = 6  # its wish
RUNS: dict[str, tuple[str, ...]] = {
    "ppo": (
        *TRAIN, "--algorithm", "ppo", "--dense", "true", "--critic", "separate", "--epochs", "2", "--minibatches", "2",
        "--kl_coef", "0.05", "--kl_target", "0.02", "--sft_data", "pairs.jsonl", "--sft_coef", "0.1",
        "--sft_batch_size", "2", "--schedule", "cosine",
    ),
    "double_q": (
        *TRAIN, "--algorithm", "double_q", "--target_every", "2", "--replay_capacity", "12", "--priority", "0.5",
    ),
    "areinforce": (*TRAIN, "--algorithm", "areinforce", "--route_by", "prompt"),
    "trpo": (*TRAIN, "--algorithm", "trpo", "--fisher_share", "1"),
    "sft": ("sft", "--model", "start", "--data", "pairs.jsonl", "--dev_data", "dev.jsonl", *SHORT, *RUN,
            "--schedule", "cosine"),
    "dpo": ("prefer", "--model", "start", "--data", "better.jsonl", "--dev_data", "better.jsonl", *SHORT, *RUN),
    "kto": ("prefer", "--algorithm", "kto", "--model", "start", "--data", "better.jsonl", "--dev_data", "better.jsonl",
            *SHORT, *RUN),
    "judge": ("reward-model", "--model", "reader", "--data", "better.jsonl", "--dev_data", "better.jsonl", *SHORT,
              *RUN),
    "pretrain": ("pretrain", "--model", "start", "--data", "texts.jsonl", "--dev_data", "texts.jsonl", "--batch_tokens",
                 "64", "--eval_every", "2", "--lr", "0.003", "--warmup_steps", "1", "--schedule", "constant", *RUN),
}  # fmt: skip


def program(*arguments: object) -> int:
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def pairs(count: int) -> list[dict[str, str]]:
    """Two words, and the same in the other order."""
    rows = []
    for i in range(count):
        one, other = WORDS[(i * 3 + i // 8) % 8], WORDS[(i * 5 + 1) % 8]
        rows.append({"prompt": f"{one} {other}", "completion": f"{other} {one}"})
    return rows


def write_rows(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_models(context: int) -> None:
    texts = [f"{row['prompt']} {row['completion']}" for row in pairs(40)]
    codec = Codec.train_bpe(texts, vocab_size=276)
    ids: dict[str, Any] = {"pad_token_id": codec.pad_id, "eos_token_id": codec.eos_id, "bos_token_id": codec.bos_id}
    torch.manual_seed(3)
    writer = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=codec.vocab_size, n_positions=context, n_embd=4, n_layer=1, n_head=2, initializer_range=0.4,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **ids,
        )
    )  # fmt: skip
    policy.Policy(writer, codec, device="cpu").save("random")
    write_rows("first.jsonl", pairs(24))
    learned = ("--steps", 40, "--batch_size", 8, "--eval_every", 40, "--lr", 0.02, *CPU, "--tensorboard", "false")
    assert program("sft", "--model", "random", "--data", "first.jsonl", *learned, "--out", "first") == 0
    shutil.copytree("first/model", "start")
    reader = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=codec.vocab_size, hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
            max_position_embeddings=context, initializer_range=0.4, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, **ids,
        )
    )  # fmt: skip
    reader.save_pretrained("reader")
    codec.save("reader")


@contextlib.contextmanager
def place() -> Iterator[Path]:
    """An empty folder to work in."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


def pack(name: str, folders: list[str]) -> None:
    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        last = Path(entry.name).name
        if entry.name in SPARED or last in LEFT_OUT or last == ".lock" or last.endswith(".lock"):
            return None
        entry.uid = entry.gid = entry.mtime = 0
        entry.uname = entry.gname = ""
        entry.mode = 0o755 if entry.isdir() else 0o644
        return entry

    with tarfile.open(HERE / f"{name}.tar.xz", "w:xz", preset=9) as archive:
        for folder in folders:
            archive.add(folder, filter=plain)


# --- runs -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def interrupted() -> Iterator[None]:
    """Ctrl-C comes in at the end of step STOP."""
    record = run.Run.record

    def then_stop(self: run.Run, *arguments: Any, **options: Any) -> None:
        record(self, *arguments, **options)
        if self.step == STOP:
            os.kill(os.getpid(), signal.SIGINT)

    run.Run.record = then_stop  # type: ignore[method-assign]
    try:
        yield
    finally:
        run.Run.record = record  # type: ignore[method-assign]


def make_runs() -> None:
    run.write_report = lambda folder: None  # type: ignore[assignment]
    with place():
        make_models(context=32)
        write_rows("pairs.jsonl", pairs(24))
        write_rows("dev.jsonl", pairs(48)[40:])
        write_rows("texts.jsonl", [{"text": row["prompt"]} for row in pairs(40)])
        write_rows("better.jsonl", [
            {"prompt": row["prompt"], "chosen": row["completion"], "rejected": row["prompt"] + " no"}
            for row in pairs(12)
        ])  # fmt: skip
        Path("uninterrupted").mkdir()
        for name, arguments in RUNS.items():
            with interrupted():
                assert program(*arguments, "--steps", STEPS, "--out", name) == 130, name
            assert program(*arguments, "--steps", STEPS, "--out", "whole") == 0, name
            shutil.copy("whole/metrics.jsonl", f"uninterrupted/{name}.jsonl")
            shutil.rmtree("whole")
        inputs = ["start", "reader", "pairs.jsonl", "dev.jsonl", "texts.jsonl", "better.jsonl"]
        pack("runs", [*inputs, "uninterrupted", *RUNS])


# --- a live root ------------------------------------------------------------------------------------------------------

LIVE: dict[str, Any] = {
    "root": "live", "model": "start", "device": "cpu", "threads": 1, "anchor_rows": 2, "anchor_tokens": 4,
    "drain_seconds": 2.0, "lr": 0.02, "keep": 3, "max_tokens": 8, "rest": 0.0, "drift_budget": 1e3,
    "likelihood_drop": 1e3,
}  # fmt: skip


class Server:
    """`operant serve` in this process; the learner is one of its own. `as_` is who asks."""

    def __init__(self, url: str, keys: dict[str, str]) -> None:
        self.url, self.keys = url, keys
        self.http = httpx.Client(base_url=url, timeout=60)

    def ask(self, method: str, path: str, body: Any = None, *, as_: str = "op") -> Any:
        answer = self.http.request(method, path, json=body, headers={"Authorization": f"Bearer {self.keys[as_]}"})
        assert answer.status_code == 200, (path, answer.text)
        return answer.json()

    def chat(self, text: str, *, as_: str = "op", **more: Any) -> Any:
        body = {"model": "default", "messages": [{"role": "user", "content": text}], "max_tokens": 6} | more
        return self.ask("POST", "/v1/chat/completions", body, as_=as_)

    def rate(self, completion_id: str, kind: str, value: Any, *, as_: str = "op", **more: Any) -> Any:
        body = {"completion_id": completion_id, "kind": kind, "value": value} | more
        return self.ask("POST", "/v1/feedback", body, as_=as_)

    def settled(self, *receipts: Any) -> None:
        for receipt in receipts:
            until(lambda name=receipt["id"]: self.ask("GET", f"/v1/feedback/{name}")["state"] != "pending")


def until(holds: Callable[[], Any]) -> None:
    end = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


@contextlib.contextmanager
def serving(keys: dict[str, str], **settings: Any) -> Iterator[Server]:
    config = ServeConfig(**LIVE | settings)
    with live(config) as running:
        server = server_of(running.app, config)
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        until(lambda: server.started)
        there = Server(f"http://127.0.0.1:{listening.getsockname()[1]}", keys)
        yield there
        there.http.close()
        server.should_exit = True
        thread.join()


def make_live() -> None:
    os.environ["PYTHONPATH"] = str(HERE.parents[1])  # for the learner
    with place():
        make_models(context=48)
        write_rows("heldout.jsonl", pairs(4))
        Path("live").mkdir()
        keys = {}
        for name in ("ann", "bob", "op"):
            roles = ["chat", "rate", *(["operate"] if name == "op" else [])]
            keys[name] = Keys("live/keys.json").add(name, roles)
        with serving(keys, heldout="heldout.jsonl", tolerance=1.0) as there:
            alone(there)
        with serving(keys, mode="shared", chat_rate=0.0, feedback_rate=0.0) as there:
            together(there)
        with serving(keys, canary_share=0.5, canary_alpha=0.4) as there:
            told = on_trial(there)
        cut_off(told)
        origin = Path("live/origin.json")
        origin.write_text(json.dumps(json.loads(origin.read_text()) | {"model": "/models/start"}))
        Path("answered.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
        pack("live", ["start", "live", "answered.json"])


def alone(there: Server) -> None:
    """Every kind of feedback, one version after the other; dan is forgotten, and somebody is pinned."""
    first = there.chat("red cat", as_="ann", n=2, metadata={"topic": "cats"})
    name = first["id"]
    there.settled(there.rate(name, "thumb", 1, as_="ann", idempotency_key="first", tags={"page": "one"}))
    there.settled(there.rate(there.chat("sun moon", as_="bob")["id"], "score", 0.2, as_="bob"))
    there.settled(there.rate(there.chat("dog", seed=5)["id"], "thumb", -1, source="dan"))
    there.settled(there.rate(name, "edit", "the cat is red", as_="bob"))
    there.settled(there.rate(f"{name}.1", "comparison", name, as_="ann"))
    there.settled(there.rate(name, "span", -1, source="cat", span={"start": 0, "end": 2}))
    taken = there.rate(name, "score", 0.9, source="cat")
    there.settled(taken, there.rate(name, "comment", "well said", as_="bob"))
    there.settled(there.rate(name, "retract", taken["id"], source="cat"))
    linked = there.http.post(
        there.chat("house", as_="bob")["operant"]["feedback_url"], json={"kind": "thumb", "value": 1}
    )
    there.settled(linked.json())
    until(lambda: there.ask("GET", "/v1/versions")["versions"][-1]["slow"])
    assert there.ask("POST", "/v1/forget?wait=60", {"source": "dan"})["state"] == "done"
    there.ask("POST", "/v1/versions/rollback")
    there.ask("POST", "/v1/versions/pins", {"user": "eve", "version": there.ask("GET", "/health")["version"]})


def together(there: Server) -> None:
    """A version needs two sources: opinions, reputations and the cap on influence come into play."""
    name = there.chat("blue house", as_="ann", seed=1)["id"]
    there.settled(there.rate(name, "thumb", 1, as_="ann"), there.rate(name, "thumb", 1, as_="bob"))
    there.settled(there.rate(name, "score", 0.1, source="cat"), there.rate(name, "edit", "a blue house", as_="ann"))


def on_trial(there: Server) -> dict[str, Any]:
    """One version is tried and refused, and the next is on trial when the server stops; what is answered then."""

    def told() -> Any:
        return there.ask("GET", "/v1/versions")

    there.rate(there.chat("green sun")["id"], "edit", "the sun is green", source="ann")
    until(lambda: told()["trial"]["candidate"] in told()["resident"])
    tried = told()["trial"]["candidate"]
    for number in range(100):
        if told()["trial"]["candidate"] != tried:
            break
        answer = there.chat("red cat", user=f"u{number}")
        worse = answer["operant"]["version"] == tried
        there.rate(answer["id"], "score", 0.1 if worse else 0.9, source=f"u{number}")
    there.settled(*there.ask("GET", "/v1/feedback?limit=1000")["data"])
    there.settled(there.rate(there.chat("green sun")["id"], "thumb", 1, source="ann"))
    until(lambda: told()["trial"]["candidate"] in told()["resident"])
    last = there.chat("moon", as_="ann", seed=2, logprobs=True, temperature=0.8)
    receipt = there.rate(last["id"], "comment", "so it is", as_="ann", idempotency_key="last")
    there.settled(receipt)
    names = [row["id"] for row in there.ask("GET", "/v1/chat/completions?limit=100")["data"]]
    paths = [
        "/health", "/v1/models", "/v1/chat/completions?limit=100", f"/v1/chat/completions/{names[0]}",
        f"/v1/chat/completions/{names[0]}/messages", "/v1/feedback?limit=1000", f"/v1/feedback/{receipt['id']}",
        "/v1/sources", "/v1/versions", "/v1/forget/1",
    ]  # fmt: skip
    refused = there.http.get("/v1/feedback/none", headers={"Authorization": f"Bearer {there.keys['op']}"})
    return {
        "keys": there.keys, "chat": last, "receipt": receipt, "fault": refused.json(),
        "get": {path: there.ask("GET", path) for path in paths},
    }  # fmt: skip


def cut_off(told: dict[str, Any]) -> None:
    """One more rating, whose step was announced when the learner died."""

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    config = ServeConfig(**LIVE)
    with Store("live/store.db") as store:
        event = Feedback("fb-late", told["chat"]["id"], "thumb", 1, "bob", "late", time.time())
        store.add_feedback(event, body_hash="late")
        worker = Worker(_learner_config(config, "live/store.db"), store, lambda said: None)
        worker.start()
        worker.versions.publish = dies  # type: ignore[method-assign]
        with contextlib.suppress(KeyboardInterrupt):
            worker.once()
    assert worker.versions.pending() is not None


# --- a quickstart -----------------------------------------------------------------------------------------------------


def make_quickstart() -> None:
    """The quickstart itself, with a tiny model, a tiny task and hardly a step of each stage."""
    policy.SIZES["llama"]["tiny"] = (1, 2, 4, 8)
    quickstart.make_task = functools.partial(quickstart_task.make_task, dev=4, test=4, raw=60)  # type: ignore[assignment]
    for name in ("pretrain", "sft", "train"):
        stage = getattr(quickstart, name)

        def short(*given: Any, _stage: Any = stage, **options: Any) -> Any:
            where = next(i for i, one in enumerate(given) if hasattr(one, "steps"))
            config = dataclasses.replace(given[where], steps=2, eval_every=1)
            return _stage(*given[:where], config, *given[where + 1 :], **options)

        setattr(quickstart, name, short)
    with place():
        options = ("--labelled", 8, "--prompts", 12, "--minutes", 1, "--seed", 2, *CPU)
        assert program("quickstart", *options, "--out", "quickstart") == 0
        pack("quickstart", ["quickstart"])


if __name__ == "__main__":
    made = {"runs": make_runs, "live": make_live, "quickstart": make_quickstart}
    for name in sys.argv[1:] or made:
        made[name]()
