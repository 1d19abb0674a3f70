"""Write a run's report.html where there is something that writes one."""

from pathlib import Path

from etherdiff.system.terminal import say, warn


def show_report(run: Path) -> None:
    """Write the report and say where it is; where that fails, the numbers are there all the same."""
    try:
        from etherdiff.report import write_report
    except ImportError:
        return
    try:
        say(f"all of it to look at: {write_report(run)}")
    except Exception as error:  # whatever a damaged image, a font or the disk raises
        warn(f"the report failed ({type(error).__name__}: {error})")
