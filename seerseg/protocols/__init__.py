"""Dialogue grammars by name. A further one is a class and one entry-point line in the group `seerseg.protocols`."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points

from seerseg.errors import UsageError, did_you_mean
from seerseg.protocols.base import Protocol

BUILT_IN = {
    "seer": "seerseg.protocols.seer:SeerProtocol",
    "medvol-r1": "seerseg.protocols.medvol_r1:MedVolR1Protocol",
    "medreasoner": "seerseg.protocols.medreasoner:MedReasonerProtocol",
    "medsam-agent": "seerseg.protocols.medsam_agent:MedSamAgentProtocol",
    "seerseg": "seerseg.protocols.combined:CombinedProtocol",
}


def load_protocol(name: str) -> Protocol:
    """The protocol of that name; UsageError with the known names otherwise."""
    plugins = {entry.name: entry.value for entry in entry_points(group="seerseg.protocols")}
    known = {**plugins, **BUILT_IN}
    if name not in known:
        raise UsageError(f"There is no protocol {name!r}.{did_you_mean(name, known)} Known: {', '.join(sorted(known))}.")
    module, _, attribute = known[name].partition(":")
    made: Protocol = getattr(import_module(module), attribute)()
    return made
