"""The page, driven in a real browser against `operant serve` with a learner."""

from __future__ import annotations

import ast
import contextlib
import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from forks import PATIENCE, Forked
from serving import SAME_PACKAGE, Served, learning

from operant.algorithms.learner import logprobs_of
from operant.data.batch import from_sequences
from operant.live.api.page_routes import STATIC
from operant.live.learning import events as reading
from operant.live.learning import lesson, step
from operant.live.learning.gate import fast_gate, sense_gate, slow_gate
from operant.live.storage.store import Store
from operant.live.storage.versions import Versions
from operant.models.policy import Policy

WEB = Path(__file__).parents[1] / "web"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()

pytestmark = pytest.mark.timeout(600)
needs_page = pytest.mark.skipif(not (STATIC / "index.html").exists(), reason="the page is not built: make page")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt install chromium")


@contextlib.contextmanager
def program(policy: Policy, folder: Path, *options: str) -> Iterator[httpx.Client]:
    """`operant serve` on a tiny model, as a process of its own; all that it keeps is in `folder`."""
    policy.save(folder / "model")
    command = [
        sys.executable, "-m", "operant.cli", "serve", "--model", str(folder / "model"), "--root",
        str(folder / "live"), "--port", "0", "--threads", "1", "--max_tokens", "12", "--anchor_rows", "2",
        "--anchor_tokens", "4", *options,
    ]  # fmt: skip
    with (folder / "log").open("w") as log:
        process = Forked(command, stdout=log, stderr=log, env=SAME_PACKAGE)
    try:
        with httpx.Client(base_url=address(folder / "log", process), timeout=PATIENCE) as http:
            yield http
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def served(make_policy: Callable[..., Policy], tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with program(make_policy("gpt2"), tmp_path_factory.mktemp("page"), "--score_low", "-1") as http:
        yield http


def address(log: Path, process: subprocess.Popen[bytes]) -> str:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and process.poll() is None:
        found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
        if found:
            try:
                if httpx.get(f"{found[0]}/ready").status_code == 200:
                    return found[0]
            except httpx.HTTPError:
                pass
        time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    with api.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


@contextlib.contextmanager
def visitor(browser: Any, address: str) -> Iterator[Callable[..., Any]]:
    """Open the page; at the end nothing was asked of another host, and nothing was complained about."""
    contexts: list[Any] = []
    asked: list[str] = []
    complaints: list[str] = []

    def go(view: str = "", **options: Any) -> Any:
        context = browser.new_context(**({"locale": "en-GB", "viewport": {"width": 1000, "height": 800}} | options))
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(120_000)  # a learner that starts on a busy machine takes a while
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(f"{address}/{view}")
        return page

    yield go
    for context in contexts:
        context.close()
    assert [url for url in asked if not url.startswith(address)] == []
    assert complaints == []


@pytest.fixture
def opened(served: httpx.Client, browser: Any) -> Iterator[Callable[..., Any]]:
    with visitor(browser, str(served.base_url)) as go:
        yield go


def ask(page: Any, text: str = "the cat sat") -> Any:
    """The article of the answer to a question, once it is whole. A random model may say nothing: it is asked again."""
    for count in range(1, 10):
        page.get_by_placeholder(re.compile("Say something|说点什么")).fill(text)
        page.keyboard.press("Enter")
        answer = page.locator("article.assistant").nth(count - 1)
        answer.locator(".tools").wait_for()
        if answer.locator(".said").inner_text().strip():
            return answer
    raise AssertionError("the model has nothing to say")


def learned(answer: Any, kind: str) -> str:
    """What the page tells of the newest click once it is learned."""
    click = answer.locator(f".clicks li:has(.kind:text-is('{kind}'))").first
    click.wait_for()
    answer.page.wait_for_function("node => !node.classList.contains('pending')", arg=click.element_handle())
    return click.inner_text()


def events(served: httpx.Client, kind: str) -> list[dict[str, Any]]:
    return served.get("/v1/feedback", params={"kind": kind, "limit": 1000}).json()["data"]


@needs_page
@needs_browser
def test_a_thumb_is_recorded_and_the_page_tells_what_it_did(served: httpx.Client, opened: Callable[..., Any]) -> None:
    page = opened()
    answer = ask(page)
    answer.get_by_role("button", name="Good answer").click()
    told = learned(answer, "thumb")
    event = events(served, "thumb")[-1]
    assert event["value"] == 1 and event["state"] == "used"
    assert re.search(rf"Learned in [\d.]+ s, version {event['version']}; log-probability of this answer: −", told), told
    assert answer.get_by_role("button", name="Good answer").get_attribute("aria-pressed") == "true"
    answer.get_by_role("button", name="Take back").click()
    learned(answer, "take back")
    assert events(served, "retract")[-1]["value"] == event["id"]


QUESTIONS = ["red", "blue dog", "green cat", "house", "sun and moon", "a dog", "the cat", "moon", "red house", "sun"]


@needs_page
@needs_browser
def test_a_newcomer_sees_the_model_move(make_policy: Callable[..., Policy], tmp_path: Path, browser: Any) -> None:
    """The tutorial's walk: ten answers and a thumb each, told click by click, measured on the weights that serve."""
    told: list[tuple[str, str, float]] = []  # the answer's id, the button, log-probability after less before
    with (
        program(make_policy("gpt2", context=128), tmp_path) as served,
        visitor(browser, str(served.base_url)) as opened,
    ):
        page = opened()
        for count, question in enumerate(QUESTIONS, start=1):
            answer = ask(page, question)
            button = ("Good answer", "Bad answer")[count % 2]
            answer.get_by_role("button", name=button).click()
            line = learned(answer, "thumb")
            found = re.search(
                r"Learned in [\d.]+ s, version (\d+); log-probability of this answer: (\S+) → (\S+)", line
            )
            assert found is not None, line
            assert int(found[1]) == count
            before, after = (float(found[i].replace("−", "-")) for i in (2, 3))
            told.append((events(served, "thumb")[-1]["completion_id"], button, after - before))
            page.get_by_text(f"version {count} · learner: up").wait_for()
            page.get_by_role("button", name="New chat").click()
        page.get_by_role("link", name="Watch").click()
        page.locator("tr.current th", has_text=f"version {len(QUESTIONS)}").wait_for()
        rows = page.locator("table.lineage th").all_inner_texts()
        assert [row.split("\n")[0] for row in rows] == [f"version {n}" for n in range(len(QUESTIONS), -1, -1)]
        assert [text for text in page.locator(".log .moved").all_inner_texts() if "→" not in text] == []
    measured = {one: moved(tmp_path, one) for one, _, _ in told}
    for button, sign in (("Good answer", 1), ("Bad answer", -1)):
        clicks = [(one, step) for one, pressed, step in told if pressed == button]
        assert all(sign * step > 0 for _, step in clicks)
        assert sign * sum(measured[one] for one, _ in clicks) > 0


def moved(folder: Path, completion_id: str) -> float:
    """The log-probability of a stored answer under the version that serves less that under the first."""
    with contextlib.closing(Store(folder / "live" / "store.db")) as store:
        stored = store.completion(completion_id)
    assert stored is not None and stored.completion is not None and stored.prompt.tokens is not None
    now = Path(Versions(folder / "live").current().path) / "model"
    values = []
    for model in (folder / "model", now):
        policy = Policy.load(model, device="cpu")
        batch = from_sequences(
            [stored.prompt.tokens], [stored.completion.tokens], encoder=False, pad_id=policy.codec.pad_id
        )
        values.append(float((logprobs_of(policy, batch, 4096) * batch.action_mask).sum()))
    return values[1] - values[0]


@needs_page
@needs_browser
@pytest.mark.parametrize("conversation", [False, True])
def test_a_question_stands_alone_where_the_model_was_not_taught_to_converse(
    served: httpx.Client, opened: Callable[..., Any], conversation: bool
) -> None:
    page = opened()
    if conversation:  # the page does as it is told; the tiny model has no chat template

        def tell(route: Any) -> None:
            told = served.get("/v1/models/default").json()
            assert told["operant"]["conversation"] is False
            told["operant"]["conversation"] = True
            route.fulfill(json=told)

        page.route("**/v1/models/default", tell)
        page.reload()
    hint = page.get_by_text("every question stands alone")
    hint.wait_for(state="detached" if conversation else "visible")
    sent: list[list[str]] = []
    page.on(
        "request",
        lambda request: (
            sent.append([one["content"] for one in request.post_data_json["messages"]])
            if request.url.endswith("/v1/chat/completions")
            else None
        ),
    )
    first = ask(page, "a dog").locator(".said").inner_text()
    count = page.locator("article.assistant").count()
    page.get_by_placeholder("Say something").fill("the cat")
    page.keyboard.press("Enter")
    page.locator("article.assistant").nth(count).locator(".tools").wait_for()
    assert sent[-1][-1] == "the cat"
    if conversation:
        assert sent[-1][-3] == "a dog" and " ".join(sent[-1][-2].split()) == " ".join(first.split())
    else:
        assert all(len(one) == 1 for one in sent)


@needs_page
@needs_browser
def test_stars_use_the_scale_that_the_server_has(served: httpx.Client, opened: Callable[..., Any]) -> None:
    answer = ask(opened())
    answer.get_by_role("button", name="2 of 5").click()
    learned(answer, "score")
    assert events(served, "score")[-1]["value"] == -0.5


@needs_page
@needs_browser
def test_an_answer_is_edited_in_place(served: httpx.Client, opened: Callable[..., Any]) -> None:
    page = opened()
    answer = ask(page)
    answer.get_by_role("button", name="Edit").click()
    page.get_by_label("Your version of this answer").fill("the cat sat down")
    page.get_by_role("button", name="Teach this version").click()
    learned(answer, "edit")
    assert events(served, "edit")[-1]["value"] == "the cat sat down"


@needs_page
@needs_browser
def test_of_two_answers_the_better_one_is_chosen(served: httpx.Client, opened: Callable[..., Any]) -> None:
    page = opened()
    answer = ask(page)
    answer.get_by_role("button", name="Try again").click()
    second = page.locator(".pair article").nth(1)
    second.get_by_role("button", name="This one is better").click()
    learned(page.locator("article.assistant").last, "comparison")
    event = events(served, "comparison")[-1]
    assert event["value"] != event["completion_id"] and event["value"].startswith("chatcmpl-")


@needs_page
@needs_browser
def test_selected_words_are_marked(served: httpx.Client, opened: Callable[..., Any]) -> None:
    page = opened()
    answer = ask(page)
    text = answer.locator(".said").inner_text()
    answer.locator(".said").evaluate(
        """node => {
            const range = document.createRange();
            range.selectNodeContents(node);
            document.getSelection().removeAllRanges();
            document.getSelection().addRange(range);
        }"""
    )
    page.get_by_role("button", name="Bad words").click()
    learned(answer, "marked words")
    event = events(served, "span")[-1]
    assert event["value"] == -1
    stored = served.get(f"/v1/chat/completions/{event['completion_id']}").json()["choices"][0]["message"]["content"]
    marked = stored[event["span"]["start"] : event["span"]["end"]]
    assert marked == stored.strip() and " ".join(marked.split()) == " ".join(text.split())


@needs_page
@needs_browser
def test_the_watch_view_tells_of_versions_and_rolls_back(served: httpx.Client, opened: Callable[..., Any]) -> None:
    page = opened()
    answer = ask(page)
    answer.get_by_role("button", name="Good answer").click()
    learned(answer, "thumb")
    page.get_by_role("link", name="Watch").click()
    page.locator(".plot canvas").wait_for()
    page.locator(".legend li").first.wait_for()
    before = served.get("/v1/versions").json()["current"]
    page.get_by_role("button", name="Roll back").click()
    row = page.locator("tr.current", has_text="serves")
    page.wait_for_function(
        "now => !document.querySelector('tr.current th')?.textContent.startsWith(`version ${now}`)", arg=before
    )
    current = served.get("/v1/versions").json()["current"]
    assert current < before and f"version {current}" in row.inner_text()
    page.get_by_label("all kinds").select_option("thumb")
    kinds = page.locator(".log .kind").all_inner_texts()
    assert kinds and set(kinds) == {"thumb"}
    page.locator(".log summary").first.click()
    assert "log-probability" in page.locator(".log details[open] p").inner_text()


PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


def trial_of(served: Served) -> dict[str, Any]:
    told: dict[str, Any] = served.http.get("/v1/versions").json()["trial"]
    return told


def put_on_trial(served: Served) -> None:
    """Teach something, and wait until version 1 is tried by half of the users."""
    served.rate(served.chat(user="teacher")["id"], "edit", "a dog", source="teacher")
    until = time.monotonic() + PATIENCE
    while trial_of(served)["candidate"] != 1 or 1 not in served.http.get("/v1/versions").json()["resident"]:
        assert time.monotonic() < until
        time.sleep(0.05)


@needs_page
@needs_browser
def test_the_watch_view_tells_of_a_trial_and_how_it_ended(
    make_policy: Callable[..., Policy], tmp_path: Path, browser: Any
) -> None:
    with (
        learning(make_policy("gpt2", context=128), tmp_path, canary_share=0.5, keep=20) as served,
        visitor(browser, served.url) as opened,
    ):
        put_on_trial(served)
        page = opened("#watch", **PHONE)
        row = page.locator("table.lineage tr", has=page.get_by_role("rowheader", name=re.compile(r"^version 1\b")))
        row.wait_for()
        assert row.locator(".mark").all_inner_texts() == ["on trial"]
        assert "serves" in page.locator("tr.current", has_text="version 0").inner_text()
        assert "Version 1 is on trial against version 0: it answers 50% of the users" in (
            page.locator(".trial").inner_text()
        )
        answers = [served.chat(user=f"u{i}", max_tokens=2) for i in range(60)]
        tried = [one for one in answers if one["operant"]["version"] == 1]
        others = [one for one in answers if one["operant"]["version"] == 0]
        assert len(tried) > 15 and len(others) > 15
        for i, pair in enumerate(zip(tried[:3], others[:3], strict=True)):  # all say that what is tried is worse
            for value, one in zip((0.0, 1.0), pair, strict=True):
                served.rate(one["id"], "score", value, source=f"rater{value}-{i}")
        trial = trial_of(served)
        assert trial["pairs"] == 3 and 1 < trial["e_worse"] < trial["needed"] == 20
        page.get_by_text("pairs of ratings: 3 of at most 1000 · mean difference −1.00").wait_for()
        meter = page.get_by_role("meter", name="worse", exact=True)
        assert meter.evaluate("node => node.value") == pytest.approx(math.log(trial["e_worse"]) / math.log(20))
        assert meter.get_attribute("aria-valuetext") == f"{math.floor(10 * trial['e_worse']) / 10} of 20"
        assert page.get_by_role("meter", name="not worse by 0.1").evaluate("node => node.value") == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        for i, pair in enumerate(zip(tried[3:15], others[3:15], strict=True)):
            for value, one in zip((0.0, 1.0), pair, strict=True):
                served.rate(one["id"], "score", value, source=f"later{value}-{i}")
        verdict = row.locator(".verdict.refused")
        verdict.wait_for()
        (found,) = [one["trial"] for one in served.http.get("/v1/versions").json()["versions"] if one["version"] == 1]
        assert verdict.inner_text().startswith(f"trial lost: worse than version 0, after {found['pairs']} pairs (")
        page.get_by_role("button", name="中文").tap()
        page.get_by_text(f"试用未通过：{found['pairs']} 对之后比版本 0 差").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


@needs_page
@needs_browser
def test_a_trial_is_ended_by_keyboard(make_policy: Callable[..., Policy], tmp_path: Path, browser: Any) -> None:
    with (
        learning(make_policy("gpt2", context=128), tmp_path, canary_share=0.5, keep=20) as served,
        visitor(browser, served.url) as opened,
    ):
        put_on_trial(served)
        page = opened("#watch")
        page.get_by_role("button", name="End the trial").wait_for()
        for _ in range(10):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.innerText") == "End the trial":
                break
        page.keyboard.press("Enter")
        page.get_by_text("No version is on trial.").wait_for()
        assert trial_of(served)["candidate"] is None
        assert served.http.get("/v1/versions").json()["current"] == 0  # what learns next starts from what serves


@needs_page
@needs_browser
def test_where_several_teach_the_watch_view_tells_them_apart(served: httpx.Client, opened: Callable[..., Any]) -> None:
    page = opened()
    answer = ask(page)
    answer.get_by_role("button", name="Good answer").click()
    learned(answer, "thumb")
    about = events(served, "thumb")[-1]["completion_id"]
    body = {"completion_id": about, "kind": "score", "value": -1, "source": "judge"}
    assert served.post("/v1/feedback", json=body).status_code == 200
    page.get_by_role("link", name="Watch").click()
    row = page.locator("table.sources tr", has_text="judge")
    row.wait_for()
    told = next(one for one in served.get("/v1/sources").json()["data"] if one["source"] == "judge")
    assert row.locator("td").all_inner_texts()[2:4] == [f"{told['reward']:.2f}".replace("-", "−"), "1.00"]
    assert page.locator("table.sources tr", has_text="owner").count() == 1


@needs_page
@needs_browser
def test_it_speaks_chinese_and_fits_a_phone(opened: Callable[..., Any]) -> None:
    page = opened(locale="zh-CN", **PHONE)
    answer = ask(page, "你好")
    answer.get_by_role("button", name="差回答").tap()
    assert "版本" in learned(answer, "拇指")
    answer.get_by_role("button", name="撤回").tap()
    assert re.search(r"在版本 \d+ 学过之后才撤回", learned(answer, "撤回"))
    for view in ("对话", "观察"):
        page.get_by_role("link", name=view).tap()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.evaluate("document.documentElement.lang") == "zh"
    page.get_by_role("button", name="English").tap()
    page.get_by_role("link", name="Watch").wait_for()


@needs_page
@needs_browser
def test_everything_is_reached_by_keyboard(opened: Callable[..., Any]) -> None:
    page = opened()
    ask(page)
    reached = set()
    for _ in range(25):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.innerText")
        )
    expected = {"Good answer", "Bad answer", "5 of 5", "Edit", "Try again", "Watch", "中文"}
    assert expected <= {name.strip() for name in reached if name}


@needs_page
def test_the_page_forbids_itself_everything_it_does_not_need(served: httpx.Client) -> None:
    page = served.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assets = re.findall(r'(?:src|href)="\.?/?(assets/[^"]+)"', page.text)
    assert assets and all(served.get(f"/{name}").status_code == 200 for name in assets)
    assert "immutable" in served.get(f"/{assets[0]}").headers["cache-control"]
    for name in ("..%2fpage.py", "%2e%2e/page.py", "../index.html", "nothing.js", "index.html"):
        assert served.get(f"/assets/{name}").status_code == 404


def test_texts_can_be_read_on_their_grounds() -> None:
    """WCAG 2.2, 1.4.3: a contrast of 4.5 at least, in light and in dark."""
    style = (WEB / "src" / "style.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    light = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[0]))
    dark = light | dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[1]))
    assert dark != light
    for colors in (light, dark):
        pairs = [(text, ground) for text in ("ink", "soft", "accent", "bad") for ground in ("paper", "tint")]
        for text, ground in [*pairs, ("on-accent", "accent")]:
            assert contrast(colors[text], colors[ground]) >= 4.5, (text, ground)


def contrast(one: str, other: str) -> float:
    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_both_languages_have_the_same_words() -> None:
    """TypeScript checks the names; here, that every {place} of one language is in the other."""
    source = (WEB / "src" / "i18n.ts").read_text(encoding="utf-8")
    english, chinese = source.split("const zh")[0], source.split("const zh")[1]
    places = [re.findall(r"(\w+):\s+\"([^\"]*)\"", half) for half in (english, chinese)]
    table = [{name: sorted(re.findall(r"\{\w+\}", text)) for name, text in half} for half in places]
    assert table[0] == table[1] and any(table[0].values())
    assert json.loads((WEB / "package.json").read_text())["private"]


def test_what_the_server_gives_as_a_reason_is_told_in_chinese_too() -> None:
    source = (WEB / "src" / "reasons.ts").read_text(encoding="utf-8")
    table = re.findall(r'"([^"]+)",\s*"[^"]*[\u4e00-\u9fff][^"]*"', source)
    known = [re.compile(re.sub(r"\\\{\w+\\\}", "(.+)", re.escape(english)), re.DOTALL) for english in table]

    said = [*reasons_in(reading), *reasons_in(lesson), *reasons_in(step)]
    assert {"retracted", "score outside 7 to 7", "no step within the KL budget moved the text the right way"} <= {*said}
    bad, good = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 9.0]])
    limits = {"kl_budget": 0.1, "drift_budget": 0.1, "likelihood_drop": 0.1}
    said += fast_gate(bad, good, good, torch.tensor([1]), kl_parent=9.0, **limits).reason.split("; ")
    said += [slow_gate({"bleu": 1.0}, {"bleu": 2.0}).reason]
    sound = {"repeated": 0.0, "empty": 0.0, "length": 20.0, "commonest": 0.1}
    senseless = sense_gate({"repeated": 0.9, "empty": 0.9, "length": 1.0, "commonest": 1.0}, sound).reason.split("; ")
    assert len(senseless) == 4
    said += senseless
    assert [reason for reason in said if not any(pattern.fullmatch(reason) for pattern in known)] == []


def reasons_in(module: Any) -> list[str]:
    """The sentences of a module of learning that say why: what its functions return as a text, keep under such a name
    or put into an outcome, and its constants. What is filled in reads 7."""
    constants = {name: value for name, value in vars(module).items() if re.fullmatch("_[A-Z]+", name)}

    def filled(part: ast.expr) -> str:
        assert isinstance(part, ast.FormattedValue)
        return str(constants.get(part.value.id, 7)) if isinstance(part.value, ast.Name) else "7"

    def texts(node: ast.expr | None) -> list[str]:
        if isinstance(node, ast.IfExp):
            return texts(node.body) + texts(node.orelse)
        if isinstance(node, ast.JoinedStr):
            return ["".join(p.value if isinstance(p, ast.Constant) else filled(p) for p in node.values)]
        return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value else []

    found = []
    for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.returns and re.search(r"\bstr$", ast.unparse(node.returns)):
            found += [text for r in ast.walk(node) if isinstance(r, ast.Return) for text in texts(r.value)]
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("reason", "told", "fits"):
            found += texts(node.value)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "Outcome":
            found += texts(node.args[1])
    return found + [text for text in constants.values() if isinstance(text, str) and text not in "\n".join(found)]
