"""One layer of experts in 4 bits: time, kernels, and the memory that dequantised experts take while they are used.

Builds the experts of one layer with random weights and routing, LoRA on them or not, and runs them forward, and forward
and backward. Medians of 20:

    ms          from an idle GPU to an idle GPU: what a step of the layer's experts takes
    kernel ms   what its kernels take alone; the rest is Python and waiting
    kernels     how many there are

Then each product alone, with chunks of several sizes: how long it takes, and the most that is allocated beside rows and
result, which is compared with the formula of `hf_qlora_fsdp/experts/layers.py`.

    python benchmarks/experts_profile.py --shape mixtral-8x7b

One card is enough, and about a minute for a shape (estimated). Without a card it runs too, without kernels and memory,
in seconds for `--shape tiny`, `tiny-qwen3` and `tiny-gpt-oss`; the memory of a layer is then held to the formula by
`tests/experts/test_experts.py`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import AutoConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from hf_qlora_fsdp.experts.grouping import Groups
from hf_qlora_fsdp.experts.layers import CHUNK_BYTES, PROJECTIONS, Experts4bit
from hf_qlora_fsdp.experts.lora import ParamWrapper
from hf_qlora_fsdp.units import format_bytes

KINDS: dict[str, type[nn.Module]] = {
    "mixtral": MixtralExperts,
    "qwen3_moe": Qwen3MoeExperts,
    "gpt_oss": GptOssExperts,
}
SHAPES: dict[str, tuple[str, int, int, int, int]] = {
    # kind, hidden, intermediate, experts, experts a token
    "tiny": ("mixtral", 128, 256, 4, 2),
    "tiny-qwen3": ("qwen3_moe", 128, 64, 16, 4),
    "tiny-gpt-oss": ("gpt_oss", 128, 128, 4, 2),
    "mixtral-8x7b": ("mixtral", 4096, 14336, 8, 2),
    "mixtral-8x22b": ("mixtral", 6144, 16384, 8, 2),
    "qwen3-30b-a3b": ("qwen3_moe", 2048, 768, 128, 8),
    "gpt-oss-20b": ("gpt_oss", 2880, 2880, 32, 4),
}
NUM_REPEATS = 20
DTYPE = torch.bfloat16


def main() -> None:
    """Time the layer in each of its forms, then its products."""
    options = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"experts of one layer of {options.shape}, {options.tokens} tokens, {name}, torch {torch.__version__}")
    experts, top_k = make_experts(options, device)
    x, index, weights = make_tokens(options, experts, top_k, device)
    whole = sum(experts.layouts[name].num_pieces * experts.layouts[name].piece.numel for name in PROJECTIONS)
    flops = 2 * whole * len(x) * top_k / experts.num_experts
    print(f"{flops / 1e9:,.0f} GFLOP a forward; all of them would be {format_bytes(2 * whole)} in 16 bits")

    print(f"{'':<54}{'ms':>9}{'kernel ms':>11}{'kernels':>9}")
    for implementation in ("grouped_mm", "eager"):
        experts.gating.config._experts_implementation = implementation
        report(f"forward, {implementation}", lambda: run(experts, x, index, weights, backward=False), device)
        report(f"forward and backward, {implementation}", lambda: run(experts, x, index, weights), device)
    adapted = add_lora(experts, options.rank, device)
    for implementation in ("grouped_mm", "eager"):
        experts.gating.config._experts_implementation = implementation
        label = f"forward and backward, {implementation}, LoRA r={options.rank}"
        report(label, lambda: run(adapted, x, index, weights), device)
    experts.gating.config._experts_implementation = "grouped_mm"
    profile_products(experts, index, device)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="mixtral-8x7b")
    parser.add_argument("--tiny", action="store_const", const="tiny", dest="shape", help="--shape tiny, for a CPU")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapter")
    return parser.parse_args()


def make_experts(options: argparse.Namespace, device: torch.device) -> tuple[Experts4bit, int]:
    """Return packed experts of random weights, and how many of them a token is sent to."""
    torch.manual_seed(0)
    kind, hidden, intermediate, num_experts, top_k = SHAPES[options.shape]
    config = AutoConfig.for_model(
        kind,
        hidden_size=hidden,
        intermediate_size=intermediate,
        moe_intermediate_size=intermediate,
        num_local_experts=num_experts,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = KINDS[kind](config)
    for name, parameter in list(module.named_parameters()):
        if name not in PROJECTIONS:  # biases
            value = torch.randn(parameter.shape, device=device, dtype=DTYPE)
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    experts = Experts4bit(module, compute_dtype=DTYPE, storage_dtype=DTYPE)
    for name, (count, rows, columns) in experts.shapes.items():
        matrices = (0.02 * torch.randn(rows, columns, device=device, dtype=DTYPE) for _ in range(count))
        experts.set_packed(name, experts.quantize(name, matrices, DTYPE, device))
    return experts.train(), top_k


def make_tokens(
    options: argparse.Namespace, experts: Experts4bit, top_k: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens, the experts of each, and their weights: as an untrained router deals them out."""
    hidden = SHAPES[options.shape][1]
    x = torch.randn(options.tokens, hidden, device=device, dtype=DTYPE, requires_grad=True)
    weights, index = torch.rand(options.tokens, experts.num_experts, device=device).softmax(1).topk(top_k)
    return x, index, weights.to(DTYPE)


def add_lora(experts: Experts4bit, rank: int, device: torch.device) -> nn.Module:
    """Put LoRA on the experts, in the dtype in which FSDP gathers it."""
    parent = nn.ModuleDict({"experts": experts})
    config = LoraConfig(r=rank, target_parameters=[f"experts.{name}" for name in PROJECTIONS], init_lora_weights=False)
    config._register_custom_module({Experts4bit: ParamWrapper})
    inject_adapter_in_model(config, parent)
    for name, parameter in parent.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(device, DTYPE)
    return parent["experts"]


def run(module: nn.Module, x: torch.Tensor, *routing: torch.Tensor, backward: bool = True) -> None:
    """Run the experts once."""
    with torch.set_grad_enabled(backward):
        y = module(x, *routing)
    if backward:
        torch.autograd.grad(y, [x, *(parameter for parameter in module.parameters() if parameter.requires_grad)], y)


def report(label: str, function: Callable[[], object], device: torch.device) -> None:
    """Time a function and print a line."""
    for _ in range(3):
        function()
    seconds = []
    for _ in range(NUM_REPEATS if device.type == "cuda" else 3):
        synchronize(device)
        began = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    line = f"{label:<54}{1e3 * statistics.median(seconds):9.3f}"
    if device.type == "cuda":
        kernel_ms, num_kernels = count_kernels(function)
        line += f"{kernel_ms:11.3f}{num_kernels:9}"
    print(line, flush=True)


def count_kernels(function: Callable[[], object]) -> tuple[float, int]:
    """Return the milliseconds that the kernels of a call take, and their number, copies included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(event.device_time for event in events) / 1e3, len(events)


def profile_products(experts: Experts4bit, index: torch.Tensor, device: torch.device) -> None:
    """Run each product alone with chunks of several sizes, and compare what it takes with the formula."""
    expert_of_row = index.reshape(-1).sort().values
    groups = Groups.count(expert_of_row, experts.num_experts, fused=True)
    largest = max(rows * columns for _, rows, columns in experts.shapes.values()) * DTYPE.itemsize
    whole = largest * experts.num_experts
    sizes = {largest, *(min(whole, factor * CHUNK_BYTES) for factor in (1, 2, 4)), whole}
    for chunk_bytes in sorted(sizes):
        experts.chunk_bytes = chunk_bytes
        for name, (_, rows, columns) in experts.shapes.items():
            inner = columns if not experts.is_transposed else rows
            x: Any = torch.randn(len(expert_of_row), inner, device=device, dtype=DTYPE)

            def product(name: str = name, x: Any = x) -> torch.Tensor:
                return experts.multiply(name, x, groups, transposed=not experts.is_transposed)

            report(f"{name}, chunks of {format_bytes(chunk_bytes)}", product, device)
            if device.type == "cuda":
                formula = max(chunk_bytes, rows * columns * DTYPE.itemsize) * (1 + 4 / (64 * DTYPE.itemsize))
                print(f"    at most {format_bytes(formula)} by the formula, measured {measure_transient(product)}")
    experts.chunk_bytes = CHUNK_BYTES


def measure_transient(product: Callable[[], torch.Tensor]) -> str:
    """Return the most that is allocated in a call beside its result, formatted."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = product()
    torch.cuda.synchronize()
    return format_bytes(torch.cuda.max_memory_allocated() - before - y.nbytes)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
