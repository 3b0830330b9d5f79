"""The program: parse, call, print."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import inspect
import io
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from operant import config as configs
from operant.types import OperantError

if TYPE_CHECKING:
    from operant.live.learning.forget import Forgotten

EXAMPLES = {
    "pretrain": (
        configs.PretrainConfig,
        "train a language model on raw text",
        "operant pretrain --data texts.jsonl --arch t5 --size tiny --steps 2000 --out runs/pretrain",
    ),
    "sft": (
        configs.SftConfig,
        "fine-tune on labelled pairs",
        "operant sft --model runs/pretrain/model --data pairs/ --prompt_field en --reference_field de --out runs/sft",
    ),
    "reward-model": (
        configs.RewardModelConfig,
        "train a model that rewards completions",
        "operant reward-model --data preferences/ --kind comparison --out runs/judge",
    ),
    "prefer": (
        configs.PreferConfig,
        "learn from preferences: pairs, edits, thumbs",
        "operant prefer --model runs/sft/model --data edits.jsonl --algorithm dpo --beta 0.1 --out runs/prefer",
    ),
    "train": (
        configs.TrainConfig,
        "learn from rewards",
        "operant train --model runs/sft/model --data pairs/ --prompt_field en --reference_field de "
        '--reward chrf --dense true --target "bleu>=30"',
    ),
    "eval": (
        configs.EvalConfig,
        "measure a model on a data set",
        "operant eval --model runs/train/model --data pairs/dev.jsonl --prompt_field en --reference_field de "
        "--json true",
    ),
    "score": (
        configs.ScoreConfig,
        "rewards of completions in a file",
        "operant score --reward bleu --dense true --data answers.jsonl --json true",
    ),
    "sample": (
        configs.SampleConfig,
        "write completions",
        'operant sample --model runs/train/model --prompt "How are you?" --n 3',
    ),
    "algorithms": (
        configs.AlgorithmsConfig,
        "print what each algorithm needs and honours",
        "operant algorithms --json true",
    ),
    "serve": (
        configs.ServeConfig,
        "serve a model that learns from ratings of its answers, seconds later",
        "operant serve --model runs/quickstart/model",
    ),
    "keys": (
        configs.KeysConfig,
        "who may talk to a live server: list, add and remove API keys",
        "operant keys --add anna --roles '[chat,rate]'",
    ),
    "versions": (
        configs.VersionsConfig,
        "what the live loop has published: list, compare, promote, roll back, pin",
        "operant versions --root runs/live --roll_back true",
    ),
    "feedback": (
        configs.FeedbackConfig,
        "what people said of answers: look, export, import, back up, prune",
        "operant feedback --store runs/live/store.db --export pairs/ --form pairs",
    ),
    "replay": (
        configs.ReplayConfig,
        "make versions again from their records and compare every weight",
        "operant replay --verify true --root runs/live",
    ),
    "forget": (
        configs.ForgetConfig,
        "forget a source: its feedback, and what the weights learned from it",
        "operant forget --source anna --root runs/live",
    ),
    "quickstart": (
        configs.QuickstartConfig,
        "the whole circle on a built-in task, offline, in minutes",
        "operant quickstart --seed 1 --out runs/quickstart-1",
    ),
}  # fmt: skip


# a command with at most so many settings shows them all
_FEW = 30


@functools.cache
def build_parser(command: str = "", *, everything: bool = False) -> Any:
    """The program's argument parser, with the settings of one command. It imports no torch, so that --help is quick.

    everything: --help shows every setting, and not only those that most people need.
    """
    import jsonargparse

    jsonargparse.set_parsing_settings(parse_optionals_as_positionals=False)
    from operant import __version__

    parser = jsonargparse.ArgumentParser(
        prog="operant",
        description="Teach a language model from rewards at the moment they arrive.",
        epilog="Examples:\n" + "\n".join(f"  {example}" for _, _, example in EXAMPLES.values()),
        formatter_class=_formatter(),
        version=__version__,
        exit_on_error=False,
    )
    commands = parser.add_subcommands(dest="command")
    for name, (cls, summary, example) in EXAMPLES.items():
        sub = configs.settings_parser(cls) if name == command else jsonargparse.ArgumentParser()
        sub.usage, sub.description = f"operant {name} [--setting value ...]", f"{summary[0].upper()}{summary[1:]}."
        mode = sub.parser_mode
        commands.add_subcommand(name, sub, help=summary)
        if name == command:
            types = configs.setting_types(cls)
            everyone = everything or len(types) <= _FEW
            shown = [setting for setting, hint in types.items() if everyone or configs.is_common(hint)]
            more = "" if len(shown) == len(types) else f"All {len(types)} settings: operant {name} --help all\n\n"
            sub.epilog = f"{more}Example:\n  {example}"
            # only now: being added gave it the program's
            sub.formatter_class, sub.parser_mode = _formatter(cls, shown), mode
            sub.add_argument("--config", action="config", help="read settings from this YAML file; flags after it win")
    return parser


def _formatter(cls: type | None = None, shown: Collection[str] = ()) -> Any:
    """The form of a command's --help: the settings that are `shown`, under what their class says of them."""
    import argparse

    import jsonargparse

    types = configs.setting_types(cls) if cls else {}

    class Formatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def add_arguments(self, actions: Iterable[argparse.Action]) -> None:
            actions = list(actions)
            super().add_arguments([a for a in actions if a.dest not in types])
            for title, names in _sections(cls).items() if cls else ():
                if section := [a for a in actions if a.dest in names and a.dest in shown]:
                    self.end_section()
                    self.start_section(title)
                    super().add_arguments(section)

        def _get_help_string(self, action: argparse.Action) -> str:
            if action.dest not in types:
                return super()._get_help_string(action)
            listed = isinstance(action.metavar, str) and action.metavar.startswith("{")  # beside the flag already
            kind = "" if listed else configs.describe(types[action.dest])
            facts = "; ".join(fact for fact in (kind, f"default: {_shown(action.default)}") if fact)
            return f"{action.help or ''} ({facts})".lstrip()

    return Formatter


def _sections(cls: type) -> dict[str, set[str]]:
    """Settings by the class that defines them first, under the first line of what it says; the command's own first."""
    sections: dict[str, set[str]] = {"settings": set()}
    seen: set[str] = set()
    for one in cls.__mro__[-2::-1]:  # without object
        title = "settings" if one is cls else (inspect.getdoc(one) or one.__name__).splitlines()[0].rstrip(".")
        sections[title] = sections.get(title, set()) | one.__annotations__.keys() - seen
        seen |= one.__annotations__.keys()
    return sections


def _shown(value: Any) -> str:
    """A default as YAML would have it."""
    if isinstance(value, str):
        return value if value.strip() else json.dumps(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return json.dumps(value)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program. Exit status: 0, 1 for a fault that the user can mend (one line on stderr), 130 for Ctrl-C."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if isinstance(sys.stdout, io.TextIOWrapper):  # not every locale can write what a model says
        if sys.stdout.isatty():
            sys.stdout.reconfigure(errors="replace")
        else:  # as all files are
            sys.stdout.reconfigure(encoding="utf-8")
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        command, config = _parse(given)
        COMMANDS[command](config)
    except OperantError as error:
        print("operant:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(f"operant: interrupted{_going_on(given)}", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


def _going_on(given: Sequence[str]) -> str:
    """How an interrupted command is gone on with, for those that can be."""
    cls = EXAMPLES[given[0]][0] if given and given[0] in EXAMPLES else None
    resumes = cls is not None and any(f.name == "resume" for f in dataclasses.fields(cls))
    return "; go on with --resume true if a run was under way" if resumes else ""


def _parse(given: list[str]) -> tuple[str, Any]:
    """(command, its configuration). A bare flag of a boolean means true, and dashes in flags mean underscores."""
    import jsonargparse

    words = _normalised(given)
    everything = any(flag in ("--help", "-h") and value == "all" for flag, value in itertools.pairwise(words))
    parser = build_parser(given[0] if given and given[0] in EXAMPLES else "", everything=everything)
    if not given:
        parser.print_help()
        raise SystemExit(0)
    try:
        parsed = parser.parse_args(words)
    except (jsonargparse.ArgumentError, ValueError, TypeError, KeyError) as error:
        raise OperantError(_parse_fault(str(error), given)) from None
    values = parsed[parsed.command].as_dict()
    values.pop("config", None)
    return parsed.command, EXAMPLES[parsed.command][0](**values)


def _normalised(given: list[str]) -> list[str]:
    """Flags under their names of today, and a bare flag of a boolean with its value."""
    fields = [f for cls, _, _ in EXAMPLES.values() for f in dataclasses.fields(cls)]
    booleans = {f.name for f in fields if "bool" in str(f.type)}
    out: list[str] = []
    for i, word in enumerate(given):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            (name,) = configs.current_names({name: value})
            word = f"--{name}{equals}{value}"
            following = given[i + 1] if i + 1 < len(given) else "--"
            if name in booleans and not equals and following.startswith("--"):
                word = f"--{name}=true"
        out.append(word)
    return out


def _parse_fault(text: str, given: list[str]) -> str:
    """One line for what the parser found, with the nearest name for an unknown command or flag."""
    import difflib
    import re

    line = " ".join(text.split()).replace("Expected a <class 'list'>", "Expected a list such as [a, b]")
    line = re.sub(r"typing\.Literal\[([^]]*)\]", lambda m: m[1].replace("'", "").replace(", ", " | "), line)
    line = re.sub(r"<class '(\w+)'>", r"\1", line).replace('Parser key "', '"--')
    commands = list(EXAMPLES)
    if given and not given[0].startswith("-") and given[0] not in commands:
        close = difflib.get_close_matches(given[0], commands, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(commands)}"
        return f"unknown command {given[0]!r}; {hint}"
    unknown = re.search(r"[Uu]nrecognized arguments: (--[\w-]+)", line) or re.search(
        r"(?:[Kk]ey|option) '?([\w.]+)'?(?: is not expected|$)", line
    )
    if unknown and given and given[0] in EXAMPLES:
        name = unknown[1].lstrip("-").split(".")[-1]
        fields = [f.name for f in dataclasses.fields(EXAMPLES[given[0]][0])]
        close = difflib.get_close_matches(name, fields, n=1)
        hint = f"did you mean --{close[0]}?" if close else f"see operant {given[0]} --help"
        return f"operant {given[0]} has no setting --{name}; {hint}"
    command = f" {given[0]}" if given and given[0] in EXAMPLES else ""
    return f"{line[:400]} (see operant{command} --help)"


# --- the commands ----------------------------------------------------------------------------------------------------


def _check_whole(result: Any) -> None:
    """Exit status 130 after a Ctrl-C that saved: what stands behind `&&` must not go on with half a run."""
    if result.stop_reason.startswith("interrupted"):
        raise SystemExit(130)


def run_pretrain(config: configs.PretrainConfig) -> None:
    from operant.stages import pretrain, pretrain_masked, trains_encoder

    _check_whole((pretrain_masked if trains_encoder(config) else pretrain)(config))


def run_sft(config: configs.SftConfig) -> None:
    from operant.stages import sft

    result = sft(config)
    told = f"dev loss {result.dev_loss:.4f} nats/token" if math.isfinite(result.dev_loss) else "nothing held out"
    print(f"{told} after {result.steps} steps; model in {result.out}/model")
    _check_whole(result)


def run_reward_model(config: configs.RewardModelConfig) -> None:
    from operant.stages import train_reward_model

    result = train_reward_model(config)
    for row, values in result.measured.items():
        print(f"{row:14}" + "".join(f"  {name} {value:.4f}" for name, value in values.items()))
    print(
        f"reward model after {result.steps} steps in {result.out}/model; use it as --reward 'model({result.out}/model)'"
    )
    _check_whole(result)


def run_prefer(config: configs.PreferConfig) -> None:
    from operant.run.runlog import read_jsonl
    from operant.stages import prefer

    _need(config.model, "--model", "a model folder or hub id to start from")
    if not (config.data or config.replay):
        raise OperantError("--data is missing; give pairs, edits or ratings, or --replay with a file of feedback")
    result = prefer(config)
    measured = [row for row in read_jsonl(result.out / "metrics.jsonl") if "eval/loss" in row]
    best = min(measured, key=lambda row: row["eval/loss"], default={})
    told = "".join(f", {n.removeprefix('eval/')} {v:.4g}" for n, v in best.items() if n.startswith("eval/"))
    print(f"{result.steps} steps; the best weights, held out{told or ': not measured'}; model in {result.out}/model")
    _check_whole(result)


def run_train(config: configs.TrainConfig) -> None:
    from operant.run.report import terminal_curve
    from operant.run.runlog import read_jsonl
    from operant.stages import train_from

    result = train_from(config)
    curve = [
        (r["step"], r["eval/reward"])
        for r in read_jsonl(result.out / "metrics.jsonl")
        if isinstance(r.get("eval/reward"), float)
    ]
    if len(curve) > 1:
        print(
            terminal_curve(
                [x for x, _ in curve],
                [y for _, y in curve],
                title=f"held-out reward ({config.environment or config.reward})",
            )
        )
    for name in sorted(result.best):
        print(f"{name:16} {result.first.get(name, float('nan')):10.4f} -> {result.best[name]:10.4f}")
    _check_whole(result)


def run_eval(config: configs.EvalConfig) -> None:
    from operant.data.prompts import load_fitting_prompts
    from operant.data.rows import load_rows
    from operant.models.policy import Policy
    from operant.models.sampler import Sampler
    from operant.rl.evaluate import evaluate
    from operant.types import Sampling

    _need(config.model, "--model", "a model folder or hub id")
    _need(config.data, "--data", "prompts with references")
    # unlike Path.is_dir, this is False also for a folder that may not be reached
    if config.samples and not os.path.isdir(Path(config.samples).absolute().parent):
        raise OperantError(f"{Path(config.samples).parent} is no folder to write to; choose another --samples")
    rows = load_rows(config.data, split="dev", limit=config.limit)
    policy = Policy.load(config.model, device=config.device, dtype=config.dtype)
    policy.model.eval()
    prompts = load_fitting_prompts(rows, policy, config, room=config.max_tokens)
    if config.metrics and not any(prompt.references for prompt in prompts):
        raise OperantError(
            f"no row of {config.data} has references to measure {', '.join(config.metrics)} by; "
            "choose with --reference_field, or give --metrics []"
        )
    with _progress(len(prompts), "eval") as advance:
        values, completions = evaluate(
            Sampler(policy, max_rows=config.max_rows), prompts, metrics=config.metrics, progress=advance,
            sampling=Sampling(
                temperature=config.temperature, max_tokens=config.max_tokens, seed=config.seed, stop=tuple(config.stop)
            ),
        )  # fmt: skip
    if config.samples:
        try:
            with open(config.samples, "w", encoding="utf-8") as file:
                for prompt, completion in zip(prompts, completions, strict=True):
                    row = {"prompt": prompt.text, "completion": completion.text, "references": list(prompt.references)}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise OperantError(f"cannot write {config.samples} ({error.strerror}); choose another --samples") from error
    if config.json:
        print(json.dumps(values))
    else:
        for name, value in values.items():
            print(f"{name:12} {value:10.4f}")


def run_score(config: configs.ScoreConfig) -> None:
    from operant.rewards.score import score

    for row in score(config):
        if config.json:
            print(json.dumps(row, ensure_ascii=False))
        else:
            value = "missing" if row["reward"] is None else f"{row['reward']:.4f}"
            text = str(row["completion"]).replace("\n", "\\n")
            print(f"{value:>9}  {text[:100]}{'  (' + row['missing'] + ')' if row.get('missing') else ''}")


def run_sample(config: configs.SampleConfig) -> None:
    from operant.data.prompts import PromptFormat
    from operant.models.policy import Policy
    from operant.models.sampler import Sampler
    from operant.types import Prompt, Sampling

    _need(config.model, "--model", "a model folder or hub id")
    policy = Policy.load(config.model, device=config.device, dtype=config.dtype)
    policy.model.eval()
    encoder = policy.has_encoder
    written = PromptFormat(prefix=config.prefix, separator=config.separator, encoder=encoder)
    if not config.prompt and sys.stdin.isatty():
        print("a prompt a line, Ctrl-D ends:", file=sys.stderr)
    texts = [config.prompt] if config.prompt else _lines()
    sampling = Sampling(
        temperature=config.temperature, top_p=config.top_p, top_k=config.top_k, max_tokens=config.max_tokens,
        stop=tuple(config.stop), seed=config.seed,
    )  # fmt: skip
    for number, text in enumerate(texts):
        if config.chat:
            tokens = policy.codec.encode_prompt(messages=[{"role": "user", "content": text}], encoder=encoder)
        else:
            tokens = written.encode(text, policy.codec)
        for completion in Sampler(policy).sample(
            [Prompt(id=str(number), text=text, tokens=tokens)], sampling, config.n
        )[0]:
            if config.json:
                assert completion.behavior_logprobs is not None
                row = {
                    "prompt": text, "completion": completion.text, "stop_reason": completion.stop_reason,
                    "prompt_tokens": tokens.tolist(), "tokenizer_hash": completion.tokenizer_hash,
                    "tokens": completion.tokens.tolist(), "logprob": float(completion.model_logprobs.sum()),  # type: ignore[union-attr]
                    "behavior_logprobs": [round(x, 6) for x in completion.behavior_logprobs.tolist()],
                }  # fmt: skip
                print(json.dumps(row, ensure_ascii=False), flush=True)
            else:
                print(completion.text, flush=True)


def _lines() -> Iterator[str]:
    try:
        for line in sys.stdin:
            line.encode()  # without a locale Python lets bytes through that are no text
            yield line.rstrip("\n")
    except UnicodeError as error:
        raise OperantError(f"standard input is not UTF-8: convert it, as by iconv -f latin1 ({error})") from error


def run_quickstart(config: configs.QuickstartConfig) -> None:
    from operant.recipes.quickstart import quickstart

    quickstart(config)


def run_algorithms(config: configs.AlgorithmsConfig) -> None:
    from operant.algorithms.table import table

    rows = table()
    if config.json:
        print(json.dumps(rows, ensure_ascii=False))
        return
    names = ["name", "paper", "from", "loss", "baseline", "needs", "honours"]
    cells = [[" ".join(row[n]) if isinstance(row[n], list) else row[n] for n in names] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        shown = Table(*names)
        for line in cells:
            shown.add_row(*line)
        Console().print(shown)
        return
    widths = [max(len(line[i]) for line in [names, *cells]) for i in range(len(names))]
    for line in [names, *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def run_serve(config: configs.ServeConfig) -> None:
    from operant.live.serve import serve

    serve(config)


def run_keys(config: configs.KeysConfig) -> None:
    from operant.live.serving.access import Keys

    if config.add and config.remove:
        raise OperantError("--add and --remove are two things; give one of them at a time")
    keys = Keys(config.keys or Path(config.root) / "keys.json")
    if config.add:
        key = keys.add(config.add, config.roles)
        if config.json:
            print(json.dumps({"name": config.add, "key": key, "roles": config.roles}))
        else:
            print(key)
            print(f"the key of {config.add}; it is shown this once, {keys.path} keeps its hash only", file=sys.stderr)
        return
    if config.remove:
        keys.remove(config.remove)
    rows = [{"name": key.name, "roles": list(key.roles), "created": key.created} for key in keys.all()]
    if config.json:
        print(json.dumps({"keys": rows}, ensure_ascii=False))
        return
    for one in keys.all():
        made = datetime.datetime.fromtimestamp(one.created).strftime("%Y-%m-%d %H:%M")
        print(f"{one.name:20}  {', '.join(one.roles):20}  {made}")


def run_replay(config: configs.ReplayConfig) -> None:
    import torch

    from operant.live.learning.events import open_store
    from operant.live.learning.forget import verify
    from operant.live.storage.versions import Versions

    torch.set_num_threads(1)  # as the server's learner has them
    versions = Versions(config.root)
    there = {v.version for v in versions.all()}
    found = [r for r in versions.records() if r.version in there and r.parent in there and r.state == "published"]
    if config.version is not None:
        found = [versions.record(config.version)]
    if not config.verify:
        print("\n".join(f"{record.version:6}  from {record.parent}" for record in found) or "nothing to verify")
        return
    worker = configs.WorkerConfig(root=config.root, device=config.device, dtype=config.dtype)
    source = open_store(config.store or str(Path(config.root) / "store.db"))
    told = []
    with _progress(len(found), "replay") as advance:
        for record in found:
            told.append(verify(versions, record.version, source, worker))
            advance(1)
    wrong = [v for v in told if v.difference > (0.0 if v.same_fingerprint else config.tolerance)]
    if config.json:
        print(json.dumps({"versions": [dataclasses.asdict(v) | {"same": v.same} for v in told]}))
    else:
        for v in told:
            how = "the same bits" if v.same else f"largest difference of a weight {v.difference:.3g}"
            where = (
                "" if v.same_fingerprint else " (made on another machine, with other libraries or by another operant)"
            )
            print(f"{v.version:6}  {how}{where}")
        if not told:
            print("there is no version on disk whose parent is there too")
    if wrong:
        raise OperantError(
            f"version {wrong[0].version} is not what its record makes; roll back to one that is, with operant versions"
        )


def run_forget(config: configs.ForgetConfig) -> None:
    import torch
    from filelock import FileLock, Timeout

    from operant.live.learning.forget import forget
    from operant.live.storage.store import Store

    _need(config.source, "--source", "whom to forget")
    root = Path(config.root)
    if not root.is_dir():
        raise OperantError(f"{config.root} is no folder; give --root, the one that operant serve writes")
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(_steps("steps made again"))
        try:
            stack.enter_context(FileLock(root / "server.lock", timeout=0))
        except Timeout:
            told = _forgotten_by_the_server(config, progress)
        else:
            torch.set_num_threads(config.threads)
            try:
                stack.enter_context(FileLock(root / "learner.lock", timeout=0))
            except Timeout:
                raise OperantError(f"a learner is at work in {config.root}; stop it first") from None
            store = stack.enter_context(Store(config.store or root / "store.db"))
            worker = configs.WorkerConfig(root=config.root, device=config.device, dtype=config.dtype)
            told = forget(config.source, store, worker, progress)
    if config.json:
        print(json.dumps(dataclasses.asdict(told)))
        return
    print(f"{told.events} events of {config.source} are forgotten; version {told.current} serves")
    if told.base is not None:
        dropped = ", ".join(map(str, told.dropped)) or "none"
        print(f"made again from version {told.base}: {told.redone} steps; weights deleted: {dropped}")
    print("what was read, copied or backed up before is beyond this: nobody can unsample an answer")


def _forgotten_by_the_server(config: configs.ForgetConfig, progress: Callable[[int, int], None]) -> Forgotten:
    """Ask the server that is at work in this root, by a file as all processes do, and wait until it is done."""
    from operant.live.learning.forget import Plan, ask, forgotten
    from operant.live.storage.versions import Versions

    versions = Versions(config.root)
    asked = ask(versions, config.source)
    while True:
        if (told := forgotten(versions, asked.number)) is not None:
            return told
        plan = Plan.read(versions)
        if plan is not None and plan.number == asked.number:
            if plan.stage == "refused":
                versions.plan_file.unlink()
                raise OperantError(plan.reason)
            if plan.steps:
                made = sum(r.again >= 0 and r.version >= plan.begun for r in versions.records())
                progress(min(made, len(plan.steps)), len(plan.steps))
        time.sleep(0.1)


def run_versions(config: configs.VersionsConfig) -> None:
    from operant.live.storage.versions import Versions

    asked = {
        "--compare": bool(config.compare), "--evaluate": bool(config.evaluate),
        "--promote": config.promote is not None, "--roll_back": config.roll_back,
        "--anchor": config.anchor is not None,
        "--pin": bool(config.pin), "--unpin": bool(config.unpin),
    }  # fmt: skip
    chosen = [flag for flag, given in asked.items() if given]
    if len(chosen) > 1:
        raise OperantError(f"{' and '.join(chosen)} are two things; give one of them at a time")
    versions = Versions(config.root)
    if config.compare:
        from operant.live.learning.worker import compare

        if len(config.compare) != 2:
            raise OperantError("--compare takes two versions, such as [3, 5]")
        told = compare(versions, config.compare[0], config.compare[1])
        print(json.dumps(told) if config.json else "\n".join(f"{name:18} {value}" for name, value in told.items()))
        return
    if config.evaluate:
        from operant.live.learning.events import open_store
        from operant.live.learning.off_policy import evaluate

        judged = evaluate(versions, config.evaluate, open_store(config.store or str(Path(config.root) / "store.db")))
        if config.json:
            print(json.dumps(judged))
            return
        for number, v in judged.items():
            print(
                f"{number:6}  {v['snips']:.3f} ± {v['std_error']:.3f}  effective sample size {v['ess']:.1f} of "
                f"{v['rated']:.0f} ratings, which were {v['mean']:.3f} on average"
            )
        return
    if config.promote is not None:
        versions.promote(config.promote)
    elif config.roll_back:
        versions.roll_back()
    elif config.anchor is not None:
        versions.pass_anchor(config.anchor)
    elif config.pin:
        if config.version is None:
            raise OperantError("--pin needs --version, the one that the user is served")
        versions.pin(config.pin, config.version)
    elif config.unpin:
        versions.pin(config.unpin, None)
    told = versions.overview()
    if config.json:
        print(json.dumps(told, ensure_ascii=False))
        return
    for row in told["versions"]:
        marks = [word for word in ("current", "anchor") if told[word] == row["version"]]
        marks += [f"pinned by {user}" for user, number in told["pins"].items() if number == row["version"]]
        if told["trial"] is not None:
            marks += [word for word in ("serving", "candidate") if told["trial"][word] == row["version"]]
        if row["trial"] is not None:
            marks.append(f"{row['trial']['kind']}: {row['trial']['verdict']}, {row['trial']['reason']}")
        if not row["on_disk"] and row["state"] == "published":
            marks.append("weights gone")
        parent = "" if row["parent"] is None else f"from {row['parent']}"
        events = f"{row['used']}/{row['events']} events"
        print(
            f"{row['version']:6}  {row['state']:9}  {parent:9}  {events:14}  "
            f"{', '.join(marks)} {row['reason']}".rstrip()
        )


def run_feedback(config: configs.FeedbackConfig) -> None:
    from operant.live.learning.sources import by_source
    from operant.live.storage import exchange
    from operant.live.storage.store import Store
    from operant.live.storage.versions import Versions

    _need(config.store, "--store", "FILE.db or a database URL")
    asked = {
        "--event": bool(config.event), "--export": bool(config.export), "--load": bool(config.load),
        "--backup": bool(config.backup), "--max_age_days or --max_bytes": bool(config.max_age_days or config.max_bytes),
    }  # fmt: skip
    chosen = [flag for flag, given in asked.items() if given]
    if len(chosen) > 1:
        raise OperantError(f"{' and '.join(chosen)} are two things; give one of them at a time")
    told: dict[str, Any]
    with Store(config.store, read_only=chosen not in (["--load"], ["--max_age_days or --max_bytes"])) as store:
        if config.event:
            story = store.story(config.event)
            if story is None:
                raise OperantError(f"there is no feedback {config.event} in {store.name}; its id is in its receipt")
            told = dataclasses.asdict(story)
        elif config.export:
            scale = exchange.Scale(config.score_low, config.score_high, config.midpoint)
            told = {config.form: exchange.export(store, config.export, config.form, scale=scale)}
        elif config.load:
            told = dict(exchange.load(store, config.load, config.format, metric=config.metric))
        elif config.backup:
            store.backup(config.backup)
            told = {"backup": config.backup}
        elif chosen:
            told = store.prune(config.max_age_days * 86_400, config.max_bytes)
        else:
            told = store.counts()
            live = Versions(config.root or Path(config.store.removeprefix("sqlite:///")).parent)
            told["sources"] = by_source(store, live, score_low=config.score_low, score_high=config.score_high)
    if config.json:
        print(json.dumps(told, ensure_ascii=False))
        return
    sources: Any = told.pop("sources", [])
    print("\n".join(f"{n:24} {v}" for n, v in told.items()))
    for row in sources:
        numbers = [f"{n} {row[n]:.2f}" for n in ("reward", "reputation", "influence") if row[n] is not None]
        counts = [f"{row[n]} {n}" for n in ("pending", "used", "superseded", "unused") if row[n]]
        print(f"  {row['source']:22} {', '.join([*counts, *numbers])}")


COMMANDS: dict[str, Callable[[Any], None]] = {
    "pretrain": run_pretrain,
    "sft": run_sft,
    "reward-model": run_reward_model,
    "prefer": run_prefer,
    "train": run_train,
    "eval": run_eval,
    "score": run_score,
    "sample": run_sample,
    "algorithms": run_algorithms,
    "serve": run_serve,
    "keys": run_keys,
    "versions": run_versions,
    "replay": run_replay,
    "forget": run_forget,
    "feedback": run_feedback,
    "quickstart": run_quickstart,
}


def _need(value: str, flag: str, what: str) -> None:
    if not value:
        raise OperantError(f"{flag} is missing; give {what}")


@contextlib.contextmanager
def _progress(total: int, description: str) -> Iterator[Callable[[int], None]]:
    from operant.run.runlog import Progress

    bar = Progress(total, description)
    try:
        yield lambda done: bar.advance(done)
    finally:
        bar.close()


@contextlib.contextmanager
def _steps(description: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar whose length is told with the first step."""
    from operant.run.runlog import Progress

    bars: list[Progress] = []

    def advance(done: int, total: int) -> None:
        if not bars:
            bars.append(Progress(total, description))
        bars[0].advance(done - bars[0].done)

    try:
        yield advance
    finally:
        for bar in bars:
            bar.close()


if __name__ == "__main__":
    main()
