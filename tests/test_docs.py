"""What the documents say is true: their links lead somewhere, and the functions that they name are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


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
