"""Prediction: scans and free text in, masks out; in memory (`Predictor`) or folder by folder, overlapped and resumable."""

from seerseg.prediction.folder import RunReport, predict_folder
from seerseg.prediction.ledger import Entry, Ledger
from seerseg.prediction.outputs import Legend
from seerseg.prediction.predictor import Prediction, Predictor
from seerseg.prediction.stages import CaseResult, Options
from seerseg.prediction.stopping import StopOnSignals

__all__ = ["CaseResult", "Entry", "Ledger", "Legend", "Options", "Prediction", "Predictor", "RunReport", "StopOnSignals", "predict_folder"]
