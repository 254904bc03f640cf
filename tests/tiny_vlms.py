"""Tiny random models of the true architectures, saved as model folders, so that the real loading code reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SPECIAL = [
    "<pad>", "<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
    "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>",
]  # fmt: skip
CORPUS = [
    "You turn a request into a name. Reply with evidence, rationale and answer. These are 8 axial slices of one CT scan.",
    "left lung right lung ribs vertebral column absent segment outline please the <raw_prompt> </raw_prompt> <targets> </targets>",
]
QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IDEFICS_TEMPLATE = (
    "<|im_start|>{% for m in messages %}{{ m.role }}: {% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}"
    "{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=420, special_tokens=SPECIAL, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", eos_token="<|im_end|>")


def _text(words: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(words), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 4,
    }  # fmt: skip


def qwen(folder: Path, generation: str) -> Path:
    """A Qwen3-VL ("3") or Qwen2.5-VL ("2.5") of a few ten thousand parameters."""
    import torch
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2VLImageProcessorPil,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
    )

    words = tokenizer()
    ids = {f"{name}_token_id": words.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    ids |= {"image_token_id": words.convert_tokens_to_ids("<|image_pad|>"), "video_token_id": words.convert_tokens_to_ids("<|video_pad|>")}
    vision: dict[str, Any] = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    torch.manual_seed(0)
    if generation == "3":
        vision |= {"patch_size": 16, "out_hidden_size": 32, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
        rope["mrope_interleaved"] = True
        config: Any = Qwen3VLConfig(text_config=_text(words) | {"rope_parameters": rope}, vision_config=vision, **ids)
        model: Any = Qwen3VLForConditionalGeneration(config)
    else:
        vision |= {"patch_size": 14, "out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 56}
        config = Qwen2_5_VLConfig(text_config=_text(words) | {"rope_parameters": rope}, vision_config=vision, **ids)
        model = Qwen2_5_VLForConditionalGeneration(config)
    _spread(model)
    model.save_pretrained(folder)
    words.chat_template = QWEN_TEMPLATE
    words.save_pretrained(folder)
    patch = vision["patch_size"]
    side = (2 * patch) ** 2
    Qwen2VLImageProcessorPil(patch_size=patch, min_pixels=side, max_pixels=9 * side, merge_size=2, temporal_patch_size=2).save_pretrained(
        folder
    )
    _name_processor(folder, "Qwen3VLProcessor" if generation == "3" else "Qwen2_5_VLProcessor")
    return folder


def idefics3(folder: Path, kind: str = "Idefics3") -> Path:
    """The SmolVLM architecture on a tiny Llama. kind "SmolVLM" names the sister classes."""
    import torch
    import transformers
    from transformers import Idefics3ImageProcessorPil

    words = tokenizer()
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        text_config=_text(words) | {"model_type": "llama"},
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
        },
        scale_factor=2, image_token_id=words.convert_tokens_to_ids("<image>"), pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    _spread(model)
    model.save_pretrained(folder)
    words.chat_template = IDEFICS_TEMPLATE
    words.save_pretrained(folder)
    processor = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False)
    processor.save_pretrained(folder)
    _name_processor(folder, f"{kind}Processor", image_seq_len=4)
    return folder


def llava(folder: Path) -> Path:
    """A LLaVA: an architecture whose prefix is not shared."""
    import torch
    from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaForConditionalGeneration

    words = tokenizer()
    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=_text(words) | {"model_type": "llama"},
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
            "image_size": 32, "patch_size": 8,
        },
        image_token_index=words.convert_tokens_to_ids("<image>"), vision_feature_layer=-2,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    _spread(model)
    model.save_pretrained(folder)
    words.chat_template = IDEFICS_TEMPLATE
    words.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    _name_processor(folder, "LlavaProcessor", patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    return folder


def gemma3(folder: Path) -> Path:
    """A Gemma 3: sliding windows, image tokens that see each other; its prefix is not shared."""
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3ImageProcessorPil, PreTrainedTokenizerFast

    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    plain = tokenizer()
    plain.add_special_tokens({"additional_special_tokens": list(named.values())})
    words = PreTrainedTokenizerFast(
        tokenizer_object=plain._tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<|im_end|>", extra_special_tokens=named
    )
    torch.manual_seed(0)
    ids = {f"{name}_index": words.convert_tokens_to_ids(token) for name, token in named.items()}
    text = _text(words) | {"sliding_window": 16, "query_pre_attn_scalar": 8}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
            vision_config=vision,
            mm_tokens_per_image=4,
            tie_word_embeddings=False,
            **ids,
        )
    )
    _spread(model)
    model.save_pretrained(folder)
    words.chat_template = IDEFICS_TEMPLATE.replace("<image>", "<start_of_image>")
    words.save_pretrained(folder)
    Gemma3ImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    _name_processor(folder, "Gemma3Processor", image_seq_length=4)
    return folder


def _spread(model: Any) -> None:
    """Larger random weights, so that replies differ from dialogue to dialogue and images matter."""
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.35 if "lm_head" not in name else 0.8)


def _name_processor(folder: Path, name: str, **settings: Any) -> None:
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": name, **settings}))
