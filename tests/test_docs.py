"""What the documents say is true: their links lead somewhere, what they name is there, and their commands run."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from documents import PAGES, ROOT, Block, blocks, fenced_commands, quoted_commands, script

import operant
from operant.cli import EXAMPLES, main
from operant.commands import COMMANDS
from operant.config import setting_types


def anchors(page: Path) -> set[str]:
    """The headings of a page as links name them."""
    headings = re.findall(r"(?m)^#+ (.*)$", page.read_text("utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading_that_are_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if target.startswith(("http:", "https:")):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(file), f"{target} names no heading"


def names_in(source: Path) -> set[str]:
    """Functions, classes, and methods as Class.method, of a module."""
    found: set[str] = set()
    for node in ast.parse(source.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = (n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
            found |= {f"{node.name}.{method.name}" for method in methods}
    return found


def test_the_page_of_the_structure_names_functions_that_are_there() -> None:
    page = (ROOT / "docs" / "structure.md").read_text("utf-8")
    named = re.findall(r"`([\w/]+\.py):([\w.]+)`", page)
    assert len(named) >= 20
    for file, name in named:
        assert name in names_in(ROOT / "operant" / file), f"{file} has no {name}"
    for file in re.findall(r"`((?:operant|tests|docs|benchmarks|web)/[\w/.]+)`", page):
        assert (ROOT / file).exists(), f"{file} is not there"


def test_the_page_of_the_decisions_names_files_that_are_there() -> None:
    page = (ROOT / "docs" / "decisions.md").read_text("utf-8")
    named = re.findall(r"`((?:\w+/)+\w+\.py)[`:]", page)
    assert len(named) >= 10
    for file in named:
        assert (ROOT / "operant" / file.removeprefix("operant/")).exists(), f"{file} is not there"


def sentences(text: str) -> list[str]:
    """The sentences of a Markdown page's prose: without code blocks, tables, headings, HTML and where links lead.

    A piece of code counts as one word.
    """
    text = re.sub(r"(?ms)^```.*?^```|<!--.*?-->|<[^>]*>", "", text)
    text = re.sub(r"(?m)^(?:\||#).*$", "", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "code", text)
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text)
    return [" ".join(s.split()) for block in blocks for s in re.split(r"(?<=[.!?])[*\")]*\s", block) if s.strip()]


def test_sentences_leave_out_code_tables_and_where_links_lead() -> None:
    page = (
        "# A title\n\nOne `a b c` [two\nwords](x y). Three!\n\n| a | table |\n\n- four\n- five\n\n```\ncode here\n```\n"
    )
    assert sentences(page) == ["One code two words.", "Three!", "- four", "- five"]


@pytest.mark.parametrize("name", ["README.md", "docs/decisions.md"])
def test_no_sentence_has_over_forty_words(name: str) -> None:
    found = sentences((ROOT / name).read_text("utf-8"))
    assert len(found) >= 30
    too_long = [s for s in found if len(re.findall(r"\S*\w\S*", s)) > 40]
    assert not too_long, too_long


# --- commands and snippets -------------------------------------------------------------------------------------------


# without the past, and what the program prints by itself
WRITTEN = [page for page in PAGES if page.name not in ("CHANGELOG.md", "reference.md")]


def parsed(command: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The configuration that the program reads from a command line, without running it."""
    words = shlex.split(command, comments=True)[1:]
    if words and words[0].startswith("--"):  # the program's own
        return None
    got: list[Any] = []
    assert words[0] in COMMANDS, f"there is no operant {words[0]}"
    monkeypatch.setitem(COMMANDS, words[0], got.append)
    main(words)
    return got[0]


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_on_a_page_is_one_that_the_program_takes(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [line for line in page.read_text("utf-8").splitlines() if line.startswith("|")]
    whole = [*fenced_commands(page, "operant")]
    for command in quoted_commands(page, "operant"):
        if any(row.startswith(f"| `{command}` |") for row in rows):
            whole.append(command)
            continue
        words = command.split()[1:]
        assert words[0].startswith("--") or words[0] in EXAMPLES, f"there is no {command}"
        for flag in re.findall(r"--([a-z_]+)", command):
            assert flag in ("help", "config", "print_config") or flag in setting_types(EXAMPLES[words[0]][0]), command
    for command in whole:
        parsed(command, monkeypatch)


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_make_target_and_benchmark_on_a_page_is_there(page: Path) -> None:
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8")))
    for command in fenced_commands(page, "make") + quoted_commands(page, "make"):
        assert command.split()[1] in targets, command
    for command in fenced_commands(page, "python -m") + quoted_commands(page, "python -m"):
        module = command.split()[2]
        if module.startswith("benchmarks."):
            assert (ROOT / f"{module.replace('.', '/')}.py").exists(), command


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_python_block_on_a_page_compiles_and_names_what_operant_has(page: Path) -> None:
    for block in blocks(page):
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "operant":
                assert hasattr(operant, node.attr) or importlib.util.find_spec(f"operant.{node.attr}"), node.attr
            if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "operant":
                module = importlib.import_module(node.module)
                assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)


def test_the_readme_has_every_command_and_only_those() -> None:
    for page in ("README.md", "README.zh-CN.md"):
        text = (ROOT / page).read_text("utf-8")
        listed = re.findall(r"(?m)^\| `operant ([\w-]+)[ `]", text)
        assert sorted(listed) == sorted(EXAMPLES), page


# --- the pages as a newcomer runs them -------------------------------------------------------------------------------

# so little of everything that a page takes minutes
CUTS = {
    "operant pretrain": "--steps 3 --batch_tokens 512 --device cpu --threads 1",
    "operant sft": "--steps 3 --device cpu --threads 1",
    "operant train": "--steps 2 --prompts_per_step 4 --eval_prompts 4 --device cpu --threads 1",
    "operant prefer": "--steps 2 --device cpu --threads 1",
    "operant reward-model": "--steps 2 --device cpu --threads 1",
    "operant eval": "--limit 8 --device cpu",
    "operant serve": "--device cpu",
}


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a miniature of what the quickstart leaves."""
    folder = tmp_path_factory.mktemp("clone")
    quickstart = "operant quickstart --labelled 200 --prompts 800 --minutes 0.05 --threads 1 --device cpu"
    run_script(f"set -e\n{quickstart}\n", folder)
    return folder


def run_script(text: str, folder: Path) -> str:
    """Standard output of a bash script in a folder, with this environment's programs. What it prints is the failure."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", text], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_tutorial_runs_as_written(newcomer: Path) -> None:
    run_script(script(blocks(ROOT / "docs" / "tutorial.md"), CUTS, {}), newcomer)
    assert (newcomer / "runs" / "tutorial" / "logged" / "model").is_dir()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_ten_lines_of_the_readme_run_as_written(name: str, newcomer: Path) -> None:
    """And the live snippet below them, on a server that the page starts."""
    port = free_port()
    swaps = {
        "max_minutes=5": "steps=2, prompts_per_step=2, device='cpu'", "127.0.0.1:8000": f"127.0.0.1:{port}",
        'out="runs/exact"': f'out="runs/{name}"',
    }  # fmt: skip
    cuts = {"operant serve": f"--device cpu --port {port} --root runs/live-{name}"}
    run_script(script(blocks(ROOT / name), cuts, swaps), newcomer)
    assert (newcomer / "runs" / name / "report.html").exists()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_first_live_loop_runs_as_written(newcomer: Path) -> None:
    port = free_port()
    story = 'curl -s "http://127.0.0.1:8000/v1/feedback/$EVENT?wait=20"'
    cuts = CUTS | {
        "operant serve": f"--device cpu --host 127.0.0.1 --port {port}",
        story: f"; until {story} | grep '\"used\"'; do :; done",  # a busy machine takes longer
    }
    out = run_script(script(blocks(ROOT / "docs" / "live.md"), cuts, {"127.0.0.1:8000": f"127.0.0.1:{port}"}), newcomer)
    assert '"state": "used"' in out or '"state":"used"' in out
    assert "the same bits" in out and "are forgotten" in out


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_table_of_commands_runs_as_written_in_order(newcomer: Path) -> None:
    """And the reward model's page after it, in a folder that has files of the names that they use."""
    folder = newcomer / "table"
    folder.mkdir()
    data = newcomer / "runs" / "quickstart" / "data"
    for file, source in {
        "text": "raw",
        "texts": "raw",
        "pairs": "labelled",
        "prompts": "prompts",
        "test": "test",
    }.items():
        shutil.copy(data / f"{source}.jsonl", folder / f"{file}.jsonl")
    answered = [json.loads(line) for line in (data / "dev.jsonl").read_text("utf-8").splitlines()[:40]]
    for file, made in {
        "preferences": [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "十"} for r in answered],
        "edits": [{"prompt": r["prompt"], "original": "十", "edited": r["completion"]} for r in answered],
        "completions": answered,
    }.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
        (folder / f"{file}.jsonl").write_text(lines, encoding="utf-8")
    page = (ROOT / "README.md").read_text("utf-8")
    table = re.findall(r"(?m)^\| `(operant [^`]+)` \|", page)
    assert len(table) == len(EXAMPLES)
    asked = json.dumps({"model": "default", "user": "anna", "messages": [{"role": "user", "content": "Ten"}]})
    ask = f"curl -sf http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{asked}'"
    commands = [c for c in table if not c.startswith("operant quickstart")]
    commands.insert(1 + next(i for i, c in enumerate(commands) if c.startswith("operant serve")), ask)
    judged = next(block for block in blocks(ROOT / "docs" / "reward_models.md") if block.language == "bash")
    port = free_port()
    cuts = CUTS | {"operant serve": f"--device cpu --port {port}"}
    run_script(script([Block("bash", "\n".join(commands))], cuts, {"127.0.0.1:8000": f"127.0.0.1:{port}"}), folder)
    cuts = CUTS | {"operant train": f"{CUTS['operant train']} --overwrite"}
    run_script(script([judged], cuts, {}), folder)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
