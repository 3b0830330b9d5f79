"""Writing a text as a Gymnasium environment (`operant/Text-v0`), and a small game over text that takes several turns.

Importing this module registers both; it needs the extra `gym`.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from operant.data.text import Codec
from operant.rewards import RewardRunner, Stop, reward_by_name
from operant.types import Completion, Ints, OperantError, Prompt


class TextEnv(gymnasium.Env[Ints, np.int64]):
    """Write a completion token by token and be paid at once: the language model's task as a Markov decision process.

    State: the prompt and what is written so far, MultiDiscrete of `max_prompt_tokens + max_tokens` columns; prompts
    stand right-aligned before the completion, and V, one past the last token id, means nothing there. Action: a token
    id. The text ends at the end-of-text token (terminated), where a streaming reward ends it (terminated), or after
    `max_tokens` tokens (truncated).

    Reward: a streaming one pays what it says for the token. A dense one pays Σ_s≤t r_s of the text so far, taken for a
    whole text, less what it was paid before: the potential is then the reward itself at every prefix, and an episode's
    sum is the completion's reward exactly. Any other pays at the end. Gymnasium has no missing reward: where there is
    none, 0 is paid and `info["missing"]` says why.

    prompts: texts, or Prompts, whose references the reward sees. reward: as in `operant.train`. tokenizer: a Codec, or
    a folder or hub id. `reset(options={"prompt": i})` chooses a prompt; otherwise it is drawn.
    Raises OperantError when there are no prompts, one is longer than the room for it, or a reward cannot be made.
    """

    metadata = {"render_modes": ["ansi"]}  # noqa: RUF012  Gymnasium's own form

    def __init__(
        self,
        prompts: Sequence[str | Prompt],
        reward: Any,
        tokenizer: Codec | str,
        *,
        max_tokens: int = 32,
        max_prompt_tokens: int | None = None,
        separator: str = "\n",
        dense: bool = False,
        render_mode: str | None = None,
    ) -> None:
        if not prompts:
            raise OperantError("there are no prompts to write from; give at least one")
        self.codec = tokenizer if isinstance(tokenizer, Codec) else Codec.load(tokenizer)
        self.prompts = [
            p if isinstance(p, Prompt) else Prompt(str(i), self.codec.encode_prompt(f"{p}{separator}"), text=p)
            for i, p in enumerate(prompts)
        ]
        longest = max(len(p.tokens) for p in self.prompts)
        self.room = longest if max_prompt_tokens is None else max_prompt_tokens
        if longest > self.room:
            raise OperantError(
                f"a prompt has {longest} tokens and max_prompt_tokens is {self.room}; raise it or shorten the prompt"
            )
        made = reward_by_name(reward, dense=dense or None) if isinstance(reward, str) else reward
        self.runner = RewardRunner(made, workers=0)
        self.max_tokens, self.render_mode = max_tokens, render_mode
        self.nothing = self.codec.vocab_size
        self.observation_space = spaces.MultiDiscrete([self.nothing + 1] * (self.room + max_tokens))
        self.action_space = spaces.Discrete(self.nothing)
        self._prompt = self.prompts[0]
        self._tokens: list[int] = []
        self._paid = 0.0
        self._session: Any = None
        self._text = self.codec.incremental()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Ints, dict[str, Any]]:
        """Begin a text. Returns (state int64[max_prompt_tokens + max_tokens], {"prompt": text})."""
        super().reset(seed=seed)
        chosen = (options or {}).get("prompt")
        number = int(self.np_random.integers(len(self.prompts))) if chosen is None else int(chosen)
        self._prompt, self._tokens, self._paid = self.prompts[number], [], 0.0
        self._text = self.codec.incremental()
        self._session = self.runner.reward.start(self._prompt) if self.runner.reward.streaming else None
        return self._observation(), {"prompt": self._prompt.text}

    def step(self, action: np.int64) -> tuple[Ints, float, bool, bool, dict[str, Any]]:
        """Write one token. Returns (state int64[max_prompt_tokens + max_tokens], reward, terminated, truncated, info).

        `info["text"]`: what was written, at the end. Raises gymnasium's ResetNeeded when the text has ended.
        """
        token = int(action)
        if len(self._tokens) >= self.max_tokens or (self._tokens and self._tokens[-1] in self.codec.end_ids):
            raise gymnasium.error.ResetNeeded("the text has ended; call reset()")
        piece = self._text.push(token)
        self._tokens.append(token)
        terminated = token in self.codec.end_ids
        info: dict[str, Any] = {}
        if self._session is not None:
            try:
                answer = self._session.step(token, piece)
                terminated = terminated or isinstance(answer, Stop)
                paid = answer.reward if isinstance(answer, Stop) else answer
                reward = 0.0 if paid is None else float(paid)
                if paid is None:
                    info["missing"] = "none: the reward returned None"
            except Exception as error:
                reward, info["missing"] = 0.0, f"raised: {type(error).__name__}: {error}"
        truncated = not terminated and len(self._tokens) >= self.max_tokens
        if self._session is None:
            reward = self._earned(terminated or truncated, info)
        if terminated or truncated:
            info["text"] = self._text.text
        return self._observation(), reward, terminated, truncated, info

    def render(self) -> str | None:
        """The prompt and what is written so far, in render mode "ansi"."""
        return f"{self._prompt.text}\n{self._text.text}" if self.render_mode == "ansi" else None

    def close(self) -> None:
        """End the reward's threads."""
        self.runner.close()

    def _earned(self, ended: bool, info: dict[str, Any]) -> float:
        if not (ended or self.runner.reward.dense):
            return 0.0
        tokens = np.array(self._tokens, np.int64)
        text, ends = self.codec.text_and_ends(tokens)
        completion = Completion(
            "text", self._prompt.id, text, tokens, ends, text_reach=self.codec.reach(tokens),
            sampled=np.ones(len(tokens), np.bool_), truncated=ended and tokens[-1] not in self.codec.end_ids,
        )  # fmt: skip
        (rewarded,) = self.runner.run([(self._prompt, completion)], update=ended)
        if not rewarded.observed.all():
            info["missing"] = rewarded.missing or "partial: some tokens have no reward"
            return 0.0
        total = float(rewarded.rewards.sum())
        earned, self._paid = total - self._paid, total
        return earned

    def _observation(self) -> Ints:
        out = np.full(self.room + self.max_tokens, self.nothing, np.int64)
        out[self.room - len(self._prompt.tokens) : self.room] = self._prompt.tokens
        out[self.room : self.room + len(self._tokens)] = self._tokens
        return out


class HigherLower(gymnasium.Env[str, str]):
    """Guess a hidden number from 1 to `highest` within `turns` turns; a wrong guess is answered by "higher" or "lower".

    The first guess is right once in `highest`; whoever halves what is left always wins within ⌈log₂(highest + 1)⌉
    turns. Winning pays 1. What is no number from 1 to `highest` is a lost turn, answered by "what".
    """

    metadata = {"render_modes": []}  # noqa: RUF012  Gymnasium's own form

    def __init__(self, highest: int = 7, turns: int = 3) -> None:
        self.highest, self.turns = highest, turns
        self.observation_space = spaces.Text(max_length=16, min_length=0, charset=string.ascii_lowercase + " ")
        self.action_space = spaces.Text(max_length=16, min_length=0, charset=string.printable)
        self._hidden = self._turn = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Hide a number. Returns ("guess", {})."""
        super().reset(seed=seed)
        self._hidden, self._turn = int(self.np_random.integers(1, self.highest + 1)), 0
        return "guess", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Guess. Returns (what is answered, 1.0 for the hidden number else 0.0, whether it is over, False, {"won"})."""
        self._turn += 1
        said = action.strip()
        guess = int(said) if said.isdecimal() and len(said) < 10 else 0
        won, over = guess == self._hidden, self._turn >= self.turns
        answer = "right" if won else "what" if not 1 <= guess <= self.highest else (
            "higher" if guess < self._hidden else "lower"
        )  # fmt: skip
        return answer, float(won), won or over, False, {"won": won}


for _name, _class in (("Text", TextEnv), ("HigherLower", HigherLower)):
    if f"operant/{_name}-v0" not in gymnasium.registry:
        gymnasium.register(id=f"operant/{_name}-v0", entry_point=f"{__name__}:{_class.__name__}")
