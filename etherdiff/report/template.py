"""HTML from templates in which every value is escaped, so that no prompt or name can become markup."""

import re
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from etherdiff.system.text import counted, score

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Nothing is fetched and no script runs, whatever a page may hold."""
_UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffe\uffff]")  # no HTML may hold them, or no UTF-8


def render(template: str, **values: Any) -> str:
    """Fill in a template of the folder `templates`."""
    return environment().get_template(template).render(values)


@cache
def environment() -> Environment:
    """The templates, with the filters that they use."""
    made = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_fit,
        loader=PackageLoader("etherdiff.report"),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals["policy"] = POLICY
    made.filters |= {"foreign": foreign, "score": score, "counted": counted}
    return made


def foreign(value: object) -> Any:
    """Text that somebody wrote, in its own direction: right-to-left letters do not turn what stands around them."""
    return parts().foreign(value)


def parts() -> Any:
    """The macros of `parts.html.j2`, whose values are markup."""
    return environment().get_template("parts.html.j2").module


def _fit(value: object) -> object:
    """A value's text without the characters that no page may hold; None as nothing, markup as it is."""
    if hasattr(value, "__html__"):
        return value
    return "" if value is None else _UNFIT.sub("�", str(value))
