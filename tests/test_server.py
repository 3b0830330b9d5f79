"""The server over real HTTP: OpenAI's API with the stock client, feedback by three ways, and what is refused."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from forks import PATIENCE
from live import logprob
from runs import quick
from serving import Served, serving

from operant.data.text import Codec
from operant.live.api.automatic import Automatic
from operant.live.api.implicit import Implicit
from operant.live.api.service import GenerationRequest, Listener, Service, Way
from operant.live.api.versions_routes import held_out
from operant.live.serve import _log_to, server_of
from operant.live.serving.access import Links
from operant.live.storage.store import Origin, StoredCompletion, StoreFault
from operant.models.policy import Policy
from operant.types import Completion, Feedback, Prompt

HELLO = [{"role": "user", "content": "the cat sat"}]


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of a model with a chat template."""
    codec = Codec.train_bpe(["the cat sat on a mat, user assistant system"] * 3, vocab_size=300)
    codec.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{{ 'assistant: ' }}"
    )
    chats = Policy.new("llama", "tiny", Codec(codec.tokenizer), max_length=128)
    with serving(chats, tmp_path_factory.mktemp("chatty")) as running:
        yield running


@pytest.fixture
def slow(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens come 20 ms apart, so that there is time to leave."""
    decode = policy.decode

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.02)
        return decode(*arguments)

    monkeypatch.setattr(policy, "decode", slowly)


def until(holds: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """What becomes true in a while."""
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)
    return found


# --- OpenAI's API -----------------------------------------------------------------------------------------------------


def test_the_stock_client_chats_and_what_it_got_is_what_is_stored(served: Served) -> None:
    answer = served.client().chat.completions.create(model="default", messages=HELLO, max_tokens=8, seed=5)
    stored = served.store.completion(answer.id)
    assert stored is not None and stored.completion is not None and stored.status == "complete"
    choice = answer.choices[0]
    assert choice.message.content == stored.completion.text and choice.message.role == "assistant"
    assert choice.completion_id == answer.id and answer.model == "operant"
    assert choice.finish_reason == {"length": "length"}.get(stored.completion.stop_reason, "stop")
    assert answer.usage.prompt_tokens == len(stored.prompt.tokens)
    assert answer.usage.completion_tokens == len(stored.completion.tokens)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert stored.completion.trainable and stored.completion.sampling.seed == 5
    assert stored.user == "owner" and stored.prompt.messages == tuple(HELLO)
    # what fine-tuning saw: the text and the separator
    assert stored.prompt.tokens.tolist() == served.service.codec.encode_prompt("the cat sat\n").tolist()


def test_a_stream_is_the_same_text_as_one_piece(served: Served) -> None:
    options: dict[str, Any] = {"model": "operant", "messages": HELLO, "max_tokens": 12, "seed": 11}
    whole = served.client().chat.completions.create(**options)
    chunks = list(served.client().chat.completions.create(**options, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len({c.id for c in chunks}) == 1 and chunks[0].id != whole.id
    stored = served.store.completion(chunks[0].id)
    assert stored is not None and stored.completion is not None
    assert stored.completion.text == whole.choices[0].message.content


def test_the_async_client_streams_with_usage(served: Served) -> None:
    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="unused") as client:
            stream = await client.chat.completions.create(
                model="default", messages=HELLO, max_tokens=5, stream=True, stream_options={"include_usage": True}
            )
            return [chunk async for chunk in stream]

    *chunks, last = asyncio.run(ask())
    assert all(chunk.usage is None for chunk in chunks)
    stored = served.store.completion(last.id)
    assert last.choices == [] and stored is not None and stored.completion is not None
    assert last.usage.completion_tokens == len(stored.completion.tokens)


def test_n_answers_are_n_completions(served: Served) -> None:
    answer = served.client().chat.completions.create(model="default", messages=HELLO, max_tokens=8, n=3, seed=1)
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert [c.completion_id for c in answer.choices] == [answer.id, f"{answer.id}.1", f"{answer.id}.2"]
    assert len({c.message.content for c in answer.choices}) == 3
    stored = [served.store.completion(c.completion_id) for c in answer.choices]
    assert [s.completion.text for s in stored] == [c.message.content for c in answer.choices]
    assert answer.usage.completion_tokens == sum(len(s.completion.tokens) for s in stored)
    assert answer.usage.prompt_tokens == len(stored[0].prompt.tokens)
    streamed = served.client().chat.completions.create(
        model="default", messages=HELLO, max_tokens=8, n=3, seed=1, stream=True
    )
    texts = ["", "", ""]
    for chunk in streamed:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [c.message.content for c in answer.choices]


def test_a_seed_repeats_and_none_does_not(served: Served) -> None:
    texts = [served.chat(seed=4, max_tokens=12)["choices"][0]["message"]["content"] for _ in range(2)]
    others = [served.chat(max_tokens=12)["choices"][0]["message"]["content"] for _ in range(2)]
    assert texts[0] == texts[1] and others[0] != others[1]


def test_stop_strings_end_an_answer_and_are_not_in_it(served: Served) -> None:
    whole = served.chat(seed=8, max_tokens=16)["choices"][0]["message"]["content"]
    stop = whole[3:5]
    cut = served.chat(seed=8, max_tokens=16, stop=[stop, "never said"])["choices"][0]
    assert cut["message"]["content"] == whole[: whole.index(stop)] and cut["finish_reason"] == "stop"
    chunks = served.client().chat.completions.create(
        model="default", messages=HELLO, seed=8, max_tokens=16, stop=stop, stream=True
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == cut["message"]["content"]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_the_models_own_whatever_the_temperature(served: Served, policy: Policy, stream: bool) -> None:
    options: dict[str, Any] = {
        "model": "default", "messages": HELLO, "max_tokens": 6, "temperature": 0.7, "top_p": 0.9, "seed": 3,
        "logprobs": True, "top_logprobs": 3,
    }  # fmt: skip
    if stream:
        chunks = list(served.client().chat.completions.create(**options, stream=True))
        rows = [row for c in chunks if c.choices[0].logprobs for row in c.choices[0].logprobs.content]
        name = chunks[0].id
    else:
        answer = served.client().chat.completions.create(**options)
        rows, name = answer.choices[0].logprobs.content, answer.id
    stored = served.store.completion(name)
    assert stored is not None and stored.completion is not None
    told = logprob(policy, stored.prompt, stored.completion.tokens)
    codec, tokens = served.service.codec, stored.completion.tokens.tolist()
    texts = [i for i, token in enumerate(tokens) if codec.is_text(token)]
    assert [row.bytes for row in rows] == [list(codec.token_bytes(tokens[i])) for i in texts]
    np.testing.assert_allclose([row.logprob for row in rows], told[texts], atol=1e-4)
    assert not np.allclose(stored.completion.behavior_logprobs, stored.completion.model_logprobs)
    for row in rows:
        best = [one.logprob for one in row.top_logprobs]
        assert len(best) == 3 and best == sorted(best, reverse=True) and best[0] >= row.logprob - 1e-6


def test_greedy_answers_are_the_likeliest_token_each(served: Served, policy: Policy) -> None:
    for temperature in (0, 1e-9):
        answer = served.chat(temperature=temperature, max_tokens=5, logprobs=True, top_logprobs=1)
        rows = answer["choices"][0]["logprobs"]["content"]
        assert rows and all(row["logprob"] == row["top_logprobs"][0]["logprob"] for row in rows)
        assert served.store.completion(answer["id"]).completion.sampling.temperature == 0


def test_text_completions_take_texts_and_tokens_as_they_are(served: Served) -> None:
    client, codec = served.client(), served.service.codec
    answer = client.completions.create(model="default", prompt=["a dog", "one"], n=2, max_tokens=4, seed=2, logprobs=1)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert answer.id.startswith("cmpl-") and answer.choices[3].completion_id == f"{answer.id}.3"
    asked = [served.store.completion(c.completion_id).prompt.text for c in answer.choices]
    assert asked == ["a dog", "a dog", "one", "one"]
    tokens = codec.encode_prompt("a dog").tolist()
    assert served.store.completion(answer.id).prompt.tokens.tolist() == tokens
    again = client.completions.create(model="default", prompt=tokens, max_tokens=4, seed=2)
    assert served.store.completion(again.id).prompt.tokens.tolist() == tokens
    lines = answer.choices[0].logprobs
    assert len(lines.tokens) == len(lines.token_logprobs) == len(lines.text_offset) and lines.text_offset[0] == 0
    streamed = client.completions.create(model="default", prompt="a dog", max_tokens=4, seed=2, stream=True)
    assert "".join(c.choices[0].text for c in streamed) == answer.choices[0].text
    assert client.completions.create(model="default", prompt="a dog").usage.completion_tokens <= 16


def test_several_messages_parts_and_roles_make_one_prompt(served: Served) -> None:
    messages = [
        {"role": "developer", "content": "one"},
        {"role": "user", "content": [{"type": "text", "text": "t"}, {"type": "text", "text": "wo"}]},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "four", "name": "ann"},
    ]
    answer = served.client().chat.completions.create(model="default", messages=messages, max_completion_tokens=3)
    stored = served.store.completion(answer.id)
    assert stored.prompt.text == "one\ntwo\nthree\nfour\n"
    assert [m["role"] for m in stored.prompt.messages] == ["system", "user", "assistant", "user"]
    assert answer.usage.completion_tokens <= 3


def test_an_assistants_message_may_have_no_content(served: Served, chatty: Served) -> None:
    """As clients send an answer back that was empty, or that called something."""
    for turn in ({"role": "assistant", "content": None}, {"role": "assistant"}):
        messages = [*HELLO, turn, {"role": "user", "content": "go on"}]
        answer = served.client().chat.completions.create(model="default", messages=messages, max_tokens=3)
        told = served.store.completion(answer.id).prompt.messages
        assert [m["content"] for m in told] == ["the cat sat", "", "go on"]
        assert "None" not in chatty.store.completion(chatty.chat(messages=messages)["id"]).prompt.text


def test_every_answer_says_its_version_and_its_id_in_its_headers(served: Served) -> None:
    body = {"messages": HELLO, "prompt": "the cat", "model": "default", "max_tokens": 3}
    for path, prompt in (("/v1/chat/completions", "messages"), ("/v1/completions", "prompt")):
        given = {name: body[name] for name in (prompt, "model", "max_tokens")}
        whole = served.http.post(path, json=given)
        assert whole.headers["X-Operant-Completion"] == whole.json()["id"]
        with served.http.stream("POST", path, json=given | {"stream": True}) as streamed:
            first = next(streamed.iter_lines())
            assert streamed.headers["X-Operant-Completion"] == json.loads(first[6:])["id"]
        assert whole.headers["X-Operant-Version"] == streamed.headers["X-Operant-Version"] == "0"
        assert "X-Operant-Cut" not in whole.headers


def test_models_are_listed_and_found(served: Served) -> None:
    client = served.client()
    assert [m.id for m in client.models.list()] == ["operant", "default"]
    assert client.models.retrieve("default").id == "default"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")


def test_a_banned_token_is_never_drawn(served: Served) -> None:
    greedy = served.chat(temperature=0, max_tokens=1)
    token = int(served.store.completion(greedy["id"]).completion.tokens[0])
    other = served.chat(temperature=0, max_tokens=1, logit_bias={str(token): -100})
    assert int(served.store.completion(other["id"]).completion.tokens[0]) != token


# --- chats longer than the context ------------------------------------------------------------------------------------

RULES = {"role": "system", "content": "be kind"}
TURNS = [{"role": ("user", "assistant")[i % 2], "content": f"{i} the cat sat on"} for i in range(41)]


@pytest.mark.parametrize("which", ["served", "chatty"])  # without a chat template, and with one
def test_a_chat_longer_than_the_context_loses_its_oldest_turns_and_says_so(
    which: str, request: pytest.FixtureRequest
) -> None:
    served: Served = request.getfixturevalue(which)
    raw = served.http.post(
        "/v1/chat/completions", json={"model": "default", "messages": [RULES, *TURNS], "max_tokens": 8}
    )
    answer = raw.json()
    cut = answer["operant"]["cut_messages"]
    assert raw.headers["X-Operant-Cut"] == str(cut) and f"oldest {cut} messages" in answer["operant"]["warning"]
    stored = served.store.completion(answer["id"])
    assert list(stored.prompt.messages) == [RULES, *TURNS[cut:]] and TURNS[cut]["role"] == "user"
    assert len(stored.prompt.tokens) <= 128 - 8  # the answer has its room
    longer = served.chat(messages=[RULES, *TURNS[cut - 2 :]], max_tokens=8)
    assert longer["operant"]["cut_messages"] == 2  # no more is left out than has to be
    short = served.chat(messages=[RULES, *TURNS[cut:]], max_tokens=8)
    assert short["operant"].keys() == {"version", "feedback_url"}
    chunks = served.client().chat.completions.create(
        model="default", messages=[RULES, *TURNS], max_tokens=8, stream=True
    )
    assert next(iter(chunks)).operant["cut_messages"] == cut


def test_an_answer_that_asks_for_more_than_a_quarter_of_the_context_cuts_no_more(served: Served) -> None:
    stored = served.store.completion(served.chat(messages=TURNS, max_tokens=100)["id"])
    (most,) = {len(served.store.completion(served.chat(messages=TURNS, max_tokens=32)["id"]).prompt.tokens)}
    assert len(stored.prompt.tokens) == most <= 96


def test_a_last_turn_that_leaves_little_room_is_answered_in_it(served: Served) -> None:
    size = len(served.service.codec.encode_prompt("the cat "))
    long = {"role": "user", "content": "the cat " * (124 // size)}
    answer = served.chat(messages=[*TURNS, long], max_tokens=64, logit_bias={"2": -100})
    assert answer["operant"]["cut_messages"] == len(TURNS) and answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == 128
    too_long = [*TURNS, {"role": "user", "content": "the cat " * 200}]
    error = served.fault("POST", "/v1/chat/completions", 400, json={"model": "default", "messages": too_long})
    assert error["code"] == "context_length_exceeded" and error["param"] == "messages"


def test_a_long_chat_is_refused_where_the_settings_or_the_request_say_so(policy: Policy, tmp_path: Path) -> None:
    chat = {"model": "default", "messages": TURNS, "max_tokens": 8}
    response = {"model": "default", "input": TURNS, "max_output_tokens": 8}
    with serving(policy, tmp_path, long_chats="refuse") as strict:
        for path, body, param in (
            ("/v1/chat/completions", chat, "messages"), ("/v1/responses", response, "input")
        ):  # fmt: skip
            error = strict.fault("POST", path, 400, json=body)
            assert (error["code"], error["param"]) == ("context_length_exceeded", param)
        assert "tokens" in strict.http.post("/v1/messages", json=chat).json()["error"]["message"]
        auto = strict.client().responses.create(**response, truncation="auto")
        assert auto.operant["cut_messages"] > 0 and auto.truncation == "auto"


def test_every_api_cuts_and_the_request_may_forbid_it(served: Served) -> None:
    cut = served.chat(messages=TURNS, max_tokens=8)["operant"]["cut_messages"]
    response = {"model": "default", "input": TURNS, "max_output_tokens": 8}
    assert served.client().responses.create(**response).operant["cut_messages"] == cut
    with pytest.raises(openai.BadRequestError, match="tokens"):
        served.client().responses.create(**response, truncation="disabled")
    message = served.http.post("/v1/messages", json={"model": "default", "messages": TURNS, "max_tokens": 8})
    assert message.json()["operant"]["cut_messages"] == cut and message.headers["X-Operant-Cut"] == str(cut)
    counted = served.http.post("/v1/messages/count_tokens", json={"model": "default", "messages": TURNS})
    assert counted.json()["input_tokens"] > 128  # of the whole chat


# --- written down before it leaves ------------------------------------------------------------------------------------


class Gate:
    """A call of the store that waits at a gate."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call, self.reached, self.open = call, threading.Event(), threading.Event()

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.reached.set()
        assert self.open.wait(20)
        return self.call(*arguments, **options)


def test_the_stub_is_committed_before_the_first_byte_and_the_tokens_before_the_last(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, complete = Gate(served.store.begin), Gate(served.store.complete)
    monkeypatch.setattr(served.store, "begin", begin)
    monkeypatch.setattr(served.store, "complete", complete)
    lines: list[str] = []
    opened = threading.Event()

    def read() -> None:
        body = {"model": "default", "messages": HELLO, "max_tokens": 5, "stream": True}
        with served.http.stream("POST", "/v1/chat/completions", json=body) as response:
            opened.set()
            lines.extend(line for line in response.iter_lines() if line)

    reader = threading.Thread(target=read)
    reader.start()
    assert begin.reached.wait(20)
    assert not opened.wait(0.3), "a byte left before the stub was committed"
    begin.open.set()
    assert complete.reached.wait(20)
    until(lambda: len(lines) >= 2)
    name = json.loads(lines[0].removeprefix("data: "))["id"]
    assert served.store.completion(name).status == "begun"
    time.sleep(0.2)
    assert not any('"finish_reason": "' in line or "[DONE]" in line for line in lines)
    complete.open.set()
    reader.join(20)
    assert lines[-1] == "data: [DONE]" and served.store.completion(name).status == "complete"


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_row_and_leaves_what_was_written(served: Served, stream: bool) -> None:
    before = {row.id for row in served.store.list_completions(limit=1000)}
    body = {"model": "default", "messages": HELLO, "max_tokens": 100, "stream": stream, "logit_bias": {"2": -100}}
    if stream:
        with served.http.stream("POST", "/v1/chat/completions", json=body) as response:
            for count, _ in enumerate(response.iter_lines()):
                if count == 4:
                    break
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=0.3)
    until(lambda: served.service.engine.stats()["rows"] == 0)
    (new,) = [row for row in served.store.list_completions(limit=1000) if row.id not in before]
    stored = until(lambda: (s := served.store.completion(new.id)).completion and s)
    assert stored.status == "partial" and 0 < len(stored.completion.tokens) < 100
    assert len(stored.completion.behavior_logprobs) == len(stored.completion.tokens)
    receipt = served.rate(stored.id, "thumb", -1)  # a partial answer can be rated as any other
    assert receipt["state"] == "pending"


def test_no_stub_stays_open_when_a_request_ends_before_it_has_begun(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"model": "default", "messages": HELLO, "max_tokens": 3, "n": 2}
    before = {row.id for row in served.store.list_completions(limit=1000)}
    begin, begun = served.store.begin, list[str]()

    def half(name: str, *arguments: Any, **options: Any) -> None:
        if name.endswith(".1"):
            raise StoreFault("the disk is full")
        begin(name, *arguments, **options)
        begun.append(name)

    with monkeypatch.context() as patch:  # one of two stubs is committed
        patch.setattr(served.store, "begin", half)
        served.fault("POST", "/v1/chat/completions", 503, json=body)
    until(lambda: served.store.completion(begun[0]).status != "begun")
    gate = Gate(begin)
    with monkeypatch.context() as patch:  # the client leaves while they are being committed
        patch.setattr(served.store, "begin", gate)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{served.url}/v1/chat/completions", json=body | {"stream": True}, timeout=0.3)
        assert gate.reached.wait(20)
        gate.open.set()
        until(lambda: len({row.id for row in served.store.list_completions(limit=1000)} - before) == 3)
    until(lambda: all(row.status != "begun" for row in served.store.list_completions(limit=1000)))


def test_what_is_not_to_be_stored_is_not(served: Served) -> None:
    before = served.store.counts()["completions"]
    answer = served.chat(store=False)
    assert served.store.counts()["completions"] == before and "feedback_url" not in answer["operant"]
    error = served.fault("POST", "/v1/feedback", 404, json={"completion_id": answer["id"], "kind": "thumb", "value": 1})
    assert "store: false" in error["message"]


def test_trouble_of_the_storage_is_503_and_passes(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise StoreFault("the disk is full")

    body = {"model": "default", "messages": HELLO, "max_tokens": 4}
    name = served.chat()["id"]
    with monkeypatch.context() as patch:
        patch.setattr(served.store, "begin", full)
        assert served.fault("POST", "/v1/chat/completions", 503, json=body)["code"] == "storage_unavailable"
    with monkeypatch.context() as patch:
        patch.setattr(served.store, "complete", full)
        assert "disk is full" in served.fault("POST", "/v1/chat/completions", 503, json=body)["message"]
        with pytest.raises(openai.APIError, match="disk is full"):
            list(served.client().chat.completions.create(**body, stream=True))
    with monkeypatch.context() as patch:
        patch.setattr(served.store, "add_feedback", full)
        served.fault("POST", "/v1/feedback", 503, json={"completion_id": name, "kind": "thumb", "value": 1})
    with monkeypatch.context() as patch:
        patch.setattr(served.store, "ready", full)
        served.fault("GET", "/ready", 503)
    assert served.chat()["choices"] and served.http.get("/ready").status_code == 200
    assert served.service.engine.stats()["rows"] == 0


def test_a_failing_model_is_told_and_the_next_request_is_served(
    served: Served, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(policy, "decode", broken)
        error = served.fault(
            "POST", "/v1/chat/completions", 500,
            json={"model": "default", "messages": HELLO, "max_tokens": 9, "logit_bias": {"2": -100}},
        )  # fmt: skip
        assert error["type"] == "server_error" and error["code"] == "generation_failed"
    (failed,) = [r for r in served.store.list_completions(limit=1000) if r.status == "failed"]
    assert failed.completion is not None and len(failed.completion.tokens) == 0
    assert served.chat()["choices"]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"messages": []}, 400, "messages"),
        ({"messages": "hello"}, 400, "messages"),
        ({"messages": [{"role": "user"}]}, 400, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, 400, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, "messages[0].content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "a"}]}, 400, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, None),
        ({"messages": [{"role": "user", "content": "the cat " * 200}]}, 400, "messages"),
        ({"model": "gpt-4o"}, 404, "model"),
        ({"model": 7}, 400, "model"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"temperature": "1"}, 400, "temperature"),
        ({"temperature": True}, 400, "temperature"),
        ({"temperature": -0.1}, 400, "temperature"),
        ({"temperature": 2.1}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"n": 0}, 400, "n"),
        ({"n": 1.5}, 400, "n"),
        ({"n": 1000}, 400, "n"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"seed": 1 << 70}, 400, "seed"),
        ({"stop": [""]}, 400, "stop"),
        ({"stop": ["x"] * 40}, 400, "stop"),
        ({"stop": 3}, 400, "stop"),
        ({"top_logprobs": 3}, 400, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 50}, 400, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"modalities": ["text", "audio"]}, 400, "modalities"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
        ({"logit_bias": {"5": 10}}, 400, "logit_bias"),
        ({"logit_bias": {"99999": -100}}, 400, "logit_bias"),
        ({"metadata": {"a": 1}}, 400, "metadata.a"),
        ({"metadata": {"a": "b" * 600}}, 400, "metadata"),
        ({"metadata": {str(i): "x" for i in range(20)}}, 400, "metadata"),
        ({"store": "yes"}, 400, "store"),
        ({"do_my_homework": True}, 400, "do_my_homework"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else None,
)
def test_a_chat_that_cannot_be_honoured_is_refused_by_name(
    served: Served, change: dict[str, Any], status: int, param: str | None
) -> None:
    error = served.fault("POST", "/v1/chat/completions", status, json={"model": "default", "messages": HELLO} | change)
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert param is None or error["param"] == param, error


def test_what_changes_nothing_is_accepted(served: Served) -> None:
    answer = served.client().chat.completions.create(
        model="default", messages=HELLO, max_tokens=2, tools=[], tool_choice="none", response_format={"type": "text"},
        modalities=["text"], frequency_penalty=0, presence_penalty=0.0, logit_bias={}, user="u", service_tier="auto",
        parallel_tool_calls=True, top_p=1, stop=None, seed=-3,
    )  # fmt: skip
    assert answer.choices


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [1, 99999]}, "prompt"),
        ({"prompt": ["a", 3]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a"] * 100}, "prompt"),
        ({"echo": True}, "echo"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 4}, "best_of"),
        ({"logprobs": 6}, "logprobs"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
def test_a_text_completion_that_cannot_be_honoured_is_refused_by_name(
    served: Served, change: dict[str, Any], param: str
) -> None:
    error = served.fault("POST", "/v1/completions", 400, json={"model": "default", "prompt": "x"} | change)
    assert error["param"] == param, error


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 20_000, b'{"model": "default", "messages": NaN}',
     b'{"model": "default", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
     b'{"model": "default", "messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
     b'{"model": "default", "messages": [{"role": "user", "content": "\\ud800"}]}',
     b'{"model": "default", "messages": [{"role": "user", "content": "x"}], "n": 1e30}'],
)  # fmt: skip
@pytest.mark.parametrize(
    "path",
    ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens",
     "/v1/feedback", "/v1/versions/pins"],
)  # fmt: skip
def test_a_body_that_is_no_request_is_the_clients_fault(served: Served, path: str, body: bytes) -> None:
    response = served.http.post(path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422), response.text
    assert response.json()["error"]["message"]


def test_odd_addresses_are_not_found(served: Served) -> None:
    chats = "/v1/chat/completions"
    for path in ("/v1/feedback/%00", "/v1/feedback/%ff", f"{chats}/%00", f"{chats}/chatcmpl-%00", f"{chats}/x/messages",
                 "/v1/nothing", "/f/x", "/v1/models/%2e%2e"):  # fmt: skip
        response = served.http.get(path)
        assert response.status_code == 404, (path, response.text)
    for path in ("/v1/chat/completions?limit=0", "/v1/chat/completions?order=up", "/v1/feedback?limit=x",
                 "/v1/feedback?after=-1", "/v1/feedback/fb-1?wait=nan", "/v1/feedback?kind=smile"):  # fmt: skip
        assert served.http.get(path).status_code in (400, 422), path
    assert served.http.get("/v1/feedback?source=%00").json()["data"] == []
    assert served.fault("GET", "/v1/chat/completions?after=chatcmpl-none", 404)
    assert served.fault("DELETE", "/v1/chat/completions", 405)


def test_a_large_body_is_refused_with_or_without_its_length(served: Served) -> None:
    large = b'{"x": "' + b"a" * (1 << 20) + b'"}'
    headers = {"Content-Type": "application/json"}
    for content in (large, iter([large[:1000], large[1000:]])):
        response = served.http.post("/v1/chat/completions", content=content, headers=headers)
        assert response.status_code == 413 and response.json()["error"]["code"] == "request_too_large"


def test_other_sites_and_other_names_may_not_use_a_server_without_keys(served: Served) -> None:
    body = {"model": "default", "messages": HELLO, "max_tokens": 1}
    assert served.fault("POST", "/v1/chat/completions", 403, json=body, headers={"Origin": "https://evil.example"})
    assert served.fault("POST", "/v1/versions/rollback", 403, headers={"Origin": "null"})
    assert served.fault("GET", "/v1/versions", 403, headers={"Host": "evil.example"})
    assert served.fault("GET", "/v1/versions", 403, headers={"Host": "[::1"})
    own = served.http.post("/v1/chat/completions", json=body, headers={"Origin": served.url})
    assert own.status_code == 200
    port = served.url.rpartition(":")[2]
    assert served.http.get("/v1/models", headers={"Host": f"localhost:{port}"}).status_code == 200
    error = served.fault("POST", "/v1/feedback", 415, content=b"{}", headers={"Content-Type": "text/plain"})
    assert error["code"] == "unsupported_media_type"


def test_every_response_carries_the_headers_of_safety(served: Served) -> None:
    for response in (served.http.get("/health"), served.http.get("/v1/nothing"), served.http.get("/f/x")):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["x-frame-options"] == "DENY"
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert "server" not in response.headers or response.headers["server"] != "uvicorn"


@pytest.mark.usefixtures("slow")
def test_a_full_queue_answers_429_and_when_to_come_again(policy: Policy, tmp_path: Path) -> None:
    with serving(policy, tmp_path, max_rows=1, queue=1) as few:
        body = {"model": "default", "messages": HELLO, "max_tokens": 60, "logit_bias": {"2": -100}}
        threads = [threading.Thread(target=few.chat, kwargs=body | {"stream": False}) for _ in range(2)]
        threads[0].start()
        until(lambda: few.service.engine.stats()["rows"] == 1)
        threads[1].start()
        until(lambda: few.service.engine.stats()["queued"] == 1)
        response = few.http.post("/v1/chat/completions", json=body)
        assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["type"] == "rate_limit_error"
        for thread in threads:
            thread.join(20)
        assert few.store.counts()["completions"] == 2  # what was refused left no stub
        assert few.http.post("/v1/chat/completions", json=body | {"max_tokens": 2}).status_code == 200
        assert few.fault("POST", "/v1/chat/completions", 400, json=body | {"n": 5})


# --- stored completions -----------------------------------------------------------------------------------------------


def test_stored_chats_are_listed_found_changed_and_deleted(policy: Policy, tmp_path: Path) -> None:
    with serving(policy, tmp_path) as own:
        client = own.client()
        names = [own.chat(n=2, metadata={"day": "a" if i < 3 else "b"})["id"] for i in range(5)]
        own.client().completions.create(model="default", prompt="x", max_tokens=2)
        assert [c.id for c in client.chat.completions.list(limit=2)] == names  # the client pages by itself
        page = client.chat.completions.list(limit=2, order="desc")
        assert [c.id for c in page.data] == names[:-3:-1] and page.has_more
        assert [c.id for c in client.chat.completions.list(metadata={"day": "b"})] == names[3:]
        found = client.chat.completions.retrieve(names[0])
        assert [c.completion_id for c in found.choices] == [names[0], f"{names[0]}.1"]
        assert found.choices[1].message.content == own.store.completion(f"{names[0]}.1").completion.text
        assert [m.content for m in client.chat.completions.messages.list(names[0])] == ["the cat sat"]
        assert client.chat.completions.update(names[0], metadata={"day": "c"}).metadata == {"day": "c"}
        assert own.store.completion(names[0]).metadata == {"day": "c"}
        assert client.chat.completions.delete(names[0]).deleted
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.retrieve(names[0])
        assert own.store.completion(f"{names[0]}.1") is None
        assert own.fault("POST", f"/v1/chat/completions/{names[1]}", 400, json={"metadata": {"a": 3}})


# --- feedback ---------------------------------------------------------------------------------------------------------


def test_every_kind_of_feedback_is_committed_and_tells_its_story(served: Served) -> None:
    answer = served.chat(n=2, max_tokens=10)
    name = answer["id"]
    text = answer["choices"][0]["message"]["content"]
    given: list[tuple[str, Any, dict[str, Any]]] = [
        ("thumb", 1, {}), ("score", 0.25, {"tags": {"page": "1"}}), ("edit", "the cat sat on the mat", {}),
        ("comparison", f"{name}.1", {}), ("span", -1, {"span": {"start": 0, "end": 2}}),
        ("span", 1.0, {"text": text[2:6], "span": {"start": 2}}), ("comment", "well \u0000 said", {}),
        ("retract", None, {}),
    ]  # fmt: skip
    for kind, value, options in given:
        receipt = served.rate(name, kind, value, **options)
        assert receipt["state"] == "pending" and not receipt["duplicate"] and receipt["source"] == "owner"
        assert receipt["waiting_for"] == "a learner, and none runs here"
        story = served.http.get(f"/v1/feedback/{receipt['id']}").json()
        assert (story["kind"], story["value"], story["completion_id"]) == (kind, value, name)
        assert story["state"] == "pending" and story["told"].endswith("for a learner, and none runs here")
        assert story["waiting_for"] == receipt["waiting_for"] and story["tags"] == options.get("tags", {})
        assert story["times"].keys() == {"received"}
    listed = served.http.get("/v1/feedback", params={"completion_id": name}).json()
    assert [row["kind"] for row in listed["data"]] == [kind for kind, _, _ in given]
    assert listed["data"][4]["span"] == {"start": 0, "end": 2} and listed["data"][5]["span"]["start"] == 2
    some = served.http.get("/v1/feedback", params={"completion_id": name, "limit": 3, "kind": "span"}).json()
    assert len(some["data"]) == 2 and not some["has_more"]


def test_an_idempotency_key_gives_the_first_receipt_and_refuses_another_body(served: Served) -> None:
    name = served.chat()["id"]
    first = served.rate(name, "thumb", 1, idempotency_key="k1")
    again = served.rate(name, "thumb", 1, idempotency_key="k1")
    assert again == first | {"duplicate": True}
    body = {"completion_id": name, "kind": "thumb", "value": -1, "idempotency_key": "k1"}
    assert served.fault("POST", "/v1/feedback", 409, json=body)["code"] == "idempotency_conflict"
    # without a key, what is said again is the same event, and a change of mind is none
    up, down, up_again = (served.rate(name, "thumb", value) for value in (1, -1, 1))
    assert up["id"] == first["id"] or up["id"] not in (down["id"], up_again["id"])
    assert len({up["id"], down["id"], up_again["id"]}) == 3
    assert served.rate(name, "thumb", 1)["id"] == up_again["id"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"kind": "thumb", "value": 3}, "value"),
        ({"kind": "thumb"}, "value"),
        ({"kind": "score", "value": 1.5}, "value"),
        ({"kind": "score", "value": "good"}, "value"),
        ({"kind": "edit", "value": 1}, "value"),
        ({"kind": "comparison", "value": "chatcmpl-none"}, "value"),
        ({"kind": "comparison", "value": "\u0000"}, "value"),
        ({"kind": "retract", "value": "fb-none"}, "value"),
        ({"kind": "span", "value": 1}, "span"),
        ({"kind": "span", "value": 1, "span": {"start": 0, "end": 9999}}, "span"),
        ({"kind": "span", "value": 1, "text": "not in the answer at all"}, "span"),
        ({"kind": "span", "value": 1, "span": {"start": "0", "end": 2}}, "span.start"),
        ({"kind": "applause", "value": 1}, "kind"),
        ({"value": 1}, "kind"),
        ({"kind": "thumb", "value": 1, "tags": {"a": 1}}, "tags.a"),
        ({"kind": "thumb", "value": 1, "idempotency_key": "a\u0000b"}, "idempotency_key"),
        ({"kind": "thumb", "value": 1, "mood": "fine"}, "mood"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else None,
)
def test_only_malformed_feedback_is_refused(served: Served, body: dict[str, Any], param: str) -> None:
    name = served.chat()["id"]
    events = served.store.counts()["events"]
    error = served.fault("POST", "/v1/feedback", 422, json={"completion_id": name} | body)
    assert error["param"] == param, error
    assert served.store.counts()["events"] == events


def test_only_ones_own_word_is_taken_back(served: Served) -> None:
    one, other = served.chat()["id"], served.chat("a dog ran")["id"]
    anna = served.rate(one, "thumb", 1, source="anna")["id"]
    for body in ({"completion_id": one, "source": "bob"}, {"completion_id": other, "source": "anna"}):
        error = served.fault("POST", "/v1/feedback", 422, json=body | {"kind": "retract", "value": anna})
        assert error["param"] == "value" and "version" not in error["message"]
    served.rate(one, "retract", anna, source="anna")


def test_a_full_disk_is_not_ready(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    assert served.http.get("/ready").status_code == 200
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    answer = served.http.get("/ready")
    assert answer.status_code == 503 and "disk is full" in answer.text


def test_feedback_on_what_is_not_there_is_404(served: Served) -> None:
    for name in ("chatcmpl-000000000000000000000000", "", "\u0000", "x" * 1000):
        body = {"completion_id": name, "kind": "thumb", "value": 1}
        assert served.fault("POST", "/v1/feedback", 404, json=body)["param"] == "completion_id"


def test_an_answer_of_a_version_that_is_gone_is_rated_as_any_other(served: Served) -> None:
    """By every way: what it was is in the record, and the record says which version it was of."""
    stored = served.store.completion(served.chat()["id"])
    name, version = "chatcmpl-of-a-version-that-is-gone", 7
    old = dataclasses.replace(
        stored.completion, id=name, policy_version=np.full(len(stored.completion.tokens), version)
    )
    asked = Origin("", "owner", version, stored.request, {}, stored.created)
    served.store.begin(name, stored.prompt, old.sampling, asked)
    served.store.complete(old, "complete")
    assert version not in [one.version for one in served.service.versions.all()]
    found = served.client().chat.completions.retrieve(name)
    assert found.operant["version"] == version
    assert served.rate(name, "thumb", 1)["state"] == "pending"
    assert served.client().chat.completions.update(name, metadata={"feedback": "down"}).operant["feedback"]
    link = served.http.post(found.operant["feedback_url"], json={"kind": "edit", "value": "the cat sat down"})
    assert link.status_code == 200
    assert served.rate(stored.id, "comparison", name)["state"] == "pending"


def test_the_metadata_update_of_the_stock_client_is_feedback(served: Served) -> None:
    client = served.client()
    name = served.chat()["id"]
    told = client.chat.completions.update(name, metadata={"feedback": "up", "page": "3"})
    (event,) = told.operant["feedback"]
    story = served.store.story(event)
    assert story is not None and (story.event.kind, story.event.value) == ("thumb", 1)
    assert told.metadata == {"feedback": "up", "page": "3"}
    assert client.chat.completions.update(name, metadata={"feedback": "up"}).operant["feedback"] == [event]
    down = client.chat.completions.update(name, metadata={"feedback": "down"}).operant["feedback"][0]
    scored = client.chat.completions.update(name, metadata={"score": "0.5", "comment": "fine"}).operant["feedback"]
    assert [served.store.story(i).event.kind for i in (down, *scored)] == ["thumb", "score", "comment"]
    assert "feedback" not in client.chat.completions.update(name, metadata={"page": "4"}).operant
    with pytest.raises(openai.UnprocessableEntityError, match="up"):
        client.chat.completions.update(name, metadata={"feedback": "maybe"})
    assert served.store.completion(name).metadata == {"page": "4"}


def test_a_signed_link_rates_one_answer_without_a_key(served: Served) -> None:
    answer = served.chat("<b>the cat</b>")
    url = answer["operant"]["feedback_url"]
    assert url.startswith(f"{served.url}/f/")
    events = served.store.counts()["events"]
    page = served.http.get(url)
    assert page.status_code == 200 and "<b>" not in page.text.split("<main>")[1].split("</p>")[0]
    assert served.store.counts()["events"] == events, "looking at a link must rate nothing"
    assert served.http.post(url, data={"value": "-1"}, headers={"Origin": served.url}).status_code == 200
    (story,) = served.store.events(completion_id=answer["id"])
    assert (story.event.kind, story.event.value, story.event.source) == ("thumb", -1, "owner")
    receipt = served.http.post(url, json={"kind": "comment", "value": "so so"}).json()
    assert served.store.story(receipt["id"]).event.value == "so so"
    # for this answer and this source only
    other = served.chat()["id"]
    for more in ({"completion_id": other}, {"source": "ann"}):
        assert served.http.post(url, json={"kind": "thumb", "value": 1} | more).status_code == 422
    token = url.rpartition("/")[2]
    head, _, rest = token.partition(".")
    for forged in (token[:-2], token + "A", f"{head[:-2]}AA.{rest}", Links("x" * 32, 60).sign(other, "owner")):
        assert served.http.get(f"/f/{forged}").status_code == 404
        assert served.http.post(f"/f/{forged}", json={"kind": "thumb", "value": 1}).status_code == 404
    assert served.http.post(url, data={"value": "5"}).status_code == 422
    assert served.http.post(url, content=b"[", headers={"Content-Type": "application/json"}).status_code == 400
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served.service.links, "seconds", -1)
        assert served.http.get(url).status_code == 410
        assert served.http.post(url, data={"value": "1"}).status_code == 410


# --- versions, health, metrics ----------------------------------------------------------------------------------------


def test_versions_are_listed_and_pins_kept(served: Served) -> None:
    told = served.http.get("/v1/versions").json()
    assert told["current"] == 0 and told["serving"] == 0 and told["versions"][0]["version"] == 0
    assert served.http.post("/v1/versions/pins", json={"user": "ann", "version": 0}).json()["pins"] == {"ann": 0}
    assert told["learner"] == {"state": "none"}
    answer = served.chat(user="ann")
    assert answer["operant"]["version"] == 0 and served.store.completion(answer["id"]).user == "ann"
    assert served.http.post("/v1/versions/pins", json={"user": "ann", "version": None}).json()["pins"] == {}
    served.fault("POST", "/v1/versions/pins", 409, json={"user": "ann", "version": 7})
    served.fault("POST", "/v1/versions/pins", 400, json={"user": "", "version": 0})
    served.fault("POST", "/v1/versions/9/promote", 409)
    served.fault("POST", "/v1/versions/rollback", 409)
    served.fault("POST", "/v1/versions/-1/promote", 400)


def test_what_the_slow_gate_measured_is_read_for_signs_of_collapse(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Along the line of what serves: version 2 began from 0, and what became of 1 is nobody's."""
    numbers = {0: (None, {"distinct2": 0.8, "bleu": 30.0}), 1: (0, {"distinct2": 0.1}), 3: (2, {"bleu": 20.0})}
    rows: list[dict[str, Any]] = [
        {"version": n, "parent": parent, "slow": {"passed": True, "numbers": found}}
        for n, (parent, found) in numbers.items()
    ]
    rows.append({"version": 2, "parent": 0, "slow": None})
    assert held_out({"versions": rows}, 3) == {"eval/distinct2": [(0, 0.8)], "eval/bleu": [(0, 30.0), (3, 20.0)]}
    assert served.http.get("/v1/versions").json()["notices"] == []
    far = {"anchor": 0, "passed": True, "reason": "", "numbers": {"kl_ref": 2.0}}
    monkeypatch.setattr(served.service.versions, "slow", lambda version: far)
    (notice,) = served.http.get("/v1/versions").json()["notices"]
    assert notice["kind"] == "collapse" and "held-out KL 2 nats/token" in notice["text"]


def test_health_readiness_and_metrics(served: Served) -> None:
    assert served.http.get("/health").json() == {
        "status": "ok", "model": "operant", "version": 0, "learner": "none",
    }  # fmt: skip
    assert served.http.get("/ready").json()["status"] == "ready"

    def read(name: str) -> float:
        lines = served.http.get("/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(name))

    before = read("operant_tokens_total")
    answer = served.chat()
    assert read("operant_tokens_total") == before + answer["usage"]["completion_tokens"]
    pending = read("operant_events_pending")
    served.rate(answer["id"], "thumb", 1)
    assert read("operant_events_pending") == pending + 1
    assert read('operant_requests_total{route="/v1/chat/completions",status="200"}') >= 1
    assert read("operant_serving_version") == 0


# --- the next message as a rating -------------------------------------------------------------------------------------


def gratitude(prompt: Any, completion: Any, message: str) -> float | None:
    """The rule of the tests: thanks are a good score, and some things are no rating at all."""
    if message == "explode":
        raise ValueError("boom")
    if message == "too much":
        return 7.0
    return {"thanks": 1.0, "wrong": 0.0}.get(message)


def test_a_rule_may_read_the_next_message_as_a_score(
    policy: Policy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rule = Implicit("test_server:gratitude")
    with serving(policy, tmp_path, listeners=[rule]) as own:
        name, text = (answer := own.chat(seed=1))["id"], answer["choices"][0]["message"]["content"]

        def say(message: str, **options: Any) -> None:
            chat = [*HELLO, {"role": "assistant", "content": text}, {"role": "user", "content": message}]
            own.chat(messages=chat, **options)

        say("thanks", user="somebody else")
        for message in ("explode", "too much", "go on"):
            say(message)
        say("thanks")
        until(lambda: own.store.counts()["events"] == 1)
        say("thanks")
        say("wrong")
        until(lambda: own.store.counts()["events"] == 2)
        first, second = own.store.events()
        assert (first.event.completion_id, first.event.kind, first.event.value) == (name, "score", 1.0)
        assert first.event.source == "rule:test_server:gratitude" and second.event.value == 0.0
        until(lambda: "boom" in caplog.text and "from 0 to 1" in caplog.text)
        again = Implicit("test_server:gratitude")  # of the next process
        again.recall(own.store.list_completions(limit=1000))
        own.service.listeners[:] = [again]
        say("wrong", user="owner")
        say("go on")
    assert again._answers.keys() >= rule._answers.keys()


# --- listeners --------------------------------------------------------------------------------------------------------


class Heard(Listener):
    """Writes down what it hears, and then fails."""

    def __init__(self) -> None:
        self.words: list[tuple[str, str]] = []

    async def on_begun(
        self, service: Service, request: GenerationRequest, prompt: Prompt, completion_ids: Sequence[str]
    ) -> None:
        self.words += [(f"begun {request.kind}", name) for name in completion_ids]
        raise RuntimeError("it cannot hear")

    async def on_answered(
        self, service: Service, request: GenerationRequest, prompt: Prompt, completion: Completion
    ) -> None:
        self.words.append(("answered", completion.id))
        raise RuntimeError("it cannot hear")

    async def on_rated(self, service: Service, event: Feedback, stored: StoredCompletion, way: Way) -> None:
        self.words.append((f"rated by {way}", stored.id))
        raise RuntimeError("it cannot hear")


def test_listeners_are_told_of_everything_and_a_fault_of_theirs_harms_nobody(
    policy: Policy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = Heard(), Heard()
    with serving(policy, tmp_path, listeners=[first, second]) as own:
        chat = own.chat(n=2)["id"]
        text = own.http.post("/v1/completions", json={"model": "default", "prompt": ["a", "the"], "max_tokens": 2})
        texts = [choice["completion_id"] for choice in text.json()["choices"]]
        assert own.rate(chat, "thumb", 1)["state"] == "pending"
        assert own.rate(chat, "thumb", 1, idempotency_key="k")["duplicate"] is False
        assert own.rate(chat, "thumb", 1, idempotency_key="k")["duplicate"] is True  # nothing new happens
        until(lambda: not own.service.tasks)
    names = [chat, f"{chat}.1", *texts]
    kinds = ["begun chat", "begun chat", "begun text", "begun text"]
    expected = [*zip(kinds, names), *(("answered", name) for name in names), *[("rated by api", chat)] * 2]
    assert sorted(first.words) == sorted(expected) == sorted(second.words)
    assert caplog.text.count("the listener Heard failed") == 2 * (
        len(expected) - 1
    )  # a chat of two choices begins once


# --- the end ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_cuts_off_what_goes_on_too_long_and_records_it(policy: Policy, tmp_path: Path, stream: bool) -> None:
    lines: list[str] = []
    with serving(policy, tmp_path, drain_seconds=0.2) as own:
        body = {
            "model": "default", "messages": HELLO, "max_tokens": 110, "stream": stream, "logit_bias": {"2": -100}
        }  # fmt: skip

        def ask() -> None:
            with own.http.stream("POST", "/v1/chat/completions", json=body) as response:
                lines.extend(line for line in response.iter_lines() if line)

        thread = threading.Thread(target=ask)
        thread.start()
        until(lambda: own.service.engine.stats()["rows"] == 1)
        own.server.should_exit = True
        thread.join(20)
        (stored,) = own.store.list_completions()
        assert stored.status == "partial" and 0 < len(stored.completion.tokens) < 110
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "stopping"


def halved(prompt: Prompt, completion: Completion) -> float:
    return 0.5 if completion.text else 0.0


def far_off(prompt: Prompt, completion: Completion) -> float:
    return 7.0


@pytest.mark.parametrize(("reward", "events"), [(halved, 1), (far_off, 0)])
def test_a_reward_rates_every_answer_once(policy: Policy, tmp_path: Path, reward: Any, events: int) -> None:
    automatic = Automatic(quick(reward))
    try:
        with serving(policy, tmp_path, listeners=[automatic]) as served:
            name = served.chat(logit_bias={"2": -100})["id"]
            served.chat(store=False)
            until = time.monotonic() + PATIENCE
            while served.service.tasks and time.monotonic() < until:
                time.sleep(0.02)
            told = served.http.get("/v1/feedback").json()["data"]
            assert len(told) == events
            assert all(one["completion_id"] == name and one["kind"] == "score" for one in told)
            assert all(one["value"] == 0.5 and one["source"].startswith("reward:") for one in told)
    finally:
        automatic.close()


# --- in a program of somebody else's ----------------------------------------------------------------------------------


def test_a_server_closes_no_log_handler_of_the_program(served: Served) -> None:
    """uvicorn's own set-up closes all of them, and absl's, which TensorBoard brings, closes standard error with it."""

    class Handler(logging.Handler):
        closed = False

        def close(self) -> None:
            Handler.closed = True
            super().close()

    handler = Handler()
    server_of(served.server.config.app, served.service.config)
    assert not Handler.closed
    handler.close()


def test_what_uvicorn_warns_of_is_on_the_terminal_as_our_own_warnings_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with _log_to(tmp_path / "serve.log"):
        logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
        logging.getLogger("operant.live").warning("the learner was killed")
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith(" WARNING Invalid HTTP request received.") and second.endswith(
        " WARNING the learner was killed"
    )
    assert not logging.getLogger("uvicorn").handlers
