"""One self-contained HTML page and its figures, made from `evaluation/evidence.json`. Never imports torch."""

from exalign.report.page import write_report

__all__ = ["write_report"]
