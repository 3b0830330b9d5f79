"""One call of an OpenAI-compatible chat endpoint, under a time limit that holds."""

from __future__ import annotations

import email.utils
import json
import math
import os
import queue
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

LONGEST_REPLY = 1 << 20  # bytes of a response that are read
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)


class EndpointFailed(Exception):
    """What may pass: worth another try.

    slug: "down" or "timeout". retry_after: seconds that the endpoint asks to wait. sent: the request may have been
    computed and billed.
    """

    def __init__(self, slug: str, text: str, *, retry_after: float | None = None, sent: bool = False) -> None:
        super().__init__(text)
        self.slug, self.retry_after, self.sent = slug, retry_after, sent


class EndpointRefused(Exception):
    """What another try of the same request will not mend, such as a wrong key.

    answer: the body of a 400 or 422, the statuses by which endpoints refuse a parameter; else empty.
    """

    def __init__(self, text: str, *, answer: str = "") -> None:
        super().__init__(text)
        self.answer = answer

    def names(self, parameter: str) -> bool:
        """Whether it is this parameter of the request that was refused."""
        try:
            param = json.loads(self.answer)["error"]["param"]
        except (ValueError, KeyError, TypeError, RecursionError):
            param = None
        if isinstance(param, str) and param:
            return param == parameter
        return re.search(rf"\b{re.escape(parameter)}\b", self.answer) is not None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A chat endpoint below `url`. key_env: the environment variable with the key. timeout: seconds for one request."""

    url: str
    key_env: str
    timeout: float

    def complete(self, body: bytes) -> dict[str, Any]:
        """The reply to one POST of a request in JSON; {} where it is no JSON object.

        Raises EndpointFailed for what may pass, EndpointRefused for what will not.
        """
        key = self.key
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "operant"}
        if key:
            if not key.isascii() or not key.isprintable():
                raise EndpointRefused(f"the key in {self.key_env} holds characters that no header can carry")
            headers["Authorization"] = f"Bearer {key}"
        target = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(target, data=body, headers=headers, method="POST")
        try:
            data = _before_deadline(self.timeout, lambda: _read_reply(request, self.timeout))
        except urllib.error.HTTPError as error:
            with closing(error):
                said = _quick_read(error)
                answer = self.excerpt(said)
            if error.code in RETRIED:
                slug = "down" if error.code != 408 else "timeout"
                after = _retry_after(error.headers.get("Retry-After"))
                raise EndpointFailed(slug, f"HTTP {error.code} {answer}", retry_after=after) from None
            hint = f"; check the key in {self.key_env}" if error.code in (401, 403) else ""
            reason = said if error.code in (400, 422) else ""
            raise EndpointRefused(f"HTTP {error.code} {answer}{hint}", answer=reason) from None
        except TimeoutError:
            raise EndpointFailed("timeout", f"over {self.timeout:g} s", sent=True) from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError | socket.timeout):
                raise EndpointFailed("timeout", f"over {self.timeout:g} s", sent=True) from None
            raise EndpointFailed("down", _hidden(str(error.reason), key)) from None
        except Exception as error:  # the system's, and http.client's own: a malformed status line, a body cut off
            raise EndpointFailed("down", _hidden(f"{type(error).__name__} {error}", key), sent=True) from None
        try:
            reply = json.loads(data)
        except (ValueError, RecursionError):
            reply = None
        return reply if isinstance(reply, dict) else {}

    @property
    def key(self) -> str:
        """The key as the environment has it now, which nothing keeps; empty where there is none."""
        return os.environ.get(self.key_env, "")

    def excerpt(self, text: str) -> str:
        """The beginning of a text from the endpoint, on one line and without the key, for a message."""
        return " ".join(_hidden(text, self.key).split())[:120]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *args: Any, **options: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _before_deadline(seconds: float, work: Callable[[], bytes]) -> bytes:
    """What `work` returns or raises, or TimeoutError. A socket's time limit is for each piece, so a server that sends
    a byte now and then would never meet it; the thread that waits for such a one is abandoned."""
    done: queue.SimpleQueue[bytes | BaseException] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put(work())
        except BaseException as error:
            done.put(error)

    threading.Thread(target=run, daemon=True, name="judge-request").start()
    try:
        outcome = done.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def _read_reply(request: urllib.request.Request, timeout: float) -> bytes:
    with closing(_OPENER.open(request, timeout=timeout)) as response:
        data: bytes = response.read(LONGEST_REPLY + 1)
        if response.length and len(data) <= LONGEST_REPLY:  # a read that is given a size is silent about it
            raise ValueError("the reply was cut off")
    if len(data) > LONGEST_REPLY:
        raise ValueError(f"the reply is longer than {LONGEST_REPLY} bytes")
    return data


def _quick_read(response: Any) -> str:
    """The beginning of an error's body, if it can be had."""
    try:
        return str(response.read(2000).decode("utf-8", "replace"))
    except Exception:
        return ""


def reply_text(reply: dict[str, Any]) -> str:
    """What the model wrote; empty where the reply has no such text. It may come as a list of text parts."""
    try:
        content = reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return ""
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""


def reached_limit(reply: dict[str, Any]) -> bool:
    """Whether the model wrote as much as it was allowed to, and not to its end."""
    try:
        return bool(reply["choices"][0]["finish_reason"] == "length")
    except (KeyError, IndexError, TypeError):
        return False


def tokens_used(reply: dict[str, Any], estimate: tuple[int, int]) -> tuple[int, int]:
    """(tokens in, out) that the endpoint counted; the estimate where it counted none."""
    usage = reply.get("usage")
    found = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    numbers = [n if isinstance(n, int) and n >= 0 else e for n, e in zip(found, estimate, strict=True)]
    return numbers[0], numbers[1]


def _retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, given as seconds or as a date (RFC 9110, §10.2.3)."""
    if value is None:
        return None
    try:
        seconds = float(value)
        return seconds if math.isfinite(seconds) else None
    except ValueError:
        pass
    try:
        return email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return None


def _hidden(text: str, key: str) -> str:
    return text.replace(key, "***") if key else text
