"""Runs again what docs/results.md records, and writes the tables into it.

python -m benchmarks.results                       the quickstart on three seeds
python -m benchmarks.results --seeds 0 1 2 3 4
python -m benchmarks.results --keep                use the runs that are already there
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.cells import ROOT, machine, markdown, spread, write_section

ROWS = {
    "pretrained": "pretrained",
    "finetuned": "fine-tuned",
    "continued": "fine-tuned further, same pairs, same time",
    "rewarded": "with instant reward",
}
METRICS = {"bleu": "BLEU", "chrf": "chrF", "exact": "exact match"}


def run_quickstart(seed: int, out: Path) -> None:
    """One quickstart as a user runs it."""
    program = str(Path(sys.executable).with_name("operant"))
    command = [program, "quickstart", "--seed", str(seed), "--out", str(out), "--overwrite"]
    subprocess.run(command, check=True, cwd=ROOT)


def table(results: list[dict[str, dict[str, float]]]) -> str:
    rows = [[title, *(spread([r[row][m] for r in results]) for m in METRICS)] for row, title in ROWS.items()]
    return markdown(["", *METRICS.values()], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "results", help="where the runs go")
    parser.add_argument("--keep", action="store_true", help="do not repeat a run whose results.json is there")
    given = parser.parse_args()

    results, seconds, steps = [], [], []
    for seed in given.seeds:
        out = given.out / f"quickstart-{seed}"
        if not (given.keep and (out / "results.json").exists()):
            run_quickstart(seed, out)
        results.append(json.loads((out / "results.json").read_text(encoding="utf-8")))
        facts = json.loads((out / "run.json").read_text(encoding="utf-8"))
        learned = json.loads((out / "reward" / "run.json").read_text(encoding="utf-8"))
        seconds.append(facts["seconds"])
        steps.append(learned["steps"])
    gains = [
        result["rewarded"]["bleu"] - max(result["finetuned"]["bleu"], result["continued"]["bleu"]) for result in results
    ]
    seeds = ", ".join(map(str, given.seeds))
    lines = [
        f"`make results`: seeds {seeds}; median [lowest, highest] on the held-out test set. {machine()}.",
        "",
        table(results),
        "",
        f"With reward, BLEU is above the better of both fine-tuned rows by {spread(gains)}.",
    ]
    lines.append(
        f"Wall time of a whole run in seconds: {spread(seconds)}; reward steps in their minute: {spread(steps)}."
    )
    write_section("quickstart", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
