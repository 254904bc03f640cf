"""The preprocessed store: every case in the form that slices and patches are read from quickly."""

from seerseg.store.case import ChannelSlices, SourceFile, StoredCase, hash_source, open_case, stored_cases, verify_case, write_case
from seerseg.store.layout import StoreLayout

__all__ = ["ChannelSlices", "SourceFile", "StoreLayout", "StoredCase", "hash_source", "open_case", "stored_cases", "verify_case", "write_case"]
