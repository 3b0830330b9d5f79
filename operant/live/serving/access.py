"""Who may do what: API keys with roles, kept as hashes, and signed links that rate one answer without a key.

A key is 256 random bits, so its plain SHA-256 gives nothing away and cannot be guessed; a slow hash would only slow
the server. The file of keys is read again when it changes: a removed key is refused at once.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import logging
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from filelock import FileLock

from operant.run import checkpoint
from operant.run.files import replace_file
from operant.types import OperantError

__all__ = [
    "OWNER", "ROLES", "Caller", "Key", "Keys", "Links", "automatic_source", "check_listening", "is_loopback",
    "is_reserved",
]  # fmt: skip

log = logging.getLogger(__name__)

Role = Literal["chat", "rate", "operate"]
ROLES: tuple[Role, ...] = get_args(Role)
PREFIX = "op-"
_SALT = "operant.feedback"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a request. `name` is the source of what they say about answers."""

    name: str
    roles: frozenset[str]

    def may(self, role: Role) -> bool:
        """Operators may do everything."""
        return role in self.roles or "operate" in self.roles


OWNER = Caller("owner", frozenset(ROLES))  # who asks a server without keys, which listens to its own machine only


# --- names ------------------------------------------------------------------------------------------------------------

AutomaticKind = Literal["rule", "reward"]  # what of the server's own rates answers


def automatic_source(kind: AutomaticKind, name: str) -> str:
    """The source of what the server rates by itself: with the rule that reads messages, or with a reward."""
    return f"{kind}:{name}"


def is_reserved(name: str) -> bool:
    """Whether a name is kept for a source of `automatic_source`: no key, user or source of a person's may have it."""
    return name.startswith(_RESERVED)


_RESERVED = tuple(automatic_source(kind, "") for kind in get_args(AutomaticKind))


# --- keys -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Key:
    """A key as it is kept: never the key itself. `created` is seconds since the epoch."""

    name: str
    sha256: str
    roles: tuple[str, ...]
    created: float


class Keys:
    """The file of keys. A file that is not there holds none; an empty path never does."""

    def __init__(self, path: str | Path | None) -> None:
        self.path = Path(path) if path else None
        self._needed = False
        self._stamp: tuple[int, int, int] | None = None
        self._keys: tuple[Key, ...] = ()

    def all(self) -> tuple[Key, ...]:
        """Raises OperantError when the file cannot be read as keys."""
        if self.path is None:
            return ()
        try:
            status = self.path.stat()
        except FileNotFoundError:
            self._stamp, self._keys = None, ()
            return ()
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        if stamp != self._stamp:
            try:
                rows = json.loads(self.path.read_text(encoding="utf-8"))
                keys = tuple(Key(**(row | {"roles": tuple(row["roles"])})) for row in rows)
            except (OSError, ValueError, TypeError, KeyError) as error:
                raise OperantError(
                    f"{self.path} is no file of keys; move it away and make keys with operant keys --add NAME"
                ) from error
            self._stamp, self._keys = stamp, keys
            for key in keys:
                if is_reserved(key.name):  # of a time when it was not refused; its owner goes on rating with it
                    log.warning(
                        "%s: %r is named as what the server rates by itself; give its owner a key of another name "
                        "(operant keys --add NAME, then --remove %s)", self.path, key.name, key.name,
                    )  # fmt: skip
        return self._keys

    def add(self, name: str, roles: Iterable[str]) -> str:
        """A new key, which is returned here and kept nowhere. Raises OperantError for a name that is taken, reserved
        or no word, a role that there is not, and where there is no file of keys."""
        given = self._check(name, roles)
        with self._lock():
            return self._add({name: given})[name]

    def issue(self, name: str, roles: Iterable[str]) -> dict[str, str]:
        """New keys by their names, as `add` makes them: this one, and with the first of a file the owner's too.

        From the first key on a server asks everybody for one, the owner included, who spoke without until then. The
        owner's key has their name, so that their chats and their word stay theirs, and may do everything.
        """
        given = self._check(name, roles)
        with self._lock():
            return self._add(({} if self.all() else {OWNER.name: ROLES}) | {name: given})

    def _check(self, name: str, roles: Iterable[str]) -> tuple[str, ...]:
        """The roles, each once; the owner has all. Raises OperantError for a name or a role that cannot be."""
        given = tuple(dict.fromkeys(roles))
        if unknown := [role for role in given if role not in ROLES]:
            raise OperantError(f"there is no role {unknown[0]!r}; give some of {', '.join(ROLES)}")
        if not given:
            raise OperantError(f"a key without a role may do nothing; give --roles some of {', '.join(ROLES)}")
        if not name.isprintable() or not name.strip() or len(name) > 64:
            raise OperantError("the name of a key is a word of at most 64 characters; give --add another")
        if is_reserved(name):
            raise OperantError(
                f"{name!r} is named as what the server rates by itself, as all that begins with "
                f"{' or '.join(map(repr, _RESERVED))}; give --add another"
            )
        return ROLES if name == OWNER.name else given

    def _add(self, wanted: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
        """Keys of these names and roles, which are returned here and kept nowhere. Call it with the lock held."""
        keys = self.all()
        if taken := [name for name in wanted if any(one.name == name for one in keys)]:
            raise OperantError(f"there is a key named {taken[0]!r}; choose another name, or remove it first")
        made = {name: PREFIX + secrets.token_urlsafe(32) for name in wanted}
        now = time.time()
        self._write([*keys, *(Key(name, _key_hash(made[name]), roles, now) for name, roles in wanted.items())])
        return made

    def remove(self, name: str) -> None:
        """Refuse a key from now on. Raises OperantError when there is no key of this name, or no file of keys."""
        with self._lock():
            keys = self.all()
            if not any(one.name == name for one in keys):
                there = ", ".join(one.name for one in keys) or "none"
                raise OperantError(f"there is no key named {name!r}; there are: {there}")
            self._write([one for one in keys if one.name != name])

    def caller(self, key: str) -> Caller | None:
        """Whose key this is. Every stored hash is compared in constant time, whether or not one has matched.

        Raises OperantError when the file of keys cannot be read.
        """
        digest, found = _key_hash(key), None
        for one in self.all():
            if hmac.compare_digest(one.sha256, digest):
                found = Caller(one.name, frozenset(one.roles))
        return found

    @property
    def needed(self) -> bool:
        """Whether callers need a key. Once they did they do until the end of the process: removing the last key must
        not open the door."""
        self._needed = self._needed or bool(self.all())
        return self._needed

    def _write(self, keys: list[Key]) -> None:
        assert self.path is not None
        checkpoint.clean(self.path.parent, self.path.name)
        replace_file(self.path, json.dumps([asdict(key) for key in keys], ensure_ascii=False, indent=1), private=True)

    def _lock(self) -> FileLock:
        if self.path is None:
            raise OperantError("no file of keys was named; give --keys FILE")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(f"{self.path}.lock")


# --- signed links -----------------------------------------------------------------------------------------------------


class Links:
    """Signed links: the right to rate one answer, in the name of who asked for it, until they expire.

    seconds: how long a link is good for.
    """

    def __init__(self, secret: str, seconds: int) -> None:
        from itsdangerous import URLSafeTimedSerializer

        self.seconds = seconds
        self._serializer = URLSafeTimedSerializer(secret, salt=_SALT, signer_kwargs={"digest_method": hashlib.sha256})

    @classmethod
    def at(cls, root: str | Path, seconds: int) -> Links:
        """With the secret of this root, which is made when there is none. Raises OperantError for one that is too short
        to sign with."""
        file = Path(root) / "link.secret"
        with FileLock(Path(root) / "link.secret.lock"):
            checkpoint.clean(file.parent, file.name)
            if not file.exists():
                replace_file(file, secrets.token_urlsafe(32), private=True)
            secret = file.read_text(encoding="utf-8").strip()
        if len(secret) < 32:
            raise OperantError(f"{file} is too short to sign links with; remove it and a new one is made")
        return cls(secret, seconds)

    def sign(self, completion_id: str, source: str) -> str:
        """The token of a link by which `source` may rate an answer."""
        return str(self._serializer.dumps([completion_id, source]))

    def read(self, token: str) -> tuple[str, str]:
        """(completion id, source) of a link. Raises ValueError when it was not signed here, TimeoutError when it is
        too old."""
        from itsdangerous import BadData, SignatureExpired

        try:
            content: Any = self._serializer.loads(token, max_age=self.seconds)
        except SignatureExpired as error:
            raise TimeoutError("this link has expired") from error
        except BadData as error:
            raise ValueError("this link is not genuine") from error
        completion_id, source = content
        return str(completion_id), str(source)


# --- listening --------------------------------------------------------------------------------------------------------


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address or a name."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_listening(host: str, keys: Keys) -> None:
    """Raises OperantError when others could reach the server and nothing would ask them who they are."""
    if not is_loopback(host) and not keys.needed:
        raise OperantError(
            f"--host {host} lets other machines talk to this model, teach it and read what was said, and there are no "
            "keys: make some with operant keys --add NAME and give --keys FILE, or leave --host at 127.0.0.1"
        )


def _key_hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
