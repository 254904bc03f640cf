"""Raw datasets: cases, subjects, requests, labels, splits, integrity."""

from seerseg.dataset.inputs import Inputs, find_cases, find_inputs
from seerseg.dataset.integrity import IntegrityReport, hu_fault, verify_dataset
from seerseg.dataset.raw import CaseFiles, Problem, RawDataset, label_prompts, modality_of, open_dataset
from seerseg.dataset.requests import MAX_REQUEST_CHARS, Request, check_text, read_requests, scan_requests, write_requests
from seerseg.dataset.splits import Fold, Splits, check_splits, load_or_make_splits, load_splits, make_splits
from seerseg.vocabulary import LabelDescription

__all__ = [
    "MAX_REQUEST_CHARS",
    "CaseFiles",
    "Fold",
    "Inputs",
    "IntegrityReport",
    "LabelDescription",
    "Problem",
    "RawDataset",
    "Request",
    "Splits",
    "check_splits",
    "check_text",
    "find_cases",
    "find_inputs",
    "hu_fault",
    "label_prompts",
    "load_or_make_splits",
    "load_splits",
    "make_splits",
    "modality_of",
    "open_dataset",
    "read_requests",
    "scan_requests",
    "verify_dataset",
    "write_requests",
]
