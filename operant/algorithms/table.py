"""The table of algorithms: what each is made of, needs and honours. The same table refuses what cannot be honoured."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, Literal, get_args

from operant.algorithms.credit import Baseline
from operant.config import TrainConfig
from operant.data.batch import Normalisation
from operant.types import OperantError

Loss = Literal["reinforce", "importance", "ppo_clip", "gspo", "cispo", "topr", "double_q", "dpo", "ipo", "kto"]
PREFERENCE_LOSSES = ("dpo", "ipo", "kto")

GROUP_BASELINES = ("leave_one_out", "position_leave_one_out", "control_variate", "group_scaled", "group_centred")
TRUST_REGION_SETTINGS = ("delta", "damping", "cg_steps", "fisher_share", "backtracks")
VALUE_SETTINGS = ("q_beta", "n_step", "target_every", "replay_capacity", "priority", "support")
LOGGED_SHIFT = 3.0  # how many times as far a baseline is lowered for a log as for what is sampled
POLICY_SETTINGS = ("kl_coef", "entropy_coef", "sft_coef", "baseline_shift", "whiten", "baseline", "normalisation")
SUMMING_BASELINES = ("group_scaled", "group_centred")  # one number for all tokens of a completion


@dataclass(frozen=True, slots=True)
class Rates:
    """Peak learning rates of Adam, by what is trained; what `--lr auto` takes.

    made: of a model that was made here, all weights or LoRA. full: of all weights of a pretrained model. lora: of an
    adapter on one. How they were chosen stands in docs/real_models.md.
    """

    made: float
    full: float
    lora: float

    def of(self, *, pretrained: bool, lora: bool) -> float:
        """The rate of a model, as `models.policy.is_pretrained` says what it is."""
        return self.made if not pretrained else self.lora if lora else self.full


def rate_in_words(rate: float, *, pretrained: bool, lora: bool) -> str:
    """The line that says what `--lr auto` is."""
    what = "an adapter on" if lora else "all weights of"
    return f"learning rate {rate:g}, for {what} a {'pretrained model' if pretrained else 'model made here'} (--lr auto)"


#: Of the stages whose loss is no algorithm's.
STAGE_RATES = {
    "pretrain": Rates(1e-3, 3e-5, 3e-4),
    "sft": Rates(5e-4, 3e-5, 3e-4),
    "reward-model": Rates(3e-4, 1e-4, 3e-4),
}


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One row: the loss, the defaults that make it what its paper says, and what it honours.

    baseline, dense_baseline: what a reward, and a dense one, is compared with when `--baseline` is auto.
    whiten, clip, lam, shift, dynamic, overlong: what `auto` means for the settings of these names; `overlong` is the
        share of the length limit over which the penalty grows.
    rule: what takes the step: Adam, or the natural gradient within a trust region. rates: Adam's learning rates when
        `--lr` is auto.
    ratio: the loss has a ratio to the policy that the batch began with, so several passes over a batch are allowed.
    pairs, reference: it learns from chosen and rejected completions, against a frozen policy.
    honours_dense: token rewards reach the tokens they belong to. honours_gamma: γ changes the returns.
    honours_stale: it may learn from what other weights, or people, wrote. honours_greedy: and from greedy completions.
    """

    name: str
    paper: str
    loss: Loss
    baseline: Baseline
    dense_baseline: Baseline
    normalisation: Normalisation
    whiten: bool = False
    clip: tuple[float, float] = (0.2, 0.2)
    lam: float = 1.0
    shift: float = 0.0
    dynamic: bool = False
    overlong: float = 0.0
    rule: Literal["adam", "trust_region"] = "adam"
    rates: Rates = Rates(1e-4, 1e-5, 1e-4)
    ratio: bool = False
    pairs: bool = False
    reference: bool = False
    honours_dense: bool = True
    honours_gamma: bool = True
    honours_stale: bool = False
    honours_greedy: bool = False

    @property
    def learns_from(self) -> Literal["rewards", "preferences"]:
        """Whose it is: `operant train`'s or `operant prefer`'s."""
        return "preferences" if self.loss in PREFERENCE_LOSSES else "rewards"

    @property
    def needs(self) -> tuple[str, ...]:
        """Of: critic, group (several completions a prompt), greedy (a greedy one beside them), reference, pairs."""
        there = {
            "critic": self.baseline == "critic",
            "group": self.baseline in GROUP_BASELINES,
            "greedy": self.baseline == "greedy",
            "reference": self.reference,
            "pairs": self.pairs,
        }
        return tuple(name for name, needed in there.items() if needed)

    @property
    def honours(self) -> tuple[str, ...]:
        """Of: dense (token rewards), gamma, stale, single (one completion a prompt), greedy, passes (several)."""
        there = {
            "dense": self.honours_dense,
            "gamma": self.honours_gamma,
            "stale": self.honours_stale,
            "single": self.baseline not in GROUP_BASELINES and not self.pairs,
            "greedy": self.honours_greedy,
            "passes": self.several_passes,
        }
        return tuple(name for name, honoured in there.items() if honoured)

    @property
    def several_passes(self) -> bool:
        return self.ratio or self.honours_stale


ALGORITHMS = {
    a.name: a
    for a in (
        Algorithm(
            "reinforce", "Williams 1992", "reinforce", "running", "running", "per_completion",
        ),
        Algorithm(
            "rloo", "Kool et al. 2019; Ahmadian et al. 2024", "reinforce", "leave_one_out", "control_variate",
            "per_completion",
        ),
        Algorithm(
            "trpo", "Schulman et al. 2015", "importance", "leave_one_out", "control_variate", "per_completion",
            rule="trust_region",
        ),
        Algorithm(
            "grpo", "Shao et al. 2024", "ppo_clip", "group_scaled", "group_scaled", "per_sequence_mean",
            ratio=True, honours_dense=False, honours_gamma=False,
        ),
        Algorithm(
            "dr_grpo", "Liu et al. 2025", "ppo_clip", "group_centred", "group_centred", "constant",
            ratio=True, honours_dense=False, honours_gamma=False,
        ),
        Algorithm(
            "dapo", "Yu et al. 2025", "ppo_clip", "group_scaled", "group_scaled", "per_token",
            clip=(0.2, 0.28), dynamic=True, overlong=0.2, ratio=True, honours_dense=False, honours_gamma=False,
        ),
        Algorithm(
            "gspo", "Zheng et al. 2025", "gspo", "group_scaled", "group_scaled", "per_sequence_mean",
            clip=(3e-4, 4e-4), ratio=True, honours_dense=False, honours_gamma=False,
        ),
        Algorithm(
            "cispo", "MiniMax 2025", "cispo", "group_scaled", "group_scaled", "per_token",
            clip=(1.0, 4.0), ratio=True, honours_dense=False, honours_gamma=False,
        ),
        Algorithm(
            "reinforce_pp", "Hu et al. 2025", "ppo_clip", "none", "none", "per_token", whiten=True, ratio=True,
        ),
        Algorithm(
            "remax", "Li et al. 2023", "reinforce", "greedy", "greedy", "per_completion",
        ),
        Algorithm(
            "ppo", "Schulman et al. 2017", "ppo_clip", "critic", "critic", "per_completion",
            whiten=True, lam=0.95, ratio=True,
        ),
        Algorithm(
            "a2c", "Mnih et al. 2016", "reinforce", "critic", "critic", "per_completion",
        ),
        Algorithm(
            "topr", "Le Roux et al. 2025", "topr", "route", "route", "per_completion",
            honours_dense=False, honours_gamma=False, honours_stale=True, honours_greedy=True,
        ),
        Algorithm(
            "areinforce", "Arnal et al. 2025", "reinforce", "route", "route", "per_completion", shift=0.1,
            honours_dense=False, honours_gamma=False, honours_stale=True, honours_greedy=True,
        ),
        Algorithm(
            "spo", "Xu & Ding 2025", "ppo_clip", "route", "route", "per_completion",
            whiten=True, clip=(0.2, 0.28), ratio=True,
        ),
        Algorithm(
            "double_q", "van Hasselt et al. 2016", "double_q", "none", "none", "per_token",
            reference=True, honours_stale=True, honours_greedy=True,
        ),
        Algorithm(
            "dpo", "Rafailov et al. 2023", "dpo", "none", "none", "per_completion", pairs=True, reference=True,
            rates=Rates(2e-5, 5e-6, 5e-5),
            honours_dense=False, honours_gamma=False, honours_stale=True, honours_greedy=True,
        ),
        Algorithm(
            "ipo", "Azar et al. 2023", "ipo", "none", "none", "per_completion", pairs=True, reference=True,
            rates=Rates(1e-5, 2.5e-6, 2.5e-5),
            honours_dense=False, honours_gamma=False, honours_stale=True, honours_greedy=True,
        ),
        Algorithm(
            "kto", "Ethayarajh et al. 2024", "kto", "none", "none", "per_completion", reference=True,
            rates=Rates(5e-5, 1.25e-5, 1.25e-4),
            honours_dense=False, honours_gamma=False, honours_stale=True, honours_greedy=True,
        ),
    )
}  # fmt: skip


def nearest(name: str, names: list[str]) -> str:
    """', did you mean …' or nothing: the end of an error about an unknown name."""
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def those_that(honour: str) -> str:
    """The algorithms that honour something, as the end of an error says them."""
    able = [a.name for a in ALGORITHMS.values() if honour in a.honours and a.learns_from == "rewards"]
    return " or ".join(f"--algorithm {name}" for name in able)


def table() -> list[dict[str, Any]]:
    """Every row as plain data, in the table's order: what `operant algorithms --json` prints."""
    return [
        {
            "name": a.name, "paper": a.paper, "from": a.learns_from, "loss": a.loss, "baseline": a.baseline,
            "dense_baseline": a.dense_baseline if a.honours_dense else None, "normalisation": a.normalisation,
            "rule": a.rule, "lr": a.rates.made if a.rule == "adam" else None,
            "lr_pretrained": a.rates.full if a.rule == "adam" else None,
            "lr_lora": a.rates.lora if a.rule == "adam" else None,
            "needs": list(a.needs), "honours": list(a.honours),
        }
        for a in ALGORITHMS.values()
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class AlgorithmSettings:
    """What a run really uses, once every `auto` is resolved.

    critic: "separate" or "shared", or None for none. rounds: of sampling a step, more than 1 with dynamic sampling.
    overlong_buffer: tokens before the length limit over which the penalty grows; 0 for none.
    bootstrap: the critic's value follows a completion that the length limit cut off.
    """

    algorithm: Algorithm
    lr: float
    baseline: Baseline
    normalisation: Normalisation
    whiten: bool
    clip_low: float
    clip_high: float
    lam: float
    shift: float
    rounds: int
    overlong_buffer: int
    critic: Literal["separate", "shared"] | None
    bootstrap: bool


def resolve(config: TrainConfig, *, dense: bool, pretrained: bool = False, lora: bool = False) -> AlgorithmSettings:
    """Resolve the `auto` fields and refuse what the estimator cannot honour.

    dense: the reward pays per token. pretrained, lora: what is trained, see `Rates`.
    Raises OperantError, by name and with the fix, for each combination that would silently be another one.
    """
    algorithm = _named(config)
    baseline = _baseline(config, algorithm, dense)
    normalisation: Normalisation = algorithm.normalisation
    if config.normalisation != "auto":
        normalisation = config.normalisation  # type: ignore[assignment]
    _check_baseline(config, algorithm, baseline, dense)
    _check_critic(config, baseline)
    _check_sampling(config, algorithm, baseline)
    _check_kl(config, baseline)
    _check_rule(config, algorithm)
    _check_episodes(config, algorithm, baseline)
    _check_values(config, algorithm)

    def auto(given: Any, own: Any) -> Any:
        return own if given == "auto" else given

    has_critic = baseline == "critic"
    dynamic = bool(auto(config.dynamic_sampling, algorithm.dynamic))
    if dynamic and baseline not in GROUP_BASELINES:
        raise OperantError(
            f"dynamic sampling keeps groups whose rewards differ, and baseline {baseline} has no groups; "
            "use --algorithm dapo, or --dynamic_sampling false"
        )
    whiten = bool(auto(config.whiten, algorithm.whiten and algorithm.baseline == baseline))
    # a log is all the feedback that the policy will ever get: with nothing new to balance it, blame wrecks it sooner
    shift = float(auto(config.baseline_shift, (LOGGED_SHIFT if config.logged else 1) * algorithm.shift))
    if shift and (has_critic or whiten):
        raise OperantError(
            f"baseline_shift is {shift}, and {'a critic' if has_critic else 'whitening'} would undo it; "
            f"use --algorithm areinforce, or --baseline_shift 0{' or --whiten false' if whiten else ''}"
        )
    return AlgorithmSettings(
        algorithm=algorithm,
        lr=float(auto(config.lr, algorithm.rates.of(pretrained=pretrained, lora=lora))),
        baseline=baseline,
        normalisation=normalisation,
        whiten=whiten,
        clip_low=float(auto(config.clip_low, algorithm.clip[0])),
        clip_high=float(auto(config.clip_high, algorithm.clip[1])),
        lam=float(auto(config.lam, algorithm.lam)),
        shift=shift,
        rounds=config.dynamic_rounds if dynamic else 1,
        overlong_buffer=int(auto(config.overlong_buffer, int(algorithm.overlong * config.max_tokens))),
        critic=_critic(config, algorithm, has_critic),
        bootstrap=has_critic and bool(auto(config.bootstrap, dense)),
    )


def in_force(config: TrainConfig, settings: AlgorithmSettings, *, dense: bool) -> dict[str, Any]:
    """The settings that are `auto` and what `resolve` made of them, to be kept with the run.

    Given in place of `auto` they make the same run again, also when an algorithm's own value has changed. A setting
    that has no use here, such as λ without a critic, is left out: it may only be `auto`. So is β, which `auto` fits.
    """
    own: dict[str, Any] = {
        "lr": settings.lr, "baseline": settings.baseline, "normalisation": settings.normalisation,
        "whiten": settings.whiten, "clip_low": settings.clip_low, "clip_high": settings.clip_high, "lam": settings.lam,
        "baseline_shift": settings.shift, "dynamic_sampling": settings.algorithm.dynamic,
        "overlong_buffer": settings.overlong_buffer, "critic": settings.critic, "bootstrap": settings.bootstrap,
    }  # fmt: skip
    found: dict[str, Any] = {}
    for name, value in own.items():
        if getattr(config, name) != "auto" or value is None:
            continue
        try:
            again = resolve(dataclasses.replace(config, **found, **{name: value}), dense=dense)
        except OperantError:
            continue
        if again == settings:
            found[name] = value
    return found


def _named(config: TrainConfig) -> Algorithm:
    known = [a.name for a in ALGORITHMS.values() if a.learns_from == "rewards"]
    if config.algorithm in ALGORITHMS and config.algorithm not in known:
        raise OperantError(
            f"{config.algorithm} learns from preferences, and here are only rewards; use operant prefer, "
            "or --algorithm rloo"
        )
    if config.algorithm not in known:
        raise OperantError(
            f"unknown algorithm {config.algorithm!r}{nearest(config.algorithm, known)} (there are: {', '.join(known)})"
        )
    algorithm = ALGORITHMS[config.algorithm]
    for name, allowed in (("baseline", get_args(Baseline)), ("normalisation", get_args(Normalisation))):
        given = getattr(config, name)
        if given not in ("auto", *allowed):
            raise OperantError(f"unknown {name} {given!r}{nearest(given, list(allowed))}")
    return algorithm


def _baseline(config: TrainConfig, algorithm: Algorithm, dense: bool) -> Baseline:
    if config.baseline != "auto":
        return config.baseline  # type: ignore[return-value]
    baseline: Baseline = algorithm.dense_baseline if dense else algorithm.baseline
    if baseline in ("leave_one_out", "control_variate") and _discount(config):
        # what a token is worth grows towards the end, and past rewards are a control variate for undiscounted returns
        return "position_leave_one_out"
    return baseline


def _critic(config: TrainConfig, algorithm: Algorithm, has_critic: bool) -> Literal["shared", "separate"] | None:
    if algorithm.loss == "double_q":
        return "separate"  # the policy is the other half of its Q, and would move with a trunk that they share
    if not has_critic:
        return None
    return "shared" if config.critic == "shared" else "separate"


def places_tokens(config: TrainConfig) -> bool:
    """Whether the algorithm, with the baseline that it is given, credits tokens with what they themselves are paid."""
    algorithm = ALGORITHMS.get(config.algorithm)
    summing = config.baseline != "auto" and config.baseline in SUMMING_BASELINES
    return algorithm is not None and algorithm.honours_dense and not summing


def _discount(config: TrainConfig) -> str:
    """The setting that discounts, or nothing."""
    return "gamma" if config.gamma != 1.0 else "gamma_turn" if config.gamma_turn != 1.0 else ""


def _check_baseline(config: TrainConfig, algorithm: Algorithm, baseline: Baseline, dense: bool) -> None:
    if baseline in GROUP_BASELINES and config.group_size < 2:
        raise OperantError(
            f"{config.algorithm} with baseline {baseline} compares completions of one prompt, and group_size is 1; "
            "give --group_size 2 or more, or --algorithm reinforce"
        )
    if dense and (baseline in SUMMING_BASELINES or not algorithm.honours_dense):
        raise OperantError(
            f"{config.algorithm} (baseline {baseline}) would sum a dense reward into one number; "
            "use --algorithm rloo or ppo, or leave --dense out"
        )
    discount = _discount(config)
    if discount and (baseline in SUMMING_BASELINES or not algorithm.honours_gamma):
        raise OperantError(
            f"{config.algorithm} ignores the discount, and {discount} is {getattr(config, discount)}; "
            f"use --algorithm rloo or ppo, or --{discount} 1"
        )
    if baseline == "control_variate" and not dense:
        raise OperantError(
            "baseline control_variate works on the token rewards of a dense reward; add --dense, "
            "or use --baseline leave_one_out"
        )
    if baseline == "control_variate" and discount:
        raise OperantError(
            f"the control variate holds at gamma 1 only, and {discount} is {getattr(config, discount)}; "
            "use --baseline position_leave_one_out"
        )
    if config.beta != "auto" and baseline != "control_variate":
        raise OperantError(
            f"baseline {baseline} has no coefficient, and beta is {config.beta}; use --beta auto, or --dense"
        )


def _check_critic(config: TrainConfig, baseline: Baseline) -> None:
    learners = [a.name for a in ALGORITHMS.values() if a.baseline == "critic"]
    if baseline == "critic" and config.algorithm not in learners:
        raise OperantError(
            f"{config.algorithm} has no critic, and baseline is critic; use --algorithm {' or '.join(learners)}, "
            "or another --baseline"
        )
    asked = {
        "critic": config.critic != "auto",
        "lam": config.lam != "auto",
        "critic_lr": config.critic_lr > 0,
        "bootstrap": config.bootstrap is True,
    }
    for name, given in asked.items():
        if given and baseline != "critic" and (config.algorithm, name) != ("double_q", "critic_lr"):
            raise OperantError(
                f"{name} is {getattr(config, name)}, and {config.algorithm} with baseline {baseline} has no critic; "
                f"use --algorithm {' or '.join(learners)} with its own baseline, or leave --{name} out"
            )


def _check_sampling(config: TrainConfig, algorithm: Algorithm, baseline: Baseline) -> None:
    if (config.epochs > 1 or config.minibatches > 1) and algorithm.rule == "trust_region":
        raise OperantError(
            f"{config.algorithm} takes one step a batch, as far as delta lets it go; set --epochs 1 --minibatches 1 "
            "and a larger --delta, or use --algorithm ppo"
        )
    if (config.epochs > 1 or config.minibatches > 1) and not algorithm.several_passes:
        raise OperantError(
            f"{config.algorithm} has no importance ratio, so it can learn from a batch once only; "
            "set --epochs 1 --minibatches 1, or use --algorithm ppo"
        )
    if config.top_p < 1.0 or config.top_k > 0:
        raise OperantError(
            "top_p or top_k cuts the distribution that completions are drawn from, so their log-probs are not the "
            "policy's and the gradient is biased; train with --top_p 1 --top_k 0 and cut only when serving"
        )
    if config.temperature <= 0 and not algorithm.honours_greedy:
        raise OperantError(
            f"greedy completions have no propensity, which {config.algorithm} learns by; train with --temperature 1, "
            f"or use {those_that('greedy')}"
        )
    if config.temperature <= 0 and config.group_size > 1:
        raise OperantError(
            f"greedy completions of one prompt are all the same, and group_size is {config.group_size}; "
            "give --group_size 1, or --temperature 1"
        )


def _check_kl(config: TrainConfig, baseline: Baseline) -> None:
    if config.kl_in == "reward" and config.kl_coef > 0 and config.kl_estimator != "k2":
        raise OperantError(
            f"the KL in the reward is always k1, and kl_estimator is {config.kl_estimator}; "
            "leave it out, or use --kl_in loss"
        )
    if config.kl_in == "reward" and baseline in SUMMING_BASELINES and config.kl_coef > 0:
        raise OperantError(f"{config.algorithm} would sum the per-token KL reward into one number; use --kl_in loss")
    if config.kl_target > 0 and not config.kl_coef > 0:
        raise OperantError("kl_target adapts kl_coef, which is 0; give where it begins, such as --kl_coef 0.05")


def _check_rule(config: TrainConfig, algorithm: Algorithm) -> None:
    if algorithm.rule == "trust_region":
        if config.weight_decay > 0:
            raise OperantError(
                f"{config.algorithm} has no weight decay, and weight_decay is {config.weight_decay}; "
                "leave it out, or use --algorithm ppo"
            )
        return
    _refuse_given(config, TRUST_REGION_SETTINGS, "has no trust region; use --algorithm trpo")


def _check_values(config: TrainConfig, algorithm: Algorithm) -> None:
    if algorithm.loss != "double_q":
        _refuse_given(config, VALUE_SETTINGS, "has no action values; use --algorithm double_q")
    else:
        _refuse_given(config, POLICY_SETTINGS, "learns values and has no policy gradient; use --algorithm rloo")
        if config.lora_rank:
            raise OperantError("double_q keeps a target network, a copy of the whole weights; leave --lora_rank out")
    if config.logged and not algorithm.honours_stale:
        raise OperantError(
            f"{config.algorithm} learns from what the policy says now, and --logged gives what was said; "
            f"use {those_that('stale')}"
        )
    if config.logged and config.environment:
        raise OperantError("--logged and --environment both say where completions come from; give one of them")


def _refuse_given(config: TrainConfig, names: tuple[str, ...], why: str) -> None:
    for field in dataclasses.fields(TrainConfig):
        if field.name in names and getattr(config, field.name) != field.default:
            raise OperantError(
                f"{field.name} is {getattr(config, field.name)}, and {config.algorithm} {why}, "
                f"or leave --{field.name} out"
            )


def _check_episodes(config: TrainConfig, algorithm: Algorithm, baseline: Baseline) -> None:
    if not config.environment:
        if config.gamma_turn != 1.0:
            raise OperantError(
                f"gamma_turn is {config.gamma_turn}, and a completion is one turn; give an --environment, "
                "or discount its tokens with --gamma"
            )
        return
    if baseline == "greedy":
        raise OperantError(
            f"{config.algorithm} compares with a prompt's greedy completion, and an environment has episodes; "
            "use --algorithm rloo or ppo"
        )
    overlong = algorithm.overlong if config.overlong_buffer == "auto" else config.overlong_buffer
    if overlong or (algorithm.dynamic if config.dynamic_sampling == "auto" else config.dynamic_sampling):
        raise OperantError(
            "an environment's episodes have no dynamic sampling and no penalty on length; "
            "give --dynamic_sampling false --overlong_buffer 0, or use --algorithm rloo or ppo"
        )
    if config.sft_coef:
        raise OperantError("an environment has no labelled pairs; leave --sft_coef out")
