"""The registry of reasoners and the scripted double."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import reasoner_contract as contract

from seerseg.errors import MissingExtraError, ModelError, UsageError
from seerseg.reasoners import available_reasoners, load_reasoner
from seerseg.reasoners.base import Reasoner
from seerseg.reasoners.scripted import ScriptedReasoner


def test_built_in_names_are_listed_and_load() -> None:
    assert {"lexicon", "scripted", "vlm"} <= set(available_reasoners())
    assert load_reasoner("lexicon").card.sees_images is False
    assert load_reasoner(" Lexicon ").card.name == "lexicon"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("lexcon", "There is no reasoner or folder called 'lexcon'. Did you mean lexicon"),
        ("", "There is no reasoner or folder called ''"),
        ("vlm:", "Nothing follows the colon"),
        ("no/such/folder/here", "There is no reasoner or folder"),
    ],
)
def test_unknown_names_are_sentences(name: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        load_reasoner(name)


def test_a_folder_that_is_no_model_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        load_reasoner(tmp_path)


def plug_in(folder: Path, code: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package with one entry point, as pip lays it out."""
    info = folder / f"{name}_package-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[seerseg.reasoners]\n{name} = {name}_module:make\n")
    (folder / f"{name}_module.py").write_text(code)
    monkeypatch.syspath_prepend(folder)


GOOD = """
from seerseg.reasoners.scripted import ScriptedReasoner
def make(*, source=None, device="cpu", dtype=None, offline=True, greeting="hello"):
    return ScriptedReasoner([f"{greeting} {source} {device}"])
"""


def test_an_installed_plug_in_is_found_and_gets_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(tmp_path, GOOD, "goodplug", monkeypatch)
    assert available_reasoners()["goodplug"] == "from the package goodplug-package"
    made = load_reasoner("goodplug:somewhere", device="cuda:1", greeting="bye")
    assert made.reply([contract.dialogue("x")]) == [["bye somewhere cuda:1"]]


@pytest.mark.parametrize(
    ("code", "fault", "sentence"),
    [
        ("import no_such_package_at_all", MissingExtraError, "Install no_such_package_at_all"),
        ("def make(**k): raise ValueError('no luck')", ModelError, "ValueError: no luck"),
        ("def make(**k): return 3", ModelError, "made a int, which lacks methods"),
    ],
)
def test_a_broken_plug_in_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, fault: type[Exception], sentence: str
) -> None:
    name = f"badplug{abs(hash(code)) % 1000}"
    plug_in(tmp_path, code, name, monkeypatch)
    with pytest.raises(fault, match=sentence):
        load_reasoner(name)


def test_names_and_their_factories_exist() -> None:
    from seerseg import reasoners

    for name, (value, _) in reasoners._BUILT_IN.items():
        assert callable(EntryPoint(name=name, value=value, group=reasoners.GROUP).load())


def test_importing_and_the_lexicon_are_light() -> None:
    code = (
        "import sys; from seerseg.reasoners import load_reasoner, available_reasoners; available_reasoners(); "
        "heavy = ('torch', 'transformers', 'numpy', 'PIL', 'huggingface_hub'); print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- the scripted double ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script",
    [["only"], {"left lung": "yes", "*": ["no", "nope"]}, lambda dialogue, sample: f"{len(dialogue)} {sample}"],
    ids=["list", "mapping", "callable"],
)
def test_contract(script: object) -> None:
    contract.check_all(ScriptedReasoner(script))  # type: ignore[arg-type]


def test_a_list_is_used_up_and_its_last_reply_repeats() -> None:
    reasoner = ScriptedReasoner(["a", "b", "c"])
    assert reasoner.reply([contract.dialogue("x"), contract.dialogue("y")]) == [["a"], ["b"]]
    assert reasoner.reply([contract.dialogue("x")], samples=3) == [["c", "c", "c"]]


def test_a_mapping_answers_by_request_and_sample() -> None:
    reasoner = ScriptedReasoner({"left lung": ["first", "second"], "*": "else"})
    assert reasoner.reply([contract.dialogue("left lung"), contract.dialogue("ribs")], samples=3) == [
        ["first", "second", "second"],
        ["else"] * 3,
    ]
    assert ScriptedReasoner({"a": "b"}).reply([contract.dialogue("z")]) == [[""]]


def test_calls_are_recorded() -> None:
    reasoner = ScriptedReasoner(["a"])
    asked = contract.dialogue("left lung", shown=contract.images(1))
    reasoner.reply([asked], samples=2, seed=9)
    call = reasoner.calls[0]
    assert (call.samples, call.seed, list(call.dialogues[0])) == (2, 9, asked)


def test_a_file_of_replies(tmp_path: Path) -> None:
    file = tmp_path / "replies.json"
    file.write_text(json.dumps({"*": "é"}))
    made = load_reasoner(f"scripted:{file}")
    assert isinstance(made, Reasoner)
    assert made.reply([contract.dialogue("x")]) == [["é"]]
    assert made.card.identity != ScriptedReasoner({"*": "e"}).card.identity


@pytest.mark.parametrize("content", ["[]", "{}", "[1]", '{"a": []}', '{"a": 3}', '"text"', "{", "\udcff"])
def test_a_file_that_is_no_script_is_a_sentence(tmp_path: Path, content: str) -> None:
    file = tmp_path / "replies.json"
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError, match=str(file)):
        load_reasoner(f"scripted:{file}")
    with pytest.raises(ModelError, match="needs a file"):
        load_reasoner("scripted")
    with pytest.raises(ModelError, match="does not exist"):
        load_reasoner(f"scripted:{tmp_path}/none.json")
