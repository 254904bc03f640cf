"""WordNet's own file format, in a few lines of it, read for other words."""

from __future__ import annotations

from pathlib import Path

import pytest

from seerseg.errors import DatasetError
from seerseg_data.thesaurus import Thesaurus

FILES = {
    "data.adj": (
        "  1 This software and database is being provided to you under a licence.\n"
        "00000100 00 s 01 posterior 0 002 & 00000200 a 0000 ! 00000900 a 0101 | near the end of a structure\n"
        "00000200 00 s 03 back(a) 0 hind(a) 0 hinder 0 001 & 00000100 a 0000 | located at the back of an animal\n"
        "00000300 00 a 01 posterior 1 000 | coming later\n"
    ),
    "index.adj": "  1 licence\nposterior a 2 1 & 2 1 00000100 00000300\nback a 1 1 & 1 1 00000200\n",
    "data.noun": (
        "00000500 05 n 02 head 0 caput 0 000 | the upper part of the body\n00000600 05 n 02 posterior 0 buttocks 0 000 | the fleshy part\n"
        "00000700 05 n 02 top_dog 0 head 0 000 | chief\n"
    ),
    "index.noun": "head n 2 0 2 2 00000500 00000700\nposterior n 1 0 1 0 00000600\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_other_words_of_the_commonest_senses(folder: Path) -> None:
    found = Thesaurus.open(folder).others
    assert found["posterior"] == ("back", "hind", "hinder")  # as an adjective; never the noun
    assert found["head"] == ("caput",)  # no words of two parts
    assert found["back"] == ("hind", "hinder", "posterior")


def test_one_word_is_replaced_and_never_by_what_names_something_else(folder: Path) -> None:
    thesaurus = Thesaurus.open(folder)
    assert thesaurus.reworded("posterior part of the head", lambda pairs: pairs[-1], never=frozenset()) == "posterior part of the caput"
    assert thesaurus.reworded("Posterior part", lambda pairs: pairs[0], never=frozenset({"back"})) == "hind part"
    assert thesaurus.reworded("head", lambda pairs: pairs[0], never=frozenset({"caput"})) == "head"


def test_a_folder_without_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="wordnet-base"):
        Thesaurus.open(tmp_path)
    (tmp_path / "data.adj").write_text("this is no dictionary\n")
    (tmp_path / "index.adj").write_text("")
    with pytest.raises(DatasetError, match="does not hold"):
        Thesaurus.open(tmp_path)
