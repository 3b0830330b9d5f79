"""What other libraries load for us, from a folder or the Hugging Face hub: quietly, without code of others, and never
waiting long for a hub that does not answer."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

from operant.types import OperantError

__all__ = ["SECONDS", "fetched", "load_fault", "reached"]

logger = logging.getLogger(__name__)

SECONDS = 3.0  # that the hub has to answer in


@contextlib.contextmanager
def fetched(source: str | Path) -> Iterator[None]:
    """Inside, libraries load the model that `source` names, a folder, a file or a hub id, quietly.

    What is not in the cache yet is logged in one line, since it may take long.

    Raises OperantError as `reached` does.
    """
    from huggingface_hub import constants

    with _quietly(), reached(source):
        if not (constants.HF_HUB_OFFLINE or Path(source).expanduser().exists() or _in_cache(str(source))):
            logger.warning("fetching %s from %s", source, constants.ENDPOINT)
        yield


@contextlib.contextmanager
def reached(source: str | Path) -> Iterator[None]:
    """Inside, a hub that does not answer within `SECONDS` is asked for nothing: what is in the cache is taken.

    The libraries themselves would retry for most of a minute.

    Raises OperantError for a hub id that is not in the cache while the hub cannot be reached.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or Path(source).expanduser().exists():
        yield
        return
    answers, known = _answers(constants.ENDPOINT), _in_cache(str(source))
    if not answers and not known:
        raise OperantError(
            f"{source} is no folder here and not in the cache, and {constants.ENDPOINT} does not answer; "
            "give a folder or a file, or try again with a network"
        )
    constants.HF_HUB_OFFLINE = not answers
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Inside, Transformers and the hub's client print nothing: no progress bars, no reports of what was loaded."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging as transformers

    loudness = transformers.get_verbosity(), hub.get_verbosity()
    barless = are_progress_bars_disabled(), not transformers.is_progress_bar_enabled()
    transformers.set_verbosity(logging.CRITICAL)  # what cannot be loaded is raised as well
    hub.set_verbosity(logging.CRITICAL)
    transformers.disable_progress_bar()
    disable_progress_bars()
    try:
        yield
    finally:
        transformers.set_verbosity(loudness[0])
        hub.set_verbosity(loudness[1])
        if not barless[0]:
            enable_progress_bars()
        if not barless[1]:
            transformers.enable_progress_bar()


def load_fault(error: BaseException) -> str:
    """Why something could not be loaded, in half a line."""
    if "trust_remote_code" in str(error):
        return "it needs code of its own, which operant does not run: take one whose architecture Transformers has"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _answers(endpoint: str) -> bool:
    """Whether the hub answers a small question within `SECONDS`, its name looked up included."""
    from huggingface_hub import get_session

    answers: list[bool] = []

    def ask() -> None:
        with contextlib.suppress(Exception):  # of many types; each means that it cannot be reached
            answers.append(get_session().head(endpoint, timeout=SECONDS).status_code < 500)

    # looking a name up heeds no time limit, so it is waited for in another thread
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(SECONDS)
    return answers == [True]


def _in_cache(source: str) -> bool:
    """Whether something of a model or data set is in the hub's cache."""
    from huggingface_hub import constants

    name = source.partition(":")[0].replace("/", "--")
    return any((Path(constants.HF_HUB_CACHE) / f"{kind}--{name}").is_dir() for kind in ("models", "datasets"))
