"""The grids of images: base above, adapted below, a column per seed."""

from collections.abc import Mapping, Sequence

from etherdiff.report.album import Album
from etherdiff.report.contents import Contents, Images, PromptImages, mapping, sequence
from etherdiff.report.markup import Html, details, foreign, join, tag
from etherdiff.report.numbers import counted

PROMPTS_SHOWN = 40
SEEDS_SHOWN = 4
STEPS_SHOWN = 5
SUBJECT_SHOWN = 6
SHEET_SIDE = 1600
OPEN = 8
"""Prompts that are in sight at once; the others open at a click."""
LEFT_OUT = ("black", "unreadable", "bad_features")
"""Kinds of images that are in no score, or not in all."""
Refused = dict[tuple[bool, str, int], str]
"""Whether it is the base's, prompt and seed of an image that is left out of scores -> why."""


def expected_images(contents: Contents) -> int:
    """About how many images the page will hold."""
    shown = [prompt for group in _groups(contents) for prompt in group[:PROMPTS_SHOWN]]
    return SUBJECT_SHOWN + sum(min(len(images), SEEDS_SHOWN) for prompt in shown for images in _rows(prompt).values())


def picture_sections(contents: Contents, album: Album) -> list[tuple[str, str, Html]]:
    """(id, title, body) of what there is to see."""
    found = []
    subject = _subject(contents, album)
    if contents.sheet:
        note = tag("p", "A row for each of the first pairs: control, generated, real.", class_="note")
        shown = album.picture(contents.sheet, "controls, generated and real images", SHEET_SIDE)
        found.append(("images", "Control and image", join(note, shown)))
    if contents.evaluated:
        refused = _refused(contents.result or {})
        note = tag("p", "The base above, the adapted model below; a column per seed.", class_="note")
        found.append(("images", "Before and after", join(subject, note, _grids(contents.evaluated, album, refused))))
    if contents.sampled:
        note = tag("p", "The same prompts and seeds at several steps, the base first.", class_="note")
        before = None if contents.evaluated else subject
        found.append(("samples", "During training", join(before, note, _grids(contents.sampled, album, {}))))
    if not found and subject:
        found.append(("images", "The subject", subject))
    return found


def _groups(contents: Contents) -> list[list[PromptImages]]:
    return [contents.evaluated, contents.sampled]


def _subject(contents: Contents, album: Album) -> Html:
    images = contents.subject[:SUBJECT_SHOWN]
    if not images:
        return Html()
    shown = [album.picture(path, f"training image {number}") for number, path in enumerate(images, 1)]
    said = "Trained on" if contents.config.steps else "Judged by"
    caption = tag("p", f"{said} {counted(len(contents.subject), 'image')}:", class_="note")
    return join(caption, tag("div", *shown, class_="strip subject"))


def _grids(prompts: Sequence[PromptImages], album: Album, refused: Refused) -> Html:
    shown = prompts[:PROMPTS_SHOWN]
    cards = [_card(prompt, album, refused) for prompt in shown]
    first, more = tag("div", *cards[:OPEN], class_="cards"), None
    if cards[OPEN:]:
        more = details(f"{counted(len(cards) - OPEN, 'more prompt')}", tag("div", *cards[OPEN:], class_="cards"))
    beyond = None
    if len(prompts) > len(shown):
        beyond = tag("p", f"{counted(len(prompts) - len(shown), 'further prompt')} in the run's folder only.", class_="note")
    return join(first, more, beyond)


def _card(prompt: PromptImages, album: Album, refused: Refused) -> Html:
    rows = [_row(name, images, prompt.prompt, album, refused) for name, images in _rows(prompt).items()]
    return tag("figure", tag("figcaption", foreign(prompt.prompt)), *rows, class_="card")


def _rows(prompt: PromptImages) -> dict[str, Images]:
    """The rows to show: all of two, else the first and some evenly chosen up to the last."""
    names = list(prompt.rows)
    if len(names) > STEPS_SHOWN:
        names = [names[round(place * (len(names) - 1) / (STEPS_SHOWN - 1))] for place in range(STEPS_SHOWN)]
    return {name: prompt.rows[name] for name in names}


def _row(name: str, images: Images, prompt: str, album: Album, refused: Refused) -> Html:
    cells = []
    for seed in list(images)[:SEEDS_SHOWN]:
        picture = album.picture(images[seed], f"{name}, seed {seed}: {prompt}")
        why = refused.get((name == "base", prompt, seed))
        badge = tag("span", f"left out: {why}", class_="badge") if why else None
        cells.append(tag("div", picture, badge, class_="cell"))
    return tag("div", tag("span", name, class_="whose"), tag("div", *cells, class_="strip"), class_="row")


def _refused(result: Mapping[str, object]) -> Refused:
    found: Refused = {}
    for is_base, of in ((False, result), (True, mapping(result.get("base")))):
        for reason, entries in mapping(of.get("left_out")).items():
            for entry in sequence(entries) if reason in LEFT_OUT else ():
                one = mapping(entry)
                if isinstance(one.get("prompt"), str) and isinstance(one.get("seed"), int):
                    found[is_base, one["prompt"], one["seed"]] = reason.replace("_", " ")
    return found
