"""Getting FSDP2 out of a step that was left in the middle.

A step that ends in an exception leaves units gathered, collectives noted as under way, gradients half reduced, and a
callback counted as queued that will never run; the next step would wait for them, or add to them. torch 2.13 has begun
to clear this up by itself, in private (`FSDPState._reset_iter_state`); 2.11, which GPUs run here, has not. So it is
done in this one place, on the attributes that both have: everything that belongs to one iteration is put to the value
with which it begins, and every unit shows its shards again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState


def forget_step(root: Any) -> None:
    """Make a sharded model as it was before a step: sharded, idle, without gradients.

    Every rank must call it, each after the same number of collectives, so that none is waited for any more.

    Args:
        root (`FSDPModule`): The outermost module.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # what is under way ends, and its memory is no longer in use
    root_state = root._get_fsdp_state()
    context, communication = root_state._state_ctx, root_state._comm_ctx
    communication.all_gather_state = None
    for name in ("reduce_scatter_states", "_last_post_reduce_events"):  # torch 2.13 keeps several
        if hasattr(communication, name):
            getattr(communication, name).clear()
    if hasattr(communication, "reduce_scatter_state"):
        communication.reduce_scatter_state = None
    communication.post_forward_order.clear()
    for state in context.all_states:
        state._modules_to_run_forward.clear()
        state._training_state = TrainingState.IDLE
        if state._fsdp_param_group is not None:
            _forget_unit(state._fsdp_param_group)
    context.iter_forward_root = None
    context.post_backward_final_callback_queued = False
    for parameter in root.parameters():
        parameter.grad = None


def _forget_unit(group: Any) -> None:
    for parameter in group.fsdp_params:
        if hasattr(parameter, "_unsharded_param"):
            parameter._unsharded_param.grad = None
        parameter.unsharded_accumulated_grad = None
    for name in ("_all_gather_result", "_post_reduce_event", "_all_reduce_state", "_reshard_after_forward_event"):
        setattr(group, name, None)
    group._partial_reduce_output = None
    group._post_forward_indices.clear()
    group._training_state = TrainingState.IDLE
    group._to_sharded()
