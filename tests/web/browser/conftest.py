"""A person at the page: a real Chromium, a real `longwing serve` in a child process, a small model.

The model is random and its tokenizer has a token for each byte, so that a document of 10,000 tokens
is one of 10,000 letters. What it answers means nothing; where a test needs an answer that says
something, `Page.says` adds a grammar to the page's request on its way to the server, and the model
can write nothing else: everything from the engine to the screen is as it always is. Where a test is
about the page alone, `Page.recites` answers in the server's place, which takes no time.

A page that logs an error, or meets its content security policy, fails the test it was opened in.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from browser_server import TURNS, Served, ServeProcess, stub_hub, write_model

try:
    from playwright import sync_api
except ImportError:
    collect_ignore_glob = ["test_browser_*.py"]
else:
    sync_api.expect.set_options(timeout=30_000)  # a busy machine is slow, not wrong
CHROMIUM = shutil.which("chromium")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a Chromium there is nobody to look at the page."""
    if CHROMIUM is None:
        for item in items:
            if "chromium" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.skip(reason="chromium is not installed"))


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for all tests; those that load another model put the first one back."""
    root = tmp_path_factory.mktemp("served")
    meadow = write_model(root / "models" / "meadow", seed=0)
    brook = write_model(root / "apart" / "brook", seed=1, template=TURNS)
    with stub_hub() as hub:
        hub.repos["nest/brook"] = {path.name: path.read_bytes() for path in brook.iterdir()}
        process = ServeProcess(
            str(meadow), "--runs-dir", str(root / "runs"), "--max-batch-tokens", "1024",
            LONGWING_CACHE=str(root / "cache"), HF_HOME=str(root / "hf"),
            HF_HUB_CACHE=str(root / "hf" / "hub"), HF_ENDPOINT=hub.endpoint, HF_TOKEN="",
        )  # fmt: skip
        try:
            yield Served(process.url, hub)
        finally:
            process.stop()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser for a module: while it lives, no other test could run an event loop."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-dev-shm-usage", "--force-prefers-reduced-motion"],
        )
        yield browser
        browser.close()


@dataclass
class Page:
    """The page as a person has it before them: Playwright's page, and a few habits.

    Attributes:
        at: Playwright's page.
        sent: bodies of the requests for text, as the page made them.
    """

    at: Any
    url: str
    problems: list[str] = field(default_factory=list)
    sent: list[dict[str, Any]] = field(default_factory=list)
    _grammar: dict[str, Any] | None = None
    _recited: str | None = None

    def open(self, tab: str = "ask") -> "Page":
        self.at.goto(f"{self.url}/ui#{tab}")
        sync_api.expect(self.at.locator("#model-chip")).to_have_attribute("data-status", "ready")
        return self

    def tab(self, name: str) -> None:
        self.at.get_by_role("tab", name=name, exact=True).click()

    def says(self, text: str) -> None:
        """From now on the model can answer nothing else."""
        self._recited = None
        self._grammar = {"structured_outputs": {"choice": [text]}, "max_tokens": len(text.encode())}

    def recites(self, text: str) -> None:
        """From now on this is the answer, and the server is not asked."""
        self._grammar = None
        self._recited = text

    def babbles(self, num_letters: int) -> None:
        """From now on it answers letters, and as many."""
        self._recited = None
        letters = {"regex": f"[a-z ]{{{num_letters}}}"}
        self._grammar = {"structured_outputs": letters, "max_tokens": num_letters}

    def pass_on(self, route: Any) -> None:
        """The page's request for text, with the grammar."""
        body = json.loads(route.request.post_data)
        self.sent.append(body)
        if self._recited is not None:
            route.fulfill(body=_stream(self._recited), content_type="text/event-stream")
            return
        route.continue_(post_data=json.dumps({**body, **(self._grammar or {})}))

    def ask(self, kind: str, text: str) -> None:
        """Ask, in the `ask` or `chat` tab."""
        field_ = self.at.locator(f"#{kind}-talk .composer textarea")
        field_.fill(text)
        field_.press("Enter")

    def answered(self, kind: str, number: int = 1) -> Any:
        """The answer of this number, once it is complete."""
        answer = self.at.locator(f"#{kind}-talk .answer").nth(number - 1)
        sync_api.expect(answer.locator(".actions")).to_be_visible(timeout=60_000)
        return answer

    def drop(self, name: str, text: str) -> None:
        """Drop a file onto the Ask tab."""
        transfer = self.at.evaluate_handle(
            """([name, text]) => {
              const transfer = new DataTransfer();
              transfer.items.add(new File([text], name));
              return transfer;
            }""",
            [name, text],
        )
        self.at.dispatch_event("#ask", "drop", {"dataTransfer": transfer})
        sync_api.expect(self.at.locator("#reader")).to_be_visible(timeout=30_000)


def _stream(text: str) -> str:
    """A stream of events as the server sends it, a few letters at a time."""
    frames = [{"text": text[at : at + 5]} for at in range(0, len(text), 5)]
    frames.append({"text": "", "finish_reason": "stop"})
    usage = {"prompt_tokens": 100, "completion_tokens": len(frames), "total_tokens": 0}
    told = [{"choices": [{"index": 0, **frame}], "usage": usage} for frame in frames]
    return "".join(f"data:{json.dumps(one)}\n\n" for one in told) + "data:[DONE]\n\n"


@pytest.fixture
def visit(chromium: Any, served: Served) -> Iterator[Callable[..., Page]]:
    """`visit(width=…, theme=…)`: a new person with a browser that remembers nothing."""
    made: list[Page] = []
    contexts: list[Any] = []

    def new(width: int = 1440, theme: str = "light", url: str = served.url) -> Page:
        context = chromium.new_context(
            viewport={"width": width, "height": 900 if width > 700 else 780}, color_scheme=theme
        )
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        contexts.append(context)
        at = context.new_page()
        at.set_default_timeout(30_000)
        page = Page(at, url)
        at.on("pageerror", lambda error: page.problems.append(f"{error}\n{error.stack}"))
        at.on("console", lambda said: _note(page, said))
        at.on("dialog", lambda dialog: page.problems.append(f"a dialog: {dialog.message}"))
        at.route("**/v1/completions", page.pass_on)
        made.append(page)
        return page

    yield new
    for context in contexts:
        context.close()
    assert [page.problems for page in made if page.problems] == []


def _note(page: Page, said: Any) -> None:
    """Errors and warnings, but for requests that were refused: those the page shows itself."""
    if said.type in ("error", "warning") and "Failed to load resource" not in said.text:
        page.problems.append(said.text)
