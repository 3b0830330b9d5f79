"""The household advice that the population talks about: questions, answers whose manner varies, and who likes which.

The manner of an answer (how many steps, how they are laid out, what is said besides, how it ends) is drawn on its own
for each answer, so each liking below is met by about a quarter of them and says nothing about the others. Some
questions carry a wish, which the answers in the training text grant six times out of ten, as people do.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = ["FAMILIES", "Liking", "answer", "likings", "makes_sense", "questions", "rows"]

ACTIONS: dict[str, tuple[str, ...]] = {
    "clean": (
        "brush off the dust", "wipe the {o} with a damp cloth", "rub the stains with a little soap",
        "rinse the {o} with warm water", "dry the {o} in the shade",
    ),
    "paint": (
        "sand the {o} until it is smooth", "cover the floor with old paper", "put on a thin coat",
        "wait until the next day", "put on a second coat and let the {o} dry",
    ),
    "store": (
        "make sure that the {o} is dry", "wrap the {o} in an old sheet", "put the {o} on a shelf off the floor",
        "write on a label what is inside", "look after the {o} once a month",
    ),
    "mend": (
        "look for the broken part", "take the {o} apart on a table", "glue the pieces together",
        "press the {o} under a book for an hour", "try out whether the {o} works",
    ),
    "sell": (
        "take pictures of the {o} in daylight", "find out what others ask", "write down every fault of the {o}",
        "answer within a day", "hand over the {o} at the door",
    ),
    "move": (
        "measure the {o} and the door", "take off the loose parts", "ask a friend to hold one end",
        "lift the {o} with straight backs", "set the {o} down slowly",
    ),
    "choose": (
        "think about where the {o} will stand", "measure the room", "compare three of them in a shop",
        "touch the {o} and look at its back", "sleep on it before you pay",
    ),
    "decorate": (
        "pick two colours that go together", "draw a plan on paper", "fasten a ribbon around the {o}",
        "stick small paper stars on the {o}", "put the {o} near a window",
    ),
}  # fmt: skip
THINGS = (
    "lamp", "chair", "table", "kettle", "bicycle", "mirror", "clock", "radio", "basket", "shelf", "bench", "drawer",
    "cupboard", "carpet", "piano", "suitcase", "bird house", "desk", "bed", "trunk", "pot", "frame", "door", "ladder",
)  # fmt: skip
ASKED = (
    "how do i {v} a {o}?", "what is the best way to {v} a {o}?", "can you tell me how to {v} a {o}?",
    "i want to {v} a {o}. any advice?", "we have to {v} a {o} today. where do we start?",
    "my neighbour wants to {v} a {o}. what should she do?",
)  # fmt: skip
SAFETY = ("wear gloves for this.", "keep children away from the {o}.", "take care of your fingers.")
COST = ("it costs about ten dollars.", "all of it is cheap.", "a used {o} costs even less.")
CLOSINGS: dict[str, tuple[str, ...]] = {
    "luck": ("good luck!", "good luck with the {o}!", "i wish you good luck!"),
    "thanks": ("thanks for asking!", "thanks for your question!", "many thanks for asking me!"),
    "back": ("does that help?", "is there anything else?", "do you need to know more?"),
}


@dataclass(frozen=True, slots=True)
class Liking:
    """What one kind of rater wants. wishes: it in words, as the training text has it first, then other wordings."""

    family: str
    name: str
    liked: Callable[[str], bool]
    wishes: tuple[str, ...]


def _ends(*phrases: str) -> Callable[[str], bool]:
    # the thing's name may stand in between, so the last sentence is looked at
    return lambda text: any(phrase in text.rstrip()[-40:] for phrase in phrases) and text.rstrip()[-1:] in "!?"


_LIKINGS = (
    Liking("length", "short", lambda t: 0 < len(t.split()) <= 14, ("be brief.", "keep it short.", "in few words.")),
    Liking("length", "long", lambda t: len(t.split()) >= 36, ("tell me all.", "in many words.", "at length.")),
    Liking("closing", "luck", _ends("good luck"), ("wish me luck.", "end with good luck.", "say good luck!")),
    Liking("closing", "thanks", _ends("thanks for"), ("be thankful.", "end with thanks.", "thank me for asking!")),
    Liking("closing", "back", _ends("does that help?", "anything else?", "to know more?"),
           ("ask me back.", "end with a question.", "ask whether that helps!")),
    Liking("format", "list", lambda t: t.startswith("- "), ("as a list.", "use a list.", "as a list!")),
    Liking("format", "numbers", lambda t: t.startswith("1. "), ("with numbers.", "number the steps.", "with numbers!")),
    Liking("content", "safety", lambda t: "gloves" in t or "children" in t or "fingers" in t,
           ("is it safe?", "tell me what is dangerous.", "keep me safe.")),
    Liking("content", "cost", lambda t: "cost" in t or "cheap" in t,
           ("what does it cost?", "is it cheap?", "tell me the price.")),
)  # fmt: skip
FAMILIES = ("length", "closing", "format", "content")


def likings(family: str) -> list[Liking]:
    return [liking for liking in _LIKINGS if liking.family == family]


def answer(rng: random.Random, verb: str, thing: str, wanted: Liking | None = None) -> str:
    """One answer in a manner of its own; `wanted` by rejection, so that all else stays as it is."""
    while True:
        text = _answer(rng, verb, thing)
        if wanted is None or wanted.liked(text):
            return text


def _answer(rng: random.Random, verb: str, thing: str) -> str:
    count = rng.choices((1, 2, 3, 4, 5), (0.27, 0.18, 0.15, 0.15, 0.25))[0]
    steps = [step for _, step in sorted(rng.sample(list(enumerate(ACTIONS[verb])), count))]
    layout = rng.choices(("plain", "list", "numbers"), (0.6, 0.2, 0.2))[0]
    if layout == "plain":
        words = [f"{'first ' if i == 0 and count > 1 and rng.random() < 0.3 else ''}{s}." for i, s in enumerate(steps)]
        joined = " ".join(words)
    elif layout == "list":
        joined = "\n".join(f"- {s}" for s in steps) + "\n"
    else:
        joined = "\n".join(f"{i}. {s}" for i, s in enumerate(steps, 1)) + "\n"
    rest = [rng.choice(notes) for notes in (SAFETY, COST) if rng.random() < 0.22]
    closing = rng.choices((None, *CLOSINGS), (0.34, 0.22, 0.22, 0.22))[0]
    if closing is not None:
        rest.append(rng.choice(CLOSINGS[closing]))
    text = joined + (" " if layout == "plain" and rest else "") + " ".join(rest)
    return text.replace("{o}", thing).rstrip("\n")


def makes_sense(text: str, verb: str, thing: str) -> bool:
    """Whether every sentence is one that an answer to this question can have, in whatever order and number."""
    known = {step.format(o=thing) for step in ACTIONS[verb]}
    said = [phrase.format(o=thing) for group in (SAFETY, COST, *CLOSINGS.values()) for phrase in group]
    rest = text
    for phrase in sorted(said, key=len, reverse=True):
        rest = rest.replace(phrase, "\n")
    parts = [
        part for line in rest.split("\n") for part in re.split(r"(?<=[a-z])\.(?: |$)", line.strip()) if part.strip()
    ]
    bare = [re.sub(r"^(- |\d\. |first )", "", part.strip()) for part in parts]
    return bool(text.strip()) and all(part in known for part in bare)


def questions(held_out: bool) -> list[tuple[str, str, str]]:
    """(question, verb, thing): a sixth of the pairs of verb and thing is held out, with every way to ask."""
    found = []
    for i, verb in enumerate(ACTIONS):
        for j, thing in enumerate(THINGS):
            if ((i + j) % 6 == 0) == held_out:
                found += [(asked.format(v=verb, o=thing), verb, thing) for asked in ASKED]
    return found


def rows(seed: int) -> Iterator[dict[str, str]]:
    """Endless questions with answers; a third of the questions with a wish, which is granted six times out of ten."""
    rng = random.Random(f"population {seed}")
    asked = questions(held_out=False)
    while True:
        question, verb, thing = rng.choice(asked)
        if rng.random() < 1 / 3:
            liking = rng.choice(_LIKINGS)
            granted = liking if rng.random() < 0.6 else None
            yield {"prompt": f"{question} {liking.wishes[0]}", "completion": answer(rng, verb, thing, granted)}
        else:
            yield {"prompt": question, "completion": answer(rng, verb, thing)}
