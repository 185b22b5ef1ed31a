"""An adapter as a list of edits: which tensor of it changes which parameter of the base, and how.

PEFT names its tensors after modules, `base_model.model.<module>.lora_A.weight`, and says in `adapter_config.json` what
they mean. Here both are read together, and an `Edit` of `lora_math.py` is planned for each parameter that changes, from
names and shapes alone. Whatever is no fixed change of a weight (routed, conditional or quantised adapters, several at a
time) is refused by its name, and so is what does not fit the model.

Parameters that are adapted for themselves (`target_parameters`), such as stacked experts, are named nowhere: PEFT wraps
their module once for each, so that `experts.lora_A.weight` belongs to the last of them that the module has, and
`experts.base_layer.lora_A.weight` to the one before it.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Container
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils.hub import cached_file

from ..loading.weights import Weights
from ..lora_math import Edit
from ..packed_linear import PackedLinear4bit
from ..quantization import QUANTIZATION_FILE, read_quantization

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."

_PART = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector(?:\.weight)?|token_adapter\.trainable_tokens_delta)$"
)

_INITIALISATIONS_THAT_KEEP_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")

_NOT_ONE_MATRIX = {
    "layer_replication": "repeats decoder layers, so the merged model would have another config",
    "alora_invocation_tokens": "is switched on by tokens of the input",
    "arrow_config": "is one of several that a router chooses from",
    "use_bdlora": "has block-diagonal matrices",
    "use_qalora": "pools its input before the low-rank product",
    "kasa_config": "truncates the singular values of its base",
    "monteclora_config": "draws its weights from a distribution",
    "megatron_config": "is cut for Megatron's parallel layers",
}


class Adapter:
    """A PEFT adapter in a folder or on the Hub: its config, how its base was quantised if that was written down, and
    its tensors, read one at a time.

    Args:
        source (`str`): Folder or Hub id.
        **hub: `token`, `cache_dir`, `local_files_only`.
    Raises:
        ValueError: It is no LoRA adapter with safetensors, or it is damaged. Says what it is instead.
    """

    def __init__(self, source: str, **hub: Any) -> None:
        self.source = source
        if not os.path.isdir(source) and (os.path.isabs(source) or source.count("/") != 1):
            raise ValueError(
                f"adapter={source!r} is no folder, and no name on the Hub either. Pass the folder that holds "
                f"{ADAPTER_CONFIG}, or a name such as 'user/adapter'."
            )
        quiet = {"_raise_exceptions_for_missing_entries": False, **hub}
        self.config_file = cached_file(source, ADAPTER_CONFIG, **quiet)
        if self.config_file is None:
            raise ValueError(_describe_folder(source))
        self.config = _read_config(self.config_file)
        self.file = cached_file(source, ADAPTER_WEIGHTS, **quiet)
        if self.file is None:
            raise ValueError(
                f"{source!r} has an {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}. Pickled adapters (.bin) are not "
                "opened, since a pickle can run code. Save it again with a current PEFT, which writes safetensors."
            )
        self.weights = Weights([self.file])
        recorded = cached_file(source, QUANTIZATION_FILE, **quiet)
        self.quantization: dict[str, Any] = read_quantization(recorded) if recorded else {}
        if not self.weights.tensors:
            raise ValueError(
                f"{self.file!r} holds no tensors, so merging it would change nothing: whatever wrote it did not find "
                "its trained weights. Take an earlier checkpoint, or train again."
            )

    def read(self, name: str) -> torch.Tensor:
        return self.weights.read(name)

    def trained_names(self) -> list[str]:
        """Return the tensors that training changed: all but the copies that PEFT keeps of targeted embeddings."""
        return [name for name in self.weights.tensors if _is_factor(name) or ".base_layer." not in name]

    def plan_edits(self, model: nn.Module, shape_of: Callable[[str], tuple[int, ...]]) -> dict[str, Edit]:
        """Work out what happens to which parameter.

        Args:
            model (`nn.Module`): The base model, on the meta device.
            shape_of (`Callable`): Returns the 16-bit shape of one of its parameters.
        Raises:
            ValueError: A tensor has no place in the model, or has another shape than the config or the model says.
        """
        refuse_unmergeable(self.config, self.source)
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        parts: dict[str, dict[str, str]] = {}
        edits: dict[str, Edit] = {}
        for name in self.weights.tensors:
            match = _PART.match(name.removeprefix(_PREFIX))
            if match:
                parts.setdefault(match["module"], {})[match["part"].removesuffix(".weight")] = name
                continue
            target = name.removeprefix(_PREFIX).replace(".base_layer.", ".")
            _check_place(target in parameters, name, self.source, type(model).__name__)
            edits[target] = Edit(target, shape_of(target), replaced_by=name)
        for wrapped, found in parts.items():
            module_name = wrapped.replace(".base_layer", "")
            target, is_parameter = self._locate(model, module_name, wrapped, parts)
            _check_place(target in parameters, next(iter(found.values())), self.source, type(model).__name__)
            edit = edits.get(target, Edit(target, shape_of(target)))
            plan = self._plan_parameter if is_parameter else self._plan_module
            edits[target] = edit = plan(module_name, model.get_submodule(module_name), found, edit)
            if "lora_B.bias" in found:
                target = f"{module_name}.bias"
                _check_place(target in parameters, found["lora_B.bias"], self.source, type(model).__name__)
                bias = edits.get(target, Edit(target, shape_of(target)))
                edits[target] = replace(bias, added=found["lora_B.bias"], scaling=edit.scaling)
        for edit in edits.values():
            self._check_shapes(edit)
        return edits

    def scaling(self, name: str) -> tuple[int, float]:
        """Return rank and scaling of a module, or of one of `target_parameters`, by PEFT's own rule for patterns."""
        ranks, alphas = self.config.rank_pattern or {}, self.config.alpha_pattern or {}
        r = ranks.get(get_pattern_key(ranks, name), self.config.r)
        alpha = alphas.get(get_pattern_key(alphas, name), self.config.lora_alpha)
        return r, alpha / (math.sqrt(r) if self.config.use_rslora else r)

    def _locate(self, model: nn.Module, module: str, wrapped: str, parts: Container[str]) -> tuple[str, bool]:
        """Return what the factors of a wrapper belong to, and whether it is a parameter of `target_parameters`.

        Source:
            `_inject_parameters` (peft/tuners/tuners_utils.py)
        """
        names = [
            name for name, _ in dict(model.named_modules()).get(module, nn.Module()).named_parameters(recurse=False)
        ]
        wanted = tuple(f".{target}" for target in self.config.target_parameters or ())
        targets = [f"{module}.{name}" for name in names if f".{module}.{name}".endswith(wanted)]
        if not targets:
            return f"{module}.weight", False
        depth = wrapped.count(".base_layer")
        _check_place(depth < len(targets), f"{wrapped}.lora_A.weight", self.source, type(model).__name__)
        if any(f"{module}{'.base_layer' * index}" not in parts for index in range(len(targets))):
            raise ValueError(
                f"The adapter in {self.source!r} was trained on {targets}, one pair of matrices for each, and some are "
                "missing, so it is unknown whose the others are. The file is incomplete; take an earlier checkpoint."
            )
        return targets[-1 - depth], True

    def _plan_parameter(self, name: str, module: nn.Module, found: dict[str, str], edit: Edit) -> Edit:
        self._check_pair(name, found, "lora_A", "lora_B")
        r, scaling = self.scaling(edit.target)
        edit = replace(edit, left=found["lora_B"], right=found["lora_A"], r=r, scaling=scaling)
        if len(edit.shape) == 2:
            return edit
        return replace(edit, num_experts=edit.shape[0], transposed=bool(getattr(module, "is_transposed", False)))

    def _check_pair(self, name: str, found: dict[str, str], right: str, left: str) -> None:
        if (right in found) != (left in found) or ("lora_magnitude_vector" in found and left not in found):
            raise ValueError(
                f"The adapter in {self.source!r} has {sorted(found.values())} for {name!r}, and one of the two "
                "matrices is missing, so their product is unknown. The file is incomplete; take an earlier checkpoint."
            )

    def _plan_module(self, name: str, module: nn.Module, found: dict[str, str], edit: Edit) -> Edit:
        if "token_adapter.trainable_tokens_delta" in found:
            rows = tuple(_token_indices(self.config, name))
            edit = replace(edit, row_values=found["token_adapter.trainable_tokens_delta"], rows=rows)
        is_embedding = "lora_embedding_A" in found or "lora_embedding_B" in found
        right, left = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A", "lora_B")
        self._check_pair(name, found, right, left)
        if left not in found:
            return edit
        if ("lora_magnitude_vector" in found) != bool(self.config.use_dora):
            raise ValueError(
                f"The adapter in {self.source!r} says use_dora={self.config.use_dora}, but its tensors for {name!r} "
                f"are {sorted(found.values())}. Config and weights do not belong together; take both from one run."
            )
        source_cls = (
            getattr(module, "source_cls", type(module)) if isinstance(module, PackedLinear4bit) else type(module)
        )
        r, scaling = self.scaling(name)
        return replace(
            edit,
            left=found[left],
            right=found[right],
            r=r,
            scaling=scaling,
            magnitude=found.get("lora_magnitude_vector"),
            transposed=is_embedding or issubclass(source_cls, Conv1D),
        )

    def _check_shapes(self, edit: Edit) -> None:
        stored, shape = self.weights.tensors, edit.shape
        if edit.replaced_by and stored[edit.replaced_by].shape != shape:
            raise ValueError(
                f"{edit.replaced_by!r} in {self.source!r} has shape {list(stored[edit.replaced_by].shape)}, but the "
                f"base's {edit.target!r} has {list(shape)}. If the vocabulary was resized for training, call "
                "resize_token_embeddings on the base, save it, and merge onto that."
            )
        wanted: dict[str, tuple[int, ...]] = {}
        if edit.left and edit.right:
            rows, columns = shape[:-3:-1] if edit.transposed else shape[-2:]
            width = edit.r * (edit.num_experts or 1)
            wanted = {edit.left: (rows, width), edit.right: (width, columns)}
            wanted |= {edit.magnitude: (rows,)} if edit.magnitude else {}
        if edit.added:
            wanted[edit.added] = shape
        if edit.row_values:
            wanted[edit.row_values] = (len(edit.rows), *shape[1:])
        for name, expected in wanted.items():
            if stored[name].shape != expected:
                raise ValueError(
                    f"{name!r} in {self.source!r} has shape {list(stored[name].shape)}, but {ADAPTER_CONFIG} and the "
                    f"base's {edit.target!r} {list(shape)} ask for {list(expected)}. Pass the base that the adapter "
                    "was trained on; if it is that one, the adapter was saved in pieces: take an earlier checkpoint."
                )


def refuse_unmergeable(config: LoraConfig, source: str) -> None:
    """Refuse adapters that are no fixed change of the base's weights.

    Raises:
        ValueError: Names the option and what it does.
    """
    for option, what in _NOT_ONE_MATRIX.items():
        if getattr(config, option, None):
            raise ValueError(
                f"The adapter in {source!r} was trained with {option}, that is, it {what}: no one matrix does the "
                "same, or none that can be written here. Use it unmerged, with PeftModel.from_pretrained."
            )
    if config.init_lora_weights not in _INITIALISATIONS_THAT_KEEP_THE_BASE:
        raise ValueError(
            f"The adapter in {source!r} was initialised with init_lora_weights={config.init_lora_weights!r}, which "
            "changed the base as well, and the changed base is not in the folder. Save it with PEFT's "
            "path_initial_model_for_weight_conversion, which makes a plain LoRA of it."
        )


def _read_config(file: str) -> LoraConfig:
    fields = json.loads(Path(file).read_text())
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise ValueError(
            f"{file!r} describes an adapter of type {kind!r}, and only LoRA adapters (DoRA and rsLoRA included) can be "
            "merged tensor by tensor. Merge it with PEFT's own merge_and_unload, or use it unmerged."
        )
    known = set(LoraConfig.__dataclass_fields__)
    unknown = sorted(name for name, value in fields.items() if name not in known and value)
    if unknown:
        raise ValueError(
            f"{file!r} has options that this PEFT does not know: {unknown}. What they do to the weights would be "
            "left out. Update peft to the version that wrote the adapter, or newer."
        )
    return LoraConfig.from_peft_type(**{name: value for name, value in fields.items() if name in known})


def _token_indices(config: LoraConfig, module_name: str) -> list[int]:
    indices = config.trainable_token_indices or []
    if not isinstance(indices, dict):
        return list(indices)
    return list(next((rows for name, rows in indices.items() if f".{module_name}".endswith(f".{name}")), []))


def _is_factor(name: str) -> bool:
    return _PART.match(name.removeprefix(_PREFIX)) is not None


def _check_place(found: bool, name: str, source: str, model: str) -> None:
    if not found:
        raise ValueError(
            f"{name!r} of the adapter in {source!r} belongs to no parameter of {model}, so it cannot be merged into "
            "one. Pass the base that the adapter was trained on; adapters of other PEFT methods, or of experts as they "
            "were before transformers 5 stacked them, stay unmerged."
        )


def _describe_folder(source: str) -> str:
    inside = sorted(str(file.parent.name) for file in Path(source).glob(f"*/{ADAPTER_CONFIG}"))
    if inside:
        return (
            f"{source!r} holds no adapter of its own but {len(inside)} in folders: {inside}. Only one can be merged "
            f"at a time. Name it, as {str(Path(source) / inside[0])!r}."
        )
    return (
        f"{source!r} has no {ADAPTER_CONFIG}, so it is no PEFT adapter. Pass the folder that trainer.save_model or "
        "save_pretrained has written, or one of its checkpoints."
    )
