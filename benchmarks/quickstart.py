"""The quickstart on several seeds, as a user runs it; one at a time, since its seconds are recorded.

python -m benchmarks.quickstart                    seeds 0, 1 and 2; those that are recorded are skipped
python -m benchmarks.quickstart --seeds 3 4
python -m benchmarks.quickstart --fresh            measure on this machine, whatever is recorded
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.cells import RECORDS, ROOT, Cell, Records, carry_out, command_line, markdown, spread, write_section

RUNS = ROOT / "runs" / "quickstarts"
RECORD = Records(RECORDS / "quickstart")
ROWS = {
    "pretrained": "pretrained",
    "finetuned": "fine-tuned",
    "continued": "fine-tuned further, same pairs",
    "rewarded": "with instant reward",
}
METRICS = {"bleu": "BLEU", "chrf": "chrF", "exact": "exact match"}


def measure(seed: str) -> None:
    out = RUNS / seed
    program = str(Path(sys.executable).with_name("operant"))
    subprocess.run([program, "quickstart", "--seed", seed, "--out", str(out), "--overwrite"], check=True, cwd=ROOT)
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    facts = json.loads((out / "run.json").read_text(encoding="utf-8"))
    learned = json.loads((out / "reward" / "run.json").read_text(encoding="utf-8"))
    RECORD.put(seed, {"results": results, "seconds": facts["seconds"], "reward_steps": learned["steps"]})


def write() -> None:
    records = {path.stem: RECORD.get(path.stem) for path in sorted(RECORD.folder.glob("*.json"))}
    if not records:
        return
    results = [r["results"] for r in records.values()]
    gains = [r["rewarded"]["bleu"] - max(r["finetuned"]["bleu"], r["continued"]["bleu"]) for r in results]
    rows = [[title, *(spread([r[row][m] for r in results]) for m in METRICS)] for row, title in ROWS.items()]
    lines = [
        f"`python -m benchmarks.quickstart`, seeds {', '.join(records)}; median [lowest, highest] on the held-out test "
        f"set. {RECORD.machines()}.",
        "",
        markdown(["", *METRICS.values()], rows),
        "",
        f"With reward, BLEU is above the better of both fine-tuned rows by {spread(gains)}. "
        f"Wall time of a whole run in seconds: {spread([r['seconds'] for r in records.values()])}; "
        f"reward steps: {spread([r['reward_steps'] for r in records.values()], 0)}.",
    ]
    write_section("quickstart", "\n".join(lines))
    print("\n".join(lines))


def main() -> None:
    given = command_line(__doc__).parse_args()
    carry_out(
        given, "benchmarks.quickstart", cells=lambda: [Cell(str(seed)) for seed in given.seeds],
        done=lambda cell: RECORD.has(cell.name), measure=measure, write=write, records=RECORD, runs=RUNS,
    )  # fmt: skip


if __name__ == "__main__":
    main()
