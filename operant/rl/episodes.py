"""Gymnasium environments over text as a source of completions: episodes of several turns, each paid as it is played."""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from operant.algorithms.estimator import Rollout
from operant.config import TrainConfig, install_line
from operant.data.batch import drawn
from operant.data.prompts import PromptFormat
from operant.models.policy import LanguagePolicy, Policy
from operant.rewards import RewardRunner, reward_trajectory
from operant.rl.heldout import HeldOut, check_measured
from operant.rl.rollouts import rollout_sampling
from operant.run.run import Run, mixed_seed
from operant.types import Batch, Completion, Ints, OperantError, Prompt, SamplerProtocol, Sampling, Span, Trajectory

NAME = "environment"


def environment_by_name(name: str, **options: Any) -> Any:
    """A new environment from its Gymnasium id (`operant/HigherLower-v0`, `package:Id-v0`) or from `module:Class`.

    Raises OperantError when Gymnasium or the environment is not there, or when its spaces are no texts.
    """
    try:
        import gymnasium
    except ImportError as error:
        raise OperantError(f"environments need Gymnasium: {install_line(extra='gym')}") from error
    import operant.rl.environment  # noqa: F401  its ids are known after this

    try:
        module_name, _, path = name.partition(":")
        if path and "/" not in path and not path.rpartition("-v")[2].isdecimal():
            if os.getcwd() not in sys.path:  # an environment beside the data, as with rewards
                sys.path.insert(0, os.getcwd())
            made = getattr(importlib.import_module(module_name), path)(**options)
        else:
            made = gymnasium.make(name, **options)
    except OperantError:
        raise
    except Exception as error:  # of the user's module, or Gymnasium's own for an unknown id
        first = (str(error).strip().splitlines() or [""])[0]
        raise OperantError(
            f"environment {name!r} cannot be made ({type(error).__name__}: {first}); give an id or module:Class"
        ) from error
    for which in ("observation_space", "action_space"):
        space = getattr(made, which, None)
        if not isinstance(space, gymnasium.spaces.Text):
            raise OperantError(
                f"environment {name!r} has {which} {space}, and a language model reads and writes texts; "
                "give one whose spaces are gymnasium.spaces.Text"
            )
    return made


@dataclass(slots=True)
class _Episode:
    """One game under way. tokens … rewards run along everything after the prompt, whoever wrote it."""

    name: str
    environment: Any
    prompt: Prompt
    tokens: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    behavior: list[float] = field(default_factory=list)
    model: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    turns: list[tuple[int, int]] = field(default_factory=list)
    ended: bool = False
    truncated: bool = False
    fault: str = ""
    info: dict[str, Any] = field(default_factory=dict)

    def write(self, tokens: Sequence[int]) -> None:
        """What the environment says: context that nobody is taught."""
        for values, value in ((self.sampled, False), (self.behavior, 0.0), (self.model, 0.0), (self.versions, -1)):
            values += [value] * len(tokens)
        self.rewards += [0.0] * len(tokens)
        self.tokens += tokens


class Player:
    """Plays episodes with a policy, all of a call side by side.

    A turn is what the policy writes up to its end-of-text, a stop string or `max_tokens`; its text, without these, is
    the action. What `step` pays stands on the turn's last token; `info["spans"]`, a list of (start, end, value) on the
    action's characters, is paid beside it, token by token. Then the observation follows, between line breaks, as
    tokens that the policy did not draw. `truncated` is an episode that the environment, `max_turns` or the model's
    context cut off.

    A decoder reads on in one text. An encoder-decoder's encoder reads the episode so far, every part of it ended by its
    end-of-text, and its decoder writes each turn anew (`Completion.turns`).

    An environment that raises costs the episode its reward, with the reason, and nothing else.
    """

    def __init__(
        self, name: str, config: TrainConfig, policy: LanguagePolicy, sampler: SamplerProtocol, **options: Any
    ) -> None:
        self.name, self.config, self.policy, self.sampler, self.options = name, config, policy, sampler, options
        self.environments: list[Any] = []
        self.encoder = policy.family == "encoder-decoder"
        self.written = PromptFormat.fitting(policy, config)

    def play(self, games: Sequence[tuple[str, int]], sampling: Sampling) -> list[Trajectory]:
        """One episode for each of (group, seed of the environment); equal groups must have equal seeds.

        Returns trajectories in the games' order. Their arrays run along the T tokens after the prompt, whoever wrote
        them: rewards float64[T], `completion.sampled` bool[T]. An episode whose environment raised has no reward.

        Raises OperantError when an environment cannot be made or reset, or when its first observation is too long for
        the model.
        """
        while len(self.environments) < len(games):
            self.environments.append(environment_by_name(self.name, **self.options))
        copies: Counter[str] = Counter()
        episodes = []
        for environment, (group, seed) in zip(self.environments, games):
            episodes.append(self._begin(environment, group, copies[group], seed))
            copies[group] += 1
        for turn in range(self.config.max_turns):
            playing = [e for e in episodes if not e.ended]
            if not playing:
                break
            prompts = [
                Prompt(f"{e.name}/{turn}", np.concatenate([e.prompt.tokens, np.array(e.tokens, np.int64)]))
                for e in playing
            ]
            answers = self.sampler.sample(prompts, sampling)
            for episode, (answer,) in zip(playing, answers, strict=True):
                self._turn(episode, answer)
        return [self._finish(e, sampling) for e in episodes]

    def close(self) -> None:
        """Close the environments; `play` makes new ones."""
        for environment in self.environments:
            environment.close()
        self.environments.clear()

    def _begin(self, environment: Any, group: str, copy: int, seed: int) -> _Episode:
        try:
            observation, info = environment.reset(seed=seed % 2**31)
        except Exception as error:
            raise OperantError(
                f"environment {self.name!r} cannot be reset ({type(error).__name__}: {error}); mend it"
            ) from error
        codec = self.policy.codec
        tokens = self.written.encode(str(observation), codec)
        prompt = Prompt(group, tokens, text=str(observation), task=self.name)
        if len(tokens) >= self.policy.max_length + self.encoder:
            raise OperantError(
                f"the first observation of {self.name!r} has {len(tokens)} tokens and the model's context "
                f"{self.policy.max_length}; give a model with more, or a shorter observation"
            )
        return _Episode(f"{group}#{copy}", environment, prompt, info=dict(info or {}))

    def _turn(self, episode: _Episode, answer: Completion) -> None:
        assert answer.behavior_logprobs is not None and answer.model_logprobs is not None
        assert answer.policy_version is not None
        begun = len(episode.tokens)
        episode.turns.append((begun, begun + len(answer.tokens)))
        episode.tokens += answer.tokens.tolist()
        episode.sampled += [True] * len(answer.tokens)
        episode.behavior += answer.behavior_logprobs.tolist()
        episode.model += answer.model_logprobs.tolist()
        episode.versions += answer.policy_version.tolist()
        episode.rewards += [0.0] * len(answer.tokens)
        try:
            observation, reward, terminated, truncated, info = episode.environment.step(answer.text)
            episode.info = info or {}
            if reward is None:
                episode.fault, episode.ended = "none: the environment paid nothing", True
                return
            paid: list[Any] = [float(reward)]
            if "spans" in episode.info:
                paid.append([Span(int(a), int(b), float(value)) for a, b, value in episode.info["spans"]])
        except Exception as error:
            episode.fault, episode.ended = f"raised: {type(error).__name__}: {error}", True
            return
        for value in paid:
            placed = reward_trajectory(episode.prompt, answer, NAME, value)
            if placed.missing is not None:
                episode.fault, episode.ended = placed.missing, True
                return
            for t, amount in enumerate(placed.rewards.tolist()):
                episode.rewards[begun + t] += amount
        episode.ended, episode.truncated = bool(terminated or truncated), bool(truncated and not terminated)
        if terminated:
            return
        said = self._said(str(observation), ended=answer.stop_reason == "eos").tolist()
        room = self.policy.max_length + self.encoder - len(episode.prompt.tokens) - len(episode.tokens)
        if len(said) < room:
            episode.write(said)
        else:
            episode.ended = episode.truncated = True

    def _said(self, observation: str, *, ended: bool) -> Ints:
        """The ids of what the environment says after a turn, int64[P]; `ended`: the turn has ended itself."""
        codec, style = self.policy.codec, self.written.style(self.policy.codec)
        if style.chat:
            return codec.encode_reply(observation, style, ended=ended)
        return codec.encode(f"\n{observation}{'' if self.encoder else style.separator}", eos=self.encoder)

    def _finish(self, episode: _Episode, sampling: Sampling) -> Trajectory:
        codec = self.policy.codec
        tokens = np.array(episode.tokens, np.int64)
        text, ends = codec.text_and_ends(tokens)
        cut = episode.truncated or not episode.ended
        completion = Completion(
            id=episode.name, prompt_id=episode.prompt.id, text=text, tokens=tokens, text_ends=ends,
            text_reach=codec.reach(tokens),
            behavior_logprobs=np.array(episode.behavior, np.float32),
            model_logprobs=np.array(episode.model, np.float32),
            sampled=np.array(episode.sampled, np.bool_), policy_version=np.array(episode.versions, np.int64),
            stop_reason="length" if cut else "eos", truncated=cut, sampling=sampling,
            tokenizer_hash=codec.hash, template_hash=codec.template_hash,
            turns=tuple(episode.turns) if self.encoder else None,
            meta={"turns": len(episode.turns), "info": episode.info},
        )  # fmt: skip
        observed = np.full(len(tokens), not episode.fault)
        total = None if episode.fault else float(sum(episode.rewards))
        rewards = np.where(observed, np.array(episode.rewards, np.float64), np.nan)
        return Trajectory(episode.prompt, completion, rewards, observed, {NAME: total}, episode.fault or None)


class Episodes:
    """Takes the place of `rollouts.Rollouts` where an environment asks and pays: a group for each starting state."""

    stream = None

    def __init__(
        self,
        run: Run,
        config: TrainConfig,
        policy: LanguagePolicy,
        sampler: SamplerProtocol,
        runner: RewardRunner,
        state: dict[str, Any],
    ) -> None:
        assert config.environment is not None
        self.run, self.config, self.runner, self.state = run, config, runner, state
        self.player = Player(config.environment, config, policy, sampler)
        state.setdefault("drawn", run.step * config.prompts_per_step)
        state.setdefault("all_missing", 0)

    def take(self, step: int) -> Rollout:
        """`group_size` episodes from each of `prompts_per_step` starting states, which depend on the step alone."""
        config = self.config
        games = [
            (f"{step}.{i}", mixed_seed(config.seed, "start", step, i))
            for i in range(config.prompts_per_step)
            for _ in range(config.group_size)
        ]
        self.state["drawn"] += config.prompts_per_step
        trajectories = self.player.play(games, rollout_sampling(config, mixed_seed(config.seed, "sample", step)))
        for t in trajectories:
            self.runner.tally(t)
        if all(t.missing for t in trajectories):
            self.state["all_missing"] += 1
            if self.state["all_missing"] >= 3 or step == 0:
                self.run.stop(f"every reward was missing: {self.runner.explain()}", failed=True)
        else:
            self.state["all_missing"] = 0
        return Rollout(trajectories, trajectories)


class HeldOutEpisodes(HeldOut):
    """Measures greedy episodes from the same `eval_prompts` starting states every time."""

    def __init__(
        self,
        run: Run,
        config: TrainConfig,
        policy: Policy,
        sampler: SamplerProtocol,
        runner: RewardRunner,
        state: dict[str, Any],
    ) -> None:
        super().__init__(run, config, policy, sampler, (), runner, state)
        assert config.environment is not None
        self.player = Player(config.environment, config, policy, sampler)
        self.games = [(f"held-out.{i}", mixed_seed("held-out", i)) for i in range(config.eval_prompts)]

    @property
    def active(self) -> bool:
        """Whether there is anything to measure."""
        return bool(self.games)

    def look(self) -> dict[str, float]:
        greedy = dataclasses.replace(rollout_sampling(self.config, 0), temperature=0.0, suppress=True)
        trajectories = self.player.play(self.games, greedy)
        values = measured(trajectories)
        values["kl_ref"] = self.drift(self.episode_batch(trajectories[:64]))
        self.run.log.log(self.run.step, {f"eval/{name}": value for name, value in values.items()})
        self.run.log.samples(self.run.step, [
            {
                "prompt": t.prompt.text, "text": t.completion.text, "references": [],
                "stop_reason": t.completion.stop_reason,
                "reward": float(t.rewards.sum()) if t.observed.all() else None,
            }
            for t in trajectories[: self.config.log_samples]
        ])  # fmt: skip
        self.run.note(f"step {self.run.step}: held-out reward {values['reward']:.4g}, turns {values['turns']:.3g}")
        return values

    def episode_batch(self, trajectories: Sequence[Trajectory]) -> Batch:
        """Greedy episodes as the learner reads them, at temperature 1."""
        batch = self.policy.batch_of(trajectories)
        batch.temperature = torch.ones(len(batch.tokens))
        return batch


def check_episode_metric(flag: str, name: str) -> None:
    """Raises OperantError when held-out episodes do not measure `name`; `flag` is the option that asks for it."""
    check_measured(flag, name, ["reward", "reward_missing", "turns", "length", "truncated", "kl_ref"])


def measured(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Means over episodes: reward (missing ones left out), turns, drawn tokens, and the share that was cut off."""
    seen = [float(t.rewards.sum()) for t in trajectories if t.observed.all()]
    return {
        "reward": float(np.mean(seen)) if seen else math.nan,
        "reward_missing": float(len(trajectories) - len(seen)),
        "turns": float(np.mean([t.completion.meta["turns"] for t in trajectories])),
        "length": float(np.mean([len(drawn(t.completion)) for t in trajectories])),
        "truncated": float(np.mean([t.completion.truncated for t in trajectories])),
    }
