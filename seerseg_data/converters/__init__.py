"""Converters of public datasets, by name. Adding one: a file, and a line here (documentation/converters.md)."""

from __future__ import annotations

from seerseg.errors import UsageError, did_you_mean
from seerseg_data.converters.abdomenct1k import AbdomenCT1K
from seerseg_data.converters.base import (
    CaseContent,
    ConversionReport,
    Converter,
    Facts,
    Outcome,
    SourceCase,
    ask,
    convert,
    dataset_folder,
    describe,
    missing_layout,
)
from seerseg_data.converters.brainmetshare import BrainMetShare
from seerseg_data.converters.ct_org import CTOrg
from seerseg_data.converters.cvpr_text import CVPRText
from seerseg_data.converters.kits23 import KiTS23
from seerseg_data.converters.msd import Decathlon
from seerseg_data.converters.pengwin import Pengwin
from seerseg_data.converters.totalsegmentator import TotalSegmentator
from seerseg_data.converters.umrg import UMRG

CONVERTERS: dict[str, type[Converter]] = {
    c.name: c for c in (AbdomenCT1K, BrainMetShare, CTOrg, CVPRText, KiTS23, Decathlon, Pengwin, TotalSegmentator, UMRG)
}

__all__ = [
    "CONVERTERS",
    "CaseContent",
    "ConversionReport",
    "Converter",
    "Facts",
    "Outcome",
    "SourceCase",
    "ask",
    "convert",
    "dataset_folder",
    "describe",
    "load_converter",
    "missing_layout",
]


def load_converter(name: str) -> Converter:
    """The converter of a name, whatever its case and dashes; UsageError with the nearest names."""
    key = name.lower().replace("-", "_")
    if key not in CONVERTERS:
        raise UsageError(f"There is no converter {name!r}.{did_you_mean(key, CONVERTERS)} Known: {', '.join(sorted(CONVERTERS))}.")
    return CONVERTERS[key]()
