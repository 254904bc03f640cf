"""The reasoner that is trained: found, loaded so that it can learn, and put into the model folder.

A reasoner of `lora.from_parameters` and more gets adapters (peft) on the linear layers of its language model; a smaller one is
trained whole. Weights that learn are held in float32; frozen ones in the type of computation, or in 4 bits.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from seerseg.errors import MissingExtraError, ModelError, UsageError, WeightsError
from seerseg.model import ModelSpec, write_spec
from seerseg.paths import read_json, write_json
from seerseg.reasoners.vlm_loading import BASE_FILE, SHIPPED, Loaded, Source, find, identity, load, weights_identity
from seerseg.training.data import Ground
from seerseg.training.runs import Checkpoint, RunFolder
from seerseg.training.settings import TrainSettings

VISION = r".*(visual|vision|image_encoder|multi_modal_projector|mm_projector|connector).*"
"""Names of modules that look at images or carry what they saw to the language model."""
_ALIKE = 0.99  # cosine: of 2048 rows of nano 308 are so near another, the marks with 0.998; digits and words of replies are not
_ENOUGH_ROWS = 16  # to know their spread
_ROWS_AT_ONCE = 256
_NOT_WEIGHTS = (".json", ".jinja", ".txt", ".model")
_TRAINER_FILES = ("trainer_state.json", "checkpoint.json")


@dataclass(frozen=True)
class Shape:
    """Sizes of a reasoner that memory follows from. parameters: of all of it; vision: those of the vision tower and connector; layers to
    vocabulary: of the language model; vision_*: of the vision tower; patch_px: side of a patch; merge: patches per image token along a
    side; image_px: the size every image is brought to, None where the tower takes any; image_area_px: what its processor brings an image's
    number of pixels between."""

    parameters: int
    vision: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    vision_layers: int
    vision_hidden: int
    vision_intermediate: int
    vision_heads: int
    patch_px: int
    merge: int
    image_px: int | None
    image_area_px: tuple[int, int] = (0, 1 << 62)


def source_of(name: str, *, offline: bool = True) -> Source:
    """The files of the reasoner called so: a folder, a hub id, vlm:FOLDER, a shipped vision-language model, or nano:FOLDER.

    UsageError for a reasoner that cannot learn (rules, doubles), ModelError for a folder that is no image-text-to-text model.
    """
    given = name.removeprefix("vlm:")
    if Path(given).expanduser().exists() or ("/" in given and not opened_by(name)):
        source = find(given, offline=offline)
    else:
        from seerseg.reasoners import load_reasoner
        from seerseg.reasoners.vlm import VlmReasoner

        made = load_reasoner(given, offline=offline)
        if not isinstance(made, VlmReasoner):
            raise UsageError(
                f"The reasoner {name!r} has no weights that could be trained. Give a vision-language model with --reasoner: a folder, or a "
                "hub id such as Qwen/Qwen3-VL-4B-Instruct."
            )
        source = made.loaded.source
    check_kind(source.folder)
    return source


def opened_by(name: str) -> str:
    """ "nano:" for a reasoner called nano or nano:FOLDER, whose class does more than reply; "" for the plain `vlm`."""
    from seerseg.reasoners import available_reasoners

    kind = name.partition(":")[0].strip().casefold()
    return f"{kind}:" if kind in available_reasoners() and kind != "vlm" else ""


def check_kind(folder: Path) -> None:
    """ModelError unless the folder's config names a model that takes images and text and writes text."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise ModelError(f"The model in {folder} cannot be read: {' '.join(str(fault).split())[:300]}") from fault
    if config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ModelError(
            f"The model in {folder} is of type {config.model_type!r}, which does not take images and text and write text "
            "(image-text-to-text), so it cannot be trained as a reasoner. Choose a vision-language model, for example a Qwen3-VL."
        )


def shape_of(source: Source) -> Shape:
    """Sizes from config.json and the heads of the weight files; no weight is loaded."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
    text, seen = config.get_text_config(), config.vision_config
    sizes = _sizes(source.folder)
    heads = int(text.num_attention_heads)
    hidden, width = int(text.hidden_size), int(getattr(seen, "hidden_size", None) or seen.embed_dim)
    merge = getattr(seen, "spatial_merge_size", None) or getattr(config, "scale_factor", None) or 1
    fixed = getattr(seen, "image_size", None)
    return Shape(
        parameters=sum(sizes.values()),
        vision=sum(n for name, n in sizes.items() if is_vision(name)),
        layers=int(text.num_hidden_layers),
        hidden=hidden,
        heads=heads,
        kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(text, "head_dim", None) or hidden // heads),
        intermediate=int(text.intermediate_size),
        vocabulary=int(text.vocab_size),
        vision_layers=int(getattr(seen, "depth", None) or seen.num_hidden_layers),
        vision_hidden=width,
        vision_intermediate=int(getattr(seen, "intermediate_size", None) or 4 * width),
        vision_heads=int(getattr(seen, "num_heads", None) or seen.num_attention_heads),
        patch_px=int(seen.patch_size),
        merge=int(merge),
        image_px=int(fixed) if isinstance(fixed, int) else None,
        image_area_px=_area(source.folder),
    )


def _area(folder: Path) -> tuple[int, int]:
    """Bounds of Qwen's processors, which are numbers of pixels whatever they are called; others resize to a side and have none."""
    path = folder / "preprocessor_config.json"
    said = read_json(path) if path.is_file() else {}
    size = said.get("size") or {}
    least, most = size.get("shortest_edge", said.get("min_pixels")), size.get("longest_edge", said.get("max_pixels"))
    if "Qwen" not in str(said.get("image_processor_type")) or not isinstance(least, int) or not isinstance(most, int):
        return Shape.image_area_px
    return least, most


def goes_on(source: Source) -> bool:
    """Whether dialogues of this reasoner go on from their tokens, so that all turns of one are one sample; no weight is loaded."""
    from types import SimpleNamespace

    from transformers import AutoConfig

    from seerseg.reasoners.vlm import VlmReasoner
    from seerseg.reasoners.vlm_loading import load_processor

    config = AutoConfig.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
    processor = load_processor(source.folder)
    return VlmReasoner(Loaded(SimpleNamespace(config=config), processor, processor.tokenizer, source, "", "")).goes_on


def load_trainable(source: Source, settings: TrainSettings) -> Loaded:
    """The reasoner on the CPU, in train mode, with what learns marked so. The trainer moves it.

    An adapter that the source holds is trained on where tuning is "lora", and made part of the weights where it is "full".
    """
    full = settings.tuning == "full"
    if settings.quantize == "4bit":
        loaded = _in_4_bits(source, settings.dtype)
    else:
        loaded = load(source, device="cpu", dtype="float32" if full else settings.dtype, merge=full)
    model = loaded.model
    if full:
        for name, weight in model.named_parameters():
            weight.requires_grad_(settings.train_vision or not is_vision(name))
    else:
        model = _with_adapters(model, source, settings)
    return replace(loaded, model=model.train())


def wake(model: Any, tokens: Iterable[int], seed: int) -> int:
    """Draw the embeddings of those of these tokens anew that all but equal another token's, from the spread of the others'; how many were.

    A row that no text ever had ends where all such rows do: pushed away from every reply, and alike, so that tokens that are to be
    learnt are one token at first, read and written. Nano's marks of the fixed parts of replies are so; drawn anew, the loss of the first
    40 updates lies 0.09 to 0.2 lower (medvol-r1).
    """
    import torch

    used = torch.tensor(sorted(set(tokens)))
    tables = {
        id(layer.weight): layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None
    }
    rng = torch.Generator().manual_seed(seed)
    drawn = 0
    with torch.no_grad():
        for table in tables.values():
            lengths = table.norm(dim=1).clamp_min(1e-12)
            alike = torch.zeros(len(used), dtype=torch.bool)
            for start in range(0, len(used), _ROWS_AT_ONCE):
                part = used[start : start + _ROWS_AT_ONCE]
                cosine = table[part] @ table.T / lengths / lengths[part, None]
                cosine[torch.arange(len(part)), part] = -1.0
                alike[start : start + len(part)] = cosine.amax(1) > _ALIKE
            known = table[used[~alike]]
            if len(known) < _ENOUGH_ROWS:
                continue
            noise = torch.randn((int(alike.sum()), table.shape[1]), generator=rng, dtype=table.dtype)
            table[used[alike]] = known.mean(0) + known.std(0) * noise.to(table.device)
            drawn = max(drawn, len(noise))
    return drawn


def is_vision(name: str) -> bool:
    """Whether a weight of this name belongs to the vision tower or its connector."""
    import re

    return re.fullmatch(VISION, name) is not None


def export(
    run: RunFolder,
    checkpoint: Checkpoint,
    source: Source,
    ground: Ground,
    *,
    segmenter: str,
    segmenter_identity: str | None,
    reasoner: str = "",
) -> None:
    """Make the run's fold folder a model: weights of a checkpoint with tokenizer and processor of the base, plans, manifest.

    reasoner: as it was named for training; what was trained from nano is opened as nano again.
    Files are linked where the file system allows, so this takes no time and no space. ModelError when the checkpoint holds no weights
    in one piece (sharded ones of FSDP).
    """
    weights = [p for p in checkpoint.path.glob("*.safetensors") if p.is_file()]
    if not weights:
        raise ModelError(
            f"{checkpoint.path} holds no *.safetensors. With FSDP, set fsdp_state_dict_type: FULL_STATE_DICT; with DeepSpeed ZeRO-3, "
            "set zero3_save_16bit_model: true; then continue with -c."
        )
    fresh = run.folder / ".model"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    adapter = (checkpoint.path / "adapter_config.json").is_file()
    for folder in (source.folder, *([source.adapter] if source.adapter else []), checkpoint.path):
        for path in sorted(folder.iterdir()):
            own = path.suffix == ".safetensors" and folder == checkpoint.path
            about = path.suffix in _NOT_WEIGHTS and path.name not in _TRAINER_FILES
            if path.is_file() and (own or (about and not path.name.endswith("safetensors.index.json")) or _index(path, checkpoint.path)):
                if not (adapter and path.name == "config.json"):
                    _put(path, fresh / path.name)
    _name_base(fresh, source, run, adapter=adapter)
    shutil.rmtree(run.model, ignore_errors=True)
    fresh.rename(run.model)
    write_json(run.root / "plans.json", ground.plans.to_json())
    write_spec(
        run.root,
        ModelSpec(
            reasoner=opened_by(reasoner) + str(run.model.resolve()),
            segmenter=segmenter,
            segmenter_identity=segmenter_identity,
            protocol=ground.protocol.name,
            views=ground.spec,
            targets=ground.targets.names,
            closed=ground.targets.closed,
            label_values=ground.label_values,
            descriptions={d.canonical: d for d in ground.dataset.descriptions.values()} or None,
            dataset=ground.dataset.name,
            fold=ground.number,
        ),
    )


def _sizes(folder: Path) -> dict[str, int]:
    """Elements of every tensor, from the heads of the files."""
    sizes: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                head = json.loads(file.read(length))
        except (OSError, ValueError, struct.error) as fault:
            raise WeightsError(f"The weights in {path} are damaged ({fault}). Copy them again.") from fault
        for name, said in head.items():
            if name != "__metadata__":
                count = 1
                for n in said["shape"]:
                    count *= n
                sizes[name] = count
    if not sizes:
        raise WeightsError(f"The folder {folder} holds no *.safetensors weights.")
    return sizes


def _with_adapters(model: Any, source: Source, settings: TrainSettings) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as fault:
        raise MissingExtraError("Adapters need the package peft: pip install 'seerseg[train]'.") from fault
    if source.adapter is not None:
        for name, weight in model.named_parameters():
            weight.requires_grad_("lora_" in name)
        return model
    named = settings.lora_targets
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=0.0,
        target_modules=named if named == "all-linear" else [part.strip() for part in named.split(",")],
        exclude_modules=None if settings.train_vision else VISION,
        task_type="CAUSAL_LM",
    )
    import torch

    torch.manual_seed(settings.seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft and transformers deprecate each other's attributes
            return get_peft_model(model, config)
    except ValueError as fault:
        raise UsageError(f"lora.targets {named!r} does not fit this model: {' '.join(str(fault).split())[:300]}") from fault


def _in_4_bits(source: Source, dtype: str) -> Loaded:
    """Base weights in 4 bits (NF4), for a GPU; MissingExtraError without bitsandbytes."""
    from importlib.util import find_spec

    import torch

    if find_spec("bitsandbytes") is None or not torch.cuda.is_available():
        raise MissingExtraError(
            "The plan holds frozen weights in 4 bits, which needs a CUDA GPU and bitsandbytes: pip install bitsandbytes. "
            "Or hold them whole with --set device.quantize=none."
        )
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    from seerseg.reasoners.vlm_loading import load_processor

    kind = getattr(torch, dtype)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=kind, bnb_4bit_use_double_quant=True
    )
    place = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    model = AutoModelForImageTextToText.from_pretrained(
        source.folder, dtype=kind, local_files_only=True, use_safetensors=True, quantization_config=quantization, device_map=place
    )
    if source.adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, source.adapter, is_trainable=True)
    processor = load_processor(source.folder)
    return Loaded(model, processor, processor.tokenizer, source, identity(source), "")


def _index(path: Path, checkpoint: Path) -> bool:
    return path.parent == checkpoint and path.name.endswith("safetensors.index.json")


def _put(path: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    if path.suffix != ".safetensors":
        shutil.copyfile(path, target)
        return
    try:
        os.link(path.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(path, target)


def _name_base(folder: Path, source: Source, run: RunFolder, *, adapter: bool) -> None:
    """Have a trained model name what it was trained from, and that base's digest; an adapter says so to peft, too.

    The name must mean the same on another machine: of a shipped model its name, of an earlier stage of this run the way there.
    """
    before = (source.adapter or source.folder) / BASE_FILE
    if before.is_file() and (source.adapter is not None or not adapter):
        named, digest = (str(read_json(before, ModelError, 1)[key]) for key in ("name", "identity"))
    else:
        named, digest = _portable(source, run), weights_identity(source.folder)
    if adapter:
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, {**config, "base_model_name_or_path": named})
    write_json(folder / BASE_FILE, {"schema": 1, "name": named, "identity": digest})


def _portable(source: Source, run: RunFolder) -> str:
    place = source.folder.resolve()
    shipped = next((name for name, path in SHIPPED.items() if path.resolve() == place), None)
    if shipped is not None:
        return shipped
    if place.is_relative_to(run.root.resolve()):
        return Path(os.path.relpath(place, run.model.resolve())).as_posix()
    return str(place) if Path(source.name).expanduser().exists() else source.name
