"""For everyone: axe-core finds no serious fault, and the keyboard is enough.

vendor/axe.min.js is axe-core 4.14.1 (MPL-2.0), unchanged, for these tests alone.
"""

from pathlib import Path

import pytest
from playwright.sync_api import expect

AXE = Path(__file__).parent / "vendor" / "axe.min.js"
TABS = ["ask", "chat", "complete", "model", "evaluation", "server"]
DRAWN = {
    **dict.fromkeys(("ask", "chat", "complete"), "() => true"),
    "model": "() => document.querySelector('#models > li')",
    "evaluation": "() => document.querySelector('#eval-tasks input')",
    "server": "() => document.querySelectorAll('.chart canvas').length === 4",
}
"""When what the tab asks the server for is there."""
FAULTS = """async () => {
  const found = await axe.run(document, { resultTypes: ["violations"] });
  const bad = found.violations.filter((one) => ["serious", "critical"].includes(one.impact));
  return bad.flatMap((one) => one.nodes.map((node) =>
    `${one.id}: ${node.target.join(" ")}: ${node.failureSummary}`));
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1440])
def test_no_view_has_a_serious_fault_or_is_wider_than_the_screen(visit, width, theme):
    page = visit(width, theme).open()
    page.drop("weir.txt", "Minutes of the river board.\n\nThe number of the box is 48213.")
    page.recites("# It is\n\n`48213`:\n\n- the number of the box is 48213")
    page.ask("ask", "Which number?")
    page.answered("ask").locator("button.quote").first.click()
    page.at.evaluate(AXE.read_text())
    found = {}
    for tab in TABS:
        page.at.locator(f"#tab-{tab}").click()
        page.at.wait_for_function(DRAWN[tab])
        if tab == "model":
            page.at.get_by_role("button", name="Load otherwise: meadow").click()
            expect(page.at.locator(".plan-verdict")).to_be_visible()
        faults = page.at.evaluate(FAULTS)
        if page.at.evaluate("() => document.documentElement.scrollWidth > innerWidth"):
            faults.append("it scrolls sideways")
        if faults:
            found[tab] = faults
    page.at.locator("#tab-chat").click()
    page.at.get_by_role("button", name="Parameters", exact=True).click()
    if faults := page.at.evaluate(FAULTS):
        found["parameters"] = faults
    assert found == {}


def test_the_keyboard_is_enough(visit):
    page = visit().open()
    keys = page.at.keyboard
    keys.press("Shift+Tab")  # the page opens with the focus in the field
    page.at.locator("body").evaluate("() => document.activeElement.blur()")
    page.at.locator(".skip").focus()
    expect(page.at.locator(".skip")).to_be_in_viewport()
    page.at.get_by_role("tab", name="Ask").focus()
    keys.press("ArrowRight")
    expect(page.at.get_by_role("tab", name="Chat")).to_be_focused()
    expect(page.at.get_by_role("tab", name="Chat")).to_have_attribute("aria-selected", "true")
    expect(page.at.get_by_role("tabpanel", name="Chat")).to_be_visible()
    keys.press("End")
    expect(page.at.get_by_role("tabpanel", name="Server")).to_be_visible()
    keys.press("Home")
    expect(page.at.get_by_role("tabpanel", name="Ask")).to_be_visible()

    page.at.get_by_role("button", name="Paste text").press("Enter")
    keys.type("The number of the box is 48213.")
    keys.press("Tab")
    keys.press("Tab")
    keys.press("Enter")
    expect(page.at.locator("#reader")).to_be_visible()
    expect(page.at.get_by_role("textbox", name="Ask about the document")).to_be_focused()
    page.recites("The number of the box is 48213.")
    keys.type("Which?")
    keys.press("Enter")
    page.answered("ask")
    expect(page.at.get_by_role("textbox", name="Ask about the document")).to_be_focused()
    expect(page.at.locator("#announcer")).to_contain_text("48213")
    page.at.locator("button.quote").focus()
    keys.press("Enter")
    expect(page.at.locator("#announcer")).to_contain_text("Shown in the document")


def test_the_theme_is_the_browsers_until_it_is_chosen(visit):
    page = visit(theme="dark").open()
    paper = "() => getComputedStyle(document.body).backgroundColor"
    dark = page.at.evaluate(paper)
    page.at.get_by_role("button", name="Change to light colours").click()
    light = page.at.evaluate(paper)
    assert dark != light
    page.at.reload()
    assert page.at.evaluate(paper) == light
    page.at.get_by_role("button", name="Change to dark colours").click()
    assert page.at.evaluate(paper) == dark
    page.at.emulate_media(color_scheme="light")
    assert page.at.evaluate(paper) == light
