"""Feedback to and from files: operant's own lines, data sets that other trainers read, exports of other tools.

Another tool's feedback is about a completion that is in the store: the id it gives is the completion's own, or stands
among the completion's metadata under a name that ends in _id, as it does when the request said so
(`metadata={"trace_id": …}`). Feedback that joins no completion, or says nothing, is counted by its reason.
"""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from operant.data.feedback_log import FeedbackLog, line_of
from operant.data.preferences import good_or_bad, reward_of
from operant.data.rows import Row, load_rows
from operant.live.storage.feedback import body_hash
from operant.live.storage.store import Conflict, EventStory, Origin, Store, UnknownCompletion
from operant.rewards import reward_trajectory
from operant.types import Completion, Doubles, Feedback, OperantError, Prompt, Span

__all__ = ["FORMATS", "Said", "Scale", "export", "export_lines", "export_rows", "import_lines", "import_rows", "load"]

PAGE = 500  # events that are in memory at once


# --- out --------------------------------------------------------------------------------------------------------------


Form = Literal["lines", "events", "pairs", "ratings", "rewards"]


@dataclass(frozen=True, slots=True)
class Scale:
    """What scores run from and to, and the one above which they are good."""

    low: float = 0.0
    high: float = 1.0
    midpoint: float = 0.5


def export(store: Store, path: str | Path, form: Form = "lines", *, scale: Scale = Scale()) -> int:
    """Write a file of JSON Lines, or, of the other forms, a folder that `datasets.load_from_disk` and other trainers
    with it read, `operant prefer --data` (pairs, ratings) and `operant train --logged` (rewards); how many lines or
    rows there are.

    Raises OperantError when there is nothing to write, `path` is there already, or it cannot be written.
    """
    path = Path(path)
    if path.exists():
        raise OperantError(f"{path} is there already; give another --export")
    try:
        if form == "lines":
            with path.open("w", encoding="utf-8") as file:
                return sum(bool(file.write(line)) for line in export_lines(store))
        import datasets

        rows = export_rows(store, form, scale=scale)
        if not rows:
            raise OperantError("the store holds nothing of that form; choose another --form, or collect feedback first")
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
        return len(rows)
    except OSError as error:
        raise OperantError(f"{path} cannot be written ({error.strerror}); give another --export") from error


def export_lines(store: Store) -> Iterator[str]:
    """Every event with what it is about, as lines that `operant prefer --replay` and `import_lines` read."""
    written: set[tuple[str, str]] = set()
    for story in _all_stories(store):
        event = story.event
        names = [event.completion_id, *([str(event.value)] if event.kind == "comparison" else [])]
        for name in names:
            found = store.completion(name) if ("completion", name) not in written else None
            if found is not None and found.completion is not None:
                if ("prompt", found.prompt.id) not in written:
                    yield line_of(found.prompt)
                yield line_of(found.completion)
                written |= {("prompt", found.prompt.id), ("completion", name)}
        yield line_of(event)


def export_rows(
    store: Store, form: Literal["events", "pairs", "ratings", "rewards"], *, scale: Scale = Scale()
) -> list[Row]:
    """Rows of a data set.

    events: each event with its texts: id, completion_id, prompt, completion, kind, number (of a thumb, score or span),
        text (of an edit, comparison or comment), start, end, source, time, state.
    pairs: prompt, chosen, rejected, of edits and comparisons that stand (`FeedbackLog.standing`).
    ratings: prompt, completion, label, of thumbs and scores that stand; a score above the midpoint is good, and one of
        exactly that is left out.
    rewards: prompt, completion, prompt_tokens, tokens, behavior_logprobs, reward, of completions with thumbs, scores or
        spans that stand. reward is one number a token: thumbs and scores (`preferences.reward_of`) stand on the last,
        spans are spread over theirs, and of several sources it is the mean.

    Of pairs and ratings, prompts and answers are chats when every prompt is one, else texts.
    """
    stories = list(_all_stories(store))
    if form == "events":
        return [_event_row(store, story) for story in stories]
    log = FeedbackLog()
    log.add(*(dataclasses.replace(story.event, time=float(story.offset)) for story in stories))
    if form == "rewards":
        return _rewarded(store, log.standing(), scale)
    found: list[tuple[Prompt, Row]] = []
    for event in log.standing():
        about = store.completion(event.completion_id)
        if about is None or about.completion is None:
            continue
        text = about.completion.text
        row = _pair_row(store, event, text) if form == "pairs" else _rating_row(event, text, scale.midpoint)
        if row is not None:
            found.append((about.prompt, row))
    chats = all(prompt.messages for prompt, _ in found)
    return [_with_prompt(prompt, row, chats) for prompt, row in found]


def _all_stories(store: Store) -> Iterator[EventStory]:
    last = 0
    while page := store.events(after=last, limit=PAGE):
        yield from page
        last = page[-1].offset


def _event_row(store: Store, story: EventStory) -> Row:
    event, about = story.event, store.completion(story.event.completion_id)
    words = isinstance(event.value, str)
    return {
        "id": event.id, "completion_id": event.completion_id,
        "prompt": _text_of(about.prompt) if about is not None else None,
        "completion": about.completion.text if about is not None and about.completion is not None else None,
        "kind": event.kind, "number": None if words or event.value is None else float(event.value),
        "text": event.value if words else None, "start": event.span[0] if event.span else None,
        "end": event.span[1] if event.span else None, "source": event.source, "time": event.time,
        "state": story.state,
    }  # fmt: skip


def _pair_row(store: Store, event: Feedback, text: str) -> Row | None:
    if event.kind == "edit":
        chosen, rejected = str(event.value or ""), text
    elif event.kind == "comparison":
        other = store.completion(str(event.value))
        if other is None or other.completion is None:
            return None
        chosen, rejected = text, other.completion.text
    else:
        return None
    return {"chosen": chosen, "rejected": rejected} if chosen.strip() and chosen != rejected else None


def _rating_row(event: Feedback, text: str, midpoint: float) -> Row | None:
    good: bool | None = None
    if event.kind == "thumb":
        good = good_or_bad(event.value)
    elif event.kind == "score" and isinstance(event.value, int | float) and event.value != midpoint:
        good = event.value > midpoint
    return None if good is None else {"completion": text, "label": good}


def _rewarded(store: Store, standing: Sequence[Feedback], scale: Scale) -> list[Row]:
    said: dict[str, dict[str, list[Feedback]]] = {}  # by completion and source
    for event in standing:
        said.setdefault(event.completion_id, {}).setdefault(event.source, []).append(event)
    rows = []
    for name, sources in said.items():
        about = store.completion(name)
        if about is None or about.completion is None:
            continue
        prompt, completion = about.prompt, about.completion
        paid = [p for events in sources.values() if (p := _paid(prompt, completion, events, scale)) is not None]
        if paid:
            known = completion.behavior_logprobs
            rows.append({
                "prompt": _text_of(prompt), "completion": completion.text, "prompt_tokens": prompt.tokens.tolist(),
                "tokens": completion.tokens.tolist(), "behavior_logprobs": None if known is None else known.tolist(),
                "reward": np.mean(paid, 0).tolist(),
            })  # fmt: skip
    return rows


def _paid(prompt: Prompt, completion: Completion, events: Sequence[Feedback], scale: Scale) -> Doubles | None:
    """What one source paid for each token, or None where it said nothing in numbers."""
    values: list[Any] = []
    for event in events:
        if event.kind != "span":
            values.append(reward_of(event.kind, event.value, scale.low, scale.high))
        elif event.span and isinstance(event.value, int | float):
            values.append([Span(*event.span, float(event.value))])
    placed = [reward_trajectory(prompt, completion, "rating", value) for value in values if value is not None]
    rewards = [trajectory.rewards for trajectory in placed if trajectory.missing is None]
    return np.sum(rewards, 0) if rewards else None


def _text_of(prompt: Prompt) -> str:
    return prompt.text or "\n".join(message["content"] for message in prompt.messages or ())


def _with_prompt(prompt: Prompt, row: Row, chats: bool) -> Row:
    if not chats:
        return {"prompt": _text_of(prompt), **row}
    answer = {n: v if n == "label" else [{"role": "assistant", "content": v}] for n, v in row.items()}
    return {"prompt": [dict(message) for message in prompt.messages or ()], **answer}


# --- in ---------------------------------------------------------------------------------------------------------------


def load(store: Store, path: str | Path, format: str = "lines", *, metric: str = "") -> Counter[str]:
    """Take in a file of `import_lines` or, of a format of FORMATS, of `import_rows`.

    Raises OperantError when there is no such file, or it holds something else.
    """
    if format == "lines":
        try:
            with Path(path).open(encoding="utf-8") as file:
                return import_lines(store, file)
        except OSError as error:
            raise OperantError(f"{path} cannot be read ({error.strerror}); give another --load") from error
        except UnicodeDecodeError as error:
            raise OperantError(f"{path} is no text; --load takes a file of JSON Lines") from error
    return import_rows(store, format, _read_rows(str(path)), metric=metric)


def import_lines(store: Store, lines: Iterable[str]) -> Counter[str]:
    """Take in what `export_lines` or `FeedbackLog.lines` wrote, answers included; how many of each there were."""
    log, counts = FeedbackLog.from_lines(lines), Counter[str]()
    for completion in log.completions.values():
        prompt = log.prompts.get(completion.prompt_id)
        if prompt is None:
            counts["completions without their prompt"] += 1
        elif store.completion(completion.id) is not None:
            counts["completions that were there"] += 1
        else:
            versions = completion.policy_version
            version = int(versions[0]) if versions is not None and len(versions) else 0
            store.begin(completion.id, prompt, completion.sampling, Origin(prompt.task, model_version=version))
            store.complete(completion)
            counts["completions"] += 1
    for event in log.events.values():
        _add(store, event, counts)
    return counts


@dataclass(frozen=True, slots=True)
class Said:
    """Feedback of another tool. about: ids of what it may be about, the most exact first."""

    about: tuple[str, ...]
    kind: Literal["score", "thumb", "edit", "comment"]
    value: float | str
    id: str
    source: str
    time: float


def import_rows(store: Store, tool: str, rows: Iterable[Row], *, metric: str = "") -> Counter[str]:
    """Take in feedback that another tool has exported, of one metric or of all; how many of each there were.

    tool: one of FORMATS. A row that was taken in before is there once.
    """
    known: dict[str, str] = {}
    for name, metadata in store.names():
        known |= {str(value): name for key, value in metadata.items() if key.endswith("_id")}
        known[name] = name
    read, counts = FORMATS[tool], Counter[str]()
    for row in rows:
        if metric and metric not in (row.get("metric_name"), row.get("key"), row.get("name")):
            counts["of another metric"] += 1
            continue
        said = list(read(row))
        counts["saying nothing"] += not said
        for one in said:
            about = next((known[name] for name in one.about if name in known), None)
            if about is None:
                counts["about completions that are not in the store"] += 1
                continue
            name = f"{tool}-{one.id}"
            _add(store, Feedback(name, about, one.kind, one.value, one.source or tool, name, one.time), counts)
    return +counts


def _add(store: Store, event: Feedback, counts: Counter[str]) -> None:
    if store.story(event.id) is not None:
        counts["events that were there"] += 1
        return
    body = {"completion_id": event.completion_id, "kind": event.kind, "value": event.value, "span": event.span}
    try:
        duplicate = store.add_feedback(event, body_hash=body_hash(body)).duplicate
        counts["events that were there" if duplicate else "events"] += 1
    except UnknownCompletion:
        counts["about completions that are not in the store"] += 1
    except Conflict:
        counts["with a key that was used for something else"] += 1


def _read_rows(path: str) -> list[Row]:
    """The rows of an export: what `operant.data.rows.load_rows` reads, and pages of an API, {"data": [rows]}."""
    rows = load_rows(path)
    if len(rows) == 1 and isinstance(rows[0].get("data"), list):
        rows = rows[0]["data"]
    if not all(isinstance(row, dict) for row in rows):
        raise OperantError(f"the rows of {path} are no objects; give an export of feedback")
    return rows


def _tensorzero(row: Row) -> Iterator[Said]:
    """The tables BooleanMetricFeedback, FloatMetricFeedback, CommentFeedback and DemonstrationFeedback
    (tensorzero.com/docs/gateway/data-model), of which the columns tell which it is."""
    about, value = row.get("target_id") or row.get("inference_id"), row.get("value")
    kind: Any = None
    if "metric_name" in row and row["metric_name"] not in ("comment", "demonstration"):
        kind, value = _number_or_thumb(value)
    elif row.get("inference_id") is not None and "target_type" not in row and row.get("metric_name") != "comment":
        kind, value = "edit", _blocks_text(value)
    elif isinstance(value, str):
        kind = "comment"
    if about is None or kind is None or value is None:
        return
    tags = _object(row.get("tags"))
    source = str(tags.get("author") or tags.get("user_id") or "")
    yield Said((str(about),), kind, value, str(row.get("id")), source, _time(row.get("timestamp"), row.get("id")))


def _blocks_text(value: Any) -> str | None:
    """The text of content blocks, or the raw text of a JSON function's output."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return value
    if isinstance(value, Mapping):
        value = value.get("raw")
        return value if isinstance(value, str) else None
    if isinstance(value, list):
        texts = [b.get("text") for b in value if isinstance(b, Mapping) and b.get("type") == "text"]
        return "".join(str(text) for text in texts) if texts else None
    return value if isinstance(value, str) else None


def _langsmith(row: Row) -> Iterator[Said]:
    """docs.langchain.com/langsmith/feedback-data-format. A correction {"score": …} is the score that should have been
    given; a text is the answer that should have been."""
    about = tuple(str(row[name]) for name in ("run_id", "trace_id") if row.get(name))
    name, correction = str(row.get("id")), row.get("correction")
    origin = _object(row.get("feedback_source"))
    source = str(origin.get("user_id") or "") or f"langsmith {origin.get('type') or ''}".strip()
    when = _time(row.get("created_at"), None)
    corrected = _object(correction)
    score = corrected.get("score", row.get("score"))
    kind, value = _number_or_thumb(row.get("value") if score is None else score)
    if kind is not None and value is not None:
        yield Said(about, kind, value, name, source, when)
    texts = [text for text in corrected.values() if isinstance(text, str)]
    text = texts[0] if len(texts) == 1 else correction if isinstance(correction, str) and not corrected else None
    if text:
        yield Said(about, "edit", text, f"{name}-correction", source, when)
    if row.get("comment"):
        yield Said(about, "comment", str(row["comment"]), f"{name}-comment", source, when)


def _langfuse(row: Row) -> Iterator[Said]:
    """Scores as the API gives them (camelCase) and as the export to blob storage does
    (langfuse.com/docs/api-and-data-platform/features/blob-storage-export-fields)."""

    def cell(camel: str, snake: str) -> Any:
        return row.get(camel) if row.get(camel) is not None else row.get(snake)

    about = tuple(str(name) for name in (cell("observationId", "observation_id"), cell("traceId", "trace_id")) if name)
    name, when = str(row.get("id")), _time(row.get("timestamp"), None)
    author = cell("authorUserId", "author_user_id")
    source = str(author) if author else f"langfuse {row.get('source') or ''}".strip().lower()
    kind: Any
    value: float | str | None
    words, data_type = cell("stringValue", "string_value"), str(cell("dataType", "data_type") or "").upper()
    words = words if words is not None else row.get("value") if isinstance(row.get("value"), str) else None
    if data_type == "CORRECTION":
        kind, value = "edit", words
    elif data_type == "TEXT":
        kind, value = "comment", words
    elif data_type == "BOOLEAN":
        good = good_or_bad(row.get("value") if row.get("value") is not None else words)
        kind, value = "thumb", None if good is None else 1 if good else -1
    else:
        kind, value = _number_or_thumb(words if data_type == "CATEGORICAL" else row.get("value"))
    if kind is not None and value is not None:
        yield Said(about, kind, value, name, source, when)
    if row.get("comment"):
        yield Said(about, "comment", str(row["comment"]), f"{name}-comment", source, when)


FORMATS: dict[str, Callable[[Row], Iterator[Said]]] = {
    "langfuse": _langfuse, "langsmith": _langsmith, "tensorzero": _tensorzero,
}  # fmt: skip


def _number_or_thumb(value: Any) -> tuple[Literal["score", "thumb", "comment"] | None, float | str | None]:
    """A number is a score; true, false and words such as up and down are thumbs, other words a comment."""
    if isinstance(value, bool):
        return "thumb", 1 if value else -1
    if isinstance(value, int | float):
        return "score", value
    if not isinstance(value, str) or not value.strip():
        return None, None
    try:
        return "score", float(value)  # a file of CSV has no types
    except ValueError:
        good = good_or_bad(value)
    return ("comment", value) if good is None else ("thumb", 1 if good else -1)


def _object(value: Any) -> Mapping[str, Any]:
    """An object, or the JSON text of one; else an empty one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return {}
    return value if isinstance(value, Mapping) else {}


def _time(given: Any, name: Any) -> float:
    """Seconds since the epoch of a time that is given, or of a UUID of version 7; else 0. Without a zone it is UTC."""
    try:
        when = datetime.fromisoformat(str(given))
    except ValueError:
        pass
    else:
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    try:
        number = uuid.UUID(str(name))
    except ValueError:
        return 0.0
    return (number.int >> 80) / 1000 if number.version == 7 else 0.0
