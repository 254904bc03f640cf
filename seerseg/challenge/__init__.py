"""Answering published challenges: their files in, their files out, their scores, and the container they want."""

from seerseg.challenge.answers import Answerer, ChallengeReport, ClassAnswer, ScanAnswer, predict_npz
from seerseg.challenge.grand_challenge import JobOptions, answer_job
from seerseg.challenge.npz import PromptSet, read_npz, read_prompts, read_scan, write_answer

__all__ = [
    "Answerer",
    "ChallengeReport",
    "ClassAnswer",
    "JobOptions",
    "PromptSet",
    "ScanAnswer",
    "answer_job",
    "predict_npz",
    "read_npz",
    "read_prompts",
    "read_scan",
    "write_answer",
]
