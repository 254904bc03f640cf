"""nnU-Net folders behind the seam: the contract, the same masks as nnU-Net itself, one inference per case, and what is refused."""

from __future__ import annotations

import gc
import json
import pickle
import socket
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_nnunet
from segmenter_contract import SegmenterContract, blob, scene

from seerseg.errors import MissingExtraError, ModelError, SegmenterError, UsageError, WeightsError
from seerseg.prompts import Prompt
from seerseg.segmenters import load_segmenter
from seerseg.segmenters.base import Segmenter
from seerseg.volume import Volume, read_labels, read_volume

LABELS = {"background": 0, "lung_left": 1, "lung_right": 2, "liver": 3}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with random weights and two folds."""
    return tiny_nnunet.folder(tmp_path_factory.mktemp("nnunet") / "model", LABELS, folds=(0, 1))


@pytest.fixture(scope="module")
def bright(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that has learnt that "liver" is bright."""
    return tiny_nnunet.folder(tmp_path_factory.mktemp("nnunet") / "bright", {"background": 0, "liver": 1}, taught=True)


def ask(segmenter: Segmenter, volume: Volume, *texts: str) -> list[Any]:
    return segmenter.segment(volume, [Prompt(text=text) for text in texts])


class TestContract(SegmenterContract):
    texts = ("lungs", "right lung")
    examples = 5

    @pytest.fixture(scope="class")
    @classmethod
    def segmenter(cls, trained: Path) -> Segmenter:
        return load_segmenter(f"nnunet:{trained}?folds=0")


# ------------------------------------------------------------------------------------------------------------- names


def test_the_classes_are_a_closed_vocabulary_of_canonical_names(trained: Path) -> None:
    segmenter = load_segmenter(trained)
    assert segmenter.capabilities.text == "closed"
    assert segmenter.capabilities.vocabulary == ("left lung", "right lung", "liver")
    assert segmenter.capabilities.kinds == ("text", "class")
    assert segmenter.capabilities.modalities == ("MR",)
    assert "folds 0, 1" in segmenter.card.notes


def test_a_pair_is_the_union_of_its_sides_and_every_spelling_is_one_class(trained: Path) -> None:
    segmenter = load_segmenter(trained)
    left, right, pair, lung, own, class_ = segmenter.segment(
        scene(), [*(Prompt(text=t) for t in ("left lung", "lung right", "lungs", "lung", "lung_left")), Prompt(class_name="left lung")]
    )
    assert (pair.mask.array == left.mask.array | right.mask.array).all()
    assert not (left.mask.array & right.mask.array).any()
    assert (lung.mask.array == pair.mask.array).all()
    assert lung.mask.name == "lungs"
    assert (own.mask.array == left.mask.array).all()
    assert (class_.mask.array == left.mask.array).all()


def test_an_unknown_class_is_said_and_a_lone_side_is_no_pair(trained: Path, tmp_path: Path) -> None:
    found = ask(load_segmenter(trained), scene(), "spleen")[0]
    assert found.status == "unsupported"
    assert found.mask is None
    assert "spleen" in found.message
    assert found.nearest
    lone = load_segmenter(tiny_nnunet.folder(tmp_path / "lone", {"background": 0, "kidney_left": 1}))
    assert [s.status for s in ask(lone, scene(), "kidney", "kidneys", "right kidney")] == ["unsupported"] * 3
    assert ask(lone, scene(), "kidney")[0].nearest[0] == "left kidney"
    assert ask(lone, scene(), "left renal")[0].status in ("ok", "empty")


def test_label_descriptions_name_the_classes(tmp_path: Path) -> None:
    folder = tiny_nnunet.folder(tmp_path / "model", {"background": 0, "Anterior": 1, "Posterior": 2})
    assert load_segmenter(folder).capabilities.vocabulary == ("Anterior", "Posterior")
    told = {"Anterior": {"canonical": "anterior hippocampus", "synonyms": ["hippocampal head"]}, "Posterior": "posterior hippocampus"}
    (folder / "label_descriptions.json").write_text(json.dumps(told))
    segmenter = load_segmenter(folder)
    assert segmenter.capabilities.vocabulary == ("anterior hippocampus", "posterior hippocampus")
    a, b, c = ask(segmenter, scene(), "anterior hippocampus", "Anterior", "hippocampal head")
    assert (a.mask.array == b.mask.array).all()
    assert (a.mask.array == c.mask.array).all()
    (folder / "label_descriptions.json").write_text(json.dumps({"Lateral": "x"}))
    with pytest.raises(ModelError, match=r"Lateral.*Anterior"):
        load_segmenter(folder)


def test_regions_are_the_labels_that_they_hold(tmp_path: Path) -> None:
    labels = {"background": 0, "whole tumour": [1, 2], "enhancing tumour": [2]}
    segmenter = load_segmenter(tiny_nnunet.folder(tmp_path / "model", labels, regions=[1, 2]))
    whole, core = ask(segmenter, scene(), "whole tumour", "enhancing tumour")
    assert (core.mask.array & ~whole.mask.array).sum() == 0
    assert core.mask.array.sum() < whole.mask.array.sum()


# ------------------------------------------------------------------------------------------------------------- one inference


def test_several_requests_cost_one_inference(trained: Path) -> None:
    import torch

    segmenter = load_segmenter(f"nnunet:{trained}?folds=0")
    passes = []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, given, made: passes.append(type(module).__name__))
    try:
        first = ask(segmenter, scene(), "left lung", "liver", "lungs")
        once = passes.count("PlainConvUNet")
        again = ask(segmenter, scene(), "right lung", "liver")
        assert once > 0
        assert passes.count("PlainConvUNet") == once
        ask(segmenter, scene("oblique"), "liver")
        assert passes.count("PlainConvUNet") == 2 * once
    finally:
        hook.remove()
    assert (first[1].mask.array == again[1].mask.array).all()
    assert first[1].mask.array is not again[1].mask.array


# ------------------------------------------------------------------------------------------------------------- geometry


def nnunets_own(folder: Path, image: Path, out: Path) -> Path:
    """What nnU-Net itself writes for a file, from its own loading on."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(use_mirroring=False, perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), (0,))
    reader = predictor.plans_manager.image_reader_writer_class()
    array, properties = reader.read_images([str(image)])
    reader.write_seg(predictor.predict_single_npy_array(array, dict(properties)), str(out), properties)
    return out


def stored_as(volume: Volume, code: str, path: Path) -> Path:
    """The volume's file with its axes turned to `code`."""
    import nibabel
    from nibabel.orientations import axcodes2ornt

    image = nibabel.Nifti1Image(volume.array.T, volume.grid.affine)
    nibabel.save(image.as_reoriented(nibabel.orientations.ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(code))), path)
    return path


@pytest.mark.parametrize(("code", "kind", "reader"), [("LPS", "oblique", "SimpleITKIO"), ("PIR", "anisotropic", "NibabelIOWithReorient")])
def test_the_masks_are_those_of_nnunet_itself(tmp_path: Path, code: str, kind: str, reader: str) -> None:
    folder = tiny_nnunet.folder(tmp_path / "model", LABELS, reader=reader, residual=reader == "SimpleITKIO")
    image = stored_as(scene(kind), code, tmp_path / "image.nii.gz")
    volume = read_volume(image)
    theirs, _ = read_labels(nnunets_own(folder, image, tmp_path / "mask.nii.gz"), like=volume.grid)
    left, right, liver = ask(load_segmenter(folder), volume, "left lung", "right lung", "liver")
    ours = left.mask.array * 1 + right.mask.array * 2 + liver.mask.array * 3
    assert (ours == theirs).all()
    assert len(np.unique(ours)) > 2


def test_left_is_left_however_the_file_lies(bright: Path, tmp_path: Path) -> None:
    segmenter = load_segmenter(bright)
    volume = scene(dtype="float32")
    for code in ("RAS", "LPS"):
        found = ask(segmenter, read_volume(stored_as(volume, code, tmp_path / f"{code}.nii.gz")), "liver")[0].mask
        assert 2 * (found.array & blob()).sum() > 0.8 * (found.array.sum() + blob().sum()), code
        assert found.centroid_mm[0] < volume.grid.to_world(np.array([10, 17, 20]))[0]
    mirror = Volume(volume.array[:, :, ::-1].copy(), volume.grid, modality="MR")
    assert ask(segmenter, mirror, "liver")[0].mask.centroid_mm[0] > volume.grid.to_world(np.array([10, 17, 20]))[0]


def test_the_orientation_of_the_training_images_can_be_said(trained: Path, tmp_path: Path) -> None:
    volume = read_volume(stored_as(scene(), "LPS", tmp_path / "image.nii.gz"))
    ras, lps = (load_segmenter(f"nnunet:{trained}?folds=0&orientation={code}") for code in ("RAS", "lps"))
    stored = load_segmenter(f"nnunet:{trained}?folds=0")
    assert (ask(stored, volume, "liver")[0].mask.array == ask(lps, volume, "liver")[0].mask.array).all()
    assert (ask(stored, scene(), "liver")[0].mask.array == ask(ras, volume, "liver")[0].mask.array).all()
    assert len({s.card.identity for s in (ras, lps, stored)}) == 3


def test_a_2d_configuration_takes_volumes_and_single_slices(tmp_path: Path) -> None:
    segmenter = load_segmenter(tiny_nnunet.folder(tmp_path / "model", LABELS, patch=(16, 16)))
    for shape in ((1, 40, 44), (6, 40, 44)):
        found = ask(segmenter, scene(shape=shape), "liver", "lungs")
        assert all(f.status in ("ok", "empty") and f.mask.array.shape == shape for f in found)


# ------------------------------------------------------------------------------------------------------------- channels, options


def test_every_channel_is_needed(tmp_path: Path) -> None:
    folder = tiny_nnunet.folder(tmp_path / "model", LABELS, channels=("T1", "FLAIR"))
    segmenter = load_segmenter(folder)
    found = ask(segmenter, scene(), "liver")[0]
    assert found.status == "unsupported"
    assert "2 channels (T1, FLAIR) and was given 1" in found.message
    both = segmenter.segment_channels([scene(), scene()], [Prompt(text="liver")])[0]  # type: ignore[attr-defined]
    assert both.status in ("ok", "empty")
    with pytest.raises(SegmenterError, match="different grids"):
        segmenter.segment_channels([scene(), scene("oblique")], [Prompt(text="liver")])  # type: ignore[attr-defined]


def test_folds_and_mirroring_change_masks_and_identity(trained: Path) -> None:
    sources = ("folds=0", "folds=1", "folds=0,1", "folds=0&tta=on", "folds=0&step=1")
    made = [load_segmenter(f"nnunet:{trained}?{source}") for source in sources]
    masks = [ask(segmenter, scene(), "liver")[0].mask.array for segmenter in made]
    assert len({segmenter.card.identity for segmenter in made}) == len(made)
    assert all((masks[0] != other).any() for other in masks[1:4])
    assert load_segmenter(f"nnunet:{trained}?folds=0&tta=off").card.identity != made[3].card.identity


@pytest.mark.parametrize("option", ["folds=x", "tta=perhaps", "step=2", "orientation=RAR", "checkpoint=../x.pth", "fold=0", "tta"])
def test_options_that_do_not_exist_are_refused(trained: Path, option: str) -> None:
    with pytest.raises(UsageError, match=r"option .*\."):
        load_segmenter(f"nnunet:{trained}?{option}")


# ------------------------------------------------------------------------------------------------------------- bad folders


def test_folders_that_are_no_model_say_what_to_give(trained: Path, tmp_path: Path) -> None:
    for given, said in (
        (tmp_path, "no trained nnU-Net v2 folder"),
        (tmp_path / "nowhere", "does not exist"),
        (trained.parent, f"name one of them: {trained}"),
        (trained / "fold_0", r"folds=0"),
    ):
        with pytest.raises(ModelError, match=said):
            load_segmenter(f"nnunet:{given}")
    with pytest.raises(UsageError, match="nnunet:FOLDER"):
        load_segmenter("nnunet")
    with pytest.raises(WeightsError, match=r"fold_3.*checkpoint_final"):
        load_segmenter(f"nnunet:{trained}?folds=3")
    with pytest.raises(WeightsError, match="checkpoint_best"):
        load_segmenter(f"nnunet:{trained}?checkpoint=checkpoint_best.pth")


def _copied(trained: Path, path: Path) -> Path:
    (path / "fold_0").mkdir(parents=True)
    for name in ("plans.json", "dataset.json", "fold_0/checkpoint_final.pth"):
        (path / name).write_bytes((trained / name).read_bytes())
    return path


def _changed(trained: Path, path: Path, name: str, change: Any) -> Path:
    _copied(trained, path)
    data = json.loads((path / name).read_text())
    change(data)
    (path / name).write_text(json.dumps(data))
    return path


def test_plans_that_name_other_code_or_another_network_are_refused(trained: Path, tmp_path: Path) -> None:
    def architecture(data: dict[str, Any]) -> dict[str, Any]:
        return data["configurations"]["tiny"]["architecture"]

    def hostile(data: dict[str, Any]) -> None:
        architecture(data)["network_class_name"] = "os.system"

    def wider(data: dict[str, Any]) -> None:
        architecture(data)["arch_kwargs"]["features_per_stage"] = [4, 16]

    def cascade(data: dict[str, Any]) -> None:
        data["configurations"]["tiny"]["previous_stage"] = "3d_lowres"

    def renamed(data: dict[str, Any]) -> None:
        data["configurations"] = {"3d_fullres": data["configurations"]["tiny"]}

    def broken(data: dict[str, Any]) -> None:
        del architecture(data)["arch_kwargs"]["strides"]

    for number, (change, said) in enumerate(
        (
            (hostile, "os.system"),
            (wider, "fold 0.*missing, unexpected or of another shape"),
            (cascade, "second stage"),
            (renamed, "'tiny'"),
            (broken, "strides"),
        )
    ):
        with pytest.raises(ModelError, match=said):
            load_segmenter(_changed(trained, tmp_path / str(number), "plans.json", change))
    with pytest.raises(WeightsError, match="missing, unexpected or of another shape"):
        load_segmenter(_changed(trained, tmp_path / "more", "dataset.json", lambda data: data["labels"].update(spleen=4)))
    with pytest.raises(ModelError, match="labels"):
        load_segmenter(_changed(trained, tmp_path / "none", "dataset.json", lambda data: data.pop("labels")))


def test_damaged_checkpoints_are_refused(trained: Path, tmp_path: Path) -> None:
    import torch

    whole = (trained / "fold_0" / "checkpoint_final.pth").read_bytes()
    for number, content in enumerate((b"", b"not a checkpoint", whole[: len(whole) // 2], whole[:-30])):
        path = _copied(trained, tmp_path / str(number))
        (path / "fold_0" / "checkpoint_final.pth").write_bytes(content)
        with pytest.raises(WeightsError, match=r"checkpoint_final\.pth is damaged, cut short or no checkpoint"):
            load_segmenter(path)
    path = _copied(trained, tmp_path / "infinite")
    held = torch.load(path / "fold_0" / "checkpoint_final.pth", weights_only=False)
    held["network_weights"] = {name: value * float("nan") for name, value in held["network_weights"].items()}
    torch.save(held, path / "fold_0" / "checkpoint_final.pth")
    with pytest.raises(WeightsError, match="not finite"):
        load_segmenter(path)
    torch.save({"state_dict": {}}, path / "fold_0" / "checkpoint_final.pth")
    with pytest.raises(WeightsError, match="no 'network_weights'"):
        load_segmenter(path)


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.path, "ran"))


def test_code_in_a_checkpoint_does_not_run(trained: Path, tmp_path: Path) -> None:
    import torch

    path = _copied(trained, tmp_path / "model")
    checkpoint = path / "fold_0" / "checkpoint_final.pth"
    held = torch.load(checkpoint, weights_only=False)
    torch.save({**held, "logging": Hostile(tmp_path / "ran")}, checkpoint)
    with pytest.raises(WeightsError, match="objects or code beside weights"):
        load_segmenter(path)
    checkpoint.write_bytes(pickle.dumps(Hostile(tmp_path / "ran")))
    with pytest.raises(WeightsError):
        load_segmenter(path)
    assert not (tmp_path / "ran").exists()
    torch.load(_hostile_again(tmp_path), weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have


def _hostile_again(tmp_path: Path) -> Path:
    import torch

    torch.save(Hostile(tmp_path / "ran"), tmp_path / "hostile.pth")
    return tmp_path / "hostile.pth"


# ------------------------------------------------------------------------------------------------------------- offline, memory


def test_no_socket_is_opened_and_memory_returns(trained: Path) -> None:
    made: list[Any] = []
    original = socket.socket.connect
    socket.socket.connect = lambda self, *a: made.append(a) or original(self, *a)  # type: ignore[method-assign,assignment]
    try:
        segmenter: Any = load_segmenter(trained)
        ask(segmenter, scene(), "liver")
    finally:
        socket.socket.connect = original  # type: ignore[method-assign]
    assert made == []
    network = weakref.ref(next(iter(segmenter._predictor.network.parameters())))
    predictor = weakref.ref(segmenter._predictor)
    segmenter.unload()
    gc.collect()
    assert network() is None
    assert predictor() is None
    with pytest.raises(SegmenterError, match="unloaded"):
        ask(segmenter, scene(), "liver")
    segmenter.unload()


def test_other_devices_and_types_are_sentences(trained: Path) -> None:
    for device in ("nowhere", "cpu:x"):
        with pytest.raises(UsageError, match="no device"):
            load_segmenter(trained, device=device)
    with pytest.raises(UsageError, match="bfloat16"):
        load_segmenter(trained, dtype="bfloat16")


def test_without_the_package_the_command_that_installs_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = {"background": 0, "liver": 1}
    (tmp_path / "fold_0").mkdir()
    (tmp_path / "fold_0" / "checkpoint_final.pth").write_bytes(b"")
    (tmp_path / "plans.json").write_text(json.dumps(tiny_nnunet.plans()))
    (tmp_path / "dataset.json").write_text(json.dumps(tiny_nnunet.dataset(labels)))
    monkeypatch.setitem(sys.modules, "nnunetv2", None)
    with pytest.raises(MissingExtraError, match=r"pip install .*--no-deps nnunetv2"):
        load_segmenter(tmp_path)


# ------------------------------------------------------------------------------------------------------------- the command


def test_free_text_through_the_command_line(bright: Path, tmp_path: Path) -> None:
    import nibabel
    from click.testing import CliRunner

    from seerseg.cli.predict import predict

    (tmp_path / "images").mkdir()
    for number, kind in enumerate(("plain", "oblique")):
        stored_as(scene(kind), "LPS", tmp_path / "images" / f"case_{number}_0000.nii.gz")
    arguments = ["-i", tmp_path / "images", "-o", tmp_path / "out", "--segmenter", f"nnunet:{bright}", "--modality", "MR", "--per_request"]
    prompts = ["--prompt", "plz outline the lver", "--prompt", "spleen"]
    made = CliRunner().invoke(predict, [str(a) for a in (*arguments, *prompts)], catch_exceptions=False)
    assert "Traceback" not in made.output
    for number in range(2):
        record = json.loads((tmp_path / "out" / f"case_{number}.json").read_text())
        liver, spleen = sorted(record["requests"], key=lambda one: one["text"])
        assert (liver["status"], liver["target_answered"]) == ("ok", "liver"), made.output
        assert spleen["status"] != "ok"
        scan, mask = (nibabel.load(tmp_path / place) for place in (f"images/case_{number}_0000.nii.gz", f"out/case_{number}.nii.gz"))
        np.testing.assert_array_equal(scan.affine, mask.affine)
        truth = nibabel.load(stored_as(Volume(blob().astype(np.uint8), scene().grid), "LPS", tmp_path / "truth.nii.gz")).get_fdata() > 0
        drawn = mask.get_fdata() > 0
        assert 2 * (truth & drawn).sum() > 0.8 * (truth.sum() + drawn.sum())
