"""Will it fit, with which settings, and how fast: answered by arithmetic, from `config.json` and a few figures.

    config.json -> weigh the model           `weighing.py`          what each unit weighs, by cause
                -> run a layer on shapes     `layer_trial.py`       what it takes while it computes
                -> add up each moment        `memory_model.py`      card; `memory_estimate.py` host and disk
                -> bound the time            `time_model.py`        for a card of `cards.py`
                -> try settings              `search.py`            the fastest that fits, or what would let one fit

No weight is read and no card is asked, so a plan for a machine can be made on any other. How far it can be trusted is
measured by `benchmarks/planner_truth.py`, each row of which is a real run, and told by `benchmarks/planner_table.py`.
What a plan takes for granted stands at its end.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig, PretrainedConfig

from ..settling import PRECISIONS
from ..units import format_bytes
from .cards import HOLES
from .machine import Machine, describe_machine
from .memory_estimate import MemoryEstimate, estimate
from .search import Candidate, Change, Search, explain, find_fast, find_nearest
from .settings import Settings, check_count, check_names, check_settings
from .weighing import ModelWeight, weigh_model

DEFAULT_TARGET_BATCH = 16
"""Sequences of a step where nobody says how many: QLoRA's own for models up to 13B, arXiv:2305.14314, table 9."""

_BATCH_STEP = 1.5


@dataclass
class Plan:
    """An answer.

    Args:
        model (`str`): What was asked about.
        weight (`ModelWeight`): What it weighs.
        machine (`Machine`): What there is.
        lora_r (`int`), target_modules (`str` or `list[str]`): What is trained.
        chosen (`Candidate`): The fastest settings that fit; if none do, those that lack least.
        rejected (`list[Candidate]`): The others, each with its reason.
        changes (`list[Change]`): If nothing fits, what would help, the least first.
        assumptions (`list[str]`): What was taken for granted.
    """

    model: str
    weight: ModelWeight
    machine: Machine
    lora_r: int
    target_modules: Any
    chosen: Candidate
    rejected: list[Candidate]
    changes: list[Change] = field(default_factory=list)
    assumptions: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return not self.chosen.obstacles

    @property
    def margin_bytes(self) -> int:
        """What is left of a card; negative if it lacks something."""
        return self.machine.device_bytes - self.chosen.estimate.card_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return all of it, for JSON."""
        machine = asdict(self.machine)
        return {
            "model": self.model,
            "fits": self.fits,
            "margin_bytes": self.margin_bytes,
            "machine": machine,
            "lora_r": self.lora_r,
            "target_modules": self.target_modules,
            "chosen": _to_dict(self.chosen) | self.chosen.estimate.to_dict(),
            "rejected": [_to_dict(candidate) for candidate in self.rejected],
            "changes": [asdict(change) for change in self.changes],
            "assumptions": self.assumptions,
        }


def estimate_memory(
    model: str | PretrainedConfig,
    *,
    num_gpus: int = 1,
    gpus_per_host: int | None = None,
    lora_r: int = 16,
    target_modules: str | list[str] = "all-linear",
    param_dtype: str = "bfloat16",
    compute_capability: int = 9,
    trust_remote_code: bool = False,
    **settings: Any,
) -> MemoryEstimate:
    """Estimate what a run takes of cards, host and disk, by phase and cause.

    Args:
        model (`str` or `PretrainedConfig`): Hub id, folder or `config.json`; nothing else of it is opened.
        num_gpus (`int`): Cards that share the weights.
        gpus_per_host (`int`, *optional*): Of these, on one host; all by default.
        lora_r (`int`): Rank of the adapter.
        target_modules (`str` or `list[str]`): What it adapts.
        param_dtype (`str`): Dtype of the computation.
        compute_capability (`int`): Major one of the cards.
        trust_remote_code (`bool`): Whether code from the model's repository may run.
        **settings: Fields of `settings.Settings`: `seq`, `batch`, `gradient_checkpointing`, `cpu_offload`, ...
    Raises:
        ValueError: A setting cannot be, or there is no such model.
    """
    weight = weigh_model(
        model,
        lora_r=check_count("lora_r", lora_r),
        target_modules=target_modules,
        param_dtype=_dtype(param_dtype),
        trust_remote_code=trust_remote_code,
    )
    ranks = check_count("num_gpus", num_gpus)
    per_host = ranks if gpus_per_host is None else check_count("gpus_per_host", gpus_per_host)
    check_names(settings)
    whole = Settings(num_ranks=ranks, ranks_per_host=min(ranks, per_host), **settings)
    check_settings(whole, len(weight.layers))
    return estimate(weight, whole, compute_capability)


def plan(
    model: str | PretrainedConfig,
    *,
    num_gpus: int,
    device_memory: int | str | None = None,
    host_memory: int | str | None = None,
    swap: int | str = 0,
    card: str | None = None,
    link: str | None = None,
    host_link: str | None = None,
    gpus_per_host: int | None = None,
    seq: int = 2048,
    batch: int | None = None,
    target_batch: int | None = None,
    lora_r: int = 16,
    target_modules: str | list[str] = "all-linear",
    peft_config: LoraConfig | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    use_liger_kernel: bool = False,
    fuse_lora: bool = True,
    param_dtype: str = "bfloat16",
    trust_remote_code: bool = False,
    fixed: dict[str, Any] | None = None,
    **hub: Any,
) -> Plan:
    """Find the fastest settings that fit.

    Args:
        model (`str` or `PretrainedConfig`): Hub id, folder or `config.json`; nothing else of it is opened.
        num_gpus (`int`): Cards.
        device_memory (`int` or `str`, *optional*): Bytes of each, or `"24GiB"`; by default those of `card`.
        host_memory (`int` or `str`, *optional*): Bytes of each host, likewise; without limit if not given.
        swap (`int` or `str`): Swap of each host, likewise.
        card (`str`, *optional*): Name of the cards, see `cards.CARDS`; by default one of this memory.
        link (`str`, *optional*), host_link (`str`, *optional*): What joins cards, and a card and its host, see
            `cards.find_link`; by default what is usual for the card.
        gpus_per_host (`int`, *optional*): Cards on one host; all by default.
        seq (`int`): Tokens a sequence.
        batch (`int`, *optional*): Sequences that a card takes at a time; searched for by default.
        target_batch (`int`, *optional*): Sequences of a step, on all cards and over all accumulation steps.
        lora_r (`int`), target_modules (`str` or `list[str]`): What is trained.
        peft_config (`LoraConfig`, *optional*): All of what is trained, in place of the two.
        quantization_config (`BitsAndBytesConfig`, *optional*): NF4 with double quantisation by default.
        use_liger_kernel (`bool`), fuse_lora (`bool`), param_dtype (`str`): As in training.
        trust_remote_code (`bool`): Whether code from the model's repository may run.
        fixed (`dict`, *optional*): Settings that are not to be changed, by the names of `settings.Settings`.
        **hub: `revision`, `token` and the like.
    Raises:
        ValueError: An argument cannot be, or there is no such model.
    """
    machine = describe_machine(num_gpus, gpus_per_host, device_memory, host_memory, swap, card, link, host_link)
    if peft_config is not None:
        lora_r, targets = peft_config.r, peft_config.target_modules
        target_modules = targets if isinstance(targets, str) else sorted(targets or ())
    weight = weigh_model(
        model,
        lora_r=check_count("lora_r", lora_r),
        target_modules=target_modules,
        peft_config=peft_config,
        quantization_config=quantization_config,
        param_dtype=_dtype(param_dtype),
        trust_remote_code=trust_remote_code,
        **hub,
    )
    start = Settings(
        num_ranks=machine.num_gpus,
        ranks_per_host=machine.gpus_per_host,
        seq=check_count("seq", seq, least=2),
        use_liger_kernel=use_liger_kernel,
        fuse_lora=fuse_lora,
    )
    check_names(fixed or {})
    start = replace(start, **(fixed or {}))
    batches = find_batches(machine.num_gpus, batch, target_batch)
    name = model if isinstance(model, str) else model.name_or_path or model.model_type
    answer = Plan(name, weight, machine, lora_r, target_modules, *_choose(start, batches, weight, machine, fixed or {}))
    answer.assumptions = _list_assumptions(answer, card)
    return answer


def _choose(
    start: Settings,
    batches: list[tuple[int, int]],
    weight: ModelWeight,
    machine: Machine,
    fixed: dict[str, Any],
) -> tuple[Candidate, list[Candidate], list[Change]]:
    """Return the fastest settings that fit, all others, each with its reason, and, if none fits, what would help."""
    search = Search(weight, machine, fixed)
    tried = search.run(start, batches)
    fitting = [candidate for candidate in tried if not candidate.obstacles]
    fast = find_fast(fitting) if fitting else []
    chosen = fast[0] if fast else find_nearest(tried, machine)
    rejected = [explain(candidate, chosen, candidate in fast) for candidate in tried if candidate is not chosen]
    return chosen, rejected, [] if fitting else search.find_changes(start, batches, tried)


def find_batches(num_gpus: int, batch: int | None, target_batch: int | None) -> list[tuple[int, int]]:
    """Return the batches of a card that are tried, each with the times that it accumulates gradients.

    Where a step can be divided in many ways, they are those that are `_BATCH_STEP` times as large as the one before.

    Raises:
        ValueError: The sequences of a step cannot be divided so.
    """
    if batch is not None:
        check_count("batch", batch)
    if target_batch is None:
        each = batch or max(1, DEFAULT_TARGET_BATCH // num_gpus)
    else:
        each, rest = divmod(check_count("target_batch", target_batch), num_gpus * (batch or 1))
        if rest or not each:
            raise ValueError(
                f"A step of {target_batch} sequences cannot be divided among {num_gpus} cards"
                f"{f' with {batch} at a time' if batch else ''}. Give a multiple of {num_gpus * (batch or 1)}."
            )
        each *= batch or 1
    sizes = [size for size in range(1, each + 1) if each % size == 0] if batch is None else [batch]
    tried: list[int] = []
    for size in sizes:
        if not tried or size >= _BATCH_STEP * tried[-1]:
            tried.append(size)
    return [(size, each // size) for size in tried]


def _to_dict(candidate: Candidate) -> dict[str, Any]:
    return {
        "family": candidate.family,
        "settings": asdict(candidate.settings),
        "card_bytes": candidate.estimate.card_bytes,
        "host_bytes": candidate.estimate.host_bytes,
        "seconds_per_step": candidate.time.seconds,
        "tokens_per_second": candidate.time.tokens_per_second,
        "seconds": asdict(candidate.time),
        "bound": candidate.time.bound,
        "obstacles": candidate.obstacles,
        "reason": candidate.reason,
    }


def _dtype(name: str) -> torch.dtype:
    if name not in PRECISIONS:
        raise ValueError(f"param_dtype={name!r}: nothing is computed in that. Write one of {', '.join(PRECISIONS)}.")
    return getattr(torch, name)


def _list_assumptions(answer: Plan, card: str | None) -> list[str]:
    """Say what was taken for granted."""
    machine, settings = answer.machine, answer.chosen.settings
    listed = [
        f"Every sequence has {settings.seq} tokens, all of which count for the loss; shorter ones take less.",
        f"{format_bytes(answer.chosen.estimate.outside)} of a card go to CUDA, kernels and NCCL, as measured on H200; "
        f"{HOLES:.0%} more than tensors take is kept for holes between them; nothing else runs on the cards.",
        "The optimizer is AdamW in float32, for the adapter alone.",
        f"Times are bounds from below for {answer.machine.card.name}: nothing waits for anything else but the slowest. "
        "`hf-qlora-fsdp rehearse` measures them.",
    ]
    settings_tried = [candidate.settings for candidate in (answer.chosen, *answer.rejected)]
    if len({(settings.batch, settings.gradient_accumulation_steps) for settings in settings_tried}) > 1:
        listed.append(f"Batches that are less than {_BATCH_STEP} times as large as a smaller one are left out.")
    if card is None:
        listed.append(
            f"No card was named, so the speed is that of {machine.card.name}, which has about this memory (--card)."
        )
    if machine.host_bytes is None:
        listed.append("Nothing was said about the host's memory, so it is taken to be enough (--host-memory).")
    if any(hasattr(module, "layouts") for module in answer.weight.base.modules()):
        listed.append("Routers send as many tokens to each expert as to any other.")
    return listed
