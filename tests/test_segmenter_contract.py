"""The contract on every segmenter that ships, bare and behind the cache; a case each for what is said beyond it."""

from __future__ import annotations

import pytest
from segmenter_contract import SegmenterContract

from seerseg.errors import ModelError
from seerseg.segmenters import load_segmenter
from seerseg.segmenters.base import Segmenter
from seerseg.segmenters.cache import CachedSegmenter
from seerseg.segmenters.scripted import ScriptedSegmenter


class TestScripted(SegmenterContract):
    @pytest.fixture(scope="class")
    @classmethod
    def segmenter(cls) -> Segmenter:
        return ScriptedSegmenter(
            {"bright": lambda volume, prompt: volume.array > 100, "dark": lambda volume, prompt: None}, presence={"bright": 0.8}
        )


class TestCachedScripted(TestScripted):
    @pytest.fixture(scope="class")
    @classmethod
    def segmenter(cls) -> Segmenter:
        return CachedSegmenter(ScriptedSegmenter({"bright": lambda volume, prompt: volume.array > 100}))


class TestGrow(SegmenterContract):
    examples = 60

    @pytest.fixture(scope="class")
    @classmethod
    def segmenter(cls) -> Segmenter:
        return load_segmenter("grow")


class TestNano(SegmenterContract):
    texts = ("the lft lung", "LV")
    examples = 4

    @pytest.fixture(scope="class")
    @classmethod
    def segmenter(cls) -> Segmenter:
        try:
            return load_segmenter("nano")
        except (ImportError, ModelError) as fault:
            pytest.skip(f"the nano weights are not here: {fault}")
