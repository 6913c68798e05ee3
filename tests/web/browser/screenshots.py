"""The pictures of docs/web.md, made again: `python tests/web/browser/screenshots.py URL [NAME …]`.

URL is a server of `longwing serve longwing-tiny`. It is asked as a person asks it; look at what
comes out before it is kept. Needs Chromium, Playwright and Pillow.
"""

import io
import random
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
TABS = ("ask", "chat", "complete", "model", "evaluation", "server")
SCENES = (
    "The baker counted the trays twice, shrugged, and closed the shutter.",
    "At the second bend the path leaves the stream and climbs between hedges.",
    "There was frost on the rails that morning, and the first train slid past the platform.",
    "Three boys carried a ladder across the square and leaned it against the wrong wall.",
    "The ferry came in late, and nobody on the quay seemed to mind.",
    "Towards evening the rain thinned out, and a few windows were opened.",
    "The lamps on the bridge were lit one after the other by a man with a long pole.",
)
HALF_READ = """({ tokens, share, page, pages }) => {
  const told = `data:${JSON.stringify({ text: "", tokens, share, page, pages })}\\n\\n`;
  const body = new ReadableStream({ start: (it) => it.enqueue(new TextEncoder().encode(told)) });
  const real = window.fetch;
  const isDocument = (url) => String(url).includes("/ui/api/documents");
  window.fetch = (url, options) =>
    isDocument(url) ? Promise.resolve(new Response(body)) : real(url, options);
}"""
"""From now on a document's reading comes to this point, and stays there."""


def walks() -> str:
    """A text in which two things are stated."""
    draw = random.Random(5)
    lines = [" ".join(draw.sample(SCENES, 5)) for _ in range(28)]
    lines[1] += " The storage code of the lowland-trivet is 41067."
    lines[9] = f"{lines[9]} The storage code of the pewter-nightjar is 34245. {lines[3]}"
    return "\n\n".join(lines)


def save(picture: Image.Image, name: str) -> None:
    """In few colours: the page has not many."""
    small = picture.convert("RGB").quantize(96, dither=Image.Dither.NONE)
    small.save(DOCS / f"web-{name}.png", optimize=True)


class Photographer:
    """A browser window of one width and theme."""

    def __init__(self, chromium: Any, url: str, wanted: set[str], width: int, theme: str) -> None:
        height = 900 if width > 700 else 780
        context = chromium.new_context(
            viewport={"width": width, "height": height}, color_scheme=theme
        )
        self.at = context.new_page()
        self.at.set_default_timeout(600_000)
        self._url, self._wanted = url, wanted

    def open(self, tab: str) -> None:
        self.at.goto(f"{self._url}/ui#{tab}")
        expect(self.at.locator("#model-chip")).to_have_attribute("data-status", "ready")

    def file(self, name: str, content: bytes) -> None:
        kind = {"name": name, "mimeType": "application/octet-stream", "buffer": content}
        self.at.set_input_files("#drop-file", kind)

    def ask(self, tab: str, *questions: str) -> None:
        for number, question in enumerate(questions):
            field = self.at.locator(f"#{tab}-talk .composer textarea")
            field.fill(question)
            field.press("Enter")
            answer = self.at.locator(f"#{tab}-talk .answer").nth(number)
            expect(answer.locator(".actions")).to_be_visible()

    def take(self, name: str) -> None:
        """Save what is seen, if it was asked for."""
        if name in self._wanted:
            raw = self.at.screenshot(animations="disabled")
            save(Image.open(io.BytesIO(raw)), name)

    def documents(self, name: str) -> None:
        self.open("ask")
        self.file("walks.txt", walks().encode())
        expect(self.at.locator("#reader")).to_have_attribute("aria-busy", "false")
        self.ask(
            "ask",
            "What is the storage code of the lowland-trivet?",
            "And what is the storage code of the pewter-nightjar?",
        )
        self.at.locator("button.quote").last.click()
        self.take(name)

    def half_read(self) -> None:
        self.open("ask")
        self.at.evaluate(HALF_READ, {"tokens": 20400, "share": 0.8, "page": 10, "pages": 12})
        self.file("minutes-of-the-river-board.pdf", b"%PDF-")
        expect(self.at.locator("#reader .facts-line")).to_contain_text("too many")
        self.take("loading")

    def chat(self) -> None:
        self.open("chat")
        self.ask("chat", "The storage code of the old mill is 48213. What is it?")
        self.take("chat")
        self.at.get_by_role("button", name="Parameters", exact=True).click()
        self.take("parameters")

    def complete(self) -> None:
        at = self.at
        at.locator("#tab-complete").click()
        at.locator("#complete-prompt").fill("The heron stood at the weir every morning, and")
        at.locator("#complete-run").click()
        expect(at.locator("#complete-actions")).to_be_visible()
        at.locator(".token").nth(4).hover()
        self.take("complete")

    def model(self) -> None:
        self.open("model")
        self.at.get_by_role("button", name="Load otherwise").click()
        expect(self.at.locator(".plan-verdict")).to_be_visible()
        self.take("model")

    def server(self) -> None:
        """While others ask."""
        self.open("server")
        expect(self.at.locator(".chart-now").nth(1)).to_contain_text("written")
        for size in (400, 900, 900, 2000, 2000, 1200):
            parameters = {"max_new_tokens": 24}
            body = {"inputs": walks()[:size], "parameters": parameters}
            self.at.request.post(f"{self._url}/generate", data=body, timeout=600_000)
            self.at.wait_for_timeout(2500)
        self.take("server")

    def evaluation(self) -> None:
        self.open("evaluation")
        at = self.at
        at.locator("#task-lines").check()
        at.get_by_label("Lengths, in tokens").fill("1k, 2k, 3k")
        at.get_by_role("button", name="Begin").click()
        expect(at.locator(".heat td.scored")).to_have_count(30)
        expect(at.locator("#eval-runs > li").first).to_contain_text("30 cases")
        self.take("evaluation")

    def strip(self) -> None:
        """All tabs side by side, after a question in each that takes one."""
        whole = Image.new("RGB", (len(TABS) * 374 + 14, 808), "#d5d2ca")
        for number, tab in enumerate(TABS):
            self.at.locator(f"#tab-{tab}").click()
            if tab == "chat":
                self.ask("chat", "The storage code of the old mill is 48213. What is it?")
            elif tab == "complete":
                self.complete()
            self.at.wait_for_timeout(3000)
            raw = self.at.screenshot(animations="disabled")
            whole.paste(Image.open(io.BytesIO(raw)).convert("RGB"), (14 + number * 374, 14))
        save(whole, "narrow")


def main(url: str, *names: str) -> None:
    """Take the pictures of these names, or all."""
    wanted = set(names or (*TABS, "ask-dark", "parameters", "loading", "narrow"))
    expect.set_options(timeout=600_000)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )

        def window(width: int = 1440, theme: str = "light") -> Photographer:
            return Photographer(chromium, url, wanted, width, theme)

        if "evaluation" in wanted:
            window().evaluation()
        if "loading" in wanted:
            window().half_read()
        if "ask" in wanted:
            window().documents("ask")
        if "ask-dark" in wanted:
            window(theme="dark").documents("ask-dark")
        if wanted & {"chat", "parameters"}:
            window().chat()
        if "complete" in wanted:
            complete = window()
            complete.open("complete")
            complete.complete()
        if "model" in wanted:
            window().model()
        if "server" in wanted:
            window().server()
        if "narrow" in wanted:
            narrow = window(360)
            narrow.documents("")
            narrow.strip()
        chromium.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
