"""Finding and loading a vision-language model: a folder, a hub id that is already on this machine, or a peft adapter of one.

Never the network when offline; never code from a model folder; weights from safetensors only. Works without torchvision: image
processors are taken in their PIL form and processors are built without their video part.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seerseg.errors import MissingExtraError, ModelError, WeightsError
from seerseg.paths import read_json
from seerseg.quiet import quiet
from seerseg.reasoners.torchvision_state import BROKEN_ADVICE, torchvision_state

BASE_FILE = "seerseg_base.json"
"""Beside a trained adapter: name and identity of the base it was trained on."""
SHIPPED = {"nano": Path(__file__).resolve().parents[1] / "weights" / "nano_reasoner"}
"""Models that come with the package, by the name that adapters call them by: their folder is elsewhere on every machine."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
_BLOCK, _BLOCKS = 65536, 64
_IMAGE_ONLY_FORM = {"SmolVLMProcessor": "Idefics3Processor"}
"""Processors that need extra packages for videos alone -> the one that treats images alike."""


@dataclass(frozen=True)
class Source:
    """Where a model was found. adapter: folder of a peft adapter on `folder`, or None."""

    folder: Path
    adapter: Path | None
    name: str


@dataclass(eq=False)
class Loaded:
    """A model ready to generate, with its processor. identity: hex digest of weights and configuration."""

    model: Any
    processor: Any
    tokenizer: Any
    source: Source
    identity: str
    licence: str


def find(source: str | Path, *, offline: bool, base: str | Path | None = None) -> Source:
    """The folder(s) of a model. base: the model that an adapter belongs to, instead of the one its config names."""
    folder = _folder(source, offline=offline)
    if not (folder / "adapter_config.json").is_file():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"The folder {folder} holds no config.json and no adapter_config.json, so it is no transformers model or peft adapter."
            )
        return Source(folder, None, str(source))
    config = read_json(folder / "adapter_config.json", ModelError)
    named = base or config.get("base_model_name_or_path")
    if (folder / "base" / "config.json").is_file() and base is None:
        return Source(folder / "base", folder, str(source))
    if not named:
        raise ModelError(f"{folder}/adapter_config.json does not name its base model; put that model into {folder}/base.")
    if base is None and named in SHIPPED:
        return Source(SHIPPED[named], folder, str(source))
    beside = folder / str(named)
    chosen = beside if base is None and not Path(str(named)).is_absolute() and beside.is_dir() else named
    try:
        return Source(_folder(chosen, offline=offline), folder, str(source))
    except WeightsError as fault:
        raise WeightsError(f"{fault} It is the base model of the adapter in {folder}; it may also be put into {folder}/base.") from None


def _folder(source: str | Path, *, offline: bool) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    text = str(source)
    if path.exists() or not _HUB_ID.fullmatch(text):
        raise WeightsError(
            f"There is no model folder {text!r}. Give a folder with config.json and *.safetensors, "
            "or a hub id such as Qwen/Qwen3-VL-4B-Instruct."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, local_files_only=offline, allow_patterns=_PATTERNS))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as fault:
        if offline:
            raise WeightsError(
                f"The model {text!r} is not on this machine and SeerSeg does not download unless told to. "
                f"Copy its folder (config, tokenizer, *.safetensors) here and give the path, or fetch it once with: hf download {text}."
            ) from None
        raise WeightsError(f"The model {text!r} could not be fetched: {str(fault).splitlines()[0]}") from fault


def load(source: Source, *, device: str, dtype: str | None, merge: bool = True) -> Loaded:
    """Load model, processor and tokenizer. merge: an adapter becomes part of the weights; else it stays apart, as training wants it.
    WeightsError for missing or damaged weights, ModelError for what is no image-text model."""
    check_torchvision()
    _check_base(source)
    with quiet():
        model = _model(source.folder, device, dtype)
        if source.adapter is not None:
            model = _adapted(model, source.adapter, source.folder, merge=merge)
        own = source.adapter is not None and (source.adapter / "tokenizer_config.json").is_file()
        processor = load_processor(source.adapter if own and source.adapter is not None else source.folder, source.folder)
    model.requires_grad_(False)
    return Loaded(model.eval().to(device), processor, processor.tokenizer, source, identity(source), licence_of(source.folder))


def check_torchvision() -> None:
    """ModelError where a torchvision is installed that breaks transformers."""
    if torchvision_state() == "broken":
        raise ModelError(BROKEN_ADVICE)


def _check_base(source: Source) -> None:
    """ModelError when an adapter says that it was trained on other weights than it is put on."""
    path = source.adapter / BASE_FILE if source.adapter is not None else None
    if path is None or not path.is_file():
        return
    said = read_json(path, ModelError, 1)
    if said.get("identity") != weights_identity(source.folder):
        raise ModelError(
            f"The adapter in {source.adapter} was trained on the base model {said.get('name')!r}, but {source.folder} holds other weights. "
            f"Put the right base into {source.adapter}/base, or give its folder."
        )


def default_dtype(device: str) -> str:
    """bfloat16 on GPUs that compute in it, float16 on older ones, else float32."""
    if not device.startswith("cuda"):
        return "float32"
    import torch

    return "bfloat16" if torch.cuda.get_device_capability(torch.device(device))[0] >= 8 else "float16"


def _model(folder: Path, device: str, dtype: str | None) -> Any:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText

    wanted = dtype or default_dtype(device)
    kind = getattr(torch, wanted, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ModelError(f"{wanted!r} is no floating-point type; use float32, bfloat16 or float16.")
    if not any(folder.glob("*.safetensors")):
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
        found = f" It holds {others[0]}, which SeerSeg does not open; convert it with save_pretrained." if others else ""
        raise WeightsError(f"The folder {folder} holds no *.safetensors weights.{found}")
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=kind, local_files_only=True, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    except SafetensorError as fault:
        raise WeightsError(f"The weights in {folder} are damaged ({fault}). Copy them again.") from fault
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as fault:
        said = " ".join(str(fault).split())[:300]
        kind_of = ModelError if "Unrecognized" in said or "configuration class" in said.lower() else WeightsError
        raise kind_of(f"The model in {folder} cannot be loaded as an image-text-to-text model: {said}") from fault
    missing = sorted(info["missing_keys"]) + sorted(str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"])
    if missing:
        raise WeightsError(
            f"The weights in {folder} lack {len(missing)} tensors of the model ({missing[0]} ...). Copy all its files again."
        )
    return model


def _adapted(model: Any, adapter: Path, base: Path, *, merge: bool) -> Any:
    try:
        from peft import PeftModel
    except ImportError as fault:
        raise MissingExtraError(f"The adapter in {adapter} needs the package peft: pip install peft.") from fault
    from safetensors import SafetensorError, safe_open

    weights = adapter / "adapter_model.safetensors"
    if not weights.is_file():
        raise WeightsError(f"The adapter folder {adapter} holds no adapter_model.safetensors. Copy it again.")
    try:
        with safe_open(weights, "pt") as file:
            stored = set(file.keys())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft and transformers deprecate each other's attributes
            made = PeftModel.from_pretrained(model, adapter, is_trainable=not merge)
    except SafetensorError as fault:
        raise WeightsError(f"{weights} is damaged ({fault}). Copy it again.") from fault
    except (RuntimeError, ValueError, KeyError, TypeError) as fault:
        raise WeightsError(f"The adapter in {adapter} does not fit its base model: {' '.join(str(fault).split())[:300]}") from fault
    placed = {name.replace(".default", "") for name in made.state_dict() if "lora" in name or "modules_to_save" in name}
    if stored and not stored & placed:
        raise WeightsError(f"The adapter in {adapter} has no weight that fits the model it is put on; another base model was meant.")
    for config in made.peft_config.values():  # where it lies here: peft asks the hub about other names when it saves
        config.base_model_name_or_path = str(base)
    return made.merge_and_unload() if merge else made


def load_processor(folder: Path, fallback: Path | None = None) -> Any:
    """The processor of a model folder in its image-only form: PIL image processor, tokenizer, chat template, no video part."""
    import transformers
    from transformers import AutoImageProcessor, AutoTokenizer

    images = folder if _has_images(folder) or fallback is None else fallback
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        image_processor = AutoImageProcessor.from_pretrained(images, local_files_only=True, trust_remote_code=False, backend="pil")
    except (OSError, ValueError, ImportError, KeyError, TypeError) as fault:
        raise ModelError(f"The tokenizer or image processor in {folder} cannot be loaded: {' '.join(str(fault).split())[:300]}") from fault
    tokenizer.padding_side = "left"
    settings = _json(images / "processor_config.json")
    name = _processor_name(images, folder)
    kind = getattr(transformers, _IMAGE_ONLY_FORM.get(name, name), None)
    if kind is None:
        raise ModelError(
            f"The model in {images} uses the processor {name!r}, which this transformers ({transformers.__version__}) does not have."
        )
    # constructors insist on a video processor, which exists with torchvision only; images never use it
    made = type(kind.__name__, (kind,), {"check_argument_for_proper_class": lambda self, name, argument: type(argument)})
    wanted = set(inspect.signature(kind).parameters)
    extra = {key: value for key, value in settings.items() if key in wanted and not isinstance(value, dict)}
    parts: dict[str, Any] = {
        "image_processor": image_processor,
        "tokenizer": tokenizer,
        "chat_template": _template(folder, images, tokenizer),
    }
    if "video_processor" in wanted:
        parts["video_processor"] = None
    try:
        return made(**{**extra, **parts})
    except (TypeError, ValueError, ImportError, AttributeError) as fault:
        raise ModelError(f"The processor {name} of {images} cannot be built: {' '.join(str(fault).split())[:300]}") from fault


def _processor_name(*folders: Path) -> str:
    for folder in folders:
        for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
            name = _json(folder / file).get("processor_class")
            if isinstance(name, str):
                return name
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    kind = next((found for folder in folders if (found := _json(folder / "config.json").get("model_type"))), "")
    name = PROCESSOR_MAPPING_NAMES.get(kind)
    if not isinstance(name, str):
        raise ModelError(f"No processor is known for the model type {kind!r} in {folders[0]}.")
    return name


def _template(folder: Path, images: Path, tokenizer: Any) -> str | None:
    for place in (folder, images):
        if (place / "chat_template.jinja").is_file():
            return (place / "chat_template.jinja").read_text(encoding="utf-8")
        found = _json(place / "chat_template.json").get("chat_template")
        if isinstance(found, str):
            return found
    found = tokenizer.chat_template
    return found if isinstance(found, str) else None


def _has_images(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json"))


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value = read_json(path, ModelError)
    return value if isinstance(value, dict) else {}


def licence_of(folder: Path) -> str:
    """The licence in the front matter of a model's card, "" if none."""
    card = folder / "README.md"
    found = re.search(r"^license:\s*(\S+)", card.read_text(encoding="utf-8", errors="replace"), re.MULTILINE) if card.is_file() else None
    return found.group(1) if found else ""


def count_weights(folder: Path) -> int:
    """Numbers in the safetensors of a folder, from their headers; a damaged file counts for nothing."""
    total = 0
    for path in folder.glob("*.safetensors"):
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length)) if length <= path.stat().st_size else {}
            total += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return total


def identity(source: Source) -> str:
    """Digest of names, sizes, heads and evenly spaced blocks of every file that shapes a reply (whole small files)."""
    folders = [folder for folder in (source.folder, source.adapter) if folder is not None]
    return _digest(folders, (".json", ".safetensors", ".jinja", ".txt", ".model"))


def weights_identity(folder: Path) -> str:
    """The same of the weights alone."""
    return _digest([folder], (".safetensors",))


def _digest(folders: Sequence[Path], suffixes: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in suffixes):
            size = path.stat().st_size
            digest.update(json.dumps([path.name, size]).encode())
            with path.open("rb") as file:
                for number in range(min(_BLOCKS, -(-size // _BLOCK))):
                    file.seek(number * max(_BLOCK, size // _BLOCKS))
                    digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:32]
