"""Overlays, the HTML page of an evaluation and of a run, plots of training logs."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from test_evaluation import affine, labels_of, predict_perfectly, raw, row, save, write_prediction  # noqa: F401

from seerseg.dataset import label_prompts, open_dataset
from seerseg.errors import NothingToDoError
from seerseg.evaluation import About, References, evaluate, summarise
from seerseg.report import plot_progress, write_overlays, write_report, write_run_report
from seerseg.report.overlays import BOTH_COLOUR, PREDICTION_COLOUR, REFERENCE_COLOUR
from seerseg.report.plots import read_log


def has(pixels, colour):
    return int((pixels == np.array(colour)).all(axis=-1).sum())


class TestOverlays:
    def test_one_picture_per_case_with_both_outlines(self, raw, tmp_path):  # noqa: F811
        dataset = open_dataset(raw)
        matrix = affine()
        save(tmp_path / "out" / "a__a-left-lay.nii.gz", labels_of(1) == 1, matrix, "LPS")
        save(tmp_path / "out" / "a__a-right-lay.nii.gz", labels_of() == 2, matrix)
        requests = [r for r in dataset.requests if r.id in ("a-left-lay", "a-right-lay")]
        references = References.of_dataset(dataset)
        found = evaluate(tmp_path / "out", references, requests)
        pictures = write_overlays(tmp_path / "shots", found, tmp_path / "out", references, {c: f.images for c, f in dataset.cases.items()})
        assert list(pictures) == ["a"]
        pixels = np.asarray(Image.open(pictures["a"]))
        half = pixels.shape[0] // 2
        moved, equal = pixels[:half], pixels[half:]  # the worse one first
        assert has(moved, REFERENCE_COLOUR)
        assert has(moved, PREDICTION_COLOUR)
        assert has(equal, BOTH_COLOUR) > 100
        assert not has(equal, PREDICTION_COLOUR)
        assert not has(equal, REFERENCE_COLOUR)

    def test_the_patients_right_is_on_the_left(self, raw, tmp_path):  # noqa: F811
        dataset = open_dataset(raw)
        references = References.of_dataset(dataset)
        drawn = labels_of() == 2  # at high x, the patient's right
        save(tmp_path / "out" / "a__a-left-lay.nii.gz", drawn, affine())
        found = evaluate(tmp_path / "out", references, [r for r in dataset.requests if r.id == "a-left-lay"])
        (file,) = write_overlays(tmp_path, found, tmp_path / "out", references, {c: f.images for c, f in dataset.cases.items()}).values()
        axial = np.asarray(Image.open(file))[:, :336]
        columns = [np.flatnonzero((axial == np.array(c)).all(axis=-1).any(axis=0)).mean() for c in (PREDICTION_COLOUR, REFERENCE_COLOUR)]
        assert columns[0] < columns[1]

    def test_what_cannot_be_read_is_passed_over(self, raw, tmp_path):  # noqa: F811
        dataset = predict_perfectly(raw, tmp_path / "out")
        references = References.of_dataset(dataset)
        found = evaluate(tmp_path / "out", references, dataset.requests)
        (tmp_path / "out" / "a.nii.gz").write_bytes(b"")
        pictures = write_overlays(tmp_path, found, tmp_path / "out", references, {c: dataset.cases[c].images for c in ("a", "b")})
        assert list(pictures) == ["b"]


class _Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.open, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href", "data") and not v.startswith("#")]
        if tag in ("script", "link", "iframe"):
            self.links.append(tag)

    def handle_data(self, data):
        self.text += data


def read_page(path):
    page = _Links()
    content = path.read_text(encoding="utf-8")
    page.feed(content)
    assert all(link.startswith("data:image/") for link in page.links)
    assert not re.search(r"url\((?!#)|@import", content)
    return page.text


class TestPages:
    def test_evaluation_on_one_page_without_outside_help(self, raw, tmp_path):  # noqa: F811
        dataset = predict_perfectly(raw, tmp_path / "out")
        references = References.of_dataset(dataset)
        found = evaluate(tmp_path / "out", references, dataset.requests, optional=label_prompts(dataset))
        pictures = write_overlays(tmp_path, found, tmp_path / "out", references, {c: f.images for c, f in dataset.cases.items()})
        write_report(tmp_path / "page.html", found, pictures)
        text = read_page(tmp_path / "page.html")
        for needed in ("Dataset009_Boxes", "Dice, free text", "Robustness to wording", "left lung", "Overlays", "bank", "surface voxels"):
            assert needed in text
        assert (tmp_path / "page.html").read_text().count("data:image/jpeg") == 4

    def test_words_of_a_request_are_text_and_not_markup(self, tmp_path):
        bad = "<script>alert('x')</script>"
        from dataclasses import replace

        rows = [replace(row("s1_0", 0.3), text=bad, target=bad, style=bad, case=bad, answered=bad)]
        write_report(tmp_path / "page.html", summarise(About(bad, "p"), rows, missing=[bad], faults=[bad]))
        text = read_page(tmp_path / "page.html")
        assert text.count(bad) >= 5

    def test_nothing_present(self, tmp_path):
        write_report(tmp_path / "page.html", summarise(About("d", "p"), []))
        assert "No present target was scored" in read_page(tmp_path / "page.html")

    def test_a_run(self, tmp_path):
        entries = [
            {"id": "1", "text": "plz outline teh <liver>", "target_answered": "liver", "volume_ml": 12.5, "value": 1},
            {"id": "2", "text": "prostate", "status": "fault", "message": "no reply could be read"},
        ]
        write_prediction(tmp_path, "case_1", entries, labels_of())
        Image.new("RGB", (40, 30)).save(tmp_path / "case_1.png")
        (tmp_path / "other.json").write_text("[]")
        write_run_report(tmp_path / "run.html", tmp_path)
        text = read_page(tmp_path / "run.html")
        for needed in ("plz outline teh <liver>", "12.50", "no reply could be read", "case_1"):
            assert needed in text
        (tmp_path / "empty").mkdir()
        with pytest.raises(NothingToDoError, match="no case file"):
            write_run_report(tmp_path / "run.html", tmp_path / "empty")


class TestProgress:
    def test_a_training_log_being_written(self, tmp_path):
        log = tmp_path / "metrics.jsonl"
        lines = [json.dumps({"step": i, "train_loss": 1 / (i + 1), "reward": i / 10, "note": "x", "flag": True}) for i in range(10)]
        lines += [json.dumps({"step": 9, "val_loss": 0.2}), '{"step": 10, "val_', "[3]", '{"step": 11, "reward": NaN}']
        log.write_text("\n".join(lines))
        curves, axis = read_log(log)
        assert axis == "step"
        assert set(curves) == {"train_loss", "val_loss", "reward"}
        assert curves["val_loss"] == ([9.0], [0.2])
        plot_progress(log, tmp_path / "progress.png")
        with Image.open(tmp_path / "progress.png") as picture:
            assert picture.size[0] > 300

    def test_an_empty_log(self, tmp_path):
        (tmp_path / "m.jsonl").write_text("")
        with pytest.raises(NothingToDoError, match="no numbers"):
            plot_progress(tmp_path / "m.jsonl", tmp_path / "progress.png")
