"""No text becomes markup, whatever it holds."""

from html.parser import HTMLParser

import pytest

from etherdiff.report.markup import Html, details, facts, foreign, table, tag

HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "</style></title></bdi></svg><b>",
    "&lt;script&gt; &amp; &#x3c;",
    "' onload='alert(1)",
    "<!-- --> ]]> <![CDATA[",
    "كرة حمراء ‮abc‬ ؟",
    "🐕‍🦺 \u200f naïve  e\u0301",
    "{{constructor.constructor('alert(1)')()}} ${1}",
]


class Parsed(HTMLParser):
    """What a browser would see."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, name, attributes):
        self.tags.append(name)
        self.attributes += attributes

    def handle_data(self, text):
        self.text += text


@pytest.mark.parametrize("text", HOSTILE)
def test_text_stays_text(text):
    seen = Parsed(tag("p", text, foreign(text), title=text))
    assert seen.tags == ["p", "bdi"]
    assert seen.attributes == [("title", text), ("dir", "auto")]
    assert seen.text == text + text


@pytest.mark.parametrize("text", HOSTILE)
def test_in_every_helper(text):
    page = table([text], [[text, text]], label=text) + facts({text: text}) + details(text, text)
    assert set(Parsed(page).tags) <= {
        "div",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "dl",
        "dt",
        "dd",
        "details",
        "summary",
    }
    assert Parsed(page).text == text * 7


def test_markup_that_leaves_the_builder_is_text_again():
    inner = tag("b", "x")
    assert isinstance(inner, Html)
    assert tag("p", inner) == "<p><b>x</b></p>"
    assert tag("p", f"{inner}") == "<p>&lt;b&gt;x&lt;/b&gt;</p>"  # a format is a plain string


def test_characters_that_no_page_may_hold():
    assert tag("p", "a\0b\x1bc\ud800d\uffffe\tf\n") == "<p>a�b�c�d�e\tf\n</p>"
    foreign("\ud83d").encode("utf-8")


def test_attributes():
    assert tag("img", src="a", alt=None, hidden=True, draggable=False, aria_label="b", class_="c") == (
        '<img src="a" hidden aria-label="b" class="c">'
    )
