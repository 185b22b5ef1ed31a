"""Ten seconds of the real thing: two processes train a tiny model for one step, and one process does the same plainly.

The two use this package: they load in 4 bits, shard, gather, run fused, and reduce gradients, over NCCL where there are
two GPUs and over gloo otherwise. The one uses transformers, bitsandbytes and PEFT as anybody does, without sharding,
and nothing of this package. Compared are:

- **every 4-bit weight**, gathered and dequantised: equal, bit for bit;
- **the loss and the gradient of every adapter weight.** Both computations round to bfloat16, so both stray from the
  truth, which is the plain one in float32. How far the plain one strays is the measure: the sharded one may stray twice
  as far. A product that is rounded to bfloat16 loses up to 2^-8 of it, so a plain one that happens to be closer than
  that does not count.

A gradient that is summed instead of averaged, or lacks a rank, is 50 to 100 percent off.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .findings import Finding, error, ok

NUM_PROCESSES = 2
TIMEOUT_SECONDS = 60
"""How long a collective may wait; a broken link between GPUs shows as one that waits forever."""

_ROUNDING = 2**-8
_SIZES = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64}
_LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
_RESULT, _FAILURE = "sharded.safetensors", "failure-{}.txt"

Tensors = dict[str, Any]


# -- The process that compares -----------------------------------------------------------------------------------------


def check_live() -> Iterator[Finding]:
    """Does a sharded step compute what a plain one computes?"""
    import torch

    on_gpus = torch.cuda.device_count() >= NUM_PROCESSES
    where = f"{NUM_PROCESSES} {'GPUs over NCCL' if on_gpus else 'processes on the CPU over gloo'}"
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="live-test-") as folder:
        make_model(folder)
        truth = compute_plainly(folder, "cuda:0" if on_gpus else "cpu")
        problem = _run_sharded(folder, on_gpus)
        if problem:
            yield error(f"Training over {where} failed: {problem}", *_remedies(on_gpus))
            return
        yield from compare(_read(Path(folder, _RESULT)), truth, where, time.monotonic() - started)


def _run_sharded(folder: str, on_gpus: bool) -> str:
    """Run the two processes; return what went wrong."""
    from ..launch import run_workers

    failed = run_workers("hf_qlora_fsdp.doctor.live_test", [folder, *([] if on_gpus else ["--cpu"])], NUM_PROCESSES)
    if not failed:
        return ""
    rank, code = next(iter(failed.items()))
    said = [file.read_text() for file in sorted(Path(folder).glob(_FAILURE.format("*")))]
    return said[0] if said else f"rank {rank} ended with exit code {code} and said nothing."


def _remedies(on_gpus: bool) -> tuple[str, str]:
    why = "So would any run: this is the same code on a model of a few thousand numbers."
    if on_gpus:
        return why, "See the findings above. If there are none, NCCL_P2P_DISABLE=1 tells whether a link is broken, and "
        "NCCL_DEBUG=INFO what NCCL tried"
    return why, "See the findings above. If there are none, report this."


def compare(sharded: Tensors, plain: Tensors, where: str, seconds: float) -> Iterator[Finding]:
    """Yield what differs between the sharded computation and the plain ones.

    Args:
        sharded (`dict`): Weights `weight/NAME`, gradients `gradient/NAME`, and `loss`.
        plain (`dict`): The same, and as `truth/gradient/NAME` and `truth/loss` those computed in float32.
        where (`str`): What it was sharded over.
        seconds (`float`): What it took.
    """
    import torch

    weights = {name for name in plain if name.startswith("weight/")}
    others = {name for name in plain if not name.startswith(("weight/", "truth/"))}
    assert weights and others and sharded.keys() == weights | others, sharded.keys() ^ (weights | others)
    altered = sorted(name for name in weights if not torch.equal(sharded[name], plain[name]))
    strayed = {name: _stray(sharded[name], plain[name], plain[f"truth/{name}"]) for name in others}
    far = sorted((name for name in others if not strayed[name] <= 2), key=lambda name: -strayed[name])
    why = "A run would train on it, and its loss may look quite plausible."
    fix = "Install the tested versions. If they are installed, report this, with the output of doctor --json."
    if altered:
        yield error(
            f"Over {where}, {len(altered)} of {len(weights)} 4-bit weights are not what bitsandbytes makes of them: "
            f"{altered[0].removeprefix('weight/')} and so on.",
            why,
            fix,
        )
    if far:
        off = (sharded[far[0]] - plain[f"truth/{far[0]}"]).norm() / plain[f"truth/{far[0]}"].norm()
        yield error(
            f"Over {where}, {len(far)} of {len(others)} gradients (and loss) are further from the truth than rounding "
            f"explains: {far[0].removeprefix('gradient/')} is {off:.0%} off.",
            why,
            fix,
        )
    if not altered and not far:
        yield ok(
            f"One step over {where}, in {seconds:.0f} s: {len(weights)} 4-bit weights are gathered bit for bit; the "
            f"loss and {len(others) - 1} gradients stray from float32 as far as those of plain PEFT do "
            f"(at most {max(strayed.values()):.1f} times)."
        )


def _stray(mine: Any, plain: Any, truth: Any) -> float:
    """Return how far a number strays from the truth, the measure being how far the plain one does."""
    return float((mine - truth).norm() / max((plain - truth).norm(), _ROUNDING * truth.norm()))


# -- The plain way -----------------------------------------------------------------------------------------------------


def make_model(folder: str) -> None:
    """Write a random Llama of two layers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("llama", **_SIZES, **_HEADS, initializer_range=0.05)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def compute_plainly(folder: str, device: str) -> Tensors:
    """Return the 4-bit weights, and loss and gradients of one step over all rows, in bfloat16 and as truth in float32.

    The weights are dequantised once. For few tokens, bitsandbytes' own layer multiplies without the rounding that this
    takes, so it is no measure for what the rest of the arithmetic may cost.
    """
    import torch
    from bitsandbytes.nn import Linear4bit
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    quantized: Any = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": device}
    )
    names = [name for name, module in quantized.named_modules() if isinstance(module, Linear4bit)]
    base = quantized.dequantize()
    computed = {f"weight/{name}": base.get_submodule(name).weight.detach().cpu().clone() for name in names}
    model: Any = get_peft_model(base, LoraConfig(**_LORA), autocast_adapter_dtype=False)
    fill_adapter(model)
    for prefix, dtype in (("", torch.bfloat16), ("truth/", torch.float32)):
        model.to(dtype).zero_grad()
        rows = make_rows(device)
        loss = mean_loss(model, rows)
        loss.backward()
        computed[f"{prefix}loss"] = loss.detach().float().cpu()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                computed[f"{prefix}gradient/{name}"] = parameter.grad.float().cpu()
    return computed


def make_rows(device: Any) -> Any:
    """Return tokens `[NUM_PROCESSES, 48]`: a row for each rank, all of one length."""
    import torch

    shape = (NUM_PROCESSES, 48)
    return torch.randint(_SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(0)).to(device)


def mean_loss(model: Any, rows: Any) -> Any:
    """Return the mean cross entropy of the rows, in float32."""
    import torch

    logits = model(input_ids=rows).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def fill_adapter(model: Any) -> None:
    """Give each adapter weight, whole or sharded, values that belong to its name and that bfloat16 can hold."""
    import torch
    from torch.distributed.tensor import DTensor, distribute_tensor

    for index, (_, parameter) in enumerate(sorted(item for item in model.named_parameters() if "lora_" in item[0])):
        drawn = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
        values = drawn.to(torch.bfloat16).to(parameter.device, parameter.dtype)
        if isinstance(parameter, DTensor):
            values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
        parameter.data.copy_(values)


# -- The two processes -------------------------------------------------------------------------------------------------


def compute_sharded(folder: str, on_gpus: bool) -> None:
    """Load, shard, run a step on this rank's row; rank 0 writes weights, loss and gradients, gathered, to a file."""
    import torch.distributed as dist
    from peft import LoraConfig
    from safetensors.torch import save_file
    from torch.distributed.fsdp import FSDPModule

    from ..loader import load_quantized_model
    from ..mesh import make_mesh, mesh_device
    from ..packed_linear import PackedLinear4bit
    from ..ranks import collective_device, join_process_group, rank
    from ..sharding import check_sharded
    from ..sharding_policy import ShardingPolicy
    from ..speed.fusion import fuse_lora

    join_process_group("cuda" if on_gpus else "cpu", TIMEOUT_SECONDS)
    model: Any = load_quantized_model(folder, peft_config=LoraConfig(**_LORA), progress=False, shard_cache=False)
    check_sharded(model, ShardingPolicy())
    fill_adapter(model)
    fuse_lora(model)
    loss = mean_loss(model.train(), make_rows(mesh_device(make_mesh()))[rank() : rank() + 1])
    loss.backward()
    mean = loss.detach().to(collective_device())
    dist.all_reduce(mean)
    computed = {"loss": (mean / NUM_PROCESSES).cpu()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            computed[f"gradient/{name}"] = parameter.grad.full_tensor().float().cpu()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, PackedLinear4bit):
            computed[f"weight/{name.removesuffix('.base_layer')}"] = module.dequantize().cpu()
    if rank() == 0:
        save_file(computed, Path(folder, _RESULT))
    dist.barrier()
    dist.destroy_process_group()


def _read(file: Path) -> Tensors:
    from safetensors.torch import load_file

    return load_file(file)


def main() -> None:
    """Be one of the two processes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    if args.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        compute_sharded(args.folder, not args.cpu)
    except Exception as problem:
        said = f"{type(problem).__name__}: {' '.join(str(problem).split())[:500]}"
        Path(args.folder, _FAILURE.format(os.environ["RANK"])).write_text(said)
        traceback.print_exc()
        sys.exit(1)


if __name__ == "__main__":
    main()
