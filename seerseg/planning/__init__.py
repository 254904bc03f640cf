"""From a dataset to plans.json: what is in it, what the machine is, and every value that follows, with its rule."""

from seerseg.planning.record import CaseRecord, ChannelRecord, ValueRecord, case_record, label_values

__all__ = ["CaseRecord", "ChannelRecord", "ValueRecord", "case_record", "label_values"]
