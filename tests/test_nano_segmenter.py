"""The nano segmenter: a small untrained network of the true architecture for contracts, and the shipped weights for what it has learnt."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from nano_models import SMALL, chest_phantom, dice, shipped_segmenter, untrained_segmenter, volume_of
from safetensors.torch import load_file, save_file

from seerseg.errors import SegmenterError, WeightsError
from seerseg.prompts import Box3D, Prompt
from seerseg.segmenters import load_segmenter
from seerseg.segmenters.base import Segmenter
from seerseg.segmenters.nano import inference, inputs, load
from seerseg.segmenters.nano.network import SIDES, NanoNetwork, grams, normalise, side_of
from seerseg.segmenters.nano.segmenter import SHIPPED, NanoSegmenter
from seerseg.volume import Grid, Volume
from seerseg_data.nano_vocabulary import CANONICAL, corrupt, other_words, surface_forms, swap_side
from seerseg_data.phantoms import Phantom, phantom

needs_weights = pytest.mark.skipif(not (SHIPPED / "model.safetensors").is_file(), reason="the shipped weights are not in this checkout")


@pytest.fixture(scope="module")
def untrained() -> NanoSegmenter:
    return untrained_segmenter("liver", "left lung", "right lung")


@pytest.fixture(scope="module")
def shipped() -> NanoSegmenter:
    return shipped_segmenter()


@pytest.fixture(scope="module")
def small_volume() -> Volume:
    return volume_of(phantom("chest", 4, spacing_zyx_mm=(8.0, 7.0, 7.0)))


@pytest.fixture(scope="module")
def chest() -> Phantom:
    return chest_phantom()


class TestText:
    def test_normalise_keeps_letters_and_digits(self) -> None:
        assert normalise("  Left-Kidney (L1), plz! ") == "left kidney l1 plz"
        assert normalise("œsophage é") == "sophage e"
        assert normalise("…!?") == ""

    @pytest.mark.parametrize(
        ("text", "side"),
        [("left lung", 1), ("LT lung", 1), ("lfet lung", 1), ("rigth kidney", 2), ("kidney, right", 2), ("both lungs", 3), ("liver", 0),
         ("left and right lung", 3), ("light", 0), ("r ribs", 2)],
    )  # fmt: skip
    def test_side(self, text: str, side: int) -> None:
        assert side_of(text) == side

    def test_grams_are_stable(self) -> None:
        assert grams("left lung", 4096) == grams("LEFT  lung", 4096)
        assert grams("", 4096) == [0]
        assert max(grams("some rather long piece of text", 128)) < 128

    def test_any_string_embeds(self, untrained: NanoSegmenter) -> None:
        texts = ["liver", "", "肝臓", "x" * 500, "L5/S1"]
        with torch.inference_mode():
            out = untrained._network.text(texts)
            alone = untrained._network.text([texts[0]])
        assert out.shape == (5, SMALL.text_width + SIDES)
        assert torch.isfinite(out).all()
        assert torch.allclose(out[0], alone[0], atol=1e-5)

    def test_vocabulary_generators(self) -> None:
        rng = random.Random(0)
        assert swap_side("left lung") == "right lung"
        assert swap_side("liver") == "liver"
        assert all(swap_side(swap_side(name)) == name and swap_side(name) in CANONICAL for name in CANONICAL)
        assert all(surface_forms(name, rng) for name in CANONICAL)
        assert corrupt("liver", rng) != ""
        assert other_words(rng) != ""
        for name in CANONICAL:
            wanted = {"left": 1, "right": 2}.get(name.split()[0], 0)
            assert side_of(name) == wanted


class TestInputs:
    def test_ct_windows_are_fixed(self) -> None:
        scaling = inputs.Intensities.measure(torch.zeros(0), inputs.CT)
        out = scaling.channels(torch.tensor([[[-3024.0, -1000.0, 0.0, 40.0, 3000.0]]]))
        assert out[0, 0, 0].tolist() == pytest.approx([-1, -1, 0, 0.04, 1.5])
        assert out[1, 0, 0].tolist() == pytest.approx([-1.5, -1.5, -0.25, 0, 1.5])

    def test_mr_is_independent_of_its_unit(self) -> None:
        image = torch.linspace(3, 900, 1000)
        one = inputs.Intensities.measure(image, inputs.MR).channels(image.view(10, 10, 10))
        two = inputs.Intensities.measure(image * 500, inputs.MR).channels(image.view(10, 10, 10) * 500)
        assert torch.allclose(one, two, atol=1e-4)

    def test_coordinates_run_from_face_to_face(self) -> None:
        out = inputs.coordinates((2, 3, 5), (0.0, 0.0, 0.0), 10.0, (0.0, 0.0, 0.0), (10.0, 20.0, 40.0))
        assert out.shape == (3, 2, 3, 5)
        assert out[0, 0, 0].tolist() == pytest.approx([-1, -0.5, 0, 0.5, 1])
        assert out[2, :, 0, 0].tolist() == pytest.approx([-1, 1])


class TestContract:
    def test_is_a_segmenter(self, untrained: NanoSegmenter) -> None:
        assert isinstance(untrained, Segmenter)
        assert untrained.capabilities.text == "open"
        assert untrained.capabilities.presence

    def test_two_prompts_are_two_calls(self, untrained: NanoSegmenter, small_volume: Volume) -> None:
        prompts = [Prompt(text="left lung"), Prompt(text="liver")]
        together = untrained.segment(small_volume, prompts)
        backwards = untrained.segment(small_volume, prompts[::-1])[::-1]
        for one, other, prompt in zip(together, backwards, prompts, strict=True):
            alone = untrained.segment(small_volume, [prompt])[0]
            assert one.status == alone.status == other.status
            assert one.presence == alone.presence == other.presence
            assert one.mask is not None
            assert alone.mask is not None
            assert other.mask is not None
            assert np.array_equal(one.mask.array, alone.mask.array)
            assert np.array_equal(one.mask.array, other.mask.array)
            assert one.mask.array.shape == small_volume.grid.shape_zyx
            assert one.mask.array.dtype == np.bool_

    def test_repeats_itself(self, untrained: NanoSegmenter, small_volume: Volume) -> None:
        one, two = (untrained.segment(small_volume, [Prompt(text="ribs")])[0] for _ in range(2))
        assert one.mask is not None
        assert two.mask is not None
        assert np.array_equal(one.mask.array, two.mask.array)

    def test_what_it_cannot_do_is_said(self, untrained: NanoSegmenter, small_volume: Volume) -> None:
        asked = [
            Prompt(text="  "),
            Prompt(text="?!"),
            Prompt(boxes=(Box3D((0, 0, 0), (4, 4, 4)),)),
            Prompt(text="liver", boxes=(Box3D((0, 0, 0), (4, 4, 4)),)),
        ]
        for result in untrained.segment(small_volume, asked):
            assert result.status == "unsupported"
            assert result.mask is None
            assert result.message.endswith(".")
            assert result.nearest == ("text",)
        with pytest.raises(SegmenterError, match="text only"):
            untrained.session(small_volume)
        with pytest.raises(SegmenterError, match="float32"):
            NanoSegmenter.load(dtype="float16")

    def test_odd_volumes_do_not_break_it(self, untrained: NanoSegmenter) -> None:
        affine = np.diag([1.0, 1.0, 1.0, 1.0])
        for array in (
            np.zeros((4, 5, 6), np.int16),
            np.full((3, 40, 9), np.nan, np.float32),
            np.arange(2 * 30 * 30, dtype=np.float32).reshape(2, 30, 30),
        ):
            result = untrained.segment(Volume(array, Grid(array.shape, affine)), [Prompt(text="liver")])[0]  # type: ignore[arg-type]
            assert result.status in ("ok", "empty")
        flat = Volume(np.zeros((1, 20, 20), np.int16), Grid((1, 20, 20), affine))
        assert untrained.segment(flat, [Prompt(text="liver")])[0].status == "unsupported"

    def test_no_prompts_no_work(self, untrained: NanoSegmenter, small_volume: Volume) -> None:
        assert untrained.segment(small_volume, []) == []

    def test_oblique_and_sheared_scans_are_read_upright(self) -> None:
        drawing = phantom("chest", 4, spacing_zyx_mm=(8.0, 7.0, 7.0))
        turn = np.eye(4)
        turn[:2, :2] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]
        turn[1, 2] = 0.2
        array = drawing.array_zyx
        oblique = Volume(array, Grid(array.shape, turn @ drawing.affine), "CT")  # type: ignore[arg-type]
        scan = inference.look(oblique)
        spacing, grid = inference.coarse_grid(scan)
        picture = inference._read(scan, grid)
        assert picture.shape == grid.shape_zyx
        zyx = np.argwhere(drawing.mask("right lung")).mean(0)
        at = np.round(grid.to_voxel(oblique.grid.to_world(zyx))).astype(int)
        assert picture[tuple(at)] < -400  # the middle of the lung is where the world says
        assert 1.0 <= spacing <= 6.0


class TestWeights:
    def folder(self, base: Path) -> Path:
        torch.manual_seed(0)
        network = NanoNetwork(SMALL)
        base.mkdir(exist_ok=True)
        save_file({k: v.half() for k, v in network.state_dict().items()}, base / "model.safetensors")
        config = {"schema": 1, "kind": "nano_segmenter", "network": SMALL.to_json(), "vocabulary": {"liver": {"region": "abdomen"}}}
        (base / "config.json").write_text(json.dumps(config))
        return base

    def test_round_trip_and_identity(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path / "a")
        one, two = load(source=folder), load_segmenter(f"nano:{folder}")
        assert one.card.identity == two.card.identity
        assert one.capabilities.vocabulary == ("liver",)
        tensors = load_file(folder / "model.safetensors")
        tensors["offset.bias"] += 1
        save_file(tensors, folder / "model.safetensors")
        assert load(source=folder).card.identity != one.card.identity

    @pytest.mark.parametrize(
        "damage", ["cut", "noise", "missing", "lacks", "extra", "shape", "nan", "no config", "bad json", "schema", "field"]
    )
    def test_damaged_weights_are_refused_with_a_sentence(self, tmp_path: Path, damage: str) -> None:
        folder = self.folder(tmp_path / "a")
        file, config = folder / "model.safetensors", folder / "config.json"
        tensors = load_file(file)
        if damage == "cut":
            file.write_bytes(file.read_bytes()[:-100])
        elif damage == "noise":
            file.write_bytes(b"\x00" * 64)
        elif damage == "missing":
            file.unlink()
        elif damage == "lacks":
            save_file({k: v for k, v in tensors.items() if k != "offset.bias"}, file)
        elif damage == "extra":
            save_file({**tensors, "more": torch.zeros(1)}, file)
        elif damage == "shape":
            save_file({**tensors, "offset.bias": torch.zeros(2)}, file)
        elif damage == "nan":
            save_file({**tensors, "offset.bias": torch.full((1,), float("nan")).half()}, file)
        elif damage == "no config":
            config.unlink()
        elif damage == "bad json":
            config.write_text("{")
        elif damage == "schema":
            config.write_text(json.dumps({**json.loads(config.read_text()), "schema": 99}))
        else:
            loaded = json.loads(config.read_text())
            loaded["network"]["colour"] = 1
            config.write_text(json.dumps(loaded))
        with pytest.raises(WeightsError) as caught:
            load(source=folder)
        assert str(caught.value).endswith(".")
        assert "Traceback" not in str(caught.value)

    @needs_weights
    def test_shipped_files_are_small_and_documented(self, shipped: NanoSegmenter) -> None:
        assert (SHIPPED / "model.safetensors").stat().st_size < 8_000_000
        card = (SHIPPED / "MODEL_CARD.md").read_text()
        assert all(word in card for word in ("licence", "Not for clinical use", "automatic", "train_nano_segmenter.py"))
        assert set(shipped.vocabulary) < set(CANONICAL)
        assert not {"pancreas", "spleen", "urinary bladder", "left amygdala"} & set(shipped.vocabulary)  # asked for, never learnt

    @needs_weights
    def test_a_cut_copy_of_the_shipped_weights_is_refused(self, tmp_path: Path) -> None:
        shutil.copy(SHIPPED / "config.json", tmp_path)
        (tmp_path / "model.safetensors").write_bytes((SHIPPED / "model.safetensors").read_bytes()[:1_000_000])
        with pytest.raises(WeightsError, match="damaged"):
            load(source=tmp_path)


@needs_weights
class TestLearnt:
    def test_lungs_of_a_new_phantom(self, shipped: NanoSegmenter, chest: Phantom) -> None:
        found = shipped.segment(volume_of(chest), [Prompt(text="left lung"), Prompt(text="right lung")])
        for name, result in zip(("left lung", "right lung"), found, strict=True):
            assert result.status == "ok"
            assert result.mask is not None
            assert dice(result.mask.array, chest.mask(name)) > 0.85

    def test_words_for_one_thing_give_nearly_one_mask(self, shipped: NanoSegmenter, chest: Phantom) -> None:
        texts = ("left lung", "LEFT LUNG", "lt lung", "left lnug")
        found = shipped.segment(volume_of(chest), [Prompt(text=text) for text in texts])
        for result in found:
            assert result.mask is not None
            assert dice(result.mask.array, chest.mask("left lung")) > 0.8

    def test_a_mirrored_scan_swaps_the_sides(self, shipped: NanoSegmenter, chest: Phantom) -> None:
        array = np.ascontiguousarray(chest.array_zyx[:, :, ::-1])
        mirrored = Volume(array, volume_of(chest).grid, "CT")
        left = shipped.segment(mirrored, [Prompt(text="left lung")])[0]
        assert left.mask is not None
        array = left.mask.array[:, :, ::-1]
        assert (array & chest.mask("right lung")).sum() > 4 * (array & chest.mask("left lung")).sum()

    def test_the_same_scan_stored_mirrored_keeps_its_sides(self, shipped: NanoSegmenter, chest: Phantom) -> None:
        """Array order and affine both reversed along x: the same patient, so the same mask in world space."""
        affine = chest.affine.copy()
        affine[:3, 3] += affine[:3, 0] * (chest.array_zyx.shape[2] - 1)
        affine[:3, 0] *= -1
        array = np.ascontiguousarray(chest.array_zyx[:, :, ::-1])
        stored = Volume(array, Grid(volume_of(chest).grid.shape_zyx, affine), "CT")
        one = shipped.segment(volume_of(chest), [Prompt(text="left lung")])[0]
        other = shipped.segment(stored, [Prompt(text="left lung")])[0]
        assert one.mask is not None
        assert other.mask is not None
        assert dice(one.mask.array, other.mask.array[:, :, ::-1]) > 0.98

    def test_presence_of_the_absent_is_low(self, shipped: NanoSegmenter, chest: Phantom) -> None:
        absent = [Prompt(text=text) for text in ("hippocampus", "left putamen", "zubado", "bicycle")]
        for result in shipped.segment(volume_of(chest), absent):
            assert result.status == "empty"
            assert result.presence is not None
            assert result.presence < 0.5
            assert result.mask is not None
            assert not result.mask.array.any()
            assert result.message

    def test_nearest_names(self, shipped: NanoSegmenter) -> None:
        for text, name in (
            ("lft lung", "left lung"),
            ("rt kidney", "right kidney"),
            ("spine", "vertebral column"),
            ("hepar", "liver"),
            ("livr", "liver"),
        ):
            assert shipped.nearest(text)[0] == name
