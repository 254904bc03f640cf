"""The nano reasoner: a tokeniser and a model of the true Qwen3-VL architecture, and a loss that shares the prefix of a group.

The loss runs system, slices, instruction and names through the model once, and behind their cache the requests with their replies.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from seerseg.protocols import combined, medreasoner, medsam_agent, medvol_r1
from seerseg.protocols.messages import Message, TextPart
from seerseg.protocols.seer import SYSTEM, SeerProtocol
from seerseg.reasoners.decoding import Decoding
from seerseg.reasoners.vlm import VlmReasoner
from seerseg.reasoners.vlm_loading import Loaded, Source, load_processor
from seerseg_data.recipes.lessons import Group, Sample
from seerseg_data.recipes.pictures import SIDE_PX, as_views

PROTOCOL = SeerProtocol()
_VOCABULARY_SIZE = 2048
_SPECIAL = (
    "<|pad|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_JOINS = (
    (" ,", ","), (" .", "."), (" ;", ";"), (" :", ":"), (" - ", "-"), (" ' ", "'"), ("( ", "("), (" )", ")"), (" / ", "/"), (" _ ", "_"),
    ("> ", ">"), (" <", "<"), ("ct of", "CT of"), ("mr of", "MR of"),
)  # fmt: skip
"""How decoded tokens become text: spaces around marks, and capitals that the normaliser took away."""
_INSTRUCTION_END = "Name the structure that the request asks for."
_PROMPT_TEXTS = (
    medvol_r1.SYSTEM, medreasoner.SYSTEM, medreasoner.VOLUME_RULE, medsam_agent.SYSTEM, medsam_agent.VOLUME_RULE, medsam_agent.NEXT,
    medsam_agent.NO_MASK, combined.SYSTEM, "Give the key slice and the boxes of what the request refers to.",
    "Ground what the question is about.", "Segment what the request names. What is your first action?",
    "Name and box the structure that the request asks for.",
)  # fmt: skip
"""Fixed texts of the protocols that nano was not trained on; each is one mark, so that a dialogue is short."""
_REPLY_TEXTS = (
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


# --------------------------------------------------------------------------------------------------------------- model


def mark_fixed_texts(raw: Any) -> None:
    """Have a tokeniser read each fixed text as one mark (a character of the private use area) and write those of replies out again."""
    from tokenizers import decoders, normalizers

    known = [SYSTEM, _INSTRUCTION_END, *_PROMPT_TEXTS, *_REPLY_TEXTS]
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
            *(decoders.Replace(old, new) for old, new in _JOINS),
            *(decoders.Replace(f"{blank}{marks[text]}", text) for text in _REPLY_TEXTS for blank in (" ", "")),
        ]
    )


def renew_marks(path: Path) -> None:
    """Renew the marks of a tokeniser's file after a fixed text was changed; no token and no weight changes."""
    from tokenizers import Tokenizer

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
            vocab_size=_VOCABULARY_SIZE,
            special_tokens=list(_SPECIAL),
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    made = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<|pad|>", eos_token="<|im_end|>", padding_side="left")
    made.chat_template = _TEMPLATE
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
        "vocab_size": _VOCABULARY_SIZE,
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


# ---------------------------------------------------------------------------------------------------------------- loss


def prefix_cache(model: Any, ids: Sequence[int], tensors: dict[str, Any]) -> tuple[Any, int]:
    """Keys and values of a prefix with its images, gradients kept, and what M-RoPE adds to later positions."""
    from transformers import DynamicCache

    tokens = torch.tensor([list(ids)])
    cache = DynamicCache(config=model.config.get_text_config())
    model.model(input_ids=tokens, attention_mask=torch.ones_like(tokens), past_key_values=cache, use_cache=True, **tensors)
    return cache, int(model.model.rope_deltas[0]) if "pixel_values" in tensors else 0


def forward_behind(text_model: Any, tails: Sequence[Sequence[int]], cache: Any, start: int) -> Tensor:
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

    def normed(value: Tensor, norm: Any) -> Tensor:
        return F.rms_norm(value, (value.shape[-1],), norm.weight, norm.variance_epsilon)

    def turned(value: Tensor) -> Tensor:
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
    """Groups -> tokens, exactly as the product's reasoner makes them.

    dropout: share of the merges that is left out in six requests of ten, so that words are met in other pieces too. The library draws
    it by a generator of its own that cannot be seeded: two runs of one seed meet the same requests in other pieces.
    """

    def __init__(self, reasoner: VlmReasoner, *, dropout: float) -> None:
        self.reasoner, self.dropout = reasoner, dropout
        self.raw = reasoner.tokenizer.backend_tokenizer
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

    def tails(self, group: Group, rng: random.Random) -> tuple[list[list[int]], Tensor]:
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


class GroupLoss(NamedTuple):
    """total: sum over the scored tokens, differentiable; scored: how many they are; read: all tokens; right: scored ones that are right."""

    total: Tensor
    scored: int
    read: int
    right: int


def group_loss(encoder: Encoder, group: Group, rng: random.Random) -> GroupLoss:
    """Cross-entropy of the replies of one group; rng: the tokeniser's dropout."""
    model = encoder.reasoner.model
    ids, tensors = encoder.prefix(group)
    tails, scored = encoder.tails(group, rng)
    cache, delta = prefix_cache(model, ids, tensors)
    hidden = forward_behind(model.model.language_model, tails, cache, len(ids) + delta)
    wanted = torch.tensor([token for tail in tails for token in tail]).roll(-1)[scored]
    logits = model.lm_head(hidden[scored])
    total = F.cross_entropy(logits, wanted, reduction="sum")
    return GroupLoss(total, len(wanted), len(scored) + len(ids), int((logits.argmax(-1) == wanted).sum()))
