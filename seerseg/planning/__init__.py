"""From a dataset to plans.json: what is in it, what the machine is, and every value that follows, with its rule."""

from seerseg.planning.fingerprint import (
    FINGERPRINT_FILE,
    Fingerprint,
    HeaderScan,
    Spread,
    fingerprint,
    load_fingerprint,
    save_fingerprint,
    scan_headers,
    summarise,
)
from seerseg.planning.hardware import Gpu, Hardware, hardware
from seerseg.planning.plans import DEFAULT_PLANS, Plans, layout_of, load_plans, make_plans, save_plans
from seerseg.planning.record import CaseRecord, ChannelRecord, ValueRecord, case_record, label_values
from seerseg.planning.rules import CT_WINDOWS, Planned, plan_workers, purpose_of, viewing_plane

__all__ = [
    "CT_WINDOWS",
    "DEFAULT_PLANS",
    "FINGERPRINT_FILE",
    "CaseRecord",
    "ChannelRecord",
    "Fingerprint",
    "Gpu",
    "Hardware",
    "HeaderScan",
    "Planned",
    "Plans",
    "Spread",
    "ValueRecord",
    "case_record",
    "fingerprint",
    "hardware",
    "label_values",
    "layout_of",
    "load_fingerprint",
    "load_plans",
    "make_plans",
    "plan_workers",
    "purpose_of",
    "save_fingerprint",
    "save_plans",
    "scan_headers",
    "summarise",
    "viewing_plane",
]
