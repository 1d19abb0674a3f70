"""No text becomes markup, whatever it holds."""

from html.parser import HTMLParser

import pytest
from jinja2 import UndefinedError

from etherdiff.report.html import environment, foreign, parts
from etherdiff.report.page import Cells

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
        if text.strip(" \n"):  # between tags a template may break lines
            self.text += text


PARTS = parts()


def fill(template: str, **values) -> str:
    return environment().from_string(template).render(values)


@pytest.mark.parametrize("text", HOSTILE)
def test_text_stays_text(text):
    seen = Parsed(fill('<p title="{{ it }}">{{ it }}{{ it|foreign }}</p>', it=text))
    assert seen.tags == ["p", "bdi"]
    assert seen.attributes == [("title", text), ("dir", "auto")]
    assert seen.text == text + text


@pytest.mark.parametrize("text", HOSTILE)
def test_in_every_part(text):
    page = PARTS.table(Cells([text], [[text, text]], text, text)) + PARTS.facts({text: text})
    page = str(page) + fill('{% from "parts.html.j2" import details %}{% call details(it) %}{{ it }}{% endcall %}', it=text)
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
    assert Parsed(page).text.replace("\n", "") == text * 7


def test_markup_that_leaves_a_template_is_text_again():
    inner = foreign("x")
    assert fill("<p>{{ it }}</p>", it=inner) == '<p><bdi dir="auto">x</bdi></p>'
    assert Parsed(fill("<p>{{ it }}</p>", it=f"{inner}")).text == '<bdi dir="auto">x</bdi>'  # a format is a plain string


def test_characters_that_no_page_may_hold():
    assert fill("<p>{{ it }}</p>", it="a\0b\x1bc\ud800d\uffffe\tf\n") == "<p>a�b�c�d�e\tf\n</p>"
    foreign("\ud83d").encode("utf-8")


def test_a_name_that_a_template_does_not_have_is_an_error():
    with pytest.raises(UndefinedError):
        fill("{{ nothing }}")
