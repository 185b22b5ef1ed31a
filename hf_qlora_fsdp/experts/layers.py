"""Layers of experts in 4 bits.

transformers keeps the experts of a layer in two parameters of three dimensions, `gate_up_proj` and `down_proj`, in
which bitsandbytes sees no linear layer: a "4-bit" Mixtral-8x7B carries 84 GiB of experts in 16 bits. `Experts4bit`
takes the place of such a module. Every expert's matrices are packed (`stacks.py`), one buffer a projection,
which FSDP shards and gathers with the layer they are in.

    rows      each token goes to its k experts: T k rows, sorted by expert
    product   what adapters put out, and to it, for a few experts at a time: dequantise, multiply, add, forget
              of gate and up first, and of down after the activation
    sum       the k results of a token, weighted by its router

What a module computes beside its products is its own business and differs between families, so the module that was
replaced stays, without its weights, as `gating`: it holds the activation (Mixtral's SiLU of one half times the other,
gpt-oss' clamped one of interleaved columns), and its own description (`is_transposed`, `has_bias`) says the rest.

**Memory.** Experts that have rows are dequantised, a chunk at a time, and the 16-bit weights of a chunk are gone before
those of the next are made. A chunk has experts without rows only between others, where it is one launch. (Where all
experts are one chunk, all are dequantised: no device has to tell the host which ones have rows.) Neither they nor the
packed ones are saved for the backward, which fetches the packed weights from the module again: FSDP has gathered them
anew by then. Beside the activations, which are those of any implementation (the T k rows of both products), a forward
or backward takes at most

    max(chunk_bytes, N K b) (1 + 4 / (64 b))    bytes,

with N K the larger projection of one expert, b the bytes of the compute dtype, and 64 weights a block, whose scale is
unpacked to 4 bytes where there is no Triton. (`grouped_mm` makes the result of a chunk before it is put in its place.)
Mixtral-8x7B: 264 MiB with the default chunk, where a whole layer would be 2.6 GiB.

Shape suffixes: T tokens, k experts a token, S = T k rows, E experts, H columns of the model, N and K the rows and
columns of a matrix as it is stored.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers.activations import ACT2FN

from ..kernels.silu_product import SiluOfHalves
from ..packing import PackedLayout, quantize
from ..units import format_bytes
from .grouping import Groups, Reordered, RowsOfTokens, multiply_groups, runs_grouped_mm
from .stacks import StackLayout, dequantize_pieces, insert_piece

PROJECTIONS = ("gate_up_proj", "down_proj")
CHUNK_BYTES = 1 << 28
"""16-bit weights at a time: one expert of Mixtral-8x7B, 42 of Qwen3-30B-A3B's 128."""


class Adapter(Protocol):
    """What is added to one of the products, such as a `lora.ParamWrapper`."""

    parameter_name: str

    def delta(self, x_SK: torch.Tensor, groups: Groups) -> torch.Tensor | None:
        """Return what is added, `[S, N]`, for the rows that went into the product."""


class Experts4bit(nn.Module):
    """The experts of one layer, their weights packed.

    Args:
        experts (`nn.Module`): The module to replace, on any device, such as transformers' `MixtralExperts`. Its weights
            are taken away from it; what is left of it becomes a part of this module. The packed weights are on the meta
            device until they are set, as `pack_experts` does.
        quant_type (`str`): `"nf4"` or `"fp4"`.
        double_quant (`bool`): Whether the block scales are quantised to 8 bits themselves.
        blocksize (`int`): Weights that share one scale.
        compute_dtype (`torch.dtype`): Dtype of the products.
        storage_dtype (`torch.dtype`): Dtype the packed buffers are viewed in.
        chunk_bytes (`int`): Dequantised weights at a time. At least those of one expert are.
    Raises:
        ValueError: The module is none of these, or computes something else.
    """

    def __init__(
        self,
        experts: nn.Module,
        *,
        quant_type: str = "nf4",
        double_quant: bool = True,
        blocksize: int = 64,
        compute_dtype: torch.dtype,
        storage_dtype: torch.dtype,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        super().__init__()
        check_supported(experts)
        self.gating: Any = experts
        self.compute_dtype = compute_dtype
        self.chunk_bytes = chunk_bytes
        self.is_transposed = bool(experts.is_transposed)  # PEFT asks for it
        self.shapes: dict[str, tuple[int, int, int]] = {}
        self.layouts: dict[str, StackLayout] = {}
        for name, weight in list(experts.named_parameters(recurse=False)):
            del experts._parameters[name]
            if name not in PROJECTIONS:
                self.register_parameter(name, nn.Parameter(weight.detach().to(compute_dtype), requires_grad=False))
                continue
            num_experts, rows, columns = weight.shape
            num_parts = self.num_parts(name)
            piece = PackedLayout((rows // num_parts, columns), quant_type, double_quant, blocksize)
            self.shapes[name] = (num_experts, rows, columns)
            self.layouts[name] = StackLayout(piece, num_experts * num_parts)
            packed_shape = self.layouts[name].packed_shape(storage_dtype)
            self.set_packed(name, torch.empty(packed_shape, dtype=storage_dtype, device="meta"))
        self.num_experts = self.shapes["down_proj"][0]

    def num_parts(self, name: str) -> int:
        """Return in how many pieces an expert's matrix is packed: gate and up are two where one is above the other."""
        return 2 if name == "gate_up_proj" and self.gating.is_concatenated and not self.is_transposed else 1

    def set_packed(self, name: str, packed: torch.Tensor) -> None:
        """Make `packed` `[M, 1]` the weight of a projection."""
        self.register_parameter(name, nn.Parameter(packed, requires_grad=False))

    def quantize(
        self, name: str, matrices: Iterable[torch.Tensor], storage_dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Return the stack `[M, 1]` of a projection, made of one matrix after the other.

        Args:
            name (`str`): Which projection.
            matrices (`Iterable`): `[N, K]` for each expert, in any dtype and on any device.
            storage_dtype (`torch.dtype`): Dtype the stack is viewed in.
            device (`torch.device`): Where they are quantised, and where the stack lies.
        """
        layout, parts = self.layouts[name], self.num_parts(name)
        stack = torch.zeros(layout.packed_shape(storage_dtype), dtype=storage_dtype, device=device)
        for expert, w_NK in enumerate(matrices):
            pieces = w_NK.to(device, self.compute_dtype).reshape(parts, *layout.piece.shape)
            for part, piece in enumerate(pieces):
                insert_piece(stack, expert * parts + part, quantize(piece, layout.piece, storage_dtype), layout)
        return stack

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        adapters: Sequence[Adapter] = (),
    ) -> torch.Tensor:
        """Return `[T, H]`.

        Args:
            hidden_states (`torch.Tensor`): Tokens `[T, H]`.
            top_k_index (`torch.Tensor`): Experts of each token `[T, k]`.
            top_k_weights (`torch.Tensor`): Their weights `[T, k]`.
            adapters (`Sequence`): What is added to the products.
        """
        num_tokens, top_k = top_k_index.shape
        expert_of_row, order = top_k_index.reshape(-1).sort(stable=True)
        fused = self.is_fused and runs_grouped_mm(hidden_states.device, self.compute_dtype)
        groups = Groups.count(expert_of_row, self.num_experts, fused)
        place_of_row = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        x = RowsOfTokens.apply(hidden_states.to(self.compute_dtype), order, place_of_row, top_k)
        for name in PROJECTIONS:
            y = None
            for adapter in adapters:
                delta = adapter.delta(x, groups) if adapter.parameter_name == name else None
                if delta is not None:
                    y = delta if y is None else y.add_(delta)
            y = _PackedProduct.apply(x, self, name, groups, y)
            bias = getattr(self, f"{name}_bias", None)
            if bias is not None:
                y = y.add_(bias.to(y.dtype)[expert_of_row])  # in place: y is the largest activation, and nobody's input
            x = self._gate(y) if name == "gate_up_proj" else y
        weights = Reordered.apply(top_k_weights.reshape(-1, 1), order, place_of_row)
        weighted = Reordered.apply(x * weights, place_of_row, order)
        return weighted.view(num_tokens, top_k, x.shape[1]).sum(1).to(hidden_states.dtype)

    def _gate(self, y: torch.Tensor) -> torch.Tensor:
        """Return what lies between the two products: by one kernel where it is silu(gate) * up."""
        if self.is_swiglu:
            return SiluOfHalves.apply(y)
        return self.gating._apply_gate(y)

    @functools.cached_property
    def is_swiglu(self) -> bool:
        """Whether the module that was replaced computes silu(gate) * up, of halves of columns.

        Source:
            `_default_apply_gate` (transformers/integrations/moe.py)
        """
        computes = getattr(type(self.gating)._apply_gate, "__name__", None) == "_default_apply_gate"
        return computes and isinstance(getattr(self.gating, "act_fn", None), (nn.SiLU, type(ACT2FN["silu"])))

    def dequantize(self, name: str, start: int = 0, stop: int | None = None, dtype: Any = None) -> torch.Tensor:
        """Return the matrices `[E, N, K]` of a projection. Its weight must be gathered, not a shard.

        Args:
            name (`str`): `"gate_up_proj"` or `"down_proj"`.
            start (`int`), stop (`int`, *optional*): Of which experts.
            dtype (`torch.dtype`, *optional*): Of the result, by default the compute dtype.
        """
        num_experts, rows, columns = self.shapes[name]
        stop, parts = num_experts if stop is None else stop, self.num_parts(name)
        pieces = dequantize_pieces(
            getattr(self, name), start * parts, stop * parts, self.layouts[name], dtype or self.compute_dtype
        )
        return pieces.view(stop - start, rows, columns)

    def multiply(
        self, name: str, x_SK: torch.Tensor, groups: Groups, transposed: bool, onto: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return each row times the matrix of its expert, or times its transpose. Not differentiable.

        Args:
            name (`str`): Which projection.
            x_SK (`torch.Tensor`): The rows, sorted by expert.
            groups (`Groups`): Which rows belong to which expert.
            transposed (`bool`): Whether to multiply by the stored matrix transposed, `x W.T`, or as it is, `x W`.
            onto (`torch.Tensor`, *optional*): What the product is added to, in place.
        """
        _, rows, columns = self.shapes[name]
        longest = max(1, self.chunk_bytes // (rows * columns * x_SK.dtype.itemsize))
        out = onto
        for start, stop in groups.runs(longest):
            w = self.dequantize(name, start, stop, x_SK.dtype)
            if out is None and stop - start < self.num_experts:
                out = x_SK.new_empty(len(x_SK), rows if transposed else columns)
            matrices = w.transpose(1, 2) if transposed else w
            out = multiply_groups(x_SK, matrices, groups, start, out, add=onto is not None)
            del w, matrices  # or it would be there until the next one is made
        return x_SK.new_empty(0, rows if transposed else columns) if out is None else out

    @property
    def is_fused(self) -> bool:
        """Whether products of groups are wanted (`experts_implementation="grouped_mm"`, upstream's default).

        Every other choice computes the same in a loop: `"eager"` by its name, and `"batched_mm"`, which `generate`
        switches to, because it would copy the weights of an expert for each of its tokens.
        """
        return getattr(getattr(self.gating, "config", None), "_experts_implementation", None) == "grouped_mm"

    def extra_repr(self) -> str:
        piece = self.layouts["down_proj"].piece
        shapes = ", ".join(f"{name}={list(shape)}" for name, shape in self.shapes.items())
        return f"{shapes}, {piece.quant_type}, double_quant={piece.double_quant}"


class _PackedProduct(torch.autograd.Function):
    """y = delta + x @ dequantize(w) for the rows of every expert, in the place of delta, if there is one.

    Remembers neither w nor x: see `packed_linear._PackedLinear`.
    """

    @staticmethod
    def forward(
        ctx, x_SK: torch.Tensor, experts: Experts4bit, name: str, groups: Groups, delta_SN: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.experts, ctx.name, ctx.groups = experts, name, groups
        if delta_SN is not None:
            ctx.mark_dirty(delta_SN)
        return experts.multiply(name, x_SK, groups, not experts.is_transposed, delta_SN)

    @staticmethod
    def backward(ctx, grad_SN: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, torch.Tensor | None]:
        experts: Experts4bit = ctx.experts
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = experts.multiply(ctx.name, grad_SN, ctx.groups, experts.is_transposed)
        return grad_x, None, None, None, grad_SN if ctx.needs_input_grad[4] else None


def fused_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a model that hold experts in parameters of their own, with their names.

    Such parameters have three dimensions, or two where experts lie one above the other, as those of DBRX.
    """
    for name, module in model.named_modules():
        if isinstance(module, Experts4bit | nn.Linear | nn.Embedding):
            continue
        parameters = dict(module.named_parameters(recurse=False))
        if any(
            (weight.ndim >= 3 and "expert" in f"{name}.{leaf}") or (weight.ndim == 2 and "expert" in name)
            for leaf, weight in parameters.items()
        ):
            yield name, module


def linear_routers(model: nn.Module, experts: Iterable[str]) -> Iterator[str]:
    """Yield the names of linear layers that choose experts: a `router` or `gate` beside them, or what is in one.

    Most families have a module of another kind there, which nobody takes for a linear layer.

    Args:
        model (`nn.Module`): The model.
        experts (`Iterable[str]`): Names of its modules of experts.
    """
    for name in experts:
        block = name.rpartition(".")[0]
        for path, module in model.get_submodule(block).named_modules():
            if isinstance(module, nn.Linear) and {"router", "gate"} & set(path.split(".")):
                yield f"{block}.{path}"


def check_supported(experts: nn.Module) -> None:
    """Refuse a module of experts that `Experts4bit` cannot stand in for.

    Raises:
        ValueError: Says what it has, and what it would take in 16 bits.
    """
    described: Any = experts
    known = {*PROJECTIONS, *(f"{name}_bias" for name in PROJECTIONS)}
    parameters = dict(experts.named_parameters(recurse=False))
    implementation = getattr(getattr(experts, "config", None), "_experts_implementation", None)
    obstacles = {
        "does not describe itself (`use_experts_implementation` of transformers)": not hasattr(
            experts, "is_concatenated"
        ),
        "has no gate": not getattr(described, "has_gate", True),
        "has a norm after each expert": getattr(described, "has_post_expert_norm", False),
        f"has other weights, {sorted(parameters.keys() - known)}": not known.issuperset(parameters),
        "lacks gate_up_proj or down_proj": not parameters.keys() >= set(PROJECTIONS),
        f"is run by {implementation!r}": implementation in ("deepgemm", "sonicmoe"),
    }
    found = [obstacle for obstacle, is_there in obstacles.items() if is_there]
    if found:
        num_bytes = sum(2 * parameter.numel() for parameter in parameters.values())
        raise ValueError(
            f"{type(experts).__name__} {' and '.join(found)}, so it cannot be held in 4 bits, and would take "
            f"{format_bytes(num_bytes)} in 16 bits, in every layer. Use a model with gated experts such as Mixtral, "
            "Qwen3-MoE or gpt-oss, and experts_implementation='grouped_mm' or 'eager'."
        )


def pack_experts(experts: nn.Module, **kwargs: Any) -> Experts4bit:
    """Quantise a module of experts that is in memory.

    Args:
        experts (`nn.Module`): The module, which is used up.
        **kwargs: As `Experts4bit` takes them.
    """
    weights = {name: weight.detach() for name, weight in experts.named_parameters(recurse=False)}
    packed_experts = Experts4bit(experts, **kwargs)
    for name in packed_experts.layouts:
        storage_dtype, w_ENK = getattr(packed_experts, name).dtype, weights[name]
        packed_experts.set_packed(name, packed_experts.quantize(name, w_ENK, storage_dtype, w_ENK.device))
    return packed_experts.train(experts.training)
