"""SeerSeg: free text in a clinician's words to 3D masks, by a trained reasoner before a frozen segmenter."""

__version__ = "0.1.0"
