"""OpenAI's Responses API with the stock client: answers, events, chats that go on, what is stored, what is refused."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from forks import PATIENCE
from serving import HELLO, Served, learning, serving

from operant.live.serving.access import Keys
from operant.live.storage.store import StoreFault
from operant.models.policy import Policy


def ask(served: Served, content: Any = "the cat sat", **options: Any) -> Any:
    """An answer, drawn with a seed, which the API itself has not."""
    seed = {"seed": options.pop("seed", 5)}
    given = {"model": "default", "input": content, "max_output_tokens": 8, "extra_body": seed}
    return served.client().responses.create(**given | options)


# --- answers ----------------------------------------------------------------------------------------------------------


def test_an_answer_is_a_response_and_what_is_stored(served: Served) -> None:
    answer = ask(served, temperature=0.8, top_p=0.9, metadata={"page": "1"}, user="ann")
    stored = served.store.completion(answer.id)
    assert stored is not None and stored.completion is not None and answer.id.startswith("resp_")
    assert answer.output_text == stored.completion.text and answer.model == "operant"
    assert (answer.output[0].type, answer.output[0].role, answer.output[0].status) == (
        "message", "assistant", answer.status
    )  # fmt: skip
    cut_off = stored.completion.stop_reason == "length"
    assert answer.status == ("incomplete" if cut_off else "completed")
    assert (answer.incomplete_details.reason if cut_off else answer.incomplete_details) == (
        "max_output_tokens" if cut_off else None
    )
    assert answer.usage.input_tokens == len(stored.prompt.tokens)
    assert answer.usage.output_tokens == len(stored.completion.tokens)
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    sampling = stored.completion.sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.seed) == (0.8, 0.9, 8, 5)
    assert (answer.temperature, answer.top_p, answer.max_output_tokens) == (0.8, 0.9, 8)
    assert answer.metadata == stored.metadata == {"page": "1"} and stored.user == answer.user == "ann"
    assert stored.prompt.messages == ({"role": "user", "content": "the cat sat"},)
    # the same answer as the other API's
    chat = served.chat(seed=5, temperature=0.8, top_p=0.9, max_tokens=8)
    assert chat["choices"][0]["message"]["content"] == answer.output_text


def test_instructions_roles_and_parts_make_one_chat(served: Served) -> None:
    answer = ask(
        served,
        [
            {"role": "developer", "content": "one"},
            {"role": "user", "content": [{"type": "input_text", "text": "t"}, {"type": "input_text", "text": "wo"}]},
            {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
             "content": [{"type": "output_text", "text": "three", "annotations": []}]},
            {"role": "user", "content": "four"},
        ],
        instructions="be kind",
    )  # fmt: skip
    stored = served.store.completion(answer.id)
    assert [(m["role"], m["content"]) for m in stored.prompt.messages] == [
        ("system", "be kind"), ("system", "one"), ("user", "two"), ("assistant", "three"), ("user", "four"),
    ]  # fmt: skip
    assert answer.instructions == "be kind"
    items = list(served.client().responses.input_items.list(answer.id, order="asc", limit=2))  # the client pages
    assert [item.content[0].text for item in items] == ["one", "two", "three", "four"]
    assert "be kind" not in json.dumps(stored.request)  # what was said is in the prompt alone, which can be emptied


def test_a_stream_is_the_vendors_events_and_the_same_text(served: Served) -> None:
    whole = ask(served, seed=11, max_output_tokens=12)
    events = list(ask(served, seed=11, max_output_tokens=12, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done",
        f"response.{whole.status}",
    ]  # fmt: skip
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events[4:-4]) == whole.output_text == events[-4].text
    last = events[-1].response
    assert last.output_text == whole.output_text and last.usage.output_tokens == whole.usage.output_tokens
    assert events[0].response.id == last.id and events[0].response.status == "in_progress"
    assert last.output[0].id == events[4].item_id
    assert served.store.completion(last.id).completion.text == whole.output_text


def test_the_clients_own_accumulator_understands_the_stream(served: Served) -> None:
    def ends(seed: int) -> bool:
        return served.chat(seed=seed, max_tokens=100)["choices"][0]["finish_reason"] == "stop"

    seed = next(filter(ends, range(100)))  # the client knows an answer as final that has ended by itself
    asked: dict[str, Any] = {"model": "default", "input": "the cat sat", "max_output_tokens": 100}
    with served.client().responses.stream(**asked, extra_body={"seed": seed}) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        answer = stream.get_final_response()
    assert answer.output_text == text == served.store.completion(answer.id).completion.text
    assert answer.status == "completed" and answer.completed_at >= answer.created_at


def test_logprobs_are_told_when_they_are_to_be_included(served: Served) -> None:
    options: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "seed": 3}
    answer = ask(served, **options)
    rows = answer.output[0].content[0].logprobs
    chat = served.chat(seed=3, max_tokens=8, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert [(row.token, row.logprob) for row in rows] == [(row["token"], row["logprob"]) for row in chat]
    assert rows and all(len(row.top_logprobs) == 2 for row in rows)
    events = list(ask(served, stream=True, **options))
    streamed = [row.token for e in events if e.type == "response.output_text.delta" for row in e.logprobs]
    assert streamed == [row.token for row in rows]


def test_every_answer_says_its_version_and_its_id_in_its_headers(served: Served) -> None:
    body = {"model": "default", "input": "the cat sat", "max_output_tokens": 4}
    raw = served.client().responses.with_raw_response.create(**body)
    assert raw.headers["X-Operant-Version"] == "0" and raw.headers["X-Operant-Completion"] == raw.parse().id
    with served.http.stream("POST", "/v1/responses", json=body | {"stream": True}) as response:
        (first, *_) = [line for line in response.iter_lines() if line.startswith("data: ")]
        assert response.headers["X-Operant-Version"] == "0"
        assert response.headers["X-Operant-Completion"] == json.loads(first[6:])["response"]["id"]
        assert response.headers["content-type"].startswith("text/event-stream")


def test_not_stored_is_not_stored(served: Served) -> None:
    before = served.store.counts()["completions"]
    answer = ask(served, store=False)
    assert answer.store is False and "feedback_url" not in answer.operant
    assert served.store.counts()["completions"] == before
    with pytest.raises(openai.NotFoundError):
        served.client().responses.retrieve(answer.id)


# --- a chat that goes on ----------------------------------------------------------------------------------------------


def test_a_response_goes_on_from_an_earlier_one_without_its_instructions(served: Served) -> None:
    first = ask(served, instructions="be kind")
    second = ask(served, "a dog ran", previous_response_id=first.id, instructions="be brief")
    third = ask(served, [{"role": "user", "content": "one"}], previous_response_id=second.id)
    stored = served.store.completion(third.id)
    assert [(m["role"], m["content"]) for m in stored.prompt.messages] == [
        ("user", "the cat sat"), ("assistant", first.output_text), ("user", "a dog ran"),
        ("assistant", second.output_text), ("user", "one"),
    ]  # fmt: skip
    assert served.store.completion(second.id).prompt.messages[0] == {"role": "system", "content": "be brief"}
    assert third.previous_response_id == second.id and third.instructions is None


def test_what_there_is_not_is_not_gone_on_from(served: Served) -> None:
    for name in ("resp_000000000000000000000000", served.chat()["id"], "resp_\u0000"):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(served, previous_response_id=name)
        assert caught.value.param == "previous_response_id" and caught.value.code == "previous_response_not_found"


def test_anothers_response_is_as_unknown_as_none(policy: Policy, tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.json")
    ann, bob = (keys.add(name, ["chat", "rate"]) for name in ("ann", "bob"))
    with serving(policy, tmp_path, keys=keys) as guarded:
        given = {"model": "default", "input": "the cat sat", "max_output_tokens": 4}
        answer = guarded.client(ann).responses.create(**given)
        assert guarded.client(ann).responses.create(**given, previous_response_id=answer.id).status
        other = guarded.client(bob).responses
        with pytest.raises(openai.BadRequestError):
            other.create(**given, previous_response_id=answer.id)
        for call in (other.retrieve, other.delete, other.input_items.list):
            with pytest.raises(openai.NotFoundError):
                call(answer.id)
        with pytest.raises(openai.AuthenticationError):
            guarded.client("op-wrong").responses.create(**given)


# --- what is stored ---------------------------------------------------------------------------------------------------


def test_a_stored_response_is_found_and_deleted(served: Served) -> None:
    client = served.client()
    answer = ask(served, instructions="be kind", metadata={"a": "b"})
    found = client.responses.retrieve(answer.id)
    told = ("id", "status", "output_text", "instructions", "temperature", "top_p", "metadata", "usage", "truncation")
    assert {name: getattr(found, name) for name in told} == {name: getattr(answer, name) for name in told}
    assert found.output[0].id == answer.output[0].id and found.operant["version"] == 0
    assert answer.id not in [c.id for c in client.chat.completions.list()]  # those are the chats
    client.responses.delete(answer.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)


def test_a_rating_of_a_response_or_a_message_is_learned_from(policy: Policy, tmp_path: Path) -> None:
    with learning(policy, tmp_path) as own:
        answer = ask(own)
        message = {"model": "default", "messages": HELLO, "max_tokens": 8}
        for name in (answer.id, own.http.post("/v1/messages", json=message).json()["id"]):
            own.rate(name, "thumb", 1)
        by_link = own.http.post(answer.operant["feedback_url"], json={"kind": "comment", "value": "fine"})
        assert by_link.status_code == 200
        for event in [row.event.id for row in own.store.events(kind="thumb")]:
            story = own.http.get(f"/v1/feedback/{event}?wait=30").json()
            assert story["state"] == "used" and story["logprob_after"] > story["logprob_before"], story
        assert ask(own).operant["version"] == story["version"] >= 1
        assert own.client().models.retrieve("default").operant["version"] == story["version"]
        assert own.client().models.retrieve("default").operant["base"] == "model"  # the folder's name


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"input": []}, 400, "input"),
        ({"input": None}, 400, "input"),
        ({"input": [{"role": "user"}]}, 400, "input[0].content"),
        ({"input": [{"role": "robot", "content": "x"}]}, 400, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, 400, None),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]}, 400, None),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, 400, None),
        ({"input": "the cat " * 200}, 400, "input"),
        ({"model": "gpt-5"}, 404, "model"),
        ({"temperature": 2.1}, 400, "temperature"),
        ({"max_output_tokens": 0}, 400, "max_output_tokens"),
        ({"tools": [{"type": "web_search"}]}, 400, "tools"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"background": True}, 400, "background"),
        ({"conversation": "conv_1"}, 400, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, 400, "prompt"),
        ({"text": {"format": {"type": "json_object"}}}, 400, "text.format"),
        ({"reasoning": {"summary": "auto"}}, 400, "reasoning.summary"),
        ({"include": ["the kitchen sink"]}, 400, "include"),
        ({"top_logprobs": 2}, 400, "top_logprobs"),
        ({"stream_options": {"include_obfuscation": False}}, 400, "stream_options"),
        ({"metadata": {"a": "b" * 600}}, 400, "metadata"),
        ({"user": "rule:x"}, 400, "user"),
        ({"do_my_homework": True}, 400, "do_my_homework"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else None,
)
def test_what_cannot_be_honoured_is_refused_by_name(
    served: Served, change: dict[str, Any], status: int, param: str | None
) -> None:
    error = served.fault("POST", "/v1/responses", status, json={"model": "default", "input": "the cat sat"} | change)
    assert param is None or (error["param"] or "").startswith(param), error


def test_what_changes_nothing_is_accepted(served: Served) -> None:
    answer = ask(
        served, tools=[], tool_choice="auto", text={"format": {"type": "text"}, "verbosity": "low"}, background=False,
        reasoning={"effort": "low"}, include=["reasoning.encrypted_content"], parallel_tool_calls=True,
        service_tier="auto", prompt_cache_key="k", safety_identifier="s",
    )  # fmt: skip
    assert answer.output_text is not None


def test_a_stream_that_cannot_go_on_fails_in_the_vendors_form(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise StoreFault("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(served.store, "complete", full)
        *_, last = ask(served, stream=True)
        assert last.type == "response.failed" and last.response.status == "failed"
        assert "disk is full" in last.response.error.message
        with pytest.raises(openai.InternalServerError, match="disk is full"):
            ask(served)
    assert ask(served).output_text is not None


def test_a_client_that_goes_away_frees_its_row(served: Served, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, reached, go_on = policy.decode, threading.Event(), threading.Event()

    def held(*arguments: Any) -> Any:
        if reached.is_set():
            assert go_on.wait(20)
        reached.set()
        return decode(*arguments)

    monkeypatch.setattr(policy, "decode", held)
    body = {"model": "default", "input": "the cat sat", "max_output_tokens": 100, "stream": True}
    with served.http.stream("POST", "/v1/responses", json=body) as response:
        assert reached.wait(PATIENCE)
        name = response.headers["X-Operant-Completion"]
    go_on.set()
    end = time.monotonic() + PATIENCE
    while (stored := served.store.completion(name)).completion is None and time.monotonic() < end:
        time.sleep(0.01)
    assert stored.status == "partial" and len(stored.completion.tokens) < 100
