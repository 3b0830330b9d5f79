"""What the documents tell a reader to run: their fenced blocks, commands, and a page as one shell script."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language ("" where none is named) and its text."""

    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return [Block(*found) for found in re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", page.read_text("utf-8"))]


def lines(block: Block) -> list[str]:
    """The commands of a block, each as one line: those that go over several lines, and quotes that do, are joined."""
    out: list[str] = []
    for line in block.text.replace("\\\n", " ").splitlines():
        if out and not _closed(out[-1]):
            out[-1] += "\n" + line
        elif line.strip():
            out.append(line)
    return out


def _closed(command: str) -> bool:
    try:
        shlex.split(command, comments=True)
    except ValueError:
        return False
    return True


def fenced_commands(page: Path, program: str) -> list[str]:
    """The commands of a page's fenced blocks that begin with `program`."""
    shell = [block for block in blocks(page) if block.language != "python"]
    return [line for block in shell for line in lines(block) if line.startswith(f"{program} ")]


def quoted_commands(page: Path, program: str) -> list[str]:
    """The commands in a page's prose and tables, between backticks, that begin with `program`."""
    prose = re.sub(r"(?ms)^```.*?^```$", "", page.read_text("utf-8"))
    return [" ".join(found.split()) for found in re.findall(rf"`({program}\s[^`]+)`", prose)]


def script(parts: Iterable[Block], cuts: Mapping[str, str], swaps: Mapping[str, str]) -> str:
    """Blocks as one bash script: the bash ones in order, and the Python ones, run or saved under the name they bear.

    cuts: flags that are appended to each command, by its first words. swaps: texts to replace, each of which must be
    there. `make` is left out, and a server goes on in the background until the next one or the end.
    """
    out = ["set -eo pipefail", "trap 'kill $SERVER 2>/dev/null || true; wait' EXIT"]
    for block in parts:
        if block.language == "python":
            out.append(_python(block.text))
        elif block.language == "bash":
            out += [_cut(line, cuts) for line in lines(block) if not line.startswith(("make ", "export PATH"))]
    whole = "\n".join(out) + "\n"
    for old, new in swaps.items():
        assert old in whole, f"{old} is not there"
        whole = whole.replace(old, new)
    return whole


def _python(text: str) -> str:
    name = re.match(r"# (\w+\.py)\n", text)
    return f"cat > {name[1]} <<'PYTHON'\n{text}PYTHON" if name else f"python - <<'PYTHON'\n{text}PYTHON"


def _cut(line: str, cuts: Mapping[str, str]) -> str:
    told = f"echo {shlex.quote('$ ' + line)}\n"
    flags = next((flags for start, flags in cuts.items() if line.startswith(start)), "")
    whole = f"{line.partition('  #')[0].rstrip()} {flags}".rstrip()
    if line.startswith("operant serve"):
        stop = 'if [ -n "$SERVER" ]; then kill $SERVER; wait $SERVER || true; fi\n'
        ready = "until curl -sf http://127.0.0.1:8000/ready >/dev/null; do kill -0 $SERVER; sleep 0.2; done"
        return f"{told}{stop}{whole} &\nSERVER=$!\n{ready}"
    return told + whole
