"""Requests: clinician-like wordings for every target of a dataset, in many styles, with train, val and test language kept apart."""

from seerseg_data.requests.generate import Made, Report, Settings, make, make_requests
from seerseg_data.requests.styles import FALLBACK_STYLES, PARAPHRASE_STYLES, STYLES, Context, Style, Wording
from seerseg_data.requests.wording import FAMILIES, paraphrase_set, write_request

__all__ = [
    "FALLBACK_STYLES",
    "FAMILIES",
    "PARAPHRASE_STYLES",
    "STYLES",
    "Context",
    "Made",
    "Report",
    "Settings",
    "Style",
    "Wording",
    "make",
    "make_requests",
    "paraphrase_set",
    "write_request",
]
