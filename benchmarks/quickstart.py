"""The quickstart on several seeds, as a user runs it.

python -m benchmarks.quickstart                    seeds 0, 1 and 2; those that are recorded are skipped
python -m benchmarks.quickstart --seeds 3 4
python -m benchmarks.quickstart --fresh            measure on this machine, whatever is recorded
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.cells import RECORDS, ROOT, Cell, Records, markdown, run_cells, spread, write_section

RUNS = ROOT / "runs" / "quickstarts"
RECORD = Records(RECORDS / "quickstart")
ROWS = {
    "pretrained": "pretrained",
    "finetuned": "fine-tuned",
    "continued": "fine-tuned further, same pairs, same time",
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
    machines = "; ".join(sorted({r["machine"] for r in records.values()}))
    lines = [
        f"`python -m benchmarks.quickstart`, seeds {', '.join(records)}; median [lowest, highest] on the held-out test "
        f"set. {machines}.",
        "",
        markdown(["", *METRICS.values()], rows),
        "",
        f"With reward, BLEU is above the better of both fine-tuned rows by {spread(gains)}. "
        f"Wall time of a whole run in seconds: {spread([r['seconds'] for r in records.values()])}; "
        f"reward steps in their minute: {spread([r['reward_steps'] for r in records.values()], 0)}.",
    ]
    write_section("quickstart", "\n".join(lines))
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--fresh", action="store_true", help="throw away what was measured before, and measure here")
    parser.add_argument("--write", action="store_true", help="only write the table")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.cell:
        measure(given.cell)
        return
    if given.fresh:
        shutil.rmtree(RECORD.folder, ignore_errors=True)
    failed = []
    if not given.write:  # one at a time: a quickstart ends by the clock
        failed = run_cells(
            "benchmarks.quickstart", lambda: [Cell(s) for s in given.seeds], lambda c: RECORD.has(c.name), 1
        )
    write()
    if failed:
        raise SystemExit(f"failed: seed {', '.join(failed)}")


if __name__ == "__main__":
    main()
