"""Moving a trained model to another machine: packed with its hashes (`export_model`), checked and put there (`install_model`), and what it
still needs there (`look`).

An export is a plain zip of a model folder, with `export.json` beside the manifest: every file's size and SHA-256, the versions of the
packages that it was made with, and names, licences and hashes of the models that it stands on. Nothing in it is ever run.
"""

from seerseg.exchange.needs import Part, look
from seerseg.exchange.packing import Exported, export_model, export_name
from seerseg.exchange.record import ExportRecord, read_record
from seerseg.exchange.unpacking import Installed, install_model

__all__ = ["ExportRecord", "Exported", "Installed", "Part", "export_model", "export_name", "install_model", "look", "read_record"]
