"""Anthropic's Messages API with the stock client: answers, events, tokens, models, and errors in its own form.

`make test` installs the client, which is in the extra `clients`; where it is not there these tests are skipped, and
fail where CI is set.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import HELLO, Served, serving

from operant.live.serving.access import Keys
from operant.live.storage.store import StoreFault
from operant.models.policy import Policy

if os.environ.get("CI"):
    anthropic = importlib.import_module("anthropic")
else:
    anthropic = pytest.importorskip("anthropic", reason="make test installs it")


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[Any]:
    """The stock client, with only base_url and key changed."""
    with anthropic.Anthropic(base_url=served.url, api_key="unused", max_retries=0) as made:
        yield made


def asked(**options: Any) -> dict[str, Any]:
    """The arguments of a request. This client has none of how to draw any more; they travel as its extras."""
    drawn = {name: options.pop(name) for name in ("temperature", "top_p", "top_k") if name in options}
    extra = {"seed": options.pop("seed", 5)} | drawn
    return {"model": "default", "messages": HELLO, "max_tokens": 8, "extra_body": extra} | options


# --- answers ----------------------------------------------------------------------------------------------------------


def test_an_answer_is_a_message_and_what_is_stored(served: Served, client: Any) -> None:
    answer = client.messages.create(**asked(temperature=0.8, top_p=0.9, top_k=5, metadata={"user_id": "ann"}))
    stored = served.store.completion(answer.id)
    assert stored is not None and stored.completion is not None and answer.id.startswith("msg_")
    (block,) = answer.content
    assert (block.type, block.text) == ("text", stored.completion.text)
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", "operant")
    wanted = {"length": "max_tokens", "eos": "end_turn"}[stored.completion.stop_reason]
    assert answer.stop_reason == wanted and answer.stop_sequence is None
    assert answer.usage.input_tokens == len(stored.prompt.tokens)
    assert answer.usage.output_tokens == len(stored.completion.tokens)
    sampling = stored.completion.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (0.8, 0.9, 5, 8)
    assert stored.user == "ann" and stored.request["owner"] == "owner" and stored.completion.trainable
    chat = served.chat(seed=5, temperature=0.8, top_p=0.9, top_k=5, max_tokens=8)
    assert chat["choices"][0]["message"]["content"] == block.text  # as the other vendor's clients get it
    assert client.messages.create(**asked(max_tokens=1)).stop_reason == "max_tokens"


def test_system_turns_and_blocks_make_one_chat(served: Served, client: Any) -> None:
    answer = client.messages.create(
        **asked(
            system=[{"type": "text", "text": "be "}, {"type": "text", "text": "kind"}],
            messages=[
                {"role": "user", "content": [{"type": "text", "text": "one", "cache_control": {"type": "ephemeral"}}]},
                {"role": "assistant", "content": "two"},
                {"role": "user", "content": "three"},
            ],
        )
    )
    stored = served.store.completion(answer.id)
    assert [(m["role"], m["content"]) for m in stored.prompt.messages] == [
        ("system", "be kind"), ("user", "one"), ("assistant", "two"), ("user", "three"),
    ]  # fmt: skip
    counted = client.messages.count_tokens(model="default", messages=HELLO, system="be kind")
    told = client.messages.create(**asked(system="be kind"))
    assert counted.input_tokens == told.usage.input_tokens


def test_a_stop_sequence_ends_an_answer_and_is_named(served: Served, client: Any) -> None:
    whole = client.messages.create(**asked(seed=8, max_tokens=16)).content[0].text
    stop = whole[3:5]
    answer = client.messages.create(**asked(seed=8, max_tokens=16, stop_sequences=["never said", stop]))
    assert answer.content[0].text == whole[: whole.index(stop)]
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)
    with client.messages.stream(**asked(seed=8, max_tokens=16, stop_sequences=[stop])) as stream:
        assert "".join(stream.text_stream) == answer.content[0].text
        assert stream.get_final_message().stop_sequence == stop


def test_a_stream_is_the_vendors_events_and_the_same_text(served: Served, client: Any) -> None:
    whole = client.messages.create(**asked(seed=11, max_tokens=12))
    events = list(client.messages.create(**asked(seed=11, max_tokens=12, stream=True)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert "".join(event.delta.text for event in events[2:-3]) == whole.content[0].text
    start, delta = events[0].message, events[-2]
    assert start.content == [] and start.stop_reason is None and start.usage.input_tokens == whole.usage.input_tokens
    assert delta.delta.stop_reason == whole.stop_reason and delta.usage.output_tokens == whole.usage.output_tokens
    assert served.store.completion(start.id).completion.text == whole.content[0].text
    with client.messages.stream(**asked(seed=11, max_tokens=12)) as stream:
        final = stream.get_final_message()
    assert final.content[0].text == whole.content[0].text and final.usage.output_tokens == whole.usage.output_tokens


def test_every_answer_says_its_version_and_its_id_in_its_headers(served: Served, client: Any) -> None:
    raw = client.messages.with_raw_response.create(**asked())
    assert raw.headers["X-Operant-Version"] == "0" and raw.headers["X-Operant-Completion"] == raw.parse().id
    with client.messages.with_streaming_response.create(**asked(stream=True)) as response:
        first = next(line for line in response.iter_lines() if line.startswith("data: "))
        assert response.headers["X-Operant-Completion"] == json.loads(first[6:])["message"]["id"]
        assert response.headers["X-Operant-Version"] == "0"


def test_an_answer_is_rated_as_any_other(served: Served, client: Any) -> None:
    answer = client.messages.create(**asked())
    assert served.rate(answer.id, "thumb", 1)["state"] == "pending"
    link = served.http.post(answer.operant["feedback_url"], json={"kind": "edit", "value": "the cat sat down"})
    assert link.status_code == 200
    other = client.messages.create(**asked(seed=6))
    assert served.rate(answer.id, "comparison", other.id)["state"] == "pending"
    kinds = [story.event.kind for story in served.store.events(completion_id=answer.id)]
    assert kinds == ["thumb", "edit", "comparison"]


def test_not_stored_is_not_stored(served: Served, client: Any) -> None:
    before = served.store.counts()["completions"]
    answer = client.messages.create(**asked(extra_body={"store": False}))
    assert served.store.counts()["completions"] == before and "feedback_url" not in answer.operant


def test_models_are_listed_in_the_vendors_form(client: Any) -> None:
    listed = list(client.models.list())
    assert [(one.id, one.type, one.display_name) for one in listed] == [
        ("operant", "model", "operant"), ("default", "model", "default"),
    ]  # fmt: skip
    found = client.models.retrieve("default")
    assert found.created_at.tzinfo is not None and found.operant["version"] == 0
    assert found.max_input_tokens == 128
    with pytest.raises(anthropic.NotFoundError):
        client.models.retrieve("claude-opus-5")


# --- keys and errors --------------------------------------------------------------------------------------------------


def test_a_key_comes_as_this_client_sends_it(policy: Policy, tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.json")
    ann, cleo = keys.add("ann", ["chat", "rate"]), keys.add("cleo", ["rate"])
    with serving(policy, tmp_path, keys=keys) as guarded:

        def create(**credentials: Any) -> Any:
            with anthropic.Anthropic(base_url=guarded.url, max_retries=0, **credentials) as client:
                return client.messages.create(**asked(max_tokens=2))

        for credentials in ({"api_key": ann}, {"auth_token": ann}):
            assert guarded.store.completion(create(**credentials).id).user == "ann"
        with pytest.raises(anthropic.AuthenticationError) as caught:
            create(api_key="op-wrong")
        assert caught.value.body["error"]["type"] == "authentication_error"
        with pytest.raises(anthropic.PermissionDeniedError) as refused:
            create(api_key=cleo)
        assert refused.value.body["error"]["type"] == "permission_error"
        assert guarded.http.get("/v1/versions", headers={"x-api-key": ann}).status_code == 200
        assert guarded.http.get("/v1/versions", headers={"x-api-key": ""}).status_code == 401


@pytest.mark.parametrize(
    ("change", "status", "name"),
    [
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, 400, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, 400, "image"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
            400,
            "tool_result",
        ),
        ({"messages": [*HELLO, {"role": "assistant", "content": "The answer is ("}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "the cat " * 200}]}, 400, "tokens"),
        ({"model": "claude-opus-5"}, 404, "claude-opus-5"),
        ({"max_tokens": None}, 400, "max_tokens"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"temperature": 1.5}, 400, "temperature"),
        ({"stop_sequences": [""]}, 400, "stop_sequences"),
        ({"stop_sequences": ["x"] * 40}, 400, "stop_sequences"),
        ({"tools": [{"name": "f", "input_schema": {}}]}, 400, "tools"),
        ({"tool_choice": {"type": "any"}}, 400, "tool_choice"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, 400, "thinking"),
        ({"output_config": {"format": {"type": "json_schema"}}}, 400, "output_config.format"),
        ({"mcp_servers": [{"type": "url"}]}, 400, "mcp_servers"),
        ({"metadata": {"user_id": "rule:x"}}, 400, "metadata.user_id"),
        ({"metadata": {"page": "1"}}, 400, "metadata.page"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else None,
)
def test_what_cannot_be_honoured_is_refused_by_name_in_the_vendors_form(
    served: Served, change: dict[str, Any], status: int, name: str
) -> None:
    body = {"model": "default", "messages": HELLO, "max_tokens": 8} | change
    response = served.http.post("/v1/messages", json=body)
    told = response.json()
    assert response.status_code == status, response.text
    assert told.keys() == {"type", "error"} and told["type"] == "error"
    assert told["error"]["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert name in told["error"]["message"] and "\n" not in told["error"]["message"], told


def test_what_changes_nothing_is_accepted(client: Any) -> None:
    answer = client.messages.create(
        **asked(thinking={"type": "disabled"}, tools=[], service_tier="auto", output_config={"effort": "low"})
    )
    assert answer.content
    assert client.beta.messages.create(**asked()).content  # the same path, asked with ?beta=true


def test_errors_are_in_the_form_of_the_path_or_of_the_client(
    served: Served, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in ("/v1/messages/none", "/v1/messages/batches"):
        assert served.http.get(path).json()["error"]["type"] == "not_found_error", path
    assert served.http.post("/v1/messages", content=b"{", headers={"Content-Type": "application/json"}).json() == {
        "type": "error", "error": {"type": "invalid_request_error", "message": "the body is no JSON"},
    }  # fmt: skip
    large = b'{"x": "' + b"a" * (1 << 20) + b'"}'
    told = served.http.post("/v1/messages", content=large, headers={"Content-Type": "application/json"})
    assert told.status_code == 413 and told.json()["error"]["type"] == "request_too_large"
    assert "param" in served.fault("GET", "/v1/nothing", 404)

    def full(*_: Any, **__: Any) -> None:
        raise StoreFault("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(served.store, "complete", full)
        with pytest.raises(anthropic.APIStatusError, match="disk is full") as caught:
            client.messages.create(**asked())
        assert caught.value.body["error"]["type"] == "overloaded_error"
        with pytest.raises(anthropic.APIStatusError, match="disk is full"):
            list(client.messages.create(**asked(stream=True)))
    assert client.messages.create(**asked()).content
