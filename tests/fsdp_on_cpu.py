"""accelerate's FSDP2 in processes on a CPU: as on GPUs, but for the two lines that `begin` adds.

As a program: `python fsdp_on_cpu.py -m MODULE ARGUMENTS...` runs a module so.
"""

from __future__ import annotations

import functools
import os
import runpy
import sys
from typing import Any

ENV = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
}
"""What `accelerate launch` makes of a configuration with fsdp_version 2."""


def begin() -> None:
    """Torch shards on a CPU as well as elsewhere, but accelerate takes FSDP up on accelerators only. To be called before any trainer."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    plain = AcceleratorState.__init__

    @functools.wraps(plain)
    def sharing(self: Any, *given: Any, fsdp_plugin: Any = None, **more: Any) -> None:
        plain(self, *given, fsdp_plugin=fsdp_plugin, **more)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = sharing


if __name__ == "__main__":
    for name, value in ENV.items():
        os.environ.setdefault(name, value)
    begin()
    _, _, module, *sys.argv[1:] = sys.argv
    sys.argv[0] = module
    runpy.run_module(module, run_name="__main__", alter_sys=False)
