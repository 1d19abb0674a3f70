"""From a run folder to its report."""

from pathlib import Path

from etherdiff.report.contents import read_contents
from etherdiff.report.page import make_page
from etherdiff.system.files import write_text


def write_report(run: Path) -> Path:
    """Write RUN/report.html, one file that needs nothing else, and return its path.

    Every part of the run may be missing: the page says what would make it. The same files give the same page.
    UserError where `run` is no run folder.
    """
    path = run / "report.html"
    write_text(path, make_page(read_contents(run)))
    return path
