"""seerseg_make_requests: which targets and languages a case gets, what is absent, files, cards, bad input, the writer."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import click
import numpy as np
import pytest
import raw_datasets as rd
from click.testing import CliRunner, Result

from seerseg.cli.make_requests import make_requests as command
from seerseg.dataset import Fold, Splits, make_splits, open_dataset, read_requests
from seerseg.errors import ModelError, UsageError
from seerseg.planning.rules import Planned
from seerseg.reasoners.lexicon import LexiconReasoner
from seerseg.vocabulary import Vocabulary
from seerseg_data.requests import PARAPHRASE_STYLES, Settings, make
from seerseg_data.requests import make_requests as make_list
from seerseg_data.requests.generate import Made, Report, context_of, languages_of, out_of_region, unions
from seerseg_data.requests.writer import EndpointWriter, Rewriter, RoundTrip, cleaned, load_writer

CASES = [f"c{i:02d}" for i in range(10)]
LABELS = {"background": 0, "left lung": 1, "right lung": 2, "lung tumour": 3}
FEW = Settings(per_target=4, absent_per_case=2)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Dataset007_Chest under a root: ten cases with both lungs, the tumour in c00 alone."""
    folder = rd.make(tmp_path / "raw" / "Dataset007_Chest", CASES, channels=("CT",), labels=LABELS)
    array = rd.label()
    array[10, 10, 8] = 3
    rd.write(folder / "labelsTr" / "c00.nii.gz", array)
    return folder


def run(line: str, root: Path, *more: str) -> Result:
    result = CliRunner().invoke(command, [*line.split(), "--raw_folder", str(root), "-np", "1", *more])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def sentence(result: Result) -> str:
    text = result.stderr.strip().splitlines()[-1]
    assert text.startswith("Error: ")
    assert text.endswith(".")
    return text


# --- what is asked of which case -------------------------------------------------------------------------------------------------


def test_each_case_is_asked_for_what_it_holds_in_the_language_of_its_split(raw: Path) -> None:
    dataset = open_dataset(raw)
    splits = make_splits(dataset.subjects)
    report = make(dataset, splits=splits, settings=FEW, seed=1)
    fold = splits.folds[0]
    expected = dict.fromkeys((*fold.train, *fold.bank), "train") | dict.fromkeys(fold.val, "val") | dict.fromkeys(splits.test, "test")
    assert {(r.case, r.language_split) for r in report.requests} == set(expected.items())
    for case in CASES:
        targets = Counter(r.target for r in report.requests if r.case == case and not r.absent)
        assert targets == {("left lung",): 4, ("right lung",): 4} | ({("lung tumour",): 4} if case == "c00" else {})
    assert len({r.id for r in report.requests}) == len(report.requests)
    assert make(dataset, splits=splits, settings=FEW, seed=1).requests == report.requests
    assert make(dataset, splits=splits, settings=FEW, seed=2).requests != report.requests
    assert make_list(dataset, splits=splits, settings=FEW, seed=1) == report.requests


def test_absent_is_only_what_is_known_to_be_absent(raw: Path) -> None:
    dataset = open_dataset(raw)
    report = make(dataset, splits=make_splits(dataset.subjects), settings=replace(FEW, absent_per_case=6))
    vocabulary = Vocabulary.load()
    reader = LexiconReasoner(vocabulary=vocabulary)
    away = set(out_of_region(vocabulary, report.context))
    assert "urinary bladder" in away
    assert not away & {"heart", "liver", "left humerus", "thyroid gland", "vertebra L1", "spinal cord", "lung nodule"}
    asked = Counter()
    for made in report.made:
        if made.request.absent:
            asked[made.request.style] += 1
            if made.request.style == "absent":
                assert made.name == "lung tumour"
                assert made.request.case != "c00"
            else:
                assert made.name in away
            assert made.wording.slips == () or made.request.style == "absent"
            if made.request.style == "out_of_region_reference":
                assert reader.decide(made.request.text, report.context.names).answer not in ("left lung", "right lung")
    assert asked["absent"] == 9
    assert asked["out_of_region_reference"] > 40


def test_where_voxels_are_not_annotated_nothing_in_the_region_counts_as_absent(raw: Path) -> None:
    rd.describe(raw, ("CT",), {**LABELS, "ignore": 9}, 10)
    array = rd.label()
    array[11, 11, 9] = 9
    rd.write(raw / "labelsTr" / "c05.nii.gz", array)
    dataset = open_dataset(raw)
    report = make(dataset, splits=make_splits(dataset.subjects), settings=FEW)
    absent = {m.request.case for m in report.made if m.request.style == "absent"}
    assert absent == set(CASES) - {"c00", "c05"}


def test_folds_unions_and_one_language(raw: Path) -> None:
    dataset = open_dataset(raw)
    splits = make_splits(dataset.subjects)
    every = languages_of(dataset, splits, replace(FEW, folds=(0, 1, 2, 3, 4)))
    assert all(every[case] == ("train", "val") for case in CASES if case not in splits.test)
    assert languages_of(dataset, splits, replace(FEW, language="test")) == dict.fromkeys(CASES, ("test",))
    with pytest.raises(UsageError, match="no fold 7"):
        languages_of(dataset, splits, replace(FEW, folds=(7,)))
    assert unions(dataset, Vocabulary.load(), dataset.labels) == [("lungs", ("left lung", "right lung"))]
    assert unions(dataset, Vocabulary.load(), ["left lung"]) == []
    assert any("Labels together make up lungs: --unions" in note for note in make(dataset, splits=splits, settings=FEW).notes)
    report = make(dataset, splits=splits, settings=replace(FEW, unions=True))
    assert not any("--unions" in note for note in report.notes)
    both = [r for r in report.requests if r.target == ("left lung", "right lung")]
    assert len(both) == 4 * len(CASES)
    assert {r.text for r in both if r.style == "label_prompt"} == {"lungs"}


def test_hippocampus_parts_and_their_whole(tmp_path: Path) -> None:
    labels = {"background": 0, "Anterior": 1, "Posterior": 2}
    folder = rd.make(tmp_path / "Dataset004_Hippocampus", ["a", "b"], labels=labels)
    described = {label: {"canonical": f"{label.lower()} hippocampus"} for label in ("Anterior", "Posterior")}
    (folder / "label_descriptions.json").write_text(json.dumps(described))
    dataset = open_dataset(folder)
    context = context_of(dataset, Vocabulary.load())
    assert context.unsided
    assert context.region == "head"
    assert context.modality == "MR"
    splits = Splits(("b",), (Fold(("a",), (), ()),))
    report = make(dataset, splits=splits, settings=Settings(unions=True))
    by_target = Counter((r.case, r.target) for r in report.requests if not r.absent)
    assert by_target == {(case, target): 16 for case in "ab" for target in (("Anterior",), ("Posterior",), ("Anterior", "Posterior"))}
    assert {r.text for r in report.requests if r.style == "label_prompt"} == {
        "anterior hippocampus",
        "posterior hippocampus",
        "hippocampus",
    }


def test_the_plan_fixes_number_and_styles(raw: Path) -> None:
    class _Plans:
        values: ClassVar = {"requests.per_target": Planned(3, "", {}, 16), "requests.styles": Planned(["label_prompt", "chat"], "", {}, [])}

        def value(self, name: str) -> Any:
            return self.values[name].value

    planned = Settings.from_plans(_Plans())  # type: ignore[arg-type]
    assert (planned.per_target, planned.styles) == (3, ("label_prompt", "chat"))
    assert Settings.from_plans(_Plans(), per_target=5).per_target == 5  # type: ignore[arg-type]
    assert Settings.from_plans(None).styles == PARAPHRASE_STYLES
    with pytest.raises(UsageError, match=r"no style 'chatty'.*Did you mean chat"):
        Settings(styles=("chatty",))
    with pytest.raises(UsageError, match="absent_per_case"):
        Settings(styles=("out_of_region_reference",))


# --- the command -----------------------------------------------------------------------------------------------------------------


def test_command_writes_requests_and_card(raw: Path) -> None:
    result = run("-d 7 --per_target 16 --seed 3", raw.parent)
    assert result.exit_code == 0, result.output
    assert "Dataset007_Chest: 376 requests for 10 cases" in result.stdout
    requests = read_requests(raw / "requests.jsonl")
    assert len(requests) == 376
    line = json.loads((raw / "requests.jsonl").read_text().splitlines()[1])
    assert {"id", "case", "text", "target", "style", "language_split", "asked", "surface", "template"} <= set(line)
    card = json.loads((raw / "requests_card.json").read_text())
    assert card["counts"]["requests"] == 376
    assert card["counts"]["per_set"] == [16, 16]
    assert sum(card["counts"]["by_style"].values()) == 376
    for split in ("val", "test"):
        for kind in ("templates", "forms", "slip_kinds", "texts"):
            assert card["overlap"][f"train_{split}"][kind]["shared_count"] == 0, card["overlap"]
            assert all(card["overlap"][f"train_{split}"][kind]["counts"])
        assert 0 < card["overlap"][f"train_{split}"]["words"]["of_other"] < 1
    assert "| test | 0 of " in (raw / "requests_card.md").read_text()
    assert (raw / "requests_card.png").read_bytes()[:4] == b"\x89PNG"
    first = (raw / "requests.jsonl").read_bytes()
    again = run("-d Dataset007_Chest --per-target 16 --seed 3 --json", raw.parent)
    assert json.loads(again.stdout)["datasets"][0]["card"]["requests_digest"] == card["requests_digest"]
    assert (raw / "requests.jsonl").read_bytes() == first


def test_what_a_person_wrote_is_not_overwritten(raw: Path) -> None:
    path = raw / "requests.jsonl"
    path.write_text('{"case": "c00", "text": "my own words", "target": null}\n')
    refused = run("-d 7 --per_target 2", raw.parent)
    assert refused.exit_code == 2
    assert "--overwrite" in sentence(refused)
    assert "my own words" in path.read_text()
    done = run("-d 7 --per_target 2 --overwrite", raw.parent)
    assert done.exit_code == 0, done.output
    assert "my own words" in (raw / "requests.jsonl.bak").read_text()
    assert run("-d 7 --per_target 3", raw.parent).exit_code == 0  # ours, as it was written
    with path.open("a") as file:
        file.write('{"case": "c01", "text": "one more", "target": "left lung"}\n')
    assert run("-d 7 --per_target 2", raw.parent).exit_code == 2
    assert run("-d 7 --per_target 2 --overwrite", raw.parent).exit_code == 0
    assert "one more" in (raw / "requests.jsonl.bak2").read_text()


def test_splits_that_were_planned_are_used(raw: Path, tmp_path: Path) -> None:
    folder = tmp_path / "preprocessed" / raw.name
    folder.mkdir(parents=True)
    splits = Splits(("c09",), (Fold(tuple(CASES[:7]), ("c07",), ("c08",)),))
    (folder / "splits.json").write_text(json.dumps(splits.to_json()))
    result = run("-d 7 --per_target 2", raw.parent, "--preprocessed_folder", str(tmp_path / "preprocessed"))
    assert result.exit_code == 0, result.output
    languages = {(r.case, r.language_split) for r in read_requests(raw / "requests.jsonl")}
    assert languages == {*((c, "train") for c in (*CASES[:7], "c08")), ("c07", "val"), ("c09", "test")}
    forced = run("-d 7 --per_target 2 --language test --styles label_prompt chat", raw.parent)
    assert forced.exit_code == 0
    requests = read_requests(raw / "requests.jsonl")
    assert {r.language_split for r in requests} == {"test"}
    assert {r.style for r in requests if not r.absent} == {"label_prompt", "chat"}


def test_bad_input_is_told_in_one_sentence(raw: Path) -> None:
    root = raw.parent
    unknown = run("-d 8", root)
    assert unknown.exit_code == 2
    assert "no dataset '8'" in sentence(unknown)
    style = run("-d 7 --styles chatt", root)
    assert style.exit_code == 2
    assert "Did you mean chat" in sentence(style)
    rd.write(raw / "labelsTr" / "c03.nii.gz", (rd.label() * 20).astype(np.uint8))
    (raw / "labelsTr" / "c04.nii.gz").unlink()
    (raw / "labelsTr" / "c06.nii.gz").write_bytes(b"no image")
    result = run("-d 7 --per_target 2", root)
    assert result.exit_code == 3
    told = sentence(result)
    assert "2 more cases failed" in told
    assert "label map" in told
    assert {r.case for r in read_requests(raw / "requests.jsonl")} == set(CASES) - {"c03", "c04", "c06"}
    faults = json.loads((raw / "requests_card.json").read_text())["faults"]
    assert "value 20" in faults["c03"]
    assert "no label map" in faults["c04"]
    (raw / "dataset.json").write_text("{}")
    broken = run("-d 7", root)
    assert broken.exit_code == 1
    assert "channel_names" in sentence(broken)


def test_a_dataset_without_any_label_map_has_nothing_to_do(tmp_path: Path) -> None:
    folder = rd.make(tmp_path / "Dataset002_Bare", CASES)
    for path in (folder / "labelsTr").iterdir():
        path.unlink()
    result = run("-d 2", tmp_path)
    assert result.exit_code == 4
    assert "no case with a label map" in sentence(result)


def test_the_hippocampus_set(development_data: Path) -> None:
    folder = development_data / "mr_hippocampus"
    if not folder.is_dir():
        pytest.skip("the hippocampus scans are not here")
    dataset = open_dataset(folder)
    splits = make_splits(dataset.subjects)
    few = set(splits.test[:2]) | set(splits.folds[0].train[:4]) | set(splits.folds[0].val[:2])
    small = replace(dataset, cases={k: v for k, v in dataset.cases.items() if k in few})
    report = make(small, splits=splits, seed=0)
    assert len(report.requests) == 8 * (2 * 16 + 4)
    assert report.context.unsided
    assert set(report.replaced) <= {"ambiguous_abbreviation"}


# --- the writer ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def report(raw: Path) -> Report:
    dataset = open_dataset(raw)
    return make(dataset, splits=make_splits(dataset.subjects), settings=Settings(per_target=16, absent_per_case=2), seed=0)


def _one(report: Report, style: str, target: str, surface: str | None = None) -> Made:
    for made in report.made:
        plain = made.request.style == style and made.name == target and not made.wording.slips
        if plain and (surface is None or made.wording.surface == surface):
            return made
    raise AssertionError(f"no {style} for {target}")


def test_round_trip_refuses_what_changes_the_meaning(report: Report) -> None:
    trip = RoundTrip(report.vocabulary, report.context.names, report.context.modality)
    made = _one(report, "clinical_request", "left lung")
    name = made.wording.surface if "left" in made.wording.surface else f"left {made.wording.surface}"
    assert trip.fault(made, made.request.text.upper()) == "unchanged"
    assert trip.fault(made, f"Could somebody kindly draw the {name} for our meeting?") is None
    assert trip.fault(made, f"Could somebody kindly draw the {name.replace('left', 'right')} for our meeting?") == "target"
    assert trip.fault(made, "Could somebody kindly draw the liver for our meeting?") == "target"
    assert trip.fault(made, "Could somebody kindly draw the thing?") == "target"
    assert trip.fault(made, f"{name} " * 60) == "length"
    absent = next(m for m in report.made if m.request.style == "out_of_region_reference" and not m.wording.slips)
    assert trip.fault(absent, "Please draw the left lung.") == "target"
    trained = next(
        m
        for m in report.made
        if m.name == "left lung" and m.wording.split == "train" and m.request.style == "formal_task" and m.wording.surface != "left lung"
    )
    other = next(s.text for s in report.vocabulary["left lung"].surfaces if s.split == "test" and s.kind == "synonym")
    fault = trip.fault(trained, f"Draw the left {trained.wording.surface.removeprefix('left ')}, that is the left {other}, for me.")
    assert fault in ("other split", "target")


def test_answers_are_cleaned() -> None:
    assert cleaned('\n"Please draw the liver."\nSure!') == "Please draw the liver."
    assert cleaned("Rewritten request: draw the  liver") == "draw the liver"
    assert cleaned(" \n ") is None
    assert cleaned("\u200b") is None


class _Endpoint(BaseHTTPRequestHandler):
    asked: ClassVar[list[dict[str, Any]]] = []
    keys: ClassVar[list[str | None]] = []
    mode = "polite"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append(body)
        type(self).keys.append(self.headers.get("Authorization"))
        text = body["messages"][-1]["content"]
        said = {"polite": f"I wonder, {text}", "turns": text.replace("left", "right")}.get(self.mode)
        if said is None:
            self.send_error(401 if self.mode == "refuses" else 200)
            return
        answer = json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Endpoint)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    _Endpoint.asked, _Endpoint.keys, _Endpoint.mode = [], [], "polite"
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_endpoint_rewrites_and_only_faithful_rewrites_are_kept(
    raw: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch, report: Report
) -> None:
    monkeypatch.setenv("MY_KEY", "secret-key")
    line = f"-d 7 --writer {endpoint} --writer_model tiny --writer_key_variable MY_KEY --writer_share 0.3"
    result = run(line, raw.parent)
    assert result.exit_code == 0, result.output
    assert set(_Endpoint.keys) == {"Bearer secret-key"}
    assert {body["model"] for body in _Endpoint.asked} == {"tiny"}
    card = json.loads((raw / "requests_card.json").read_text())
    told = card["rewriting"]
    assert told["kept"] + told["refused"] == len(_Endpoint.asked)
    assert told["kept"] > 20
    lines = [json.loads(text) for text in (raw / "requests.jsonl").read_text().splitlines()]
    rewritten = [x for x in lines if "writer" in x]
    assert len(rewritten) == told["kept"]
    assert all(x["text"].startswith("I wonder, ") for x in rewritten)
    assert "secret-key" not in (raw / "requests_card.json").read_text() + (raw / "requests.jsonl").read_text()
    _Endpoint.mode = "turns"
    rewriter = Rewriter(EndpointWriter(endpoint, "tiny"), share=0.2)
    turned = rewriter.rewrite(report)
    assert rewriter.kept == 0
    assert turned.requests == report.requests
    assert set(rewriter.reasons) <= {"unchanged", "target", "side", "own words"}
    assert rewriter.reasons["target"] > 3


def test_endpoints_that_fail_are_told(raw: Path, endpoint: str) -> None:
    _Endpoint.mode = "refuses"
    with pytest.raises(ModelError, match="refused with status 401"):
        EndpointWriter(endpoint, "tiny").rewrite(["x"], 0)
    _Endpoint.mode = "nonsense"
    with pytest.raises(ModelError, match="no chat completion"):
        EndpointWriter(endpoint, "tiny").rewrite(["x"], 0)
    with pytest.raises(ModelError, match="cannot be reached"):
        EndpointWriter("http://127.0.0.1:9/v1", "tiny").rewrite(["x"], 0)
    assert "--writer_model" in sentence(run(f"-d 7 --writer {endpoint}", raw.parent))
    assert "is no writer" in sentence(run("-d 7 --writer /nowhere/at/all", raw.parent))


@pytest.fixture
def tiny_llama(tmp_path: Path) -> Path:
    """A random llama with a tokeniser of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(["<eos>", *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(tmp_path / "llama")
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=len(letters) + 1, eos_token_id=0, bos_token_id=0, max_position_embeddings=1024, **size)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_a_local_model_that_babbles_is_refused_and_the_requests_stay(tiny_llama: Path, report: Report, tmp_path: Path) -> None:
    writer = load_writer(str(tiny_llama))
    assert writer.name == "llama"
    few = replace(report, made=report.made[:48])
    rewriter = Rewriter(writer, share=0.3, seed=1)
    after = rewriter.rewrite(few)
    told = rewriter.told()
    assert told["kept"] == 0
    assert told["refused"] > 3
    assert after.requests == few.requests
    assert writer.rewrite(["x y"], 5) == writer.rewrite(["x y"], 5)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_writer(str(tmp_path / "broken"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUFnot")
    with pytest.raises(ModelError, match="gguf"):
        load_writer(str(tmp_path / "broken.gguf"))


def test_help_and_unknown_options() -> None:
    assert isinstance(command, click.Command)
    shown = CliRunner().invoke(command, ["--help"])
    assert shown.exit_code == 0
    assert "--per_target" in shown.output
    wrong = CliRunner().invoke(command, ["-d", "7", "--per_targets", "3"])
    assert wrong.exit_code == 2
    assert "--per_target" in wrong.output
