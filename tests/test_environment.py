"""Writing a text as a Gymnasium environment, and Gymnasium environments over text as episodes to learn from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from runs import assert_same_run, logged, quick, settings

from operant.algorithms import credit
from operant.algorithms.estimator import Estimator, Rollout
from operant.algorithms.q_learning import ReplayBuffer
from operant.algorithms.table import resolve
from operant.cli import main
from operant.config import SftConfig, TrainConfig
from operant.data.batch import completion_axes, drawn, from_trajectories, gather, scatter, turn_discounts
from operant.data.text import Codec
from operant.models.policy import Policy
from operant.models.sampler import Sampler
from operant.rewards import Stop
from operant.rl.environment import HigherLower, TextEnv
from operant.rl.episodes import Player, environment_by_name
from operant.rl.loop import train
from operant.stages import sft
from operant.types import Completion, OperantError, Prompt, Sampling, Trajectory

# --- operant/Text-v0 -------------------------------------------------------------------------------------------------


class Vowels:
    """A streaming reward: one for each vowel, and the end at an x."""

    def start(self, prompt: Prompt) -> Vowels:
        return self

    def step(self, token: int, text: str) -> float | Stop:
        return Stop(-1.0) if "x" in text else float(sum(c in "aeiou" for c in text))


def asked(codec: Codec, text: str, *references: str) -> Prompt:
    return Prompt(text, codec.encode_prompt(f"{text}\n"), text=text, references=references)


def write(environment: Any, codec: Codec, text: str, end: bool = True, **options: Any) -> list[tuple[Any, ...]]:
    environment.reset(seed=0, options=options or None)
    out = []
    for token in codec.encode(text, eos=end).tolist():
        out.append(environment.step(token))
        if out[-1][2] or out[-1][3]:
            break
    return out


@pytest.mark.filterwarnings("ignore:.*Box observation space.*")
def test_it_passes_gymnasiums_own_checker(codec: Codec) -> None:
    made = gymnasium.make("operant/Text-v0", prompts=["one", "two three"], reward=Vowels(), tokenizer=codec)
    check_env(made.unwrapped, skip_render_check=True)
    assert isinstance(made.unwrapped, TextEnv)
    assert made.action_space == spaces.Discrete(codec.vocab_size)


def test_the_state_is_the_prefix_and_the_ends_are_told_apart(codec: Codec) -> None:
    environment = TextEnv(["one", "two three"], Vowels(), codec, max_tokens=4)
    observation, info = environment.reset(options={"prompt": 0})
    nothing, room = codec.vocab_size, environment.room
    prompt = codec.encode_prompt("one\n").tolist()
    assert info == {"prompt": "one"} and len(observation) == room + 4
    assert observation.tolist() == [nothing] * (room - len(prompt)) + prompt + [nothing] * 4
    letters = codec.encode("aab").tolist()
    rows = [environment.step(t) for t in letters]
    assert rows[-1][0][room:].tolist() == [*letters, nothing] and environment.observation_space.contains(rows[-1][0])
    assert [r[1] for r in rows] == [1.0, 1.0, 0.0] and not any(r[2] or r[3] for r in rows)
    last = environment.step(letters[0])
    assert last[2:4] == (False, True) and last[4]["text"] == "aaba"
    with pytest.raises(gymnasium.error.ResetNeeded):
        environment.step(letters[0])
    assert write(environment, codec, "a")[-1][2:4] == (True, False)  # the end-of-text token
    stopped = write(environment, codec, "ax", end=False)[-1]
    assert stopped[1] == -1.0 and stopped[2:4] == (True, False)


@pytest.mark.parametrize("dense", [True, False])
def test_an_episode_is_paid_what_the_completion_is_worth(dense: bool, codec: Codec) -> None:
    prompts = [asked(codec, "say", "the cat sat on the mat")]
    environment = TextEnv(prompts, "chrf", codec, dense=dense, max_tokens=20)
    rows = write(environment, codec, "the cat is on a mat")
    rewards = [r[1] for r in rows]
    text = rows[-1][4]["text"]
    whole = environment.runner.run([(prompts[0], completion_of(codec, text))])[0]
    assert sum(rewards) == pytest.approx(float(whole.rewards.sum())) and sum(rewards) > 0.3
    assert (sum(x != 0 for x in rewards) > 3) == dense
    assert [r[1] for r in rows] == [r[1] for r in write(environment, codec, "the cat is on a mat")]


def completion_of(codec: Codec, text: str) -> Completion:
    tokens = codec.encode(text, eos=True)
    said, ends = codec.text_and_ends(tokens)
    return Completion("c", "p", said, tokens, ends)


def test_a_missing_reward_is_told_and_never_a_number_of_its_own(codec: Codec) -> None:
    environment = TextEnv(["one"], quick(lambda prompt, completion: None), codec)
    last = write(environment, codec, "ab")[-1]
    assert last[1] == 0.0 and last[4]["missing"].startswith("none")


class Faulty:
    """A streaming reward that fails at its second token."""

    def __init__(self, fault: str) -> None:
        self.fault, self.seen = fault, 0

    def start(self, prompt: Prompt) -> Faulty:
        return Faulty(self.fault)

    def step(self, token: int, text: str) -> float | None:
        self.seen += 1
        if self.seen == 2:
            if self.fault == "raise":
                raise ValueError("boom")
            return None
        return 1.0


@pytest.mark.parametrize(("fault", "told"), [("raise", "raised: ValueError: boom"), ("none", "none: ")])
def test_a_streaming_reward_that_fails_is_told_and_pays_nothing_there(codec: Codec, fault: str, told: str) -> None:
    rows = write(TextEnv(["one"], Faulty(fault), codec, max_tokens=3), codec, "abc")
    assert [row[1] for row in rows] == [1.0, 0.0, 1.0]
    assert rows[1][4]["missing"].startswith(told) and "missing" not in rows[2][4]


def test_several_run_side_by_side(codec: Codec) -> None:
    vector = gymnasium.make_vec(
        "operant/Text-v0", 3, "sync", prompts=["one"], reward=Vowels(), tokenizer=codec, max_tokens=3
    )
    observations, _ = vector.reset(seed=1)
    assert observations.shape == (3, len(codec.encode_prompt("one\n")) + 3)
    letters = [codec.encode(c)[0] for c in "abe"]
    _, rewards, _, _, _ = vector.step(np.array(letters))
    assert rewards.tolist() == [1.0, 0.0, 1.0]
    vector.close()


def test_what_cannot_be_an_environment_is_refused(codec: Codec) -> None:
    with pytest.raises(OperantError, match="no prompts"):
        TextEnv([], Vowels(), codec)
    with pytest.raises(OperantError, match="max_prompt_tokens is 1"):
        TextEnv(["one two three"], Vowels(), codec, max_prompt_tokens=1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the peer's own making
def test_stable_baselines_trains_on_it(codec: Codec) -> None:
    sb3 = pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")
    environment = TextEnv(["one"], Vowels(), codec, max_tokens=4)
    model = sb3.PPO("MlpPolicy", environment, n_steps=128, batch_size=64, learning_rate=3e-3, seed=0, device="cpu")

    def earned() -> float:
        total = 0.0
        for seed in range(30):
            observation, _ = environment.reset(seed=seed)
            over = False
            while not over:
                action, _ = model.predict(observation)
                observation, reward, terminated, truncated, _ = environment.step(action)
                total, over = total + reward, terminated or truncated
        return total / 30

    before = earned()
    model.learn(3000)
    assert earned() > before + 0.5


# --- episodes --------------------------------------------------------------------------------------------------------


class Echo(gymnasium.Env[str, str]):
    """Three turns; pays the turn's number, and 0.5 for the action's first character as a span."""

    def __init__(self, fault: str = "", truncate: bool = False) -> None:
        self.observation_space = spaces.Text(64, min_length=0)
        self.action_space = spaces.Text(64, min_length=0)
        self.fault, self.truncate, self.turn, self.heard = fault, truncate, 0, []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.turn, self.heard = 0, []
        return "begin", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.turn += 1
        self.heard.append(action)
        if self.fault == "raise":
            raise ValueError("out of order")
        over = self.turn == 3
        info: Any = {"spans": [(0, 1, 0.5)]} if action else {}
        reward: Any = float("nan") if self.fault == "nan" else float(self.turn)
        if self.fault == "no reward":
            reward = None
        if self.fault == "reward list":
            reward = [1.0]
        if self.fault == "bad span":
            info = {"spans": [(0, 1)]}
        if self.fault == "no info":
            info = None
        return f"turn {self.turn}", reward, over and not self.truncate, over and self.truncate, info


class Numbers(gymnasium.Env[int, int]):
    observation_space = spaces.Discrete(3)
    action_space = spaces.Discrete(3)


CONFIG = TrainConfig(environment=f"{__name__}:Echo", max_tokens=3, algorithm="rloo")
GAMES = [("a", 1), ("a", 1), ("b", 2)]


def played(policy: Policy, config: TrainConfig = CONFIG, **options: Any) -> tuple[Player, list[Trajectory]]:
    player = Player(str(config.environment), config, policy, Sampler(policy), **options)
    return player, player.play(GAMES, Sampling(max_tokens=config.max_tokens, seed=3))


@pytest.mark.parametrize("truncate", [False, True])
def test_what_the_environment_says_is_context_and_every_turn_is_paid_where_it_ends(
    truncate: bool, make_policy: Callable[..., Policy]
) -> None:
    policy = make_policy("gpt2", context=96)
    player, trajectories = played(policy, truncate=truncate)
    codec = policy.codec
    for environment, t in zip(player.environments, trajectories, strict=True):
        c = t.completion
        assert c.sampled is not None and c.behavior_logprobs is not None
        assert t.prompt.tokens.tolist() == codec.encode_prompt("begin\n").tolist() and c.meta["turns"] == 3
        places = drawn(c)
        turns = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
        said = [codec.text_and_ends(c.tokens[turn])[0] for turn in turns]
        assert len(turns) == 3 and said == environment.heard
        context = [codec.encode(f"\nturn {i + 1}\n").tolist() for i in range(3 if truncate else 2)]
        assert c.tokens[~c.sampled].tolist() == [token for row in context for token in row]
        spans = [0.5 if text else 0.0 for text in said]
        assert [float(t.rewards[turn].sum()) for turn in turns] == [1 + spans[0], 2 + spans[1], 3 + spans[2]]
        assert all(float(t.rewards[turn[-1]]) >= i + 1 for i, turn in enumerate(turns))
        assert not t.rewards[~c.sampled].any() and not c.behavior_logprobs[~c.sampled].any()
        assert c.truncated == truncate
    assert trajectories[0].completion.tokens.tolist() != trajectories[1].completion.tokens.tolist()


@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_the_learner_sees_the_probabilities_that_the_sampler_drew_from(
    family: str, make_policy: Callable[..., Policy]
) -> None:
    policy = make_policy(family, context=96)
    _, trajectories = played(policy)
    batch = from_trajectories(trajectories, encoder=family != "llama", pad_id=policy.codec.pad_id)
    assert batch.behavior_logprobs is not None and len(batch.tokens) == (3 if family == "llama" else 9)
    with torch.no_grad():
        now = policy.logprobs(batch).logprobs
    torch.testing.assert_close(now, batch.behavior_logprobs, atol=1e-4, rtol=1e-4)
    assert int(batch.action_mask.sum()) == sum(len(drawn(t.completion)) for t in trajectories)


def test_an_encoder_reads_the_episode_so_far_and_each_turn_is_a_row(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy("t5", context=96)
    player, trajectories = played(policy)
    codec = policy.codec
    batch = from_trajectories(trajectories, encoder=True, pad_id=codec.pad_id)
    assert batch.context is not None
    row = 0
    for environment, t in zip(player.environments, trajectories, strict=True):
        c = t.completion
        assert c.turns is not None and len(c.turns) == c.meta["turns"] == 3
        read = codec.encode_prompt("begin", encoder=True).tolist()
        assert read == t.prompt.tokens.tolist()
        for number, (start, end) in enumerate(c.turns):
            source = batch.context.row[row]
            assert batch.context.tokens[source][batch.context.mask[source]].tolist() == read
            assert batch.tokens[row][batch.action_mask[row]].tolist() == c.tokens[start:end].tolist()
            assert codec.text_and_ends(c.tokens[start:end])[0] == environment.heard[number]
            read += [*c.tokens[start:end].tolist(), *codec.encode(f"\nturn {number + 1}", eos=True).tolist()]
            row += 1
    assert row == len(batch.tokens) == 9


def test_a_reader_of_the_whole_episode_is_cut_off_where_it_can_read_no_more(make_policy: Callable[..., Policy]) -> None:
    _, trajectories = played(make_policy("bart", context=24))
    for t in trajectories:
        c = t.completion
        assert c.truncated and c.turns is not None and 1 <= len(c.turns) < 3
        assert len(t.prompt.tokens) + c.turns[-1][0] <= 24


@pytest.mark.parametrize("normalisation", ["per_completion", "per_token", "per_sequence_mean", "constant"])
def test_turns_in_rows_weigh_what_they_weigh_in_one(normalisation: Any, make_policy: Callable[..., Policy]) -> None:
    _, trajectories = played(make_policy("t5", context=96))
    made = {"pad_id": 0, "normalisation": normalisation, "constant": 7.0}
    apart = from_trajectories(trajectories, encoder=True, **made)
    whole = from_trajectories(trajectories, encoder=False, **made)  # as if a decoder had played them
    assert apart.denominator == whole.denominator
    rewards, mask, _ = completion_axes(trajectories)
    for batch in (apart, whole):
        torch.testing.assert_close(gather(batch, scatter(batch, rewards, trajectories), trajectories), rewards)
        assert batch.rewards is not None
        torch.testing.assert_close(gather(batch, batch.rewards, trajectories), rewards)
    weights = [gather(batch, batch.weights, trajectories) for batch in (apart, whole)]
    torch.testing.assert_close(*weights)
    assert bool((weights[0][mask] > 0).all())
    buffer = ReplayBuffer.empty(9, 0.0)
    buffer.load_json(json.loads(json.dumps(ReplayBuffer(9, 0.0, trajectories, [1.0] * 3).to_json())))
    assert [t.completion.turns for t in buffer.rows] == [t.completion.turns for t in trajectories]


def by_hand(flags: list[int], rewards: list[float], gamma: float, gamma_turn: float) -> list[float]:
    """Returns of the drawn tokens: γ for every drawn token, γ_turn for every turn, nothing for what was answered."""
    out = []
    for t in [i for i, f in enumerate(flags) if f]:
        total, factor, between = 0.0, 1.0, False
        for k in range(t, len(flags)):
            if flags[k]:
                factor *= (gamma_turn if between else 1.0) if k > t else 1.0
                total += factor * rewards[k]
                factor *= gamma
                between = False
            else:
                between = True
        out.append(total)
    return out


@pytest.mark.parametrize(("gamma", "gamma_turn"), [(1.0, 1.0), (0.9, 1.0), (1.0, 0.5), (0.9, 0.5), (0.8, 0.0)])
def test_tokens_and_turns_are_discounted_and_observations_cost_nothing(gamma: float, gamma_turn: float) -> None:
    patterns = [[1, 1, 0, 0, 1, 0, 1, 1], [1, 0, 1], [1, 1, 1, 1]]
    generator = np.random.default_rng(0)
    rows, expected = [], []
    for number, flags in enumerate(patterns):
        sampled = np.array(flags, np.bool_)
        rewards = np.where(sampled, generator.integers(-3, 4, len(flags)), 0).astype(float)
        completion = Completion(
            str(number), "p", "", np.arange(5, 5 + len(flags)), np.zeros(len(flags), np.int64), sampled=sampled,
            behavior_logprobs=np.zeros(len(flags), np.float32),
        )  # fmt: skip
        rows.append(Trajectory(Prompt("p", np.array([3, 4])), completion, rewards, np.ones(len(flags), np.bool_)))
        expected.append(by_hand(flags, rewards.tolist(), gamma, gamma_turn))
    rewards, mask, valid = completion_axes(rows)
    assert mask.sum(1).tolist() == [5, 2, 4] and bool(valid.all())
    discounts = turn_discounts(rows, gamma, gamma_turn)
    returns = credit.returns_to_go(rewards, mask, discounts)
    for i, row in enumerate(expected):
        assert returns[i, : len(row)].tolist() == pytest.approx(row)
    # the weight of each term of the discounted objective is that of its reward
    weights = credit.discount_weights(mask, discounts)
    torch.testing.assert_close((weights * rewards).sum(1), returns[:, 0])
    # λ = 1 without values is the same sum
    torch.testing.assert_close(
        credit.gae(rewards, torch.zeros_like(rewards), mask, gamma=discounts, lam=1.0)[0], returns
    )
    placed = scatter(from_trajectories(rows, encoder=False, pad_id=0), returns, rows)
    for i, flags in enumerate(patterns):
        assert [bool(x) for x in placed[i, 2 : 2 + len(flags)] != 0] == [
            bool(f) and abs(expected[i][sum(flags[:k])]) > 0 for k, f in enumerate(flags)
        ]


@pytest.mark.parametrize("family", ["gpt2", "bart"])
@pytest.mark.parametrize("algorithm", ["rloo", "ppo", "reinforce", "trpo"])
def test_only_drawn_tokens_have_an_advantage(algorithm: str, family: str, make_policy: Callable[..., Policy]) -> None:
    policy = make_policy(family, context=96)
    config = TrainConfig(environment="x", algorithm=algorithm, gamma_turn=0.5, max_tokens=3)
    resolved = resolve(config, dense=False)
    if resolved.critic:
        policy.add_critic()
        resolved = dataclasses.replace(resolved, lam=1.0)
    _, trajectories = played(policy)
    batch, _ = Estimator(policy, config, resolved, {})(Rollout(trajectories, trajectories))
    assert batch.advantages is not None and batch.returns is not None
    assert not batch.advantages[~batch.action_mask].any() and not batch.weights[~batch.action_mask].any()
    assert batch.advantages[batch.action_mask].any()
    first = batch.returns[2, len(trajectories[2].prompt.tokens)] if family == "gpt2" else batch.returns[6, 0]
    rewards, mask, _ = completion_axes(trajectories)
    assert float(first) == pytest.approx(
        float(credit.returns_to_go(rewards, mask, turn_discounts(trajectories, 1.0, 0.5))[2, 0])
    )


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("raise", "raised: ValueError: out of order"), ("nan", "nan:"), ("no reward", "none: the environment"),
     ("reward list", "raised: TypeError"), ("bad span", "raised: ValueError")],
)  # fmt: skip
def test_an_environment_that_fails_costs_its_episode_the_reward(
    fault: str, reason: str, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    _, trajectories = played(make_policy("gpt2", context=96), fault=fault)
    for t in trajectories:
        assert t.missing is not None and t.missing.startswith(reason)
        assert not t.observed.any() and np.isnan(t.rewards).all()


def test_environments_are_closed_when_the_run_ends_or_fails(
    make_policy: Callable[..., Policy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    monkeypatch.setattr(Echo, "close", lambda self: closed.append("closed"))
    config = settings(tmp_path / "run", environment=f"{__name__}:Echo", max_tokens=2, steps=1, eval_prompts=2)
    train(make_policy("gpt2", context=96), config=config, quiet=True)
    assert len(closed) == config.prompts_per_step * config.group_size + 2

    def stop(step: int, metrics: dict[str, float]) -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(make_policy("gpt2", context=96), config=config, overwrite=True, callbacks=[stop], quiet=True)
    assert len(closed) == 2 * (config.prompts_per_step * config.group_size + 2)


def test_an_episode_ends_where_turns_or_the_context_do(make_policy: Callable[..., Policy]) -> None:
    config = TrainConfig(environment=CONFIG.environment, max_tokens=3, max_turns=2)
    _, short = played(make_policy("gpt2", context=96), config)
    assert all(t.completion.meta["turns"] == 2 and t.completion.truncated for t in short)
    _, cramped = played(make_policy("gpt2", context=24))
    assert all(t.completion.truncated and len(t.prompt.tokens) + len(t.completion.tokens) <= 24 for t in cramped)


def test_what_cannot_be_played_is_refused(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    for name, told in [
        ("nowhere:Thing", "cannot be made"), (f"{__name__}:Nothing", "cannot be made"),
        ("operant/Nothing-v0", "cannot be made"), (f"{__name__}:Numbers", "texts"),
    ]:  # fmt: skip
        with pytest.raises(OperantError, match=told) as caught:
            environment_by_name(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(OperantError, match="leave prompts and reward out"):
        train(make_policy("gpt2"), [Prompt("p", np.array([5]))], config=settings(tmp_path, environment="x"))
    with pytest.raises(OperantError, match="'bleu' is not measured"):
        train(make_policy("gpt2"), config=settings(tmp_path, environment="x", best_metric="bleu"))
    for options, told in [
        ({"gamma_turn": 0.5}, "a completion is one turn"),
        ({"environment": "x", "algorithm": "dapo"}, "no dynamic sampling"),
        ({"environment": "x", "algorithm": "remax"}, "episodes"),
        ({"environment": "x", "algorithm": "grpo", "gamma_turn": 0.5}, "ignores the discount"),
        ({"environment": "x", "sft_coef": 0.5}, "leave --sft_coef out"),
    ]:
        with pytest.raises(OperantError, match=told):
            resolve(TrainConfig(**options), dense=False)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_a_resumed_run_plays_the_episodes_that_the_whole_one_plays(
    family: str, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    def run(name: str, steps: int, resume: bool = False) -> None:
        config = settings(
            tmp_path / name, environment=f"{__name__}:Echo", max_tokens=2, steps=steps, resume=resume, eval_prompts=2,
        )  # fmt: skip
        train(make_policy(family, context=96), config=config, quiet=True)

    run("whole", 4)
    run("parts", 2)
    run("parts", 4, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


# --- a game that takes several turns ---------------------------------------------------------------------------------


def test_the_game_is_won_by_halving_and_not_by_luck() -> None:
    game = HigherLower(highest=7, turns=3)
    check_env(gymnasium.make("operant/HigherLower-v0").unwrapped, skip_render_check=True)
    halved, guessed = 0.0, 0.0
    for seed in range(60):
        low, high, over = 1, 7, False
        assert game.reset(seed=seed)[0] == "guess"
        while not over:
            middle = (low + high) // 2
            answer, reward, over, _, _ = game.step(f" {middle} ")
            low, high = (middle + 1, high) if answer == "higher" else (low, middle - 1)
            halved += reward
        game.reset(seed=seed)
        guessed += game.step("4")[1]
    assert halved == 60 and 0 < guessed < 25
    game.reset(seed=0)
    assert [game.step(text)[0] for text in ("", "12", "x")] == ["what"] * 3


class Letters(Echo):
    """Won by three turns that are letters; the first other one loses. Each letter pays a third."""

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.turn += 1
        right = action.isascii() and action.isalpha()
        return f"{self.turn}", right / 3, not right or self.turn == 3, False, {}


@pytest.mark.parametrize(
    ("family", "algorithm"),
    [("gpt2", "rloo"), ("bart", "rloo"), ("t5", "ppo"), ("bart", "trpo"), ("bart", "double_q")],
)
def test_reward_rises_over_several_turns(
    family: str, algorithm: str, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    policy = make_policy(family)
    with torch.no_grad():  # flat enough to explore
        policy.model.get_input_embeddings().weight.mul_(0.2)
    config = settings(
        tmp_path / "run", environment=f"{__name__}:Letters", max_tokens=1, steps=36, prompts_per_step=8, group_size=4,
        lr=1e-2, gamma_turn=0.9, eval_every=12, eval_prompts=4, algorithm=algorithm,
    )  # fmt: skip
    if algorithm == "trpo":
        config = dataclasses.replace(config, delta=0.05, damping=0.01, steps=24)
    result = train(policy, config=config, quiet=True)
    won, turns = (logged(tmp_path / "run", f"train/{name}") for name in ("reward_mean", "turns"))
    assert np.mean(won[:3]) < 0.4 and np.mean(won[-3:]) > np.mean(won[:3]) + 0.3
    assert turns[0] < 2 < turns[-1]
    assert result.best["reward"] >= result.first["reward"] and result.best["turns"] == 3


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "lr", "steps"), [("gpt2", "3e-4", 30), ("mbart", "1e-3", 60)])
def test_a_policy_learns_to_win_a_game_of_several_turns(
    arch: str, lr: str, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two turns for three numbers: without reading the answer no more than two games of three can be won."""
    generator = np.random.default_rng(0)
    heard = [f"\n{number}\n{word}" for number in (1, 2, 3) for word in ("higher", "lower")]
    rows = [
        {"prompt": f"guess{before}", "completion": str(generator.integers(1, 4))}
        for _ in range(300)
        for before in ("", str(generator.choice(heard)))
    ]
    data = tmp_path / "moves.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sft(
        SftConfig(
            data=str(data), arch=arch, size="tiny", vocab_size=270, max_length=48, steps=40, lr=2e-3,
            out=str(tmp_path / "sft"), device="cpu", tensorboard=False, eval_every=40, patience=0,
        ),
        quiet=True,
    )  # fmt: skip
    (tmp_path / "small.py").write_text(
        "from operant.rl.environment import HigherLower\n\n\ndef Small():\n    return HigherLower(highest=3, turns=2)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    main(
        [
            "train", "--model", str(tmp_path / "sft" / "model"), "--environment", "small:Small", "--max_tokens", "2",
            "--algorithm", "ppo", "--group_size", "1", "--prompts_per_step", "96", "--epochs", "2", "--lr", lr,
            "--steps", str(steps), "--device", "cpu", "--out", str(tmp_path / "run"), "--eval_prompts", "24",
            "--eval_every", "10", "--tensorboard", "false",
        ]
    )  # fmt: skip
    assert np.mean(logged(tmp_path / "run", "train/reward_mean")[:4]) < 0.65
    assert max(logged(tmp_path / "run", "eval/reward")) > 0.9
