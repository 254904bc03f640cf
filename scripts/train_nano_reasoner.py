#!/usr/bin/env python
"""Train the nano reasoner on one CPU core: a tiny Qwen3-VL with its own tokeniser, SEER's grammar, a request and a few slices -> a name.

    python scripts/train_nano_reasoner.py prepare --cache CACHE --data DATA --out OUT
    python scripts/train_nano_reasoner.py train --cache CACHE --out OUT --minutes 75
    python scripts/train_nano_reasoner.py export --out OUT --to seerseg/weights/nano_reasoner

CACHE and DATA are those of scripts/train_nano_segmenter.py. `prepare` draws the slices of all scans once and trains the tokeniser on
training language; `train` continues from OUT/last.pt when that exists; `export` writes the model folder of the best checkpoint.

Only training language (vocabulary and sentences marked "train") and training cases are learnt from; validation language on
validation cases chooses the checkpoint; test cases and test language are not touched here.

A step is a few groups. A group is what prediction sends for one case: system, slices, instruction and the names that may be answered,
run through the model once, and behind its cache many requests with their replies, of which the loss is taken.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts"))

from seerseg.protocols import combined, medreasoner, medsam_agent, medvol_r1  # noqa: E402
from seerseg.protocols.base import ABSENT  # noqa: E402
from seerseg.protocols.messages import Message, TextPart  # noqa: E402
from seerseg.protocols.seer import SYSTEM, SeerProtocol, inert, normalise_name  # noqa: E402
from seerseg.reasoners.decoding import Decoding  # noqa: E402
from seerseg.reasoners.vlm import VlmReasoner  # noqa: E402
from seerseg.reasoners.vlm_loading import SHIPPED as SHIPPED_MODELS  # noqa: E402
from seerseg.reasoners.vlm_loading import Loaded, Source, load_processor  # noqa: E402
from seerseg.skills.base import DEFAULT_TAG, TAG_OF_STYLE, Skill  # noqa: E402
from seerseg.views import CaseViews, PixelMap, View, ViewSpec  # noqa: E402
from seerseg.vocabulary import Entry, Vocabulary  # noqa: E402
from seerseg.volume import Grid  # noqa: E402
from seerseg_data.nano_vocabulary import CANONICAL  # noqa: E402
from seerseg_data.phantoms import LABELS  # noqa: E402
from seerseg_data.thesaurus import Thesaurus  # noqa: E402

SIDE_PX = 96
VOCABULARY_SIZE = 2048
SPECIAL = (
    "<|pad|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
JOINS = (
    (" ,", ","), (" .", "."), (" ;", ";"), (" :", ":"), (" - ", "-"), (" ' ", "'"), ("( ", "("), (" )", ")"), (" / ", "/"), (" _ ", "_"),
    ("> ", ">"), (" <", "<"), ("ct of", "CT of"), ("mr of", "MR of"),
)  # fmt: skip
"""How decoded tokens become text: spaces around marks, and capitals that the normaliser took away."""
INSTRUCTION_END = "Name the structure that the request asks for."
PROMPT_TEXTS = (
    medvol_r1.SYSTEM, medreasoner.SYSTEM, medreasoner.VOLUME_RULE, medsam_agent.SYSTEM, medsam_agent.VOLUME_RULE, medsam_agent.NEXT,
    medsam_agent.NO_MASK, combined.SYSTEM, "Give the key slice and the boxes of what the request refers to.",
    "Ground what the question is about.", "Segment what the request names. What is your first action?",
    "Name and box the structure that the request asks for.",
)  # fmt: skip
"""Fixed texts of the protocols that nano was not trained on; each is one mark, so that a dialogue is short."""
REPLY_TEXTS = (
    "<think>", "</think>",
    '<tool_call>{"name": "add_bbox", "arguments": {"view": "axial", "slice": ', ', "bbox_2d": [', "]}}</tool_call>",
    '<tool_call>{"name": "add_point", "arguments": {"view": "axial", "slice": ', ', "point_2d": [',
    '], "point_type": "positive"}}</tool_call>', '], "point_type": "negative"}}</tool_call>',
    '<tool_call>{"name": "stop_action", "arguments": {}}</tool_call>',
    '<answer>[{"slice": ', ', "bbox_2d_list": [[', "]]}]</answer>", "<answer>[]</answer>",
    "<answer>{'slice': ", ", 'bbox': [", "], 'points_1': [", "], 'points_2': [", "<answer>{}</answer>",
    '<answer>{"target": "', *(f'", "side": "{side}", "slice": ' for side in ("none", "left", "right")), ', "boxes": [[', "]]}</answer>",
    "]}</answer>", '<answer>{"target": "absent"}</answer>',
)  # fmt: skip
"""What their replies are made of between names and numbers; each is one mark, which is written out again."""
PROTOCOL = SeerProtocol()
HIPPOCAMPUS = ("anterior hippocampus", "posterior hippocampus")
CT_CHEST = (
    "ribs", "cervical vertebral column", "thoracic vertebral column", "lumbar vertebral column", "right lung", "left lung", "tissue",
    "vertebral column", "lungs",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- tokeniser, model


def mark_fixed_texts(raw: Any) -> None:
    """Have a tokeniser read each fixed text as one mark (a character of the private use area) and write those of replies out again."""
    from tokenizers import decoders, normalizers

    known = [SYSTEM, INSTRUCTION_END, *PROMPT_TEXTS, *REPLY_TEXTS]
    marks = {text: chr(0xE000 + number) for number, text in enumerate(known)}
    longest_first = sorted(marks, key=len, reverse=True)
    raw.normalizer = normalizers.Sequence(
        [
            *(normalizers.Replace(text, marks[text]) for text in longest_first),
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
        ]
    )
    raw.decoder = decoders.Sequence(
        [
            decoders.ByteLevel(),
            *(decoders.Replace(old, new) for old, new in JOINS),
            *(decoders.Replace(f"{blank}{marks[text]}", text) for text in REPLY_TEXTS for blank in (" ", "")),
        ]
    )


def renew(arguments: argparse.Namespace) -> None:
    """Renew the marks of the tokeniser in OUT, or of the shipped one, after a fixed text was changed; no weight changes."""
    from tokenizers import Tokenizer

    path = (arguments.out or SHIPPED_MODELS["nano"]) / "tokenizer.json"
    raw = Tokenizer.from_file(str(path))
    mark_fixed_texts(raw)
    raw.save(str(path))


def make_tokeniser(corpus: Sequence[str]) -> Any:
    """Byte-level BPE without case, accents and spaces: every word begins with the same mark wherever it stands, so that a name in the
    list and the same name in the answer are the same tokens. Fixed sentences of the grammar are one token each."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(r"</?[a-z_]+>|[^\W_]+|."), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
        ]
    )
    mark_fixed_texts(raw)
    raw.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY_SIZE,
            special_tokens=list(SPECIAL),
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    made = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<|pad|>", eos_token="<|im_end|>", padding_side="left")
    made.chat_template = TEMPLATE
    return made


def make_model(tokeniser: Any, *, hidden: int, layers: int, inner: int, seed: int = 0) -> Any:
    """A random model of the true architecture."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    ids = {
        f"{name}_token_id": tokeniser.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("vision_start", "vision_start"), ("vision_end", "vision_end"), ("image", "image_pad"), ("video", "video_pad"),
        )
    }  # fmt: skip
    text = {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "mrope_section": [12, 10, 10], "mrope_interleaved": True, "rope_theta": 10000.0},
        "pad_token_id": tokeniser.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokeniser.eos_token_id,
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 4,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_heads": 4,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": hidden,
        "num_position_embeddings": (SIDE_PX // 16) ** 2,
        "deepstack_visual_indexes": [1],
    }
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids))
    model.generation_config.eos_token_id = tokeniser.eos_token_id
    model.generation_config.pad_token_id = tokeniser.pad_token_id
    return model


def save_processor(tokeniser: Any, folder: Path) -> None:
    """Tokeniser and image processor: every slice becomes SIDE_PX square, 9 tokens."""
    from transformers import Qwen2VLImageProcessorPil

    tokeniser.save_pretrained(folder)
    pixels = SIDE_PX * SIDE_PX
    images = Qwen2VLImageProcessorPil(
        patch_size=16, min_pixels=pixels, max_pixels=pixels, merge_size=2, temporal_patch_size=2, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )
    images.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen3VLProcessor"}))


def wrap(model: Any, folder: Path, *, max_new_tokens: int = 40) -> VlmReasoner:
    """The product's reasoner around a model in memory; processor and tokeniser from `folder`."""
    processor = load_processor(folder)
    source = Source(folder, None, "nano")
    return VlmReasoner(
        Loaded(model, processor, processor.tokenizer, source, "training", ""), Decoding(max_new_tokens=max_new_tokens, max_batch=48)
    )


# ------------------------------------------------------------------------------------------------------------------ pictures


@dataclass(frozen=True, eq=False)
class Picture:
    """Slices of one scan as the reasoner sees them.

    pixels uint8 (n, SIDE_PX, SIDE_PX); seen: names with voxels in it; missing: labelled names without; absent: regions of the body of
    which nothing is in it; said: the regions in words.
    """

    pixels: np.ndarray
    kind: str
    modality: str
    plane: str
    seen: tuple[str, ...]
    missing: tuple[str, ...]
    absent: frozenset[str]
    said: str

    def shows(self, entry: Entry, name: str) -> bool:
        """False when it is known that the structure is not in it."""
        if name in self.seen or entry.name in self.seen:
            return True
        return not (name in self.missing or entry.name in self.missing or (entry.regions and self.absent.issuperset(entry.regions)))


def take_pictures(item: Any, rng: random.Random, count: int, *, plain: bool = False) -> list[Picture]:
    """Renderings of one training item: parts of its extent, other planes, the planes' own windows. plain: as prediction shows it."""
    image, labels, spacing = item.levels[0]
    image, labels = image.numpy().astype(np.float32), labels.numpy()
    return [_picture(item, image, labels, spacing, rng, plain=plain) for _ in range(count)]


def _picture(item: Any, image: np.ndarray, labels: np.ndarray, spacing: np.ndarray, rng: random.Random, *, plain: bool) -> Picture:
    from PIL import Image

    from seerseg.views import render
    from seerseg.volume import Volume

    size = labels.shape[0]
    low, high = 0, size
    if not plain and item.group != "hippocampus" and rng.random() < 0.7:
        length = rng.randint(max(4, int(0.3 * size)), size)
        low = rng.randint(0, size - length)
        high = low + length
    image, labels = image[low:high], labels[low:high]
    if not plain and item.group == "hippocampus" and rng.random() < 0.5:  # which side a crop shows is not recorded
        image, labels = image[:, :, ::-1], labels[:, :, ::-1]
    affine = np.diag([*spacing[::-1], 1.0])
    volume = Volume(np.ascontiguousarray(image), Grid(image.shape, affine), item.modality)
    plane = "axial" if plain else rng.choices(("axial", "coronal", "sagittal"), (0.8, 0.12, 0.08))[0]
    count = 8 if plain or rng.random() < 0.7 else rng.randint(3, 8)
    spec = ViewSpec(plane=plane, count=count) if plain else ViewSpec(plane=plane, count=count, gamma=rng.uniform(0.75, 1.3))  # type: ignore[arg-type]
    views = render(volume, spec).views
    pixels = np.stack([np.asarray(Image.fromarray(v.pixels[..., 0]).resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)) for v in views])
    voxels = np.bincount(labels.ravel(), minlength=512)
    counts = {name: int(voxels[list(values)].sum()) if values else 0 for name, values in item.structures.items()}
    seen = tuple(name for name, number in counts.items() if number >= 50)
    missing = tuple(name for name, number in counts.items() if number == 0 and item.structures[name])
    return Picture(pixels, item.group, item.modality, plane, seen, missing, *_regions(item, seen))


_TRUNK = {
    "chest": ("left lung", "right lung", "heart", "lungs"),
    "abdomen": ("liver", "left kidney", "right kidney", "spleen"),
    "pelvis": ("left hip bone", "right hip bone", "urinary bladder", "left gluteus maximus"),
    "head": ("skull", "brain", "cerebellum", "hippocampus", "brain tumour", "left thalamus"),
}


def _regions(item: Any, seen: tuple[str, ...]) -> tuple[frozenset[str], str]:
    absent = set(item.absent) - {"trunk"}
    shown = [region for region, marks in _TRUNK.items() if any(mark in seen for mark in marks)]
    for region, marks in _TRUNK.items():
        if region not in shown and any(mark in item.structures for mark in marks):
            absent.add(region)
    if shown == ["head"]:
        absent |= {"chest", "abdomen", "pelvis", "upper limb", "lower limb", "spine"} - ({"neck"} if item.group != "hippocampus" else set())
    elif "head" not in shown and ("chest" in shown or "abdomen" in shown):
        absent |= {"head"}
    if item.group == "hippocampus":
        absent.add("neck")
    said = " and ".join(shown) or ("spine" if any("vertebra" in name for name in seen) else "body")
    return frozenset(absent), said


def gather_pictures(cache: Path, data: Path) -> tuple[list[Picture], list[Picture]]:
    """(training, validation) pictures. Validation: the validation cases of fold 0 of the hippocampus set, phantoms of seeds 900 to 907."""
    import train_nano_segmenter as segmenter

    rng = random.Random(0)
    training: list[Picture] = []
    for item in segmenter.training_items(cache, data, 40):
        many = {"hippocampus": 3, "brain": 14}.get(item.group, 6 if "phantom" in item.name else 24)
        training += take_pictures(item, rng, many)
    split = json.loads((ROOT / "seerseg_data" / "splits" / "hippocampus.json").read_text())
    held = segmenter.hippocampus_items(data / "mr_hippocampus", split["folds"][0]["val"])
    held += segmenter.phantom_items(8, cache / "phantoms", first_seed=900)
    return training, [take_pictures(item, rng, 1, plain=True)[0] for item in held]


def as_views(picture: Picture | None, modality: str | None) -> CaseViews:
    """What a protocol needs of views; without picture a case of which nothing is shown."""
    grid = Grid((8, 8, 8), np.eye(4))
    where = PixelMap(0, 0, (1.0, 1.0), (0.0, 0.0), (8, 8))
    plane: Any = picture.plane if picture else "axial"
    views = [] if picture is None else [View(np.repeat(p[..., None], 3, axis=2), plane, where) for p in picture.pixels]
    return CaseViews(tuple(views), grid, ViewSpec(plane=plane), modality)


# ------------------------------------------------------------------------------------------------------------------ requests


@dataclass(frozen=True)
class Sample:
    """A request and its reply. answer: a name of the list, or "absent"."""

    text: str
    reply: str
    answer: str
    style: str
    skills: tuple[Skill, ...] = ()


@dataclass(frozen=True, eq=False)
class Group:
    """Requests on one case with one list of names."""

    picture: Picture | None
    modality: str | None
    names: tuple[str, ...]
    samples: tuple[Sample, ...]
    kind: str


KINDS = {"hippocampus": 0.34, "full": 0.12, "scan": 0.24, "any": 0.22, "open": 0.04, "made_up": 0.04}
FIRST_KINDS = {"hippocampus": 0.10, "full": 0.02, "scan": 0.26, "any": 0.26, "open": 0.06, "made_up": 0.30}
FIRST_STYLES = ("label_prompt", "abbr_or_short", "messy_or_misspelled", "clinical_request", "formal_task")
"""What groups are drawn from; at first short requests and names that can only be copied."""
SKILLED = 0.15
"""Share of requests that come with skills, and of these the shares with the fitting one and with a word that only a skill explains."""
FITTING, ONLY_SKILL = 0.65, 0.3
REWORDED = 0.35
"""Share of requests of which a word is replaced by another of general language, where a dictionary is given."""
_NONSENSE = (
    "hello", "thanks", "table", "banana", "river", "car keys", "the dog", "coffee", "my appointment", "invoice", "window", "shoe",
    "bicycle", "patient name", "the report", "guitar", "sandwich", "yesterday", "something", "stuff", "asdf", "test", "xyz",
    "what is this", "help",
)  # fmt: skip


def reply_of(evidence: str, rationale: str, answer: str) -> str:
    """In SEER's grammar."""
    return "".join(f"<{p}>{inert(t)}</{p}>" for p, t in (("evidence", evidence), ("rationale", rationale), ("answer", answer)))


class Maker:
    """Draws groups from pictures, vocabulary and sentences, in training language."""

    def __init__(self, pictures: Sequence[Picture], vocabulary: Vocabulary, thesaurus: Thesaurus | None = None) -> None:
        from seerseg_data.requests import PARAPHRASE_STYLES

        self.vocabulary, self.thesaurus = vocabulary, thesaurus
        self._never: dict[str, frozenset[str]] = {}
        self.hippocampus = [p for p in pictures if p.kind == "hippocampus"]
        self.others = [p for p in pictures if p.kind != "hippocampus"]
        self.all_styles = PARAPHRASE_STYLES
        self.first = False
        self.core = tuple(CANONICAL)
        self.all_names = tuple(vocabulary.names)
        self.by_region: dict[str, list[str]] = defaultdict(list)
        for entry in vocabulary:
            for region in entry.regions:
                self.by_region[region].append(entry.name)
        self.whole = {member: entry.name for entry in vocabulary for member in entry.members}
        self._kept: list[tuple[str, ...]] = []
        self._kept_scans: list[tuple[Picture, tuple[str, ...]]] = []
        self._entries: dict[str, Entry] = {}
        self._sibling_names: dict[str, tuple[str, ...]] = {}
        self.skilled = SKILLED

    @property
    def styles(self) -> tuple[str, ...]:
        """Those of this time of training."""
        return FIRST_STYLES if self.first else self.all_styles

    def entry(self, name: str) -> Entry:
        """The structure of a name of any list."""
        if name not in self._entries:
            self._entries[name] = self.vocabulary.resolve(name) or Entry(name, name)
        return self._entries[name]

    def group(self, rng: random.Random, kind: str | None = None) -> Group:
        """One group."""
        shares = FIRST_KINDS if self.first else KINDS
        kind = kind or rng.choices(tuple(shares), tuple(shares.values()))[0]
        picture, names = getattr(self, f"_{kind}")(rng)
        modality = picture.modality if picture else rng.choice(("CT", "MR", "MR", None))
        if modality is not None and rng.random() < 0.05:
            modality = None
        number = 24 if kind == "full" else 18
        samples = [s for s in (self._sample(rng, picture, modality, names) for _ in range(number)) if s is not None]
        return Group(picture, modality, names, tuple(samples), kind)

    def _hippocampus(self, rng: random.Random) -> tuple[Picture, tuple[str, ...]]:
        names = list(HIPPOCAMPUS)
        if rng.random() < 0.25:
            names.append("hippocampus")
        if rng.random() < 0.5:
            rng.shuffle(names)
        return rng.choice(self.hippocampus), tuple(names)

    def _full(self, rng: random.Random) -> tuple[Picture | None, tuple[str, ...]]:
        picture = rng.choice(self.hippocampus) if rng.random() < 0.35 else rng.choice(self.others)
        names = list(self.core)
        if rng.random() < 0.4:
            names = rng.sample(names, rng.randint(50, len(names)))
        return (None if rng.random() < 0.1 else picture), tuple(names)

    def _scan(self, rng: random.Random) -> tuple[Picture, tuple[str, ...]]:
        if len(self._kept_scans) >= 8 and rng.random() < 0.6:  # sentences for a known list are made faster
            return rng.choice(self._kept_scans)
        picture = rng.choice(self.others)
        if "lungs" in picture.seen and rng.random() < 0.35:
            return picture, CT_CHEST
        size = rng.randint(3, 30)
        names = rng.sample(picture.seen, min(len(picture.seen), size))
        names += [n for n in rng.sample(self.core, rng.randint(2, 6)) if n not in names]
        rng.shuffle(names)
        self._kept_scans = [*self._kept_scans[-9:], (picture, tuple(names))]
        return picture, tuple(names)

    def _any(self, rng: random.Random) -> tuple[Picture | None, tuple[str, ...]]:
        picture = None if rng.random() < 0.6 else rng.choice(self.others + self.hippocampus)
        if len(self._kept) >= 8 and rng.random() < 0.6:
            names = list(rng.choice(self._kept))
            rng.shuffle(names)
            return picture, tuple(names)
        self._kept = [*self._kept[-7:], self._related(rng)]
        return picture, self._kept[-1]

    def _related(self, rng: random.Random) -> tuple[str, ...]:
        """A list such as a dataset has: structures of a region with their twins, wholes and parts."""
        size = rng.randint(2, 24)
        pool = [n for n in self.by_region[rng.choice(tuple(self.by_region))]]
        names: list[str] = []
        while len(names) < size:
            name = rng.choice(pool) if rng.random() < 0.6 else rng.choice(self.core) if rng.random() < 0.6 else rng.choice(self.all_names)
            entry = self.entry(name)
            kin = [n for n in (entry.twin, entry.part_of, self.whole.get(entry.name), *entry.members) if n]
            names += [name, *(n for n in kin if rng.random() < 0.45)]
        names = list(dict.fromkeys(names))[:size]
        rng.shuffle(names)
        return tuple(names)

    def _open(self, rng: random.Random) -> tuple[Picture | None, tuple[str, ...]]:
        return (None if rng.random() < 0.5 else rng.choice(self.others + self.hippocampus)), ()

    def _made_up(self, rng: random.Random) -> tuple[None, tuple[str, ...]]:
        def word() -> str:
            return "".join(rng.choice("bcdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 4))) + rng.choice(
                ("", "n", "s", "m")
            )

        return None, tuple(dict.fromkeys(" ".join(word() for _ in range(rng.choice((1, 1, 2)))) for _ in range(rng.randint(2, 10))))

    def _sample(self, rng: random.Random, picture: Picture | None, modality: str | None, names: tuple[str, ...]) -> Sample | None:
        drawn = rng.random()
        if drawn < 0.03:
            text = rng.choice(_NONSENSE) if rng.random() < 0.6 else " ".join(rng.sample(_NONSENSE, 2))
            return self._made(rng, text, "", "", picture, modality, ABSENT, "names no structure", "nonsense")
        listed = names or self._open_names(rng, picture)
        in_sight = [n for n in listed if picture is None or picture.shows(self.entry(n), n)]
        out_of_sight = [n for n in listed if n not in in_sight]
        if drawn < 0.13 and names:
            return self._unlisted(rng, picture, modality, names)
        if (drawn < 0.25 and out_of_sight) or not in_sight:
            name = rng.choice(out_of_sight)
            return self._asked(rng, name, picture, modality, names, ABSENT, "not in this scan")
        name = rng.choice(in_sight)
        return self._asked(rng, name, picture, modality, names, name, "")

    def _open_names(self, rng: random.Random, picture: Picture | None) -> tuple[str, ...]:
        seen = picture.seen if picture is not None and rng.random() < 0.5 else ()
        pool = seen or (self.core if rng.random() < 0.6 else self.all_names)
        return tuple(rng.sample(tuple(pool), min(len(pool), 3)))

    def _unlisted(self, rng: random.Random, picture: Picture | None, modality: str | None, names: tuple[str, ...]) -> Sample | None:
        known = {self.entry(n).name for n in names}
        for _ in range(8):
            pool: Sequence[str] = self.core if rng.random() < 0.5 else self.all_names
            if rng.random() < 0.3:
                pool = [t for t in (self.entry(n).twin for n in names) if t] or pool
            entry = self.entry(rng.choice(pool))
            kin = {entry.part_of, self.whole.get(entry.name), *entry.members} - {None}
            if entry.name in known or kin & known or any(self.entry(n).part_of == entry.name for n in names[:40]):
                continue
            return self._asked(rng, entry.name, picture, modality, names, ABSENT, "not among the names")
        return None

    def _asked(
        self, rng: random.Random, name: str, picture: Picture | None, modality: str | None, names: tuple[str, ...], answer: str, why: str
    ) -> Sample | None:
        from seerseg_data.requests import Context, write_request

        if names and name in names and self.entry(name).surfaces == ():
            return self._copied(rng, name, modality)
        near = tuple(sorted(names)) if len(names) < 90 else ()
        unsided = picture is not None and picture.kind == "hippocampus"
        context = Context(modality=picture.modality if picture else modality, names=near, unsided=unsided)
        for _ in range(6):
            styles = (*self.styles, "out_of_region_reference", "absent") if answer == ABSENT else self.styles
            style = rng.choice(styles)
            made = write_request(name, style=style, split="train", rng=rng, vocabulary=self.vocabulary, context=context)
            if made is not None and len(made.text) < 280:
                text, surface = self._reworded(rng, made.text, made.surface, name)
                return self._made(rng, text, surface, name, picture, modality, answer, why, style)
        return None

    def _reworded(self, rng: random.Random, text: str, surface: str, name: str) -> tuple[str, str]:
        """Text and surface with another word of general language in the surface, some of the time."""
        own = self.entry(name)
        short = any(s.kind == "abbreviation" and s.text == surface for s in own.surfaces)
        if self.thesaurus is None or not surface or short or text.count(surface) != 1 or rng.random() > REWORDED:
            return text, surface
        if own.name not in self._never:  # words that tell relatives apart from it may not come in
            kin = {own.twin, own.part_of, *own.members, *self._siblings(own)} - {None, own.name}
            said = {w for n in kin for t in self.entry(n).texts(splits=("train",)) for w in t.casefold().split()}
            self._never[own.name] = frozenset(said - {w for t in own.texts(splits=("train",)) for w in t.casefold().split()})
        other = self.thesaurus.reworded(surface, rng.choice, never=self._never[own.name])
        found = self.vocabulary.resolve(other)
        if found is not None and found.name != own.name:
            return text, surface
        return text.replace(surface, other), other

    def _copied(self, rng: random.Random, name: str, modality: str | None) -> Sample | None:
        """A request for a name that means nothing, in the words of one for a structure."""
        from seerseg_data.requests import Context, write_request

        context = Context(modality="MR")
        for _ in range(6):
            style = rng.choice(("clinical_request", "abbr_or_short", "formal_task", "order_form", "chat"))
            other = rng.choice(self.core)
            made = write_request(other, style=style, split="train", rng=rng, vocabulary=self.vocabulary, context=context)
            if made is not None and made.surface in made.text and len(made.text) < 280:
                return self._made(rng, made.text.replace(made.surface, name), "", name, None, modality, name, "", style)
        return None

    def _made(
        self,
        rng: random.Random,
        text: str,
        surface: str,
        name: str,
        picture: Picture | None,
        modality: str | None,
        answer: str,
        why: str,
        style: str,
    ) -> Sample:
        evidence = f"{modality or 'scan'} of the {picture.said}" if picture else f"{modality} scan" if modality else "scan"
        if not name:
            return Sample(text, reply_of(evidence, why, answer), answer, style)
        shown: tuple[Skill, ...] = ()
        named = ""
        if not self.first and surface and rng.random() < self.skilled:
            if answer != ABSENT and text.count(surface) == 1 and rng.random() < ONLY_SKILL:
                word = _nonsense_name(rng)
                text, surface = text.replace(surface, word), word
                shown, named = self._skills(rng, surface, name, answer, style, modality, fitting=True, near=False)
            else:
                shown, named = self._skills(rng, surface, name, answer, style, modality, fitting=rng.random() < FITTING, near=True)
        means = f"{surface}: {name}" if surface and normalise_name(surface) != normalise_name(name) and len(surface.split()) <= 5 else name
        return Sample(text, reply_of(evidence, named + (f"{means}, {why}" if why else means), answer), answer, style, shown)

    def _skills(
        self, rng: random.Random, surface: str, name: str, answer: str, style: str, modality: str | None, *, fitting: bool, near: bool
    ) -> tuple[tuple[Skill, ...], str]:
        """Skills as SEER-Loop writes them: the one for `surface` when `fitting`, and others that are for other words, mostly of
        relatives of the structure; what the rationale says of the one that is used. near: half of the fitting ones are for other words for
        the same, as a bank finds them for words that it never met."""
        own = self.entry(name)
        kin = [n for n in (own.twin, own.part_of, *own.members, *self._siblings(own)) if n and n != own.name]
        made = []
        for _ in range(rng.choice((0, 1, 1, 2)) if fitting else rng.choice((1, 1, 2))):
            other = self.entry(rng.choice(kin) if kin and rng.random() < 0.6 else rng.choice(self.core))
            texts = [t for t in other.texts(splits=("train",)) if t.casefold() not in text_key(surface)]
            if texts and other.name != own.name:
                words = tuple(rng.sample(texts, min(len(texts), rng.randint(1, 3))))
                made.append(_skill(rng, words, other.name, modality))
        if not fitting:
            return tuple(made), ""
        more = [t for t in own.texts(splits=("train",)) if t != surface]
        words = rng.sample(more, min(len(more), rng.randint(1, 3)))
        if not words or not near or rng.random() < 0.5:
            words = [surface, *words[:2]]
        rng.shuffle(words)
        right = _skill(rng, tuple(words), answer, modality, style)
        made.append(right)
        rng.shuffle(made)
        return tuple(made), f"[{made.index(right) + 1}] "

    def _siblings(self, entry: Entry) -> tuple[str, ...]:
        if entry.name not in self._sibling_names:
            same = tuple(e.name for e in self.vocabulary if entry.part_of and e.part_of == entry.part_of and e.name != entry.name)
            self._sibling_names[entry.name] = same
        return self._sibling_names[entry.name]


def text_key(surface: str) -> tuple[str, ...]:
    """What no other skill of a request may be for."""
    return (surface.casefold(),)


def _nonsense_name(rng: random.Random) -> str:
    """A word that no vocabulary holds."""
    return "".join(rng.choice("bcdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3))) + rng.choice(("", "n", "s", "m"))


def _skill(rng: random.Random, words: tuple[str, ...], answer: str, modality: str | None, style: str | None = None) -> Skill:
    tag = TAG_OF_STYLE.get(style, DEFAULT_TAG) if style else rng.choice((*sorted(set(TAG_OF_STYLE.values())), DEFAULT_TAG))
    listed = ", ".join(f"'{w}'" for w in words)
    where = f" on {modality}" if modality and rng.random() < 0.7 else ""
    return Skill("", tag, f"the request says {listed}{where}", f"answer {answer}", words=words)


# ------------------------------------------------------------------------------------------------------------------ validation


@dataclass(frozen=True, eq=False)
class Exam:
    """Requests with known answers on pictures that training never saw."""

    name: str
    rows: tuple[tuple[Picture, tuple[str, ...], str, str, str], ...]  # picture, names, text, answer, style


def make_exams(held: Sequence[Picture], vocabulary: Vocabulary, split: str = "val") -> list[Exam]:
    """hippocampus: every style on the two parts; full: the same against all names; phantoms: 8 structures of each; chest: the names
    of the CT chest; absent: out of region and out of the list."""
    from seerseg_data.requests import Context, paraphrase_set

    maker = Maker(held, vocabulary)
    crops, phantoms = maker.hippocampus, maker.others
    rng = random.Random(5)
    exams: dict[str, list[tuple[Picture, tuple[str, ...], str, str, str]]] = defaultdict(list)

    def add(
        exam: str, picture: Picture, names: tuple[str, ...], target: str, answer: str, count: int, styles: tuple[str, ...] | None
    ) -> None:
        near = names if len(names) < 90 else ()
        context = Context(modality=picture.modality, names=near, unsided=picture.kind == "hippocampus")
        seed = f"{split}|{exam}|{len(exams[exam])}"
        for made in paraphrase_set(target, split=split, count=count, seed=seed, vocabulary=vocabulary, context=context, styles=styles):  # type: ignore[arg-type]
            exams[exam].append((picture, names, made.text, answer, made.style))

    for picture in crops[:5]:
        for target in HIPPOCAMPUS:
            add("hippocampus", picture, HIPPOCAMPUS, target, target, 16, None)
        for target in HIPPOCAMPUS:
            add("full list", picture, maker.core, target, target, 8, None)
    styles = (
        "abbr_or_short",
        "messy_or_misspelled",
        "keyboard_slips",
        "negated",
        "relational",
        "implicit",
        "report_style",
        "clinical_request",
    )
    for picture in phantoms:
        seen = tuple(n for n in picture.seen if n in LABELS)
        for target in rng.sample(seen, 2):
            add("phantoms", picture, seen, target, target, 8, styles)
        if "lungs" in picture.seen and len(exams["chest"]) < 96:
            for target in ("left lung", "right lung", "ribs", "vertebral column"):
                add("chest", picture, CT_CHEST, target, target, 8, styles)
    for picture in (*crops[:2], *phantoms[:4]):
        names = HIPPOCAMPUS if picture.kind == "hippocampus" else tuple(n for n in picture.seen if n in LABELS)
        for target in rng.sample(
            [n for n in maker.core if maker.entry(n).regions and picture.absent.issuperset(maker.entry(n).regions)], 4
        ):
            add("absent", picture, names, target, ABSENT, 3, ("out_of_region_reference", "absent", "clinical_request"))
            add("absent, full list", picture, maker.core, target, ABSENT, 3, ("out_of_region_reference", "absent", "clinical_request"))
    return [Exam(name, tuple(rows)) for name, rows in exams.items() if rows]


def mark(exams: Sequence[Exam], reasoner: Any) -> dict[str, dict[str, Any]]:
    """exam -> n, exact share, share that kept the grammar, exact share by style."""
    out: dict[str, dict[str, Any]] = {}
    for exam in exams:
        right: dict[str, list[bool]] = defaultdict(list)
        formed, wrong = [], []
        by_case: dict[tuple[int, tuple[str, ...]], list[int]] = defaultdict(list)
        for number, row in enumerate(exam.rows):
            by_case[id(row[0]), row[1]].append(number)
        for numbers in by_case.values():
            picture, names = exam.rows[numbers[0]][:2]
            views = as_views(picture, picture.modality)
            asked = [PROTOCOL.opening(views, exam.rows[n][2], (), names) for n in numbers]
            for number, reply in zip(numbers, reasoner.reply(asked), strict=True):
                _, _, text, answer, style = exam.rows[number]
                read = PROTOCOL.read(reply[0], views)
                said = ABSENT if getattr(read, "absent", False) else getattr(read, "target", None) or ""
                right[style].append(normalise_name(said) == normalise_name(answer))
                formed.append(PROTOCOL.wellformed(reply[0]))
                if not right[style][-1]:
                    wrong.append((style, text, answer, reply[0]))
        every = [r for results in right.values() for r in results]
        out[exam.name] = {
            "n": len(every),
            "exact": float(np.mean(every)),
            "wellformed": float(np.mean(formed)),
            "styles": {style: round(float(np.mean(results)), 3) for style, results in right.items()},
            "wrong": wrong,
        }
    return out


# ------------------------------------------------------------------------------------------------------------------ training


def prefix_cache(model: Any, ids: Sequence[int], tensors: dict[str, Any]) -> tuple[Any, int]:
    """Keys and values of a prefix with its images, gradients kept, and what M-RoPE adds to later positions."""
    from transformers import DynamicCache

    tokens = torch.tensor([list(ids)])
    cache = DynamicCache(config=model.config.get_text_config())
    model.model(input_ids=tokens, attention_mask=torch.ones_like(tokens), past_key_values=cache, use_cache=True, **tensors)
    return cache, int(model.model.rope_deltas[0]) if "pixel_values" in tensors else 0


def forward_behind(text_model: Any, tails: Sequence[Sequence[int]], cache: Any, start: int) -> torch.Tensor:
    """Last hidden states (M, H) of the M tokens of some continuations of one cached prefix, one continuation after the other.

    start: position of their first tokens. Neither the prefix is copied for each nor the short ones padded, as the stock forward would;
    the same numbers to 3e-6 (a test compares).
    """
    lengths = torch.tensor([len(tail) for tail in tails])
    rows, longest, total = len(tails), int(lengths.max()), int(lengths.sum())
    valid = torch.arange(longest)[None] < lengths[:, None]
    place = torch.zeros((rows, longest), dtype=torch.long)
    place[valid] = torch.arange(total)
    causal = torch.full((longest, longest), -1e9).triu(1)
    positions = (torch.arange(longest)[None].expand(rows, -1)[valid] + start)[None]
    x = text_model.embed_tokens(torch.tensor([token for tail in tails for token in tail]))
    cos, sin = (v[0, :, None] for v in text_model.rotary_emb(x[None], positions.unsqueeze(0).expand(3, -1, -1)))

    def normed(value: torch.Tensor, norm: Any) -> torch.Tensor:
        return F.rms_norm(value, (value.shape[-1],), norm.weight, norm.variance_epsilon)

    def turned(value: torch.Tensor) -> torch.Tensor:
        half = value.shape[-1] // 2
        return value * cos + torch.cat((-value[..., half:], value[..., :half]), -1) * sin

    for layer, stored in zip(text_model.layers, cache.layers, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        size, heads = attention.head_dim, attention.q_proj.out_features // attention.head_dim
        h = normed(x, layer.input_layernorm)
        q = turned(normed(F.linear(h, attention.q_proj.weight).view(total, heads, size), attention.q_norm)) * size**-0.5
        k = turned(normed(F.linear(h, attention.k_proj.weight).view(total, heads, size), attention.k_norm))
        v = F.linear(h, attention.v_proj.weight).view(total, heads, size)
        before = stored.keys.shape[2]
        to_prefix = torch.bmm(q.transpose(0, 1), stored.keys[0].transpose(1, 2))  # heads, M, prefix
        to_own = q[place].transpose(1, 2) @ k[place].permute(0, 2, 3, 1) + causal  # rows, heads, T, T
        weights = torch.cat([to_prefix, to_own.transpose(1, 2)[valid].transpose(0, 1)], -1).softmax(-1)
        from_prefix = torch.bmm(weights[..., :before], stored.values[0]).transpose(0, 1)
        own = weights[..., before:].transpose(0, 1)[place].transpose(1, 2)
        from_own = (own @ v[place].transpose(1, 2)).transpose(1, 2)[valid]
        x = x + F.linear((from_prefix + from_own).reshape(total, heads * size), attention.o_proj.weight)
        h = normed(x, layer.post_attention_layernorm)
        x = x + F.linear(F.silu(F.linear(h, mlp.gate_proj.weight)) * F.linear(h, mlp.up_proj.weight), mlp.down_proj.weight)
    return normed(x, text_model.norm)


class Encoder:
    """Groups -> tokens, exactly as the product's reasoner makes them."""

    def __init__(self, reasoner: VlmReasoner, dropout: float) -> None:
        self.reasoner, self.tokeniser, self.dropout = reasoner, reasoner.tokenizer, dropout
        self.raw = self.tokeniser.backend_tokenizer
        self._end = self._ids("</raw_prompt><|im_end|>\n<|im_start|>assistant\n")
        self._nothing = as_views(None, None)

    def prefix(self, group: Group) -> tuple[list[int], dict[str, Any]]:
        """Ids up to the request, and the image tensors."""
        views = as_views(group.picture, group.modality)
        dialogue: list[Message] = PROTOCOL.opening(views, "?", (), group.names)
        text = self.reasoner.chat(dialogue)
        text = text[: text.rindex("<raw_prompt>")]
        encoded = self.reasoner._encode([text], [image for message in dialogue for image in message.images])
        return encoded["input_ids"][0].tolist(), {k: v for k, v in encoded.items() if k not in ("input_ids", "attention_mask")}

    def tails(self, group: Group, rng: random.Random) -> tuple[list[list[int]], torch.Tensor]:
        """What follows the prefix for every sample, and (M,) bool: the tokens whose next one is scored."""
        rows: list[list[int]] = []
        marks: list[bool] = []
        for sample in group.samples:
            self.raw.model.dropout = self.dropout if rng.random() < 0.6 else None
            asked = self._ids(self._asked(sample))
            self.raw.model.dropout = None
            said = self._ids(sample.reply + "<|im_end|>")
            rows.append([*asked, *self._end, *said])
            marks += [False] * (len(asked) + len(self._end) - 1) + [True] * len(said) + [False]
        return rows, torch.tensor(marks)

    def _asked(self, sample: Sample) -> str:
        """The skills, where there are any, and the request, as the protocol words them."""
        said = PROTOCOL.opening(self._nothing, sample.text, sample.skills, ())[-1].parts
        return "".join(part.text for part in said[1:] if isinstance(part, TextPart)).removesuffix("</raw_prompt>")

    def _ids(self, text: str) -> list[int]:
        return list(self.raw.encode(text, add_special_tokens=False).ids)


def augmented(picture: Picture | None, rng: random.Random) -> Picture | None:
    """Other contrast and brightness."""
    if picture is None or rng.random() < 0.3:
        return picture
    shown = np.clip(picture.pixels * rng.uniform(0.8, 1.2) + rng.uniform(-20, 20), 0, 255).astype(np.uint8)
    return Picture(shown, picture.kind, picture.modality, picture.plane, picture.seen, picture.missing, picture.absent, picture.said)


def group_loss(reasoner: VlmReasoner, encoder: Encoder, group: Group, rng: random.Random) -> tuple[torch.Tensor, int, int, int]:
    """(sum of losses, scored tokens, tokens, how many of the scored are right)."""
    ids, tensors = encoder.prefix(group)
    tails, scored = encoder.tails(group, rng)
    cache, delta = prefix_cache(reasoner.model, ids, tensors)
    hidden = forward_behind(reasoner.model.model.language_model, tails, cache, len(ids) + delta)
    wanted = torch.tensor([token for tail in tails for token in tail]).roll(-1)[scored]
    logits = reasoner.model.lm_head(hidden[scored])
    return F.cross_entropy(logits, wanted, reduction="sum"), len(wanted), len(scored) + len(ids), int((logits.argmax(-1) == wanted).sum())


def prepare(arguments: argparse.Namespace) -> None:
    """Pictures and tokeniser."""
    import pickle

    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    training, held = gather_pictures(arguments.cache, arguments.data)
    with (out / "pictures.pkl").open("wb") as file:  # own file of this script, read by this script alone
        pickle.dump((training, held), file)
    vocabulary = Vocabulary.load()
    maker, rng = Maker(training, vocabulary), random.Random(1)
    corpus: list[str] = []
    for _ in range(arguments.groups):
        group = maker.group(rng)
        views = as_views(group.picture, group.modality)
        corpus += [f"{s.text}</raw_prompt>{s.reply}" for s in group.samples]
        corpus += [part for message in PROTOCOL.opening(views, "", (), group.names) for part in message.text.split("\n")]
    for entry in vocabulary:
        corpus += entry.texts(splits=("train",)) * 2
    tokeniser = make_tokeniser(corpus)
    save_processor(tokeniser, out / "processor")
    lengths = [len(tokeniser(text)["input_ids"]) for text in corpus[:2000]]
    print(f"{len(training)} training and {len(held)} held pictures; {len(tokeniser)} tokens; a text has {np.mean(lengths):.1f}")


def train(arguments: argparse.Namespace) -> None:
    """Until `minutes` are over."""
    import pickle

    torch.set_num_threads(1)
    out: Path = arguments.out
    with (out / "pictures.pkl").open("rb") as file:
        training, held = pickle.load(file)
    vocabulary = Vocabulary.load()
    thesaurus = Thesaurus.open(arguments.wordnet) if arguments.wordnet else None
    maker, exams = Maker(training, vocabulary, thesaurus), make_exams(held, vocabulary)
    model = make_model(load_processor(out / "processor").tokenizer, hidden=arguments.hidden, layers=arguments.layers, inner=arguments.inner)
    reasoner = wrap(model, out / "processor")
    encoder = Encoder(reasoner, 0.1)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], lr=1.0, betas=(0.9, 0.98)
    )
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    step, spent, best, seen = 0, 0.0, -1.0, 0
    if (out / "last.pt").exists():
        kept = torch.load(out / "last.pt", weights_only=True)
        model.load_state_dict(kept["model"])
        optimiser.load_state_dict(kept["optimiser"])
        average, step, spent, best, seen = kept["average"], kept["step"], kept["spent"], kept["best"], kept["seen"]
    rng = random.Random(1000 + step)
    lexicon_numbers(exams)
    began, marked_at, told_at = time.time() - spent, spent, spent
    total, count, right, tokens = 0.0, 0, 0, 0
    log = (out / "log.jsonl").open("a")
    while True:
        spent = time.time() - began
        done = spent / (60 * arguments.minutes)
        if done >= 1 or spent - marked_at > 60 * arguments.every:
            best = max(best, examine(model, reasoner, average, exams, out, best, step=step, spent=spent, seen=seen, log=log))
            marked_at = spent = time.time() - began
            state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "average": average}
            save(out / "last.pt", {**state, "step": step, "spent": spent, "best": best, "seen": seen})
            if done >= 1:
                return
        for group_of in optimiser.param_groups:
            group_of["lr"] = arguments.rate * min(1.0, (step + 1) / 150) * (0.04 + 0.96 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
        maker.first = done < arguments.first
        model.train()
        optimiser.zero_grad(set_to_none=True)
        scored = 0
        for _ in range(arguments.groups):
            group = maker.group(rng)
            if not group.samples:
                continue
            group = Group(augmented(group.picture, rng), group.modality, group.names, group.samples, group.kind)
            loss, number, used, good = group_loss(reasoner, encoder, group, rng)
            (loss / 1000.0).backward()
            scored, total, count, tokens, right = scored + number, total + float(loss.detach()), count + number, tokens + used, right + good
            seen += len(group.samples)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(1000.0 / scored)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        keep = min(arguments.ema, (1 + step) / (40 + step))
        if step % 4 == 0:  # 4 steps at once
            with torch.no_grad():
                for name, value in model.state_dict().items():
                    average[name].lerp_(value, 1 - keep**4) if value.is_floating_point() else average[name].copy_(value)
        if step % 50 == 0:
            spent = time.time() - began
            line = {"step": step, "minutes": round(spent / 60, 1), "requests": seen, "loss": round(total / count, 4)}
            line |= {"tokens_right": round(right / count, 4), "tokens_per_s": round(tokens / (spent - told_at))}
            print(json.dumps(line), file=log, flush=True)
            told_at, total, count, right, tokens = spent, 0.0, 0, 0, 0


def examine(model: Any, reasoner: VlmReasoner, average: dict[str, Any], exams: Sequence[Exam], out: Path, best: float, **at: Any) -> float:
    """Mark the averaged weights; keep them when they are the best."""
    own = {k: v.detach().clone() for k, v in model.state_dict().items()}
    model.load_state_dict(average)
    model.eval()
    started = time.time()
    marks = mark(exams, reasoner)
    score = float(np.mean([m["exact"] for m in marks.values()]))
    log = at.pop("log")
    line = {**at, "score": round(score, 4), "seconds": round(time.time() - started, 1)}
    for name, found in marks.items():
        line[name] = {k: round(v, 4) if isinstance(v, float) else v for k, v in found.items() if k != "wrong"}
    print(json.dumps(line), file=log, flush=True)
    (out / "wrong.json").write_text(json.dumps({name: found["wrong"] for name, found in marks.items()}, indent=1))
    if score > best:
        save(out / "best.pt", {"model": average, **at, "score": score})
    model.load_state_dict(own)
    return score


def lexicon_numbers(exams: Sequence[Exam]) -> None:
    """The lexicon with training vocabulary and the raw request on the same exams, for the log."""
    from seerseg.reasoners import load_reasoner

    for name, settings in (("lexicon", {"splits": ["train"]}), ("verbatim", {})):
        for exam, found in mark(exams, load_reasoner(name, **settings)).items():
            print(f"{name:9} {exam:18} n {found['n']:4} exact {found['exact']:.3f}  {found['styles']}", flush=True)


def save(path: Path, value: Any) -> None:
    """Whole or not at all."""
    torch.save(value, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def export(arguments: argparse.Namespace) -> None:
    """The model folder: fp16 weights, configuration, tokeniser, processor."""
    out, to = arguments.out, arguments.to
    kept = torch.load(out / (arguments.which + ".pt"), weights_only=True)
    processor = load_processor(out / "processor")
    model = make_model(processor.tokenizer, hidden=arguments.hidden, layers=arguments.layers, inner=arguments.inner)
    model.load_state_dict(kept["model"])
    model.half().save_pretrained(to)
    save_processor(processor.tokenizer, to)
    print({k: v for k, v in kept.items() if k != "model"}, sum(f.stat().st_size for f in to.iterdir()))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run in (("prepare", prepare), ("train", train), ("export", export), ("renew", renew)):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("--cache", type=Path)
        command.add_argument("--data", type=Path)
        command.add_argument("--out", type=Path, required=name != "renew")
        command.add_argument("--to", type=Path)
        command.add_argument("--wordnet", type=Path, help="folder of WordNet's files: general words for those of the requests")
        command.add_argument("--minutes", type=float, default=75)
        command.add_argument("--every", type=float, default=8, help="minutes between marks on validation")
        command.add_argument("--groups", type=int, default=1 if name == "train" else 2500)
        command.add_argument("--first", type=float, default=0.2, help="share of the time with short requests and made-up names")
        command.add_argument("--rate", type=float, default=1e-3)
        command.add_argument("--ema", type=float, default=0.998)
        command.add_argument("--hidden", type=int, default=256)
        command.add_argument("--layers", type=int, default=4)
        command.add_argument("--inner", type=int, default=640)
        command.add_argument("--which", default="best", choices=("best", "last"))
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
