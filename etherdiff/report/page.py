"""The page: head, key facts, sections, style. No script, and a policy that forbids it to ask for anything."""

from importlib import resources
from pathlib import Path

from etherdiff import __version__
from etherdiff.report.album import Album
from etherdiff.report.contents import Contents, mapping
from etherdiff.report.cost import cost_section, trainable
from etherdiff.report.curves import curves_section
from etherdiff.report.drift import drift_section
from etherdiff.report.markup import Html, facts, foreign, join, tag
from etherdiff.report.numbers import counted, number, seconds
from etherdiff.report.pictures import expected_images, picture_sections
from etherdiff.report.scores import headline, left_out_count, per_class_section, per_prompt_section, scores_section
from etherdiff.report.settings import settings_section, shown

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Nothing is fetched and no script runs, whatever the page may hold."""
Section = tuple[str, str, Html]
"""id, title, body."""


def make_page(contents: Contents) -> str:
    """The whole report. A function of the run's files alone: no clock, nothing of the machine."""
    album = Album(expected_images(contents))
    title = f"{contents.config.method} on {_subject(contents)}"
    sections = _sections(contents, album)
    links = [tag("a", name, href=f"#{place}") for place, name, _ in sections]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", f"{title} · etherdiff"),
        tag("style", _style()),
    )
    body = tag(
        "body",
        tag("header", tag("h1", foreign(title)), _prompt(contents), _key_facts(contents), tag("nav", *links)),
        tag("main", _warnings(contents, album), *(_section(*section) for section in sections)),
        tag("footer", f"Made by etherdiff {__version__} from ", foreign(contents.path.resolve().name), "."),
    )
    return join(Html("<!doctype html>\n"), tag("html", head, body, lang="en"), "\n")


def _sections(contents: Contents, album: Album) -> list[Section]:
    found: list[tuple[str, str, Html | None]] = [
        *picture_sections(contents, album),
        ("scores", "Scores", scores_section(contents)),
        ("prompts", "Prompt by prompt", per_prompt_section(contents)),
        ("classes", "Class by class", per_class_section(contents)),
        ("curves", "Learning curves", curves_section(contents)),
        ("cost", "Cost", cost_section(contents)),
        ("drift", "Drift from the base", drift_section(contents)),
        ("settings", "Settings", settings_section(contents)),
    ]
    return [(place, name, body) for place, name, body in found if body]


def _section(place: str, name: str, body: Html) -> Html:
    return tag("section", tag("h2", name), body, id=place)


def _subject(contents: Contents) -> str:
    subject = str(getattr(contents.config, "subject", None) or getattr(contents.config, "dataset", ""))
    return Path(subject).name or subject


def _prompt(contents: Contents) -> Html | None:
    prompt = contents.provenance.get("subject_prompt")
    return tag("p", "trained on “", foreign(prompt), "”", class_="note") if isinstance(prompt, str) else None


def _key_facts(contents: Contents) -> Html:
    config, done = contents.config, contents.curves[-1]["step"] if contents.curves else 0
    spent = number(mapping(contents.cost.get("seconds")).get("train"))
    return facts(
        {
            "base": foreign(shown(config.base)),
            "steps": f"{done:,} of {config.steps:,}" if done < config.steps else f"{config.steps:,}",
            "trainable parameters": trainable(contents),
            "training time": seconds(spent) if spent is not None else None,
            **headline(contents),
        }
    )


def _warnings(contents: Contents, album: Album) -> Html | None:
    """What the reader has to know before reading on."""
    told = list(contents.damaged)
    if album.not_shown:
        told.append(f"{counted(album.not_shown, 'image')} not shown, to keep the page small: they are in the run's folder")
    if count := left_out_count(contents.result or {}):
        told.append(f"left out of the scores: {count:,} (images or prompts; see the scores for which)")
    return tag("ul", *(tag("li", foreign(text)) for text in told), class_="warnings") if told else None


def _style() -> Html:
    """The style sheet, which holds no data and so needs no escaping."""
    return Html(resources.files("etherdiff.report").joinpath("style.css").read_text(encoding="utf-8"))
