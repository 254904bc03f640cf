"""The preprocessed store: every case in the form that slices and patches are read from quickly."""

from seerseg.store.case import (
    ChannelSlices,
    SourceFile,
    StoredCase,
    case_path,
    hash_source,
    open_case,
    stored_cases,
    verify_case,
    write_case,
)
from seerseg.store.layout import StoreLayout
from seerseg.store.preprocess import Outcome, PreprocessReport, preprocess

__all__ = [
    "ChannelSlices",
    "Outcome",
    "PreprocessReport",
    "SourceFile",
    "StoreLayout",
    "StoredCase",
    "case_path",
    "hash_source",
    "open_case",
    "preprocess",
    "stored_cases",
    "verify_case",
    "write_case",
]
