"""Weights for transformers' SAM models: a folder, a hub id on this machine, or MedSAM2's original checkpoint under its own tensor names.

Nothing that is loaded can run code: safetensors, or `torch.load(weights_only=True)`. Names are matched strictly: a tensor that is
missing, left over or of another shape is an error. Never the network when offline.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from seerseg.errors import ModelError, OutputError, UsageError, WeightsError
from seerseg.paths import read_json
from seerseg.quiet import quiet

HUB = "wanglab/MedSAM2"
LATEST = "MedSAM2_latest.pt"
"""The checkpoint of `HUB` that is meant when none is named."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILE = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/([\w.-]+\.(?:pt|pth))")
_CHECKPOINTS = (".pt", ".pth")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")

_ATTENTION = (("q_proj", "q_proj"), ("k_proj", "k_proj"), ("v_proj", "v_proj"), ("out_proj", "o_proj"))
_MLP2 = (("layers.0", "proj_in"), ("layers.1", "proj_out"))
_MLP3 = (("layers.0", "proj_in"), ("layers.1", "layers.0"), ("layers.2", "proj_out"))
_TWO_WAY = "sam_mask_decoder.transformer", "mask_decoder.transformer"


def _each(original: str, ours: str, parts: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
    return [(f"{original}.{a}", f"{ours}.{b}") for a, b in parts]


def _same(original: str, ours: str, *parts: str) -> list[tuple[str, str]]:
    return _each(original, ours, tuple((part, part) for part in parts))


MODULES: tuple[tuple[str, str], ...] = (
    # tensors without a module
    ("maskmem_tpos_enc", "memory_temporal_positional_encoding"),
    ("no_mem_embed", "no_memory_embedding"),
    ("no_mem_pos_enc", "no_memory_positional_encoding"),
    ("no_obj_ptr", "no_object_pointer"),
    ("no_obj_embed_spatial", "occlusion_spatial_embedding_parameter"),
    ("image_encoder.trunk.pos_embed", "vision_encoder.backbone.pos_embed"),
    ("image_encoder.trunk.pos_embed_window", "vision_encoder.backbone.pos_embed_window"),
    ("sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", "prompt_encoder.shared_embedding.positional_embedding"),
    ("memory_encoder.fuser.layers.#.gamma", "memory_encoder.memory_fuser.layers.#.scale"),
    # modules
    ("image_encoder.trunk.patch_embed.proj", "vision_encoder.backbone.patch_embed.projection"),
    *_each(
        "image_encoder.trunk.blocks.#",
        "vision_encoder.backbone.blocks.#",
        (("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("attn.qkv", "attn.qkv"), ("attn.proj", "attn.proj"), ("proj", "proj")),
    ),
    *_each("image_encoder.trunk.blocks.#.mlp", "vision_encoder.backbone.blocks.#.mlp", _MLP2),
    ("image_encoder.neck.convs.#.conv", "vision_encoder.neck.convs.#"),
    *_each(
        "sam_prompt_encoder.mask_downscaling",
        "prompt_encoder.mask_embed",
        (("0", "conv1"), ("1", "layer_norm1"), ("3", "conv2"), ("4", "layer_norm2"), ("6", "conv3")),
    ),
    *_same("sam_prompt_encoder", "prompt_encoder", "no_mask_embed", "not_a_point_embed"),
    *_same("sam_mask_decoder", "mask_decoder", "iou_token", "mask_tokens", "obj_score_token", "conv_s0", "conv_s1"),
    *_each(
        "sam_mask_decoder.output_upscaling", "mask_decoder", (("0", "upscale_conv1"), ("1", "upscale_layer_norm"), ("3", "upscale_conv2"))
    ),
    *_each("sam_mask_decoder.output_hypernetworks_mlps.#", "mask_decoder.output_hypernetworks_mlps.#", _MLP3),
    *_each("sam_mask_decoder.iou_prediction_head", "mask_decoder.iou_prediction_head", _MLP3),
    *_each("sam_mask_decoder.pred_obj_score_head", "mask_decoder.pred_obj_score_head", _MLP3),
    *(
        pair
        for name in ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token")
        for pair in _each(f"{_TWO_WAY[0]}.layers.#.{name}", f"{_TWO_WAY[1]}.layers.#.{name}", _ATTENTION)
    ),
    *(pair for n in "1234" for pair in [(f"{_TWO_WAY[0]}.layers.#.norm{n}", f"{_TWO_WAY[1]}.layers.#.layer_norm{n}")]),
    *_each(f"{_TWO_WAY[0]}.layers.#.mlp", f"{_TWO_WAY[1]}.layers.#.mlp", _MLP2),
    *_each(f"{_TWO_WAY[0]}.final_attn_token_to_image", f"{_TWO_WAY[1]}.final_attn_token_to_image", _ATTENTION),
    (f"{_TWO_WAY[0]}.norm_final_attn", f"{_TWO_WAY[1]}.layer_norm_final_attn"),
    *(
        pair
        for name in ("self_attn", "cross_attn_image")
        for pair in _each(f"memory_attention.layers.#.{name}", f"memory_attention.layers.#.{name}", _ATTENTION)
    ),
    *_same("memory_attention.layers.#", "memory_attention.layers.#", "linear1", "linear2"),
    *((f"memory_attention.layers.#.norm{n}", f"memory_attention.layers.#.layer_norm{n}") for n in "123"),
    ("memory_attention.norm", "memory_attention.layer_norm"),
    *((f"memory_encoder.mask_downsampler.encoder.{3 * n}", f"memory_encoder.mask_downsampler.layers.{n}.conv") for n in range(4)),
    *((f"memory_encoder.mask_downsampler.encoder.{3 * n + 1}", f"memory_encoder.mask_downsampler.layers.{n}.layer_norm") for n in range(4)),
    ("memory_encoder.mask_downsampler.encoder.12", "memory_encoder.mask_downsampler.final_conv"),
    ("memory_encoder.pix_feat_proj", "memory_encoder.feature_projection"),
    *_each(
        "memory_encoder.fuser.layers.#",
        "memory_encoder.memory_fuser.layers.#",
        (("dwconv", "depthwise_conv"), ("norm", "layer_norm"), ("pwconv1", "pointwise_conv1"), ("pwconv2", "pointwise_conv2")),
    ),
    ("memory_encoder.out_proj", "memory_encoder.projection"),
    ("mask_downsample", "mask_downsample"),
    *_each("obj_ptr_proj", "object_pointer_proj", _MLP3),
    ("obj_ptr_tpos_proj", "temporal_positional_encoding_projection_layer"),
)
"""Original SAM2 name -> transformers name, of modules and lone tensors; # is any one number, the same on both sides."""
_POINTS = "sam_prompt_encoder.point_embeddings.{}.weight"
_ALL_POINTS = "prompt_encoder.point_embed.weight"
_GAUSSIAN = "prompt_encoder.shared_embedding.positional_embedding"
_GAUSSIAN_TWIN = "shared_image_embedding.positional_embedding"


@lru_cache(maxsize=1)
def _rules() -> dict[str, str]:
    return dict(MODULES)


def renamed(original: str) -> str | None:
    """The transformers name of an original SAM2 tensor, None for one that is not known (the point embeddings are joined elsewhere)."""
    module, dot, leaf = original.rpartition(".")
    if leaf not in ("weight", "bias"):
        module, dot, leaf = original, "", ""
    rules = _rules()
    if module in rules:
        return rules[module] + dot + leaf
    number = _NUMBER.search(module)
    pattern = _NUMBER.sub("#", module, count=1)
    return rules[pattern].replace("#", number.group()) + dot + leaf if number is not None and pattern in rules else None


def to_transformers(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Original SAM2 tensors under their transformers names. WeightsError names tensors that are not of that architecture."""
    import torch

    joined = [_POINTS.format(n) for n in range(4)]
    unknown = [name for name in tensors if name not in joined and renamed(name) is None]
    absent = [name for name in joined if name not in tensors]
    if unknown or absent:
        said = f"holds {unknown[0]!r}, which SAM2 does not have" if unknown else f"lacks {absent[0]!r}"
        more = f" and {len(unknown) + len(absent) - 1} more such tensors" if len(unknown) + len(absent) > 1 else ""
        raise WeightsError(f"These are not the weights of a SAM2 video model: the checkpoint {said}{more}.")
    out = {new: value for name, value in tensors.items() if (new := renamed(name)) is not None}
    out[_ALL_POINTS] = torch.cat([tensors[name].reshape(1, -1) for name in joined])
    if _GAUSSIAN in out:
        out[_GAUSSIAN_TWIN] = out[_GAUSSIAN]
    return out


def medsam2_config() -> Any:
    """The `Sam2VideoConfig` of MedSAM2: SAM 2.1, Hiera tiny, images of 512 pixels (all else is transformers' default)."""
    from transformers import Sam2HieraDetConfig, Sam2VideoConfig, Sam2VisionConfig
    from transformers.models.sam2_video.configuration_sam2_video import Sam2VideoPromptEncoderConfig

    vision = Sam2VisionConfig(
        backbone_config=Sam2HieraDetConfig(image_size=[512, 512]), backbone_feature_sizes=[[128, 128], [64, 64], [32, 32]]
    )
    return Sam2VideoConfig(
        vision_config=vision,
        prompt_encoder_config=Sam2VideoPromptEncoderConfig(image_size=512),
        image_size=512,
        memory_attention_rope_feat_sizes=[32, 32],
    )


# --------------------------------------------------------------------------------------------------------------- loading


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A transformers model in evaluation mode on its device. identity: hex digest of weights and configuration."""

    model: Any
    folder: Path
    name: str
    identity: str


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The tensors of a .pt file, under "model" or bare. WeightsError for one that is damaged or holds more than tensors: no code runs."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of old pickle protocols before it refuses what they hold
            held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as fault:
        raise WeightsError(
            f"{path} holds more than tensors (pickled code or objects), or is no checkpoint; it is not opened. "
            f"Get the checkpoint from its authors, or convert it to safetensors where you trust it."
        ) from fault
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError, struct.error) as fault:
        raise WeightsError(
            f"{path} is damaged or no checkpoint ({(str(fault).splitlines() or [type(fault).__name__])[0][:120]}). Copy it again."
        ) from fault
    tensors = held.get("model", held) if isinstance(held, dict) else held
    if not isinstance(tensors, dict) or not tensors or not all(isinstance(v, torch.Tensor) for v in tensors.values()):
        raise WeightsError(f'{path} holds no tensors, neither bare nor under "model"; a checkpoint of MedSAM2 does.')
    return tensors


def load_sam2(source: str | Path | None, *, device: str, dtype: str | None, offline: bool, config: str | Path | None = None) -> LoadedModel:
    """MedSAM2 or another SAM2 video model from: a transformers folder or hub id; a .pt file, a folder with one, or HUB_ID/FILE.pt. A
    .pt is taken for MedSAM2's architecture unless a transformers config.json is given or lies beside it."""
    path = find(source if source is not None else HUB, offline=offline, preferred=LATEST)
    if path.is_dir():
        from transformers import Sam2VideoModel

        return load_pretrained(Sam2VideoModel, path, name=str(source), device=device, dtype=dtype, types=("sam2_video", "sam2"))
    settings = Path(config) if config is not None else path.with_name("config.json")
    return _from_checkpoint(path, settings if config is not None or settings.is_file() else None, str(source or HUB), device, dtype)


def _from_checkpoint(path: Path, config: Path | None, name: str, device: str, dtype: str | None) -> LoadedModel:
    from transformers import Sam2VideoConfig, Sam2VideoModel

    tensors = to_transformers(read_checkpoint(path))
    try:
        settings = medsam2_config() if config is None else Sam2VideoConfig(**_config(config, ("sam2_video", "sam2")))
        with quiet():
            model = Sam2VideoModel(settings)
        result = model.load_state_dict({key: value.float() for key, value in tensors.items()}, strict=False)
    except (RuntimeError, TypeError, ValueError, KeyError) as fault:
        said = next((line.strip() for line in str(fault).splitlines() if "size mismatch" in line), str(fault).splitlines()[0])
        raise WeightsError(
            f"The weights in {path} do not fit the model ({said[:200]}). A checkpoint other than MedSAM2's needs its config.json beside it."
        ) from fault
    _strict(path, [str(k) for k in result.missing_keys], [str(k) for k in result.unexpected_keys])
    return LoadedModel(_placed(model, device, dtype, path), path, name, _digest([path] + ([config] if config else [])))


def load_pretrained(kind: Any, folder: Path, *, name: str, device: str, dtype: str | None, types: tuple[str, ...]) -> LoadedModel:
    """A transformers model of the class `kind` from a folder, strictly: config.json must be of one of the model types."""
    from safetensors import SafetensorError

    _config(folder / "config.json", types)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightsError(f"The folder {folder} holds no *.safetensors weights. Convert it with save_pretrained, or copy it again.")
    try:
        with quiet():
            model, info = kind.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, output_loading_info=True
            )
    except SafetensorError as fault:
        raise WeightsError(f"The weights in {folder} are damaged ({fault}). Copy them again.") from fault
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as fault:
        raise WeightsError(f"The model in {folder} cannot be loaded: {' '.join(str(fault).split())[:250]}") from fault
    wrong = [str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"]]
    _strict(folder, sorted(info["missing_keys"]) + wrong, sorted(info["unexpected_keys"]))
    return LoadedModel(_placed(model, device, dtype, folder), folder, name, _digest([folder / "config.json", *files]))


def find(source: str | Path, *, offline: bool, preferred: str | None = None) -> Path:
    """The folder or .pt file meant by a path, a hub id or HUB_ID/FILE.pt. preferred: the .pt taken from a folder that holds several."""
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix not in _CHECKPOINTS:
            raise WeightsError(f"{path} is no .pt or .pth checkpoint; give one, or a folder with config.json and *.safetensors.")
        return path
    if not path.is_dir():
        path = _from_hub(str(source), offline=offline, preferred=preferred)
    if path.is_file() or (path / "config.json").is_file():
        return path
    held = sorted(p for p in path.iterdir() if p.suffix in _CHECKPOINTS)
    chosen = held if len(held) == 1 else [p for p in held if p.name == preferred]
    if chosen and preferred is not None:
        return chosen[0]
    listed = ", ".join(p.name for p in (held or sorted(path.iterdir()))[:6]) or "nothing"
    advice = "Name one of its checkpoints." if held and preferred is not None else "It needs config.json and *.safetensors."
    raise WeightsError(f"The folder {path} is no model that can be opened (it holds: {listed}). {advice}")


def _from_hub(text: str, *, offline: bool, preferred: str | None) -> Path:
    file = _HUB_FILE.fullmatch(text)
    if file is None and not _HUB_ID.fullmatch(text):
        raise WeightsError(f"There is no model {text!r} here. Give a folder with config.json and *.safetensors, a checkpoint, or a hub id.")
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, name = (file.group(1), file.group(2)) if file is not None else (text, "")
    try:
        if name:
            return Path(hf_hub_download(repository, name, local_files_only=offline))
        wanted = ["*.json", "*.safetensors", *([preferred] if preferred else [])]
        return Path(snapshot_download(repository, local_files_only=offline, allow_patterns=wanted))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as fault:
        if offline:
            raise WeightsError(
                f"The model {text!r} is not on this machine and SeerSeg does not download unless told to. Copy its files here and give "
                f"the path, or fetch it once with: hf download {repository}{' ' + name if name else ''}."
            ) from None
        raise WeightsError(f"The model {text!r} could not be fetched: {str(fault).splitlines()[0]}") from fault


def convert_checkpoint(source: str | Path, folder: str | Path, *, config: str | Path | None = None, offline: bool = True) -> Path:
    """Write an original checkpoint as a transformers folder that `medsam2` and a bare `--segmenter FOLDER` open; the folder.
    OutputError when it is there already with something in it."""
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"{target} is there already and not empty; give a new folder.")
    path = find(source, offline=offline, preferred=LATEST)
    if path.is_dir():
        raise UsageError(f"{path} is a transformers folder already; there is nothing to convert.")
    loaded = load_sam2(path, device="cpu", dtype=None, offline=offline, config=config)
    try:
        with quiet():
            loaded.model.save_pretrained(target)
        settings = read_json(target / "config.json", ModelError)
        settings["kind"] = "medsam2_segmenter"
        (target / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except OSError as fault:
        raise OutputError(f"{target} cannot be written ({fault.strerror}).") from fault
    return target


def _config(path: Path, types: tuple[str, ...]) -> dict[str, Any]:
    settings = read_json(path, ModelError)
    kind = settings.get("model_type") if isinstance(settings, dict) else None
    if kind not in types:
        raise ModelError(f"{path} describes a model of the type {kind!r}, and {types[0]!r} is needed here.")
    return dict(settings)


def _strict(where: Path, missing: list[str], unexpected: list[str]) -> None:
    if missing or unexpected:
        parts = [f"lack {len(missing)} tensors of the model ({missing[0]} ...)"] if missing else []
        parts += [f"hold {len(unexpected)} tensors that it does not have ({unexpected[0]} ...)"] if unexpected else []
        raise WeightsError(f"The weights in {where} {' and '.join(parts)}. They are of another model, or incomplete: copy them again.")


def _placed(model: Any, device: str, dtype: str | None, where: Path) -> Any:
    import torch

    kind = getattr(torch, dtype or "float32", None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ModelError(f"{dtype!r} is no floating-point type; use float32, bfloat16 or float16.")
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
        raise WeightsError(f"The weights in {where} hold values that are not finite; copy them again.")
    try:
        return model.requires_grad_(False).eval().to(device=device, dtype=kind)
    except (RuntimeError, AssertionError) as fault:
        raise ModelError(f"The model in {where} cannot be put on {device!r}: {str(fault).splitlines()[0]}") from fault


def _digest(files: list[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        with path.open("rb") as file:
            digest.update(path.suffix.encode() + hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()
