"""The server's page in a real browser, at phone and desktop width, light and dark."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from serving import RunningServer, ServerProcess, nginx_before, serving, serving_here, wait_until

from kiem.inference.loading import load_for_inference

WAIT_MS = 60_000
KEY = "een-sleutel-van-lengte"
# Relative luminance and contrast as WCAG 2.2 defines them, of an element on what lies behind it.
CONTRAST = """element => {
  const channels = color => [...color.match(/[\\d.]+/g).map(Number), 1].slice(0, 4);
  const luminance = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const layers = [];
  for (let e = element; layers.at(-1)?.[3] !== 1; e = e.parentElement) {
    layers.push(channels(getComputedStyle(e).backgroundColor));
  }
  const behind = layers.reduceRight((below, [r, g, b, alpha]) =>
    [r, g, b].map((c, i) => alpha * c + (1 - alpha) * below[i]), [0, 0, 0]);
  const light = [channels(getComputedStyle(element).color), behind]
    .map(luminance).sort((a, b) => b - a);
  return (light[0] + 0.05) / (light[1] + 0.05);
}"""


# Debian's: the driver's own browsers are not in any package registry.
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    MESSAGE = "Chromium is not there; install it with: apt-get install chromium"
    if os.environ.get("CI"):
        pytest.fail(MESSAGE, pytrace=False)
    pytest.skip(MESSAGE, allow_module_level=True)  # one line, not one for each test


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=WAIT_MS)
    with sync_playwright() as driver:
        made = driver.chromium.launch(executable_path=CHROMIUM)
        yield made
        made.close()


@pytest.fixture(scope="module")
def server(trained_run: Path) -> Iterator[ServerProcess]:
    with serving(trained_run / "final_model", "--stop", "\nEinde:") as running:
        yield running


@pytest.fixture
def page(browser: Browser, server: ServerProcess) -> Iterator[Page]:
    """The page in Dutch; fails at errors in its script and at requests to anywhere else."""
    yield from open_page(browser, server, locale="nl-NL")


def open_page(browser: Browser, server: RunningServer, **options: Any) -> Iterator[Page]:
    context = browser.new_context(**options)
    context.set_default_timeout(WAIT_MS)
    opened = context.new_page()
    wrong: list[str] = []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda message: wrong.append(message.text))
    opened.on("dialog", lambda dialog: wrong.append(dialog.message))
    opened.on(
        "request",
        lambda asked: None if asked.url.startswith(server.url) else wrong.append(asked.url),
    )
    opened.goto(server.url)
    yield opened
    context.close()
    # A refused request is no mistake of the page.
    assert [text for text in wrong if not text.startswith("Failed to load resource")] == []


def write(page: Page, prompt: str, **values: str) -> None:
    """Fills in the form and lets the model write to the end."""
    for name, value in {"prompt": prompt, "max_tokens": "20", "seed": "3", **values}.items():
        page.locator(f"#{name}").fill(value)
    page.keyboard.press("Control+Enter")
    expect(page.locator("#status")).to_contain_text("(")


def test_writing_and_probabilities(page: Page, server: ServerProcess) -> None:
    write(page, "De <b>stad</b> & ")
    asked = {"prompt": "De <b>stad</b> & ", "seed": 3, "max_tokens": 20, "logprobs": 5}
    _, answer = server.complete(**asked)
    choice = answer["choices"][0]
    assert page.locator("#result").inner_text() == "De <b>stad</b> & " + choice["text"]
    number = answer["usage"]["completion_tokens"]
    reason = {"length": "maximum bereikt", "stop": "einde van de tekst"}[choice["finish_reason"]]
    status = page.locator("#status").inner_text()
    assert re.fullmatch(rf"{number} tokens, [\d.]+,\d tokens/s \({reason}\)", status)
    page.locator(".token").first.hover()
    details = page.locator("#details")
    expect(details).to_be_visible()
    told = choice["logprobs"]
    rows = details.locator("table").last.locator("tr")
    assert rows.count() >= 5
    top = sorted(told["top_logprobs"][0].values(), reverse=True)
    shown = [float(text.rstrip("\u2009%").replace(",", ".")) for text in
             (row.locator("td").last.inner_text() for row in rows.all()[:5])]  # fmt: skip
    assert shown == sorted(shown, reverse=True)
    if choice["text"].startswith(told["tokens"][0]):  # no byte tokens before it
        assert shown == pytest.approx([100 * 2.718281828**value for value in top], abs=0.06)


def test_stopping_frees_the_slot(page: Page, server: ServerProcess) -> None:
    page.locator("#prompt").fill("De")
    page.locator("#temperature").fill("0")
    # Longer than the page offers, so that the text does not end first on a busy machine.
    page.locator("#max_tokens").evaluate("input => { input.max = input.value = 4000; }")
    stop = page.get_by_role("button", name="Stop")
    expect(stop).to_be_disabled()
    page.get_by_role("button", name="Schrijf verder").click()
    page.locator(".token").first.wait_for()
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_contain_text("(gestopt)")
    expect(stop).to_be_disabled()
    expect(page.get_by_role("button", name="Schrijf verder")).to_be_enabled()
    wait_until(lambda: server.metric("kiem_sequences_running") == 0)


def test_keyboard_alone(page: Page) -> None:
    expect(page.locator("#prompt")).to_be_focused()
    write(page, "Het water")
    page.locator("#prompt").focus()
    for _ in range(3):  # two buttons that can be pressed, and then the result
        page.keyboard.press("Tab")
    expect(page.locator("#result")).to_be_focused()
    details = page.locator("#details")
    expect(details).to_be_hidden()
    page.keyboard.press("ArrowRight")
    expect(details).to_be_visible()
    first = details.inner_text()
    page.set_viewport_size({"width": 1280, "height": 250})  # so that the end has to come into view
    page.keyboard.press("End")
    assert details.inner_text() != first
    page.evaluate("() => new Promise(done => setTimeout(done, 200))")  # scrolling is told later
    expect(details).to_be_visible()
    expect(page.locator(".token").last).to_have_class("token chosen")
    page.keyboard.press("Escape")
    expect(details).to_be_hidden()


def test_everything_has_a_name_in_both_languages(page: Page) -> None:
    dutch = page.locator("body").aria_snapshot()
    for role in ("slider", "textbox", "spinbutton", "button", "checkbox"):
        assert not re.search(rf"- {role}(?! \")", dutch), dutch
    for name in ("Temperatuur", "Straf voor herhaling", "Maximaal aantal nieuwe tokens"):
        assert f'- slider "{name}"' in dutch
    page.get_by_role("button", name="English").click()
    english = page.locator("body").aria_snapshot()
    for name in ("Temperature", "Repetition penalty", "Most new tokens"):
        assert f'- slider "{name}"' in english
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.locator("#seed").get_attribute("placeholder") == "random"
    write(page, "Het water")
    assert re.search(r"tokens, [\d,]+\.\d tokens/s", page.locator("#status").inner_text())
    page.reload()
    expect(page.get_by_role("button", name="Nederlands")).to_be_visible()  # it is remembered
    page.get_by_role("button", name="Nederlands").click()
    assert page.locator("body").aria_snapshot() == dutch


def test_what_the_server_was_started_with_is_there(page: Page) -> None:
    assert page.locator("#temperature").input_value() == "0.8"
    assert page.locator("output[for=temperature]").inner_text() == "0,80"
    assert page.locator("#stop_text").input_value() == "\\nEinde:"
    assert page.title() == "short · kiem"


def test_a_question(page: Page) -> None:
    page.locator("#prompt").fill("Wat is water?")
    page.get_by_role("button", name="Maak er een vraag van").click()
    assert page.locator("#prompt").input_value() == "Vraag: Wat is water?\nAntwoord:"
    assert page.locator("#stop_text").input_value() == "\\nVraag:"
    write(page, page.locator("#prompt").input_value())
    page.get_by_role("button", name="Verder met deze tekst").click()
    assert page.locator("#prompt").input_value() == page.locator("#result").inner_text()


def test_refusals_are_told(page: Page) -> None:
    page.locator("#prompt").fill("woord " * 4000)
    page.keyboard.press("Control+Enter")
    status = page.locator("#status.bad")
    expect(status).to_have_text("De tekst is te lang voor dit model, de nieuwe tokens meegerekend.")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_and_can_be_read(
    browser: Browser, server: ServerProcess, width: int, scheme: str
) -> None:
    viewport = {"width": width, "height": 800}
    for page in open_page(browser, server, viewport=viewport, color_scheme=scheme, locale="nl"):
        page.locator("#colors").check()
        write(page, "Een lang" + "er" * 200 + " woord")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.locator(".token").last.hover()
        box = page.locator("#details").bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        for token in page.locator(".token").all():
            assert token.evaluate(CONTRAST) >= 4.5
        for selector in (".note", ".hint", "#status", ".given", "#write", ".quiet", "output", "td"):
            contrast = page.locator(selector).first.evaluate(CONTRAST)
            assert contrast >= 4.5, (selector, contrast)


def test_with_a_key_the_browser_asks_for_it(browser: Browser, trained_run: Path) -> None:
    with serving(trained_run / "final_model", "--api-key", KEY) as server:
        given = {"username": "wie dan ook", "password": KEY}
        for page in open_page(browser, server, http_credentials=given, locale="nl"):
            write(page, "De zee")
            assert json.dumps(page.locator("#result").inner_text()) != '"De zee"'


@pytest.mark.parametrize("place", ["/", "/named/"])
def test_behind_nginx(browser: Browser, trained_run: Path, tmp_path: Path, place: str) -> None:
    """With the Host that nginx sends by itself, and below a path."""
    loaded = load_for_inference(str(trained_run / "final_model"), "fp32")
    given = {"username": "wie dan ook", "password": KEY}
    with serving_here(loaded, api_key=KEY) as server, nginx_before(server, tmp_path) as nginx:
        nginx.url += place
        for page in open_page(browser, nginx, http_credentials=given, locale="nl"):
            write(page, "De zee")
            assert len(page.locator("#result").inner_text()) > len("De zee")
