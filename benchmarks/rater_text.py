"""What the scripted rater asks a chat model, what it likes, and what it never asks about. All of it is our own text."""

from __future__ import annotations

import re
from collections.abc import Callable

__all__ = ["ASKED", "FACTS", "STYLES", "UNSEEN", "is_right"]

ASKED = (
    "How do I keep bread fresh?",
    "What should I wear when it rains?",
    "How can I learn to swim?",
    "Why do cats purr?",
    "What is a good hobby for the winter?",
    "How do I clean a window?",
    "What can I cook with potatoes?",
    "How do I say no to a friend?",
    "Why is the sky blue?",
    "How can I drink more water?",
    "What makes a good teacher?",
    "How do I remove a coffee stain?",
    "What should I take on a long walk?",
    "How do I make a paper boat?",
    "Why do people laugh?",
    "How can I save money on food?",
    "What is the best way to wake up early?",
    "How do I look after a kitten?",
    "What can I do on a rainy day?",
    "How does a clock work?",
    "Why do leaves fall in autumn?",
    "How do I write a thank-you card?",
    "What should I eat before a run?",
    "How do I tie a knot that holds?",
    "What is a library for?",
    "How can I make new friends in a new town?",
    "Why should I read books?",
    "How do I boil an egg?",
    "What makes the wind blow?",
    "How can I remember names better?",
    "What should I do when I am bored?",
    "How do I grow tomatoes?",
    "Why do we dream?",
    "How can I be more patient?",
    "What is a good gift for a teacher?",
    "How do I fold a shirt?",
    "What does a doctor do all day?",
    "How can I get better at chess?",
    "Why is salt used in cooking?",
    "How do I plan a picnic?",
)

#: Asked when satisfaction is measured, and never rated.
UNSEEN = (
    "How do I make tea?",
    "What is a good pet for a child?",
    "Why do birds sing?",
    "How can I sleep well on a train?",
    "What should I put on a sandwich?",
    "How do I repair a torn page?",
    "Why do we need vegetables?",
    "How can I stop biting my nails?",
    "What makes a garden pretty?",
    "How do I learn a new song?",
    "What should I do if I lose my keys?",
    "How does soap work?",
    "Why is it good to take a walk?",
    "How can I make my room tidy?",
    "What is a museum?",
    "How do I write a short poem?",
    "Why do dogs wag their tails?",
    "How can I speak in front of many people?",
    "What can I do with old newspapers?",
    "How do I choose a ripe melon?",
    "What is the use of a calendar?",
    "How can I keep my feet warm?",
    "Why do we brush our teeth?",
    "How do I get to know my neighbours?",
    "What should I say when I am late?",
    "How do I draw a tree?",
    "Why is sleep important?",
    "How can I cook rice without burning it?",
    "What is a good name for a boat?",
    "How do I start a diary?",
    "What should I know before I buy a bicycle?",
    "Why do people wear hats?",
)

#: Unrelated questions with what a right answer contains; | separates alternatives.
FACTS = (
    ("What is the capital of France?", "paris"),
    ("What is the capital of Japan?", "tokyo"),
    ("What is the capital of Germany?", "berlin"),
    ("What is the capital of Spain?", "madrid"),
    ("What is the capital of Egypt?", "cairo"),
    ("What is the capital of Russia?", "moscow"),
    ("What is the capital of England?", "london"),
    ("What is the capital of Greece?", "athens"),
    ("What is 2 plus 2?", "4|four"),
    ("What is 5 plus 3?", "8|eight"),
    ("What is 10 minus 4?", "6|six"),
    ("What is 3 times 3?", "9|nine"),
    ("What is 20 divided by 2?", "10|ten"),
    ("What is 100 plus 1?", "101"),
    ("What is the opposite of hot?", "cold|cool"),
    ("What is the opposite of up?", "down"),
    ("What is the opposite of big?", "small|little|tiny"),
    ("What is the opposite of happy?", "sad|unhappy"),
    ("What is the opposite of day?", "night"),
    ("What is the opposite of fast?", "slow"),
    ("What colour is grass?", "green"),
    ("What colour is snow?", "white"),
    ("What colour is blood?", "red"),
    ("What colour is a banana?", "yellow"),
    ("What colour do you get from blue and yellow?", "green"),
    ("How many days are in a week?", "7|seven"),
    ("How many months are in a year?", "12|twelve"),
    ("How many hours are in a day?", "24"),
    ("How many minutes are in an hour?", "60|sixty"),
    ("How many legs does a dog have?", "4|four"),
    ("How many wheels does a bicycle have?", "2|two"),
    ("How many sides does a triangle have?", "3|three"),
    ("Which planet do we live on?", "earth"),
    ("Which planet is closest to the sun?", "mercury"),
    ("What is the largest planet in our solar system?", "jupiter"),
    ("What is the largest ocean on Earth?", "pacific"),
    ("On which continent is Brazil?", "south america"),
    ("On which continent is Kenya?", "africa"),
    ("What is frozen water called?", "ice"),
    ("What gas do people need to breathe?", "oxygen"),
    ("What do bees make?", "honey"),
    ("What do cows give us to drink?", "milk"),
    ("Which animal says meow?", "cat|cats|kitten"),
    ("What is a baby dog called?", "puppy|pup"),
    ("What is a baby cat called?", "kitten"),
    ("Who wrote Romeo and Juliet?", "shakespeare"),
    ("Who painted the Mona Lisa?", "vinci|leonardo"),
    ("Which language do people speak in France?", "french"),
    ("In which season does snow usually fall?", "winter"),
    ("What is the first letter of the alphabet?", "a"),
)


def is_right(answer: str, wanted: str) -> bool:
    """Whether the answer has one of the wanted words."""
    return re.search(rf"\b(?:{wanted})\b", answer.lower()) is not None


# --- what is liked ----------------------------------------------------------------------------------------------------


def to_you(text: str) -> bool:
    """It speaks to the one who asked."""
    return re.search(r"\byou(?:r|rs|rself)?\b", text.lower()) is not None


def brisk(text: str) -> bool:
    """Its first sentence ends within ten words."""
    first = re.split(r"[.!?](?:\s|$)|\n", text.strip())[0]
    return 0 < len(first.split()) <= 10


def plain(text: str) -> bool:
    """It has no comma and no colon, and is no list."""
    return bool(text.strip()) and not re.search(r"[,:;\n]", text.strip())


STYLES: dict[str, Callable[[str], bool]] = {"you": to_you, "brisk": brisk, "plain": plain}
