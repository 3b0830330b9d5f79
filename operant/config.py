"""One typed configuration per stage. Every field is a flag and a YAML key; nothing here imports torch.

A number's range stands on its field, and a number without one is refused when its class is made. Making a configuration
checks it, whoever makes it: the command line, a YAML file or Python.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.metadata
import math
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin, get_type_hints

import yaml
from annotated_types import BaseMetadata, Ge, GroupedMetadata, Gt, Interval, Le, Lt, MinLen, Predicate

from operant.types import OperantError

__all__ = [
    "AlgorithmsConfig",
    "EvalConfig",
    "FeedbackConfig",
    "ForgetConfig",
    "KeysConfig",
    "LearnerConfig",
    "LiveConfig",
    "LoraConfig",
    "MergeConfig",
    "PreferConfig",
    "PretrainConfig",
    "QuickstartConfig",
    "ReplayConfig",
    "RewardModelConfig",
    "RunConfig",
    "SampleConfig",
    "ScoreConfig",
    "ServeConfig",
    "SftConfig",
    "TrainConfig",
    "VersionsConfig",
    "WorkerConfig",
    "check_settings",
    "completed",
    "current_names",
    "describe",
    "install_line",
    "is_common",
    "load_config",
    "meant_setting",
    "setting_types",
    "settings_parser",
    "to_yaml",
    "unknown_setting",
]


T = TypeVar("T")

PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
FiniteFloat = Annotated[float, Predicate(math.isfinite)]
Share = Annotated[float, Interval(ge=0, le=1)]
PositiveShare = Annotated[float, Interval(gt=0, le=1)]
Seed = Annotated[int, Interval(ge=0, le=2**63 - 1)]
Texts = list[Annotated[str, MinLen(1)]]
Precision = Literal["float32", "bf16", "bf16-true"]

_COMMON = "common"
#: The type of a setting that most people need: `--help` shows these, `--help all` shows every one.
Common = Annotated[T, _COMMON]

_FORMER_NAMES = {"max_sick_steps": "max_nonfinite_steps"}
# What people who come from Transformers, TRL, verl or cleanrl type, under the setting that it is here. A name under
# several settings means the first of them that the command has.
_ELSEWHERE = {
    "lr": "learning_rate peak_lr step_size alpha",
    "n": "num_return_sequences num_samples num_completions num_generations group_size",
    "group_size": "num_generations num_return_sequences num_samples num_completions n rollout_n samples_per_prompt",
    "batch_size": "batch bs train_batch_size per_device_train_batch_size global_batch_size prompts_per_step",
    "prompts_per_step": "batch batch_size bs train_batch_size per_device_train_batch_size global_batch_size "
    "rollout_batch_size prompts_per_batch num_prompts",
    "batch_tokens": "batch batch_size bs train_batch_size per_device_train_batch_size global_batch_size",
    "max_rows": "eval_batch_size per_device_eval_batch_size batch batch_size bs",
    "accumulate": "gradient_accumulation_steps grad_accum accumulation_steps accumulate_grad_batches",
    "tokens_per_microbatch": "gradient_accumulation_steps grad_accum accumulation_steps micro_batch_size "
    "microbatch_size mini_batch_size per_device_batch_size",
    "epochs": "ppo_epochs num_ppo_epochs update_epochs num_iterations",
    "minibatches": "num_mini_batches num_minibatches",
    "steps": "max_steps num_steps total_steps train_steps num_train_steps training_steps iterations iters max_iters "
    "epochs epoch num_epochs num_train_epochs max_epochs",
    "max_tokens": "max_new_tokens max_completion_length max_completion_tokens max_response_length response_length "
    "max_gen_length max_generation_length max_length",
    "max_prompt_tokens": "max_prompt_length max_source_length",
    "block": "block_size max_seq_length max_seq_len seq_len sequence_length context_length",
    "max_length": "max_seq_length max_seq_len seq_len sequence_length context_length max_position_embeddings",
    "kl_coef": "kl kl_beta kl_penalty kl_weight kl_loss_coef init_kl_coef kl_ctl kl_coefficient beta",
    "beta": "kl kl_beta kl_penalty kl_weight kl_coef kl_coefficient dpo_beta",
    "kl_target": "target_kl target",
    "clip_low": "clip_range cliprange clip_coef clip_eps clip_ratio clip epsilon epsilon_low clip_ratio_low",
    "clip_high": "epsilon_high clip_ratio_high",
    "entropy_coef": "ent_coef entropy_coeff entropy entropy_bonus entropy_beta",
    "vf_coef": "value_coef value_loss_coef critic_coef vf_loss_coef",
    "vf_clip": "clip_range_vf cliprange_value",
    "critic_lr": "value_lr vf_lr",
    "gamma": "discount discount_factor",
    "lam": "lambda gae_lambda gae_lam lambda_",
    "whiten": "normalize_advantages normalize_advantage norm_adv whiten_advantages whiten_rewards",
    "baseline": "advantage adv_estimator advantage_estimator",
    "algorithm": "algo method loss_type adv_estimator",
    "reward": "reward_fn reward_func reward_funcs reward_function reward_model metric",
    "metrics": "metric",
    "reward_workers": "num_workers workers",
    "environment": "env env_id gym_env",
    "temperature": "temp",
    "warmup_steps": "warmup num_warmup_steps warmup_ratio lr_warmup_steps",
    "schedule": "scheduler lr_scheduler lr_scheduler_type lr_schedule",
    "weight_decay": "wd",
    "max_grad_norm": "grad_clip clip_grad gradient_clipping gradient_clip_val clip_grad_norm max_gradient_norm",
    "label_smoothing": "label_smoothing_factor",
    "eval_every": "eval_steps eval_interval eval_freq eval_frequency evaluation_steps val_every test_freq",
    "eval_prompts": "max_eval_samples eval_samples num_eval_samples",
    "save_every": "save_steps save_interval save_freq checkpoint_every checkpoint_interval checkpointing_steps",
    "keep": "save_total_limit keep_checkpoints",
    "patience": "early_stopping early_stopping_patience",
    "best_metric": "metric_for_best_model",
    "best_by": "metric_for_best_model best_metric",
    "log_samples": "log_completions num_completions_to_print",
    "max_minutes": "minutes max_time time_limit max_hours",
    "model": "model_name model_name_or_path model_path model_id base_model pretrained_model_name_or_path checkpoint",
    "arch": "architecture model_type",
    "size": "model_size",
    "tokenizer": "tokenizer_name tokenizer_name_or_path tokenizer_path",
    "lora_rank": "lora lora_r rank r",
    "lora_targets": "target_modules lora_target_modules",
    "out": "output output_dir out_dir save_dir save_path logdir",
    "data": "dataset dataset_name dataset_path data_path data_dir train_data train_file train_files train_dataset "
    "training_data file input",
    "dev_data": "eval_data eval_dataset eval_file val_data valid_data validation_data validation_file val_files "
    "test_data test_file dev_file dev",
    "sft_data": "ptx_data pretrain_data",
    "sft_coef": "ptx_coef sft_weight rpo_alpha",
    "limit": "max_samples max_train_samples num_examples max_examples num_rows max_rows",
    "prompt_field": "prompt_column input_column source_column prompt_key input_key question_field source_field",
    "reference_field": "reference_column answer_field answer_column completion_field completion_column response_field "
    "target_field target_column label_field references_field",
    "completion_field": "completion_column response_field answer_field output_field hypothesis_field",
    "text_field": "text_column dataset_text_field content_field",
    "stop": "stop_strings stop_sequences stop_token eos",
    "device": "gpu accelerator cuda",
    "dtype": "precision bf16 fp16 torch_dtype mixed_precision",
    "seed": "random_seed",
    "threads": "num_threads cpu_threads",
    "resume": "resume_from_checkpoint",
    "overwrite": "overwrite_output_dir force",
    "wandb": "wandb_project report_to project",
}
_KINDS = {int: "whole number", float: "number", str: "text"}


@dataclass(frozen=True, slots=True)
class Before:
    """What was in force before a setting existed. Stands on the field where that differs from the default."""

    value: Any


# --- what is true of every configuration -----------------------------------------------------------------------------


@dataclass_transform(kw_only_default=True, field_specifiers=(dataclasses.field,))
def settings(cls: type[T]) -> type[T]:
    """Make a class a configuration: a dataclass of keywords that refuses values out of range when it is made.

    A number's range stands on its field, as `Annotated[int, Ge(1)]`. Keywords may have former names.
    Raises TypeError for a class with a number that has no range. Making an object raises OperantError for a setting
    that there is not, as `unknown_setting` says it, and as `check_settings` does.
    """
    made: Any = dataclass(kw_only=True)(cls)
    for name, hint in setting_types(made).items():
        if any(base in (int, float) and not limits for base, limits in _parts(hint)):
            raise TypeError(f"{cls.__name__}.{name} is a number without a range; give it one, such as PositiveInt")
    construct = made.__init__

    @functools.wraps(construct)
    def init(self: Any, **given: Any) -> None:
        named = current_names(given)
        _check_names(named, made)
        construct(self, **named)
        check_settings(self)

    made.__init__ = init
    return made


@functools.cache
def setting_types(cls: Any) -> dict[str, Any]:
    """The type of each setting of a configuration, with all that it is annotated with."""
    return get_type_hints(cls, include_extras=True)


def check_settings(config: Any) -> None:
    """Refuse values that no run can use, before anything is loaded or written.

    Raises OperantError for the first setting outside the range on its field. No range holds NaN or infinities.
    """
    for name, hint in _limited(config.__class__).items():
        value = getattr(config, name)
        if not _fits(value, hint):
            wrong_kind = not _fits(value, hint, limited=False)
            words = describe(hint, kinds=wrong_kind)
            article = "a " if wrong_kind or words.startswith("list") else ""
            raise OperantError(f"{name} is {repr(value)[:60]}; it must be {article}{words}: correct --{name}")


def describe(hint: Any, *, kinds: bool = True) -> str:
    """The type of a setting in words, such as "number, 0 or more, or auto"; without `kinds`, "0 or more, or auto"."""
    words, choices = [], []
    for base, limits in _alternatives(hint):
        if get_origin(base) is list:
            ((kind, each),) = _parts(base)
            words.append(f"list of {_KINDS[kind]}s" + (f", each {_in_words(each)}" if each else ""))
        elif get_origin(base) is Literal:
            choices += [str(value) for value in get_args(base)]
        elif get_origin(base) is dict:
            words.append("names with values")
        elif base is bool:
            choices += ["true", "false"]
        elif base is NoneType:
            choices.append("null")
        else:
            words.append(", ".join(part for part in (_KINDS[base] * kinds, _in_words(limits)) if part))
    return ", or ".join([*words, " | ".join(choices)] if choices else words)


def current_names(given: Mapping[str, T]) -> dict[str, T]:
    """Settings under their names of today: former names and dashes are read too.

    Raises OperantError when one setting is given under two names.
    """
    out: dict[str, T] = {}
    for key, value in given.items():
        plain = str(key).replace("-", "_")
        name = _FORMER_NAMES.get(plain, plain)
        if name in out:
            raise OperantError(f"{name} is given under two names: leave one out")
        out[name] = value
    return out


def unknown_setting(name: str, cls: type, where: str = "") -> str:
    """One line for a setting that a configuration does not have, with the one that was probably meant.

    That is the setting that other trainers give this name, such as lr for learning_rate, or else the most similar name.
    A name that is known from elsewhere and stands for nothing here gets no guess.

    where: what has no such setting, such as "operant train"; the name of the configuration when empty.
    """
    own, of = meant_setting(name, cls), where or cls.__name__
    hint = f"did you mean --{own}?" if own else f"see {where} --help" if where else f"help({of}) lists them"
    return f"{of} has no setting --{name.replace('-', '_')}; {hint}"


def meant_setting(name: str, cls: type) -> str | None:
    """The setting of a configuration that is probably meant by a name from elsewhere or a misspelt one, if any is."""
    fields = setting_types(cls).keys()
    plain = name.lower().replace("-", "_").lstrip("_")
    known = {other for others in _ELSEWHERE.values() for other in others.split()}
    meant = {other: own for own in reversed(_ELSEWHERE) if own in fields for other in _ELSEWHERE[own].split()}
    if plain not in known | fields:
        plain = next(iter(difflib.get_close_matches(plain, [*fields, *meant], n=1, cutoff=0.7)), plain)
    return plain if plain in fields else meant.get(plain)


def _check_names(given: Mapping[str, Any], cls: type) -> None:
    """Raises OperantError for the first name that is no setting of the configuration."""
    for name in given:
        if name not in setting_types(cls):
            raise OperantError(unknown_setting(name, cls))


def completed(cls: type, stored: Mapping[str, Any]) -> dict[str, Any]:
    """What a stored configuration of any age says in today's settings.

    Former names become today's. A key that it lacks is younger than it is, and has the value that was in force before:
    what `Before` says on the field, or else the default.
    Raises OperantError when one setting is stored under two names.
    """
    defaults = {}
    for field in dataclasses.fields(cls):
        before = [m.value for m in getattr(setting_types(cls)[field.name], "__metadata__", ()) if isinstance(m, Before)]
        made = field.default_factory() if callable(field.default_factory) else field.default
        defaults[field.name] = before[0] if before else made
    return defaults | current_names(stored)


def install_line(*packages: str, extra: str = "") -> str:
    """The command that installs these packages, or those of operant's `extra`, into the environment that runs.

    No package index has operant, so the line names what the extra stands for: it is the same for a clone and a wheel.
    """
    if extra:
        try:
            requirements = importlib.metadata.requires("operant") or []
        except importlib.metadata.PackageNotFoundError:  # a source tree on the path: only the tree knows
            packages = (f"{Path(__file__).resolve().parents[1]}[{extra}]",)
        else:
            parts = (requirement.partition(";") for requirement in requirements)
            packages = tuple(name.strip() for name, _, marker in parts if extra in marker.replace('"', "'").split("'"))
    return shlex.join([sys.executable or "python", "-m", "pip", "install", *packages])


def is_common(hint: Any) -> bool:
    """Whether a setting of this type is one that most people need."""
    return _COMMON in getattr(hint, "__metadata__", ())


def to_yaml(config: Any) -> str:
    """The configuration as it is shown, and kept in the run folder."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def load_config(path: str | Path, kind: type[T]) -> T:
    """A configuration from a YAML file, such as the config.yaml of a run folder; what the file leaves out has its
    default.

    kind: which, such as `operant.TrainConfig`. Settings and values are checked as those of `--config` are.

    Raises OperantError for a file that cannot be read, for a setting that there is not, for a value of another type and
    for a number out of its range.
    """
    import jsonargparse

    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        if isinstance(given := yaml.safe_load(text), dict):
            _check_names(current_names(given), kind)
        values = settings_parser(kind).parse_string(text).as_dict()
    except OperantError as error:
        raise OperantError(f"{path}: {error}") from None
    except (yaml.YAMLError, jsonargparse.ArgumentError, OSError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:400]
        raise OperantError(f"{path} is no configuration that can be read ({reason}); correct it") from error
    return kind(**values)


def settings_parser(kind: type, **options: Any) -> Any:
    """A jsonargparse parser with the settings of a configuration as flags and YAML keys, also under former names.

    options: of `jsonargparse.ArgumentParser`.
    """
    import jsonargparse

    def read(text: str) -> Any:
        value = jsonargparse.get_loader("yaml")(text)
        return current_names(value) if isinstance(value, dict) else value

    jsonargparse.set_loader("operant", read, (yaml.YAMLError,))
    parser = jsonargparse.ArgumentParser(parser_mode="operant", exit_on_error=False, **options)
    parser.add_class_arguments(kind, as_group=False)
    return parser


@functools.cache
def _alternatives(hint: Any) -> tuple[tuple[Any, tuple[Any, ...]], ...]:
    """The types that a value may have, each without its annotations, and the limits among these."""
    annotations: tuple[Any, ...] = ()
    if get_origin(hint) is Annotated:
        hint, annotations = hint.__origin__, hint.__metadata__
    if get_origin(hint) in (Union, UnionType):
        return tuple(one for inner in get_args(hint) for one in _alternatives(inner))
    limits = [limit for m in annotations for limit in (m if isinstance(m, GroupedMetadata) else [m])]
    return ((hint, tuple(limit for limit in limits if isinstance(limit, BaseMetadata))),)


@functools.cache
def _parts(hint: Any) -> tuple[tuple[Any, tuple[Any, ...]], ...]:
    """As `_alternatives`, with the types of a list's items in place of the list."""
    return tuple(
        part
        for base, limits in _alternatives(hint)
        for part in (_parts(get_args(base)[0]) if get_origin(base) is list else ((base, limits),))
    )


@functools.cache
def _limited(cls: Any) -> dict[str, Any]:
    """The types of those settings that have limits."""
    return {name: hint for name, hint in setting_types(cls).items() if any(limits for _, limits in _parts(hint))}


def _fits(value: Any, hint: Any, *, limited: bool = True) -> bool:
    return any(_fits_one(value, base, limits if limited else ()) for base, limits in _alternatives(hint))


def _fits_one(value: Any, base: Any, limits: tuple[Any, ...]) -> bool:
    if get_origin(base) is list:
        return isinstance(value, list | tuple) and all(_fits(one, get_args(base)[0]) for one in value)
    if get_origin(base) is Literal:
        return value in get_args(base) and not isinstance(value, bool)
    if get_origin(base) is dict:
        return isinstance(value, Mapping)
    if base not in (int, float):
        return isinstance(value, base) and all(_holds(value, limit) for limit in limits)
    if isinstance(value, bool) or not isinstance(value, Integral if base is int else Real):
        return False
    try:
        return not limits or (math.isfinite(value) and all(_holds(value, limit) for limit in limits))
    except OverflowError:  # a whole number beyond every float
        return False


def _holds(value: Any, limit: Any) -> bool:
    match limit:
        case Ge():
            return value >= limit.ge
        case Gt():
            return value > limit.gt
        case Le():
            return value <= limit.le
        case Lt():
            return value < limit.lt
        case MinLen():
            return len(value) >= limit.min_length
        case Predicate():
            return bool(limit.func(value))
    raise TypeError(f"a setting cannot be limited by {limit}")


def _in_words(limits: tuple[Any, ...]) -> str:
    at = {type(limit): limit for limit in limits}
    if {Ge, Le} <= at.keys():
        return f"between {at[Ge].ge} and {'2^63 - 1' if at[Le].le == 2**63 - 1 else at[Le].le}"
    words = {
        Ge: lambda limit: f"{limit.ge} or more", Gt: lambda limit: f"more than {limit.gt}",
        Le: lambda limit: f"at most {limit.le}", Lt: lambda limit: f"less than {limit.lt}",
        MinLen: lambda limit: "not empty", Predicate: lambda limit: "finite",
    }  # fmt: skip
    return " and ".join(words[kind](at[kind]) for kind in words if kind in at)


@settings
class RunConfig:
    """The run: its folder, its device, its limits.

    Args:
        out: the run folder; it must be new, or be resumed.
        seed: of everything random: weights, data order, sampling.
        resume: go on with the run in `out` from its last checkpoint, bit for bit on the same machine.
        overwrite: throw the run in `out` away first.
        accept_changes: resume although the data, the chat template or the source of the reward has changed since.
        device: auto, cpu, cuda, cuda:1 or mps.
        dtype: float32; bf16 for autocast over float32 weights; bf16-true for weights in bf16 too, half the memory,
            beside which an adapter stays float32.
        threads: CPU threads for the matrix work; 0 leaves torch's default.
        max_minutes: stop after this many minutes; 0 for no limit.
        clock: what these minutes are of: wall time, or cpu: time for which the processor worked for this process, which
            other programs hardly disturb. For comparisons; all threads count, processes that compute rewards do not.
        save_every: optimizer steps between checkpoints.
        keep: checkpoints kept beside the best one.
        report: write report.html and its curves at the end, which takes seconds.
        tensorboard: also write TensorBoard event files.
        wandb: Weights & Biases project to log to as well (needs the extra wandb).
        max_grad_norm: gradients are scaled down to this norm.
        weight_decay: AdamW's, on matrices only.
        tokens_per_microbatch: padded tokens that go through the model at once, at most; fewer where a model is large or
            memory short.
        activation_checkpointing: compute layers again in the backward pass instead of keeping what they computed: a
            fraction of the memory for one more forward pass.
        max_nonfinite_steps: steps in a row with a non-finite loss or gradient before rolling back and stopping.
    """

    out: Common[str] = "runs/run"
    seed: Common[Seed] = 0
    resume: Common[bool] = False
    overwrite: Common[bool] = False
    accept_changes: bool = False
    device: Common[str] = "auto"
    dtype: Precision = "float32"
    threads: NonNegativeInt = 0
    max_minutes: Common[NonNegativeFloat] = 0.0
    clock: Literal["wall", "cpu"] = "wall"
    save_every: PositiveInt = 200
    keep: PositiveInt = 2
    report: bool = True
    tensorboard: bool = True
    wandb: str | None = None
    max_grad_norm: PositiveFloat = 1.0
    weight_decay: NonNegativeFloat = 0.01
    tokens_per_microbatch: PositiveInt = 16384
    activation_checkpointing: bool = False
    max_nonfinite_steps: PositiveInt = 3


@settings
class StartConfig:
    """Which model a stage starts from.

    Args:
        model: a folder, hub id or GGUF file to start from; empty makes a new one from `arch` and `size`. Where a writer
            is needed, a folder with an encoder (bert, roberta) gets a decoder that begins from it too (Rothe et al.
            2020).
        arch: gpt2 or llama (decoder-only), t5 or mbart (encoder-decoder; mbart learns from nothing faster), bert (an
            encoder, which reads and does not write).
        size: tiny, small or base.
        tokenizer: a folder or hub id with a tokenizer for a new model; empty trains a byte-level BPE on the data.
        vocab_size: of a newly trained tokenizer.
        max_length: tokens that a new model can hold.
        dropout: of a new model, while fine-tuning and pretraining.
    """

    model: Common[str | None] = None
    arch: Common[Literal["gpt2", "llama", "t5", "mbart", "bert"]] = "gpt2"
    size: Common[Literal["tiny", "small", "base"]] = "tiny"
    tokenizer: str | None = None
    vocab_size: PositiveInt = 4096
    max_length: Annotated[int, Ge(2)] = 512
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0


@settings
class LoraConfig:
    """An adapter that is trained instead of the weights (Hu et al. 2021): W + (alpha / rank) · B A.

    Args:
        lora_rank: train a low-rank adapter of this rank instead of the weights; 0 trains the weights.
        lora_alpha: the adapter's alpha; 0 is twice the rank.
        lora_targets: names of the layers that get one, such as [q_proj, v_proj]; empty is every linear layer but the
            head.
    """

    lora_rank: Common[NonNegativeInt] = 0
    lora_alpha: NonNegativeFloat = 0.0
    lora_targets: Texts = dataclasses.field(default_factory=list)

    def settled_alpha(self) -> float:
        """`lora_alpha` as a number: twice the rank where it is 0."""
        return self.lora_alpha or 2.0 * self.lora_rank


@settings
class ModelConfig(LoraConfig, StartConfig):
    """Which model a stage starts from, and how much of it is trained.

    Args:
        lora_dropout: share of what an adapter reads that is dropped while it learns.
    """

    lora_dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0


@settings
class FormatFields:
    """How prompts are written. Null is as the model was trained, which is kept beside it.

    Args:
        chat: write a text prompt as a user's message in the chat template; auto does so where the model has one and was
            not trained without.
        system: system message of chats that have none.
        template_arguments: more that the chat template takes, such as {enable_thinking: false}.
        prefix: text put before every text prompt; null is none for a model of which nothing is kept.
        separator: text between prompt and completion for decoder-only models, where there is no chat; null is a newline
            for a model of which nothing is kept.
        source_lang: language of the prompts, by the tokenizer's code for it (NLLB: eng_Latn); null is the tokenizer's.
        target_lang: language of the completions, which then begin with its token; null is the model's own.
    """

    chat: Annotated[bool | Literal["auto"], Before(False)] = "auto"
    system: str | None = None
    template_arguments: dict[str, Any] | None = None
    prefix: str | None = None
    separator: str | None = None
    source_lang: str | None = None
    target_lang: str | None = None


@settings
class PairFields(FormatFields):
    """Where prompts and answers are in the data.

    Args:
        prompt_field: column of the prompt; guessed from the usual names when empty.
        reference_field: column of the answer, one string or a list of several.
        max_prompt_tokens: longest prompt; 0 is the longest that the model can hold.
        too_long: what to do with longer ones.
    """

    prompt_field: Common[str | None] = None
    reference_field: Common[str | None] = None
    max_prompt_tokens: NonNegativeInt = 0
    too_long: Literal["error", "skip", "truncate"] = "error"


@settings
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
        lr: peak learning rate; auto takes the one for what is trained (docs/real_models.md).
        warmup_steps: steps of linear warm-up.
        schedule: learning rate after the warm-up.
        eval_every: steps between measurements of the dev loss.
        block: packed row length; 0 takes the model's.
        noise_density: share of tokens that span corruption or masking hides.
        mean_span: mean length of a hidden span.
    """

    objective: Common[Literal["auto", "causal", "spans", "infilling", "mlm"]] = "auto"
    data: Common[str] = ""
    dev_data: Common[str | None] = None
    text_field: Common[str | None] = None
    limit: PositiveInt | None = None
    out: Common[str] = "runs/pretrain"
    steps: Common[PositiveInt] = 1000
    batch_tokens: Common[PositiveInt] = 8192
    accumulate: PositiveInt = 1
    lr: Common[NonNegativeFloat | Literal["auto"]] = "auto"
    warmup_steps: NonNegativeInt = 50
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    eval_every: Common[PositiveInt] = 100
    block: Literal[0] | Annotated[int, Ge(2)] = 0
    noise_density: Annotated[float, Interval(gt=0, lt=1)] = 0.15
    mean_span: Annotated[float, Ge(1)] = 3.0


@settings
class SftConfig(RunConfig, ModelConfig, PairFields):
    """Fine-tune on labelled pairs; the loss is on the answer's tokens only.

    Args:
        data: pairs, in any of the forms that `operant pretrain --data` takes.
        dev_data: held-out pairs; empty takes the dev split of `data`, or the last tenth of it.
        limit: use only the first rows.
        train_on: of a chat, the assistant's last message, or all of them, each a pair of its own with what was said
            before it.
        steps: at most so many optimizer steps.
        batch_size: pairs per optimizer step.
        lr: peak learning rate; auto takes the one for what is trained (docs/real_models.md).
        warmup_steps: steps of linear warm-up.
        schedule: learning rate after the warm-up.
        label_smoothing: ε of Szegedy et al. 2016.
        best_metric: measure for the best checkpoint and `patience`: the dev loss, or a metric of greedy completions.
            The loss of a small model often turns up long before its completions stop getting better.
        eval_every: steps between measurements.
        eval_prompts: how many held-out prompts are completed for `best_metric`.
        max_tokens: their longest completion.
        patience: stop when it has not improved for so many measurements; 0 never stops early.
    """

    data: Common[str] = ""
    dev_data: Common[str | None] = None
    limit: PositiveInt | None = None
    train_on: Literal["last", "all"] = "last"
    out: Common[str] = "runs/sft"
    steps: Common[PositiveInt] = 2000
    batch_size: Common[PositiveInt] = 64
    lr: Common[NonNegativeFloat | Literal["auto"]] = "auto"
    warmup_steps: NonNegativeInt = 20
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    label_smoothing: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    best_metric: Common[Literal["loss", "bleu", "chrf", "rougeL", "exact"]] = "loss"
    eval_every: Common[PositiveInt] = 50
    eval_prompts: NonNegativeInt = 200
    max_tokens: PositiveInt = 64
    patience: Common[NonNegativeInt] = 4


@settings
class PreferConfig(LoraConfig, RunConfig, FormatFields):
    """Learn from preferences: pairs (DPO, IPO), edits read as pairs, or single completions that are good or bad (KTO).

    Args:
        model: the policy to start from, a folder, hub id or GGUF file; as it is now, it is also the reference.
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
        max_prompt_tokens: longest prompt; 0 is the longest that the model can hold.
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
        lr: peak learning rate; auto takes the algorithm's for what is trained (`operant algorithms --json`).
        warmup_steps: steps of linear warm-up.
        schedule: learning rate after the warm-up.
        measure_kl: measure the KL to the reference on held-out rows, which keeps a second copy of full weights.
        eval_every: steps between measurements of the held-out loss.
        eval_prompts: how many held-out prompts are answered then, to see that the texts are sound; 0 answers none.
        max_tokens: their longest completion.
        patience: stop when it has not improved for so many measurements; 0 never stops early.
    """

    model: Common[str] = ""
    data: Common[str] = ""
    dev_data: Common[str | None] = None
    limit: PositiveInt | None = None
    replay: Common[str | None] = None
    half_life: NonNegativeFloat = 0.0
    midpoint: FiniteFloat = 0.5
    out: Common[str] = "runs/prefer"
    prompt_field: str | None = None
    chosen_field: Common[str | None] = None
    rejected_field: Common[str | None] = None
    completion_field: str | None = None
    label_field: str | None = None
    max_prompt_tokens: NonNegativeInt = 0
    too_long: Literal["error", "skip", "truncate"] = "error"
    algorithm: Common[str] = "dpo"
    beta: Common[PositiveFloat] = 0.1
    logprob: Literal["auto", "sum", "mean"] = "auto"
    label_smoothing: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    sft_coef: NonNegativeFloat = 0.0
    desirable_weight: NonNegativeFloat = 1.0
    undesirable_weight: NonNegativeFloat = 1.0
    steps: Common[PositiveInt] = 500
    batch_size: Common[PositiveInt] = 32
    lr: Common[NonNegativeFloat | Literal["auto"]] = "auto"
    warmup_steps: NonNegativeInt = 20
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    weight_decay: NonNegativeFloat = 0.0
    measure_kl: bool = True
    eval_every: Common[PositiveInt] = 25
    eval_prompts: NonNegativeInt = 16
    max_tokens: PositiveInt = 64
    patience: Common[NonNegativeInt] = 4


@settings
class RewardFields:
    """What is paid.

    Args:
        reward: names with weights, such as "chrf" or "chrf + 0.1*length", or module:function.
        environment: a Gymnasium environment whose observations and actions are texts, instead of data and a reward:
            its id or module:Class. The policy then plays episodes of several turns and learns from what each pays.
        max_turns: an episode that has not ended by then is cut off.
        dense: pay metric rewards token by token through a potential instead of at the end; auto does so where a metric
            of the reward has one and the algorithm, with its baseline, can place what tokens are paid. True also
            declares that a function of your own pays per token; one that does without is noticed when it does.
        potential: how prefixes are scored when dense: `prefix` or `matched`; auto takes the metric's default.
        reward_workers: processes that compute rewards; −1 chooses, 0 computes them in threads of this process.
        reward_seconds: time limit for one reward (one token of a streaming one); a slower one is a missing reward.
        overlong_buffer: tokens before max_tokens over which a penalty on length grows; 0 for none.
        overlong_penalty: that penalty at max_tokens.
    """

    reward: Common[str] = "chrf"
    environment: str | None = None
    max_turns: PositiveInt = 16
    dense: Common[bool | Literal["auto"]] = "auto"
    potential: Literal["auto", "prefix", "matched"] = "auto"
    reward_workers: Annotated[int, Ge(-1)] = -1
    reward_seconds: PositiveFloat = 10.0
    overlong_buffer: NonNegativeInt | Literal["auto"] = "auto"
    overlong_penalty: NonNegativeFloat = 1.0


@settings
class CreditFields:
    """What each token is credited with.

    Args:
        baseline: auto takes the algorithm's own; else none, running, batch, leave_one_out, position_leave_one_out,
            control_variate, group_scaled, group_centred, greedy, route or critic.
        beta: coefficient of the potential as a control variate, or `auto` to fit it on the other prompts.
        gamma: discount per token.
        gamma_turn: discount per turn of an environment, beside that per token; the environment's text costs none.
        discount_state: weigh token t's term by γ^t, the exact gradient of the discounted objective.
        whiten: bring the advantages of a step to mean 0 and deviation 1.
        baseline_shift: how far the baseline is lowered, for learning off policy; auto is 0.1 for areinforce, and 0.3
            when it learns from a log.
        baseline_rate: how fast a route's persistent baseline follows its rewards.
        reward_midpoint: where such a baseline begins: the middle of the reward's scale.
        route_by: what a route is: the prompt's task, or each prompt for itself.
    """

    baseline: str = "auto"
    beta: FiniteFloat | Literal["auto"] = "auto"
    gamma: Share = 1.0
    gamma_turn: Share = 1.0
    discount_state: bool = False
    whiten: bool | Literal["auto"] = "auto"
    baseline_shift: FiniteFloat | Literal["auto"] = "auto"
    baseline_rate: Share = 0.1
    reward_midpoint: FiniteFloat = 0.5
    route_by: Literal["task", "prompt"] = "task"


@settings
class SamplingFields:
    """What is sampled in a step.

    Args:
        group_size: completions per prompt.
        prompts_per_step: prompts per step.
        temperature: of sampling and, like for like, of the ratio.
        top_p: nucleus sampling; learning needs 1, the policy's own distribution.
        top_k: draw only from the k likeliest tokens; learning needs 0, which is off.
        max_tokens: longest completion.
        stop: strings that end a completion.
        audit_fraction: share of the completions ended by a streaming reward that run on, to measure the cost of ends.
        max_rows: completions decoded together.
        dynamic_sampling: leave out groups whose rewards are all equal and sample other prompts instead.
        dynamic_rounds: at most so many rounds of sampling a step.
    """

    group_size: Common[PositiveInt] = 4
    prompts_per_step: Common[PositiveInt] = 32
    temperature: NonNegativeFloat = 1.0
    top_p: PositiveShare = 1.0
    top_k: NonNegativeInt = 0
    max_tokens: Common[PositiveInt] = 64
    stop: Texts = dataclasses.field(default_factory=list)
    audit_fraction: Share = 0.0
    max_rows: PositiveInt = 256
    dynamic_sampling: bool | Literal["auto"] = "auto"
    dynamic_rounds: PositiveInt = 4


@settings
class PassFields:
    """How often, and how far, a step learns from what it sampled.

    Args:
        normalisation: auto takes the algorithm's own; else per_completion, per_token, per_sequence_mean or constant.
        epochs: passes over each batch of completions, for algorithms that may (PPO, GRPO and others).
        minibatches: optimizer steps per pass.
        clip_low: the ratio's lower clip range.
        clip_high: the ratio's upper clip range.
        correction_cap: cap of the truncated correction from sampler to trainer; 0 for none. Used in bf16.
        correction_band: leave out completions whose mean ratio from sampler to trainer is out of 1 ± this; 0 for none.
    """

    normalisation: str = "auto"
    epochs: PositiveInt = 1
    minibatches: PositiveInt = 1
    clip_low: NonNegativeFloat | Literal["auto"] = "auto"
    clip_high: NonNegativeFloat | Literal["auto"] = "auto"
    correction_cap: NonNegativeFloat = 2.0
    correction_band: NonNegativeFloat = 0.0


@settings
class CriticFields:
    """The critic.

    Args:
        lam: λ of the critic's advantage estimate: 1 trusts returns alone, 0 the critic's next value alone.
        critic: separate gives it a copy of the model as its own trunk, shared a head on the policy's.
        critic_lr: its learning rate; 0 takes five times the policy's.
        vf_coef: weight of its loss.
        vf_clip: clip range of its change within a step; 0 for none.
        bootstrap: the critic's value follows a completion that the length limit cut off; auto does so for dense
            rewards, since a reward of the whole text was already paid for the cut one.
    """

    lam: Share | Literal["auto"] = "auto"
    critic: Literal["auto", "separate", "shared"] = "auto"
    critic_lr: NonNegativeFloat = 0.0
    vf_coef: NonNegativeFloat = 0.5
    vf_clip: NonNegativeFloat = 0.0
    bootstrap: bool | Literal["auto"] = "auto"


@settings
class TrustRegionFields:
    """The trust region of trpo.

    Args:
        delta: nats per token that a step of trpo may move the policy; takes the place of lr, its schedule and
            max_grad_norm.
        damping: added to the Fisher matrix's diagonal (trpo); more is nearer to the plain gradient's direction, which
            steps of few completions need.
        cg_steps: Fisher-vector products a step (trpo).
        fisher_share: share of a step's completions that the Fisher matrix is taken from (trpo), at least eight of them.
        backtracks: lengths that its line search tries, each at most half of the one before, before it refuses the step.
    """

    delta: PositiveFloat = 0.03
    damping: NonNegativeFloat = 0.01
    cg_steps: PositiveInt = 10
    fisher_share: Annotated[PositiveShare, Before(1.0)] = 0.1  # it was taken from all
    backtracks: PositiveInt = 10


@settings
class DoubleQFields:
    """The action values of double_q.

    Args:
        q_beta: what it costs double_q to leave the model that it starts from, in units of the reward: it says
            π_ref · exp(A / q_beta). 0.1 is for rewards from 0 to 1; for people's, from −1 to 1, give 0.2.
        n_step: tokens whose rewards are taken as paid before a token's value is asked for (double_q).
        target_every: steps after which the lagging estimate is brought up to the learning one (double_q).
        replay_capacity: completions that are kept to learn from again (double_q).
        priority: 0 draws them uniformly; 1 by the size of their error (double_q).
        support: tokens less likely than this share of the likeliest one are no candidates for the best (double_q).
    """

    q_beta: PositiveFloat = 0.1
    n_step: PositiveInt = 8
    target_every: PositiveInt = 10
    replay_capacity: PositiveInt = 4096
    priority: NonNegativeFloat = 0.0
    support: Share = 0.05


@settings
class DriftFields:
    """What holds the policy near to where it began.

    Args:
        kl_coef: weight of the KL to the policy as this stage found it.
        kl_target: nats per token that kl_coef is adapted to reach after every step; 0 leaves it fixed.
        kl_in: put it in the reward (k1) or in the loss.
        kl_estimator: of the KL in the loss: k2, k3 (another divergence) or full (whole vocabulary).
        entropy_coef: weight of the entropy bonus.
        sft_coef: weight of the supervised loss on `sft_data` in every step.
        sft_data: labelled pairs for `sft_coef`.
        sft_batch_size: pairs per step.
    """

    kl_coef: Common[NonNegativeFloat] = 0.0
    kl_target: NonNegativeFloat = 0.0
    kl_in: Literal["reward", "loss"] = "loss"
    kl_estimator: Literal["k2", "k3", "full"] = "k2"
    entropy_coef: NonNegativeFloat = 0.0
    sft_coef: NonNegativeFloat = 0.0
    sft_data: str | None = None
    sft_batch_size: PositiveInt = 16


@settings
class HeldOutFields:
    """What is measured on held-out prompts.

    Args:
        target: stop once a held-out metric reaches this, such as "bleu>=30" or "reward>=0.8".
        best_metric: the held-out metric by which the best checkpoint is kept.
        eval_every: steps between held-out evaluations.
        eval_prompts: how many held-out prompts; 0 measures nothing held out.
        log_samples: completions kept for reading at every evaluation.
    """

    target: Common[str | None] = None
    best_metric: str = "reward"
    eval_every: Common[PositiveInt] = 20
    eval_prompts: NonNegativeInt = 200
    log_samples: NonNegativeInt = 8


@settings
class TrainConfig(
    LoraConfig, RunConfig, HeldOutFields, DriftFields, DoubleQFields, TrustRegionFields, CriticFields, PassFields,
    SamplingFields, CreditFields, RewardFields, PairFields,
):  # fmt: skip
    """Learn from rewards: sample, reward, credit, policy-gradient step, again.

    Args:
        model: the policy to start from, a folder, hub id or GGUF file.
        data: prompts, with references if the reward needs them; only the reward sees these.
        dev_data: held-out prompts; empty takes the dev split of `data`, or its last twentieth (at most 200).
        limit: use only the first rows.
        out: the run folder.
        logged: completions that were written before, instead of new ones, for algorithms that may learn from stale
            ones: rows of prompt, completion (or its tokens) and reward; without a reward, --reward judges them. All
            but double_q also need behavior_logprobs, as operant sample --json prints them: rows without are left out.
        algorithm: one of the table that `operant algorithms` prints. What is `auto` below is then as its paper says.
        steps: at most so many steps.
        lr: learning rate; auto takes the algorithm's for what is trained (`operant algorithms --json`).
        warmup_steps: steps of linear warm-up.
        schedule: learning rate after the warm-up.
    """

    model: Common[str] = ""
    data: Common[str] = ""
    dev_data: Common[str | None] = None
    limit: PositiveInt | None = None
    out: Common[str] = "runs/train"
    logged: str | None = None
    algorithm: Common[str] = "rloo"
    steps: Common[PositiveInt] = 500
    lr: Common[NonNegativeFloat | Literal["auto"]] = "auto"
    warmup_steps: NonNegativeInt = 5
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    weight_decay: NonNegativeFloat = 0.0
    save_every: PositiveInt = 50


@settings
class RewardModelConfig(RunConfig, ModelConfig):
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
        lr: peak learning rate; auto takes the one for what is trained (docs/real_models.md).
        warmup_steps: steps of linear warm-up.
        schedule: learning rate after the warm-up.
        eval_every: steps between held-out measurements.
        patience: stop when the held-out measure has not improved for so many measurements; 0 never stops early.
        best_by: what chooses the checkpoint: accuracy (comparison) or correlation (the others), the loss where they are
            equal; or the held-out loss alone.
    """

    kind: Common[Literal["regression", "comparison", "token"]] = "comparison"
    data: Common[str] = ""
    dev_data: Common[str | None] = None
    limit: PositiveInt | None = None
    prompt_field: Common[str | None] = None
    completion_field: Common[str] = "completion"
    score_field: Common[str] = "score"
    lower_is_better: bool = False
    chosen_field: Common[str] = "chosen"
    rejected_field: Common[str] = "rejected"
    label_field: str | None = None
    span_field: str = "spans"
    separator: str = "\n"
    pool: Literal["auto", "mean", "last"] = "auto"
    too_long: Literal["error", "skip"] = "error"
    arch: Common[Literal["gpt2", "llama", "t5", "bert"]] = "bert"
    out: Common[str] = "runs/reward-model"
    steps: Common[PositiveInt] = 500
    batch_size: Common[PositiveInt] = 32
    lr: Common[NonNegativeFloat | Literal["auto"]] = "auto"
    warmup_steps: NonNegativeInt = 20
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    eval_every: PositiveInt = 25
    patience: Common[NonNegativeInt] = 8
    best_by: Literal["measure", "loss"] = "measure"


@settings
class EvalConfig(PairFields):
    """Measure a model on a data set.

    Args:
        model: a folder, hub id or GGUF file.
        data: prompts with references; of a folder or hub data set the test split, or the dev split where there is none.
        metrics: which corpus metrics to print.
        limit: use only the first rows.
        max_tokens: longest completion.
        temperature: 0 is greedy.
        stop: strings that end a completion.
        max_rows: completions decoded together.
        seed: of sampling.
        device: auto, cpu, cuda, cuda:1 or mps.
        dtype: float32; bf16 for autocast over float32 weights; bf16-true for weights in bf16 too, half the memory,
            beside which an adapter stays float32.
        samples: write the completions to this JSON Lines file.
        json: print one JSON object.
    """

    model: str = ""
    data: str = ""
    metrics: list[str] = dataclasses.field(default_factory=lambda: ["bleu", "chrf", "rougeL", "exact"])
    limit: PositiveInt | None = None
    max_tokens: PositiveInt = 64
    temperature: NonNegativeFloat = 0.0
    stop: Texts = dataclasses.field(default_factory=list)
    max_rows: PositiveInt = 256
    seed: Seed = 0
    device: str = "auto"
    dtype: Precision = "float32"
    samples: str | None = None
    json: bool = False


@settings
class ScoreConfig:
    """Rewards of completions that are already in a file.

    Args:
        reward: as in `operant train`.
        data: rows with prompt, completion and, if the reward needs them, references; of a folder or hub data set the
            test split, or the first there is of dev and train.
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
    reward_seconds: PositiveFloat = 10.0
    limit: PositiveInt | None = None
    json: bool = False


@settings
class SampleConfig(FormatFields):
    """Write completions.

    Args:
        model: a folder, hub id or GGUF file.
        prompt: the prompt to answer; empty reads lines from standard input.
        n: completions per prompt.
        temperature: 0 is greedy; auto is what the model's generation_config says, or else 0.7 for a chat and 1 for a
            text.
        top_p: nucleus sampling; auto as above, or else 0.9 for a chat of automatic temperature and 1 otherwise.
        top_k: draw only from the k likeliest tokens; 0 is off; auto as above, or else off.
        max_tokens: longest completion.
        stop: strings that end a completion.
        max_rows: completions decoded together, of as many lines as are there.
        seed: of sampling.
        device: auto, cpu, cuda, cuda:1 or mps.
        dtype: float32; bf16 for autocast over float32 weights; bf16-true for weights in bf16 too, half the memory,
            beside which an adapter stays float32.
        json: print one JSON object a completion, with its tokens and log-probabilities: a row for train --logged.
    """

    model: str = ""
    prompt: str = ""
    n: PositiveInt = 1
    temperature: NonNegativeFloat | Literal["auto"] = "auto"
    top_p: PositiveShare | Literal["auto"] = "auto"
    top_k: NonNegativeInt | Literal["auto"] = "auto"
    max_tokens: PositiveInt = 64
    stop: Texts = dataclasses.field(default_factory=list)
    max_rows: PositiveInt = 32
    seed: Seed = 0
    device: str = "auto"
    dtype: Precision = "float32"
    json: bool = False


@settings
class MergeConfig:
    """Add an adapter to its base: a plain folder in the base's precision, which needs neither PEFT nor the base.

    Args:
        model: a folder with an adapter, such as the model of a run with --lora_rank.
        out: the new folder.
        overwrite: replace the model in `out`.
    """

    model: str = ""
    out: str = "runs/merged"
    overwrite: bool = False


@settings
class QuickstartConfig:
    """Pretrain, fine-tune and learn from instant reward on a built-in task: written-out English to Chinese.

    Args:
        out: the run folder.
        seed: of the task's rows, the weights, the data order and sampling.
        overwrite: throw the run in `out` away first.
        threads: CPU threads for the matrix work; 0 takes the cores that nobody keeps busy.
        labelled: labelled pairs to fine-tune on.
        prompts: prompts whose references only the reward sees.
        minutes: processor time that the reward stage may take at most, and fine-tuning further on the same pairs.
        device: auto, cpu, cuda or mps.
    """

    out: str = "runs/quickstart"
    seed: Seed = 0
    overwrite: bool = False
    threads: NonNegativeInt = 0
    labelled: Annotated[int, Interval(ge=1, le=100_000)] = 550
    prompts: Annotated[int, Interval(ge=1, le=100_000)] = 6000
    minutes: PositiveFloat = 10.0
    device: str = "auto"


@settings
class AlgorithmsConfig:
    """The algorithms that `operant train` knows, what each needs and what it honours.

    Args:
        json: print one JSON array.
    """

    json: bool = False


@settings
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
        anchor_coef: weight of the pull to the anchor version, per token, on answers to questions that nobody rated.
        anchor_pulls: so many of these answers in each step, others every time.
        score_low: the worst score.
        score_high: the best score; thumbs are the two ends.
        batch_size: events that one step takes at most.
        min_sources: different sources that a step needs before it begins; with more than one, all weigh the same as far
            as they are trusted and under the cap. A source that others contradict does not count.
        influence_cap: most that one source may have of what was learned lately, as a share; twice an equal part where
            there are few. The excess is not learned. Only with several sources, as the next one.
        influence_window: steps that count as lately, each as far as it was taught.
        replay_events: earlier events that every step learns again.
        half_life: hours after which an event is half as likely to be learned again; 0 draws uniformly.
        max_grad_norm: gradients are scaled down to this norm.
        tokens_per_microbatch: padded tokens that go through the model at once.
        keep: versions kept on disk besides those in use.
        seed: of everything random.
    """

    lr: Common[NonNegativeFloat] = 0.01
    kl_budget: Common[PositiveFloat] = 0.02
    drift_budget: NonNegativeFloat = 0.5
    drift_versions: PositiveInt = 200
    likelihood_drop: NonNegativeFloat = 0.5
    correction_band: NonNegativeFloat = 1.0
    bad_weight: Share = 0.2
    baseline_rate: Share = 0.1
    beta: PositiveFloat = 0.1
    sft_coef: NonNegativeFloat = 1.0
    kl_coef: NonNegativeFloat = 0.1
    anchor_coef: NonNegativeFloat = 0.0
    anchor_pulls: PositiveInt = 4
    score_low: Common[FiniteFloat] = 0.0
    score_high: Common[FiniteFloat] = 1.0
    batch_size: PositiveInt = 16
    min_sources: Common[PositiveInt] = 1
    influence_cap: PositiveShare = 0.1
    influence_window: Annotated[float, Ge(1)] = 50.0
    replay_events: NonNegativeInt = 7
    half_life: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 10.0
    tokens_per_microbatch: PositiveInt = 8192
    keep: PositiveInt = 5
    seed: Seed = 0


@settings
class LearnerConfig(LiveConfig, FormatFields):
    """What the live learner works on, whoever starts it.

    Args:
        lr: the learning rate of plain gradient steps, before the KL budget scales a step back; auto takes the one for
            what learns (docs/real_models.md), and a root goes on with the one that it began with.
        kl_budget: nats per token that one step may move the policy on the anchor answers; auto as above.
        replay_events: earlier events that every step learns again. auto as above: 7, or 3 of a pretrained model, whose
            every text costs time.
        anchor_coef: weight of the pull to the anchor version, per token, on answers to questions that nobody rated.
            auto as above: 0.
        root: the folder of the versions.
        store: where completions and feedback are: FILE.db, a database URL, or, to read only, a file of JSON Lines as
            operant.data.feedback_log writes it.
        model: the first version, a folder, hub id or GGUF file; only to begin a new root.
        lora_rank: learn a low-rank adapter of this rank instead of the weights; 0 learns the weights. auto is 24 for a
            model of more than 10 million weights, and an adapter that is there already goes on. Only to begin a new
            root.
        lora_layers: put the adapter only into so many of the model's blocks, the ones next to its output; what comes
            out of the others is then computed once a text. 0 is all of them; auto is half. Only to begin a new root.
        lora_orthogonal: begin the adapter orthogonal to so many directions of what its layers read in the anchor
            answers, so that what all texts have in common teaches nothing; auto as above. Only to begin a new root.
        anchors: rows with prompts, of a folder its train split, on whose answers every step is measured; empty asks a
            model with a chat template shipped questions, and samples from another as it is. Only to begin a new root.
        anchor_rows: so many anchor answers.
        anchor_tokens: tokens of an anchor answer, at most. auto as above: 32, or 16 of a pretrained model.
        heldout: rows with prompts and maybe references for the slow gate, of a folder its dev split; empty leaves it
            out.
        heldout_rows: use only the first rows.
        sense_rows: shipped questions that the slow gate asks a chat model too, to see whether its answers repeat
            themselves, are empty or are all one; fewer than 5 leave that out. Only where `anchors` is empty.
        tolerance: the share of a held-out metric that a version may lose before it is rolled back.
        prompt_field: column of the prompt.
        reference_field: column of the references.
        device: auto, cpu, cuda or mps.
        dtype: float32; bf16 for autocast; bf16-true for weights in bf16, under an adapter in float32: half the memory.
        threads: CPU threads for the matrix work; 0 leaves torch's default.
        rest: seconds that the learner rests for each second of a step, half a second at most, so that answers have the
            machine for themselves in between.
    """

    lr: Common[NonNegativeFloat | Literal["auto"]] = "auto"  # type: ignore[assignment]
    kl_budget: Common[PositiveFloat | Literal["auto"]] = "auto"  # type: ignore[assignment]
    replay_events: NonNegativeInt | Literal["auto"] = "auto"  # type: ignore[assignment]
    anchor_coef: NonNegativeFloat | Literal["auto"] = "auto"  # type: ignore[assignment]
    root: Common[str] = "runs/live"
    store: Common[str] = ""
    model: Common[str] = ""
    lora_rank: Common[NonNegativeInt | Literal["auto"]] = "auto"
    lora_layers: NonNegativeInt | Literal["auto"] = "auto"
    lora_orthogonal: NonNegativeInt | Literal["auto"] = "auto"
    anchors: str = ""
    anchor_rows: PositiveInt = 8
    anchor_tokens: PositiveInt | Literal["auto"] = "auto"
    heldout: Common[str] = ""
    heldout_rows: PositiveInt = 32
    sense_rows: NonNegativeInt = 8
    tolerance: Share = 0.1
    prompt_field: str | None = None
    reference_field: str | None = None
    device: Common[str] = "auto"
    dtype: Literal["float32", "bf16", "bf16-true"] = "float32"
    threads: NonNegativeInt = 0
    rest: NonNegativeFloat = 1.0


@settings
class WorkerConfig(LearnerConfig):
    """The learner process of the live loop: reads feedback, makes steps, publishes versions.

    Args:
        poll_seconds: wait before the store is looked at again.
        once: learn what is there and leave.
        watch_stdin: look at the store when a line comes in, and leave when the input ends, as its parent then has.
    """

    poll_seconds: PositiveFloat = 0.05
    once: bool = False
    watch_stdin: bool = False


@settings
class TrialFields:
    """How a new version earns the traffic.

    Args:
        canary_share: share of the users that a new version answers until ratings say whether it may serve everybody;
            0 lets each version serve at once.
        shadow_share: share of the answers beside which a new version answers too, unseen, until `reward` decides; 0
            as above.
        canary_alpha: highest probability with which a worse version is promoted, or an equally good one refused as
            worse, however often you look.
        canary_margin: a version is promoted when it is not worse by this much, on a scale from 0 to 1.
        canary_pairs: pairs of ratings after which an undecided version is refused.
    """

    canary_share: Common[Annotated[float, Interval(ge=0, le=0.5)]] = 0.0
    shadow_share: Share = 0.0
    canary_alpha: Annotated[float, Interval(gt=0, lt=0.5)] = 0.05
    canary_margin: Annotated[float, Interval(ge=0, lt=1)] = 0.1
    canary_pairs: PositiveInt = 1000


@settings
class ServeConfig(LearnerConfig, TrialFields):
    """Serve a model that learns from people's feedback on its answers.

    Args:
        host: the address to listen on. Others than this machine's own need keys.
        port: the port to listen on.
        open: show the page in a browser once it is served.
        name: the model's name; it also answers to "default".
        mode: personal (each rating makes a version) or shared (a version needs several sources, see min_sources).
        chat_rate: answers that a key, and a user that it names, may ask for in a minute, and at once; in shared mode
            only. Keys that may operate have no limit of their own, only their users do. 0 is no limit.
        feedback_rate: events that a source may send in a minute, and at once; in shared mode only. 0 is no limit.
        keys: the file of keys; empty takes keys.json in `root`. Without keys the server asks nobody for one.
        public_url: where others reach the server, for the links in its answers.
        link_days: days for which a link that rates an answer is good.
        max_rows: completions decoded together.
        queue: completions that may wait beside them; more are refused with 429.
        max_tokens: longest answer to a chat that names no limit.
        long_chats: cut (a chat longer than the context loses its oldest turns, and the answer says so) or refuse.
        temperature: of answers to requests that name none; auto is what the model's generation_config says, or else 0.7
            for a model of chats and 1 for one of texts.
        top_p: likewise; auto is 0.9 for a chat of automatic temperature and 1 otherwise.
        top_k: likewise; auto is 0, which is off.
        reward: rate every stored answer with this too, on the scale of scores: a metric, a judge, a model, or
            module:function, as operant train names them. Nobody gives references here.
        implicit: module:function that reads a user's next message as a score of the answer before it, or as nothing.
        max_body: bytes of a request, at most.
        max_age_days: older answers are deleted with their feedback, unless some of it is pending. Steps that learned
            from them stay, and can no longer be made again from their records.
        max_bytes: the oldest answers are deleted until prompts and answers take no more; 0, as above, means no limit.
        drain_seconds: seconds that answers under way may still take when the server stops.
        learner_threads: CPU threads of the learner. They belong to the fingerprint of its steps. auto is 1, and for a
            model of more than 10 million weights as many as there are cores.
        learner_niceness: how far the learner steps back behind the answers, from 0, not at all, to 19. On a busy
            machine a lower one learns sooner.
    """

    host: Common[str] = "127.0.0.1"
    port: Common[Annotated[int, Interval(ge=0, le=65535)]] = 8000
    open: bool = False
    name: Common[str] = "operant"
    mode: Common[Literal["personal", "shared"]] = "personal"
    chat_rate: NonNegativeFloat = 60.0
    feedback_rate: NonNegativeFloat = 60.0
    keys: Common[str] = ""
    public_url: Common[str] = ""
    link_days: PositiveFloat = 30.0
    max_rows: PositiveInt = 64
    queue: PositiveInt = 256
    max_tokens: Common[PositiveInt] = 256
    long_chats: Literal["cut", "refuse"] = "cut"
    temperature: Common[NonNegativeFloat | Literal["auto"]] = "auto"
    top_p: PositiveShare | Literal["auto"] = "auto"
    top_k: NonNegativeInt | Literal["auto"] = "auto"
    reward: Common[str] = ""
    implicit: str = ""
    max_body: Annotated[int, Ge(1024)] = 1 << 20
    max_age_days: Common[NonNegativeFloat] = 0.0
    max_bytes: Common[NonNegativeInt] = 0
    drain_seconds: NonNegativeFloat = 5.0
    learner_threads: NonNegativeInt | Literal["auto"] = "auto"
    learner_niceness: Annotated[int, Interval(ge=0, le=19)] = 10


@settings
class KeysConfig:
    """The API keys of a live server: list, add and remove them.

    Args:
        root: the folder that the live loop writes.
        keys: the file of keys; empty takes keys.json in `root`.
        add: make a key for this name and print it, once. The first one brings a key for the owner, you.
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


@settings
class VersionsConfig:
    """List the versions that the live loop has published; compare, promote, roll back and pin them.

    Args:
        root: the folder that the live loop writes.
        compare: two versions to measure against each other on the anchor answers.
        promote: let this version serve.
        roll_back: serve the parent of the version that serves again, its optimizer included.
        evaluate: versions to judge by the ratings of other versions' answers: SNIPS and its effective sample size.
        store: of `evaluate`; empty takes store.db in `root`.
        anchor: measure drift from this version on, which gives learning new room when the gate refuses for drift.
        pin: a user to keep on `version`, whatever is published.
        unpin: a user to move back to the current version.
        version: of `pin`.
        json: print one JSON object.
    """

    root: str = "runs/live"
    compare: list[NonNegativeInt] = dataclasses.field(default_factory=list)
    evaluate: list[NonNegativeInt] = dataclasses.field(default_factory=list)
    store: str = ""
    promote: NonNegativeInt | None = None
    roll_back: bool = False
    anchor: NonNegativeInt | None = None
    pin: str = ""
    unpin: str = ""
    version: NonNegativeInt | None = None
    json: bool = False


@settings
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
    version: NonNegativeInt | None = None
    tolerance: Share = 1e-4
    device: str = "auto"
    dtype: Literal["float32", "bf16", "bf16-true"] = "float32"
    json: bool = False


@settings
class ForgetConfig:
    """Forget a source: its feedback, its prompts, and what the weights have learned from them.

    A server at work in `root` does it while it answers; without a server this command does it. Steps are made again
    from the last version before the source's first use. Versions that its feedback had touched are deleted. Answers
    that people have read cannot be taken back.

    Args:
        root: the folder that the live loop writes.
        store: where its feedback is; empty takes store.db in `root`. A server knows its own.
        source: the source to forget: the name of a key, or the source that was given with the feedback.
        device: auto, cpu, cuda or mps.
        dtype: as the learner had it.
        threads: CPU threads, which belong to the fingerprint; the server's learner has 1.
        json: print one JSON object.
    """

    root: str = "runs/live"
    store: str = ""
    source: str = ""
    device: str = "auto"
    dtype: Literal["float32", "bf16", "bf16-true"] = "float32"
    threads: PositiveInt = 1
    json: bool = False


@settings
class FeedbackConfig:
    """Look into a store of feedback; export, import, back up and prune it.

    Args:
        store: FILE.db or a database URL; empty takes store.db in `root`.
        root: the folder of the live loop, which knows how much each source counts; empty takes the one of FILE.db, or
            runs/live without a store.
        score_low: the worst score, as the server has it.
        score_high: the best score.
        event: show what the feedback with this id did.
        export: a file of JSON Lines to write, or, of any form but lines, a folder for a data set.
        form: of the export. lines: all, as operant prefer --replay reads it; events: one row each, with its texts;
            pairs: prompt, chosen, rejected; ratings: prompt, completion, label; rewards: prompt, completion, their
            tokens and log-probabilities, and each token's reward, as operant train --logged reads them.
        midpoint: a score above it is a good rating, one below it a bad one.
        load: a file of feedback to take in; nothing else may write the store meanwhile.
        format: of that file. lines: operant's own; langfuse, langsmith, tensorzero: an export of that tool.
        metric: take in only this metric of another tool.
        backup: copy the store, also while it is used, to this SQLite file.
        max_age_days: remove older answers with their feedback, unless some of it is pending.
        max_bytes: remove the oldest until prompts and answers take no more.
        json: print one JSON object.
    """

    store: str = ""
    root: str = ""
    score_low: FiniteFloat = 0.0
    score_high: FiniteFloat = 1.0
    event: str = ""
    export: str = ""
    form: Literal["lines", "events", "pairs", "ratings", "rewards"] = "lines"
    midpoint: FiniteFloat = 0.5
    load: str = ""
    format: Literal["lines", "langfuse", "langsmith", "tensorzero"] = "lines"
    metric: str = ""
    backup: str = ""
    max_age_days: NonNegativeFloat = 0.0
    max_bytes: NonNegativeInt = 0
    json: bool = False
