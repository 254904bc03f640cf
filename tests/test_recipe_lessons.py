"""What the reasoners learn: pictures and their file, requests with replies, exams, and the loss; on made-up slices and one phantom."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nano_models import coarse_phantoms

from seerseg.errors import DatasetError
from seerseg.protocols.base import ABSENT
from seerseg.protocols.messages import Message
from seerseg.protocols.seer import SYSTEM, SeerProtocol
from seerseg.reasoners import load_reasoner
from seerseg.reasoners.base import ReasonerCard
from seerseg.reasoners.nano import SHIPPED, NanoReasoner
from seerseg.vocabulary import Vocabulary
from seerseg_data.recipes import exams, lessons, nano_vlm, pictures
from seerseg_data.recipes.pictures import SIDE_PX, Picture

PROTOCOL = SeerProtocol()
PIXELS = np.random.default_rng(0).integers(0, 255, (3, SIDE_PX, SIDE_PX), dtype=np.uint8)
CHEST = Picture(
    PIXELS, "torso", "CT", "axial", ("left lung", "right lung", "ribs", "vertebral column", "lungs"), (), frozenset({"head"}), "chest"
)
CROP = Picture(PIXELS[:2], "hippocampus", "MR", "axial", ("hippocampus",), (), frozenset({"chest"}), "head")
needs_weights = pytest.mark.skipif(not (SHIPPED / "model.safetensors").is_file(), reason="the shipped weights are not in this checkout")


@pytest.fixture(scope="module")
def maker() -> lessons.Maker:
    return lessons.Maker([CHEST, CROP], Vocabulary.load())


class TestPictures:
    def test_of_a_phantom(self, tmp_path: Path) -> None:
        item = coarse_phantoms(tmp_path)[0]
        (plain,) = pictures.take(item, random.Random(0), 1, plain=True)
        assert plain.pixels.shape == (8, SIDE_PX, SIDE_PX)
        assert plain.pixels.dtype == np.uint8
        assert (plain.kind, plain.modality, plain.plane) == ("torso", "CT", "axial")
        assert {"left lung", "right lung", "lungs"} <= set(plain.seen)
        assert "head" in plain.absent
        assert "chest" in plain.said
        others = pictures.take(item, random.Random(1), 6)
        assert {len(p.pixels) for p in others} != {8} or {p.plane for p in others} != {"axial"}
        assert all(set(p.missing).isdisjoint(p.seen) for p in others)

    def test_what_is_known_not_to_be_there(self, maker: lessons.Maker) -> None:
        entry = maker.relatives.entry
        assert CHEST.shows(entry("left lung"), "left lung")
        assert CHEST.shows(entry("aorta"), "aorta"), "not labelled: nobody knows"
        assert not CHEST.shows(entry("hippocampus"), "hippocampus"), "the head is not in it"
        assert not replace(CHEST, missing=("aorta",)).shows(entry("aorta"), "aorta")

    def test_augmented_keeps_what_is_known(self) -> None:
        made = [CHEST.augmented(random.Random(seed)) for seed in range(10)]
        assert any(not np.array_equal(p.pixels, CHEST.pixels) for p in made)
        assert all(p.pixels.shape == PIXELS.shape and p.seen == CHEST.seen for p in made)

    def test_the_file_gives_them_back(self, tmp_path: Path) -> None:
        pictures.save_pictures(tmp_path / "new", [CHEST, CROP], [CROP])
        training, held = pictures.load_pictures(tmp_path / "new")
        for kept, given in zip([*training, *held], [CHEST, CROP, CROP], strict=True):
            assert np.array_equal(kept.pixels, given.pixels)
            for name in ("kind", "modality", "plane", "seen", "missing", "absent", "said"):
                assert getattr(kept, name) == getattr(given, name)
        assert (len(training), len(held)) == (2, 1)

    def test_missing_older_and_damaged_files_get_a_sentence(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match=r"no pictures.*prepare"):
            pictures.load_pictures(tmp_path)
        (tmp_path / "pictures.pkl").write_bytes(b"never opened")
        with pytest.raises(DatasetError, match=r"older version.*prepare"):
            pictures.load_pictures(tmp_path)
        pictures.save_pictures(tmp_path, [CHEST], [CROP])
        whole = (tmp_path / "pictures.npz").read_bytes()
        for damaged in (whole[: len(whole) // 2], b"nonsense", b""):
            (tmp_path / "pictures.npz").write_bytes(damaged)
            with pytest.raises(DatasetError, match="damaged"):
                pictures.load_pictures(tmp_path)

    def test_another_schema_is_refused(self, tmp_path: Path) -> None:
        known = json.dumps({"schema": 99, "training": 0, "pictures": []})
        np.savez(tmp_path / "pictures.npz", pixels=PIXELS, known=np.array(known))
        with pytest.raises(DatasetError, match="schema 99"):
            pictures.load_pictures(tmp_path)


class TestMaker:
    @pytest.mark.parametrize("kind", sorted(lessons.KINDS))
    @pytest.mark.parametrize("first", [True, False])
    def test_replies_are_in_the_grammar_and_among_the_names(self, maker: lessons.Maker, kind: str, first: bool) -> None:
        maker.first = first
        group = maker.group(random.Random(3), kind)
        maker.first = False
        assert group.samples
        for sample in group.samples:
            assert PROTOCOL.wellformed(sample.reply) == 1.0
            assert sample.answer == ABSENT or not group.names or sample.answer in group.names
            assert f"<answer>{sample.answer}</answer>" in sample.reply
            assert len(sample.text) < 300
            assert not (first and sample.skills)

    def test_the_same_seed_is_the_same_group(self) -> None:
        one, two = (lessons.Maker([CHEST, CROP], Vocabulary.load()).group(random.Random(7)) for _ in range(2))
        assert one.samples == two.samples
        assert one.names == two.names

    def test_what_is_out_of_sight_or_not_listed_is_absent(self, maker: lessons.Maker) -> None:
        rng = random.Random(5)
        case = lessons.Case(CHEST, "CT", ("left lung", "left hippocampus"))
        drawn = [sample for sample in (maker.sample(rng, case) for _ in range(60)) if sample is not None]
        assert {sample.answer for sample in drawn} == {"left lung", ABSENT}
        whys = {why for sample in drawn for why in ("not in this scan", "not among the names", "names no structure") if why in sample.reply}
        assert {"not in this scan", "not among the names"} <= whys

    def test_the_rationale_names_the_skill_that_leads_to_the_answer(self) -> None:
        maker, rng = lessons.Maker([CHEST, CROP], Vocabulary.load()), random.Random(0)
        maker.skilled = 0.8
        named = [
            sample
            for sample in (s for _ in range(3) for s in maker.group(rng, "scan").samples)
            if sample.skills and sample.reply.split("<rationale>")[1][0] == "["
        ]
        assert named
        for sample in named:
            number = int(sample.reply.split("<rationale>[")[1].split("]")[0])
            assert sample.skills[number - 1].what == f"answer {sample.answer}"

    def test_general_words_come_from_the_thesaurus(self) -> None:
        refused: list[frozenset[str]] = []

        class Words:
            def reworded(self, text: str, choose: object, *, never: frozenset[str] = frozenset()) -> str:
                refused.append(never)
                return f"zz {text}"

        maker = lessons.Maker([CHEST, CROP], Vocabulary.load(), Words())  # type: ignore[arg-type]
        rng = random.Random(2)
        samples = [s for _ in range(3) for s in maker.group(rng, "scan").samples]
        assert any("zz " in sample.text for sample in samples)
        assert any("left" in words for words in refused), "what tells relatives apart may not come in"

    def test_relatives(self, maker: lessons.Maker) -> None:
        left = maker.relatives.entry("left lung")
        assert "right lung" in maker.relatives.close(left)
        assert "left lung" not in maker.relatives.close(left)
        assert maker.relatives.entry("zubado").surfaces == ()


class Oracle:
    """Answers rightly what is in its book."""

    card = ReasonerCard("oracle", "oracle")

    def __init__(self, book: dict[str, str]) -> None:
        self.book = book

    def reply(self, dialogues: Sequence[Sequence[Message]], samples: int = 1, seed: int = 0) -> list[list[str]]:
        asked = [dialogue[-1].text.split("<raw_prompt>")[1].split("</raw_prompt>")[0] for dialogue in dialogues]
        return [[lessons.reply_of("scan", "as said", self.book[text]) if text in self.book else "what?"] for text in asked]


class TestExams:
    HELD = (
        CROP,
        replace(CHEST, absent=frozenset({"head", "pelvis", "abdomen"}), seen=("left lung", "right lung", "ribs", "lungs")),
    )

    def test_they_are_always_the_same_and_in_validation_language(self) -> None:
        vocabulary = Vocabulary.load()
        one, two = (exams.make_exams(self.HELD, vocabulary) for _ in range(2))
        assert [exam.name for exam in one] == ["hippocampus", "full list", "phantoms", "chest", "absent", "absent, full list"]
        assert [row.text for exam in one for row in exam.rows] == [row.text for exam in two for row in exam.rows]
        for exam in one:
            for row in exam.rows:
                assert row.answer == ABSENT or row.answer in row.names
        other = exams.make_exams(self.HELD, vocabulary, "test")
        assert {row.text for row in one[0].rows} != {row.text for row in other[0].rows}

    def test_marks(self) -> None:
        tests = exams.make_exams(self.HELD[:1], Vocabulary.load())[:1]
        rows = tests[0].rows
        unlike = {row.text: row.answer for row in rows[: len(rows) // 2]}
        perfect, half = (Oracle(book) for book in ({row.text: row.answer for row in rows}, unlike))
        found = exams.mark(tests, perfect)["hippocampus"]
        assert (found.n, found.exact, found.wellformed, found.wrong) == (len(rows), 1.0, 1.0, [])
        assert set(found.styles) == {row.style for row in rows}
        known = exams.mark(tests, half)
        assert 0 < exams.score(known) < 1
        assert known["hippocampus"].wellformed < 1
        style, text, answer, reply = known["hippocampus"].wrong[0]
        assert (reply, answer in lessons.HIPPOCAMPUS, bool(style), bool(text)) == ("what?", True, True, True)


@needs_weights
class TestNanoLoss:
    @pytest.fixture(scope="class")
    @classmethod
    def nano(cls) -> NanoReasoner:
        made = load_reasoner("nano")
        assert isinstance(made, NanoReasoner)
        return made

    def test_training_sees_the_tokens_of_prediction_and_the_numbers_of_the_stock_forward(
        self, nano: NanoReasoner, maker: lessons.Maker
    ) -> None:
        rng = random.Random(0)
        maker.skilled = 0.7
        group = next(g for g in iter(lambda: maker.group(rng, "scan"), None) if g.samples and g.samples[0].skills)
        maker.skilled = lessons.SKILLED
        encoder = nano_vlm.Encoder(nano, dropout=0.0)
        ids, tensors = encoder.prefix(group)
        tails, scored = encoder.tails(group, rng)
        with torch.no_grad():
            cache, delta = nano_vlm.prefix_cache(nano.model, ids, tensors)
            hidden = nano_vlm.forward_behind(nano.model.model.language_model, tails, cache, len(ids) + delta)
            assert len(hidden) == len(scored) == sum(map(len, tails))
            sample = group.samples[0]
            views = pictures.as_views(group.picture, group.modality)
            asked = nano.encode(PROTOCOL.opening(views, sample.text, sample.skills, group.names))
            assert asked.ids == ids + tails[0][: len(asked.ids) - len(ids)], "training sees the tokens that prediction sends"
            whole = torch.tensor([ids + tails[0]])
            kinds = {"mm_token_type_ids": torch.nn.functional.pad(tensors["mm_token_type_ids"], (0, len(tails[0])))}
            stock = nano.model.model(input_ids=whole, attention_mask=torch.ones_like(whole), **{**tensors, **kinds}).last_hidden_state[0]
        assert torch.allclose(stock[len(ids) :], hidden[: len(tails[0])], atol=1e-3)

    def test_the_shipped_model_finds_its_lessons_easy(self, nano: NanoReasoner, maker: lessons.Maker) -> None:
        group = maker.group(random.Random(1), "hippocampus")
        loss = nano_vlm.group_loss(nano_vlm.Encoder(nano, dropout=0.0), group, random.Random(0))
        assert 0 < loss.scored < loss.read
        assert loss.right > 0.9 * loss.scored
        assert float(loss.total.detach()) < 0.5 * loss.scored


class TestNanoFolder:
    def test_a_tokeniser_and_a_small_model_are_written_and_read_back(self, tmp_path: Path, maker: lessons.Maker) -> None:
        """Every fixed text is one token, and a reply comes out as it went in."""
        corpus = [s.text + s.reply for seed in range(4) for s in maker.group(random.Random(seed), "scan").samples] + list(maker.core)
        opening = PROTOCOL.opening(pictures.as_views(CHEST, "CT"), "left lung", (), CHEST.seen)
        corpus += [part for message in opening for part in message.text.split("\n")] * 8
        tokeniser = nano_vlm.make_tokeniser(corpus)
        nano_vlm.save_processor(tokeniser, tmp_path)
        model = nano_vlm.make_model(tokeniser, hidden=64, layers=1, inner=32)
        reasoner = nano_vlm.wrap(model, tmp_path, max_new_tokens=2)
        assert len(reasoner.tokenizer(SYSTEM)["input_ids"]) <= 2
        said = "<evidence>CT of the chest</evidence><rationale>left lung</rationale><answer>left lung</answer>"
        assert reasoner.tokenizer.decode(reasoner.tokenizer(said)["input_ids"], skip_special_tokens=True) == said
        assert len(reasoner.reply([opening])) == 1
        group = maker.group(random.Random(2), "scan")
        loss = nano_vlm.group_loss(nano_vlm.Encoder(reasoner, dropout=0.1), group, random.Random(0))
        loss.total.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.model.visual.parameters()), "the eyes learn too"

    def test_renewing_the_marks_changes_nothing_where_they_are_new(self, tmp_path: Path) -> None:
        nano_vlm.save_processor(nano_vlm.make_tokeniser(["left lung", "right lung of the chest"]), tmp_path)
        path = tmp_path / "tokenizer.json"
        before = json.loads(path.read_text())
        nano_vlm.renew_marks(path)
        after = json.loads(path.read_text())
        assert {k: after[k] for k in ("model", "normalizer", "decoder")} == {k: before[k] for k in ("model", "normalizer", "decoder")}
