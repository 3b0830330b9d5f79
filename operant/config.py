"""One typed configuration per stage. Every field is a flag and a YAML key; nothing here imports torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from operant.types import OperantError

__all__ = [
    "AlgorithmsConfig",
    "EvalConfig",
    "FeedbackConfig",
    "KeysConfig",
    "LearnerConfig",
    "LiveConfig",
    "PreferConfig",
    "PretrainConfig",
    "QuickstartConfig",
    "RewardModelConfig",
    "SampleConfig",
    "ScoreConfig",
    "ServeConfig",
    "SftConfig",
    "TrainConfig",
    "VersionsConfig",
    "WorkerConfig",
    "check_numbers",
    "load_config",
    "to_yaml",
]


def to_yaml(config: Any) -> str:
    """The resolved configuration as it is shown and kept in the run folder."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


C = TypeVar("C")


def load_config(path: str | Path, kind: type[C]) -> C:
    """A configuration from a YAML file, such as the config.yaml of a run folder; what the file leaves out has its
    default.

    kind: which, such as `operant.TrainConfig`. Settings and values are checked as those of `--config` are.

    Raises OperantError for a file that cannot be read, for a setting that there is not, for a value of another type and
    for a number out of its range.
    """
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, as_group=False)
    try:
        values = parser.parse_string(Path(path).expanduser().read_text(encoding="utf-8")).as_dict()
    except (jsonargparse.ArgumentError, OSError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:400]
        raise OperantError(f"{path} is no configuration that can be read ({reason}); correct it") from error
    config = kind(**values)
    check_numbers(config)
    return config


_COUNTS = (
    "accumulate anchor_rows anchor_tokens backtracks batch_size batch_tokens cg_steps drift_versions dynamic_rounds "
    "epochs eval_every group_size heldout_rows keep limit max_rows max_sick_steps max_tokens max_turns min_sources "
    "minibatches n n_step prompts_per_step replay_capacity save_every sft_batch_size steps target_every "
    "tokens_per_microbatch vocab_size"
).split()
_AMOUNTS = (
    "anchor_coef clip_high clip_low correction_band correction_cap critic_lr damping drift_budget entropy_coef "
    "eval_prompts kl_coef kl_target likelihood_drop log_samples lora_rank lr max_minutes max_prompt_tokens "
    "overlong_buffer overlong_penalty patience priority replay_events rest sft_coef temperature threads top_k vf_clip "
    "vf_coef warmup_steps weight_decay"
).split()
_SHARES = (
    "audit_fraction", "bad_weight", "baseline_rate", "gamma", "gamma_turn", "lam", "support", "tolerance", "top_p"
)  # fmt: skip
# what a setting must be, in words, and the test of it
_NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    **{name: ("at least 1", lambda x: x >= 1) for name in _COUNTS},
    **{name: ("0 or more", lambda x: 0 <= x < math.inf) for name in _AMOUNTS},
    **{name: ("between 0 and 1", lambda x: 0 <= x <= 1) for name in _SHARES},
    **{name: ("0 or more and below 1", lambda x: 0 <= x < 1) for name in ("dropout", "label_smoothing")},
    **{
        name: ("more than 0", lambda x: 0 < x < math.inf)
        for name in ("delta", "kl_budget", "q_beta", "max_grad_norm", "minutes", "poll_seconds", "reward_seconds")
    },
    **dict.fromkeys(("baseline_shift", "reward_midpoint"), ("a finite number", math.isfinite)),
    **{
        name: ("0 or more", lambda x: 0 <= x < math.inf)
        for name in ("desirable_weight", "undesirable_weight", "half_life")
    },
    **dict.fromkeys(("midpoint", "score_high", "score_low"), ("a finite number", math.isfinite)),
    "block": ("0, or at least 2", lambda x: x == 0 or x >= 2),
    # different phrases of the built-in task grow rare beyond
    **{name: ("between 1 and 100000", lambda x: 1 <= x <= 100_000) for name in ("labelled", "prompts")},
    "canary_share": ("0 to 0.5", lambda x: 0 <= x <= 0.5),
    "shadow_share": ("0 to 1", lambda x: 0 <= x <= 1),
    "canary_alpha": ("more than 0 and less than 0.5", lambda x: 0 < x < 0.5),
    "canary_margin": ("0 or more and less than 1", lambda x: 0 <= x < 1),
    "canary_pairs": ("at least 1", lambda x: x >= 1),
    "influence_cap": ("more than 0 and at most 1", lambda x: 0 < x <= 1),
    **dict.fromkeys(("chat_rate", "feedback_rate"), ("0 or more", lambda x: 0 <= x < math.inf)),
    "influence_window": ("at least 1", lambda x: 1 <= x < math.inf),
    "drain_seconds": ("0 or more", lambda x: 0 <= x < math.inf),
    "link_days": ("more than 0", lambda x: 0 < x < math.inf),
    "max_body": ("at least 1024", lambda x: x >= 1024),
    "max_length": ("at least 2", lambda x: x >= 2),
    "mean_span": ("at least 1", lambda x: 1 <= x < math.inf),
    "noise_density": ("between 0 and 1", lambda x: 0 < x < 1),
    "port": ("between 0 and 65535", lambda x: 0 <= x <= 65535),
    "queue": ("at least 1", lambda x: x >= 1),
    "reward_workers": ("-1 or more", lambda x: x >= -1),
    "seed": ("between 0 and 2^63 - 1", lambda x: 0 <= x < 2**63),
    **dict.fromkeys(("fisher_share", "top_p"), ("more than 0 and at most 1", lambda x: 0 < x <= 1)),
}


def check_numbers(config: Any) -> None:
    """Refuse numbers that no run can use, before anything is loaded or written.

    Raises OperantError for the first setting out of its range, NaN included.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "stop" and (isinstance(value, str) or "" in value):
            raise OperantError(f"stop is {value!r}; it must be a list of texts, none of them empty: correct --stop")
        if field.name not in _NUMBERS or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        words, holds = _NUMBERS[field.name]
        if not holds(value):
            raise OperantError(f"{field.name} is {value}; it must be {words}: correct --{field.name}")


@dataclass(kw_only=True)
class RunConfig:
    """What every stage that trains has.

    Args:
        out: the run folder; it must be new, or be resumed.
        seed: of everything random: weights, data order, sampling.
        resume: go on with the run in `out` from its last checkpoint, bit for bit on the same machine.
        overwrite: throw the run in `out` away first.
        device: auto, cpu, cuda, cuda:1 or mps.
        dtype: float32, or bf16 for autocast where the processor or GPU has it.
        threads: CPU threads for the matrix work; 0 leaves torch's default.
        max_minutes: stop after this many minutes; 0 for no limit.
        clock: what these minutes are of: wall time, or cpu: time for which the processor worked for this process, which
            other programs hardly disturb. For comparisons; all threads count, processes that compute rewards do not.
        save_every: optimizer steps between checkpoints.
        keep: checkpoints kept beside the best one.
        tensorboard: also write TensorBoard event files.
        wandb: Weights & Biases project to log to as well (needs the extra operant[wandb]).
        max_grad_norm: gradients are scaled down to this norm.
        weight_decay: AdamW's, on matrices only.
        tokens_per_microbatch: padded tokens that go through the model at once; more needs more memory.
        max_sick_steps: steps in a row with a non-finite loss or gradient before rolling back and stopping.
    """

    out: str = "runs/run"
    seed: int = 0
    resume: bool = False
    overwrite: bool = False
    device: str = "auto"
    dtype: Literal["float32", "bf16"] = "float32"
    threads: int = 0
    max_minutes: float = 0.0
    clock: Literal["wall", "cpu"] = "wall"
    save_every: int = 200
    keep: int = 2
    tensorboard: bool = True
    wandb: str | None = None
    max_grad_norm: float = 1.0
    weight_decay: float = 0.01
    tokens_per_microbatch: int = 16384
    max_sick_steps: int = 3


@dataclass(kw_only=True)
class StartConfig:
    """Which model a stage starts from.

    Args:
        model: a folder or hub id to start from; empty makes a new one from `arch` and `size`. Where a writer is needed,
            a folder with an encoder (bert, roberta) gets a decoder that begins from it too (Rothe et al. 2020).
        arch: gpt2 or llama (decoder-only), t5 or mbart (encoder-decoder; mbart learns from nothing faster), bert (an
            encoder, which reads and does not write).
        size: tiny, small or base.
        tokenizer: a folder or hub id with a tokenizer for a new model; empty trains a byte-level BPE on the data.
        vocab_size: of a newly trained tokenizer.
        max_length: tokens that a new model can hold.
        dropout: of a new model, while fine-tuning and pretraining.
    """

    model: str | None = None
    arch: Literal["gpt2", "llama", "t5", "mbart", "bert"] = "gpt2"
    size: Literal["tiny", "small", "base"] = "tiny"
    tokenizer: str | None = None
    vocab_size: int = 4096
    max_length: int = 512
    dropout: float = 0.0


@dataclass(kw_only=True)
class ModelConfig(StartConfig):
    """Which policy a stage starts from.

    Args:
        lora_rank: train a low-rank adapter of this rank instead of the weights; 0 trains the weights.
    """

    lora_rank: int = 0


@dataclass(kw_only=True)
class PairFields:
    """Where prompts and answers are in the data.

    Args:
        prompt_field: column of the prompt; guessed from the usual names when empty.
        reference_field: column of the answer, one string or a list of several.
        prefix: text put before every prompt.
        separator: text between prompt and completion for decoder-only models.
        max_prompt_tokens: longest prompt; 0 is what the model can hold.
        too_long: what to do with longer ones.
    """

    prompt_field: str | None = None
    reference_field: str | None = None
    prefix: str = ""
    separator: str = "\n"
    max_prompt_tokens: int = 0
    too_long: Literal["error", "skip", "truncate"] = "error"


@dataclass(kw_only=True)
class PretrainConfig(RunConfig, ModelConfig):
    """Train on raw text: causal or masked language modelling, or span corruption for encoder-decoders.

    Args:
        objective: auto takes the architecture's: causal for decoders, spans (only what is hidden is asked for; Raffel
            et al. 2020) for encoder-decoders, mlm (masked language modelling; Devlin et al. 2019) for encoders.
            infilling (the whole text is asked for; Lewis et al. 2020) makes an encoder-decoder write whole sentences.
        data: JSON Lines (also .gz), CSV, Parquet, a folder with train/dev files, or a hub data set.
        dev_data: held-out text; empty takes the dev split of `data`, or the last twentieth of it.
        text_field: column of the text; guessed when empty.
        limit: use only the first rows.
        steps: optimizer steps.
        batch_tokens: tokens per optimizer step and accumulation round.
        accumulate: rounds of gradient accumulation per optimizer step.
        lr: peak learning rate.
        warmup_steps: steps of linear warm-up.
        schedule: what follows the warm-up.
        eval_every: steps between measurements of the dev loss.
        block: packed row length; 0 takes the model's.
        noise_density: share of tokens that span corruption or masking hides.
        mean_span: mean length of a hidden span.
    """

    objective: Literal["auto", "causal", "spans", "infilling", "mlm"] = "auto"
    data: str = ""
    dev_data: str | None = None
    text_field: str | None = None
    limit: int | None = None
    out: str = "runs/pretrain"
    steps: int = 1000
    batch_tokens: int = 8192
    accumulate: int = 1
    lr: float = 1e-3
    warmup_steps: int = 50
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    eval_every: int = 100
    block: int = 0
    noise_density: float = 0.15
    mean_span: float = 3.0


@dataclass(kw_only=True)
class SftConfig(RunConfig, ModelConfig, PairFields):
    """Fine-tune on labelled pairs; the loss is on the answer's tokens only.

    Args:
        data: pairs, in any of the forms that `operant pretrain --data` takes.
        dev_data: held-out pairs; empty takes the dev split of `data`, or the last tenth of it.
        limit: use only the first rows.
        steps: at most so many optimizer steps.
        batch_size: pairs per optimizer step.
        lr: peak learning rate.
        warmup_steps: steps of linear warm-up.
        schedule: what follows the warm-up.
        label_smoothing: ε of Szegedy et al. 2016.
        best_metric: what the best checkpoint and `patience` go by: the dev loss, or a metric of greedy completions.
            The loss of a small model often turns up long before its completions stop getting better.
        eval_every: steps between measurements.
        eval_prompts: how many held-out prompts are completed for `best_metric`.
        max_tokens: their longest completion.
        patience: stop when it has not improved for so many measurements; 0 never stops early.
    """

    data: str = ""
    dev_data: str | None = None
    limit: int | None = None
    out: str = "runs/sft"
    steps: int = 2000
    batch_size: int = 64
    lr: float = 5e-4
    warmup_steps: int = 20
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    label_smoothing: float = 0.0
    best_metric: Literal["loss", "bleu", "chrf", "rougeL", "exact"] = "loss"
    eval_every: int = 50
    eval_prompts: int = 200
    max_tokens: int = 64
    patience: int = 4


@dataclass(kw_only=True)
class PreferConfig(RunConfig):
    """Learn from preferences: pairs (DPO, IPO), edits read as pairs, or single completions that are good or bad (KTO).

    Args:
        model: the policy to start from, a folder or hub id; as it is now, it is also the reference.
        lora_rank: train a low-rank adapter of this rank instead of the weights; 0 trains the weights.
        data: rows of prompt, chosen, rejected; of prompt, original, edited; or, for kto, of prompt, completion, label.
        dev_data: held-out rows; empty takes the dev split of `data`, or the last tenth of it.
        limit: use only the first rows.
        replay: a feedback log (`operant.FeedbackLog`), a file of feedback events with their completions, instead of
            `data`.
        half_life: hours after which an event of the log is half as likely to be drawn; 0 draws uniformly.
        midpoint: a score of the log above it is good, below it bad.
        out: the run folder.
        prompt_field: column of the prompt, a text or a chat; without one, what both completions begin with.
        chosen_field: column of the preferred completion.
        rejected_field: column of the other one.
        completion_field: column of a completion with a label.
        label_field: column of the label, true or false.
        prefix: text put before every prompt.
        separator: text between prompt and completion for decoder-only models.
        max_prompt_tokens: longest prompt; 0 is what the model can hold.
        too_long: what to do with longer rows.
        algorithm: dpo, ipo or kto.
        beta: how much it costs to leave the reference; larger stays nearer to it.
        logprob: of a completion, the sum over its tokens or their mean; auto is the mean for ipo, as its authors have
            it, and the sum otherwise.
        label_smoothing: share of labels that are taken to be wrong (dpo).
        sft_coef: weight of the likelihood of the chosen completions, per token, beside the loss.
        desirable_weight: λ of good completions (kto).
        undesirable_weight: λ of bad ones (kto).
        steps: at most so many optimizer steps.
        batch_size: pairs, or for kto completions, per optimizer step.
        lr: peak learning rate; auto takes the algorithm's own.
        warmup_steps: steps of linear warm-up.
        schedule: what follows the warm-up.
        measure_kl: measure the KL to the reference on held-out rows, which keeps a second copy of full weights.
        eval_every: steps between measurements of the held-out loss.
        patience: stop when it has not improved for so many measurements; 0 never stops early.
    """

    model: str = ""
    lora_rank: int = 0
    data: str = ""
    dev_data: str | None = None
    limit: int | None = None
    replay: str | None = None
    half_life: float = 0.0
    midpoint: float = 0.5
    out: str = "runs/prefer"
    prompt_field: str | None = None
    chosen_field: str | None = None
    rejected_field: str | None = None
    completion_field: str | None = None
    label_field: str | None = None
    prefix: str = ""
    separator: str = "\n"
    max_prompt_tokens: int = 0
    too_long: Literal["error", "skip", "truncate"] = "error"
    algorithm: str = "dpo"
    beta: float = 0.1
    logprob: Literal["auto", "sum", "mean"] = "auto"
    label_smoothing: float = 0.0
    sft_coef: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    steps: int = 500
    batch_size: int = 32
    lr: float | Literal["auto"] = "auto"
    warmup_steps: int = 20
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    weight_decay: float = 0.0
    measure_kl: bool = True
    eval_every: int = 25
    patience: int = 4


@dataclass(kw_only=True)
class TrainConfig(RunConfig, PairFields):
    """Learn from rewards: sample, reward, credit, policy-gradient step, again.

    Args:
        model: the policy to start from, a folder or hub id.
        lora_rank: train a low-rank adapter of this rank instead of the weights; 0 trains the weights.
        data: prompts, with references if the reward needs them; only the reward sees these.
        dev_data: held-out prompts; empty takes the dev split of `data`, or its last twentieth (at most 200).
        limit: use only the first rows.
        out: the run folder.
        reward: names with weights, such as "chrf" or "chrf + 0.1*length", or module:function.
        environment: a Gymnasium environment whose observations and actions are texts, instead of data and a reward:
            its id or module:Class. The policy then plays episodes of several turns and learns from what each pays.
        logged: completions that were written before, instead of new ones, for algorithms that may learn from stale
            ones: rows of prompt, completion (or its tokens) and reward; without a reward, --reward judges them. All
            but double_q also need behavior_logprobs, as operant sample --json prints them: rows without are left out.
        max_turns: an episode that has not ended by then is cut off.
        dense: pay metric rewards token by token through a potential instead of at the end; auto does so where a metric
            of the reward has one and the algorithm, with its baseline, can place what tokens are paid. True also
            declares that a function of your own pays per token; one that does without is noticed when it does.
        potential: how prefixes are scored when dense: `prefix` or `matched`; auto takes the metric's default.
        reward_workers: processes that compute rewards; −1 chooses, 0 computes them in threads of this process.
        reward_seconds: time limit for one reward (one token of a streaming one); a slower one is a missing reward.
        algorithm: one of the table that `operant algorithms` prints. What is `auto` below is then as its paper says.
        baseline: auto takes the algorithm's own; else none, running, batch, leave_one_out, position_leave_one_out,
            control_variate, group_scaled, group_centred, greedy, route or critic.
        beta: coefficient of the potential as a control variate, or `auto` to fit it on the other prompts.
        gamma: discount per token.
        gamma_turn: discount per turn of an environment, beside that per token; what the environment writes costs none.
        discount_state: weigh token t's term by γ^t, the exact gradient of the discounted objective.
        normalisation: auto takes the algorithm's own; else per_completion, per_token, per_sequence_mean or constant.
        group_size: completions per prompt.
        prompts_per_step: prompts per step.
        epochs: passes over each batch of completions, for algorithms that may (PPO, GRPO and others).
        minibatches: optimizer steps per pass.
        clip_low: the ratio's lower clip range.
        clip_high: the ratio's upper clip range.
        delta: nats per token that a step of trpo may move the policy; takes the place of lr, its schedule and
            max_grad_norm.
        damping: added to the Fisher matrix's diagonal (trpo); more is nearer to the plain gradient's direction, which
            steps of few completions need.
        cg_steps: Fisher-vector products a step (trpo).
        fisher_share: share of a step's completions that the Fisher matrix is taken from (trpo), at least eight of them.
        backtracks: lengths that its line search tries, each at most half of the one before, before it refuses the step.
        q_beta: what it costs double_q to leave the model that it starts from, in units of the reward: it says
            π_ref · exp(A / q_beta). 0.1 is for rewards from 0 to 1; for people's, from −1 to 1, give 0.2.
        n_step: tokens whose rewards are taken as paid before a token's value is asked for (double_q).
        target_every: steps after which the lagging estimate is brought up to the learning one (double_q).
        replay_capacity: completions that are kept to learn from again (double_q).
        priority: 0 draws them uniformly; 1 by the size of their error (double_q).
        support: tokens less likely than this share of the likeliest one are no candidates for the best (double_q).
        whiten: bring the advantages of a step to mean 0 and deviation 1.
        lam: λ of the critic's advantage estimate: 1 trusts returns alone, 0 the critic's next value alone.
        critic: separate gives it a copy of the model as its own trunk, shared a head on the policy's.
        critic_lr: its learning rate; 0 takes five times the policy's.
        vf_coef: weight of its loss.
        vf_clip: clip range of its change within a step; 0 for none.
        bootstrap: the critic's value follows a completion that the length limit cut off; auto does so for dense
            rewards, since a reward of the whole text was already paid for the cut one.
        dynamic_sampling: leave out groups whose rewards are all equal and sample other prompts instead.
        dynamic_rounds: at most so many rounds of sampling a step.
        overlong_buffer: tokens before max_tokens over which a penalty on length grows; 0 for none.
        overlong_penalty: that penalty at max_tokens.
        baseline_shift: how far the baseline is lowered, for learning off policy; auto is 0.1 for areinforce, and 0.3
            when it learns from a log.
        baseline_rate: how fast a route's persistent baseline follows its rewards.
        reward_midpoint: where such a baseline begins: the middle of the reward's scale.
        route_by: what a route is: the prompt's task, or each prompt for itself.
        kl_coef: weight of the KL to the policy as this stage found it.
        kl_target: nats per token that kl_coef is adapted to reach after every step; 0 leaves it fixed.
        kl_in: put it in the reward (k1) or in the loss.
        kl_estimator: of the KL in the loss: k2, k3 (another divergence) or full (whole vocabulary).
        entropy_coef: weight of the entropy bonus.
        sft_coef: weight of the supervised loss on `sft_data` in every step.
        sft_data: labelled pairs for `sft_coef`.
        sft_batch_size: pairs per step.
        correction_cap: cap of the truncated correction from sampler to trainer; 0 for none. Used in bf16.
        correction_band: leave out completions whose mean ratio from sampler to trainer is out of 1 ± this; 0 for none.
        temperature: of sampling and, like for like, of the ratio.
        max_tokens: longest completion.
        stop: strings that end a completion.
        audit_fraction: share of completions that a streaming reward would end but that run on, to see what ends cost.
        max_rows: completions decoded together.
        steps: at most so many steps.
        lr: learning rate; auto takes the algorithm's own (`operant algorithms --json`).
        warmup_steps: steps of linear warm-up.
        schedule: what follows the warm-up.
        target: stop once a held-out metric reaches this, such as "bleu>=30" or "reward>=0.8".
        best_metric: the held-out metric by which the best checkpoint is kept.
        eval_every: steps between held-out evaluations.
        eval_prompts: how many held-out prompts; 0 measures nothing held out.
        log_samples: completions kept for reading at every evaluation.
    """

    model: str = ""
    lora_rank: int = 0
    data: str = ""
    dev_data: str | None = None
    limit: int | None = None
    out: str = "runs/train"
    reward: str = "chrf"
    environment: str | None = None
    logged: str | None = None
    max_turns: int = 16
    dense: bool | Literal["auto"] = "auto"
    potential: Literal["auto", "prefix", "matched"] = "auto"
    reward_workers: int = -1
    reward_seconds: float = 10.0
    algorithm: str = "rloo"
    baseline: str = "auto"
    beta: float | Literal["auto"] = "auto"
    gamma: float = 1.0
    gamma_turn: float = 1.0
    discount_state: bool = False
    normalisation: str = "auto"
    group_size: int = 4
    prompts_per_step: int = 32
    epochs: int = 1
    minibatches: int = 1
    clip_low: float | Literal["auto"] = "auto"
    clip_high: float | Literal["auto"] = "auto"
    delta: float = 0.03
    damping: float = 0.01
    cg_steps: int = 10
    fisher_share: float = 0.1
    backtracks: int = 10
    q_beta: float = 0.1
    n_step: int = 8
    target_every: int = 10
    replay_capacity: int = 4096
    priority: float = 0.0
    support: float = 0.05
    whiten: bool | Literal["auto"] = "auto"
    lam: float | Literal["auto"] = "auto"
    critic: Literal["auto", "separate", "shared"] = "auto"
    critic_lr: float = 0.0
    vf_coef: float = 0.5
    vf_clip: float = 0.0
    bootstrap: bool | Literal["auto"] = "auto"
    dynamic_sampling: bool | Literal["auto"] = "auto"
    dynamic_rounds: int = 4
    overlong_buffer: int | Literal["auto"] = "auto"
    overlong_penalty: float = 1.0
    baseline_shift: float | Literal["auto"] = "auto"
    baseline_rate: float = 0.1
    reward_midpoint: float = 0.5
    route_by: Literal["task", "prompt"] = "task"
    kl_coef: float = 0.0
    kl_target: float = 0.0
    kl_in: Literal["reward", "loss"] = "loss"
    kl_estimator: Literal["k2", "k3", "full"] = "k2"
    entropy_coef: float = 0.0
    sft_coef: float = 0.0
    sft_data: str | None = None
    sft_batch_size: int = 16
    correction_cap: float = 2.0
    correction_band: float = 0.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 64
    stop: list[str] = dataclasses.field(default_factory=list)
    audit_fraction: float = 0.0
    max_rows: int = 256
    steps: int = 500
    lr: float | Literal["auto"] = "auto"
    warmup_steps: int = 5
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    weight_decay: float = 0.0
    save_every: int = 50
    target: str | None = None
    best_metric: str = "reward"
    eval_every: int = 20
    eval_prompts: int = 200
    log_samples: int = 8


@dataclass(kw_only=True)
class RewardModelConfig(RunConfig, StartConfig):
    """Train a reward model: an encoder or decoder with a head that judges completions.

    Args:
        kind: regression (scores), comparison (which of two is better; Bradley-Terry), token (labelled spans or tokens,
            for a dense reward).
        data: rows, in any of the forms that `operant pretrain --data` takes.
        dev_data: held-out rows, which choose the checkpoint and calibrate; empty takes the dev split of `data`, or its
            last tenth (at most 500).
        limit: use only the first rows.
        prompt_field: column of the prompt; a model without prompts needs none.
        completion_field: column of the completion.
        score_field: column of its score, a number (regression).
        lower_is_better: the scores count faults; they are negated.
        chosen_field: column of the better completion (comparison).
        rejected_field: column of the worse one.
        label_field: where the two completions stand in any order: a column that says 1 when that of `chosen_field` is
            better, 2 when the other is, 0 for a tie, which is left out.
        span_field: column of the labels (token): a list of {start, end, value} over the completion's characters, or,
            beside a column `tokens` whose texts spell the completion, a number for each. What no label covers is 0.
        separator: text between prompt and completion, for tokenizers without a separator of their own.
        pool: what the head reads: the mean over the completion's tokens, or the last one; auto is last for decoders.
        too_long: what to do with completions that the model cannot hold; a prompt loses its beginning.
        steps: at most so many optimizer steps.
        batch_size: rows (pairs of completions for comparison) per optimizer step.
        lr: peak learning rate.
        warmup_steps: steps of linear warm-up.
        schedule: what follows the warm-up.
        eval_every: steps between held-out measurements.
        patience: stop when the held-out measure has not improved for so many measurements; 0 never stops early.
        best_by: what chooses the checkpoint: accuracy (comparison) or correlation (the others), the loss where they are
            equal; or the held-out loss alone.
    """

    kind: Literal["regression", "comparison", "token"] = "comparison"
    data: str = ""
    dev_data: str | None = None
    limit: int | None = None
    prompt_field: str | None = None
    completion_field: str = "completion"
    score_field: str = "score"
    lower_is_better: bool = False
    chosen_field: str = "chosen"
    rejected_field: str = "rejected"
    label_field: str | None = None
    span_field: str = "spans"
    separator: str = "\n"
    pool: Literal["auto", "mean", "last"] = "auto"
    too_long: Literal["error", "skip"] = "error"
    arch: Literal["gpt2", "llama", "t5", "bert"] = "bert"
    out: str = "runs/reward-model"
    steps: int = 500
    batch_size: int = 32
    lr: float = 3e-4
    warmup_steps: int = 20
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    eval_every: int = 25
    patience: int = 8
    best_by: Literal["measure", "loss"] = "measure"


@dataclass(kw_only=True)
class EvalConfig(PairFields):
    """Measure a model on a data set.

    Args:
        model: a folder or hub id.
        data: prompts with references.
        metrics: which corpus metrics to print.
        limit: use only the first rows.
        max_tokens: longest completion.
        temperature: 0 is greedy.
        stop: strings that end a completion.
        max_rows: completions decoded together.
        samples: write the completions to this JSON Lines file.
        json: print one JSON object.
    """

    model: str = ""
    data: str = ""
    metrics: list[str] = dataclasses.field(default_factory=lambda: ["bleu", "chrf", "rougeL", "exact"])
    limit: int | None = None
    max_tokens: int = 64
    temperature: float = 0.0
    stop: list[str] = dataclasses.field(default_factory=list)
    max_rows: int = 256
    seed: int = 0
    device: str = "auto"
    dtype: Literal["float32", "bf16"] = "float32"
    samples: str | None = None
    json: bool = False


@dataclass(kw_only=True)
class ScoreConfig:
    """Rewards of completions that are already in a file.

    Args:
        reward: as in `operant train`.
        data: rows with prompt, completion and, if the reward needs them, references.
        dense: also print the reward of every token.
        potential: how prefixes are scored when dense; auto takes the metric's default.
        tokenizer: a model folder or hub id whose tokens are rewarded; empty takes words (characters in Chinese and
            Japanese). Rows with a field `tokens` (token texts) keep their own.
        prompt_field: column of the prompt.
        completion_field: column of the completion.
        reference_field: column of the references.
        reward_seconds: time limit for one reward.
        limit: use only the first rows.
        json: print one JSON object a row instead of a table.
    """

    reward: str = "chrf"
    data: str = ""
    dense: bool = False
    potential: Literal["auto", "prefix", "matched"] = "auto"
    tokenizer: str | None = None
    prompt_field: str | None = None
    completion_field: str | None = None
    reference_field: str | None = None
    reward_seconds: float = 10.0
    limit: int | None = None
    json: bool = False


@dataclass(kw_only=True)
class SampleConfig:
    """Write completions.

    Args:
        model: a folder or hub id.
        prompt: what to answer; empty reads lines from standard input.
        chat: a prompt is a user's message, put into the model's chat template.
        n: completions per prompt.
        temperature: 0 is greedy.
        top_p: nucleus sampling.
        top_k: draw only from the k likeliest tokens; 0 is off.
        max_tokens: longest completion.
        prefix: text put before every prompt.
        separator: text between prompt and completion for decoder-only models.
        stop: strings that end a completion.
        json: print one JSON object a completion, with its tokens and log-probabilities: a row for train --logged.
    """

    model: str = ""
    prompt: str = ""
    chat: bool = False
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 64
    prefix: str = ""
    separator: str = "\n"
    stop: list[str] = dataclasses.field(default_factory=list)
    seed: int = 0
    device: str = "auto"
    dtype: Literal["float32", "bf16"] = "float32"
    json: bool = False


@dataclass(kw_only=True)
class QuickstartConfig:
    """Pretrain, fine-tune and learn from instant reward on a built-in task: written-out English to Chinese.

    Args:
        out: the run folder.
        seed: of the task's rows, the weights, the data order and sampling.
        overwrite: throw the run in `out` away first.
        threads: CPU threads for the matrix work; 0 takes all cores.
        labelled: labelled pairs to fine-tune on.
        prompts: prompts whose references only the reward sees.
        minutes: wall time of the reward stage, and of fine-tuning further on the same pairs.
        device: auto, cpu, cuda or mps.
    """

    out: str = "runs/quickstart"
    seed: int = 0
    overwrite: bool = False
    threads: int = 0
    labelled: int = 600
    prompts: int = 6000
    minutes: float = 1.0
    device: str = "auto"


@dataclass(kw_only=True)
class AlgorithmsConfig:
    """The algorithms that `operant train` knows, what each needs and what it honours.

    Args:
        json: print one JSON array.
    """

    json: bool = False


@dataclass(kw_only=True)
class LiveConfig:
    """How the live learner turns feedback into steps. Every number is written into the record of each step.

    Args:
        lr: the learning rate of plain gradient steps, before the KL budget scales a step back.
        kl_budget: nats per token that one step may move the policy on the anchor answers.
        drift_budget: nats per token that a version may lie from the one that drift is measured from, on those answers.
        drift_versions: after so many versions, drift is measured from the newest: the budget is a rate.
        likelihood_drop: nats per token that the anchor answers may lose against the anchor version, however slowly. The
            anchor moves by the slow gate or by operant versions --anchor.
        correction_band: a bad rating is left out when the geometric mean of the ratio to the weights that wrote the
            text is below 1/(1 + band).
        bad_weight: weight of a bad rating of a whole answer beside a good one. A bad answer shares most of its words
            with good ones, and pushing them down spoils the language sooner than it changes the manner.
        baseline_rate: how fast a route's baseline follows its ratings.
        beta: of DPO, which learns edits and comparisons.
        sft_coef: weight of an edit's likelihood, per token, beside its pair.
        kl_coef: weight of the pull to the anchor version, per token, on the answers that a step learns from.
        anchor_coef: weight of the anchor answers' likelihood, per token, in every step.
        score_low: the worst score.
        score_high: the best score; thumbs are the two ends.
        batch_size: events that one step takes at most.
        min_sources: different sources that a step needs before it begins; with more than one, all weigh the same as far
            as they are trusted and under the cap. Whom others contradict does not count as one.
        influence_cap: the share of what was learned lately that one source may have had, or twice an equal part where
            there are few. What is over it is not learned. Only with several sources, as the next one.
        influence_window: lately: so many steps, each counted as far as it was taught.
        replay_events: earlier events that every step learns again.
        half_life: hours after which an event is half as likely to be learned again; 0 draws uniformly.
        max_grad_norm: gradients are scaled down to this norm.
        tokens_per_microbatch: padded tokens that go through the model at once.
        keep: versions kept on disk besides those in use.
        seed: of everything random.
    """

    lr: float = 0.01
    kl_budget: float = 0.02
    drift_budget: float = 0.5
    drift_versions: int = 200
    likelihood_drop: float = 0.5
    correction_band: float = 1.0
    bad_weight: float = 0.2
    baseline_rate: float = 0.1
    beta: float = 0.1
    sft_coef: float = 1.0
    kl_coef: float = 0.1
    anchor_coef: float = 0.0
    score_low: float = 0.0
    score_high: float = 1.0
    batch_size: int = 16
    min_sources: int = 1
    influence_cap: float = 0.1
    influence_window: float = 50.0
    replay_events: int = 7
    half_life: float = 0.0
    max_grad_norm: float = 10.0
    tokens_per_microbatch: int = 8192
    keep: int = 5
    seed: int = 0


@dataclass(kw_only=True)
class LearnerConfig(LiveConfig):
    """What the live learner works on, whoever starts it.

    Args:
        root: the folder of the versions.
        store: where completions and feedback are: FILE.db, a database URL, or, to read only, a file of JSON Lines as
            operant.data.feedback_log writes it.
        model: the first version, a folder or hub id; only to begin a new root.
        anchors: rows with prompts, on whose answers every step is measured; empty samples from the bare model. Only to
            begin a new root.
        anchor_rows: so many anchor answers.
        anchor_tokens: tokens of an anchor answer, at most.
        heldout: rows with prompts and maybe references for the slow gate; empty leaves it out.
        heldout_rows: use only the first rows.
        tolerance: the share of a held-out metric that a version may lose before it is rolled back.
        prompt_field: column of the prompt.
        reference_field: column of the references.
        device: auto, cpu, cuda or mps.
        dtype: float32, or bf16 for autocast.
        threads: CPU threads for the matrix work; 0 leaves torch's default.
        rest: seconds that the learner rests for each second of a step, half a second at most, so that answers have the
            machine for themselves in between.
    """

    root: str = "runs/live"
    store: str = ""
    model: str = ""
    anchors: str = ""
    anchor_rows: int = 8
    anchor_tokens: int = 32
    heldout: str = ""
    heldout_rows: int = 32
    tolerance: float = 0.1
    prompt_field: str | None = None
    reference_field: str | None = None
    device: str = "auto"
    dtype: Literal["float32", "bf16"] = "float32"
    threads: int = 0
    rest: float = 1.0


@dataclass(kw_only=True)
class WorkerConfig(LearnerConfig):
    """The learner process of the live loop: reads feedback, makes steps, publishes versions.

    Args:
        poll_seconds: wait before the store is looked at again.
        once: learn what is there and leave.
        watch_stdin: look at the store when a line comes in, and leave when the input ends, as its parent then has.
    """

    poll_seconds: float = 0.05
    once: bool = False
    watch_stdin: bool = False


@dataclass(kw_only=True)
class ServeConfig(LearnerConfig):
    """Serve a model that learns from what people say about its answers.

    Args:
        host: the address to listen on. Others than this machine's own need keys.
        port: the port to listen on.
        name: what the model is called; it also answers to "default".
        mode: personal (each rating makes a version) or shared (a version needs several sources, see min_sources).
        chat_rate: answers that a key, and a user that it names, may ask for in a minute, and at once; in shared mode
            only. Keys that may operate have no limit of their own, only their users do. 0 is no limit.
        feedback_rate: events that a source may send in a minute, and at once; in shared mode only. 0 is no limit.
        keys: the file of keys; empty takes keys.json in `root`. While there are none nobody is asked for one.
        public_url: where others reach the server, for the links in its answers.
        link_days: days for which a link that rates an answer is good.
        max_rows: completions decoded together.
        queue: completions that may wait beside them; more are refused with 429.
        max_tokens: longest answer to a chat that names no limit.
        prefix: text put before every chat, for models without a chat template.
        separator: text between such a chat and its answer, for decoder-only models.
        reward: rate every stored answer with this too, on the scale of scores: a metric, a judge, a model, or
            module:function, as operant train names them. Nobody gives references here.
        canary_share: users, as a share of all, who are answered by a new version until ratings tell that it may serve
            everybody, or may not; 0 lets each version serve at once.
        shadow_share: share of the answers beside which a new version answers too, unseen, until `reward` tells; 0 as
            above.
        canary_alpha: how likely, at most, a worse version is promoted, or an equally good one refused as worse, however
            often it is looked at.
        canary_margin: a version is promoted when it is not worse by so much, on a scale from 0 to 1.
        canary_pairs: pairs of ratings after which a version that is neither is refused.
        implicit: module:function that reads a user's next message as a score of the answer before it, or as nothing.
        max_body: bytes of a request, at most.
        max_age_days: what was asked longer ago goes, with its feedback, but nothing that is pending. Steps that learned
            from it stay, and can no longer be made again from their records.
        max_bytes: the oldest goes too until prompts and answers take no more; 0, as above, leaves the rule out.
        drain_seconds: how long answers under way may go on when the server is told to stop.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str = "operant"
    mode: Literal["personal", "shared"] = "personal"
    chat_rate: float = 60.0
    feedback_rate: float = 60.0
    keys: str = ""
    public_url: str = ""
    link_days: float = 30.0
    max_rows: int = 64
    queue: int = 256
    max_tokens: int = 256
    prefix: str = ""
    separator: str = "\n"
    reward: str = ""
    canary_share: float = 0.0
    shadow_share: float = 0.0
    canary_alpha: float = 0.05
    canary_margin: float = 0.1
    canary_pairs: int = 1000
    implicit: str = ""
    max_body: int = 1 << 20
    max_age_days: float = 0.0
    max_bytes: int = 0
    drain_seconds: float = 5.0


@dataclass(kw_only=True)
class KeysConfig:
    """The API keys of a live server: list, add and remove them.

    Args:
        root: the folder that the live loop writes.
        keys: the file of keys; empty takes keys.json in `root`.
        add: make a key for this name and print it, once.
        roles: what it may do: chat, rate (its own feedback), operate (everything).
        remove: the name whose key is no longer good.
        json: print one JSON object.
    """

    root: str = "runs/live"
    keys: str = ""
    add: str = ""
    roles: list[str] = dataclasses.field(default_factory=lambda: ["chat", "rate"])
    remove: str = ""
    json: bool = False


@dataclass(kw_only=True)
class VersionsConfig:
    """List the versions that the live loop has published; compare, promote, roll back and pin them.

    Args:
        root: the folder that the live loop writes.
        compare: two versions to measure against each other on the anchor answers.
        promote: let this version serve.
        roll_back: serve the parent of the version that serves again, its optimizer included.
        evaluate: versions to judge by the ratings of what others wrote: SNIPS and its effective sample size.
        store: of `evaluate`; empty takes store.db in `root`.
        anchor: measure drift from this version on, which gives learning new room when the gate refuses for drift.
        pin: a user who is served `version` whatever is published.
        unpin: a user who follows the current version again.
        version: of `pin`.
        json: print one JSON object.
    """

    root: str = "runs/live"
    compare: list[int] = dataclasses.field(default_factory=list)
    evaluate: list[int] = dataclasses.field(default_factory=list)
    store: str = ""
    promote: int | None = None
    roll_back: bool = False
    anchor: int | None = None
    pin: str = ""
    unpin: str = ""
    version: int | None = None
    json: bool = False


@dataclass(kw_only=True)
class ReplayConfig:
    """Prove versions: make each again from its record and its parent, and compare every weight.

    With the fingerprint that is in the record (the number of the learner's arithmetic, python, torch, transformers,
    processor, threads, dtype) the weights have the same bits; with another they lie within `tolerance`.

    Args:
        root: the folder that the live loop writes.
        store: where its feedback is; empty takes store.db in `root`.
        verify: the only thing to do with a replay today; false lists what can be verified.
        version: this one alone; otherwise each whose weights and whose parent's are on disk.
        tolerance: the largest difference of a weight that another fingerprint may make.
        device: auto, cpu, cuda or mps.
        dtype: as the learner had it.
        json: print one JSON object.
    """

    root: str = "runs/live"
    store: str = ""
    verify: bool = True
    version: int | None = None
    tolerance: float = 1e-4
    device: str = "auto"
    dtype: Literal["float32", "bf16"] = "float32"
    json: bool = False


@dataclass(kw_only=True)
class ForgetConfig:
    """Forget a source: what it said, what it asked, and what the weights have learned from it.

    A server that is at work in `root` does it while it goes on answering; without one, it is done here. Steps are made
    again from the last version before the source's first use; what had touched its feedback is deleted. What people
    have read in the meantime cannot be unsampled.

    Args:
        root: the folder that the live loop writes.
        store: where its feedback is; empty takes store.db in `root`. A server knows its own.
        source: whom to forget: the name of their key, or the source that was given with their feedback.
        device: auto, cpu, cuda or mps.
        dtype: as the learner had it.
        threads: CPU threads, which belong to the fingerprint; the server's learner has 1.
        json: print one JSON object.
    """

    root: str = "runs/live"
    store: str = ""
    source: str = ""
    device: str = "auto"
    dtype: Literal["float32", "bf16"] = "float32"
    threads: int = 1
    json: bool = False


@dataclass(kw_only=True)
class FeedbackConfig:
    """Look into a store of feedback; export, import, back up and prune it.

    Args:
        store: FILE.db or a database URL.
        root: the folder of the live loop, which knows how much each source counts; empty takes the one of FILE.db.
        score_low: the worst score, as the server was told.
        score_high: the best score.
        event: tell what became of the feedback with this id.
        export: a file of JSON Lines to write, or, of any form but lines, a folder for a data set.
        form: what is exported. lines: all, as operant prefer --replay reads it; events: one row each, with its texts;
            pairs: prompt, chosen, rejected; ratings: prompt, completion, label; rewards: prompt, completion, their
            tokens and log-probabilities, and what each token was paid, as operant train --logged reads them.
        midpoint: a score above it is a good rating, one below it a bad one.
        load: a file of feedback to take in; nothing else may write the store meanwhile.
        format: of that file. lines: operant's own; langfuse, langsmith, tensorzero: an export of that tool.
        metric: take in only this metric of another tool.
        backup: copy the store, also while it is used, to this SQLite file.
        max_age_days: remove what was asked longer ago, with its feedback, but nothing that is pending.
        max_bytes: remove the oldest until prompts and answers take no more.
        json: print one JSON object.
    """

    store: str = ""
    root: str = ""
    score_low: float = 0.0
    score_high: float = 1.0
    event: str = ""
    export: str = ""
    form: Literal["lines", "events", "pairs", "ratings", "rewards"] = "lines"
    midpoint: float = 0.5
    load: str = ""
    format: Literal["lines", "langfuse", "langsmith", "tensorzero"] = "lines"
    metric: str = ""
    backup: str = ""
    max_age_days: float = 0.0
    max_bytes: int = 0
    json: bool = False
