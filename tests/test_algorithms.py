from __future__ import annotations

from typing import Any

import pytest

from operant.algorithms import ALGORITHMS, resolve
from operant.config import TrainConfig
from operant.types import OperantError

OFTEN = {"group_size": 4}


@pytest.mark.parametrize(
    ("options", "dense", "baseline", "normalisation"),
    [
        ({"algorithm": "reinforce"}, False, "running", "per_completion"),
        ({"algorithm": "reinforce", "group_size": 1}, True, "running", "per_completion"),
        ({"algorithm": "rloo"}, False, "leave_one_out", "per_completion"),
        ({"algorithm": "rloo"}, True, "control_variate", "per_completion"),
        ({"algorithm": "rloo", "gamma": 0.9}, True, "position_leave_one_out", "per_completion"),
        ({"algorithm": "grpo"}, False, "group_scaled", "per_sequence_mean"),
        ({"algorithm": "ppo", "epochs": 4}, False, "leave_one_out", "per_completion"),
        ({"algorithm": "ppo", "baseline": "batch", "normalisation": "constant"}, True, "batch", "constant"),
    ],
)
def test_auto_is_what_the_papers_say(options: dict[str, Any], dense: bool, baseline: str, normalisation: str) -> None:
    recipe = resolve(TrainConfig(**{**OFTEN, **options}), dense=dense)
    assert (recipe.baseline, recipe.normalisation) == (baseline, normalisation)
    assert recipe.algorithm is ALGORITHMS[options["algorithm"]]


@pytest.mark.parametrize(
    ("options", "dense", "told"),
    [
        ({"algorithm": "rlo"}, False, "did you mean 'rloo'"),
        ({"algorithm": "zzz"}, False, "there are: reinforce, rloo, grpo, ppo"),
        ({"baseline": "leave_one"}, False, "did you mean 'leave_one_out'"),
        ({"normalisation": "per_tokens"}, False, "did you mean 'per_token'"),
        ({"group_size": 1}, False, "--group_size 2"),
        ({"group_size": 1, "algorithm": "grpo"}, False, "--group_size 2"),
        ({"group_size": 1, "algorithm": "reinforce", "baseline": "position_leave_one_out"}, True, "--group_size 2"),
        ({"algorithm": "grpo"}, True, "sum a dense reward"),
        ({"algorithm": "rloo", "baseline": "group_scaled"}, True, "sum a dense reward"),
        ({"algorithm": "grpo", "gamma": 0.9}, False, "ignores the discount"),
        ({"algorithm": "rloo", "baseline": "group_scaled", "gamma": 0.9}, False, "ignores the discount"),
        ({"baseline": "control_variate"}, False, "add --dense"),
        ({"baseline": "control_variate", "gamma": 0.9}, True, "position_leave_one_out"),
        ({"algorithm": "rloo", "epochs": 2}, False, "--algorithm ppo"),
        ({"algorithm": "reinforce", "minibatches": 2}, False, "--algorithm ppo"),
        ({"top_p": 0.8}, False, "--top_p 1"),
        ({"top_k": 5}, False, "--top_k 0"),
        ({"temperature": 0.0}, False, "--temperature 1"),
        ({"algorithm": "grpo", "kl_in": "reward", "kl_coef": 0.1}, False, "--kl_in loss"),
        ({"gamma": 1.1}, False, "between 0 and 1"),
        ({"gamma": -0.1}, False, "between 0 and 1"),
        ({"group_size": 0}, False, "group_size is 0"),
        ({"prompts_per_step": 0}, False, "prompts_per_step is 0"),
        ({"steps": 0}, False, "steps is 0"),
        ({"max_tokens": 0}, False, "max_tokens is 0"),
        ({"beta": 0.5}, False, "beta"),
        ({"kl_in": "reward", "kl_coef": 0.1, "kl_estimator": "k3"}, False, "kl_estimator"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(options: dict[str, Any], dense: bool, told: str) -> None:
    with pytest.raises(OperantError) as caught:
        resolve(TrainConfig(**{**OFTEN, **options}), dense=dense)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_every_algorithm_runs_with_what_it_says_of_itself() -> None:
    for a in ALGORITHMS.values():
        recipe = resolve(TrainConfig(algorithm=a.name, epochs=2 if a.ratio else 1), dense=a.honours_dense)
        assert recipe.baseline == (a.dense_baseline if a.honours_dense else a.baseline)
        if not a.honours_gamma:
            with pytest.raises(OperantError, match=a.name):
                resolve(TrainConfig(algorithm=a.name, gamma=0.5), dense=False)
