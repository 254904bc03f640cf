"""What people look at: overlays on the scan, an HTML page of an evaluation or a run, progress of a training."""

from seerseg.report.html import write_report, write_run_report
from seerseg.report.overlays import write_overlays
from seerseg.report.plots import plot_progress

__all__ = ["plot_progress", "write_overlays", "write_report", "write_run_report"]
