"""Model: download from a Hub, plan, load, switch; what needs the admin key asks for it."""

from collections.abc import Iterator

import pytest
from browser_server import Served, serving
from playwright.sync_api import expect

LOADED = "#loaded .model-name"


@pytest.fixture
def changed(meadow, brook) -> Iterator[Served]:
    """A server that is left with another model than it began with."""
    with serving(meadow, brook) as one:
        yield one


@pytest.mark.slow
def test_a_model_is_downloaded_planned_loaded_and_asked(visit, changed):
    hub = changed.hub
    size = len(hub.repos["nest/brook"]["model.safetensors"])
    hub.cut_after["model.safetensors"] = [size // 2]
    hub.stalled.set()

    page = visit(url=changed.url).open("model")
    expect(page.at.locator(LOADED)).to_have_text("meadow")
    page.at.get_by_label("Name of a model").fill("nest/brook")
    page.at.get_by_role("button", name="Download", exact=True).click()
    download = page.at.locator("#downloads li")
    expect(download).to_contain_text("of 1")  # bytes of more than a hundred thousand
    download.get_by_role("button", name="Cancel the download of nest/brook").click()
    expect(download).to_contain_text("what arrived is kept")
    hub.stalled.clear()
    hub.release.set()
    download.get_by_role("button", name="Resume").click()
    expect(download.first).to_contain_text("are here")

    entry = page.at.locator("#models > li", has_text="brook")
    expect(entry).to_contain_text("16k context")
    entry.get_by_role("button", name="Load: nest/brook").click()
    form = page.at.get_by_role("form", name="How to load nest/brook")
    verdict = form.locator(".plan-verdict")
    expect(verdict).to_contain_text("Takes ")
    form.get_by_label("Context, tokens").fill("2k")
    expect(form.locator(".plan-legend")).to_contain_text("2,048 tokens")
    form.get_by_label("RoPE method").select_option("linear")
    form.get_by_label("RoPE factor").fill("2")
    form.get_by_role("button", name="Load this model").click()
    expect(page.at.locator("#model-chip")).to_have_attribute("data-status", "starting")
    expect(page.at.locator(LOADED)).to_have_text("nest/brook")
    expect(page.at.locator("#loaded")).to_contain_text("2,048 tokens")
    expect(page.at.locator("#loaded")).to_contain_text("linear")
    expect(page.at.locator("#loaded")).to_contain_text("the model's own")

    page.tab("Chat")
    page.says("I am the brook.")
    page.ask("chat", "Who are you?")
    expect(page.answered("chat").locator(".text")).to_have_text("I am the brook.")


def test_a_plan_that_does_not_fit_says_so(visit):
    page = visit().open("model")
    page.at.get_by_role("button", name="Load otherwise: meadow").click()
    form = page.at.get_by_role("form", name="How to load meadow")
    form.get_by_label("Memory at most").fill("1MiB")
    expect(form.locator(".plan-verdict.error")).to_contain_text("Does not fit")
    form.get_by_label("Memory at most").fill("much")
    expect(form.locator(".plan .error")).not_to_be_empty()


def test_a_name_that_is_none_is_refused_in_words(visit):
    page = visit().open("model")
    page.at.get_by_label("Name of a model").fill("../etc")
    page.at.get_by_role("button", name="Download", exact=True).click()
    expect(page.at.locator("#download-problem")).not_to_be_empty()


def test_the_admin_key_is_asked_for_once(visit):
    page = visit()
    keys = []

    def guarded(route):
        keys.append(route.request.headers.get("x-admin-key"))
        if keys[-1] == "open sesame":
            route.continue_()
        else:
            route.fulfill(status=403, json={"error": "an admin key", "error_type": "admin_key"})

    page.at.route("**/ui/api/models*", guarded)
    page.open("model")
    dialog = page.at.get_by_role("dialog", name="Admin key")
    dialog.get_by_label("Key").fill("open sesame")
    dialog.get_by_role("button", name="Use this key").click()
    expect(page.at.locator("#models")).to_contain_text("meadow")
    page.at.get_by_role("button", name="Look again").click()
    expect(page.at.locator("#models")).to_contain_text("meadow")
    assert keys[0] is None
    assert set(keys[1:]) == {"open sesame"}
