"""Weights that processes share (FSDP, ZeRO-3), in one piece for a while, so that each process can decode as long as it likes.

Such weights are gathered by all processes together, layer by layer, in every forward pass; rollouts of different lengths would have them
ask at different times. So they are gathered once before the first pass and let go after the last: in between a process makes as many
passes as it wants, or none. Each process then holds all weights at once, in the type that is computed in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from transformers import TrainerCallback

from seerseg.errors import MissingExtraError, SeerSegError, UsageError

Sharing = Literal["fsdp1", "fsdp2", "zero3"]


def sharing(trainer: Any) -> Sharing | None:
    """How processes share the weights; None where each has them all."""
    state = trainer.accelerator.state
    if trainer.is_fsdp_enabled:
        return "fsdp2" if state.fsdp_plugin.fsdp_version == 2 else "fsdp1"
    return "zero3" if state.deepspeed_plugin is not None and state.deepspeed_plugin.zero_stage == 3 else None


def refusal(trainer: Any) -> SeerSegError | None:
    """Why the weights cannot be had in one piece; None where they can."""
    found = sharing(trainer)
    if found == "fsdp1":
        return UsageError(
            "FSDP of version 1 lets no model run while its weights are in one piece, which replies of different lengths need. Set "
            "fsdp_version to 2 in the configuration of accelerate."
        )
    if found == "fsdp2":
        import torch
        from torch.distributed.fsdp import FSDPModule

        if not hasattr(FSDPModule, "reset_iter_state"):
            return MissingExtraError(f"Replies of a model shared by FSDP need torch 2.13 or newer; this is {torch.__version__}.")
    return None


def check_gathers(trainer: Any) -> None:
    """UsageError, MissingExtraError: `refusal`."""
    found = refusal(trainer)
    if found is not None:
        raise found


class SharedHead(TrainerCallback):
    """Has FSDP2 take care of the output head, which TRL reads without calling it.

    accelerate shards the head of a vision-language model as a unit of its own; TRL (1.16) then gathers the weight itself, and its gradient
    would be that of one process's samples for each process's rows.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gather it before every pass; what follows a backward pass sums its gradient and shards it again."""
        from torch.distributed.fsdp import FSDPModule

        model = kwargs["model"]
        if isinstance(model, FSDPModule):
            head = model.get_output_embeddings()
            if isinstance(head, FSDPModule):
                model.register_forward_pre_hook(lambda *given: head.unshard())


@contextmanager
def whole(trainer: Any) -> Iterator[None]:
    """The weights in one piece on every process, whatever module is called and how often. All processes must enter and leave; between
    that nothing is said among them, and no gradient may be taken. Errors as in `check_gathers`."""
    found = sharing(trainer)
    check_gathers(trainer)
    if found == "fsdp2":
        with _unsharded(trainer.model):
            yield
    elif found == "zero3":
        with _gathered(trainer.model_wrapped):
            yield
    else:
        yield


@contextmanager
def _unsharded(model: Any) -> Iterator[None]:
    """FSDP2. What torch does before and after a module's forward then finds nothing to gather and, told so, frees nothing."""
    from torch.distributed.fsdp import FSDPModule

    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    root, *_ = modules
    root._get_fsdp_state()._lazy_init()  # else the first module that is called would take itself for the root
    groups = [group for module in modules for group in module._get_fsdp_state()._fsdp_param_groups]
    before = [group.post_forward_mesh_info for group in groups]  # the public setter knows no way back from a number of processes
    root.set_reshard_after_forward(False)
    try:
        for module in modules:
            module.unshard()
        yield
    finally:
        for group, mesh in zip(groups, before, strict=True):
            group.post_forward_mesh_info = mesh
        root.reset_iter_state()  # shards again, and forgets the order of passes: the backward pass fetches ahead by it


@contextmanager
def _gathered(engine: Any) -> Iterator[None]:
    """ZeRO-3. Its hooks would let weights go after each module's forward."""
    import deepspeed  # type: ignore[import-not-found, unused-ignore]
    from trl.models.utils import add_hooks, remove_hooks

    with deepspeed.zero.GatheredParameters(list(engine.parameters())):
        remove_hooks(engine)
        try:
            yield
        finally:
            add_hooks(engine)
