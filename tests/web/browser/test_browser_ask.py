"""Ask: a long document, questions about it, and where the answers stand in it."""

import json
import re
from pathlib import Path

import pytest
from pdf_files import text_pdf
from playwright.sync_api import expect

FACT = "The number of the strong box is 48213."
FILL = "The river rose again in the night, and nobody at the mill was surprised by it. "
FACTS = "#reader .facts-line"
LONG = (FILL * 64 + "\n\n" + FACT + "\n\n" + FILL * 64)[:10_000]


def test_a_dropped_document_is_read_answered_and_the_answer_found_in_it(visit):
    page = visit().open()
    page.drop("weir.txt", LONG)
    expect(page.at.locator(FACTS)).to_contain_text("10,000 of 16,383 tokens")

    page.says(f"It says: {FACT}")
    statuses = seen(page, "#ask-talk .status")
    page.ask("ask", "What is the number?")
    answer = page.answered("ask")
    expect(answer.locator(".text")).to_have_text(f"It says: {FACT}")
    assert any(text.startswith("Reading 4,096 of 10,0") for text in statuses()), statuses()
    assert "10,000 tokens read" not in answer.inner_text()  # the question and template count too

    quote = answer.locator("button.quote")
    expect(quote).to_contain_text(FACT.rstrip("."))
    expect(quote).to_contain_text("at 5")  # the middle of the document, in percent
    assert highlighted(page, "quoted") == [FACT.rstrip(".")]
    quote.click()
    assert highlighted(page, "shown") == [FACT.rstrip(".")]
    page.at.wait_for_function("""() => {
      const [range] = [...CSS.highlights.get("shown")];
      const box = range.getBoundingClientRect();
      const frame = document.querySelector(".reader-text").getBoundingClientRect();
      return box.top >= frame.top && box.bottom <= frame.bottom;
    }""")


def test_the_document_stands_first_so_that_a_follow_up_reads_only_what_is_new(visit):
    page = visit().open()
    page.drop("weir.txt", LONG.replace("mill", "lock"))
    page.says("Yes.")
    page.ask("ask", "Is there a number?")
    page.answered("ask")
    page.ask("ask", "And a river?")
    second = page.answered("ask", 2)
    expect(second.locator(".status")).to_contain_text("tokens were remembered")
    remembered, prompt = numbers(second.locator(".status").inner_text())[:2]
    assert prompt > remembered > 10_000
    first_ids, second_ids = (body["prompt"] for body in page.sent)
    assert second_ids[: len(first_ids)] == first_ids


def test_an_answer_can_be_stopped_and_gone_on_with(visit):
    page = visit().open()
    page.drop("short.txt", "A short one.")
    page.babbles(6000)
    page.ask("ask", "Go on for long.")
    answer = page.at.locator("#ask-talk .answer")
    page.at.wait_for_function(
        "() => document.querySelector('#ask-talk .answer .text').textContent.length > 60"
    )
    page.at.get_by_role("button", name="Stop").click()
    page.answered("ask")
    expect(answer.locator(".status")).to_contain_text("stopped by you")
    written = answer.locator(".text").inner_text()
    assert 20 < len(written) < 6000
    page.babbles(30)
    answer.get_by_role("button", name="Go on").click()
    page.at.wait_for_function(
        "least => document.querySelector('#ask-talk .answer .text').textContent.length > least",
        arg=len(written) + 10,
    )
    page.answered("ask")
    assert answer.locator(".text").inner_text().startswith(written[:20])


def test_a_conversation_and_its_document_are_found_again_after_a_reload(visit):
    page = visit().open()
    page.drop("weir.txt", f"Minutes.\n\n{FACT}")
    page.recites(FACT)
    page.ask("ask", "Which number?")
    page.answered("ask")
    page.at.reload()
    expect(page.at.locator("#drop")).to_be_visible()
    page.at.locator("#ask-talk").get_by_role("button", name="History").click()
    page.at.get_by_role("dialog", name="History").get_by_text("weir.txt: Which number?").click()
    expect(page.at.locator("#ask-talk .answer .text")).to_have_text(FACT)
    expect(page.at.locator(".reader-text")).to_contain_text(FACT)
    assert highlighted(page, "quoted") == [FACT.rstrip(".")]
    page.recites("Again.")
    page.ask("ask", "Once more?")
    expect(page.answered("ask", 2).locator(".text")).to_have_text("Again.")


def test_a_document_that_is_too_long_is_refused_in_words(visit):
    page = visit().open()
    page.drop("book.txt", FILL * 220)
    expect(page.at.locator(FACTS)).to_contain_text("17,380 of 16,383 tokens · 998 too many")
    expect(page.at.locator(f"{FACTS}.error .icon")).to_be_visible()
    expect(page.at.locator("#ask-talk .why")).to_contain_text("Longer than the model can read")
    expect(page.at.locator("#ask-talk .composer button.main").first).to_be_disabled()


def test_tokens_count_up_against_the_limit_while_a_document_loads_and_nothing_moves(visit):
    page = visit().open()
    page.drop("short.txt", "A short one.")
    said = seen(page, FACTS)
    heights = page.at.evaluate_handle("""() => {
      const heights = new Set();
      const note = () => heights.add(document.querySelector(".reader-facts").offsetHeight);
      new MutationObserver(note).observe(document.querySelector(".reader"), {
        subtree: true, childList: true, attributes: true, characterData: true });
      return heights;
    }""")
    page.drop("book.txt", FILL * 420)
    counts = [numbers(text)[0] for text in said() if "of 16,383 tokens" in text]
    assert counts == sorted(counts)
    assert {0, 8192, 16_384, 24_576, 32_768, len(FILL) * 420} <= set(counts)
    assert any("8,192 of 16,383 tokens · reading, 25 %" in text for text in said())
    assert any("24,576 of 16,383 tokens · 8,194 too many already" in text for text in said())
    assert page.at.evaluate("heights => heights.size", heights) == 1


def test_a_pdf_is_read_page_by_page_and_asked_about(visit):
    page = visit().open()
    said = seen(page, FACTS)
    pages = ["Minutes of the river board.", FILL.strip(), FACT, "Nothing more was said."]
    page.drop("minutes.pdf", text_pdf(pages))
    length = len("\n\n".join(pages))
    expect(page.at.locator(FACTS)).to_have_text(f"{length} of 16,383 tokens · {length} characters")
    expect(page.at.locator(".reader-text")).to_contain_text(FACT)
    for number in (1, 2, 3, 4):
        assert any(f"reading, page {number} of 4" in text for text in said()), said()
    page.says(FACT)
    page.ask("ask", "What is the number?")
    quote = page.answered("ask").locator("button.quote")
    expect(quote).to_contain_text("page 3")
    quote.click()
    assert highlighted(page, "shown") == [FACT.rstrip(".")]


def test_the_former_document_stays_when_another_one_cannot_be_read(visit):
    page = visit().open()
    damaged = {"mimeType": "application/pdf", "buffer": b"%PDF-1.7 nothing"}
    page.at.set_input_files("#drop-file", {"name": "picture.pdf", **damaged})
    expect(page.at.locator("#drop-problem")).to_contain_text("picture.pdf: the document cannot")
    expect(page.at.locator("#drop")).to_be_visible()

    page.drop("weir.txt", FACT)
    expect(page.at.locator("#reader .error")).to_be_empty()
    page.recites(FACT)
    page.ask("ask", "Which number?")
    page.answered("ask")
    page.drop("other.pdf", b"%PDF-1.7 nothing")
    expect(page.at.locator("#reader .reader-facts .error")).to_contain_text("other.pdf: the docum")
    expect(page.at.locator(".reader-name")).to_have_text("weir.txt")
    expect(page.at.locator(FACTS)).to_contain_text(f"{len(FACT)} of 16,383 tokens")
    expect(page.at.locator(".reader-text")).to_have_text(FACT)
    assert highlighted(page, "quoted") == [FACT.rstrip(".")]
    page.ask("ask", "Once more?")
    expect(page.answered("ask", 2).locator(".text")).to_have_text(FACT)


def test_reading_a_file_can_be_stopped(visit):
    page = visit().open()
    page.drop("weir.txt", FACT)
    page.at.route("**/ui/api/documents*", lambda route: None)  # which is never answered
    page.let_fall("slow.txt", "never")
    expect(page.at.locator(".reader-name")).to_have_text("slow.txt")
    expect(page.at.locator("#ask-talk .why")).to_have_text("The document is being read.")
    page.at.get_by_role("button", name="Stop reading this file").click()
    page.is_read()
    expect(page.at.locator(".reader-name")).to_have_text("weir.txt")
    expect(page.at.locator("#ask-talk .why")).to_be_empty()
    page.at.get_by_role("button", name="Put this document away").click()
    expect(page.at.locator("#drop")).to_be_visible()


def test_a_prompt_of_more_bytes_than_the_server_takes_is_refused_before_it_is_sent(visit):
    page = visit()
    page.at.route("**/ui/api/session", with_payload_limit(2000))
    page.open()
    page.drop("weir.txt", "word " * 100)
    expect(page.at.locator("#ask-talk .why")).to_be_empty()
    page.ask("ask", "Which number? " * 40)
    answer = page.answered("ask").locator(".status.error")
    expect(answer).to_contain_text("bytes is more than the 2,000 that the server takes")
    expect(answer).to_contain_text("--payload-limit 100000")
    page.drop("long.txt", "word " * 200)
    expect(page.at.locator("#ask-talk .why")).to_contain_text("more than the 2,000")
    page.tab("Complete")
    page.at.get_by_label("Text to go on from").fill("word " * 500)
    page.at.get_by_role("button", name="Go on").click()
    expect(page.at.locator("#complete-status")).to_contain_text("2,500 bytes is more than")
    assert page.sent == []


def with_payload_limit(most: int):
    def change(route) -> None:
        told = route.fetch().json()
        told["limits"]["payload_bytes"] = most
        route.fulfill(json=told)

    return change


def test_html_is_read_as_text_and_nothing_in_it_happens(visit):
    page = visit().open()
    page.drop("page.html", "<title>Weir</title><script>document.title='ran'</script>"
              "<p>Herons &amp; eels <img src=x onerror=\"document.title='ran'\"></p>")  # fmt: skip
    expect(page.at.locator(".reader-text")).to_contain_text("Herons & eels")
    page.drop("raw.txt", "<img src=x onerror=\"document.title='ran'\"><b>bold</b>")
    expect(page.at.locator(".reader-text")).to_contain_text("<b>bold</b>")
    assert page.at.locator(".reader-text img, .reader-text b").count() == 0
    assert "ran" not in page.at.title()


@pytest.mark.parametrize("kind", ["JSON", "Markdown"])
def test_a_conversation_is_exported(visit, kind, tmp_path: Path):
    page = visit().open()
    page.drop("weir.txt", FACT)
    page.recites("It is **48213**.")
    page.ask("ask", "Which number?")
    page.answered("ask")
    page.at.locator("#ask-talk .menu summary").click()
    with page.at.expect_download() as saved:
        page.at.locator("#ask-talk").get_by_role("button", name=kind).click()
    text = Path(saved.value.path()).read_text()
    if kind == "Markdown":
        assert saved.value.suggested_filename.endswith(".md")
        assert "## Question\n\nWhich number?" in text
        assert "It is **48213**." in text
    else:
        exported = json.loads(text)
        assert exported["document"]["text"] == FACT
        assert [turn["text"] for turn in exported["turns"]] == ["Which number?", "It is **48213**."]


def test_on_a_narrow_screen_a_quotation_leads_to_the_document_and_back(visit):
    page = visit(width=360).open()
    page.drop("weir.txt", LONG)
    expect(page.at.locator(".reader-text")).to_be_hidden()
    page.recites(FACT)
    page.ask("ask", "Which number?")
    quote = page.answered("ask").locator("button.quote")
    quote.click()
    expect(page.at.locator(".reader-text")).to_be_in_viewport()
    page.at.get_by_role("button", name="Back to the answer").click()
    expect(quote).to_be_focused()
    expect(quote).to_be_in_viewport()


def highlighted(page, name: str) -> list[str]:
    return page.at.evaluate(
        "name => [...(CSS.highlights.get(name) ?? [])].map((range) => range.toString())", name
    )


def seen(page, selector: str):
    """What the elements say from now on: a function that gives all of it so far."""
    page.at.evaluate(
        """selector => {
          window.seen = [];
          new MutationObserver(() => {
            const shown = [...document.querySelectorAll(selector)];
            window.seen.push(...shown.map((one) => one.textContent));
          }).observe(document.body, { subtree: true, childList: true, characterData: true });
        }""",
        selector,
    )
    return lambda: page.at.evaluate("() => window.seen")


def numbers(text: str) -> list[int]:
    return [int(found.replace(",", "")) for found in re.findall(r"\d[\d,]*", text)]
