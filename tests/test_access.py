"""Keys, roles and links: who may talk to a live server, rate in it and operate it."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from program import Program
from serving import Served, serving

from operant.live.serving import access
from operant.live.serving.access import Caller, Keys, Links, check_listening, is_loopback
from operant.models.policy import Policy
from operant.types import OperantError

HELLO = [{"role": "user", "content": "the cat sat"}]


# --- keys -------------------------------------------------------------------------------------------------------------


def test_a_key_is_told_once_and_kept_as_a_hash_that_only_its_owner_reads(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.json")
    key = keys.add("ann", ["chat", "rate"])
    text = (tmp_path / "keys.json").read_text()
    assert key not in text and key.removeprefix("op-") not in text and len(key) > 40
    assert stat.S_IMODE(os.stat(tmp_path / "keys.json").st_mode) == 0o600
    caller = Keys(tmp_path / "keys.json").caller(key)
    assert caller is not None and caller.name == "ann"
    assert caller.may("chat") and caller.may("rate") and not caller.may("operate")
    assert keys.add("bob", ["operate"]) != key
    assert keys.caller(key[:-1]) is None and keys.caller("") is None and keys.caller("\ud800") is None


def test_an_operator_may_do_everything(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.json")
    caller = keys.caller(keys.add("root", ["operate"]))
    assert caller is not None and all(caller.may(role) for role in access.ROLES)


def test_every_hash_is_compared_in_constant_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = Keys(tmp_path / "keys.json")
    first, _, _ = (keys.add(name, ["chat"]) for name in ("a", "b", "c"))
    compared: list[str] = []

    def watched(one: str, other: str) -> bool:
        compared.append(one)
        return one == other

    monkeypatch.setattr(access.hmac, "compare_digest", watched)
    keys.caller(first)
    keys.caller("op-unknown")
    assert len(compared) == 6


@pytest.mark.parametrize(
    ("name", "roles", "words"),
    [("ann", ["chat"], "remove it first"), ("bob", ["admin"], "no role 'admin'"), ("bob", [], "without a role"),
     ("", ["chat"], "at most 64"), ("a\nb", ["chat"], "at most 64"), ("x" * 65, ["chat"], "at most 64"),
     ("rule:x", ["chat"], "rates by itself"),
     ("reward:judge", ["rate"], "rates by itself")],
)  # fmt: skip
def test_what_is_no_key_is_refused(tmp_path: Path, name: str, roles: list[str], words: str) -> None:
    keys = Keys(tmp_path / "keys.json")
    keys.add("ann", ["chat"])
    with pytest.raises(OperantError, match=words):
        keys.add(name, roles)
    assert [key.name for key in keys.all()] == ["ann"]


def test_removing_the_last_key_does_not_open_the_door(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.json")
    assert not keys.needed
    key = keys.add("ann", ["chat"])
    assert keys.needed
    Keys(tmp_path / "keys.json").remove("ann")  # another process
    assert keys.caller(key) is None and keys.all() == () and keys.needed
    (tmp_path / "keys.json").unlink()
    assert keys.needed and keys.caller(key) is None


def test_a_broken_file_of_keys_is_told_and_lets_nobody_in(tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text("[{]")
    with pytest.raises(OperantError, match="no file of keys"):
        Keys(tmp_path / "keys.json").caller("op-x")
    with pytest.raises(OperantError, match="no key named 'bob'"):
        Keys(tmp_path / "none.json").remove("bob")
    with pytest.raises(OperantError, match="give --keys"):
        Keys(None).add("ann", ["chat"])


def test_a_key_of_a_name_that_was_not_always_reserved_goes_on_working_and_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys.json"
    key = Keys(file).add("ann", ["rate"])
    file.write_text(file.read_text().replace('"ann"', '"reward:judge"'))
    keys = Keys(file)
    for _ in range(3):
        assert keys.caller(key) == Caller("reward:judge", frozenset(["rate"]))
    (told,) = caplog.messages
    assert "operant keys --add NAME, then --remove reward:judge" in told and "\n" not in told
    keys.remove("reward:judge")
    assert keys.all() == ()


def test_the_first_key_of_a_file_comes_with_the_owners(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Who talks to their own server without a key must not be locked out by giving somebody else one."""
    program = Program(capsys)
    made = program("keys", "--root", tmp_path, "--add", "anna")
    keys = Keys(tmp_path / "keys.json")
    owner = made.err[1].rpartition(" ")[2]
    assert len(made.err) == 2 and keys.caller(made.out.strip()) == Caller("anna", frozenset(["chat", "rate"]))
    assert keys.caller(owner) == access.OWNER  # by the name under which they chatted and rated until now
    assert len(program("keys", "--root", tmp_path, "--add", "bob").err) == 1  # the first brings it, no other
    assert "remove it first" in program.fault("keys", "--root", tmp_path, "--add", "owner")
    program("keys", "--root", tmp_path, "--remove", "owner")
    again = program("keys", "--root", tmp_path, "--add", "owner")  # a key that was lost is made anew
    assert keys.caller(again.out.strip()) == access.OWNER and keys.caller(owner) is None
    other = json.loads(program("keys", "--root", tmp_path / "other", "--add", "anna", "--json").out)
    assert other["owner"]["roles"] == list(access.ROLES) and other["roles"] == ["chat", "rate"]
    assert Keys(tmp_path / "other" / "keys.json").caller(other["owner"]["key"]) == access.OWNER
    alone = program("keys", "--root", tmp_path / "alone", "--add", "owner")
    assert len(alone.err) == 1 and Keys(tmp_path / "alone" / "keys.json").caller(alone.out.strip()) == access.OWNER


def test_the_owner_of_a_running_server_goes_on_with_the_key_that_the_first_one_brought(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    keys = Keys(tmp_path / "keys.json")
    with serving(make_policy("gpt2", context=128), tmp_path, keys=keys) as own:
        mine = own.chat()["id"]
        owner = Keys(tmp_path / "keys.json").issue("anna", ["chat", "rate"])["owner"]
        assert own.fault("GET", f"/v1/chat/completions/{mine}", 401)
        assert own.client(owner).chat.completions.retrieve(mine).id == mine
        rated = own.http.post(
            "/v1/feedback", json={"completion_id": mine, "kind": "thumb", "value": 1}, headers=bearer(owner)
        )
        assert rated.json()["source"] == "owner"
        assert own.http.get("/metrics", headers=bearer(owner)).status_code == 200


def test_the_program_makes_lists_and_removes_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = Program(capsys)
    made = program("keys", "--root", tmp_path, "--add", "ann", "--roles", "[chat,rate,operate]")
    key = made.out.strip()
    assert key.startswith("op-") and "shown this once" in made.err[0] and key not in made.err[0]
    told = json.loads(program("keys", "--root", tmp_path, "--json").out)["keys"]
    assert [(row["name"], row["roles"]) for row in told][1:] == [("ann", ["chat", "rate", "operate"])]
    listed = program("keys", "--root", tmp_path).out
    assert "ann" in listed and key not in listed and "sha256" not in listed
    assert "no key named 'bob'" in program.fault("keys", "--root", tmp_path, "--remove", "bob")
    assert "one of them" in program.fault("keys", "--root", tmp_path, "--remove", "ann", "--add", "bob")
    for name in ("ann", "owner"):
        assert program("keys", "--root", tmp_path, "--remove", name).status == 0
    assert json.loads(program("keys", "--root", tmp_path, "--json").out) == {"keys": []}


# --- listening --------------------------------------------------------------------------------------------------------


def test_only_this_machine_is_listened_to_without_keys(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.json")
    for host in ("127.0.0.1", "localhost", "::1", "[::1]", "127.3.2.1"):
        assert is_loopback(host)
        check_listening(host, keys)
    for host in ("0.0.0.0", "::", "192.168.1.7", "example.org", "", "localhost.evil.example"):
        assert not is_loopback(host)
        with pytest.raises(OperantError, match="operant keys --add"):
            check_listening(host, keys)
    keys.add("ann", ["chat"])
    check_listening("0.0.0.0", keys)


# --- links ------------------------------------------------------------------------------------------------------------


def test_a_link_is_for_one_answer_and_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    links = Links.at(tmp_path, 60)
    token = links.sign("chatcmpl-1", "ann")
    assert Links.at(tmp_path, 60).read(token) == ("chatcmpl-1", "ann")  # the secret is kept
    assert stat.S_IMODE(os.stat(tmp_path / "link.secret").st_mode) == 0o600
    head, _, tail = token.partition(".")
    other = links.sign("chatcmpl-2", "ann")
    for forged in ("", "x", token[:-1], f"{other.partition('.')[0]}.{tail}", head, f"{token}x"):
        with pytest.raises(ValueError, match="not genuine"):
            links.read(forged)
    with pytest.raises(ValueError, match="not genuine"):
        Links("another secret of thirty-two letters", 60).read(token)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 62)
    with pytest.raises(TimeoutError, match="expired"):
        links.read(token)


def test_a_secret_that_is_too_short_signs_nothing(tmp_path: Path) -> None:
    (tmp_path / "link.secret").write_text("short")
    with pytest.raises(OperantError, match="too short"):
        Links.at(tmp_path, 60)


# --- over HTTP --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(
    make_policy: Callable[..., Policy], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Served, dict[str, str]]]:
    folder = tmp_path_factory.mktemp("guarded")
    keys = Keys(folder / "keys.json")
    told = {
        "ann": keys.add("ann", ["chat", "rate"]), "bob": keys.add("bob", ["chat"]), "cleo": keys.add("cleo", ["rate"]),
        "root": keys.add("root", ["operate"]),
    }  # fmt: skip
    with serving(make_policy("gpt2", context=128), folder, keys=keys) as running:
        yield running, told


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_without_a_valid_key_nothing_is_read(guarded: tuple[Served, dict[str, str]]) -> None:
    served, keys = guarded
    before = served.store.counts()
    for headers in ({}, bearer("op-wrong"), {"Authorization": keys["ann"]}, {"Authorization": "Bearer"}):
        for method, path in (("POST", "/v1/chat/completions"), ("POST", "/v1/feedback"), ("GET", "/v1/models"),
                             ("GET", "/v1/versions"), ("POST", "/v1/versions/rollback"), ("GET", "/metrics"),
                             ("GET", "/v1/nothing")):  # fmt: skip
            error = served.fault(method, path, 401, headers=headers, content=b"{" if method == "POST" else None)
            assert error["code"] == "invalid_api_key"
    assert served.store.counts() == before
    assert served.http.get("/health").status_code == 200 and served.http.get("/ready").status_code == 200
    with pytest.raises(openai.AuthenticationError):
        served.client("op-wrong").models.list()


def test_each_role_may_do_its_own(guarded: tuple[Served, dict[str, str]]) -> None:
    served, keys = guarded
    answer = served.client(keys["ann"]).chat.completions.create(model="default", messages=HELLO, max_tokens=4)
    thumb = {"completion_id": answer.id, "kind": "thumb", "value": 1}
    allowed = {
        "ann": {"chat", "rate"}, "bob": {"chat"}, "cleo": {"rate"}, "root": {"chat", "rate", "operate"},
    }  # fmt: skip
    calls: list[tuple[str, str, str, Any]] = [
        ("chat", "POST", "/v1/chat/completions", {"model": "default", "messages": HELLO, "max_tokens": 1}),
        ("chat", "POST", "/v1/completions", {"model": "default", "prompt": "a", "max_tokens": 1}),
        ("chat", "GET", "/v1/chat/completions", None),
        ("rate", "POST", "/v1/feedback", thumb),
        ("rate", "GET", "/v1/feedback", None),
        ("operate", "POST", "/v1/versions/0/promote", None),
        ("operate", "POST", "/v1/versions/pins", {"user": "x", "version": 0}),
        ("operate", "GET", "/metrics", None),
    ]
    for name, roles in allowed.items():
        for role, method, path, body in calls:
            status = served.http.request(method, path, json=body, headers=bearer(keys[name])).status_code
            assert status == (200 if role in roles else 403), (name, path, status)


def test_one_users_chats_and_ratings_are_not_anothers(guarded: tuple[Served, dict[str, str]]) -> None:
    served, keys = guarded
    name = served.client(keys["ann"]).chat.completions.create(model="default", messages=HELLO, max_tokens=4).id
    event = served.http.post(
        "/v1/feedback", json={"completion_id": name, "kind": "thumb", "value": 1}, headers=bearer(keys["ann"])
    ).json()
    assert event["source"] == "ann"
    for path in (f"/v1/chat/completions/{name}", f"/v1/chat/completions/{name}/messages"):
        assert served.fault("GET", path, 404, headers=bearer(keys["bob"]))
        assert served.http.get(path, headers=bearer(keys["root"])).status_code == 200
    assert served.fault("DELETE", f"/v1/chat/completions/{name}", 404, headers=bearer(keys["bob"]))
    assert name not in [c.id for c in served.client(keys["bob"]).chat.completions.list()]
    assert name in [c.id for c in served.client(keys["ann"]).chat.completions.list()]
    assert served.fault("GET", f"/v1/feedback/{event['id']}", 404, headers=bearer(keys["cleo"]))
    assert served.fault("GET", "/v1/feedback?source=ann", 403, headers=bearer(keys["cleo"]))
    mine = served.http.get("/v1/feedback", headers=bearer(keys["cleo"])).json()["data"]
    assert all(row["source"] == "cleo" for row in mine)
    assert served.http.get(f"/v1/feedback/{event['id']}", headers=bearer(keys["root"])).json()["source"] == "ann"


def test_only_an_operator_speaks_for_others(guarded: tuple[Served, dict[str, str]]) -> None:
    served, keys = guarded
    name = served.client(keys["ann"]).chat.completions.create(model="default", messages=HELLO, max_tokens=4).id
    body = {"completion_id": name, "kind": "thumb", "value": 1, "source": "survey"}
    assert served.fault("POST", "/v1/feedback", 403, json=body, headers=bearer(keys["ann"]))["param"] == "source"
    told = served.http.post("/v1/feedback", json=body, headers=bearer(keys["root"])).json()
    assert told["source"] == "survey"
    # a key belongs to its source: the same idempotency key of two sources is two events
    both = [
        served.http.post(
            "/v1/feedback", json={"completion_id": name, "kind": "thumb", "value": value, "idempotency_key": "k"},
            headers=bearer(keys[who]),
        ).json()
        for who, value in (("ann", 1), ("cleo", -1))
    ]  # fmt: skip
    assert both[0]["id"] != both[1]["id"] and not both[1]["duplicate"]


def test_nobody_speaks_as_what_the_server_rates_by_itself(guarded: tuple[Served, dict[str, str]]) -> None:
    served, keys = guarded
    ann, root = bearer(keys["ann"]), bearer(keys["root"])
    name = served.client(keys["ann"]).chat.completions.create(model="default", messages=HELLO, max_tokens=4).id
    for reserved in ("reward:judge", "rule:m:f"):
        body: dict[str, Any] = {"completion_id": name, "kind": "thumb", "value": 1, "source": reserved}
        assert served.fault("POST", "/v1/feedback", 422, json=body, headers=root)["param"] == "source"
        body = {"model": "default", "messages": HELLO, "user": reserved}
        assert served.fault("POST", "/v1/chat/completions", 400, json=body, headers=ann)["param"] == "user"
    assert served.store.events(completion_id=name) == []


def test_a_chat_key_may_change_metadata_but_rates_nothing_by_it(guarded: tuple[Served, dict[str, str]]) -> None:
    served, keys = guarded
    client = served.client(keys["bob"])
    name = client.chat.completions.create(model="default", messages=HELLO, max_tokens=4).id
    assert client.chat.completions.update(name, metadata={"page": "1"}).metadata == {"page": "1"}
    with pytest.raises(openai.PermissionDeniedError):
        client.chat.completions.update(name, metadata={"feedback": "up"})
    assert served.store.completion(name).metadata == {"page": "1"}
    assert served.store.events(completion_id=name) == []


def test_a_link_needs_no_key_and_rates_as_who_asked(guarded: tuple[Served, dict[str, str]]) -> None:
    served, keys = guarded
    answer = served.client(keys["bob"]).chat.completions.create(model="default", messages=HELLO, max_tokens=4)
    assert served.http.post(answer.operant["feedback_url"], data={"value": "1"}).status_code == 200
    (story,) = served.store.events(completion_id=answer.id)
    assert story.event.source == "bob"


def test_a_removed_key_is_refused_at_once(guarded: tuple[Served, dict[str, str]]) -> None:
    served, _ = guarded
    key = served.service.keys.add("dora", ["chat"])
    assert served.http.get("/v1/models", headers=bearer(key)).status_code == 200
    assert served.service.keys.path is not None
    Keys(served.service.keys.path).remove("dora")
    assert served.http.get("/v1/models", headers=bearer(key)).status_code == 401


def test_no_secret_is_logged(guarded: tuple[Served, dict[str, str]], caplog: pytest.LogCaptureFixture) -> None:
    served, keys = guarded
    with caplog.at_level("DEBUG"):
        answer = served.client(keys["ann"]).chat.completions.create(model="default", messages=HELLO, max_tokens=2)
        token = answer.operant["feedback_url"].rpartition("/")[2]
        served.http.post(f"/f/{token}", data={"value": "1"})
        served.fault("GET", "/v1/models", 401, headers=bearer("op-guessed"))
    written = "\n".join(r.getMessage() for r in caplog.records if r.name.startswith(("operant", "uvicorn", "fastapi")))
    for secret in (*keys.values(), "op-guessed", token):
        assert secret not in written
