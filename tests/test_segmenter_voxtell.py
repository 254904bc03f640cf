"""VoxTell behind the seam: the contract, the same masks as VoxTell's own command, bank and encoder, memory, and what is refused."""

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
import tiny_voxtell
from click.testing import CliRunner
from segmenter_contract import SegmenterContract, blob, scene

from seerseg.errors import MissingExtraError, ModelError, SegmenterError, UsageError, WeightsError
from seerseg.prompts import Prompt
from seerseg.segmenters import load_segmenter
from seerseg.segmenters.base import Segmenter
from seerseg.segmenters.voxtell import OFFERED, Bank, VoxTellSegmenter
from seerseg.volume import Grid, Volume, read_labels, read_volume

TEXTS = ("liver", "left kidney", "tumor in the left lung")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with random weights and a bank of five texts."""
    return tiny_voxtell.folder(tmp_path_factory.mktemp("voxtell") / "model")


@pytest.fixture(scope="module")
def segmenter(model: Path) -> Any:
    return load_segmenter(model, accept_license=True)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_voxtell.encoder(tmp_path_factory.mktemp("voxtell") / "encoder")


def ask(segmenter: Segmenter, volume: Volume, *texts: str) -> list[Any]:
    return segmenter.segment(volume, [Prompt(text=text) for text in texts])


class TestContract(SegmenterContract):
    texts = ("tumor in the left lung",)
    examples = 3

    @pytest.fixture(scope="class")
    @classmethod
    def segmenter(cls, model: Path) -> Segmenter:
        return load_segmenter(f"voxtell:{model}", accept_license=True)


# ------------------------------------------------------------------------------------------------------------- VoxTell itself


def stored_as(volume: Volume, code: str, path: Path) -> Path:
    """The volume's file with its axes turned to `code`."""
    import nibabel
    from nibabel.orientations import axcodes2ornt, ornt_transform

    image = nibabel.Nifti1Image(volume.array.T, volume.grid.affine)
    nibabel.save(image.as_reoriented(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(code))), path)
    return path


def framed(kind: str) -> Volume:
    """The contract's scene in a frame of zeros, with a hole of zeros in it."""
    volume = scene(kind)
    array = volume.array.copy()
    array[:2], array[:, -3:], array[:, :, :5], array[6:9, 7:11, 20:26] = 0, 0, 0, 0
    return Volume(array, volume.grid, modality="CT", name=kind)


def test_the_masks_are_those_of_voxtell_s_own_command(segmenter: Segmenter, model: Path, tmp_path: Path) -> None:
    kinds = {"oblique": "LPS", "anisotropic": "PIR"}
    images = [stored_as(framed(kind), code, tmp_path / f"{kind}.nii.gz") for kind, code in kinds.items()]
    arguments = ["-i", *map(str, images), "-o", str(tmp_path / "out"), "-m", str(model), "-p", *TEXTS]
    assert tiny_voxtell.run_command([*arguments, "--embeddings", str(model / "text_embeddings.npz")]) == 0
    for image in images:
        volume = read_volume(image)
        for text, found in zip(TEXTS, ask(segmenter, volume, *TEXTS), strict=True):
            name = image.name.replace(".nii.gz", f"_{text.replace(' ', '_')}.nii.gz")
            theirs, _ = read_labels(tmp_path / "out" / name, like=volume.grid)
            assert (found.mask.array == (theirs > 0)).all(), (image.name, text)
            assert 0 < found.mask.array.sum() < found.mask.array.size
            scan, back = read_volume(image), read_volume(tmp_path / "out" / name)
            assert back.grid.close_to(scan.grid)


def test_crop_and_normalisation_are_voxtell_s(model: Path) -> None:
    from seerseg.segmenters.checkpoints import finite
    from seerseg.segmenters.voxtell_network import normalised_crop

    theirs = tiny_voxtell.their_predictor(model)
    array = framed("plain").array
    tensor, box, _ = theirs.preprocess(array)
    ours, place = normalised_crop(finite(array))
    assert [(s.start, s.stop) for s in place] == [tuple(side) for side in box]
    assert (ours == tensor[0].numpy()).all()


def test_what_the_predictor_fixes_is_read_from_the_published_weights_sizes() -> None:
    tiny_voxtell.needed()
    import pydoc

    import torch
    from voxtell.model.voxtell_model import VoxTellModel

    from seerseg.segmenters.voxtell_network import Dimensions, _decoder

    plans = tiny_voxtell.plans((32, 64, 128, 256, 320, 320), (192, 192, 192))
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    arguments = dict(architecture["arch_kwargs"])
    for key in architecture["_kw_requires_import"]:
        arguments[key] = pydoc.locate(arguments[key]) if arguments[key] else None
    with torch.device("meta"):
        network = VoxTellModel(
            1, **arguments, decoder_layer=4, text_embedding_dim=2560, num_maskformer_stages=5, num_heads=32, query_dim=2048,
            project_to_decoder_hidden_dim=2048, deep_supervision=False,
        )  # fmt: skip
    sizes = Dimensions.read(plans, network.state_dict(), Path("published"))
    assert (sizes.text, sizes.query, sizes.hidden, sizes.stages, sizes.heads, sizes.layer) == (2560, 2048, 2048, 5, 32, 4)
    assert _decoder(sizes) == VoxTellModel.DECODER_CONFIGS


# ------------------------------------------------------------------------------------------------------------- words


def test_the_bank_is_the_vocabulary_and_more_is_said_to_be_unknown(segmenter: Segmenter) -> None:
    able = segmenter.capabilities
    assert able.text == "closed"
    assert able.vocabulary == ("liver", "left kidney", "right kidney", "spleen", "tumor in the left lung")
    assert able.probabilities
    left, right, pair, odd, unknown = ask(segmenter, scene(), "Left  Kidney", "kidney, right", "kidneys", "SPLEEN", "left ventricle")
    assert (pair.mask.array == left.mask.array | right.mask.array).all()
    assert odd.status == "ok"
    assert unknown.status == "unsupported"
    assert "'left ventricle'" in unknown.message
    assert "left kidney" in unknown.nearest


def test_a_bank_lets_the_encoder_sleep_and_free_text_wakes_it(segmenter: Segmenter, model: Path, encoder: Path) -> None:
    import torch

    free = load_segmenter(f"voxtell:{model}?encoder={encoder}", accept_license=True)
    assert isinstance(free, VoxTellSegmenter)
    assert free.capabilities.text == "open"
    assert free.card.identity != segmenter.card.identity
    volume = framed("plain")
    assert (ask(free, volume, "Liver")[0].mask.array == ask(segmenter, volume, "liver")[0].mask.array).all()
    assert not free.encoder_loaded
    heart, lung, again = ask(free, volume, "the heart", "left lung", "The HEART")
    assert free.encoder_loaded
    assert (heart.mask.array == again.mask.array).all()
    assert (ask(free, volume, "the heart")[0].mask.array == heart.mask.array).all()
    theirs = tiny_voxtell.their_predictor(model, bank=model / "text_embeddings.npz", encoder=encoder)
    assert torch.equal(theirs.embed_text_prompts("the heart")[0, 0], free._embed(["the heart"])[0])
    for text, found in (("The heart", heart), ("left lung", lung)):
        assert (theirs.predict_single_image(volume.array, text_prompts=text)[0] == found.mask.array).all(), text


def test_of_a_large_bank_only_known_structures_are_offered(tmp_path: Path) -> None:
    labels = [f"finding number {i}" for i in range(OFFERED)] + ["Liver", "left kidney", "right renal", "stomach"]
    bank = Bank.read(tiny_voxtell.write_bank(tmp_path / "bank.npz", labels))
    assert len(bank.labels) == len(labels)
    assert bank.names().single.keys() >= {"liver", "left kidney", "stomach"}
    assert len(bank.names().names) < 10
    model = tiny_voxtell.folder(tmp_path / "model", labels=labels)
    segmenter = load_segmenter(model, accept_license=True)
    assert segmenter.capabilities.text == "open"
    assert [f.status == "unsupported" for f in ask(segmenter, scene(), "finding number 7", "stomach", "gastric tube")] == [
        False,
        False,
        True,
    ]


def test_damaged_banks_are_sentences(model: Path, tmp_path: Path) -> None:
    numbers = np.zeros((2, 4), np.float16)
    path = tmp_path / "bank.npz"
    for held, said in (
        ({"labels": np.array(["a", None], dtype=object), "embeddings": numbers}, "no embedding bank"),
        ({"labels": np.array(["a"]), "embeddings": numbers}, "labels"),
        ({"labels": np.array(["a", "b"])}, "embeddings"),
        ({"labels": np.array(["a", "b"]), "embeddings": numbers * np.nan}, "not finite"),
    ):
        np.savez(path, **held)
        with pytest.raises(WeightsError, match=said):
            Bank.read(path)
    path.write_bytes(b"PK not a zip")
    with pytest.raises(WeightsError, match="no embedding bank"):
        Bank.read(path)
    np.savez(path, labels=np.array(["a", "b"]), embeddings=numbers)
    with pytest.raises(WeightsError, match="4 numbers per text"):
        load_segmenter(f"voxtell:{model}?bank={path}", accept_license=True)
    with pytest.raises(WeightsError, match="no embedding bank /nowhere"):
        load_segmenter(f"voxtell:{model}?bank=/nowhere.npz", accept_license=True)
    with pytest.raises(WeightsError, match="nothing can be asked"):
        load_segmenter(f"voxtell:{model}?bank=off", accept_license=True)


def test_an_encoder_that_does_not_fit_is_a_sentence(model: Path, encoder: Path, tmp_path: Path) -> None:
    wide = load_segmenter(f"voxtell:{model}?encoder={tiny_voxtell.encoder(tmp_path / 'wide', size=32)}", accept_license=True)
    with pytest.raises(ModelError, match="gives 32 numbers"):
        ask(wide, scene(), "heart")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((encoder / name).read_bytes())
    with pytest.raises(WeightsError, match="lacks config"):
        load_segmenter(f"voxtell:{model}?encoder={tmp_path}", accept_license=True)
    (tmp_path / "model.safetensors").write_bytes((encoder / "model.safetensors").read_bytes()[:3000])
    cut = load_segmenter(f"voxtell:{model}?encoder={tmp_path}", accept_license=True)
    with pytest.raises(WeightsError, match=r"damaged|cannot be loaded"):
        ask(cut, scene(), "heart")
    assert ask(cut, scene(), "liver")[0].status == "ok"


# ------------------------------------------------------------------------------------------------------------- one pass, memory


def test_prompts_share_one_pass_and_memory_divides_them_without_changing_masks(model: Path) -> None:
    made = VoxTellSegmenter(model, bank=Bank.read(model / "text_embeddings.npz"), encoder=None)
    passes: list[int] = []
    made._network.encoder.register_forward_hook(lambda module, given, out: passes.append(1))
    volume = scene()
    alone = ask(made, volume, "liver")[0].mask.array
    once = len(passes)
    together = [found.mask.array for found in ask(made, volume, *TEXTS, "liver")]
    assert len(passes) == 2 * once
    assert together[0] is not together[3]
    made.sums_bytes = 1
    passes.clear()
    apart = [found.mask.array for found in ask(made, volume, *TEXTS, "liver")]
    assert len(passes) == 3 * once
    assert (together[0] == alone).all()
    assert all((a == b).all() for a, b in zip(together, apart, strict=True))


def test_sums_are_held_for_a_slab_however_deep_the_scan_is(model: Path) -> None:
    from seerseg.segmenters.voxtell_network import Window

    window = Window(tiny_voxtell.PATCH, 0.5, "cpu", "cpu")
    assert window.bytes_per_prompt((4000, 50, 60)) == window.bytes_per_prompt((20, 50, 60)) == 2 * 16 * 50 * 60


def test_probabilities_are_above_a_half_where_the_mask_is(segmenter: VoxTellSegmenter) -> None:
    volume = framed("anisotropic")
    prompts = [Prompt(text="liver"), Prompt(text="nothing known"), Prompt(text="kidneys")]
    fields = segmenter.probabilities(volume, prompts)
    masks = segmenter.segment(volume, prompts)
    assert fields[1] is None
    for field, found in ((fields[0], masks[0]), (fields[2], masks[2])):
        assert field is not None
        assert field.dtype == np.float16
        assert ((field > 0.5) == found.mask.array).all()  # type: ignore[union-attr]
        assert 0 <= field.min() < field.max() <= 1
        assert not field[:2].any()


def test_left_is_left(tmp_path: Path) -> None:
    taught = load_segmenter(tiny_voxtell.folder(tmp_path / "taught", labels=("liver", "air"), taught=True), accept_license=True)
    volume = scene(dtype="float32")
    middle = volume.grid.to_world(np.array([10, 17, 20]))[0]
    for code in ("RAS", "LPS"):
        found = ask(taught, read_volume(stored_as(volume, code, tmp_path / f"{code}.nii.gz")), "liver")[0].mask
        assert 2 * (found.array & blob()).sum() > 0.6 * (found.array.sum() + blob().sum()), code
        assert found.centroid_mm[0] < middle
    mirror = Volume(volume.array[:, :, ::-1].copy(), volume.grid, modality="CT")
    assert ask(taught, mirror, "liver")[0].mask.centroid_mm[0] > middle


def test_a_scan_of_zeros_is_empty(segmenter: Segmenter) -> None:
    found = ask(segmenter, Volume(np.zeros((4, 5, 6), np.int16), Grid((4, 5, 6), np.eye(4))), "liver")[0]
    assert found.status == "empty"
    assert "0 everywhere" in found.message


def test_memory_returns(model: Path, encoder: Path) -> None:
    made: Any = load_segmenter(f"voxtell:{model}?encoder={encoder}", accept_license=True)
    ask(made, scene(), "liver", "the heart")
    weights = [weakref.ref(made._network.pos_embed), weakref.ref(next(made._encoder._model.parameters()))]
    made.unload()
    gc.collect()
    assert [ref() for ref in weights] == [None, None]
    with pytest.raises(SegmenterError, match="unloaded"):
        ask(made, scene(), "liver")
    made.unload()


# ------------------------------------------------------------------------------------------------------------- licence, hub


def test_the_licence_is_named_and_accepted_anew_every_time() -> None:
    for source in ("voxtell", "voxtell:mrokuss/VoxTell", "voxtell:/no/such/folder"):
        with pytest.raises(ModelError, match=r"VoxTell's weights are under .*CC BY-NC-SA 4\.0.*--accept_license"):
            load_segmenter(source)
    for source in ("medsam2", "medsam2:wanglab/MedSAM2/MedSAM2_latest.pt", "medsam2:/no/medsam2/folder"):
        with pytest.raises(ModelError, match=r"MedSAM2's weights are under .*research and education"):
            load_segmenter(source)


class _Network:
    """Whether a socket was opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Any] = []
        monkeypatch.setattr(socket.socket, "connect", lambda *given: self.calls.append(given))


def test_offline_opens_no_socket_and_says_what_to_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = _Network(monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for source, said in (
        ("voxtell", r"hf download mrokuss/VoxTell --include 'voxtell_v1\.1/\*'"),
        ("voxtell:somebody/Other/v2", r"hf download somebody/Other --include 'v2/\*'"),
    ):
        with pytest.raises(WeightsError, match=said):
            load_segmenter(source, accept_license=True)
    with pytest.raises(ModelError, match="no VoxTell folder"):
        load_segmenter("voxtell:/no/such/folder", accept_license=True)
    assert network.calls == []


def test_the_hub_s_cache_is_used_as_it_lies(model: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = _Network(monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for repository, place, source in (
        ("mrokuss--VoxTell", "voxtell_v1.1", model),
        ("mrokuss--VoxTell", "embeddings/voxtell_v1.1", model),
        ("Qwen--Qwen3-Embedding-4B", "", encoder),
    ):
        snapshot = tmp_path / f"models--{repository}" / "snapshots" / ("a" * 40)
        (tmp_path / f"models--{repository}" / "refs").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"models--{repository}" / "refs" / "main").write_text("a" * 40)
        (snapshot / place).mkdir(parents=True)
        for path in (p for p in source.rglob("*") if p.is_file()):
            if (path.suffix == ".npz") == place.startswith("embeddings"):
                target = snapshot / place / path.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(path.read_bytes())
    made = load_segmenter("voxtell", accept_license=True)
    assert made.capabilities.text == "open"
    assert made.capabilities.vocabulary[0] == "liver"
    assert [f.status for f in ask(made, scene(), "liver", "the heart")] != ["unsupported", "unsupported"]
    monkeypatch.setenv("VOXTELL_MODEL", str(model))
    assert load_segmenter("voxtell", accept_license=True).card.source == str(model)
    assert network.calls == []


# ------------------------------------------------------------------------------------------------------------- bad folders


def _changed(model: Path, path: Path, *, plans: Any = None, weights: Any = None, held: Any = None) -> Path:
    """A copy of the folder in which functions changed plans, weights, or everything that the checkpoint holds."""
    import torch

    (path / "fold_0").mkdir(parents=True)
    (path / "text_embeddings.npz").write_bytes((model / "text_embeddings.npz").read_bytes())
    read = json.loads((model / "plans.json").read_text())
    if plans is not None:
        plans(read["configurations"]["3d_fullres"])
    (path / "plans.json").write_text(json.dumps(read))
    content = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=True)
    if weights is not None:
        weights(content["network_weights"])
    torch.save(held(content) if held is not None else content, path / "fold_0" / "checkpoint_final.pth")
    return path


def test_folders_and_checkpoints_of_another_kind_are_refused(model: Path, tmp_path: Path) -> None:
    def narrow(configuration: Any) -> None:
        configuration["patch_size"] = [20, 32, 32]

    def hostile(configuration: Any) -> None:
        configuration["architecture"]["arch_kwargs"]["nonlin"] = "os.system"

    def wider(configuration: Any) -> None:
        configuration["architecture"]["arch_kwargs"]["features_per_stage"] = [4, 4, 8, 8, 16]

    def bare(configuration: Any) -> None:
        del configuration["architecture"]["arch_kwargs"]["strides"]

    def nan(weights: Any) -> None:
        weights["pos_embed"] = weights["pos_embed"] * float("nan")

    cases: list[tuple[dict[str, Any], str]] = [
        ({"plans": narrow}, "cannot halve"),
        ({"plans": hostile}, "os.system"),
        ({"plans": wider}, "1 entries|missing, unexpected"),
        ({"plans": bare}, "strides"),
        ({"weights": lambda weights: weights.pop("encoder.stem.convs.0.conv.weight")}, "first .*encoder.stem"),
        ({"weights": lambda weights: weights.update(extra=weights["pos_embed"])}, "first extra"),
        ({"weights": lambda weights: weights.pop("pos_embed")}, r"'pos_embed'.*nnunet:"),
        ({"weights": nan}, "not finite"),
        ({"held": lambda content: {"state_dict": content["network_weights"]}}, "no 'network_weights'"),
    ]
    for number, (change, said) in enumerate(cases):
        with pytest.raises(ModelError, match=said):
            load_segmenter(_changed(model, tmp_path / str(number), **change), accept_license=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="no VoxTell folder"):
        load_segmenter(f"voxtell:{tmp_path / 'empty'}", accept_license=True)
    (tmp_path / "0" / "fold_0" / "checkpoint_final.pth").unlink()
    with pytest.raises(WeightsError, match="has no fold_0"):
        load_segmenter(f"voxtell:{tmp_path / '0'}", accept_license=True)


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.path, "ran"))


def test_code_in_a_checkpoint_does_not_run_and_cut_ones_are_said(model: Path, tmp_path: Path) -> None:
    path = _changed(model, tmp_path / "model", held=lambda content: {**content, "logging": Hostile(tmp_path / "ran")})
    checkpoint = path / "fold_0" / "checkpoint_final.pth"
    with pytest.raises(WeightsError, match="objects or code beside weights"):
        load_segmenter(path, accept_license=True)
    checkpoint.write_bytes(pickle.dumps(Hostile(tmp_path / "ran")))
    with pytest.raises(WeightsError):
        load_segmenter(path, accept_license=True)
    assert not (tmp_path / "ran").exists()
    checkpoint.write_bytes((model / "fold_0" / "checkpoint_final.pth").read_bytes()[:9000])
    with pytest.raises(WeightsError, match="damaged, cut short"):
        load_segmenter(path, accept_license=True)


def test_options_devices_and_types_are_sentences(model: Path) -> None:
    for option in ("step=2", "step=x", "folds=0", "bank"):
        with pytest.raises(UsageError, match=r"option .*\."):
            load_segmenter(f"voxtell:{model}?{option}", accept_license=True)
    with pytest.raises(UsageError, match="bfloat16"):
        load_segmenter(model, dtype="bfloat16", accept_license=True)
    with pytest.raises(UsageError, match="no device"):
        load_segmenter(model, device="nowhere", accept_license=True)


def test_without_the_package_the_command_that_installs_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fold_0").mkdir()
    (tmp_path / "fold_0" / "checkpoint_final.pth").write_bytes(b"")
    (tmp_path / "plans.json").write_text("{}")
    for name in ("voxtell", "voxtell.model.voxtell_model"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"pip install .*--no-deps voxtell"):
        load_segmenter(tmp_path, accept_license=True)


# ------------------------------------------------------------------------------------------------------------- the command


def test_free_text_through_the_command_line(model: Path, tmp_path: Path) -> None:
    import nibabel

    from seerseg.cli.predict import predict

    (tmp_path / "images").mkdir()
    stored_as(framed("oblique"), "LPS", tmp_path / "images" / "case_0000.nii.gz")
    arguments = ["-i", tmp_path / "images", "-o", tmp_path / "out", "--segmenter", f"voxtell:{model}", "--modality", "CT", "--per_request"]
    prompts = ["--prompt", "plz outline the lver", "--prompt", "rt kidney"]
    refused = CliRunner().invoke(predict, [str(a) for a in (*arguments, *prompts)])
    assert refused.exit_code == 1
    assert "CC BY-NC-SA" in refused.output
    made = CliRunner().invoke(predict, [str(a) for a in (*arguments, *prompts, "--accept_license")], catch_exceptions=False)
    record = json.loads((tmp_path / "out" / "case.json").read_text())
    answers = {one["text"]: one for one in record["requests"]}
    assert answers["plz outline the lver"]["target_answered"] == "liver", made.output
    assert answers["rt kidney"]["target_answered"] == "right kidney"
    assert {one["status"] for one in answers.values()} == {"ok"}
    assert "CC BY-NC-SA" in json.dumps(record)
    scan = nibabel.load(tmp_path / "images" / "case_0000.nii.gz")
    for path in (tmp_path / "out").glob("case__*.nii.gz"):
        np.testing.assert_array_equal(nibabel.load(path).affine, scan.affine)
