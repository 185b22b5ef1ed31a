"""Where the time of one decoder layer goes: dequantising, products, the adapter, and Python.

Builds one Llama layer of a given shape in 4 bits, with LoRA on all of its linear layers in the dtype in which FSDP
gathers them, and times its parts, fused and not, on one GPU. Two figures each, medians of 20:

    Python ms   until the call returns: what the GPU waits for when it has nothing else to do
    GPU ms      what the GPU needs when the kernels are queued already, so that it waits for nobody

A step of a layer takes about the larger of the two.

    python benchmarks/layer_profile.py --shape llama-2-70b --batch 2
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from hf_qlora_fsdp import packed_linear, packing
from hf_qlora_fsdp.packed_linear import PackedLinear4bit
from hf_qlora_fsdp.packing import PackedLayout
from hf_qlora_fsdp.speed.fusion import FusedMLP, fuse_lora

SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
SHAPES = {
    "tiny": (128, 256, 4, 2),
    "llama-3-8b": (4096, 14336, 32, 8),
    "llama-2-70b": (8192, 28672, 64, 8),
}
NUM_REPEATS = 20
DTYPE = torch.bfloat16


def main() -> None:
    """Time the parts of a layer, then the layer in each of its forms."""
    options = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layer, x, position_embeddings = make_layer(options, device)
    bases = [module for module in layer.modules() if isinstance(module, PackedLinear4bit)]
    rows: list[tuple[str, tuple[float, float]]] = []

    def dequantize_all(function: Callable) -> Callable[[], None]:
        def run() -> None:
            for base in bases:
                function(base.weight, base.layout, DTYPE)

        return run

    def record(label: str, function: Callable[[], object]) -> None:
        rows.append((label, measure(function, device)))

    def forward() -> torch.Tensor:
        return layer(x, position_embeddings=position_embeddings)

    def forward_and_backward() -> None:
        torch.autograd.grad(forward(), trained, grad)

    trained = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    grad = torch.randn_like(forward())
    record("dequantise, bitsandbytes", dequantize_all(packing.dequantize_in_parts))
    record("dequantise, packing.dequantize", dequantize_all(packing.dequantize))
    record("products alone, forward", multiply_alone(x, [base.dequantize() for base in bases]))

    in_one = packed_linear.dequantize
    for label, prepare in (
        ("PEFT, bitsandbytes", lambda: setattr(packed_linear, "dequantize", packing.dequantize_in_parts)),
        ("PEFT", lambda: setattr(packed_linear, "dequantize", in_one)),
        ("fused with its MLP", lambda: fuse_lora(layer)),
        ("fused layers", lambda: unfuse_mlps(layer)),
    ):
        prepare()
        with torch.no_grad():
            record(f"forward, {label}", forward)
        record(f"forward and backward, {label}", forward_and_backward)
        if device.type == "cuda":
            print(f"kept for the backward, {label}: {count_kept_bytes(forward) / 2**20:,.0f} MiB")
    print_table(options, device, rows)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--tiny", action="store_const", const="tiny", dest="shape", help="--shape tiny, for a CPU")
    parser.add_argument("--batch", type=int, default=2, help="rows of the batch")
    parser.add_argument("--seq", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapter")
    return parser.parse_args()


def make_layer(
    options: argparse.Namespace, device: torch.device
) -> tuple[nn.Module, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Return a decoder layer with an adapter, its input `[batch, seq, hidden]`, and its rotary embeddings."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **dict(zip(SIZES, SHAPES[options.shape], strict=True)), num_hidden_layers=1, attn_implementation="sdpa"
    )
    with torch.device("meta"):
        layer = LlamaDecoderLayer(config, 0)
    for name, linear in [pair for pair in layer.named_modules() if isinstance(pair[1], nn.Linear)]:
        parent, _, leaf = name.rpartition(".")
        layout = PackedLayout(tuple(linear.weight.shape))
        packed = PackedLinear4bit(layout, bias=False, compute_dtype=DTYPE, storage_dtype=DTYPE)
        packed.set_packed(packing.quantize(0.02 * torch.randn(layout.shape, device=device, dtype=DTYPE), layout, DTYPE))
        setattr(layer.get_submodule(parent), leaf, packed)
    for name, norm in list(layer.named_parameters()):
        if norm.is_meta:
            parent, _, leaf = name.rpartition(".")
            value = nn.Parameter(torch.ones_like(norm, device=device, dtype=DTYPE), requires_grad=False)
            setattr(layer.get_submodule(parent), leaf, value)
    layer.is_loaded_in_4bit = True
    inject_adapter_in_model(LoraConfig(r=options.rank, target_modules="all-linear", init_lora_weights=False), layer)
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(device, DTYPE)
    x = torch.randn(options.batch, options.seq, config.hidden_size, device=device, dtype=DTYPE, requires_grad=True)
    positions = torch.arange(options.seq, device=device).expand(options.batch, -1)
    return layer.train(), x, LlamaRotaryEmbedding(config).to(device)(x, positions)


def multiply_alone(x: torch.Tensor, weights: list[torch.Tensor]) -> Callable[[], None]:
    """Return a function that multiplies random inputs of as many tokens as x by 16-bit weights `[N, K]`."""
    pairs = [(torch.randn(*x.shape[:-1], weight.shape[1], device=x.device, dtype=DTYPE), weight) for weight in weights]

    def run() -> None:
        for pair in pairs:
            nn.functional.linear(*pair)

    return run


def unfuse_mlps(layer: nn.Module) -> None:
    """Leave the linear layers fused, and the MLP not."""
    for module in layer.modules():
        if isinstance(module.__dict__.get("forward"), FusedMLP):
            del module.forward


def measure(function: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Return the median milliseconds of Python and of the GPU; on a CPU they are one."""
    for _ in range(3):
        function()
    python, gpu = [], []
    for _ in range(NUM_REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        python.append(1e3 * (time.perf_counter() - started))
    if device.type != "cuda":
        return statistics.median(python), statistics.median(python)
    sleep_cycles = int(4e6 * (statistics.median(python) + 2))  # at most 2 GHz: twice as long as it takes to queue
    for _ in range(NUM_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(sleep_cycles)
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        gpu.append(start.elapsed_time(end))
    return statistics.median(python), statistics.median(gpu)


def count_kept_bytes(forward: Callable[[], torch.Tensor]) -> int:
    """Return how much more is allocated while the result of a forward is alive, less the result itself."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = forward()
    return torch.cuda.memory_allocated() - before - y.nbytes


def print_table(options: argparse.Namespace, device: torch.device, rows: list[tuple[str, tuple[float, float]]]) -> None:
    """Print one row a figure."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(
        f"one layer of {options.shape}, {options.batch} x {options.seq} tokens, r={options.rank}, {name}, "
        f"torch {torch.__version__}"
    )
    width = max(len(label) for label, _ in rows)
    print(f"{'':<{width}}  {'Python ms':>9}  {'GPU ms':>9}")
    for label, (python, gpu) in rows:
        print(f"{label:<{width}}  {python:9.3f}  {gpu:9.3f}")


if __name__ == "__main__":
    main()
