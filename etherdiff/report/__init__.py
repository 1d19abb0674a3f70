"""`report.html`: a run as one page that opens anywhere, without a network."""

from etherdiff.report.report import write_report

__all__ = ["write_report"]
