"""Chat: Markdown that is safe and stays in its place, and what can be done with a turn."""

from playwright.sync_api import expect

HOSTILE = """<script>document.title='ran'</script>

a <img src=x onerror="document.title='ran'"> b

[a link](javascript:ran) ![a picture](https://evil.example/p.png)
"""
RICH = """# Plan

1. *Read* it
2. `grep`

```
find(words)
```

| a | b |
|---|---|
| 1 | 2 |
"""


def test_markdown_is_shown_as_such(visit):
    page = visit().open("chat")
    page.recites(RICH)
    page.ask("chat", "How?")
    text = page.answered("chat").locator(".text")
    expect(text.locator("h1")).to_have_text("Plan")
    expect(text.locator("ol li em")).to_have_text("Read")
    expect(text.locator("pre code")).to_have_text("find(words)\n")
    expect(text.locator("td").first).to_have_text("1")
    text.get_by_role("button", name="Copy this code").click()
    assert page.at.evaluate("() => navigator.clipboard.readText()") == "find(words)\n"


def test_hostile_markdown_in_an_answer_stays_inert(visit):
    page = visit().open("chat")
    asked_elsewhere = []
    page.at.on("request", lambda request: asked_elsewhere.append(request.url))
    page.recites(HOSTILE)
    page.ask("chat", "Try <b>me</b>")
    text = page.answered("chat").locator(".text")
    expect(text).to_contain_text("<script>document.title='ran'</script>")
    expect(text).to_contain_text("a link")
    assert text.locator("script, img, [onerror], [style], [id], [href^=javascript]").count() == 0
    picture = text.get_by_role("link", name="a picture")
    expect(picture).to_have_attribute("rel", "noopener noreferrer nofollow")
    expect(page.at.locator("#chat-talk .question .text")).to_have_text("Try <b>me</b>")
    assert "ran" not in page.at.title()
    assert [url for url in asked_elsewhere if not url.startswith(page.url)] == []


def test_nothing_moves_while_an_answer_streams(visit):
    page = visit().open("chat")
    page.at.evaluate("""() => {
      window.moved = 0;
      new PerformanceObserver((list) => {
        const own = list.getEntries().filter((entry) => !entry.hadRecentInput);
        for (const entry of own) window.moved += entry.value;
      }).observe({ type: "layout-shift" });
    }""")
    page.says("1. *Read* it\n2. `grep`\n\n```\nfind()\n```\n\nDone.")
    page.ask("chat", "How?")
    page.answered("chat")
    assert page.at.evaluate("() => window.moved") < 0.01


def test_a_question_is_edited_and_an_answer_given_again(visit):
    page = visit().open("chat")
    page.recites("One.")
    page.ask("chat", "First?")
    page.answered("chat")
    page.recites("Two.")
    page.at.get_by_role("button", name="Answer again").click()
    expect(page.at.locator("#chat-talk .answer .text")).to_have_text("Two.")
    page.answered("chat")

    page.recites("Three.")
    page.at.locator("#chat-talk .question").hover()
    page.at.get_by_role("button", name="Edit this question").click()
    box = page.at.get_by_role("textbox", name="Edit the question")
    expect(box).to_have_value("First?")
    box.fill("Second?")
    box.press("Enter")
    expect(page.answered("chat").locator(".text")).to_have_text("Three.")
    assert page.at.locator("#chat-talk .turn").count() == 2
    expect(page.at.locator("#chat-talk .question .text")).to_have_text("Second?")
    page.at.get_by_role("button", name="Copy the answer").click()
    assert page.at.evaluate("() => navigator.clipboard.readText()") == "Three."


def test_a_conversation_can_be_deleted_for_good(visit):
    page = visit().open("chat")
    page.recites("One.")
    page.ask("chat", "First?")
    page.answered("chat")
    history = page.at.get_by_role("dialog", name="History")
    page.at.locator("#chat-talk").get_by_role("button", name="History").click()
    history.get_by_role("button", name="Delete “First?”").click()
    expect(history.get_by_text("There is none yet.")).to_be_visible()
    page.at.reload()
    page.at.locator("#chat-talk").get_by_role("button", name="History").click()
    expect(history.get_by_text("There is none yet.")).to_be_visible()


def test_parameters_go_into_requests_and_outlast_a_reload(visit):
    page = visit().open("chat")
    page.recites("Yes.")
    page.at.get_by_role("button", name="Parameters", exact=True).click()
    panel = page.at.get_by_role("dialog", name="Parameters")
    expect(panel.get_by_label("Preset", exact=True)).to_have_value("Exact")
    panel.get_by_label("Preset", exact=True).select_option("Balanced")
    panel.get_by_label("Top-k", exact=True).fill("40")
    panel.get_by_label("Typical-p", exact=True).fill("0.95")
    panel.get_by_label("Max new tokens", exact=True).fill("77")
    panel.get_by_label("Seed").fill("5")
    panel.get_by_label("Stop", exact=True).fill("### Instruction\n\\n\\n")
    panel.get_by_label("Prompt template").select_option("plain")
    panel.get_by_label("Prompt template").press("Escape")
    page.ask("chat", "How?")
    page.answered("chat")
    sent = page.sent[-1]
    wanted = {
        "temperature": 0.7, "top_p": 0.9, "top_k": 40, "typical_p": 0.95, "max_tokens": 77,
        "repetition_penalty": 1.05, "seed": 5, "stop": ["### Instruction", "\n\n"],
    }  # fmt: skip
    assert {name: sent[name] for name in wanted} == wanted
    assert len(sent["prompt"]) == len("How?")  # plain: the question and nothing else
    page.at.reload()
    page.open("chat")
    if not panel.is_visible():
        page.at.get_by_role("button", name="Parameters", exact=True).click()
    expect(panel.get_by_label("Preset", exact=True)).to_have_value("")
    expect(panel.get_by_label("Top-k", exact=True)).to_have_value("40")


def test_an_adapter_is_chosen_where_the_server_has_some(visit):
    page = visit()
    names = {"object": "list", "data": [{"id": "meadow"}, {"id": "minutes"}]}
    page.at.route("**/v1/models", lambda route: route.fulfill(json=names))
    page.open("chat")
    page.recites("Yes.")
    page.at.get_by_role("button", name="Parameters", exact=True).click()
    panel = page.at.get_by_role("dialog", name="Parameters")
    panel.get_by_label("Adapter").select_option("minutes")
    page.ask("chat", "How?")
    page.answered("chat")
    assert page.sent[-1]["model"] == "minutes"
    panel.get_by_label("Adapter").select_option("None: meadow")
    page.ask("chat", "And now?")
    page.answered("chat", 2)
    assert "model" not in page.sent[-1]

    page.at.unroute("**/v1/models")
    page.at.reload()
    page.open("chat")
    expect(page.at.locator("#p-template")).to_be_visible()
    expect(page.at.locator("#p-adapter")).to_be_hidden()


def test_own_presets_are_kept(visit):
    page = visit().open("chat")
    page.at.get_by_role("button", name="Parameters", exact=True).click()
    panel = page.at.get_by_role("dialog", name="Parameters")
    panel.get_by_label("Temperature", exact=True).fill("0.3")
    panel.get_by_role("button", name="Save as").click()
    panel.get_by_label("Name of the preset").fill("Mine")
    panel.get_by_label("Name of the preset").press("Enter")
    expect(panel.get_by_label("Preset", exact=True)).to_have_value("Mine")
    panel.get_by_label("Preset", exact=True).select_option("Exact")
    expect(panel.get_by_label("Temperature", exact=True)).to_have_value("0")
    panel.get_by_label("Preset", exact=True).select_option("Mine")
    expect(panel.get_by_label("Temperature", exact=True)).to_have_value("0.3")
    panel.get_by_role("button", name="Delete").click()
    expect(panel.get_by_label("Preset", exact=True)).to_have_value("")


def test_a_refusal_is_said_where_the_answer_would_be(visit):
    page = visit().open("chat")
    page.at.unroute("**/v1/completions")
    page.at.route(
        "**/v1/completions",
        lambda route: route.fulfill(
            status=503, json={"error": {"message": "the engine is dead", "type": "x", "code": None}}
        ),
    )
    page.ask("chat", "Anyone?")
    answer = page.answered("chat")
    expect(answer.locator(".status.error")).to_contain_text("the engine is dead")
    expect(answer.get_by_role("button", name="Answer again")).to_be_visible()
