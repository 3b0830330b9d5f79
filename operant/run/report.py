"""The report of a run: one self-contained page, curves as PNG, and a curve for the terminal.

Everything is read from the run folder (`runlog`), so a report can be made again at any time, also of a run that was
killed. Metrics are slash-named: `train/…` once a step, `eval/…` held out. `train/missing/<reason>` and `train/skipped`
are running totals: rewards missing and steps skipped so far.
"""

from __future__ import annotations

import html
import io
import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from operant.run.files import read_object, replace_file
from operant.run.notices import Notice, Series, levels, notices
from operant.run.runlog import read_jsonl
from operant.types import OperantError

__all__ = ["Check", "RunRecord", "hacking_checks", "load_run", "terminal_curve", "write_report"]

#: Names as readers know them; any other metric is shown under its own name.
LABELS = {
    "accuracy": "Accuracy",
    "approx_kl": "KL of the step (approx_kl)",
    "beta": "β",
    "bleu": "BLEU",
    "chrf": "chrF",
    "clipfrac": "Clipped share (clipfrac)",
    "commonest": "Share of the commonest answer",
    "distinct1": "Distinct-1",
    "distinct2": "Distinct-2",
    "distinct3": "Distinct-3",
    "edit": "Edit similarity",
    "entropy": "Entropy",
    "exact": "Exact match",
    "grad_norm": "Gradient norm",
    "kl_ref": "KL to the reference",
    "length": "Length (tokens)",
    "loss": "Loss",
    "lr": "Learning rate",
    "margin": "Margin (β log-ratio)",
    "nll_good": "Nats/token of preferred completions",
    "perplexity": "Perplexity",
    "reward": "Reward",
    "reward_mean": "Reward",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "reward_missing": "Rewards missing",
    "ter": "TER",
    "tied": "Groups whose rewards are all equal",
    "tokens_per_second": "Tokens/s",
    "truncated": "Cut off at the length limit",
    "variance_ratio": "Variance with β / without",
}
#: What the vertical axis counts, where a metric's name does not say it.
_AXES = {
    "accuracy": "share of right answers",
    "approx_kl": "nats per token",
    "bleu": "BLEU, 0 to 100",
    "chrf": "chrF, 0 to 100",
    "clipfrac": "share of tokens",
    "commonest": "share of prompts",
    "distinct1": "share of different words",
    "distinct2": "share of different bigrams",
    "distinct3": "share of different trigrams",
    "entropy": "nats per token",
    "exact": "share of answers",
    "kl_ref": "nats per token",
    "length": "tokens",
    "tied": "share of groups",
    "truncated": "share of completions",
}
_LOWER_IS_BETTER = {"brier", "ece", "loss", "nll_good", "perplexity", "rmse", "ter"}
_BEHAVIOUR = (
    "commonest", "length", "distinct1", "distinct2", "distinct3", "kl_ref", "repetition", "reward_missing", "truncated",
)  # fmt: skip

_LEVEL_MARKERS = ("┈", "═", "~", "+")

# Thresholds of the checks against reward hacking, as relative change from the first to the last measurement.
FELL = 0.03
LENGTH_MOVED = 0.25
DISTINCT_FELL = 0.15
ENTROPY_FELL = 0.70
FEW_STEPS = 5  # of fewer nothing is said but what they were

# The light palette; in the page each becomes a CSS variable, so that the same drawing serves the dark one.
_INK, _MUTED, _GRID = "#1c2430", "#667084", "#e3e6ec"
_PALETTE = ("#2f6fde", "#d9571a", "#12875a", "#8b45c6", "#0b8494", "#b3365b")


@dataclass(slots=True)
class RunRecord:
    """What a run folder says. `series` maps each metric to its (step, value) pairs, by step; values may be NaN."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    series: dict[str, Series] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, dict[str, float]] = field(default_factory=dict)
    first_time: float | None = None
    last_time: float | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the panel against reward hacking. `state`: "ok", "watch", or "info" (a number without a verdict)."""

    name: str
    state: Literal["ok", "watch", "info"]
    text: str


@dataclass(frozen=True, slots=True)
class _Chart:
    key: str
    title: str
    lines: tuple[tuple[str, Series], ...]
    bars: bool = False
    level: float | None = None
    axes: tuple[str, str] = ("step", "")


def write_report(
    folder: str | Path,
    *,
    title: str | None = None,
    optimised: Collection[str] | None = None,
    rows: Mapping[str, str] | None = None,
) -> Path:
    """Write report.html and curves/*.png of a run, finished or not, and return the page's path.

    Args:
        folder: a run folder with any of config.yaml, run.json, metrics.jsonl, samples.jsonl, results.json.
        title: the heading; the folder's name when None.
        optimised: names of the metrics that the reward optimises, such as {"bleu"}. None reads them off the
            configuration's `reward`.
        rows: what the rows of results.json are called, by their names there, as the terminal calls them.

    Raises:
        OperantError: there is no run in the folder, or the report cannot be written.
    """
    run = load_run(Path(folder))
    run.results = {(rows or {}).get(name, name): row for name, row in run.results.items()}
    chosen = _optimised(run) if optimised is None else set(optimised)
    try:
        drawings = _draw(_charts(run, chosen), run.path / "curves")
        page = run.path / "report.html"
        replace_file(page, _page(run, title or run.path.resolve().name, chosen, drawings))
    except OSError as error:
        raise OperantError(
            f"cannot write the report in {run.path} ({error.strerror or error}): free some space there"
        ) from error
    return page


def load_run(folder: Path) -> RunRecord:
    """Read a run folder. Lines cut off by a crash are left out; of two values at one step the later counts.

    Raises:
        OperantError: the folder holds neither metrics nor results.
    """
    rows = read_jsonl(folder / "metrics.jsonl")
    results = _results(folder / "results.json")
    if not rows and not results and not (folder / "config.yaml").exists():
        raise OperantError(f"there is no run in {folder}: name a folder that holds config.yaml and metrics.jsonl")
    by_step: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in row.items():
            number = _number(value)
            if name not in ("step", "time", "seconds") and number is not None:
                by_step.setdefault(name, {})[int(row.get("step", 0))] = number
    times = [t for row in rows if (t := _number(row.get("time"))) is not None]
    text, config = _config(folder / "config.yaml")
    return RunRecord(
        path=folder,
        config=config,
        config_text=text,
        facts=read_object(folder / "run.json"),
        series={name: sorted(values.items()) for name, values in by_step.items()},
        samples=read_jsonl(folder / "samples.jsonl"),
        results=results,
        first_time=min(times, default=None),
        last_time=max(times, default=None),
    )


def hacking_checks(run: RunRecord, optimised: Collection[str]) -> list[Check]:
    """Compare the optimised reward with what it does not see, from the run's first measurements to its last.

    A held-out metric that was not optimised and got worse by more than 3 % while the reward rose is the signature of
    reward hacking (Gao et al. 2022, "Scaling laws for reward model overoptimization"). Length that moved by a quarter,
    distinct-n that fell by 15 % or entropy that fell by 70 % are side effects to look at. Empty without rewards.
    """
    reward = levels(run.series.get("eval/reward")) or levels(run.series.get("train/reward_mean"))
    if reward is None:
        return []
    start, end = reward
    rose = end > start
    verb = "rose" if rose else "fell" if end < start else "stayed"
    checks = [Check("Optimised reward", "info" if rose else "watch", f"{verb}: {_fmt(start)} → {_fmt(end)}")]
    unseen = 0
    for name in _held_out(run):
        change = levels(run.series[f"eval/{name}"])
        if name in optimised or name == "reward" or name in _BEHAVIOUR or change is None:
            continue
        unseen += 1
        before, after = change
        drop = (after - before if name in _LOWER_IS_BETTER else before - after) / max(abs(before), 1e-9)
        worse = rose and drop > FELL
        verdict = "got worse while the reward rose" if worse else "did not get worse" if drop <= FELL else "got worse"
        state: Literal["ok", "watch"] = "watch" if drop > FELL else "ok"
        checks.append(Check(f"Held-out {_label(name)}", state, f"{verdict}: {_fmt(before)} → {_fmt(after)}"))
    if not unseen:
        checks.append(
            Check("Held-out metrics", "watch", "none but the reward itself was measured, so hacking would not show")
        )
    for name, limit, both in (
        ("length", LENGTH_MOVED, True),
        ("distinct2", DISTINCT_FELL, False),
        ("entropy", ENTROPY_FELL, False),
    ):
        series = run.series.get(f"eval/{name}") or run.series.get(f"train/{name}")
        change = levels(series)
        if change is None:
            continue
        before, after = change
        moved = (after - before) / max(abs(before), 1e-9)
        odd = abs(moved) > limit if both else moved < -limit
        checks.append(
            Check(
                _label(name),
                "watch" if odd else "ok",
                f"{_fmt(before)} → {_fmt(after)}" + (f" ({_percent(moved)})" if before else ""),
            )
        )
    for name in ("kl_ref", "approx_kl"):
        change = levels(run.series.get(f"eval/{name}") or run.series.get(f"train/{name}"))
        if change is not None:
            checks.append(Check(_label(name), "info", f"{_fmt(change[0])} → {_fmt(change[1])}"))
    return checks


def terminal_curve(
    xs: Sequence[float],
    ys: Sequence[float],
    *,
    title: str = "",
    xlabel: str = "step",
    levels: Mapping[str, float] | None = None,
    width: int = 72,
    height: int = 16,
    color: bool | None = None,
) -> str:
    """Draw one curve with characters and return it as text, to be printed.

    Args:
        xs, ys: the points; those that are not finite are left out.
        levels: horizontal lines to compare with, by name.
        width, height: in characters.
        color: None uses colour when stdout is a terminal and NO_COLOR is not set.
    """
    from plotext import figure, uncolorize

    points = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(x) and math.isfinite(y)]
    if not points:
        return f"{title}: nothing to draw yet" if title else "nothing to draw yet"
    if color is None:
        color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    drawn = {name: level for name, level in (levels or {}).items() if math.isfinite(level)}
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    figure.clear()
    figure.theme("simple" if color else "colorless")
    figure.plot_size(width, height)
    for (_, level), marker in zip(drawn.items(), _LEVEL_MARKERS * len(drawn), strict=False):
        figure.draw(figure.signal([left, right], [level, level], marker=marker).lines())
    figure.draw(figure.signal([x for x, _ in points], [y for _, y in points], marker="braille").lines())
    figure.title(title)
    # Not plotext's legend: it is drawn over the curve.
    names = [f"{m} {name} {_fmt(drawn[name])}" for name, m in zip(drawn, _LEVEL_MARKERS * len(drawn), strict=False)]
    figure.label("   ".join([xlabel, *names]))
    built = figure.build()
    figure.clear()
    text = str(built) if color else uncolorize(built)
    return "\n".join(line.rstrip() for line in text.rstrip().split("\n"))


# What is drawn


def _charts(run: RunRecord, optimised: Collection[str]) -> dict[str, list[_Chart]]:
    """The charts of each section, those without data left out."""
    series = run.series
    target = re.match(r"\s*(\w+)\s*[<>]=?\s*(-?[\d.]+)", str(run.config.get("target") or ""))

    def chart(key: str, title: str, *names: str, level: float | None = None) -> list[_Chart]:
        lines = tuple((_line_label(name), series[name]) for name in names if _finite(series.get(name)))
        # A metric may have any name; its file and its ids may not.
        short = names[0].split("/", 1)[1]
        axes = ("step", _AXES.get(short, _label(short)))
        return [_Chart(re.sub(r"[^\w.-]", "_", key), title, lines, level=level, axes=axes)] if lines else []

    parts = sorted(name for name in series if name.startswith("train/reward/"))
    seen = [n for n in _held_out(run) if n == "reward" or n in optimised]
    unseen = [n for n in _held_out(run) if n not in seen and n not in _BEHAVIOUR]
    held_out = []
    for name in (*seen, *unseen):
        mark = " (optimised)" if name in optimised else ""
        level = float(target[2]) if target and target[1] == name else None
        held_out += chart(f"eval_{name}", _label(name) + mark, f"eval/{name}", level=level)
    corr = [(d, series[f"train/phi_corr/{d}"]) for d in range(10) if _finite(series.get(f"train/phi_corr/{d}"))]
    foretell: Series = [(10 * (d + 1), _tail_mean(values)) for d, values in corr]
    potential = [
        _Chart(
            "phi_corr",
            "Correlation of Φ with the final metric",
            (("Φ", foretell),),
            bars=True,
            axes=("position in the completion (%)", "correlation"),
        )
    ]
    return {
        "heldout": held_out,
        "training": [
            *chart("reward", "Reward", "train/reward_mean"),
            *(_named("reward", chart("reward_parts", "Reward by part", *parts[: len(_PALETTE)])) if parts[1:] else []),
            *chart("loss", "Loss", "train/loss", "eval/loss"),
            *chart("grad_norm", "Gradient norm", "train/grad_norm"),
            *chart("lr", "Learning rate", "train/lr"),
            *chart("clipfrac", "Clipped share (clipfrac)", "train/clipfrac"),
            *chart("accuracy", _label("accuracy"), "train/accuracy"),
            *chart("margin", _label("margin"), "train/margin"),
            *chart("reference_point", "KTO's reference point (nats)", "train/reference_point"),
        ],
        "behaviour": [
            *chart("length", "Length (tokens)", "train/length", "eval/length"),
            *chart("distinct2", "Distinct-2", "train/distinct2", "eval/distinct2"),
            *chart("kl", "KL divergence", "train/kl_ref", "eval/kl_ref", "train/approx_kl"),
            *chart("truncated", "Cut off at the length limit (share)", "train/truncated"),
            *chart("entropy", "Entropy", "train/entropy"),
            *chart("commonest", _label("commonest"), "eval/commonest"),
            *chart("tied", _label("tied"), "train/tied"),
        ],
        "potential": [
            *(potential if foretell else []),
            *chart("beta", "β, the control variate's coefficient", "train/beta"),
            *chart("variance_ratio", "Variance with β / without", "train/variance_ratio"),
        ],
    }


def _named(axis: str, charts: list[_Chart]) -> list[_Chart]:
    """Charts with another title of their vertical axis."""
    return [replace(chart, axes=(chart.axes[0], axis)) for chart in charts]


def _draw(sections: Mapping[str, list[_Chart]], folder: Path) -> dict[str, list[str]]:
    """Draw every chart twice from one figure: as PNG into `folder`, and as SVG in a <figure> for the page."""
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        # A metric may be named in a script that matplotlib's own font lacks; the page uses the reader's fonts.
        warnings.filterwarnings("ignore", message="Glyph")
        return {section: [_figure(chart, folder) for chart in charts] for section, charts in sections.items()}


def _figure(chart: _Chart, folder: Path) -> str:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # Two stand side by side on a screen; the text is still readable on a phone, where one takes the whole width.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.key, "font.size": 10}):
        figure = Figure(figsize=(4.8, 2.8), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(_GRID)
        axes.tick_params(colors=_MUTED, length=0)
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        for (label, series), colour in zip(chart.lines, _PALETTE, strict=False):
            xs, ys = [x for x, _ in series], [y for _, y in series]
            if chart.bars:
                axes.bar(xs, ys, width=7, color=colour, label=label)
                axes.axhline(0, color=_MUTED, linewidth=0.8)
            else:
                _line(axes, series, label, colour)
        if chart.level is not None:
            axes.axhline(chart.level, color=_INK, linewidth=1, linestyle=(0, (4, 3)), label="target")
        axes.margins(x=0.02, y=0.12)
        axes.set_xlabel(chart.axes[0], color=_MUTED)
        axes.set_ylabel(chart.axes[1], color=_MUTED)
        svg = io.StringIO()
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        axes.set_title(chart.title, color=_INK, fontsize=11, loc="left", fontweight="bold")
        if len(chart.lines) > 1 or chart.level is not None:
            axes.legend(frameon=False, fontsize=9, labelcolor=_INK)
        figure.savefig(folder / f"{chart.key}.png", dpi=200, facecolor="white")
    legend = "".join(
        f'<span><i style="background:var(--c{i})"></i>{_esc(label)}</span>'
        for i, (label, _) in enumerate(chart.lines)
        if len(chart.lines) > 1
    )
    if chart.level is not None:
        legend += f'<span><i class="dash"></i>target {_fmt(chart.level)}</span>'
    last = "" if chart.bars else f"<b><small>last</small> {_fmt(_last(chart.lines[0][1]))}</b>"
    head = f"<figcaption><span>{_esc(chart.title)}</span>{last}</figcaption>"
    return f'<figure>{head}{_inline(svg.getvalue(), chart)}<p class="legend">{legend}</p></figure>'


def _line(axes: Any, series: Series, label: str, colour: str) -> None:
    """A short series as it is, with dots; a long one faintly, under its running mean."""
    thin = _thinned(series)
    xs, ys = [x for x, _ in thin], [y for _, y in thin]
    if len(series) <= 40:
        axes.plot(xs, ys, color=colour, linewidth=1.8, marker="o", markersize=3.2, label=label)
        return
    axes.plot(xs, ys, color=colour, linewidth=0.8, alpha=0.3)
    axes.plot(xs, _smooth(ys), color=colour, linewidth=1.8, label=label)


def _thinned(series: Series, most: int = 400) -> Series:
    """Means over equal stretches, so that a page stays small after a million steps."""
    if len(series) <= most:
        return series
    size = -(-len(series) // most)
    thin: Series = []
    for start in range(0, len(series), size):
        part = series[start : start + size]
        values = [y for _, y in part if math.isfinite(y)]
        thin.append((part[-1][0], sum(values) / len(values) if values else math.nan))
    return thin


def _smooth(ys: Sequence[float]) -> list[float]:
    """Mean over a centred window, a twentieth of the curve wide, so that it does not lag; NaN is passed over."""
    reach = max(1, len(ys) // 40)
    sums, counts = [0.0], [0]
    for y in ys:
        known = math.isfinite(y)
        sums.append(sums[-1] + (y if known else 0.0))
        counts.append(counts[-1] + known)
    smooth = []
    for i in range(len(ys)):
        low, high = max(0, i - reach), min(len(ys), i + reach + 1)
        count = counts[high] - counts[low]
        smooth.append((sums[high] - sums[low]) / count if count else math.nan)
    return smooth


def _inline(svg: str, chart: _Chart) -> str:
    """Fit matplotlib's SVG into the page: its colours and font become the page's, its ids unique."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(
        r'(<svg [^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
    svg = re.sub(r"(font-family|font): [^;\"]*?(?=;|\")", _font, svg)
    svg = re.sub(r'\bid="', f'id="{chart.key}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{chart.key}-", svg)
    names = {_INK: "--ink", _MUTED: "--muted", _GRID: "--line", **{c: f"--c{i}" for i, c in enumerate(_PALETTE)}}
    for colour, name in names.items():
        svg = svg.replace(colour, f"var({name})")
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{_esc(chart.title)}" ', 1)


def _font(match: re.Match[str]) -> str:
    size = re.search(r"[\d.]+px", match.group())
    return f"font-size: {size.group()}" if size and match.group(1) == "font" else "font-family: inherit"


# The page


def _page(run: RunRecord, title: str, optimised: Collection[str], drawings: Mapping[str, list[str]]) -> str:
    body = [
        _header(run, title),
        _comparison(run),
        _section(
            "Held-out evaluation",
            "Measured on data that no gradient came from.",
            _grid(drawings["heldout"]),
            _eval_table(run, optimised),
        ),
        _hacking(run, optimised, drawings["behaviour"]),
        _samples(run),
        _section("Training", "Faint: each step. Strong: running mean.", _grid(drawings["training"])),
        _potential(run, drawings["potential"]),
        _missing(run),
        _trouble(run),
        _configuration(run),
    ]
    style = resources.files("operant.run").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_esc(title)} · operant</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n<footer>Written by operant from the files beside this page: config.yaml, metrics.jsonl, samples.jsonl. "
        "The curves are in curves/ as PNG.</footer>\n</main>\n</body>\n</html>\n"
    )


def _section(title: str, lead: str, *parts: str) -> str:
    content = "\n".join(part for part in parts if part)
    if not content:
        return ""
    about = f'<p class="lead">{lead}</p>\n' if lead else ""
    return f"<section>\n<h2>{_esc(title)}</h2>\n{about}{content}\n</section>"


def _grid(figures: Sequence[str]) -> str:
    return f'<div class="grid">{"".join(figures)}</div>' if figures else ""


def _header(run: RunRecord, title: str) -> str:
    reason = str(run.facts.get("stop_reason") or "")
    if reason:
        status = f'<span class="pill done">stopped: {_esc(reason)}</span>'
    else:
        status = '<span class="pill open">running, or ended without a word</span>'
    started = _number(run.facts.get("started")) or run.first_time
    ended = _number(run.facts.get("finished")) or run.last_time
    facts = []
    if started:
        facts.append(time.strftime("%Y-%m-%d %H:%M", time.localtime(started)))
    if started and ended and ended >= started and not run.facts.get("resumed"):
        facts.append(_duration(ended - started))
    steps = max((values[-1][0] for values in run.series.values() if values), default=0)
    facts.append(f"{steps:,} steps")
    for key in ("reward", "algorithm", "objective", "policy", "model", "seed"):
        value = run.config.get(key)
        if value not in (None, "", {}) and not isinstance(value, dict | list):
            facts.append(f"{key} <b>{_esc(value)}</b>")
    tiles = "".join(_tiles(run))
    return (
        f"<header>\n<h1>{_esc(title)}</h1>\n<p>{status}</p>\n"
        f'<p class="facts">{" · ".join(facts)}</p>\n'
        + (f'<div class="tiles">{tiles}</div>\n' if tiles else "")
        + "</header>"
    )


def _tiles(run: RunRecord) -> Iterable[str]:
    """What the run reached: held-out values of the weights that are kept, the same as in the table; without any, the
    means over the first and the last tenth of the steps."""
    names = [f"eval/{n}" for n in _held_out(run) if n not in _BEHAVIOUR][:6]
    for name in names:
        reached = _reached(run, name)
        if reached is not None:
            (_, before), (step, after) = reached
            which = f"step {step:,}, in model/" if step == _kept_step(run) else f"step {step:,}, the last"
            yield _tile(name, "held out", which, before, after)
    for name in [n for n in ("train/reward_mean", "train/loss") if n in run.series] if not names else ():
        change = levels(run.series[name])
        if change is not None:
            few = sum(math.isfinite(value) for _, value in run.series[name]) <= 20
            yield _tile(name, "training", "the last step" if few else "mean of the last tenth", *change)


def _tile(name: str, where: str, which: str, before: float, after: float) -> str:
    short, moved = name.split("/", 1)[1], after - before
    good = (moved < 0) == (short in _LOWER_IS_BETTER) or moved == 0
    trend = f'<span class="{"good" if good else "bad"}">{_signed(moved)}</span> from {_fmt(before)}'
    title = f"{_esc(_label(short))}, {where}"
    return f'<div class="tile"><p>{title}</p><strong>{_fmt(after)}</strong><p>{trend}</p><p>{which}</p></div>'


def _kept_step(run: RunRecord) -> int | None:
    """The step whose weights are in model/, of a run that has ended; None where nothing says so."""
    step = run.facts.get("best_step") if "finished" in run.facts else None
    return step if isinstance(step, int) else None


def _reached(run: RunRecord, name: str) -> tuple[tuple[int, float], tuple[int, float]] | None:
    """(step, value) of a metric's first measurement, and of the weights that are kept; of the last measurement where
    these were not measured."""
    series = [(step, value) for step, value in run.series[name] if math.isfinite(value)]
    if not series:
        return None
    kept = _kept_step(run)
    return series[0], next((point for point in series if point[0] == kept), series[-1])


def _comparison(run: RunRecord) -> str:
    if not run.results:
        return ""
    columns = list(dict.fromkeys(name for row in run.results.values() for name in row))
    best = {
        name: (min if name in _LOWER_IS_BETTER else max)(row[name] for row in run.results.values() if name in row)
        for name in columns
    }
    head = "".join(f"<th>{_esc(_label(name))}</th>" for name in columns)
    rows = ""
    for label, row in run.results.items():
        cells = "".join(
            f'<td class="num{" best" if name in row and row[name] == best[name] else ""}">{_fmt(row.get(name))}</td>'
            for name in columns
        )
        rows += f"<tr><th>{_esc(label)}</th>{cells}</tr>"
    return _section("Comparison", "", _table(f"<tr><th></th>{head}</tr>", rows))


def _eval_table(run: RunRecord, optimised: Collection[str]) -> str:
    rows, kept = "", _kept_step(run)
    for name in _held_out(run) + (["loss"] if "eval/loss" in run.series else []):
        series = [(s, v) for s, v in run.series[f"eval/{name}"] if math.isfinite(v)]
        reached = _reached(run, f"eval/{name}")
        if reached is None:
            continue
        (_, before), (step, after) = reached
        held = "" if kept is None else f"<td class=num>{_fmt(after) if step == kept else '–'}</td>"
        pick = min if name in _LOWER_IS_BETTER else max
        best = pick(series, key=lambda point: point[1])
        shown_best = "" if name in _BEHAVIOUR else f"{_fmt(best[1])} <small>step {best[0]:,}</small>"
        mark = ' <small class="tag">optimised</small>' if name in optimised or name == "reward" else ""
        rows += (
            f"<tr><th>{_esc(_label(name))}{mark}</th><td class=num>{_fmt(series[0][1])}</td>"
            f"<td class=num>{shown_best}</td><td class=num>{_fmt(series[-1][1])}</td>{held}"
            f"<td class=num>{_signed(after - before)}</td></tr>"
        )
    column = "" if kept is None else f"<th>In model/ (step {kept:,})</th>"
    change = "First to last" if kept is None else "First to model/"
    head = f"<tr><th>Metric</th><th>First</th><th>Best</th><th>Last</th>{column}<th>{change}</th></tr>"
    return _table(head, rows) if rows else ""


def _hacking(run: RunRecord, optimised: Collection[str], figures: Sequence[str]) -> str:
    checks, found = hacking_checks(run, optimised), notices(run.series, optimised)
    alerts = "".join(f'<li class="bad"><b>{_esc(_KINDS[n.kind])}</b><span>{_esc(n.text)}</span></li>' for n in found)
    if not checks:
        return _section("Completions", "", f'<ul class="checks">{alerts}</ul>' if alerts else "", _grid(figures))
    verdict, state = _verdict(run, checks, found)
    items = "".join(
        f'<li class="{check.state}"><b>{_esc(check.name)}</b><span>{_esc(check.text)}</span></li>' for check in checks
    )
    return _section(
        "Is the reward being hacked?",
        "What was optimised, beside what was not. Compared are the means over the first and the last tenth of the "
        "measurements; of twenty or fewer, the first and the last one.",
        f'<p class="verdict {state}">{_esc(verdict)}</p>',
        f'<ul class="checks">{alerts}{items}</ul>',
        _grid(figures),
    )


_KINDS = {"collapse": "Sign of collapse", "idle": "Nothing to learn from"}


def _verdict(
    run: RunRecord, checks: Sequence[Check], found: Sequence[Notice]
) -> tuple[str, Literal["good", "watch", "bad"]]:
    """The one sentence over the checks, and its colour."""
    steps = max((step for values in run.series.values() for step, _ in values), default=0)
    if any(notice.kind == "collapse" for notice in found):
        return "The policy shows signs of collapse. Read the samples first.", "bad"
    if any("got worse while the reward rose" in check.text for check in checks):
        return "The reward rose while held-out quality that it does not see fell. Read the samples first.", "bad"
    if found:
        return "The rewards of the last steps taught nothing.", "watch"
    if steps < FEW_STEPS:
        return f"{steps} {'step' if steps == 1 else 'steps'} can say nothing about hacking or collapse.", "watch"
    if watched := [check.name for check in checks if check.state == "watch"]:
        return f"No clear sign of hacking, but look at: {', '.join(watched)}.", "watch"
    return "Nothing measured here speaks of reward hacking.", "good"


def _samples(run: RunRecord, most: int = 8) -> str:
    texts = [row for row in run.samples if "text" in row]
    if not texts:
        return ""
    steps = sorted({int(row["step"]) for row in texts})
    first, last = steps[0], steps[-1]

    def key(row: Mapping[str, Any]) -> str:
        return str(row.get("prompt_id") or row.get("prompt") or "")

    before = {key(row): row for row in reversed(texts) if int(row["step"]) == first}
    after = {key(row): row for row in reversed(texts) if int(row["step"]) == last}
    both = [name for name in after if name in before] if first != last else []
    cards = ""
    for name in list(reversed(both or list(after)))[:most]:
        row = after[name]
        references = row.get("references") or ([row["reference"]] if row.get("reference") else [])
        lines = [_said("Prompt", row.get("prompt"), None)]
        lines += [_said("Reference", reference, None) for reference in list(references)[:2]]
        if both:
            lines.append(_said(f"Step {first:,}", before[name]["text"], before[name].get("reward"), "before"))
        lines.append(_said(f"Step {last:,}", row["text"], row.get("reward"), "after"))
        cards += f'<dl class="sample">{"".join(lines)}</dl>'
    lead = f"The same prompts at step {first:,} and step {last:,}." if both else f"At step {last:,}."
    return _section("Samples before and after" if both else "Samples", lead, f'<div class="samples">{cards}</div>')


def _said(label: str, text: Any, reward: Any, kind: str = "") -> str:
    if text is None:
        return ""
    number = _number(reward)
    tag = f' <span class="reward">{_fmt(number)}</span>' if number is not None else ""
    shown = _esc(text) if str(text).strip() else "<i>(empty)</i>"
    return f'<div class="{kind}"><dt>{_esc(label)}{tag}</dt><dd dir="auto">{shown}</dd></div>'


def _potential(run: RunRecord, figures: Sequence[str]) -> str:
    if not figures:
        return ""
    ratio = run.series.get("train/variance_ratio")
    text = ""
    if ratio and _finite(ratio):
        saved = 1 - _tail_mean(ratio)
        verb = "saved" if saved >= 0 else "added"
        text = f'<p class="verdict {"good" if saved >= 0 else "watch"}">β {verb} {abs(saved):.0%} of the variance.</p>'
    lead = "How well Φ of a prefix foretells the final metric decides how much variance β can save."
    return _section("Potential", lead, text, _grid(figures))


def _missing(run: RunRecord) -> str:
    rows = ""
    for name in sorted(n for n in run.series if n.startswith("train/missing/")):
        values = [(s, v) for s, v in run.series[name] if math.isfinite(v)]
        grown = [s for (s, v), (_, before) in zip(values, [(0, 0.0), *values], strict=False) if v > before]
        if grown:
            rows += (
                f"<tr><th>{_esc(name.removeprefix('train/missing/'))}</th>"
                f"<td class=num>{values[-1][1]:,.0f}</td>"
                f"<td class=num>{len(grown):,}</td><td class=num>{grown[-1]:,}</td></tr>"
            )
    if not rows:
        return ""
    lead = "A missing reward is never read as zero: its completion taught nothing."
    head = "<tr><th>Reason</th><th>Rewards</th><th>Steps</th><th>Last at step</th></tr>"
    return _section("Missing rewards", lead, _table(head, rows))


def _trouble(run: RunRecord) -> str:
    items = ""
    for name, values in sorted(run.series.items()):
        bad = [s for s, v in values if not math.isfinite(v)]
        if bad:
            detail = f"not finite at {len(bad):,} steps, last {bad[-1]:,}"
            items += f'<li class="watch"><b>{_esc(name)}</b><span>{detail}</span></li>'
    for name, words in (("skipped", "Skipped steps"), ("idle", "Steps without an update, for nothing taught")):
        if count := _last(run.series.get(f"train/{name}", [])):
            items += f'<li class="watch"><b>{words}</b><span>{count:,.0f}</span></li>'
    return _section("Trouble", "", f'<ul class="checks">{items}</ul>') if items else ""


def _configuration(run: RunRecord) -> str:
    parts = []
    if run.config_text:
        parts.append(f"<details><summary>Configuration</summary><pre>{_esc(run.config_text)}</pre></details>")
    if run.series:
        rows = "".join(
            f"<tr><th>{_esc(name)}</th><td class=num>{_fmt(values[0][1])}</td>"
            f"<td class=num>{_fmt(values[-1][1])}</td></tr>"
            for name, values in sorted(run.series.items())
        )
        table = _table("<tr><th>Metric</th><th>First</th><th>Last</th></tr>", rows)
        parts.append(f"<details><summary>Every metric, first and last</summary>{table}</details>")
    rest = {k: v for k, v in run.facts.items() if k not in ("started", "finished", "resumed", "stop_reason")}
    if rest:
        text = json.dumps(rest, indent=1, ensure_ascii=False)
        parts.append(f"<details><summary>Facts of the run</summary><pre>{_esc(text)}</pre></details>")
    return _section("Details", "", *parts)


def _table(head: str, rows: str) -> str:
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'


# Reading and wording


def _optimised(run: RunRecord) -> set[str]:
    """The held-out metrics named in the configuration's reward, such as bleu in `0.7 * bleu + 0.3 * length`, and those
    that the reward itself says it optimises."""
    spec = run.config.get("reward")
    words = set(re.findall(r"[a-z]\w*", json.dumps(spec, default=str).lower())) if spec else set()
    words |= {str(name).lower() for name in run.facts.get("optimises", ())}
    return {name for name in _held_out(run) if name.lower() in words}


def _held_out(run: RunRecord) -> list[str]:
    names = [n.removeprefix("eval/") for n, values in run.series.items() if n.startswith("eval/") and _finite(values)]
    first = ("reward", "bleu", "chrf", "exact", "rougeL")
    known = [n for n in first if n in names]
    return known + sorted(n for n in names if n not in known and n != "loss")


def _tail_mean(series: Series) -> float:
    values = [v for _, v in series if math.isfinite(v)]
    tail = values[-max(1, len(values) // 4) :]
    return sum(tail) / len(tail)


def _finite(series: Series | None) -> bool:
    return any(math.isfinite(v) for _, v in series or ())


def _last(series: Series) -> float | None:
    return next((v for _, v in reversed(series) if math.isfinite(v)), None)


def _line_label(name: str) -> str:
    stage, short = name.split("/", 1)
    if stage == "eval":
        return f"{_label(short)}, held out"
    return _label(short.removeprefix("reward/"))


def _label(name: str) -> str:
    return LABELS.get(name, name.replace("_", " "))


def _fmt(value: float | None) -> str:
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if value == 0:
        return "0"
    if size < 1e-3:
        return f"{value:.1e}"
    if size >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 100 else f"{value:.2f}" if size >= 10 else f"{value:.3f}"


def _signed(value: float) -> str:
    return ("+" if value > 0 else "−" if value < 0 else "±") + _fmt(abs(value))


def _percent(share: float) -> str:
    return f"{100 * share:+.0f} %".replace("-", "−")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _esc(value: Any) -> str:
    return html.escape(str(value))


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and value not in ("NaN", "Infinity", "-Infinity"):
        return None
    return float(value)


def _config(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        parsed = yaml.safe_load(text)
    except FileNotFoundError:
        return "", {}
    except yaml.YAMLError:
        return text, {}
    return text, parsed if isinstance(parsed, dict) else {}


def _results(path: Path) -> dict[str, dict[str, float]]:
    rows: dict[str, dict[str, float]] = {}
    for label, row in read_object(path).items():
        if isinstance(row, dict):
            numbers = {str(k): n for k, v in row.items() if (n := _number(v)) is not None}
            if numbers:
                rows[label] = numbers
    return rows
