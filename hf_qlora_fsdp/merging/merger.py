"""One model of base and adapter, made without ever holding it.

    config.json -> a model on the meta device --+
    headers of the base -> recipes -------------+-> for each shard, for each tensor: read, merge, write
    adapter -> edits ---------------------------+

Everything is planned from names and shapes: which stored tensor is which parameter (`loading/recipes.py`), and what
happens to that parameter (`lora_math.py`). What cannot be merged rightly is refused before the first byte is written.
Then the tensors pass by one at a time and are written as they come (`shards.py`), so in memory are

    one tensor as it is stored + the same as it is written + blocks of 16 MiB + the matrices A and B of one layer

and never a shard, let alone the model. Of experts that are stored in one tensor, only that of the output is whole, and
those of the base come one at a time. Tensors that nothing happens to keep their bytes.

**Which base?** QLoRA trains an adapter against weights that were rounded to 4 bits. Two bases are therefore right, each
in its own way:

* `"original"`: the 16-bit weights, without that rounding. A model that was never evaluated in training.
* `"trained"`: the weights rounded to 4 bits and back, exactly those that the adapter saw. The merged model answers as
  the trained one did. Only what was quantised in training is rounded: never embeddings, head or norms.

How near each is to the trained model is in `benchmarks/merge.csv`. There the original base answers fewer orders right,
since the adapter has learned to make up for a rounding that is gone; a longer run may come out otherwise.

**Tied weights** stay tied as long as both get the same. An adapter that changes the head alone, or the embedding alone,
unties them: both are written, and the config says so.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import QuantState, quantize_4bit
from tqdm.auto import tqdm
from transformers import AutoConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from ..files import hash_files
from ..loading.weights import Weights, find_weights
from ..lora_math import Part, apply_edit
from ..packing import PackedLayout, dequantize, pack, quantize
from ..quantization import QUANTIZATION_FILE, settle
from ..units import format_dtype
from .edits import Adapter
from .folder import ADAPTER_HUB, MergeFolder, fingerprint_checkpoint
from .plan import MergeOptions, MergePlan, Slot, read_stored_quantization
from .shards import ShardWriter, write_json

BASES = ("original", "trained")
_DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32")}
_STATE_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__xxx")


def merge_adapter(
    base: str,
    adapter: str,
    output: str | os.PathLike[str],
    *,
    base_weights: str = "original",
    dtype: str | torch.dtype | None = None,
    save_4bit: bool = False,
    quant_type: str | None = None,
    double_quant: bool | None = None,
    skip_modules: list[str] | None = None,
    compute_dtype: str | torch.dtype | None = None,
    progress: bool = True,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    **hub: Any,
) -> Path:
    """Merge a LoRA adapter into its base model and write the result, as a folder that `from_pretrained` loads.

    Peak memory: one tensor as read, the same as written, and its LoRA matrices (see the module docstring). Interrupted,
    it goes on with the first unfinished file when it is called again.

    Args:
        base (`str`): Hub id or folder of the base model, in 16 or 32 bits, or in 4 bits by bitsandbytes.
        adapter (`str`): Folder, checkpoint or Hub id of a PEFT adapter: LoRA, rsLoRA or DoRA.
        output (`str`): New folder, or that of an interrupted merge.
        base_weights (`str`): `"original"`, or `"trained"` for the 4-bit weights that the adapter was trained against.
        dtype (`str` or `torch.dtype`, *optional*): Of what is written. Defaults to that of each base tensor.
        save_4bit (`bool`): Write a checkpoint quantised by bitsandbytes.
        quant_type, double_quant, skip_modules, compute_dtype: How the base was quantised in training, and how a 4-bit
            output is; see `MergeOptions`. Adapters that this package has written say it themselves (`quantization.py`),
            and a base stored in 4 bits brings all of it but `compute_dtype`. Default to NF4 with double quantisation.
        progress (`bool`): Show a progress bar.
        device (`str`, *optional*): Where to compute. Defaults to a GPU if there is one.
        trust_remote_code (`bool`): Whether code from the model's repository may run.
        **hub: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder` as in `from_pretrained`.
    Returns:
        `Path`: The folder.
    Raises:
        ValueError: The adapter or the base cannot be merged rightly, adapter, base and arguments contradict each other
            in how the base was quantised, or the folder is somebody else's. Says why.
    """
    if base_weights not in BASES:
        raise ValueError(f"base_weights={base_weights!r} is neither of the two bases there are. Write one of {BASES}.")
    written_dtype, computed = _parse_dtype("dtype", dtype), _parse_dtype("compute_dtype", compute_dtype)
    delta = Adapter(str(adapter), **{name: hub[name] for name in ADAPTER_HUB if name in hub})
    config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code, **hub)
    said = {"quant_type": quant_type, "double_quant": double_quant, "skip_modules": skip_modules}
    sources = {
        f"{QUANTIZATION_FILE} in {delta.source!r}": delta.quantization,
        f"config.json of {base!r}": read_stored_quantization(config),
    }
    trained = base_weights == "trained"
    quantized = _settle_quantization(said | {"compute_dtype": _as_json(computed)}, sources, trained)
    options = MergeOptions(trained=trained, dtype=written_dtype, save_4bit=save_4bit, **quantized)
    config_file, files = str(cached_file(base, "config.json", **hub)), find_weights(base, **hub)
    plan = MergePlan(config, Weights(files), delta, options, trust_remote_code)
    identity = {
        "base": fingerprint_checkpoint(config_file, files),
        "adapter": hash_files(str(delta.config_file), str(delta.file)),
        "options": {name: _as_json(value) for name, value in vars(options).items()},
    }
    folder = MergeFolder(output, identity)
    _Stream(plan, torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))).run(folder, progress)
    folder.copy_companions(base, str(adapter), config_file, hub)
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
    folder.complete(_output_config(json.loads(Path(config_file).read_text()), plan), versions)
    return folder.path


def _settle_quantization(said: dict[str, Any], sources: dict[str, dict[str, Any]], trained: bool) -> dict[str, Any]:
    """Return how the base is quantised, by the names in `MergeOptions`, see `quantization.settle`."""
    settled = settle(said, sources, trained)
    skipped, computed = settled["skip_modules"], settled["compute_dtype"]
    return settled | {
        "skip_modules": None if skipped is None else tuple(skipped),
        "compute_dtype": _parse_dtype("compute_dtype", computed) or torch.bfloat16,
    }


class _Stream:
    """The doing: tensors pass by one at a time, each file of the base becomes one of the output."""

    def __init__(self, plan: MergePlan, device: torch.device) -> None:
        self.plan, self.weights, self.options = plan, plan.weights, plan.options
        self.device = device
        # The factors of all experts of a layer lie together, gate and up's and down's, and each tensor needs some.
        self._read_factor = functools.lru_cache(maxsize=4)(plan.adapter.read)
        # Stored scales go into the weight that is made with them, unless its codes are written as they are.
        kept = {name for slot in plan.slots.values() if self._keeps_codes(slot) for name in slot.scales.values()}
        self.consumed_scales = plan.scales - kept

    def run(self, folder: MergeFolder, progress: bool) -> None:
        files = self.plan.files()
        num_files, total_bytes = len(files), 0
        weight_map: dict[str, str] = {}
        with tqdm(total=self.weights.num_bytes, unit="B", unit_scale=True, desc="Merging", disable=not progress) as bar:
            for number, file in enumerate(sorted(files), 1):
                name = SAFE_WEIGHTS_NAME if num_files == 1 else f"model-{number:05d}-of-{num_files:05d}.safetensors"
                bar.set_postfix_str(name)
                if not folder.is_finished(name):
                    self._write_file(folder.path / name, files[file], bar)
                    folder.mark_finished(name)
                else:
                    bar.update(sum(self._num_bytes(stored) for stored in files[file]))
                written = Weights([str(folder.path / name)])
                weight_map |= dict.fromkeys(written.tensors, name)
                total_bytes += written.num_bytes
        if num_files > 1:
            index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(folder.path / SAFE_WEIGHTS_INDEX_NAME, index)

    def _write_file(self, path: Path, names: list[str], bar: tqdm) -> None:
        ordered = [name for _, name in sorted((self._position(name), name) for name in names)]
        possible = [f"{name}.{part}" for name in names if self._is_quantized(name) for part in _STATE_PARTS]
        with ShardWriter(path, [*names, *possible]) as writer:
            for name in ordered:
                for written, tensor in self._make(name):
                    writer.add(written, tensor)
                    del tensor  # or it would be there until the next one is made
                bar.update(self._num_bytes(name))

    def _position(self, name: str) -> tuple[int, int]:
        """Put newly quantised weights, whose parts are aligned among themselves, first, then the wide before the "
        "narrow."""
        if self._is_quantized(name):
            return 0, 0
        slot = self.plan.slots.get(name)
        dtype = slot.dtype if slot and not self._keeps_codes(slot) else self.plan.dtypes[name]
        return 1, -dtype.itemsize

    def _num_bytes(self, name: str) -> int:
        stored = self.weights.tensors.get(name)
        return stored.num_bytes if stored else 0

    def _is_quantized(self, name: str) -> bool:
        """Return whether the merge quantises this tensor."""
        slot = self.plan.slots.get(name)
        if slot is None or slot.layout is None or self._keeps_codes(slot):
            return False
        return self.options.save_4bit and (not slot.is_expert or bool(slot.scales))

    def _keeps_codes(self, slot: Slot) -> bool:
        """Return whether a tensor that is stored in 4 bits is written as it is."""
        return bool(slot.scales and self.options.save_4bit and not slot.edit)

    def _make(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what becomes of one stored tensor: itself, merged, or the several parts of a quantised one, or "
        "nothing."""
        slot = self.plan.slots.get(name)
        if slot is None:
            if name not in self.consumed_scales:
                yield name, self.weights.read(name)
        elif self._keeps_codes(slot):
            yield name, self.weights.read(name)
        elif self._is_quantized(name):
            assert slot.layout is not None
            # Untouched, a weight keeps the codes that it had in training: they are made of the original once more.
            merged = self._merge(slot) if slot.edit else self.weights.read(slot.source)
            merged = merged.to(self.device, slot.dtype if slot.edit else self.options.compute_dtype)
            yield from _quantize(name, _oriented(merged, slot), slot.layout)
        else:
            yield name, self._merge(slot)

    def _merge(self, slot: Slot) -> torch.Tensor:
        if not slot.is_stack:
            return self._merge_part(slot, slot.part)
        shape = self.weights.tensors[slot.source].shape
        merged = torch.empty(shape, dtype=slot.dtype)
        for expert in range(shape[0]):
            merged[expert] = self._merge_part(slot, Part(expert))
        return merged

    def _merge_part(self, slot: Slot, part: Part | None) -> torch.Tensor:
        """Merge a tensor, or of a stack the matrix of one expert."""
        replaced = slot.edit is not None and slot.edit.replaced_by is not None
        base = None if replaced else self._read_base(slot, part)
        if slot.edit is None:
            assert base is not None
            return base.to(slot.dtype)
        read = self._read_factor if slot.edit.num_experts else self.plan.adapter.read
        return apply_edit(slot.edit, base, read, slot.dtype, self.device, part)

    def _read_base(self, slot: Slot, part: Part | None) -> torch.Tensor:
        """Return the weight that the adapter's changes are added to: as stored, or rounded to 4 bits and back."""
        if slot.is_stack and part is not None:
            stored = self.weights.read_row(slot.source, part.expert)
        else:
            stored = self.weights.read(slot.source)
        if slot.layout is None or not self.options.trained:
            return stored
        compute_dtype = self.options.compute_dtype
        if slot.scales:
            scales = {role: self.weights.read(name) for role, name in slot.scales.items()}
            state = QuantState.from_dict(scales, device=self.device)
            layout = PackedLayout(slot.layout.shape, state.quant_type, state.nested, state.blocksize)
            packed = pack(stored.to(self.device), state, layout, torch.uint8)
            return _oriented(dequantize(packed, layout, compute_dtype), slot).cpu()
        weight = _oriented(stored.to(self.device, compute_dtype), slot)
        pieces = [  # of an expert's gate and up in one, each was quantised for itself
            dequantize(quantize(piece, slot.layout, torch.uint8), slot.layout, compute_dtype)
            for piece in weight.reshape(-1, *slot.layout.shape)
        ]
        return _oriented(torch.cat(pieces), slot).cpu()


def _oriented(weight: torch.Tensor, slot: Slot) -> torch.Tensor:
    """Turn a weight of Conv1D, which is stored as `[K, N]` and quantised as `[N, K]`, there or back."""
    return weight.t() if slot.turned else weight


def _quantize(name: str, weight: torch.Tensor, layout: PackedLayout) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that bitsandbytes stores for a 4-bit weight, the wide before the narrow.

    The JSON among them comes last, padded with spaces so that what follows is aligned.
    """
    codes, state = quantize_4bit(
        weight.contiguous(),
        blocksize=layout.blocksize,
        compress_statistics=layout.double_quant,
        quant_type=layout.quant_type,
    )
    parts = {f"{name}.{role}": part for role, part in state.as_dict(packed=True).items()} | {name: codes}
    described = next(part for part in parts if ".quant_state." in part)
    words = parts.pop(described)
    yield from sorted(parts.items(), key=lambda item: -item[1].element_size())
    num_bytes = sum(part.nbytes for part in parts.values()) + words.nbytes
    yield described, torch.nn.functional.pad(words, (0, -num_bytes % 8), value=ord(" "))


def _output_config(config: dict[str, Any], plan: MergePlan) -> dict[str, Any]:
    """Return config.json of the merged model: the base's, but for dtype, quantisation and ties."""
    options = plan.options
    config.pop("_pre_quantization_dtype", None)
    nested = [value for value in config.values() if isinstance(value, dict) and "model_type" in value]
    if not options.save_4bit:
        config.pop("quantization_config", None)
    elif not plan.pre_quantized:
        assert plan.quantization is not None
        config["quantization_config"] = plan.quantization.to_dict()
    dtype = options.dtype or (None if "dtype" in config or "torch_dtype" in config else _main_dtype(plan))
    for part in [config, *nested] if dtype else []:
        part.pop("torch_dtype", None)
        part["dtype"] = format_dtype(dtype)
    if plan.untied:
        for part in [config, *(part for part in nested if "tie_word_embeddings" in part)]:
            part["tie_word_embeddings"] = False
    return config


def _main_dtype(plan: MergePlan) -> torch.dtype:
    """Return the dtype of most of what is written, for a config that does not say."""
    num_bytes: dict[torch.dtype, int] = {}
    for slot in plan.slots.values():
        if slot.dtype.is_floating_point:
            num_bytes[slot.dtype] = num_bytes.get(slot.dtype, 0) + plan.weights.tensors[slot.source].num_bytes
    return max(num_bytes, key=lambda dtype: num_bytes[dtype])


def _parse_dtype(option: str, dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or dtype in _DTYPES.values():
        return dtype  # type: ignore[return-value]
    if dtype not in _DTYPES:
        raise ValueError(f"{option}={dtype!r} is no dtype that weights are merged to. Write one of {sorted(_DTYPES)}.")
    return _DTYPES[str(dtype)]


def _as_json(value: object) -> object:
    return format_dtype(value) if isinstance(value, torch.dtype) else list(value) if isinstance(value, tuple) else value
