"""The commands of the program: each calls what does the work, and prints what came of it."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import datetime
import io
import json
import math
import os
import select
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from operant import config as configs
from operant.types import OperantError

# --- learning from data and from rewards -----------------------------------------------------------------------------


def run_pretrain(config: configs.PretrainConfig) -> None:
    from operant.stages import pretrain, pretrain_masked, trains_encoder

    _check_whole((pretrain_masked if trains_encoder(config) else pretrain)(config))


def run_sft(config: configs.SftConfig) -> None:
    from operant.stages import sft

    result = sft(config)
    summary = f"dev loss {result.dev_loss:.4f} nats/token" if math.isfinite(result.dev_loss) else "nothing held out"
    print(f"{summary} after {result.steps} steps; model in {result.out}/model")
    _check_whole(result)


def run_reward_model(config: configs.RewardModelConfig) -> None:
    from operant.stages import train_reward_model

    result = train_reward_model(config)
    for row, values in result.measured.items():
        print(f"{row:14}" + "".join(f"  {name} {value:.4f}" for name, value in values.items()))
    model = result.out / "model"
    print(f"reward model after {result.steps} steps in {model}; use it as --reward 'model({model})'")
    _check_whole(result)


def run_prefer(config: configs.PreferConfig) -> None:
    from operant.run.runlog import read_jsonl
    from operant.stages import prefer

    result = prefer(config)
    measured = [row for row in read_jsonl(result.out / "metrics.jsonl") if "eval/loss" in row]
    best = min(measured, key=lambda row: row["eval/loss"], default={})
    metrics = "".join(f", {n.removeprefix('eval/')} {v:.4g}" for n, v in best.items() if n.startswith("eval/"))
    print(f"{result.steps} steps; the best weights, held out{metrics or ': not measured'}; model in {result.out}/model")
    _check_whole(result)


def run_train(config: configs.TrainConfig) -> None:
    from operant.run.report import terminal_curve
    from operant.run.runlog import read_jsonl
    from operant.stages import train_from

    result = train_from(config)
    rows = [r for r in read_jsonl(result.out / "metrics.jsonl") if isinstance(r.get("eval/reward"), float)]
    if len(rows) > 1:
        title = f"held-out reward ({config.environment or config.reward})"
        print(terminal_curve([r["step"] for r in rows], [r["eval/reward"] for r in rows], title=title))
    for name in sorted(result.best):
        print(f"{name:16} {result.first.get(name, float('nan')):10.4f} -> {result.best[name]:10.4f}")
    _check_whole(result)


def run_quickstart(config: configs.QuickstartConfig) -> None:
    from operant.recipes.quickstart import quickstart

    quickstart(config)


def _check_whole(result: Any) -> None:
    """Exit status 130 after a Ctrl-C that saved: what stands behind `&&` must not go on with half a run."""
    if result.stop_reason.startswith("interrupted"):
        raise SystemExit(130)


# --- what a model says, and what that is worth -----------------------------------------------------------------------


def run_eval(config: configs.EvalConfig) -> None:
    from operant.rl.evaluate import evaluate_from

    with _progress("eval") as progress:
        values = evaluate_from(config, progress, lambda text: print(text, file=sys.stderr))
    if config.json:
        print(json.dumps(values))
        return
    for name, value in values.items():
        print(f"{name:12} {value:10.4f}")


def run_score(config: configs.ScoreConfig) -> None:
    from operant.rewards.score import score

    rewards: list[float | None] = []
    for row in score(config, lambda text: print(text, file=sys.stderr)):
        rewards.append(row["reward"])
        if config.json:
            print(json.dumps(row, ensure_ascii=False))
            continue
        value = "missing" if row["reward"] is None else f"{row['reward']:.4f}"
        text = str(row["completion"]).replace("\n", "\\n")
        print(f"{value:>9}  {text[:100]}{'  (' + row['missing'] + ')' if row.get('missing') else ''}")
    # beside the objects, of which there is one a row, and below the table
    print(_mean_in_words(rewards), file=sys.stderr if config.json else sys.stdout)


def _mean_in_words(rewards: Sequence[float | None]) -> str:
    """The mean of what is there, how many rows that is of, and how many are missing: these are in no mean."""
    seen = [reward for reward in rewards if reward is not None]
    if not seen:
        return f"no mean: all {len(rewards):,} rows are missing"
    return f"{math.fsum(seen) / len(seen):9.4f}  mean of {len(seen):,} rows, {len(rewards) - len(seen):,} missing"


def run_sample(config: configs.SampleConfig) -> None:
    from operant.rl.evaluate import sample_from

    if not config.prompt and sys.stdin.isatty():
        print("a prompt a line, Ctrl-D ends:", file=sys.stderr)
    texts = [config.prompt] if config.prompt else _Lines()
    for prompt, completion in sample_from(config, texts, lambda line: print(line, file=sys.stderr)):
        if not config.json:
            print(completion.text, flush=True)
            continue
        assert completion.behavior_logprobs is not None and completion.model_logprobs is not None
        row = {
            "prompt": prompt.text, "completion": completion.text, "stop_reason": completion.stop_reason,
            "prompt_tokens": prompt.tokens.tolist(), "tokenizer_hash": completion.tokenizer_hash,
            "tokens": completion.tokens.tolist(), "logprob": float(completion.model_logprobs.sum()),
            "behavior_logprobs": [round(x, 6) for x in completion.behavior_logprobs.tolist()],
        }  # fmt: skip
        print(json.dumps(row, ensure_ascii=False), flush=True)


class _Lines:
    """The lines of standard input, which say whether the next one is there already."""

    def __init__(self) -> None:
        self._decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
        self._text, self._ended = "", False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while "\n" not in self._text and not self._ended:
            self._read()
        if not self._text:
            raise StopIteration
        line, _, self._text = self._text.partition("\n")
        return line

    def ready(self) -> bool:
        """Whether the next line, or the end, can be had without waiting."""
        while "\n" not in self._text and not self._ended:
            if not select.select([sys.stdin], [], [], 0)[0]:
                return False
            self._read()
        return True

    def _read(self) -> None:
        data = os.read(sys.stdin.fileno(), 1 << 16)
        self._ended = not data
        try:
            self._text += self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise OperantError(f"standard input is not UTF-8: convert it, as by iconv -f latin1 ({error})") from error


def run_merge(config: configs.MergeConfig) -> None:
    from operant.run.merge import merge

    folder = merge(config)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"the adapter of {config.model} and its base are one model in {folder}, {size / 1e6:,.0f} MB")


def run_algorithms(config: configs.AlgorithmsConfig) -> None:
    from operant.algorithms.table import table

    rows = table()
    if config.json:
        print(json.dumps(rows, ensure_ascii=False))
        return
    names = ["name", "paper", "from", "loss", "baseline", "needs", "honours"]
    _print_table(names, [[" ".join(row[n]) if isinstance(row[n], list) else row[n] for n in names] for row in rows])


# --- learning from people --------------------------------------------------------------------------------------------


def run_serve(config: configs.ServeConfig) -> None:
    from operant.live.serve import serve

    serve(config)


def run_keys(config: configs.KeysConfig) -> None:
    from operant.live.serving.access import Keys

    chosen = _chosen({"--add": bool(config.add), "--remove": bool(config.remove)})
    keys = Keys(config.keys or Path(config.root) / "keys.json")
    if chosen == "--add":
        issued = keys.issue(config.add, config.roles)
        _print_new_keys(config, issued, {one.name: list(one.roles) for one in keys.all()}, keys.path)
        return
    if chosen == "--remove":
        keys.remove(config.remove)
    if config.json:
        rows = [{"name": key.name, "roles": list(key.roles), "created": key.created} for key in keys.all()]
        print(json.dumps({"keys": rows}, ensure_ascii=False))
        return
    for one in keys.all():
        made = datetime.datetime.fromtimestamp(one.created).strftime("%Y-%m-%d %H:%M")
        print(f"{one.name:20}  {', '.join(one.roles):20}  {made}")


def _print_new_keys(
    config: configs.KeysConfig, issued: dict[str, str], roles: dict[str, list[str]], path: Path | None
) -> None:
    """The key that was asked for alone on standard output, for scripts; the owner's, if one was made, beside it."""
    rows = {name: {"name": name, "key": key, "roles": roles[name]} for name, key in issued.items()}
    asked, owner = rows.pop(config.add), next(iter(rows.values()), None)
    if config.json:
        print(json.dumps(asked if owner is None else asked | {"owner": owner}))
        return
    print(asked["key"])
    print(f"the key of {config.add}; it is shown this once, {path} keeps its hash only", file=sys.stderr)
    if owner is not None:
        print(
            f"your own key, as the server now asks everybody for one; it is named {owner['name']}, may do everything "
            f"and is shown this once: {owner['key']}", file=sys.stderr,
        )  # fmt: skip


def run_replay(config: configs.ReplayConfig) -> None:
    from operant.live.learning.execution import verifiable, verify_root

    if not config.verify:
        found = verifiable(config)
        print("\n".join(f"{record.version:6}  from {record.parent}" for record in found) or "nothing to verify")
        return
    with _progress("versions made again") as progress:
        verdicts = verify_root(config, progress)
    if config.json:
        print(json.dumps({"versions": [dataclasses.asdict(v) | {"same": v.same} for v in verdicts]}))
    elif not verdicts:
        print("there is no version on disk whose parent is there too")
    else:
        for v in verdicts:
            how = "the same bits" if v.same else f"largest difference of a weight {v.difference:.3g}"
            where = (
                "" if v.same_fingerprint else " (made on another machine, with other libraries or by another operant)"
            )
            print(f"{v.version:6}  {how}{where}")
    if wrong := [v for v in verdicts if v.differs(config.tolerance)]:
        raise OperantError(
            f"version {wrong[0].version} is not what its record makes; roll back to one that is, with operant versions"
        )


def run_forget(config: configs.ForgetConfig) -> None:
    from operant.live.learning.forget import forget_from

    with _progress("steps made again") as progress:
        result = forget_from(config, progress)
    if config.json:
        print(json.dumps(dataclasses.asdict(result)))
        return
    print(f"{result.events} events of {config.source} are forgotten; version {result.current} serves")
    if result.base is not None:
        dropped = ", ".join(map(str, result.dropped)) or "none"
        print(f"made again from version {result.base}: {result.redone} steps; weights deleted: {dropped}")
    print("what was read, copied or backed up before is beyond this: nobody can unsample an answer")


def run_versions(config: configs.VersionsConfig) -> None:
    chosen = _chosen(
        {
            "--compare": bool(config.compare), "--evaluate": bool(config.evaluate),
            "--promote": config.promote is not None, "--roll_back": config.roll_back,
            "--anchor": config.anchor is not None, "--pin": bool(config.pin), "--unpin": bool(config.unpin),
        }
    )  # fmt: skip
    if chosen == "--compare":
        _compare_versions(config)
    elif chosen == "--evaluate":
        _evaluate_versions(config)
    else:
        _move_and_list_versions(config, chosen)


def _compare_versions(config: configs.VersionsConfig) -> None:
    from operant.live.learning.gate import compare
    from operant.live.storage.versions import Versions

    if len(config.compare) != 2:
        raise OperantError("--compare takes two versions, such as [3, 5]")
    _print_values(compare(Versions(config.root), *config.compare), config.json, width=18)


def _evaluate_versions(config: configs.VersionsConfig) -> None:
    from operant.live.learning.events import open_store
    from operant.live.learning.off_policy import snips_values
    from operant.live.storage.versions import Versions

    store = open_store(config.store or str(Path(config.root) / "store.db"))
    judged = snips_values(Versions(config.root), config.evaluate, store)
    if config.json:
        print(json.dumps(judged))
        return
    for number, v in judged.items():
        print(
            f"{number:6}  {v['snips']:.3f} ± {v['std_error']:.3f}  effective sample size {v['ess']:.1f} of "
            f"{v['rated']:.0f} ratings, which were {v['mean']:.3f} on average"
        )


def _move_and_list_versions(config: configs.VersionsConfig, chosen: str) -> None:
    from operant.live.storage.versions import Versions

    versions = Versions(config.root)
    if chosen == "--promote":
        assert config.promote is not None
        versions.promote(config.promote)
    elif chosen == "--roll_back":
        versions.roll_back()
    elif chosen == "--anchor":
        assert config.anchor is not None
        versions.pass_anchor(config.anchor)
    elif chosen == "--pin":
        if config.version is None:
            raise OperantError("--pin needs --version, the one that the user is served")
        versions.pin(config.pin, config.version)
    elif chosen == "--unpin":
        versions.pin(config.unpin, None)
    overview = versions.overview()
    if config.json:
        print(json.dumps(overview, ensure_ascii=False))
        return
    for row in overview["versions"]:
        parent = "" if row["parent"] is None else f"from {row['parent']}"
        events = f"{row['used']}/{row['events']} events"
        marks = ", ".join(_marks(row, overview))
        print(f"{row['version']:6}  {row['state']:9}  {parent:9}  {events:14}  {marks} {row['reason']}".rstrip())


def _marks(row: Mapping[str, Any], overview: Mapping[str, Any]) -> list[str]:
    """The remarks on one version of the overview."""
    number = row["version"]
    marks = [word for word in ("current", "anchor") if overview[word] == number]
    marks += [f"pinned by {user}" for user, pinned in overview["pins"].items() if pinned == number]
    if overview["trial"] is not None:
        marks += [word for word in ("serving", "candidate") if overview["trial"][word] == number]
    if row["trial"] is not None:
        marks.append(f"{row['trial']['kind']}: {row['trial']['verdict']}, {row['trial']['reason']}")
    if not row["on_disk"] and row["state"] == "published":
        marks.append("weights gone")
    return marks


def run_feedback(config: configs.FeedbackConfig) -> None:
    from operant.live.storage.store import Store

    config = dataclasses.replace(config, store=config.store or str(Path(config.root or "runs/live") / "store.db"))
    chosen = _chosen(
        {
            "--event": bool(config.event), "--export": bool(config.export), "--load": bool(config.load),
            "--backup": bool(config.backup),
            "--max_age_days or --max_bytes": bool(config.max_age_days or config.max_bytes),
        }
    )  # fmt: skip
    writes = chosen in ("--load", "--max_age_days or --max_bytes")
    with Store(config.store, read_only=not writes) as store:
        answer = _ask_store(config, chosen, store)
    sources = [] if config.json else answer.pop("sources", [])
    _print_values(answer, config.json, width=24)
    for row in sources:
        numbers = [f"{n} {row[n]:.2f}" for n in ("reward", "reputation", "influence") if row[n] is not None]
        counts = [f"{row[n]} {n}" for n in ("pending", "used", "superseded", "unused") if row[n]]
        print(f"  {row['source']:22} {', '.join([*counts, *numbers])}")


def _ask_store(config: configs.FeedbackConfig, chosen: str, store: Any) -> dict[str, Any]:
    from operant.live.learning.sources import by_source
    from operant.live.storage import exchange
    from operant.live.storage.versions import Versions

    if chosen == "--event":
        if (story := store.story(config.event)) is None:
            raise OperantError(f"there is no feedback {config.event} in {store.name}; its id is in its receipt")
        return dataclasses.asdict(story)
    if chosen == "--export":
        scale = exchange.Scale(config.score_low, config.score_high, config.midpoint)
        return {config.form: exchange.export(store, config.export, config.form, scale=scale)}
    if chosen == "--load":
        return dict(exchange.load(store, config.load, config.format, metric=config.metric))
    if chosen == "--backup":
        store.backup(config.backup)
        return {"backup": config.backup}
    if chosen:
        return dict(store.prune(config.max_age_days * 86_400, config.max_bytes))
    live = Versions(config.root or Path(config.store.removeprefix("sqlite:///")).parent)
    sources = by_source(store, live, score_low=config.score_low, score_high=config.score_high)
    return {**store.counts(), "sources": sources}


COMMANDS: dict[str, Callable[[Any], None]] = {
    "pretrain": run_pretrain,
    "sft": run_sft,
    "reward-model": run_reward_model,
    "prefer": run_prefer,
    "train": run_train,
    "eval": run_eval,
    "score": run_score,
    "sample": run_sample,
    "merge": run_merge,
    "algorithms": run_algorithms,
    "serve": run_serve,
    "keys": run_keys,
    "versions": run_versions,
    "replay": run_replay,
    "forget": run_forget,
    "feedback": run_feedback,
    "quickstart": run_quickstart,
}

# --- flags, tables, progress -----------------------------------------------------------------------------------------


def _chosen(asked: Mapping[str, bool]) -> str:
    """The one flag of these that is given, or "". Raises OperantError for two: each is a thing to do."""
    given = [flag for flag, wanted in asked.items() if wanted]
    if len(given) > 1:
        raise OperantError(f"{' and '.join(given)} are two things; give one of them at a time")
    return given[0] if given else ""


def _print_values(values: Mapping[str, Any], as_json: bool, *, width: int) -> None:
    if as_json:
        print(json.dumps(values, ensure_ascii=False))
    else:
        print("\n".join(f"{name:{width}} {value}" for name, value in values.items()))


def _print_table(names: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    """In colour and to the terminal's width, where there is one."""
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


@contextlib.contextmanager
def _progress(description: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar, answer (done so far, in all); it stands from the first time on."""
    from operant.run.runlog import Progress

    bars: list[Progress] = []

    def tell(done: int, total: int) -> None:
        if not bars:
            bars.append(Progress(total, description))
        bars[0].advance(done - bars[0].done)

    try:
        yield tell
    finally:
        for bar in bars:
            bar.close()
