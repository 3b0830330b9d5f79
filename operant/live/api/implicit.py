"""A rule that reads a person's next message as a rating of the answer before it.

The rule is called as (prompt, completion, the next user message) and returns a number on the scale of scores, or None.
It is off unless the server's settings name one. Its events have it as their source.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from operant.live.api.intake import find_completion, record
from operant.live.api.service import ApiError, GenerationRequest, Listener, Service
from operant.live.serving.access import automatic_source
from operant.live.storage.store import StoredCompletion
from operant.rewards.names import import_object
from operant.types import OperantError, Prompt

__all__ = ["Implicit"]

log = logging.getLogger(__name__)

REMEMBERED = 10_000  # chats whose answers may be continued


class Implicit(Listener):
    """The rule `module:function` and the chats that it may be asked about. Raises OperantError when there is none."""

    def __init__(self, name: str) -> None:
        self.name, self.rule = name, import_object(name, "the implicit reward")
        if not callable(self.rule):
            raise OperantError(f"the implicit reward '{name}' is no function; give --implicit module:function")
        self._answers: OrderedDict[str, list[str]] = OrderedDict()

    def recall(self, stored: Iterable[StoredCompletion]) -> None:
        """Chats of an earlier process, which may be continued in this one."""
        for one in stored:
            if one.prompt.messages is not None:
                self._remember(_key(str(one.request.get("owner")), one.user, one.prompt.messages), [one.id])

    async def on_begun(
        self, service: Service, request: GenerationRequest, prompt: Prompt, completion_ids: Sequence[str]
    ) -> None:
        """Remember a stored chat that is being answered, and, if it continues an answer, ask the rule about that one,
        which nothing waits for."""
        chat = prompt.messages
        if not request.stored or chat is None:
            return
        if len(chat) > 2 and chat[-1]["role"] == "user" and chat[-2]["role"] == "assistant":
            earlier = self._answers.get(_key(request.owner, request.user, chat[:-2]), [])
            if earlier:
                service.spawn(self._judge(service, list(earlier), chat[-2]["content"], chat[-1]["content"]))
        self._remember(_key(request.owner, request.user, chat), completion_ids)

    def _remember(self, key: str, names: Sequence[str]) -> None:
        self._answers.setdefault(key, []).extend(names)
        self._answers[key] = self._answers[key][-16:]
        self._answers.move_to_end(key)
        if len(self._answers) > REMEMBERED:
            self._answers.popitem(last=False)

    async def _judge(self, service: Service, names: Sequence[str], answer: str, message: str) -> None:
        try:
            for name in reversed(names):
                stored = await find_completion(service, name)
                if stored is None or stored.completion is None or stored.completion.text.strip() != answer.strip():
                    continue
                value = await asyncio.to_thread(self.rule, stored.prompt, stored.completion, message)
                if value is None:
                    return
                value = float(value)
                if not math.isfinite(value):
                    raise ValueError(f"it returned {value}")
                message_hash = hashlib.sha256(message.encode("utf-8", "surrogatepass")).hexdigest()[:16]
                body = {
                    "completion_id": name, "kind": "score", "value": value,
                    "idempotency_key": f"{name}-{message_hash}",
                }  # fmt: skip
                await record(service, body, stored, automatic_source("rule", self.name), "rule")
                return
        except (OperantError, ApiError) as error:
            log.warning("the implicit reward %s teaches nothing here: %s", self.name, error)
        except Exception as error:
            log.warning("the implicit reward %s raised %s: %s", self.name, type(error).__name__, error)


def _key(owner: str, user: str, chat: Sequence[Mapping[str, Any]]) -> str:
    turns = [[message["role"], message["content"]] for message in chat]
    return hashlib.sha256(json.dumps([owner, user, turns]).encode()).hexdigest()
