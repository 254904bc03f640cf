"""The registry, the scripted double and the cache; what every segmenter must keep is in `segmenter_contract`."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seerseg.errors import MissingExtraError, ModelError, SegmenterError, UsageError
from seerseg.prompts import Box2D, Box3D, Point, Prompt
from seerseg.segmenters import available_segmenters, load_segmenter
from seerseg.segmenters.base import Capabilities, ModelCard, Segmentation, answered
from seerseg.segmenters.cache import CachedSegmenter
from seerseg.segmenters.scripted import ScriptedSegmenter
from seerseg.volume import Grid, Mask, Volume

GRID = Grid((6, 8, 10), np.diag([1.0, 1.0, 2.0, 1.0]))


def volume(seed: int = 0, name: str = "case") -> Volume:
    return Volume(np.random.default_rng(seed).normal(size=GRID.shape_zyx).astype(np.float32), GRID, name=name)


def block(lo: int, hi: int) -> np.ndarray:
    array = np.zeros(GRID.shape_zyx, dtype=bool)
    array[1:4, 2:5, lo:hi] = True
    return array


# --------------------------------------------------------------------------------------------------------------- registry


def test_a_name_a_name_with_a_source_and_a_folder_all_load(tmp_path: Path) -> None:
    script = _script(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(script.read_text().replace("labels.nii.gz", "../labels.nii.gz"))
    for spelled in (f"scripted:{script}", f"SCRIPTED:{script}", script, str(tmp_path / "model")):
        assert load_segmenter(spelled).capabilities.vocabulary == ("Left lung", "spine")


def test_unknown_names_and_folders_get_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'gorw'.*Did you mean grow\?.*grow, medsam2, nano, nnunet, sam, scripted, totalsegmentator"):
        load_segmenter("gorw")
    with pytest.raises(UsageError, match="no segmenter, file or folder"):
        load_segmenter("")
    with pytest.raises(UsageError, match="Nothing follows the colon"):
        load_segmenter("nano:")
    with pytest.raises(ModelError, match=r"no config.json \(it holds: nothing\).*NAME:"):
        load_segmenter(tmp_path)
    config = tmp_path / "config.json"
    for text, words in (
        ("{", "cannot be read as JSON"),
        ("[1]", 'does not say a "kind"'),
        ('{"kind": "nanno_segmenter"}', "'nanno_segmenter', and no segmenter for it is installed. Did you mean nano"),
    ):
        config.write_text(text)
        with pytest.raises(ModelError, match=words):
            load_segmenter(tmp_path)


def test_a_broken_plug_in_is_a_sentence_only_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: seer-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[seerseg.segmenters]\nbroken = seer_broken:load\nabsent = seer_nowhere:load\nodd = seer_odd:load\n"
        "good = seer_good:load\ngrow = seer_broken:load\n"
    )
    (tmp_path / "seer_broken.py").write_text("raise ValueError('half installed')\n")
    (tmp_path / "seer_odd.py").write_text("def load(**settings): return 7\n")
    (tmp_path / "seer_good.py").write_text(
        "from seerseg.segmenters.scripted import ScriptedSegmenter\n"
        "def load(*, source, **settings): return ScriptedSegmenter({source: lambda volume, prompt: None})\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert available_segmenters()["broken"] == "from the package seer-plugin"
    assert "seer_broken" not in sys.modules
    assert load_segmenter("good:abc").capabilities.vocabulary == ("abc",)
    with pytest.raises(ModelError, match=r"segmenter broken \(seer_broken:load\) cannot be loaded: ValueError: half installed\."):
        load_segmenter("broken")
    with pytest.raises(MissingExtraError, match="Install the package that holds seer_nowhere"):
        load_segmenter("absent")
    with pytest.raises(ModelError, match="made a int, which lacks methods"):
        load_segmenter("odd")
    assert available_segmenters()["grow"].startswith("boxes")


def test_importing_the_registry_loads_nothing_heavy() -> None:
    heavy = "('torch', 'numpy', 'scipy', 'SimpleITK', 'skimage', 'transformers')"
    code = f"import sys, seerseg.segmenters as s; s.available_segmenters(); print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# --------------------------------------------------------------------------------------------------------------- scripted


def test_scripted_answers_from_its_table_and_records_calls() -> None:
    seg = ScriptedSegmenter(
        {"Left Lung": Mask(block(0, 3), GRID), "heart": lambda volume, prompt: volume.array > 1e9, "none": lambda volume, prompt: None},
        presence={"left lung": 0.9},
    )
    case = volume()
    prompts = [Prompt(text=" left  LUNG "), Prompt(class_name="heart"), Prompt(text="none"), Prompt(text="left lunge"), Prompt()]
    found = seg.segment(case, prompts)
    assert [f.status for f in found] == ["ok", "empty", "empty", "unsupported", "unsupported"]
    assert found[0].presence == 0.9
    assert found[1].presence is None
    assert found[0].mask is not None
    assert (found[0].mask.array == block(0, 3)).all()
    assert found[3].nearest == ("Left Lung",)
    assert "Did you mean Left Lung?" in found[3].message
    assert "prompt is empty" in found[4].message
    assert len(seg.calls) == 1
    assert seg.calls[0].prompts == tuple(prompts)
    assert seg.calls[0].volume_hash == case.content_hash


def test_scripted_refuses_masks_of_another_grid_or_shape() -> None:
    other = Grid(GRID.shape_zyx, np.diag([2.0, 2.0, 2.0, 1.0]))
    with pytest.raises(SegmenterError, match="another grid"):
        ScriptedSegmenter({"a": Mask(block(0, 3), other)}).segment(volume(), [Prompt(text="a")])
    with pytest.raises(SegmenterError, match="has shape"):
        ScriptedSegmenter({"a": np.zeros((2, 2, 2), bool)}).segment(volume(), [Prompt(text="a")])


def test_scripted_boxes_fill_or_restrict_and_clicks_add_or_remove() -> None:
    seg, case = ScriptedSegmenter({"lung": block(0, 6)}), volume()
    box = seg.segment(case, [Prompt(boxes=(Box2D(0, 2, (1, 2), (4, 6)),))])[0].mask
    assert box is not None
    assert box.array.sum() == 12
    assert box.array[2, 1:4, 2:6].all()
    kept = seg.segment(case, [Prompt(text="lung", boxes=(Box3D((0, 0, 0), (6, 8, 2)),))])[0].mask
    assert kept is not None
    assert (kept.array == block(0, 2)).all()
    session = seg.session(case)
    first = session.add(Prompt(text="lung"))
    grown = session.add(Prompt(points=(Point((0, 7, 9)),)))
    shrunk = session.add(Prompt(points=(Point((2, 3, 2), positive=False),)))
    assert first.mask
    assert grown.mask
    assert shrunk.mask
    assert grown.mask.array[0, 7, 9]
    assert (grown.mask.array >= first.mask.array).all()
    assert not shrunk.mask.array[2, 3, 2]
    assert (shrunk.mask.array <= grown.mask.array).all()
    assert session.add(Prompt()).status == "unsupported"
    back = session.undo()
    assert back is not None
    assert back.mask is not None
    assert (back.mask.array == grown.mask.array).all()
    session.undo()
    assert session.undo() is None
    session.close()
    with pytest.raises(SegmenterError, match="closed"):
        session.add(Prompt(text="lung"))


def _script(folder: Path) -> Path:
    import nibabel

    labels = np.zeros(GRID.shape_zyx[::-1], np.uint8)
    labels[1:3, 2:5, 1:4], labels[7:9, 2:5, 1:4] = 1, 2
    nibabel.save(nibabel.Nifti1Image(labels, GRID.affine), folder / "labels.nii.gz")
    path = folder / "script.json"
    path.write_text(
        json.dumps(
            {
                "kind": "scripted_segmenter",
                "names": {"Left lung": 1, "spine": [1, 2]},
                "presence": {"spine": 0.25},
                "cases": {"case": "labels.nii.gz", "other": {"labels": "labels.nii.gz", "names": {"spine": 2}}},
            }
        )
    )
    return path


def test_scripted_from_a_file(tmp_path: Path) -> None:
    pytest.importorskip("seerseg.volume.files", reason="reading label maps")
    seg = load_segmenter(f"scripted:{_script(tmp_path)}")
    found = seg.segment(volume(), [Prompt(text="left lung"), Prompt(text="spine")])
    assert [f.mask.array.sum() for f in found if f.mask] == [18, 36]
    assert found[1].presence == 0.25
    found = seg.segment(volume(name="other"), [Prompt(text="left lung"), Prompt(text="spine")])
    assert [f.status for f in found] == ["empty", "ok"]
    with pytest.raises(SegmenterError, match=r"has no case 'casee'\. Did you mean case"):
        seg.segment(volume(name="casee"), [Prompt(text="spine")])
    assert seg.card.identity == load_segmenter(f"scripted:{_script(tmp_path)}").card.identity


def test_a_bad_script_gets_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    missing = '{"cases": {"a": "x.nii"}}'
    for text, words in (("{", "not valid JSON"), ("{}", "KeyError"), ('{"cases": {"a": 3}}', "form"), (missing, "x.nii")):
        path.write_text(text)
        with pytest.raises(ModelError, match=words):
            load_segmenter(f"scripted:{path}")
    with pytest.raises(ModelError, match="does not exist"):
        load_segmenter(f"scripted:{tmp_path / 'none.json'}")
    with pytest.raises(ModelError, match="needs its script"):
        load_segmenter("scripted")


# ------------------------------------------------------------------------------------------------------------------ cache


class Inner:
    """Answers a text with a pattern made of it; holds the door while `gate` is closed; fails on "fault"."""

    capabilities = Capabilities(text="open", presence=True)
    card = ModelCard("inner", "inner-1")

    def __init__(self) -> None:
        self.calls: list[list[str | None]] = []
        self.gate = threading.Event()
        self.gate.set()

    def segment(self, volume: Volume, prompts: Sequence[Prompt]) -> list[Segmentation]:
        self.calls.append([p.text for p in prompts])
        assert self.gate.wait(10)
        if any(p.text == "fault" for p in prompts):
            raise SegmenterError("It failed.")
        return [self._answer(volume, p) for p in prompts]

    def _answer(self, volume: Volume, prompt: Prompt) -> Segmentation:
        if prompt.text == "odd":
            return Segmentation(prompt, "unsupported", message="No.", nearest=("even",))
        rng = np.random.default_rng(len(prompt.text or ""))
        return answered(volume, prompt, rng.random(volume.grid.shape_zyx) < (0.3 if prompt.text else 0), presence=0.5)

    def session(self, volume: Volume) -> None:
        return None


@given(st.lists(st.lists(st.sampled_from(["a", "bb", "ccc", "odd", ""]), max_size=5), max_size=6), st.sampled_from([0, 1100, 2500, 10**6]))
def test_cached_answers_equal_the_uncached(rounds: list[list[str]], max_bytes: int) -> None:
    inner, plain, case = Inner(), Inner(), volume()
    cached = CachedSegmenter(inner, max_bytes=max_bytes)
    for texts in rounds:
        prompts = [Prompt(text=text) for text in texts]
        for got, want, prompt in zip(cached.segment(case, prompts), plain.segment(case, prompts), prompts, strict=True):
            assert got.prompt is prompt
            assert (got.status, got.presence, got.message, got.nearest) == (
                want.status,
                want.presence,
                want.message,
                want.nearest,
            )
            assert (got.mask is None) == (want.mask is None)
            if got.mask is not None and want.mask is not None:
                assert got.mask.array.dtype == bool
                assert (got.mask.array == want.mask.array).all()
                assert got.mask.name == want.mask.name
        assert cached.statistics.bytes <= max_bytes
    statistics = cached.statistics
    assert statistics.misses == sum(map(len, inner.calls))
    assert statistics.hits + statistics.misses == sum(map(len, rounds))
    assert all(len(call) == len(set(call)) for call in inner.calls)
    if max_bytes == 10**6:
        assert statistics.misses == len({t for texts in rounds for t in texts})
        assert statistics.evictions == 0


def test_only_misses_are_forwarded_in_one_call_and_keys_tell_volumes_apart() -> None:
    inner = Inner()
    cached = CachedSegmenter(inner)
    cached.segment(volume(), [Prompt(text="a")])
    cached.segment(volume(), [Prompt(text="a"), Prompt(text="bb"), Prompt(text="ccc"), Prompt(text="bb")])
    assert inner.calls == [["a"], ["bb", "ccc"]]
    cached.segment(volume(seed=1), [Prompt(text="a")])
    assert inner.calls[-1] == ["a"]
    assert len(inner.calls) == 3
    cached.clear()
    cached.segment(volume(), [Prompt(text="a")])
    assert len(inner.calls) == 4
    assert cached.capabilities is Inner.capabilities
    assert cached.card is Inner.card


def test_what_a_caller_does_to_a_mask_stays_with_the_caller() -> None:
    cached, case = CachedSegmenter(Inner()), volume()
    prompt = Prompt(text="bb")
    first, twin = cached.segment(case, [prompt, prompt])
    assert first.mask
    assert twin.mask
    want = first.mask.array.copy()
    first.mask.array[:] = True
    twin.mask.array[:] = False
    again = cached.segment(case, [prompt])[0]
    assert again.mask is not None
    assert (again.mask.array == want).all()


def test_the_least_recently_used_answer_is_dropped_first() -> None:
    inner = Inner()
    case = volume()
    cached = CachedSegmenter(inner, max_bytes=2 * (1024 + 100))
    for text in ("a", "bb", "a", "ccc", "a"):
        cached.segment(case, [Prompt(text=text)])
    assert inner.calls == [["a"], ["bb"], ["ccc"]]
    assert cached.statistics.evictions == 1


def test_threads_that_ask_for_the_same_compute_it_once() -> None:
    inner, case = Inner(), volume()
    inner.gate.clear()
    cached = CachedSegmenter(inner)
    results: list[list[Segmentation]] = []
    prompts = [Prompt(text="a"), Prompt(text="bb")]
    threads = [threading.Thread(target=lambda: results.append(cached.segment(case, prompts))) for _ in range(6)]
    for thread in threads:
        thread.start()
    inner.gate.set()
    for thread in threads:
        thread.join(10)
    assert len(results) == 6
    assert inner.calls == [["a", "bb"]]
    assert cached.statistics.hits == 10
    assert cached.statistics.misses == 2


def test_a_failure_is_not_remembered_and_reaches_only_those_who_asked_for_it() -> None:
    inner, case = Inner(), volume()
    inner.gate.clear()
    cached = CachedSegmenter(inner)
    outcome: dict[str, object] = {}

    def ask(name: str, texts: list[str]) -> None:
        try:
            outcome[name] = cached.segment(case, [Prompt(text=text) for text in texts])
        except SegmenterError as fault:
            outcome[name] = fault

    first = threading.Thread(target=ask, args=("first", ["a", "fault"]))
    first.start()
    while not inner.calls:
        first.join(0.01)
    second = threading.Thread(target=ask, args=("second", ["a"]))
    second.start()
    second.join(0.05)
    inner.gate.set()
    first.join(10)
    second.join(10)
    assert isinstance(outcome["first"], SegmenterError)
    assert isinstance(outcome["second"], list)
    assert outcome["second"][0].status == "ok"
    assert cached.segment(case, [Prompt(text="a")])[0].status == "ok"
    with pytest.raises(SegmenterError, match="It failed"):
        cached.segment(case, [Prompt(text="fault")])


def test_an_inner_segmenter_that_loses_answers_is_told_off() -> None:
    class Forgetful(Inner):
        def segment(self, volume: Volume, prompts: Sequence[Prompt]) -> list[Segmentation]:
            return []

    with pytest.raises(SegmenterError, match="answered 1 prompts with 0 results"):
        CachedSegmenter(Forgetful()).segment(volume(), [Prompt(text="a")])
    with pytest.raises(SegmenterError, match="-1 bytes"):
        CachedSegmenter(Forgetful(), max_bytes=-1)
