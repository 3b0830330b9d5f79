"""The thread that decodes: versions and caches, streams, cancellation, a bounded queue, steps that fail."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES
from forks import PATIENCE
from hypothesis import given, settings
from hypothesis import strategies as st
from live import logprob, prompts

from operant.live.serving.engine import Busy, Engine, NotResident, StepFailed, TokenInfo, held_back
from operant.models.policy import Policy
from operant.models.sampler import Sampler
from operant.types import Completion, OperantError, Prompt, Sampling

Make = Callable[..., Policy]


class Gate:
    """Between a test and the decode steps of policies: a step waits until the test lets it go."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.permits = 0
        self.standing = False
        self.opened = False
        self.prefills: list[list[tuple[int, int]]] = []  # of each call, every row's tokens of prompt and prefix

    def slow(self, policy: Policy) -> Policy:
        prefill, decode = policy.prefill, policy.decode

        def counted(asked: Sequence[Any], before: Sequence[Any] | None = None) -> Any:
            self.prefills.append([(len(p), 0 if before is None else len(before[i])) for i, p in enumerate(asked)])
            return prefill(asked, before)

        def waiting(*arguments: Any) -> Any:
            with self.changed:
                self.standing = True
                self.changed.notify_all()
                assert self.changed.wait_for(lambda: self.opened or self.permits > 0, PATIENCE)
                self.permits, self.standing = max(0, self.permits - 1), False
                self.changed.notify_all()
            return decode(*arguments)

        policy.prefill, policy.decode = counted, waiting  # type: ignore[method-assign]
        return policy

    def open(self) -> None:
        """Nothing waits any more."""
        with self.changed:
            self.opened = True
            self.changed.notify_all()

    def stand(self) -> None:
        """Until the engine's thread stands in a decode step, which nothing lets go yet."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.standing and not self.permits, PATIENCE)

    def until(self, done: Callable[[], bool]) -> None:
        """Let decode steps go, one by one, until this is so."""
        end = time.monotonic() + PATIENCE
        while not done():
            assert time.monotonic() < end, "nothing came of it"
            with self.changed:
                self.permits = 1
                self.changed.notify_all()
            time.sleep(0.001)


def results(futures: Sequence[Future[Completion]]) -> list[Completion]:
    return [f.result(PATIENCE) for f in futures]


def endless(policy: Policy, tokens: int, **options: Any) -> Sampling:
    """Sampling that runs for so many tokens."""
    return Sampling(**({"max_tokens": tokens, "banned": (policy.codec.eos_id,), "seed": 5} | options))


def variants(make_policy: Make, family: str, count: int) -> list[Policy]:
    """Policies of the same shape with weights that differ visibly."""
    made = []
    for i in range(count):
        policy = make_policy(family)
        torch.manual_seed(100 + i)
        with torch.no_grad():
            for p in policy.trainable_parameters():
                p.add_(0.15 * i * p.std() * torch.randn_like(p))
        made.append(policy)
    return made


@pytest.fixture
def engines() -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def make(*arguments: Any, **options: Any) -> Engine:
        made.append(Engine(*arguments, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open()  # before engines are closed: the fixture that comes last is torn down first


Engines = Callable[..., Engine]


# --- what it says ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_it_says_what_the_sampler_says_and_a_seed_repeats_it(family: str, make_policy: Make, engines: Engines) -> None:
    policy = make_policy(family)
    engine, sampling = engines(policy, 7), Sampling(max_tokens=8, seed=3)
    expected = Sampler(policy).sample(prompts(policy), sampling, 2)
    for again in range(2):
        asked = [engine.submit(p, sampling, ids=[f"{again}.{p.id}.{i}" for i in range(2)]) for p in prompts(policy)]
        for futures, group in zip(asked, expected, strict=True):
            for done, c in zip(results(futures), group, strict=True):
                assert done.tokens.tolist() == c.tokens.tolist() and done.text == c.text
                assert done.policy_version is not None and set(done.policy_version.tolist()) == {7}
                assert np.allclose(done.model_logprobs, c.model_logprobs, atol=1e-4)


def test_completions_of_one_request_differ_and_share_the_reading_of_the_prompt(
    make_policy: Make, engines: Engines, gate: Gate
) -> None:
    policy = gate.slow(make_policy("gpt2"))
    gate.open()
    engine, prompt = engines(policy, 0), prompts(policy)[0]
    done = results(engine.submit(prompt, endless(policy, 10), ids=["a", "a.1", "a.2"]))
    assert gate.prefills == [[(len(prompt.tokens), 0)]]
    assert len({tuple(c.tokens.tolist()) for c in done}) == 3
    assert [c.id for c in done] == ["a", "a.1", "a.2"]


def test_greedy_takes_the_likeliest_and_has_no_propensity(make_policy: Make, engines: Engines) -> None:
    policy = make_policy("llama")
    engine, heard = engines(policy, 0), list[TokenInfo]()
    futures = engine.submit(
        prompts(policy)[1], endless(policy, 6, temperature=0.0, banned=()), ids=["g"], top_logprobs=3,
        on_text=lambda i, piece, token: heard.append(token),
    )  # fmt: skip
    (c,) = results(futures)
    assert c.behavior_logprobs is not None and not c.behavior_logprobs.any()
    assert [t.alternatives[0][0] for t in heard] == c.tokens.tolist()


def test_alternatives_are_the_models_and_only_those_who_ask_pay(
    make_policy: Make, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy("gpt2")
    searched: list[int] = []
    topk = torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda self, k, *a: (searched.append(k), topk(self, k, *a))[1])
    engine, prompt = engines(policy, 0), prompts(policy)[0]
    heard: dict[str, list[TokenInfo]] = {"few": [], "none": []}

    def listen(name: str, piece: str, token: TokenInfo) -> None:
        heard[name].append(token)

    sampling = endless(policy, 5, temperature=0.6, top_p=0.9)
    (plain,) = results(engine.submit(prompt, sampling, ids=["none"], on_text=listen))
    cutting = set(searched)  # what top_p needs of the best tokens
    assert 4 not in cutting and all(t.alternatives == () for t in heard["none"])
    (c,) = results(engine.submit(prompt, sampling, ids=["few"], on_text=listen, top_logprobs=4))
    assert c.tokens.tolist() == plain.tokens.tolist() and set(searched) == cutting | {4}
    assert c.behavior_logprobs is not None and c.model_logprobs is not None
    for t, token in enumerate(heard["few"]):
        assert token.token == c.tokens[t] and token.version == 0
        assert token.behavior_logprob == c.behavior_logprobs[t].item() or abs(token.behavior_logprob) > 0
        assert np.isclose(token.model_logprob, c.model_logprobs[t]) and np.isclose(
            token.behavior_logprob, c.behavior_logprobs[t]
        )
        # the likeliest first, each with its probability at temperature 1, nothing cut off
        ids = [i for i, _ in token.alternatives]
        every = [logprob(policy, prompt, [*c.tokens[:t].tolist(), i])[-1] for i in range(policy.codec.vocab_size)]
        assert ids == np.argsort(-np.array(every))[:4].tolist()
        assert np.allclose([p for _, p in token.alternatives], sorted(every)[:-5:-1], atol=1e-4)


# --- streams ---------------------------------------------------------------------------------------------------------


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
@settings(max_examples=200, deadline=None)
def test_what_is_held_back_is_the_longest_beginning_of_a_stop_string(text: str, stop: list[str]) -> None:
    held = held_back(text, stop)
    begins = [k for k in range(1, len(text) + 1) if any(len(s) > k and s.startswith(text[-k:]) for s in stop)]
    assert held == max(begins, default=0)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_pieces_are_final_and_join_to_the_text(family: str, make_policy: Make, engines: Engines) -> None:
    policy = make_policy(family)
    engine = engines(policy, 0)
    kinds, held = set(), 0
    for seed in range(12):
        free = endless(policy, 14, seed=seed)
        prompt = prompts(policy)[seed % 4]
        (whole,) = Sampler(policy).sample([prompt], free)[0]
        # stop strings that come up, nearly come up, and end in the middle of a token's text
        middle = whole.text[4:7]
        stops: list[tuple[str, ...]] = [(), ("never to be found",)]
        if len(middle) == 3:
            stops += [(middle,), (middle + "\0", whole.text[8:10] or "x"), (whole.text[2:4] + "\0",)]
        for number, stop in enumerate(stops):
            pieces: list[str] = []
            tokens: list[int] = []

            def listen(
                name: str, piece: str, token: TokenInfo, pieces: list[str] = pieces, tokens: list[int] = tokens
            ) -> None:
                pieces.append(piece)
                tokens.append(token.token)

            sampling = endless(policy, 14, seed=seed, stop=stop)
            (c,) = results(engine.submit(prompt, sampling, ids=[f"{seed}.{number}"], on_text=listen))
            assert "".join(pieces) == c.text and tokens == c.tokens.tolist()
            assert not any(s in c.text for s in stop)
            kinds.add(c.stop_reason)
            (alone,) = Sampler(policy).sample([prompt], sampling)[0]
            assert (alone.text, alone.stop_reason) == (c.text, c.stop_reason)
            committed = [c.text[:end] for end in c.text_ends.tolist()]
            held += sum("".join(pieces[: t + 1]) != committed[t] for t in range(len(tokens) - 1))
    assert kinds >= {"stop", "length"} and held > 0


def test_a_character_of_several_tokens_comes_in_one_piece(make_policy: Make, engines: Engines) -> None:
    policy = make_policy("gpt2")
    engine = engines(policy, 0)
    tokens = policy.codec.encode("😀")  # bytes that no merge has joined
    assert len(tokens) > 1
    script, real = [*tokens.tolist(), policy.codec.eos_id], policy.decode
    prefill, vocabulary = policy.prefill, policy.codec.vocab_size

    def scripted(logits: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(logits, -1e9)
        forced[:, script.pop(0)] = 0.0
        return forced

    policy.prefill = lambda *a: (lambda s: (s[0], scripted(s[1])))(prefill(*a))  # type: ignore[method-assign]
    policy.decode = lambda *a: scripted(real(*a))  # type: ignore[method-assign]
    assert vocabulary > max(script)
    pieces: list[str] = []
    (c,) = results(
        engine.submit(prompts(policy)[0], Sampling(), ids=["e"], on_text=lambda i, piece, t: pieces.append(piece))
    )
    assert c.text == "😀" and pieces == [""] * (len(tokens) - 1) + ["😀", ""]


def test_a_receiver_that_fails_harms_nobody(make_policy: Make, engines: Engines) -> None:
    policy = make_policy("gpt2")
    engine, calls, heard = engines(policy, 0), [0], list[str]()

    def broken(name: str, piece: str, token: TokenInfo) -> None:
        calls[0] += 1
        raise RuntimeError("the event loop is closed")

    first = engine.submit(prompts(policy)[0], endless(policy, 6), ids=["x"], on_text=broken)
    second = engine.submit(prompts(policy)[1], endless(policy, 6), ids=["y"], on_text=lambda i, p, t: heard.append(p))
    one, two = results([*first, *second])
    assert calls == [1] and len(one.tokens) == 6 and "".join(heard) == two.text


# --- versions and their caches ---------------------------------------------------------------------------------------


def recomputed(c: Completion, prompt: Prompt, by_version: dict[int, Policy]) -> None:
    """Each token's log-probability is that of the weights which it is recorded under, by a plain forward pass."""
    assert c.policy_version is not None and c.model_logprobs is not None
    for version in set(c.policy_version.tolist()):
        mine = c.policy_version == version
        expected = logprob(by_version[version], prompt, c.tokens.tolist())
        assert np.allclose(c.model_logprobs[mine], expected[mine], atol=1e-4)
        for other, policy in by_version.items():
            if other != version:  # so that the test could fail
                wrong = logprob(policy, prompt, c.tokens.tolist())
                assert np.abs(c.model_logprobs[mine] - wrong[mine]).max() > 0.01


def started(
    engine: Engine, gate: Gate, policy: Policy, name: str, tokens: int, version: int | None = None
) -> Future[Completion]:
    """A request that has its first token."""
    heard = threading.Event()
    (future,) = engine.submit(
        prompts(policy)[0], endless(policy, tokens), ids=[name], version=version,
        on_text=lambda i, p, t: heard.set(),
    )  # fmt: skip
    gate.until(heard.is_set)  # others' steps stand between
    return future


@pytest.mark.parametrize("family", FAMILIES)
def test_a_request_stays_on_the_version_it_began_with(
    family: str, make_policy: Make, engines: Engines, gate: Gate
) -> None:
    one, two = variants(make_policy, family, 2)
    plain = dict(enumerate(copy.deepcopy([one, two]), start=1))
    engine = engines(gate.slow(one), 1)
    old = started(engine, gate, one, "old", 12)
    loading = threading.Thread(target=engine.load, args=(2, two))
    loading.start()
    gate.until(lambda: engine.resident() == [1, 2])
    loading.join()
    new = engine.submit(prompts(one)[0], endless(one, 12), ids=["new"])
    gate.open()
    before, (after,) = old.result(PATIENCE), results(new)
    assert before.policy_version is not None and after.policy_version is not None
    assert set(before.policy_version.tolist()) == {1} and set(after.policy_version.tolist()) == {2}
    recomputed(before, prompts(one)[0], plain)
    recomputed(after, prompts(one)[0], plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_a_third_version_the_oldest_rows_are_read_again_under_the_newest(
    family: str, make_policy: Make, engines: Engines, gate: Gate
) -> None:
    made = variants(make_policy, family, 3)
    plain = dict(enumerate(copy.deepcopy(made), start=1))
    for policy in made:
        gate.slow(policy)
    engine = engines(made[0], 1)
    loads: list[threading.Thread] = []

    def load(version: int, resident: list[int]) -> None:
        loads.append(threading.Thread(target=engine.load, args=(version, made[version - 1])))
        loads[-1].start()
        gate.until(lambda: engine.resident() == resident)

    futures = [started(engine, gate, made[0], "first", 20), started(engine, gate, made[0], "first too", 24)]
    load(2, [1, 2])
    futures.append(started(engine, gate, made[0], "second", 20))
    load(3, [2, 3])
    futures.append(started(engine, gate, made[0], "third", 20))
    gate.open()
    done = results(futures)
    versions = [sorted(set(c.policy_version.tolist())) for c in done if c.policy_version is not None]
    assert versions == [[1, 3], [1, 3], [2], [3]]
    for c in done:
        recomputed(c, prompts(made[0])[0], plain)
        assert c.policy_version is not None and (np.diff(c.policy_version) >= 0).all()
    assert engine.stats()["reread"] == 2
    for thread in loads:
        thread.join()


def test_what_is_read_again_can_be_cancelled_before_it_is(make_policy: Make, engines: Engines, gate: Gate) -> None:
    """Between the arrival of a third version and the next step, a cache and its rows do not match."""
    made = variants(make_policy, "gpt2", 3)
    plain = dict(enumerate(copy.deepcopy(made), start=1))
    engine = engines(gate.slow(made[0]), 1)
    futures = [started(engine, gate, made[0], name, 40) for name in ("a", "b", "c")]
    loading = [threading.Thread(target=engine.load, args=(v, gate.slow(made[v - 1]))) for v in (2, 3)]
    loading[0].start()
    gate.until(lambda: engine.resident() == [1, 2])
    futures.append(started(engine, gate, made[0], "d", 40))
    gate.stand()  # what is posted now is done in one go, after that step
    loading[1].start()
    while not engine._inbox:
        time.sleep(0.001)
    engine.cancel("b")
    gate.open()
    done = results(futures)
    assert [c.stop_reason for c in done] == ["length", "cancelled", "length", "length"]
    assert len(done[1].tokens) < 40 and engine.stats()["reread"] == 3
    versions = [sorted(set(c.policy_version.tolist())) for c in done if c.policy_version is not None]
    assert versions == [[1, 3], [1], [1, 3], [2]]
    for c in done:
        recomputed(c, prompts(made[0])[0], plain)
    for thread in loading:
        thread.join()


def test_a_pinned_request_keeps_its_version_when_others_are_published(
    make_policy: Make, engines: Engines, gate: Gate
) -> None:
    made = variants(make_policy, "gpt2", 4)
    engine = engines(made[0], 1)
    with pytest.raises(NotResident):
        engine.submit(prompts(made[0])[0], endless(made[0], 4), ids=["p"], version=2)
    engine.load(2, made[1])
    gate.slow(made[0])
    pinned = started(engine, gate, made[0], "pinned", 16, version=1)
    threads = []
    for version in (3, 4):
        threads.append(threading.Thread(target=engine.load, args=(version, made[version - 1])))
        threads[-1].start()
        gate.until(lambda version=version: engine.resident() == [1, version])  # type: ignore[misc]
    refused: list[Busy] = []

    def add() -> None:
        with pytest.raises(Busy) as told:
            engine.add(2, made[1])
        refused.append(told.value)

    threads.append(threading.Thread(target=add))
    threads[-1].start()
    gate.until(lambda: bool(refused))  # the place beside the serving version is taken
    gate.open()
    c = pinned.result(PATIENCE)
    assert c.policy_version is not None and set(c.policy_version.tolist()) == {1}
    engine.add(2, made[1])  # now it is free
    assert engine.resident() == [2, 4]
    (c,) = results(engine.submit(prompts(made[0])[0], endless(made[0], 4), ids=["q"], version=2))
    assert c.policy_version is not None and set(c.policy_version.tolist()) == {2}
    engine.load(2, made[1])  # rolled back: what is resident serves at once
    assert engine.resident() == [4, 2] and engine.stats()["version"] == 2
    for thread in threads:
        thread.join()


# --- cancelling, queueing, faults ------------------------------------------------------------------------------------


def test_cancelling_frees_the_row_and_keeps_what_was_written(make_policy: Make, engines: Engines, gate: Gate) -> None:
    policy = make_policy("gpt2")
    plain = copy.deepcopy(policy)
    engine = engines(gate.slow(policy), 0, max_rows=1)
    running = started(engine, gate, policy, "running", 40)
    (queued,) = engine.submit(prompts(policy)[1], endless(policy, 5), ids=["queued"])
    (next_one,) = engine.submit(prompts(policy)[2], endless(policy, 5), ids=["next"])
    engine.cancel("queued")
    engine.cancel("running")
    engine.cancel("unknown")
    gate.open()
    cut, never, after = results([running, queued, next_one])
    assert cut.stop_reason == "cancelled" and 0 < len(cut.tokens) < 40 and not cut.truncated
    assert cut.model_logprobs is not None
    assert np.allclose(cut.model_logprobs, logprob(plain, prompts(policy)[0], cut.tokens.tolist()), atol=1e-4)
    assert never.stop_reason == "cancelled" and never.id == "queued" and never.text == "" and len(never.tokens) == 0
    assert never.tokenizer_hash == policy.codec.hash
    assert after.stop_reason == "length" and len(after.tokens) == 5
    stats = engine.stats()
    assert stats["cancelled"] == 2 and stats["completions"] == 1 and stats["queued"] == 0
    assert not running.cancel()  # a future that has a result; nor could the caller have ended it


def test_the_queue_is_bounded(make_policy: Make, engines: Engines, gate: Gate) -> None:
    policy = make_policy("gpt2")
    engine = engines(gate.slow(policy), 0, max_rows=2, queue=3)
    prompt, sampling = prompts(policy)[0], endless(policy, 6)
    begun = [started(engine, gate, policy, f"row {i}", 6) for i in range(2)]
    waiting = engine.submit(prompt, sampling, ids=["w0", "w1"])
    with pytest.raises(Busy) as refused:
        engine.submit(prompt, sampling, ids=["w2", "w3"])
    assert 1 <= refused.value.retry_after <= 60
    waiting += engine.submit(prompt, sampling, ids=["w2"])
    with pytest.raises(OperantError, match="ask for fewer"):
        engine.submit(prompt, sampling, ids=[f"many {i}" for i in range(4)])
    engine.cancel("w1")
    gate.open()
    assert len(results([*begun, *waiting])) == 5
    stats = engine.stats()
    assert stats["queued"] == 0 and stats["tokens"] == 4 * 6 and 0 < stats["busy_fraction"] <= 1
    results(engine.submit(prompt, sampling, ids=["a", "b", "c"]))  # more than the rows: it begins in parts
    assert engine.stats()["rows"] == 0


def test_prompts_that_do_not_fit_are_refused_in_one_line(make_policy: Make, engines: Engines) -> None:
    engine = engines(make_policy("gpt2"), 0)  # a context of 48
    with pytest.raises(OperantError, match=r"holds 48.*shorten it$"):
        engine.submit(Prompt("long", np.full(48, 40, np.int64)), Sampling(), ids=["x"])
    with pytest.raises(OperantError, match="empty"):
        engine.submit(Prompt("empty", np.empty(0, np.int64)), Sampling(), ids=["x"])


@pytest.mark.parametrize("where", ["prefill", "decode"])
def test_a_step_that_fails_fails_its_rows_and_nothing_else(
    where: str, make_policy: Make, engines: Engines, caplog: pytest.LogCaptureFixture
) -> None:
    policy = make_policy("gpt2")
    engine, real = engines(policy, 0, max_rows=2), getattr(policy, where)
    prompt, sampling = prompts(policy)[0], endless(policy, 6)
    failing = threading.Event()
    failing.set()

    def fails(*arguments: Any) -> Any:
        if failing.is_set():
            failing.clear()
            raise MemoryError("no room for the cache")
        return real(*arguments)

    setattr(policy, where, fails)
    futures = engine.submit(prompt, sampling, ids=["a", "b", "c"])  # the third waits for a row
    for future in futures[:2]:
        with pytest.raises(StepFailed, match="no room for the cache"):
            future.result(PATIENCE)
    assert len(futures[2].result(PATIENCE).tokens) == 6
    (c,) = results(engine.submit(prompt, sampling, ids=["d"]))
    (expected,) = Sampler(make_policy("gpt2")).sample([prompt], sampling)[0]
    assert c.tokens.tolist() == expected.tokens.tolist()
    assert engine.stats()["faults"] == 1 and engine.stats()["rows"] == 0


def test_closing_ends_what_is_under_way(make_policy: Make, gate: Gate) -> None:
    policy = make_policy("gpt2")
    engine = Engine(gate.slow(policy), 0, max_rows=1)
    running = started(engine, gate, policy, "running", 40)
    (queued,) = engine.submit(prompts(policy)[1], endless(policy, 5), ids=["queued"])
    closing = threading.Thread(target=engine.close)
    closing.start()
    gate.until(lambda: not closing.is_alive())
    done = results([running, queued])
    assert [c.stop_reason for c in done] == ["cancelled", "cancelled"] and len(done[0].tokens) > 0
    with pytest.raises(Busy, match="shutting down"):
        engine.submit(prompts(policy)[0], endless(policy, 5), ids=["late"])
    engine.cancel("late")
    engine.close()  # twice is no fault


def test_many_threads_may_ask_at_once(make_policy: Make, engines: Engines) -> None:
    policies = variants(make_policy, "gpt2", 4)
    engine = engines(policies[0], 0, max_rows=3, queue=500)
    done: list[Completion] = []

    def user(number: int) -> None:
        for i in range(5):
            futures = engine.submit(
                prompts(policies[0])[i % 4], endless(policies[0], 4, seed=number), ids=[f"{number}.{i}"]
            )
            if i == 3:
                engine.cancel(f"{number}.{i}")
            done.extend(results(futures))

    users = [threading.Thread(target=user, args=(n,)) for n in range(8)]
    for thread in users:
        thread.start()
    for version in (1, 2, 3, 1, 3):
        engine.load(version, policies[version])
    for thread in users:
        thread.join(PATIENCE)
    assert len({c.id for c in done}) == 40
    stats = engine.stats()
    assert stats["completions"] + stats["cancelled"] == 40 and stats["queued"] == stats["rows"] == 0
    assert stats["faults"] == 0
