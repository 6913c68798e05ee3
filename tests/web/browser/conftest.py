"""A person at the page: a real Chromium, a real `longwing serve` in a child process, a small model.

The model is random and its tokenizer has a token for each byte, so that a document of 10,000 tokens
is one of 10,000 letters. What it answers means nothing; where a test needs an answer that says
something, `Page.says` adds a grammar to the page's request on its way to the server, and the model
can write nothing else: everything from the engine to the screen is as it always is. Where a test is
about the page alone, `Page.recites` answers in the server's place, which takes no time.

A page that logs an error, or meets its content security policy, fails the test it was opened in.
Nothing here sleeps: tests wait for what they want to see, for as long as a busy machine may take.
"""

import base64
import json
import shutil
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from browser_server import TURNS, Served, serving, write_model

try:
    from playwright import sync_api
except ImportError:
    collect_ignore_glob = ["test_browser_*.py"]
else:
    sync_api.expect.set_options(timeout=120_000)  # as PATIENCE_MS
CHROMIUM = shutil.which("chromium")
HERE = Path(__file__).parent
PATIENCE_MS = 120_000
"""A busy machine is slow, not wrong."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a Chromium there is nobody to look at the page."""
    if CHROMIUM is None:
        for item in items:
            if "chromium" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.skip(reason="chromium is not installed"))


class Browser:
    """A Chromium for the tests of this folder, while they run one after another.

    While it lives, no other test could run an event loop: before one from elsewhere it is closed.
    """

    def __init__(self) -> None:
        self._playwright: Any = None
        self._chromium: Any = None

    @property
    def chromium(self) -> Any:
        """Playwright's browser."""
        if self._chromium is None:
            self._playwright = sync_api.sync_playwright().start()
            self._chromium = self._playwright.chromium.launch(
                executable_path=CHROMIUM,
                args=["--no-sandbox", "--disable-dev-shm-usage", "--force-prefers-reduced-motion"],
            )
        return self._chromium

    def close(self) -> None:
        if self._chromium is not None:
            self._chromium.close()
            self._playwright.stop()
            self._playwright = self._chromium = None


BROWSER = pytest.StashKey[Browser]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[BROWSER] = Browser()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, None, None]:
    yield
    if nextitem is None or HERE not in nextitem.path.parents:
        item.config.stash[BROWSER].close()


@pytest.fixture(scope="session")
def chromium(request: pytest.FixtureRequest) -> Callable[[], Any]:
    """`chromium()` is the browser."""
    browser = request.config.stash[BROWSER]
    return lambda: browser.chromium


@pytest.fixture(scope="session")
def meadow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that is served, in a folder of its own."""
    return write_model(tmp_path_factory.mktemp("models") / "meadow", seed=0)


@pytest.fixture(scope="session")
def brook(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that can be downloaded."""
    return write_model(tmp_path_factory.mktemp("apart") / "brook", seed=1, template=TURNS)


@pytest.fixture(scope="session")
def served(meadow: Path, brook: Path) -> Iterator[Served]:
    """One server for all tests that leave it as it was."""
    with serving(meadow, brook) as one:
        yield one


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

    def answered(self, kind: str, number: int = 1, *, patience_ms: int = PATIENCE_MS) -> Any:
        """The answer of this number, once it is complete."""
        answer = self.at.locator(f"#{kind}-talk .answer").nth(number - 1)
        sync_api.expect(answer.locator(".actions")).to_be_visible(timeout=patience_ms)
        return answer

    def drop(self, name: str, content: str | bytes) -> None:
        """Drop a file onto the Ask tab, and wait until it is read."""
        self.let_fall(name, content)
        self.is_read()

    def let_fall(self, name: str, content: str | bytes) -> None:
        """Drop a file onto the Ask tab."""
        raw = content.encode() if isinstance(content, str) else content
        transfer = self.at.evaluate_handle(
            """([name, packed]) => {
              const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
              const transfer = new DataTransfer();
              transfer.items.add(new File([bytes], name));
              return transfer;
            }""",
            [name, base64.b64encode(raw).decode()],
        )
        self.at.dispatch_event("#ask", "drop", {"dataTransfer": transfer})

    def is_read(self) -> None:
        """Wait until the document is there, read and counted."""
        sync_api.expect(self.at.locator("#reader")).to_have_attribute("aria-busy", "false")
        sync_api.expect(self.at.locator("#reader")).to_be_visible()


def _stream(text: str) -> str:
    """A stream of events as the server sends it, a few letters at a time."""
    frames = [{"text": text[at : at + 5]} for at in range(0, len(text), 5)]
    frames.append({"text": "", "finish_reason": "stop"})
    usage = {"prompt_tokens": 100, "completion_tokens": len(frames), "total_tokens": 0}
    told = [{"choices": [{"index": 0, **frame}], "usage": usage} for frame in frames]
    return "".join(f"data:{json.dumps(one)}\n\n" for one in told) + "data:[DONE]\n\n"


@pytest.fixture
def visit(
    request: pytest.FixtureRequest, chromium: Callable[[], Any]
) -> Iterator[Callable[..., Page]]:
    """`visit(width=…, theme=…)`: a new person with a browser that remembers nothing."""
    made: list[Page] = []
    contexts: list[Any] = []

    def new(width: int = 1440, theme: str = "light", url: str | None = None) -> Page:
        context = chromium().new_context(
            viewport={"width": width, "height": 900 if width > 700 else 780}, color_scheme=theme
        )
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        contexts.append(context)
        at = context.new_page()
        at.set_default_timeout(PATIENCE_MS)
        page = Page(at, url or request.getfixturevalue("served").url)
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
