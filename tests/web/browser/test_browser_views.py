"""Complete, Evaluation and Server: token by token, case by case, second by second."""

import json
import re

from playwright.sync_api import expect

CASE = {
    "kind": "case", "task": "passkey", "source": "generated", "unit": "tokens", "size": 400,
    "index": 0, "sha256": "", "expected": ["1"], "answer": "1",
    "prompt_tokens": 400, "seconds": 1.0,
}  # fmt: skip
EARLIER = [
    {
        "kind": "run", "model": {"name": "heron"}, "begun": "2026-01-01T00:00:00Z",
        "plan": {"tasks": ["passkey"], "lengths": [400], "depths": [0, 1]},
    },
    {**CASE, "depth": 0.0, "correct": True, "score": 1.0},
    {**CASE, "depth": 1.0, "correct": False, "score": 0.0},
]  # fmt: skip
"""A run of another day, as `longwing eval` writes it."""


def test_each_token_shows_what_else_it_might_have_been(visit):
    page = visit().open("complete")
    prompt = page.at.get_by_label("Text to go on from")
    prompt.fill("Once ")
    page.says("upon é time")
    page.at.get_by_role("button", name="Go on").click()
    tokens = page.at.get_by_role("listbox")
    expect(page.at.get_by_role("button", name="Move into the text")).to_be_visible(timeout=60_000)
    expect(tokens).to_have_text("upon é time")
    assert tokens.get_by_role("option").count() == len("upon é time".encode())
    assert page.sent[0]["prompt"] == "Once "
    assert page.sent[0]["logprobs"] == 5

    tokens.get_by_role("option").nth(2).hover()
    card = page.at.get_by_role("group", name="Alternatives")
    expect(card.locator(".card-head")).to_have_text(re.compile(r"^o [\d<. ]+%$"))
    assert card.get_by_role("button").count() in (5, 6)  # the likeliest, and the token itself

    tokens.focus()
    tokens.press("Home")
    tokens.press("ArrowRight")
    expect(tokens).to_have_attribute("aria-activedescendant", "token-1")
    tokens.press("Enter")
    page.says("!")
    chosen = card.get_by_role("button").and_(page.at.locator(":enabled")).last
    text = chosen.locator("code").inner_text()
    chosen.click()
    expect(page.at.locator("#complete-status")).to_contain_text("1 tokens in")
    assert page.sent[1]["prompt"].startswith("Once u")
    expect(page.at.locator(".token.forced")).to_have_text(text)

    page.at.get_by_role("button", name="Move into the text").click()
    expect(prompt).to_have_value(re.compile(r"^Once u.!$"))


def test_an_evaluation_fills_its_map_and_runs_are_compared(visit, served):
    earlier = served.runs_dir / "earlier.jsonl"
    earlier.write_text("".join(f"{json.dumps(record)}\n" for record in EARLIER))
    page = visit().open("evaluation")
    expect(page.at.locator(".heat td.scored")).to_have_text(["100", "0"])
    page.at.get_by_label("Lengths, in tokens").fill("400, 1k, 17000")
    page.at.get_by_label("Depths in the document, in %").fill("0, 50, 100")
    page.at.get_by_label("Cases a length").fill("3")
    page.at.get_by_role("button", name="Begin").click()
    table = page.at.locator(".heat").first
    expect(table.locator("caption")).to_have_text("passkey")
    expect(table.locator("tbody th")).to_have_text(["0 %", "50 %", "100 %"])
    expect(table.locator("thead th")).to_have_text(["Depth", "400", "1k", "17,000"])
    expect(table.locator("td.scored")).to_have_count(6)
    expect(table.locator("td.too-long")).to_have_count(3)
    runs = page.at.locator("#eval-runs > li")
    own = runs.filter(has_text="meadow")
    expect(own).to_contain_text("9 cases")
    expect(own.get_by_role("button", name=re.compile("Delete the run"))).to_be_visible()

    runs.filter(has_text="heron").get_by_role("checkbox").check()
    expect(page.at.get_by_role("heading", name="Side by side")).to_be_visible()
    expect(page.at.locator(".heat")).to_have_count(2)
    with page.at.expect_popup() as opened:
        page.at.get_by_role("button", name="Full report of these 2").click()
    expect(opened.value.locator("h1")).to_be_visible()


def test_the_server_is_drawn_from_its_metrics(visit):
    page = visit()
    page.at.clock.install()
    page.open("server")
    expect(page.at.locator(".chart canvas")).to_have_count(4)
    page.at.clock.fast_forward(5000)  # rates are known from the second reading on
    words = page.at.locator(".chart-now")
    expect(words.nth(0)).to_have_text(re.compile(r"\d+ running, \d+ queued"))
    expect(words.nth(1)).to_have_text(re.compile(r"[\d.,]+ written, [\d.,]+ read"))
    expect(words.nth(2)).to_have_text(re.compile(r"[\d,]+ used, [\d,]+ kept, of [\d,]+"))
    expect(page.at.locator(".tile")).to_have_count(6)
    page.at.get_by_role("button", name="Change to dark colours").click()
    expect(page.at.locator(".chart canvas")).to_have_count(4)


def test_rates_are_differences_and_a_new_engine_counts_from_zero(visit):
    page = visit().open("chat")
    rates = page.at.evaluate("""async () => {
      const { sampleOf } = await import("/ui/server.js");
      const at = (generated) => new Map([["longwing_generated_tokens_total", generated]]);
      const earlier = { metrics: at(100), now: 10 };
      return [sampleOf(at(150), earlier, 12).written, sampleOf(at(5), earlier, 12).written,
              sampleOf(at(5), null, 12).written];
    }""")
    assert rates == [25, 0, None]
