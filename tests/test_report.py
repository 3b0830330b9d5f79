from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from operant.run import report
from operant.run.report import hacking_checks, load_run, terminal_curve, write_report
from operant.run.runlog import RunFolder, RunLog
from operant.types import OperantError

CONFIG = "reward: chrf\nseed: 3\ntarget: chrf>=61.5\n"


def make_run(folder: Path, steps: int = 50, bleu_end: float = 30.0, **ends: float) -> Path:
    """A run whose metrics go in a straight line from a start to an end."""
    line = {
        "eval/reward": (0.4, 0.6),
        "eval/chrf": (40.0, 60.0),
        "eval/bleu": (20.0, bleu_end),
        "eval/length": (10.0, 10.0 * ends.get("length", 1.0)),
        "eval/distinct2": (0.8, 0.8 * ends.get("distinct2", 1.0)),
        "train/entropy": (2.0, 2.0 * ends.get("entropy", 1.0)),
        "train/loss": (1.0, 0.5),
        "train/reward_mean": (0.4, 0.6),
        "train/kl_ref": (0.0, 0.2),
    }
    with RunFolder.open(folder, CONFIG) as run, RunLog(run, tensorboard=False) as log:
        for step in range(steps + 1):
            values = {name: a + (b - a) * step / steps for name, (a, b) in line.items()}
            log.log(step, {n: v for n, v in values.items() if n.startswith("train/") or step % 10 == 0})
        for step, text in ((0, "before & <b>"), (steps, "after 你好")):
            log.samples(step, [{"prompt": "what?", "text": text, "reward": 0.25, "references": ["the reference"]}])
        run.finish("target reached")
    return folder


class Page(HTMLParser):
    """Collects what a test asks about, and fails on tags that do not close."""

    VOID = frozenset({"meta", "br", "path", "use", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.note(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.note(tag, attrs)

    def note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href"):
                self.targets.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data + " "


def read_page(folder: Path) -> tuple[str, Page]:
    text = (folder / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


def states(folder: Path, optimised: set[str] | None = None) -> dict[str, str]:
    return {c.name: c.state for c in hacking_checks(load_run(folder), optimised or {"chrf"})}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its report, of which the curves are drawn."""
    run = make_run(tmp_path_factory.mktemp("drawn") / "run")
    assert write_report(run) == run / "report.html"
    return run


def test_the_page_is_whole_and_needs_nothing_from_outside(drawn: Path) -> None:
    text, page = read_page(drawn)
    assert not page.tags & {"script", "link", "img", "iframe"}
    assert all(target.startswith("#") for target in page.targets)
    assert set(re.findall(r"https?://[^\"' ]+", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "@import" not in text
    assert "url(" not in re.sub(r"url\(#[\w.-]+\)", "", text)
    assert len(page.ids) == len(set(page.ids))
    assert {target[1:] for target in page.targets} <= set(page.ids)
    assert set(re.findall(r"url\(#([\w.-]+)\)", text)) <= set(page.ids)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert str(drawn.parent) not in text
    assert not list(drawn.glob(".report*"))


def test_no_colour_of_the_drawing_is_fixed(drawn: Path) -> None:
    text, _ = read_page(drawn)
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, re.S))
    assert "var(--c0" in drawings
    assert not re.findall(r"#[0-9a-f]{6}\b", drawings)


def test_curves_are_png(drawn: Path) -> None:
    curves = {p.name for p in (drawn / "curves").iterdir()}
    assert {"loss.png", "reward.png", "eval_bleu.png", "eval_chrf.png", "kl.png", "entropy.png"} <= curves
    for name in curves:
        assert (drawn / "curves" / name).read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.draws
def test_the_page_says_what_happened(tmp_path: Path) -> None:
    write_report(make_run(tmp_path / "run"), title="My <run>")
    text, page = read_page(tmp_path / "run")
    for words in ("My <run>", "stopped: target reached", "50 steps", "seed", "chrF (optimised)", "target 61.50"):
        assert words in page.text
    assert "Samples before and after" in page.text
    assert "before & <b>" in page.text
    assert "<b>after" not in text
    assert "after 你好" in page.text
    assert "the reference" in page.text
    assert "Nothing measured here speaks of reward hacking" in page.text


def test_hacking_is_called_hacking(tmp_path: Path) -> None:
    write_report(make_run(tmp_path / "run", bleu_end=15.0))
    _, page = read_page(tmp_path / "run")
    assert "The reward rose while held-out quality that it does not see fell" in page.text
    assert "got worse while the reward rose: 20.00 → 15.00" in page.text


def test_a_fall_of_the_optimised_metric_itself_is_not_hacking(tmp_path: Path) -> None:
    assert "Held-out BLEU" not in states(make_run(tmp_path / "run", bleu_end=15.0), {"bleu", "chrf"})


@pytest.mark.parametrize(
    ("ends", "name", "state"),
    [
        ({}, "Length (tokens)", "ok"),
        ({"length": 1.24}, "Length (tokens)", "ok"),
        ({"length": 1.26}, "Length (tokens)", "watch"),
        ({"length": 0.74}, "Length (tokens)", "watch"),
        ({"distinct2": 0.86}, "Distinct-2", "ok"),
        ({"distinct2": 0.84}, "Distinct-2", "watch"),
        ({"distinct2": 1.5}, "Distinct-2", "ok"),
        ({"entropy": 0.2}, "Entropy", "watch"),
        ({"entropy": 0.5}, "Entropy", "ok"),
        ({"bleu_end": 19.5}, "Held-out BLEU", "ok"),
        ({"bleu_end": 19.3}, "Held-out BLEU", "watch"),
    ],
)
def test_each_check_has_its_threshold(tmp_path: Path, ends: dict[str, float], name: str, state: str) -> None:
    assert states(make_run(tmp_path / "run", **ends))[name] == state  # type: ignore[arg-type]


def test_a_metric_where_less_is_better(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        log.log(0, {"eval/reward": 0.1, "eval/ter": 60.0})
        log.log(9, {"eval/reward": 0.2, "eval/ter": 70.0})
    assert states(tmp_path)["Held-out TER"] == "watch"


def test_with_the_reward_alone_hacking_cannot_be_seen(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        log.log(0, {"eval/reward": 0.1})
        log.log(9, {"eval/reward": 0.2})
    assert states(tmp_path)["Held-out metrics"] == "watch"


def test_what_the_reward_says_it_optimises_is_optimised(tmp_path: Path) -> None:
    run = report.RunRecord(tmp_path, config={"reward": "mine"}, facts={"optimises": ["rougeL", "bleu"]})
    run.series = {f"eval/{name}": [(0, 1.0)] for name in ("bleu", "chrf", "rougeL")}
    assert report._optimised(run) == {"bleu", "rougeL"}


def test_what_the_reward_names_is_optimised(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    run = load_run(tmp_path / "run")
    assert report._optimised(run) == {"chrf"}
    run.config["reward"] = "0.7 * bleu + 0.3 * length"
    assert report._optimised(run) == {"bleu", "length"}
    run.config["reward"] = ["chrf", {"name": "distinct2"}]
    assert report._optimised(run) == {"chrf", "distinct2"}


@pytest.mark.draws
def test_missing_rewards_by_reason_and_steps_that_were_not_finite(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        for step in range(1, 6):
            log.log(step, {"train/reward_mean": 0.1 * step, "train/missing/timeout": (0, 2, 2, 4, 4, 6)[step]})
        log.log(6, {"train/loss": math.nan, "train/skipped": 1.0, "train/reward_mean": 0.5})
        log.log(7, {"train/loss": 1.0, "train/skipped": 1.0, "train/missing/timeout": 6})
    write_report(tmp_path)
    _, page = read_page(tmp_path)
    assert re.search(r"timeout\s+6\s+3\s+5", page.text)
    assert re.search(r"train/loss\s+not finite at 1 steps, last 6", page.text)
    assert re.search(r"Skipped steps\s+1", page.text)


@pytest.mark.draws
def test_the_potential_panel(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        for step in range(1, 9):
            log.log(step, {f"train/phi_corr/{d}": d / 10 for d in range(10)})
            log.log(step, {"train/variance_ratio": 0.9 if step < 5 else 0.4, "train/beta": 0.5})
    write_report(tmp_path)
    _, page = read_page(tmp_path)
    assert "β saved 60% of the variance" in page.text
    assert (tmp_path / "curves" / "phi_corr.png").exists()


def test_results_of_several_stages_are_compared(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(
        json.dumps({"finetuned": {"bleu": 20.0, "ter": 50.0}, "rewarded": {"bleu": 30.0, "ter": 60.0}, "seed": 1})
    )
    write_report(tmp_path)
    text, page = read_page(tmp_path)
    assert re.search(r"finetuned\s+20\.00\s+50\.00\s+rewarded\s+30\.00\s+60\.00", page.text)
    assert re.findall(r'class="num best">([\d.]+)', text) == ["50.00", "30.00"]


@pytest.mark.draws
def test_a_run_without_rewards(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, "stage: pretrain\n") as run, RunLog(run, tensorboard=False) as log:
        for step in range(1, 4):
            log.log(step, {"train/loss": 1 / step})
    write_report(tmp_path)
    _, page = read_page(tmp_path)
    assert "hacked" not in page.text
    assert "running, or ended without a word" in page.text
    assert {p.name for p in (tmp_path / "curves").iterdir()} == {"loss.png"}


def test_a_run_killed_before_its_first_step(tmp_path: Path) -> None:
    RunFolder.open(tmp_path, CONFIG).close()
    write_report(tmp_path)
    assert "0 steps" in read_page(tmp_path)[1].text


def test_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(OperantError, match="there is no run in"):
        write_report(tmp_path)
    with pytest.raises(OperantError, match="there is no run in"):
        write_report(tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.draws
def test_any_metric_name_and_damaged_files_are_survived(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: [unclosed")
    (tmp_path / "run.json").write_text("{")
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "eval/my/own <metric>": 1, "eval/忠实度": 2, "note": "text", "train/flag": true}\n'
        '{"step": 2, "eval/my/own <metric>": 2}\nnot json\n[1]\n{"step": 3, "eval/my'
    )
    (tmp_path / "samples.jsonl").write_text(
        '{"step": 2, "text": "<script>alert(1)</script>"}\n{"step": 2, "prompt": 1}\n'
    )
    write_report(tmp_path)
    _, page = read_page(tmp_path)
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.text
    assert "my/own <metric>" in page.text
    assert "忠实度" in page.text
    assert (tmp_path / "curves" / "eval_my_own__metric_.png").exists()


def test_of_two_values_at_one_step_the_later_counts_and_order_is_by_step(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        for step, value in ((3, 1.0), (1, 2.0), (3, 4.0)):
            log.log(step, {"train/loss": value})
    assert load_run(tmp_path).series["train/loss"] == [(1, 2.0), (3, 4.0)]


@pytest.mark.draws
def test_a_long_run_makes_a_small_page(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"step": s, "train/loss": math.sin(s)}) + "\n" for s in range(20_000))
    (tmp_path / "metrics.jsonl").write_text(rows)
    write_report(tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 100_000


def test_thinning_keeps_the_mean_and_the_end() -> None:
    series = [(s, float(s)) for s in range(1, 1001)]
    thin = report._thinned(series, most=100)
    assert len(thin) == 100
    assert thin[0] == (10, 5.5)
    assert thin[-1] == (1000, 995.5)
    assert report._thinned(series[:100], most=100) == series[:100]


def test_smoothing_does_not_lag_and_passes_over_nan() -> None:
    line = [float(i) for i in range(200)]
    assert report._smooth(line)[50:150] == pytest.approx(line[50:150])
    line[100] = math.nan
    assert all(math.isfinite(y) for y in report._smooth(line))
    assert report._smooth([1.0, 2.0, 6.0]) == pytest.approx([1.5, 3.0, 4.0])


@pytest.mark.draws
def test_a_full_disk_while_reporting_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "run", steps=10)

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OperantError, match=r"the disk is full while writing .*report.html"):
        write_report(tmp_path / "run")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.5, "0.500"), (12.345, "12.35"), (123.45, "123.5"), (12345.6, "12,346"), (3e-5, "3.0e-05")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert report._fmt(value) == text
    assert report._signed(-value) == ("±0" if value == 0 else "−" + text)


def test_the_terminal_curve_shows_the_curve_and_its_levels() -> None:
    text = terminal_curve(
        range(20), [20 + i for i in range(20)], title="held-out BLEU", levels={"fine-tuned": 45.0}, color=False
    )
    lines = text.split("\n")
    assert len(lines) <= 16
    assert all(len(line) <= 72 for line in lines)
    assert "held-out BLEU" in lines[0]
    assert "┈ fine-tuned 45.00" in lines[-1]
    assert "45.0┤┈┈┈" in text
    assert "\x1b" not in text

    def columns(line: str) -> list[int]:
        return [i for i, c in enumerate(line) if "⠀" < c <= "⣿"]

    drawn = [columns(line) for line in lines if columns(line)]
    assert len(drawn) > 5
    assert min(drawn[0]) > max(drawn[-1])  # it rises


def test_the_terminal_curve_in_colour_and_with_nothing_to_draw() -> None:
    assert "\x1b[" in terminal_curve([1, 2], [1, 2], color=True)
    assert terminal_curve([], [], title="BLEU") == "BLEU: nothing to draw yet"
    assert terminal_curve([1], [math.nan]) == "nothing to draw yet"
    assert terminal_curve([1, 2, 3], [2.0, 2.0, math.nan], color=False)
    with pytest.raises(ValueError, match="zip"):
        terminal_curve([1, 2], [1])


def test_tile_and_table_show_the_same_number_and_say_which(tmp_path: Path) -> None:
    """Both show the weights that are in model/, of a run with many measurements as of one with few."""
    with RunFolder.open(tmp_path, CONFIG) as run, RunLog(run, tensorboard=False) as log:
        for step in range(40):
            log.log(step, {"eval/reward": 0.5 - (step - 30) ** 2 / 4000, "eval/bleu": 10.0 + step})
        run.finish("done", best_step=30)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    tiles = re.findall(r'<div class="tile"><p>(.*?)</p><strong>(.*?)</strong><p>(.*?)</p><p>(.*?)</p>', page)
    assert [(name, value, which) for name, value, _, which in tiles] == [
        ("Reward, held out", "0.500", "step 30, in model/"), ("BLEU, held out", "40.00", "step 30, in model/"),
    ]  # fmt: skip
    assert "+30.00</span> from 10.00" in tiles[1][2]
    assert "<th>In model/ (step 30)</th><th>First to model/</th>" in page
    row = page[page.index("<tr><th>BLEU") :]
    assert re.findall(r"<td class=num>([^<]*)", row[: row.index("</tr>")]) == [
        "10.00",
        "49.00 ",
        "49.00",
        "40.00",
        "+30.00",
    ]
    (tmp_path / "run.json").write_text("{}")  # as of a run that goes on still
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<p>step 39, the last</p>" in page and "<th>Last</th><th>First to last</th>" in page


def test_axes_are_named_and_curves_are_large(drawn: Path) -> None:
    page = (drawn / "report.html").read_text(encoding="utf-8")
    figures = re.findall(r"<figure>.*?</figure>", page, flags=re.S)
    assert len(figures) > 5
    for figure in figures:
        assert ">step</text>" in figure and "<small>last</small>" in figure
    assert any(">BLEU, 0 to 100</text>" in figure for figure in figures)
    assert any(">nats per token</text>" in figure for figure in figures)
    width = min(float(w) for w in re.findall(r'viewBox="0 0 ([\d.]+)', page))
    assert width > 330  # points: two of them fill a page


def test_rows_are_called_as_the_terminal_calls_them(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"rewarded": {"bleu": 30.0}, "other": {"bleu": 20.0}}))
    page = write_report(tmp_path, rows={"rewarded": "with instant reward"}).read_text(encoding="utf-8")
    assert "<th>with instant reward</th>" in page and "<th>other</th>" in page and "<th>rewarded</th>" not in page


def test_a_change_from_nothing_has_no_share(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        for step, value in ((0, 0.0), (1, 0.4)):
            log.log(step, {"eval/reward": value, "eval/distinct2": value})
    told = {check.name: check.text for check in hacking_checks(load_run(tmp_path), {"reward"})}
    assert told["Distinct-2"] == "0 → 0.400"
