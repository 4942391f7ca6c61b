"""One self-contained page of what runs did: figures on one axis, tables, pictures; and the study's frontier."""

from vitfreeze.html_report.page import write_report

__all__ = ["write_report"]
