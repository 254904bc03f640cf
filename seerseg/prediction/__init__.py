"""Prediction: scans and free text in, masks out; in memory (`Predictor`) or folder by folder, overlapped and resumable."""
