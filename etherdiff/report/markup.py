"""HTML and SVG as nested calls: whatever is not markup already is escaped, so no prompt or name can become markup."""

import html
import re
from collections.abc import Sequence

VOID = frozenset({"meta", "link", "img"})
_UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffe\uffff]")  # no HTML may hold them, or no UTF-8


class Html(str):
    """Markup. Made by `tag` and `join` alone; a constant that holds no data may be one too."""

    __slots__ = ()


Child = object
"""Markup, or anything else whose text is shown; None shows nothing."""


def tag(name: str, /, *children: Child, **attributes: object) -> Html:
    """An element. Attributes: `class_` is class, `_` inside a name is `-`; None and False are left out, True is bare."""
    written = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: Child) -> Html:
    """Children one after another, what is no markup escaped."""
    return Html("".join(child if isinstance(child, Html) else escape(child) for child in children if child is not None))


def escape(value: object) -> Html:
    """A value's text, safe between tags and inside quotes; characters that no page may hold become U+FFFD."""
    return Html(html.escape(_UNFIT.sub("�", str(value))))


def foreign(text: object) -> Html:
    """Text that somebody wrote, in its own direction: right-to-left letters do not turn what stands around them."""
    return tag("bdi", text, dir="auto")


def table(head: Sequence[Child], rows: Sequence[Sequence[Child]], class_: str = "", label: str = "") -> Html:
    """A table that scrolls inside itself where it is wider than the page; the first column names the rows.

    label: what it shows, read aloud to who cannot see it.
    """
    header = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head)))
    body = [tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in rest)) for first, *rest in rows]
    grid = tag("table", header, tag("tbody", *body), class_=class_ or None)
    return tag("div", grid, class_="scroll", tabindex="0", role="region", aria_label=label or None)


def facts(pairs: dict[str, Child]) -> Html:
    """Names and values in a grid of boxes; values that are None are left out."""
    boxes = [tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs.items() if value is not None]
    return tag("dl", *boxes, class_="facts")


def details(summary: Child, *children: Child) -> Html:
    """What opens at a click."""
    return tag("details", tag("summary", summary), *children)


def _attribute(key: str, value: object) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escape(value)}"'
