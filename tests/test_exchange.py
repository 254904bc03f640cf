"""A trained model as a zip: the same bytes each time, the same masks elsewhere, and nothing bad ever gets in."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import exchange_models as em
import prediction_cases as pc
import pytest
import tiny_vlms
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from seerseg.cli.doctor import doctor
from seerseg.cli.export import export
from seerseg.cli.install import install
from seerseg.cli.predict import predict
from seerseg.errors import ModelError, OutputError, SeerSegError, UsageError
from seerseg.exchange import export_model, export_name, install_model, look
from seerseg.exchange.record import ExportRecord, FileRecord, check_names
from seerseg.model import open_model, read_spec, write_spec
from seerseg.reasoners.nano import SHIPPED, NanoReasoner

pytestmark = pytest.mark.skipif(not (SHIPPED / "model.safetensors").is_file(), reason="the shipped weights are not in this checkout")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """results/ with a trained model, images/ with a scan."""
    root = tmp_path_factory.mktemp("home")
    em.trained(root / "results")
    em.chest(root / "images")
    return root


@pytest.fixture(scope="module")
def packed(home: Path) -> Path:
    return export_model(em.fold_folder(home / "results"), home / "model.zip").path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a model without weights of its own, quick to change and to install."""
    root = tmp_path_factory.mktemp("small")
    folder = em.fold_folder(root / "results", "plans__seer__lexicon__nano")
    folder.mkdir(parents=True)
    write_spec(folder, em.spec())
    (folder / "plans.json").write_text('{"schema": 1}')
    return export_model(folder, root / "small.zip").path


def run(command: Any, *arguments: object, code: int = 0, env: dict[str, str] | None = None) -> Any:
    done = CliRunner().invoke(command, [str(a) for a in arguments], env=env, catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done


def masks(home: Path, out: Path, *more: object, env: dict[str, str] | None = None) -> dict[str, bytes]:
    prompts = [part for text in em.PROMPTS for part in ("--prompt", text)]
    run(predict, "-i", home / "images", "-o", out, *prompts, "-device", "cpu", *more, env=env)
    return {p.name: p.read_bytes() for p in sorted(out.iterdir()) if not p.name.startswith("ledger")}


# ------------------------------------------------------------------------------------------------------------------ there and back


def test_the_masks_are_the_same_elsewhere(home: Path, tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    before = masks(home, there, "-d", "7", "-f", "0", env={"seerseg_results": str(home / "results")})
    assert {"scan.nii.gz", "scan.json"} <= set(before)
    assert [r["status"] for r in json.loads(before["scan.json"])["requests"]] == ["ok"] * 2
    done = run(export, "-d", "7", "-f", "0", "-o", tmp_path / "m.zip", env={"seerseg_results": str(home / "results")})
    assert "reasoner nano: comes with SeerSeg (licence cc-by-sa-4.0)" in done.output
    assert "Left out: sft/model/training_args.bin: .bin files can hold pickles" in done.output
    env = {"seerseg_results": str(tmp_path / "results")}
    done = run(install, tmp_path / "m.zip", env=env)
    assert "-d Dataset007_Toy -f 0" in done.output
    assert "Missing" not in done.output
    assert masks(home, here, "-d", "7", "-f", "0", env=env) == before
    installed = em.fold_folder(tmp_path / "results")
    assert isinstance(open_model(installed).reasoner, NanoReasoner)


def test_how_skills_are_found_travels_with_the_bank(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(em.fold_folder(home / "results"), folder)
    (folder / "bank" / "retrieval").mkdir()
    (folder / "bank" / "retrieval" / "tiny-1.json").write_text('{"schema": 1, "fitted": []}')
    (folder / "bank" / "masks").mkdir()
    (folder / "bank" / "masks" / "0.npz").write_bytes(b"what evolution drew")
    run(export, "-m", folder, "-o", tmp_path / "m.zip")
    with zipfile.ZipFile(tmp_path / "m.zip") as file:
        names = set(file.namelist())
    assert "bank/retrieval/tiny-1.json" in names
    assert not any(name.startswith("bank/masks") for name in names)


def test_what_is_packed(packed: Path, home: Path) -> None:
    with zipfile.ZipFile(packed) as file:
        names = file.namelist()
        record = json.loads(file.read("export.json"))
        assert file.testzip() is None
    model = {f"sft/model/{p.name}" for p in SHIPPED.iterdir()} | {"sft/model/seerseg_base.json"}
    bank = {n for n in names if n.startswith("bank/")}
    assert set(names) == {"manifest.json", "plans.json", "export.json", *model, *bank}
    assert len(bank) == 2  # the newest head and its skills: no memo of what was asked, no index
    assert [f["name"] for f in record["files"]] == sorted(set(names) - {"export.json"})
    assert (record["dataset"], record["run"], record["fold"]) == (em.DATASET, em.RUN, 0)
    assert {"seerseg", "torch", "transformers"} <= set(record["versions"])
    assert {(b["role"], b["name"], b["state"], b["licence"]) for b in record["bases"]} == {
        ("reasoner", "nano", "shipped", "cc-by-sa-4.0"),
        ("segmenter", "nano", "shipped", "cc-by-sa-4.0"),
    }
    assert str(home) not in json.dumps(record)


def test_the_same_model_gives_the_same_bytes(packed: Path, home: Path, tmp_path: Path) -> None:
    folder = em.fold_folder(home / "results")
    os.utime(folder / "manifest.json", (1, 1))
    assert export_model(folder, tmp_path / "again.zip").path.read_bytes() == packed.read_bytes()
    made = install_model(packed, target=tmp_path / "installed")
    again = export_model(made.folder, tmp_path / "third.zip")
    assert again.path.read_bytes() == packed.read_bytes()
    assert not again.already
    assert export_model(made.folder, tmp_path / "third.zip").already
    assert not list(tmp_path.glob("*.new"))
    assert export_name(folder) == "Dataset007_Toy__plans__seer__nano__nano__fold_0.zip"


def test_nothing_is_written_over(packed: Path, small: Path, tmp_path: Path) -> None:
    made = install_model(packed, target=tmp_path / "a")
    assert not made.already
    assert install_model(packed, target=tmp_path / "a").already
    (tmp_path / "a" / "bank" / "x.index.npz").write_bytes(b"")  # what use adds does not count
    assert install_model(packed, target=tmp_path / "a").already
    with pytest.raises(UsageError, match=r"holds something else than .* \(manifest.json differs\), and nothing is written over"):
        install_model(small, target=tmp_path / "a")
    (tmp_path / "a" / "sft" / "model" / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"config.json differs"):
        install_model(packed, target=tmp_path / "a")
    assert (tmp_path / "a" / "sft" / "model" / "config.json").read_text() == "{}"
    (tmp_path / "b").write_text("a file")
    with pytest.raises(UsageError, match="is a file"):
        install_model(packed, target=tmp_path / "b")
    (tmp_path / "zip").mkdir()
    with pytest.raises(UsageError, match="not a folder"):
        export_model(made.folder, tmp_path / "zip")
    (tmp_path / "x.zip").write_text("something else")
    with pytest.raises(UsageError, match="holds something else"):
        export_model(made.folder, tmp_path / "x.zip")
    assert (tmp_path / "x.zip").read_text() == "something else"
    export_model(made.folder, tmp_path / "x.zip", overwrite=True)
    assert zipfile.is_zipfile(tmp_path / "x.zip")


def test_many_install_at_once(small: Path, tmp_path: Path) -> None:
    start = "import sys; from seerseg.cli.install import install; install()"
    line = [sys.executable, "-c", start, str(small), "-o", str(tmp_path / "models" / "one")]
    running = [subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=pc.environment()) for _ in range(2)]
    said = [p.communicate(timeout=120)[0] for p in running]
    assert [p.returncode for p in running] == [0, 0], said
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["one"]


# ------------------------------------------------------------------------------------------------------------------ hostile zips


def _json(files: dict[str, bytes], name: str, change: Callable[[Any], None]) -> None:
    value = json.loads(files[name])
    change(value)
    files[name] = json.dumps(value).encode()


def _add(name: str, content: bytes = b"{}", *, listed: bool = True) -> Callable[[dict[str, bytes]], None]:
    import hashlib

    def change(files: dict[str, bytes]) -> None:
        files[name] = content
        if listed:
            file = {"name": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            _json(files, "export.json", lambda value: value["files"].append(file))

    return change


def _drop(name: str) -> Callable[[dict[str, bytes]], None]:
    return lambda files: files.pop(name) and None


def _set(key: str, value: Any) -> Callable[[dict[str, bytes]], None]:
    return lambda files: _json(files, "export.json", lambda record: record.update({key: value}))


HOSTILE: dict[str, tuple[Callable[[dict[str, bytes]], Any], str]] = {
    "escape": (_add("../evil.json"), "no plain path"),
    "escape inside": (_add("a/../../evil.json"), "no plain path"),
    "absolute": (_add("/tmp/evil.json"), "no plain path"),
    "drive": (_add("C:/evil.json"), "no plain path"),
    "backslash": (_add("..\\evil.json"), "no plain path"),
    "hidden": (_add(".bashrc.json"), "no plain path"),
    "folder entry": (_add("sub/", b""), "no plain file"),
    "case twins": (_add("MANIFEST.json"), "twice"),
    "file and folder": (_add("plans.json/x.json"), "below what is a file"),
    "pickle by name": (_add("optimizer.pt"), r"\.pt files can hold pickles"),
    "checkpoint by name": (_add("pytorch_model.bin"), r"\.bin files can hold pickles"),
    "program by name": (_add("setup.py"), r"\.py files hold code"),
    "library": (_add("x.so"), r"\.so files hold code"),
    "pickle in disguise": (_add("notes.txt", b"\x80\x04\x95"), "is a pickle"),
    "program in disguise": (_add("spiece.model", b"\x7fELF" + bytes(80)), "is a program"),
    "zip in disguise": (_add("spiece.model", b"PK\x03\x04" + bytes(80)), "is a zip"),
    "script in disguise": (_add("notes.txt", b"#!/bin/sh\nrm x\n"), "is a script"),
    "no json": (_add("x.json", b"{"), "is not the JSON"),
    "deep json": (_add("x.json", b"[" * 100_000), "is not the JSON"),
    "binary text": (_add("x.txt", b"\xff\xfe\x00"), "is not text"),
    "cut safetensors": (_add("x.safetensors", struct.pack("<Q", 2) + b"{}" + b"more"), "length is not what its head says"),
    "no safetensors": (_add("x.safetensors", b"abc"), "is no safetensors file"),
    "endless head": (_add("x.safetensors", struct.pack("<Q", 1 << 60) + b"{}"), "is no safetensors file, or a cut one"),
    "added": (_add("x.json", listed=False), "does not list"),
    "taken away": (_drop("plans.json"), r"lacks plans.json"),
    "no record": (_drop("export.json"), "holds no export.json"),
    "no manifest": (lambda f: (f.pop("manifest.json"), _json(f, "export.json", lambda v: v["files"].pop(0))), "holds no manifest.json"),
    "changed": (lambda f: f.update({"plans.json": b'{"schema": 2}'}), "another SHA-256"),
    "shorter": (lambda f: f.update({"plans.json": b"{}"}), "bytes instead of"),
    "other schema": (_set("schema", 99), "schema version 99"),
    "another kind": (_set("kind", "something"), "does not say that it is a SeerSeg model"),
    "no list": (_set("files", 3), "is damaged"),
    "odd dataset": (_set("dataset", "../../etc"), "no folder name"),
    "odd fold": (_set("fold", -1), "no fold"),
    "base escapes": (
        _set("bases", [{"role": "reasoner", "name": "x", "state": "copied", "place": "../../x", "included": False, "files": []}]),
        "no plain path",
    ),
    "manifest escapes": (
        lambda f: _replace(f, "manifest.json", {**json.loads(f["manifest.json"]), "reasoner": "nano:../../etc"}),
        "points out of the model folder",
    ),
    "manifest of another schema": (lambda f: _replace(f, "manifest.json", {"schema": 9}), "schema version 9"),
    "record no json": (lambda f: f.update({"export.json": b"{"}), "not valid JSON"),
    "bomb": (_add("x.txt", b"0" * 30_000_000), "zip bomb"),
}


def _replace(files: dict[str, bytes], name: str, value: Any) -> None:
    import hashlib

    files[name] = json.dumps(value).encode()
    said = {"size": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
    _json(files, "export.json", lambda record: next(f for f in record["files"] if f["name"] == name).update(said))


@pytest.mark.parametrize("name", HOSTILE)
def test_bad_zips_are_refused_and_leave_nothing(small: Path, tmp_path: Path, name: str) -> None:
    change, sentence = HOSTILE[name]
    bad = em.rewritten(small, tmp_path / "bad.zip", change)
    with pytest.raises(ModelError, match=sentence):
        install_model(bad, results=tmp_path / "results")
    assert [p.name for p in tmp_path.iterdir()] == ["bad.zip"]


@pytest.mark.parametrize(
    ("info", "sentence"),
    [
        ({"external_attr": 0o120777 << 16, "create_system": 3}, "the link"),
        ({"external_attr": 0o100755 << 16, "create_system": 3}, "marked as a program"),
        ({"external_attr": 0o010644 << 16, "create_system": 3}, "no plain file"),
        ({"compress_type": zipfile.ZIP_LZMA}, "packed in a way"),
    ],
)
def test_links_and_programs_are_refused(small: Path, tmp_path: Path, info: dict[str, Any], sentence: str) -> None:
    bad = em.rewritten(small, tmp_path / "bad.zip", lambda files: None, **info)
    with pytest.raises(ModelError, match=sentence):
        install_model(bad, target=tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_name_that_stands_twice(small: Path, tmp_path: Path) -> None:
    bad = shutil.copy(small, tmp_path / "bad.zip")
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(bad, "a") as file:
        file.writestr("plans.json", "{}")
    with pytest.raises(ModelError, match="twice"):
        install_model(Path(bad), target=tmp_path / "m")


def test_a_total_that_is_too_much(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="raise --max_size"):
        install_model(small, target=tmp_path / "m", most_bytes=100)


@pytest.mark.parametrize("kept", [0, 1, 3, 50, 0.5, 0.9, -1])
def test_a_half_copied_zip(packed: Path, tmp_path: Path, kept: float) -> None:
    data = packed.read_bytes()
    cut = tmp_path / "cut.zip"
    cut.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    done = run(install, cut, "-o", tmp_path / "m", code=1)
    assert "damaged or was not copied wholly" in done.output or "does not begin as a zip does" in done.output
    assert [p.name for p in tmp_path.iterdir()] == ["cut.zip"]


def test_something_that_was_appended(small: Path, tmp_path: Path) -> None:
    (tmp_path / "more.zip").write_bytes(small.read_bytes() + b"more")
    with pytest.raises(ModelError, match="its end is not that of an export"):
        install_model(tmp_path / "more.zip", target=tmp_path / "m")


@settings(max_examples=60)
@given(st.data())
def test_a_byte_that_changed_on_the_way(small: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Either the sentence, or the model as it was: never another one, never a traceback."""
    root = tmp_path_factory.mktemp("byte")
    content = bytearray(small.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    (root / "bad.zip").write_bytes(content)
    try:
        made = install_model(root / "bad.zip", target=root / "m")
    except SeerSegError:
        assert not (root / "m").exists()
        return
    good = install_model(small, target=root / "good")
    assert pc.snapshot(made.folder) == pc.snapshot(good.folder)


@given(st.text(max_size=30))
def test_names_that_pass_stay_in_the_folder(name: str) -> None:
    try:
        check_names([f"{name}.json"], "x")
    except ModelError:
        return
    base = Path("/base/folder").resolve()
    assert Path(os.path.normpath(base / f"{name}.json")).is_relative_to(base)
    assert "\0" not in name


def test_files_that_share_bytes(tmp_path: Path, small: Path) -> None:
    """Two directory entries over one piece of the file, as in zip bombs that do not repeat themselves."""
    with zipfile.ZipFile(small) as file:
        infos = {i.filename: i for i in file.infolist()}
    data = bytearray(small.read_bytes())
    one, two = infos["manifest.json"], infos["plans.json"]
    where = data.rindex(b"plans.json") - 46  # its entry in the directory at the end
    assert data[where : where + 4] == b"PK\x01\x02"
    data[where + 42 : where + 46] = struct.pack("<I", one.header_offset)
    assert two.header_offset != one.header_offset
    (tmp_path / "bad.zip").write_bytes(data)
    with pytest.raises(ModelError, match=r"share bytes|damaged"):
        install_model(tmp_path / "bad.zip", target=tmp_path / "m")


def test_folders_that_cannot_be_written(small: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Cannot install"):
        install_model(small, target=tmp_path / "file" / "below" / "m")
    with pytest.raises(UsageError, match="There is no file"):
        install_model(tmp_path / "none.zip", target=tmp_path / "m")
    with pytest.raises(UsageError, match="Say where the results live"):
        install_model(small)
    plain = tmp_path / "plain"
    plain.mkdir()
    write_spec(plain, em.spec())
    alone = export_model(plain, tmp_path / "alone.zip").path
    with pytest.raises(UsageError, match="Say with -o"):
        install_model(alone, results=tmp_path / "results")


# ------------------------------------------------------------------------------------------------------------------ base models


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vlms.qwen(tmp_path_factory.mktemp("hub") / "Tiny-VL", "3")


@pytest.fixture
def adapted(base: Path, tmp_path: Path) -> Path:
    return em.adapter_on(base, tmp_path / "adapted")


@pytest.fixture
def card(base: Path) -> Iterator[Callable[[str], None]]:
    yield lambda licence: (base / "README.md").write_text(f"---\nlicense: {licence}\n---\n") and None
    (base / "README.md").unlink(missing_ok=True)


def test_a_base_is_packed_where_its_licence_allows(adapted: Path, base: Path, tmp_path: Path, card: Callable[[str], None]) -> None:
    without = export_model(adapted, tmp_path / "without.zip")
    (known,) = [b for b in without.record.bases if b.role == "reasoner"]
    assert (known.name, known.state, known.place, known.included) == (str(base), "copied", "sft/model/base", False)
    assert {"config.json", "model.safetensors"} <= {f.name for f in known.files}
    with pytest.raises(ModelError, match=r"does not say under which licence .* add --may_pass_on if you have the right to"):
        export_model(adapted, tmp_path / "with.zip", include_base=True)
    card("cc-by-nc-4.0")
    with pytest.raises(ModelError, match=r"is under 'cc-by-nc-4.0', which does not let everybody pass it on"):
        export_model(adapted, tmp_path / "with.zip", include_base=True)
    assert export_model(adapted, tmp_path / "said.zip", include_base=True, may_pass_on=True).record.bases[0].included
    card("Apache-2.0")
    whole = export_model(adapted, tmp_path / "with.zip", include_base=True)
    assert {"sft/model/base/config.json", "sft/model/base/model.safetensors"} <= {f.name for f in whole.record.files}
    hidden = base.rename(base.with_name("gone"))  # another machine
    try:
        folder = install_model(whole.path, target=tmp_path / "there").folder
        assert all(part.state == "ok" for part in look(folder)), look(folder)
        assert open_model(folder).reasoner.loaded.source.folder == folder / "sft" / "model" / "base"
        # what was put into the place for it is not passed on without being asked for
        assert export_model(folder, tmp_path / "again.zip").size < whole.size
    finally:
        hidden.rename(base)


def test_the_doctor_says_what_to_copy_where(adapted: Path, base: Path, tmp_path: Path) -> None:
    archive = export_model(adapted, tmp_path / "m.zip").path
    hidden = base.rename(base.with_name("gone"))
    try:
        done = run(install, archive, "-o", tmp_path / "there")
        assert f"Copy the folder of {base}" in done.output
        assert f"to {tmp_path / 'there'}/sft/model/base" in done.output
        done = run(doctor, "--model", tmp_path / "there", "--json", code=1)
        (problem,) = [f for f in json.loads(done.stdout)["findings"] if f["state"] == "problem"]
        assert problem["name"] == "reasoner's base"
        place = tmp_path / "there" / "sft" / "model" / "base"
        shutil.copytree(tiny_vlms.idefics3(tmp_path / "other"), place)
        assert "holds other weights than those trained on" in run(doctor, "--model", tmp_path / "there", code=1).output
        shutil.rmtree(place)
        shutil.copytree(hidden, place)
        assert "No problems" in run(doctor, "--model", tmp_path / "there").output
        (place / "tokenizer_config.json").unlink()
        said = run(doctor, "--model", tmp_path / "there", code=1).output
        assert f"tokenizer_config.json in {place} is missing" in said
    finally:
        hidden.rename(base)


def test_a_segmenter_that_lies_elsewhere(tmp_path: Path) -> None:
    mine = em.segmenter_elsewhere(tmp_path / "models" / "mine", None)
    folder = tmp_path / "model"
    folder.mkdir()
    write_spec(folder, em.spec(segmenter=f"nano:{mine}"))
    with pytest.raises(ModelError, match="does not say under which licence"):
        export_model(folder, tmp_path / "with.zip", include_base=True)
    (mine / "LICENSE").write_text("MIT License\n\nCopyright\n")
    whole = export_model(folder, tmp_path / "with.zip", include_base=True).path
    without = export_model(folder, tmp_path / "without.zip").path
    shutil.rmtree(mine)
    first = install_model(whole, target=tmp_path / "first").folder
    assert read_spec(first).segmenter == f"nano:{first / 'base' / 'segmenter' / 'mine'}"
    assert open_model(first).segmenter.card.identity == read_spec(first).segmenter_identity
    second = install_model(without, target=tmp_path / "second").folder
    (problem,) = [p for p in look(second) if p.state == "problem"]
    assert problem.remedy.endswith(f"to {second}/base/segmenter/mine.")
    assert "3 files" in problem.remedy
    shutil.copytree(first / "base" / "segmenter" / "mine", second / "base" / "segmenter" / "mine")
    assert all(p.state == "ok" for p in look(second)), look(second)


def test_bases_that_hold_pickles_are_not_packed(tmp_path: Path) -> None:
    trained = tmp_path / "nnunet"
    (trained / "fold_0").mkdir(parents=True)
    for name in ("plans.json", "dataset.json"):
        (trained / name).write_text("{}")
    (trained / "fold_0" / "checkpoint_final.pth").write_bytes(b"PK")
    folder = tmp_path / "model"
    folder.mkdir()
    write_spec(folder, em.spec(segmenter=f"nnunet:{trained}?folds=0"))
    with pytest.raises(ModelError, match=r"checkpoint_final.pth: .pth files can hold pickles"):
        export_model(folder, tmp_path / "x.zip", include_base=True, may_pass_on=True)
    (segmenter,) = [b for b in export_model(folder, tmp_path / "x.zip").record.bases if b.role == "segmenter"]
    assert segmenter.place == "base/segmenter/nnunet"
    assert {f.name for f in segmenter.files} == {"plans.json", "dataset.json", "fold_0/checkpoint_final.pth"}


def test_damage_is_found(packed: Path, tmp_path: Path) -> None:
    folder = install_model(packed, target=tmp_path / "m").folder
    assert all(part.state == "ok" for part in look(folder)), look(folder)
    weights = folder / "sft" / "model" / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(1000)
    said = run(doctor, "--model", folder, code=1).output
    assert "sft/model/model.safetensors is not as it was exported" in said
    assert "length is not what its head says" in said or "no safetensors file" in said
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        export_model(folder, tmp_path / "bad.zip")
    assert not (tmp_path / "bad.zip").exists()


def test_other_segmenter_weights_are_found(packed: Path, tmp_path: Path) -> None:
    folder = install_model(packed, target=tmp_path / "m").folder
    write_spec(folder, em.spec(reasoner="lexicon", segmenter_identity="nano-of-another-version"))
    problems = {p.name: p for p in look(folder) if p.state == "problem"}
    assert "trained with nano-of-another-version" in problems["segmenter"].value
    assert problems["files"].value == "manifest.json is not as it was exported"


def test_every_member_of_a_cascade_is_looked_for(packed: Path, tmp_path: Path) -> None:
    folder = install_model(packed, target=tmp_path / "m").folder
    write_spec(folder, em.spec(reasoner="cascade"))
    found = [(p.value, p.state) for p in look(folder) if p.name == "reasoner"]
    assert found == [("lexicon has no weights", "ok"), ("nano comes with SeerSeg", "ok")]
    own = next((folder / "sft").glob("model"))
    write_spec(folder, em.spec(reasoner=f"cascade:lexicon,nano:{own},vlm:{tmp_path / 'gone'}"))
    parts = {p.name: p for p in look(folder)}
    assert parts["reasoner's weights"].state == "ok", parts
    assert parts["reasoner"].state == "problem"
    assert "gone is not on this machine" in parts["reasoner"].value
    written = json.loads((folder / "manifest.json").read_text())["reasoner"]
    assert written == f"cascade:lexicon,nano:sft/model,vlm:{tmp_path / 'gone'}"


def test_no_connection_is_opened(packed: Path, adapted: Path, base: Path, tmp_path: Path) -> None:
    """Export, install and doctor, with the hub's own switch off, in a process that notes every socket."""
    config = json.loads((adapted / "sft" / "model" / "adapter_config.json").read_text())
    for name in ("adapter_config.json", "seerseg_base.json"):
        path = adapted / "sft" / "model" / name
        path.write_text(path.read_text().replace(json.dumps(str(base)), '"no-such-org/no-such-model"'))
    assert config["base_model_name_or_path"] == str(base)
    code = f"""
import sys
seen = []
sys.addaudithook(lambda event, args: seen.append(event) if event.startswith("socket.") and event != "socket.__new__" else None)
from pathlib import Path
from seerseg.exchange import export_model, install_model, look
from seerseg.cli.doctor import models, torchvision, folders, versions
root = Path({str(tmp_path)!r})
folder = install_model(Path({str(packed)!r}), target=root / "m").folder
states = [p.state for p in look(folder)] + [p.state for p in look(Path({str(adapted)!r}))]
export_model(Path({str(adapted)!r}), root / "a.zip")
list(models()), list(torchvision()), list(folders()), list(versions())
print(states.count("problem"), seen)
"""
    env = {k: v for k, v in pc.environment().items() if k not in ("HF_HUB_OFFLINE", "PYTHONWARNINGS")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300)
    assert done.stdout.strip() == "1 []", done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------------------------ commands


def test_the_command_lines(packed: Path, home: Path, tmp_path: Path) -> None:
    done = run(export, "-m", em.fold_folder(home / "results"), "-o", tmp_path / "m.zip", "--json")
    assert json.loads(done.stdout)["already"] is False
    assert "the same byte for byte" in run(export, "-m", em.fold_folder(home / "results"), "-o", tmp_path / "m.zip").output
    said = json.loads(run(install, packed, "-o", tmp_path / "m", "--json").stdout)
    assert (said["already"], said["needs"]) == (False, [])
    assert "was installed before" in run(install, packed, "-o", tmp_path / "m").output
    assert "Give a model folder with -m, or a dataset with -d" in run(export, code=2).output
    assert "it goes with --include_base" in run(export, "-m", tmp_path / "m", "--may_pass_on", code=2).output
    assert "There is no model folder" in run(export, "-m", tmp_path / "none", code=1).output
    assert "Say where the results live" in run(install, packed, code=2).output
    assert "There is no model folder" in run(doctor, "--model", tmp_path / "none", code=1).output
    env = {"seerseg_results": str(home / "results")}
    assert "No problems" in run(doctor, "-d", "7", "-f", "0", env=env).output


def test_a_record_survives_the_file(tmp_path: Path) -> None:
    record = ExportRecord((FileRecord("manifest.json", 3, "0" * 64),), versions={"torch": "2"}, dataset="Dataset001_X", run="a", fold=1)
    assert ExportRecord.from_json(json.loads(json.dumps(record.to_json())), "x") == record
    assert record.size == 3
