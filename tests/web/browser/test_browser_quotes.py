"""What of an answer stands in the document: `quotes.js` as a pure function, in the browser."""

from pathlib import Path

import pytest

from longwing import web

DOC = (
    "The board met in March. A gate was priced at 61 pounds and 4 shillings by the foundry.\n\n"
    "Mrs Hale withdrew. The board met in March again; box 48213 is to be\nchanged once a year"
)
FIND = """async ([answer, text]) => {
  const { indexed, quotesIn } = await import("/ui/quotes.js");
  return quotesIn(answer, indexed(text)).map(({ start, stop }) => text.slice(start, stop));
}"""


STATIC = Path(web.__file__).parent / "static"


@pytest.fixture(scope="module")
def quotes(chromium):
    """The module needs no server: a file is one as it lies."""
    page = chromium().new_page()
    page.route("http://page.test/", lambda route: route.fulfill(body="", content_type="text/html"))
    page.route(
        "http://page.test/ui/*",
        lambda route: route.fulfill(path=STATIC / route.request.url.rpartition("/")[2]),
    )
    page.goto("http://page.test/")
    yield lambda answer, text=DOC: page.evaluate(FIND, [answer, text])
    page.close()


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("It says: priced at 61 POUNDS, and 4 shillings.", ["priced at 61 pounds and 4 shillings"]),
        ("He said “the foundry”, no more.", ["the foundry"]),
        ("the foundry", []),
        ("The box is 48213.", ["48213"]),
        ("Box 61.", []),
        # Over a line's end, but not over a sentence's.
        ("is to be changed once a year", ["is to be\nchanged once a year"]),
        ("4 shillings by the foundry Mrs Hale withdrew", ["4 shillings by the foundry"]),
        # Twice in the answer, once found; nothing at all; the last word of both.
        ("48213 and 48213", ["48213"]),
        ("", []),
        ("year", []),
        ("Nothing of the kind was said by anyone at any time.", []),
    ],
)
def test_a_quotation_is_found(quotes, answer, found):
    assert quotes(answer) == found


def test_words_of_languages_without_spaces_are_found(quotes):
    assert quotes("他说看到了一只鸟。", "昨天看到了一只鸟。它飞走了。") == ["看到了一只鸟"]


def test_an_empty_document_holds_nothing(quotes):
    assert quotes("Five words in a row", "") == []
