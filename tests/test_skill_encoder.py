"""Sentence embeddings for retrieval: a phrase is found by its meaning, vectors are kept, and folders that are none are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from seerseg.errors import ModelError
from seerseg.skills.base import Query, Skill
from seerseg.skills.encoder import EMBEDDINGS, SentenceEncoder, kept_vectors
from seerseg.skills.retrieval import ENCODED, FrozenBank, Weights
from seerseg.skills.store import BankFolder

WORDS = ("heart", "liver", "pump", "blood", "the", "outline", "please", "filter")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of one layer whose words it has never been taught."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("encoder") / "tiny"
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(("[PAD]", "[UNK]", *WORDS))}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(path)
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 160}
    BertModel(BertConfig(vocab_size=len(WORDS) + 2, **size)).save_pretrained(path)
    return path


class Counted:
    """Means by a table: what says pump or heart is nearly one thing, everything else another."""

    identity = "table-1"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        self.asked += texts
        return np.array([[1.0, 0.0] if "pump" in t else [0.96, 0.28] if "heart" in t else [0.0, 1.0] for t in texts], np.float32)


def skill(word: str, target: str) -> Skill:
    return Skill("", "PROMPT_NORMALIZE", f"the request says {word}", f"answer {target}", words=(word,), target=target)


HEART, LIVER = skill("big pump", "heart"), skill("bile maker", "liver")


def test_vectors_do_not_depend_on_what_is_asked_for_beside_a_text(folder: Path) -> None:
    encoder = SentenceEncoder(folder)
    texts = ["the heart", "please outline the liver", "blood", "the " * 300]
    together = encoder(texts)
    assert together.shape == (4, 16)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-5)
    for text, vector in zip(texts, together, strict=True):
        np.testing.assert_allclose(encoder([text])[0], vector, atol=1e-5)
    assert encoder([]).shape == (0, 16)
    assert encoder.identity == SentenceEncoder(folder).identity


def test_the_folder_says_which_token_stands_for_a_text(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "first"
    shutil.copytree(folder, other)
    (other / "1_Pooling").mkdir()
    said = other / "1_Pooling" / "config.json"
    said.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "word_embedding_dimension": 16}))
    assert not np.allclose(SentenceEncoder(other)(["the heart"]), SentenceEncoder(folder)(["the heart"]), atol=1e-3)
    said.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(ModelError, match="average tokens or take the first"):
        SentenceEncoder(other)


def test_a_folder_that_is_no_encoder(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no sentence encoder"):
        SentenceEncoder(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="cannot be loaded"):
        SentenceEncoder(broken)


def test_what_was_embedded_is_kept_by_its_content(tmp_path: Path) -> None:
    encoder = Counted()
    one = kept_vectors(["the pump", "bile"], encoder, tmp_path)
    two = kept_vectors(["bile", "the heart", "the pump"], encoder, tmp_path)
    assert encoder.asked == ["the pump", "bile", "the heart"]
    np.testing.assert_allclose(two, [one[1], [0.96, 0.28], one[0]], rtol=1e-3)  # kept in half precision
    (tmp_path / EMBEDDINGS / "table-1.npz").write_bytes(b"torn")
    np.testing.assert_array_equal(kept_vectors(["bile"], encoder, tmp_path), [[0, 1]])
    assert encoder.asked[3:] == ["bile"]


def test_a_skill_is_found_by_its_meaning_and_by_its_words(tmp_path: Path) -> None:
    BankFolder(tmp_path).change(lambda now: {s.id: s for s in (HEART, LIVER)}, "two")
    encoder = Counted()
    bank = FrozenBank.open(tmp_path, weights=ENCODED, encoder=encoder)
    assert bank.retrieve(Query("outline the heart"), 1) == [HEART], "no word in common"
    assert FrozenBank.open(tmp_path).retrieve(Query("outline the heart"), 1) == []
    far = FrozenBank.open(tmp_path, weights=replace(ENCODED, scale=10), encoder=encoder)
    assert far.retrieve(Query("outline the heart"), 1) == []
    assert far.retrieve(Query("the big pump please"), 1) == [HEART], "words count as ever"
    assert encoder.asked.count("big pump") == 1, "phrases are embedded once"
    assert len({bank.identity, far.identity, FrozenBank.open(tmp_path).identity}) == 3
    assert FrozenBank.of([HEART], weights=Weights(), encoder=encoder).retrieve(Query("heart"), 1) == [HEART]
    assert FrozenBank.of([], encoder=encoder).retrieve(Query("heart"), 1) == []
