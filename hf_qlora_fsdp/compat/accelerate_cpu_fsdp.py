"""accelerate turns FSDP into DDP on the CPU without a word.

`AcceleratorState.__init__` adopts the FSDP plugin for every kind of multi-device run but `MULTI_CPU`, where it drops
it: the trainer then wraps a sharded model in `DistributedDataParallel`. FSDP2 itself works over gloo, and every test
of this package runs on it.
"""

from collections.abc import Callable

from . import Patch


def _build(original: Callable) -> Callable:
    def __init__(self, *args, fsdp_plugin=None, **kwargs):
        from accelerate import PartialState
        from accelerate.utils import DistributedType

        already_there = bool(self._shared_state)
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if already_there or fsdp_plugin is None or self.distributed_type != DistributedType.MULTI_CPU:
            return
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin

    return __init__


PATCH = Patch(
    name="accelerate-cpu-fsdp",
    target="accelerate.state:AcceleratorState.__init__",
    affects="accelerate>=1.15",
    symptom="On the CPU, FSDP is replaced by DDP without a word.",
    upstream="https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/state.py#L986",
    remove_when="AcceleratorState adopts fsdp_plugin for DistributedType.MULTI_CPU",
    build=_build,
)
