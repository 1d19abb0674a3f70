"""`report.html`: a run as one page that opens anywhere, without a network."""

from pathlib import Path

from etherdiff.report.contents import read_contents
from etherdiff.report.page import make_page
from etherdiff.system.files import write_text
from etherdiff.system.terminal import say, warn

__all__ = ["show_report", "write_report"]


def write_report(run: Path) -> Path:
    """Write RUN/report.html, one file that needs nothing else, and return its path.

    Every part of the run may be missing: the page shows the command that makes it. The same files give the same page.
    UserError where `run` is no run folder.
    """
    contents = read_contents(run)
    path = contents.run.folder.report
    write_text(path, make_page(contents))
    return path


def show_report(run: Path) -> None:
    """Write the report and say where it is. If that fails, only warn: the scores are already written."""
    try:
        say(f"report: {write_report(run)}")
    except Exception as error:  # a damaged image, a font or the disk can raise anything
        warn(f"the report failed ({type(error).__name__}: {error})")
