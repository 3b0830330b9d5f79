"""`operant serve`: the store, the engine, the learner and the HTTP server, started and stopped together."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from operant.config import LearnerConfig, ServeConfig, WorkerConfig, check_settings, install_line
from operant.data.prompts import PromptFormat, departures
from operant.live.serving.access import Keys, Links, check_listening
from operant.live.storage.versions import Versions
from operant.run.files import replace_file
from operant.types import OperantError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from operant.live.serving.engine import Engine
    from operant.live.serving.supervisor import Supervisor
    from operant.live.storage.store import Store
    from operant.models.policy import Policy

__all__ = ["Live", "live", "serve", "server_of"]

log = logging.getLogger(__name__)

NEEDED = ("alembic", "fastapi", "itsdangerous", "prometheus_client", "sqlalchemy", "uvicorn")
# copies of a model that server and learner are sure to hold at once, where all weights learn and where an adapter does
HELD_OF_ALL, HELD_OF_A_BASE = 5, 2
LOCK_SECONDS = 10.0  # for a learner whose server was killed to end its step


@dataclasses.dataclass(slots=True)
class Live:
    """The parts of a live loop that runs. learns: what of the model does, in words."""

    app: FastAPI
    engine: Engine
    store: Store
    versions: Versions
    supervisor: Supervisor
    config: ServeConfig
    learns: str


def serve(config: ServeConfig) -> None:
    """Serve until Ctrl-C or SIGTERM, then let what is under way end and write everything down. The log is in the root.

    Raises OperantError, before anything is loaded, for an address that is taken or that others reach without keys, a
    model that is not there, and an extra that is not installed.
    """
    check_settings(config)
    _check_installed()
    check_listening(config.host, _keys(config))
    os.umask(0o077)  # what people said is for nobody else on this machine, nor is what was learned from it
    bound = contextlib.closing(_bind(config.host, config.port))
    with bound as listening, _interruptible(), _log_to(Path(config.root) / "serve.log"), live(config) as running:
        server = server_of(running.app, config)
        _print_address(running, listening)
        if config.open:
            _open_page(_address(config, listening))
        with _signals_left_alone():
            server.run(sockets=[listening])


@contextlib.contextmanager
def live(config: ServeConfig) -> Iterator[Live]:
    """Everything but the socket: begin or take up the folder, reconcile the ledger, start engine and learner."""
    from operant.live.api.automatic import Automatic
    from operant.live.api.evidence import TrialEvidence
    from operant.live.api.implicit import Implicit
    from operant.live.api.server import create_app
    from operant.live.api.service import Listener, ReadAhead, Service
    from operant.live.learning.worker import heldout_prompts
    from operant.live.serving.canary import Canary
    from operant.live.serving.engine import Engine
    from operant.live.serving.supervisor import Supervisor
    from operant.live.storage.store import Store
    from operant.models.policy import Policy, is_large

    _check_shares(config)
    implicit = Implicit(config.implicit) if config.implicit else None
    automatic = Automatic(config.reward) if config.reward else None
    root = Path(config.root)
    with contextlib.ExitStack() as stack:
        if automatic is not None:
            stack.callback(automatic.close)
        stack.enter_context(_only_one(root))
        where = config.store or str(root / "store.db")
        store = stack.enter_context(contextlib.closing(Store(where)))
        learner = _learner_config(config, where)
        source = _source(learner)
        _expect_memory(source, learner)
        say = _teller(source)
        versions = _versions(learner, store, say)
        canary = None
        if config.canary_share or config.shadow_share:
            canary = Canary(versions, config)
        else:
            versions.keep_trial(None)  # nothing is tried any more: what is current serves
        current = versions.current() if canary is None else versions.get(canary.look()[0])
        say(f"reading version {current.version}")
        policy = Policy.load(Path(current.path) / "model", device=config.device, dtype=config.dtype)
        policy.model.eval()
        for departure in departures(policy.codec, PromptFormat.of(config)):
            log.warning("%s", departure)
        if config.heldout:
            heldout_prompts(config, policy)  # read now, so that a fault is not found when the first version waits
        _take_up(store, versions, current.version, config)
        if implicit is not None:
            implicit.recall(reversed(store.list_completions(limit=1000, order="desc")))
        like = policy.twin() if policy.is_lora else None  # one that never decodes while others are made like it
        learns = _what_learns(policy)
        if config.learner_threads == "auto" and is_large(policy.model):
            learner = dataclasses.replace(learner, threads=0)
        engine = Engine(policy, current.version, max_rows=config.max_rows, queue=config.queue, threads=config.threads)
        stack.callback(engine.close)
        following = Supervisor(
            learner, engine, store, canary=canary, like=like, niceness=config.learner_niceness
        )  # fmt: skip
        supervisor = stack.enter_context(contextlib.closing(following))
        if canary is not None:
            canary.changed = supervisor.look
        evidence = None if canary is None else TrialEvidence(canary, automatic)
        listeners: list[Listener | None] = [implicit, automatic, evidence, ReadAhead()]
        service = Service(
            engine=engine, codec=policy.codec, encoder=policy.has_encoder,
            max_length=policy.max_length, store=store, versions=versions, supervisor=supervisor, config=config,
            links=_links(config), keys=_keys(config), canary=canary, generation=policy.generation, base=_base(root),
            listeners=[listener for listener in listeners if listener is not None],
        )  # fmt: skip
        del policy  # the engine alone keeps weights, and lets old ones go
        yield Live(create_app(service), engine, store, versions, supervisor, config, learns)


def _take_up(store: Store, versions: Versions, serving: int, config: ServeConfig) -> None:
    """Bring the ledger to what the versions say, and let go what is too old or too much."""
    store.reconcile(versions.records())
    store.served(serving, time.time())
    # a forgetting makes steps again from what is stored
    store.retain(86_400 * config.max_age_days, config.max_bytes, unless=versions.forgetting)


# --- before it serves -------------------------------------------------------------------------------------------------


def _check_installed() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise OperantError(f"the server needs {', '.join(missing)}: {install_line(extra='live')}")


def _check_shares(config: ServeConfig) -> None:
    if config.canary_share and config.shadow_share:
        raise OperantError("--canary_share and --shadow_share are two ways to try a version; give one of them")
    if config.shadow_share and not config.reward:
        raise OperantError("--shadow_share needs --reward, which judges what nobody sees; or give --canary_share")


@contextlib.contextmanager
def _log_to(file: Path) -> Iterator[None]:
    """What happens beside the answers goes into a file, warnings to the terminal too; never what was said, nor keys."""
    logger = logging.getLogger("operant")
    before = logger.level
    handlers: list[logging.Handler] = [logging.FileHandler(file, encoding="utf-8", delay=True), logging.StreamHandler()]
    handlers[1].setLevel(logging.WARNING)
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
    web = logging.getLogger("uvicorn")
    web.addHandler(handlers[1])
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(before)
        web.removeHandler(handlers[1])
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


def _keys(config: ServeConfig) -> Keys:
    return Keys(config.keys or Path(config.root) / "keys.json")


def _links(config: ServeConfig) -> Links:
    return Links.at(config.root, int(config.link_days * 86_400))


def _bind(host: str, port: int) -> socket.socket:
    """A socket that listens there from now on, so that a port which is taken is found before a model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise OperantError(f"--host {host} is no address of this machine; 127.0.0.1 always is") from error
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(512)
    except OSError as error:
        listening.close()
        reason = (error.strerror or str(error)).lower()
        raise OperantError(f"cannot listen on {host} port {port} ({reason}); choose another --port") from error
    return listening


@contextlib.contextmanager
def _only_one(root: Path) -> Iterator[None]:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OperantError(f"{root} cannot be made ({error.strerror}); choose another --root") from error
    try:
        with FileLock(root / "server.lock", timeout=0):
            yield
    except Timeout:
        raise OperantError(f"another server is at work in {root}; stop that one, or give another --root") from None


def _learner_config(config: ServeConfig, store: str) -> WorkerConfig:
    """The learner's part of the settings. A small model's has one thread: the cores are the server's."""
    values = {name: getattr(config, name) for name in LearnerConfig.__dataclass_fields__}
    threads = 1 if config.learner_threads == "auto" else config.learner_threads
    values |= {"store": store, "threads": threads, "watch_stdin": True}
    if config.mode == "shared":
        values["min_sources"] = max(2, config.min_sources)
    return WorkerConfig(**values)


def _source(config: WorkerConfig) -> str:
    """What is loaded first: the version that serves, or the model to begin with; "" where nobody names one."""
    versions = Versions(config.root)
    if not versions.exists():
        return config.model
    now = versions.pointer().version
    return next((str(Path(v.path) / "model") for v in versions.all() if v.version == now), "")


def _teller(source: str) -> Callable[[str], None]:
    """Prints what is being done, for a model that is large enough to take a while."""
    from operant.models.memory import weights_in
    from operant.models.policy import SMALL

    if not source or (weights_in(source) or 0) < SMALL:
        return lambda line: None
    return lambda line: print(f"{line} …", flush=True)


def _versions(config: WorkerConfig, store: Any, say: Callable[[str], None]) -> Versions:
    """The versions of the root, begun with the model when there are none."""
    from operant.live.learning.learner import expect_rank
    from operant.live.learning.worker import Worker

    versions, root = Versions(config.root, config.keep), Path(config.root)
    origin = root / "origin.json"
    if versions.exists():
        begun = _begun_from(root)
        if config.model and begun and begun != _resolved(config.model):
            raise OperantError(
                f"{config.root} goes on with what was begun from {begun}; leave --model out to serve that, or give "
                "another --root"
            )
        expect_rank(versions, config)
        return versions
    if not config.model:
        raise OperantError(f"--model is missing; give a model folder or hub id to begin with in {config.root}")
    try:
        with FileLock(root / "learner.lock", timeout=LOCK_SECONDS):
            replace_file(origin, json.dumps({"model": _resolved(config.model)}))
            say(f"beginning {root} with {config.model}; first its own answers, on which every version is measured")
            Worker(config, store, lambda line: None).start()
    except Timeout:
        raise OperantError(f"a learner is at work in {root}; stop that one, or give another --root") from None
    return versions


def _expect_memory(source: str, config: WorkerConfig) -> None:
    """Raises OperantError, with what would fit, for a model whose weights cannot fit twice: in the server and in its
    learner."""
    from operant.models.adapter import rank_of
    from operant.models.memory import Way, expect_room, weights_in
    from operant.models.policy import SMALL, resolve_device

    if not source:
        return  # what is missing is told where it is loaded
    begun = Versions(config.root).exists()
    learned = rank_of(Path(source)) or config.lora_rank
    if learned == "auto":
        learned = (weights_in(source) or 0) >= SMALL and not begun
    half = Way("--dtype bf16-true", 2 * HELD_OF_A_BASE)
    if learned:
        ways = [half] if config.dtype == "bf16-true" else [Way("", 4 * HELD_OF_A_BASE), half]
    else:
        adapter = f"--lora_rank 8{' in another --root' if begun else ''}"
        ways = [
            Way("", 4 * HELD_OF_ALL),
            Way(adapter, 4 * HELD_OF_A_BASE),
            dataclasses.replace(half, flags=f"{adapter} {half.flags}"),
        ]
    expect_room(source, ways, resolve_device(config.device))


def _begun_from(root: Path) -> str:
    """The model that version 0 was made from, "" in a root that is too old to tell."""
    origin = root / "origin.json"
    return str(json.loads(origin.read_text(encoding="utf-8"))["model"]) if origin.exists() else ""


def _base(root: Path) -> str:
    """The same as users of the server may know it: a hub id, or the name of a folder."""
    begun = _begun_from(root)
    return Path(begun).name if Path(begun).is_absolute() else begun


def _resolved(model: str) -> str:
    """A model's folder, wherever the program is called from; a hub id as it is."""
    return str(Path(model).resolve()) if os.path.exists(model) else model


# --- while it serves --------------------------------------------------------------------------------------------------


def server_of(app: FastAPI, config: ServeConfig) -> Any:
    """A uvicorn server of an application of `create_app`."""
    import uvicorn

    from operant.live.api.server import drain

    class Server(uvicorn.Server):
        """Cuts off answers that take too long once the server stops."""

        async def shutdown(self, sockets: Any = None) -> None:
            draining = asyncio.ensure_future(drain(app.state.service))
            await super().shutdown(sockets)
            await draining

    return Server(
        uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, lifespan="on",
            log_config=None,  # its own would close all handlers of the process, and absl's closes the stream with it
            timeout_graceful_shutdown=int(config.drain_seconds) + 15,
        )
    )  # fmt: skip


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """While things are loaded, SIGTERM is as Ctrl-C."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _signals_left_alone() -> Iterator[None]:
    """uvicorn raises the signals that stopped it once more when it has stopped; by then they have done their work."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _what_learns(policy: Policy) -> str:
    from operant.models.policy import is_large

    learned, held = (sum(p.numel() for p in ps) for ps in (policy.trainable_parameters(), policy.model.parameters()))
    if policy.is_lora:
        return f"an adapter of {_millions(learned)} weights learns, on {_millions(held - learned)} that stay"
    more = "; another --root begins with an adapter, which learns sooner" if is_large(policy.model) else ""
    return f"all {_millions(held)} weights learn{more}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} million"


def _address(config: ServeConfig, listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    name = f"[{host}]" if ":" in host else host
    return config.public_url.rstrip("/") or f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else name}:{port}"


def _open_page(url: str) -> None:
    """Show the page in the person's browser, where there is a screen or BROWSER names a program. The socket listens.

    Some browsers return only when they are closed, so this waits for none.
    """
    screens = ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY")
    if sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in screens):
        threading.Thread(target=webbrowser.open, args=(f"{url}/",), name="browser", daemon=True).start()
    else:
        print("no screen here: open the address above in a browser of your own", flush=True)


def _print_address(running: Live, listening: socket.socket) -> None:
    """Where to talk to it, with a line to try."""
    config, url = running.config, _address(running.config, listening)
    version = running.engine.stats()["version"]
    key = ' -H "Authorization: Bearer $OPERANT_KEY"' if _keys(config).needed else ""
    print(
        f"{config.name}, version {version}, learns at {url}/v1 ({config.mode}; everything is kept in {config.root})\n"
        f"  {running.learns}\n"
        f"  in a browser: {url}/\n"
        f"  curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' "
        """-d '{"model": "default", "messages": [{"role": "user", "content": "Hello"}]}'\n"""
        "Ctrl-C stops it.",
        flush=True,
    )
