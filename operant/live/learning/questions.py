"""Everyday questions and instructions that a model of chats is asked, to see whether it still answers as it did.

They are operant's own text, of no data set. The first eight are of eight kinds, and so are the last eight: a root's
anchors take from the beginning, the slow gate from the end, so that what one looks at the other does not.
"""

from __future__ import annotations

__all__ = ["QUESTIONS"]

#: Facts, advice, lists, arithmetic, things made up, explanations, rewritings, small talk; English, and some Chinese.
QUESTIONS = (
    "What is the capital of Italy?",
    "How can I fall asleep faster at night?",
    "Name four things that people take to the beach.",
    "What is 12 plus 9?",
    "Write two lines about the sea.",
    "Why does ice float on water?",
    "Say this more politely: Give me the salt.",
    "早上好！今天过得怎么样？",
    "Who wrote Hamlet?",
    "Give me a tip for learning to cook.",
    "List the days of the week.",
    "How many minutes are there in two hours?",
    "Suggest a name for a small brown dog.",
    "What does a battery do?",
    "Turn this into a question: The train leaves at six.",
    "Hello, who are you?",
    "Which is larger, the sun or the moon?",
    "My neighbour is loud in the evening. What should I do?",
    "What do I need to bake bread?",
    "Is 17 an odd number?",
    "Begin a story about a lost key.",
    "How does a bicycle stay upright?",
    "Translate 'thank you' into French.",
    "中国的首都是哪里？",
    "What colour is a ripe lemon?",
    "What could I give my sister for her birthday?",
    "Give me three words that rhyme with light.",
    "Half of a cake is cut into four pieces. What part of the cake is each piece?",
    "Describe a forest in winter in one sentence.",
    "Explain what a password is for.",
    "Correct the spelling: I recieved your leter yesterday.",
    "请用一句话介绍一下长城。",
    "When do people usually eat breakfast?",
    "I have an exam tomorrow and I am nervous. Any advice?",
    "Write a short shopping list for a salad.",
    "If a shirt costs 20 dollars and I pay with 50, how much do I get back?",
    "Make up a slogan for a bookshop.",
    "What is the difference between a lake and a river?",
    "Put this into the past tense: She walks to school.",
    "给我推荐一种健康的早餐。",
    "How many legs does a spider have?",
    "How do I keep my plants alive while I am away?",
    "Name two animals that can fly and two that can swim.",
    "What is 7 times 6?",
    "Write a friendly greeting for a guest.",
    "Why do we have seasons?",
    "Shorten this: Due to the fact that it was raining, we stayed at home.",
    "你能帮我做什么？",
)
