"""The program: what was given becomes the configuration of a command, which `operant.commands` runs."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import io
import itertools
import json
import logging
import os
import sys
import warnings
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from operant import config as configs
from operant.commands import COMMANDS
from operant.types import OperantError

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
    "merge": (
        configs.MergeConfig,
        "add an adapter to its base: a plain model folder",
        "operant merge --model runs/train/model --out runs/merged",
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
        "operant feedback --export pairs/ --form pairs",
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
    _silence_libraries()
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
    except (MemoryError, RuntimeError) as error:
        from operant.models.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        print(
            "operant: out of memory; use a smaller --model, fewer or shorter texts at once (--max_rows, --max_tokens), "
            "or free some",
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


def _silence_libraries() -> None:
    """Let nothing but what operant says, and errors of others, reach the terminal. Python's -W shows warnings again,
    and TRANSFORMERS_VERBOSITY what Transformers says."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when it is imported, which a command does later
    if not sys.warnoptions:
        warnings.showwarning = _nothing_shown
    if logging.lastResort is not None:  # where a record goes that no library has set up a place for
        logging.lastResort.addFilter(_ours_or_an_error)


def _nothing_shown(*args: Any, **options: Any) -> None:
    """In the place of `warnings.showwarning`."""


def _ours_or_an_error(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] == "operant" or record.levelno >= logging.ERROR


def _going_on(given: Sequence[str]) -> str:
    """How to resume an interrupted command, for those that can resume."""
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
        return configs.unknown_setting(name, EXAMPLES[given[0]][0], f"operant {given[0]}")
    begun = re.match(r"ambiguous option: --(\w+) ", line)  # what several settings begin with may have a meaning too
    if begun and given and given[0] in EXAMPLES and configs.meant_setting(begun[1], EXAMPLES[given[0]][0]):
        return configs.unknown_setting(begun[1], EXAMPLES[given[0]][0], f"operant {given[0]}")
    command = f" {given[0]}" if given and given[0] in EXAMPLES else ""
    return f"{line[:400]} (see operant{command} --help)"


if __name__ == "__main__":
    main()
