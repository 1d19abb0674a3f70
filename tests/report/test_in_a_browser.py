"""The page in headless Chromium: no errors, no requests, no horizontal scrolling at phone width."""

import pytest
from browser import Browser, find_chromium
from report_runs import write_curves, write_evaluation, write_run, write_samples
from test_markup import HOSTILE

from etherdiff.report import write_report

LONG = "w" * 400
OPEN_ALL = "document.querySelectorAll('details').forEach(part => part.open = true)"
TOO_WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def browser():
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium here: Debian's package chromium has it")
    opened = Browser(program)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Everything at its worst: prompts that look like markup, and one word of 400 letters."""
    run = write_run(tmp_path_factory.mktemp("browser") / "run", subject=LONG, identifier=LONG)
    write_curves(run, steps=300, every=50)
    write_evaluation(run, [*HOSTILE, LONG])
    write_samples(run)
    return write_report(run)


@pytest.mark.parametrize(("width", "dark"), [(375, False), (1280, True)])
def test_it_opens_quietly_and_fits(browser, page, width, dark):
    browser.open(page, width=width, dark=dark)
    assert browser.complaints() == []
    assert browser.requests() == []
    assert browser.ask(TOO_WIDE) == 0
    browser.ask(OPEN_ALL)
    assert browser.ask(TOO_WIDE) == 0
    assert browser.ask("document.scripts.length") == 0
    assert browser.ask("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    light = browser.ask("getComputedStyle(document.body).backgroundColor")
    assert (light == "rgb(19, 21, 23)") == dark


def test_letters_on_charts_are_large_enough_on_a_phone(browser, page):
    browser.open(page, width=375)
    heights = browser.ask("[...document.querySelectorAll('.chart svg text')].map(t => t.getBoundingClientRect().height)")
    assert heights
    assert min(heights) > 9
