"""How a run is set up, as far as memory and time depend on it, and which settings go together.

Their names are those of `QLoRAFSDPConfig`, so what a plan has chosen can be handed to a run as it is (`auto.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from ..sharding_policy import ShardingPolicy
from ..translation import nearest
from ..units import parse_bytes
from .weighing import ModelWeight


@dataclass(frozen=True)
class Settings:
    """The settings of a run.

    Args:
        num_ranks (`int`): Cards that share the weights.
        ranks_per_host (`int`): Of these, on one host.
        seq (`int`): Tokens a sequence.
        batch (`int`): Sequences that a rank takes at a time.
        gradient_accumulation_steps (`int`): Times that it does so a step.
        gradient_checkpointing (`bool`): Whether layers compute their forward again in the backward.
        checkpoint_layers (`int`, *optional*): How many of them do, the first ones; all by default.
        activation_offloading (`bool`): Whether what they keep goes to the host.
        cpu_offload (`bool`), cpu_offload_pin_memory (`bool`), cpu_offload_layers (`int`, *optional*): Which frozen
            weights lie in host memory, and in which kind of it.
        mapped (`bool`): Whether they lie in files (`cpu_offload_dir`).
        replicate_layers (`int` or `"all"`, *optional*): How many decoder layers are left whole on every card.
        use_liger_kernel (`bool`), fuse_lora (`bool`): How layers are computed.
    """

    num_ranks: int = 1
    ranks_per_host: int = 1
    seq: int = 2048
    batch: int = 1
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = True
    checkpoint_layers: int | None = None
    activation_offloading: bool = False
    cpu_offload: bool = False
    cpu_offload_pin_memory: bool = True
    cpu_offload_layers: int | None = None
    mapped: bool = False
    replicate_layers: int | str | None = None
    use_liger_kernel: bool = False
    fuse_lora: bool = True

    @property
    def tokens(self) -> int:
        """Tokens that a rank takes at a time."""
        return self.seq * self.batch

    @property
    def pins_memory(self) -> bool:
        return self.cpu_offload_pin_memory and not self.mapped

    def recomputed(self, num_layers: int) -> int:
        """Return how many layers compute their forward again."""
        if not self.gradient_checkpointing:
            return 0
        return num_layers if self.checkpoint_layers is None else self.checkpoint_layers

    def describe(self, num_layers: int) -> str:
        """Say in words what is done about memory."""
        words = [f"batch {self.batch}"]
        if self.gradient_accumulation_steps > 1:
            words[0] += f" x {self.gradient_accumulation_steps}"
        again = self.recomputed(num_layers)
        if again < num_layers:
            words.append(f"{again} of {num_layers} layers computed twice" if again else "nothing computed twice")
        if self.activation_offloading:
            words.append("activations offloaded")
        if self.cpu_offload:
            count = self.cpu_offload_layers
            what = "all weights" if count is None else f"{count} of {num_layers} layers"
            words.append(f"{what} offloaded{'' if self.pins_memory else ', not pinned'}")
        if self.replicate_layers is not None:
            words.append(f"{self.replicate_layers} of {num_layers} layers whole on every card")
        return ", ".join(words)

    def replicated(self, weight: ModelWeight) -> set[str]:
        """Return the names of the units that are left whole on every card."""
        policy = ShardingPolicy(replicate_layers=self.replicate_layers)
        return policy.replicated_units([unit.unit for unit in weight.units if unit.unit.name])

    def lay_out(self, weight: ModelWeight) -> ModelWeight:
        """Return the model with layers whole where they are left so."""
        whole = self.replicated(weight)
        units = [replace(u, parts=u.parts.replicated) if u.unit.name in whole else u for u in weight.units]
        return replace(weight, units=units) if whole else weight

    def offloaded(self, weight: ModelWeight) -> set[str]:
        """Return the names of the offloaded units."""
        policy = ShardingPolicy(cpu_offload=self.cpu_offload, cpu_offload_layers=self.cpu_offload_layers)
        return policy.offloaded_units([unit.unit for unit in weight.units if unit.unit.name])


def check_names(settings: Iterable[str]) -> None:
    """Refuse what is no setting.

    Raises:
        ValueError: One is unknown, or is given by another argument.
    """
    known = {field.name for field in fields(Settings)} - {"num_ranks", "ranks_per_host"}
    for name in settings:
        if name not in known:
            raise ValueError(f"{name}: there is no such setting to plan with. {nearest(name, known)}")


def check_settings(settings: Settings, num_layers: int) -> None:
    """Refuse settings that cannot be.

    Raises:
        ValueError: They contradict each other, or the model.
    """
    numbers = {"seq": 2, "batch": 1, "gradient_accumulation_steps": 1, "num_ranks": 1, "ranks_per_host": 1}
    for name, least in numbers.items():
        if getattr(settings, name) < least:
            raise ValueError(f"{name}={getattr(settings, name)}: there is nothing to train. Give {least} or more.")
    replicated = settings.replicate_layers
    if replicated not in (None, "all"):
        check_count("replicate_layers", replicated)
    for name in ("cpu_offload_layers", "checkpoint_layers", "replicate_layers"):
        value = getattr(settings, name)
        if value not in (None, "all") and not 0 <= value <= num_layers:
            raise ValueError(
                f"{name}={value}, but the model has {num_layers} decoder layers. Write a number up to {num_layers}, or "
                "leave it out."
            )
    if replicated is not None and settings.cpu_offload:
        raise ValueError(
            f"replicate_layers={replicated!r} with cpu_offload=True: one spends memory of the cards to save time, the "
            "other time to save memory of the cards. Leave one of them out."
        )
    if not is_possible(settings, num_layers):
        raise ValueError(
            "activation_offloading, checkpoint_layers, gradient_checkpointing=False and cpu_offload_layers without "
            f"cpu_offload do not go together as in {settings}: activations are offloaded where all layers compute "
            "theirs again, and layers where there is offloading. Leave one of them out."
        )


def is_possible(settings: Settings, num_layers: int) -> bool:
    """Return whether settings go together."""
    again = settings.recomputed(num_layers)
    return not (
        (settings.activation_offloading and again < num_layers)
        or (settings.checkpoint_layers is not None and not settings.gradient_checkpointing)
        or (settings.cpu_offload_layers is not None and not settings.cpu_offload)
        or (settings.replicate_layers is not None and settings.cpu_offload)
    )


def read_size(name: str, value: int | str, least: int = 1) -> int:
    """Return bytes, which may be written as people do, `"24GiB"`.

    Raises:
        ValueError: It is no size, or smaller than it can be.
    """
    if not isinstance(value, str):
        return check_count(name, value, least)
    try:
        return parse_bytes(value)
    except ValueError as error:
        raise ValueError(f"{name}={value!r}: {error}") from None


def check_count(name: str, value: Any, least: int = 1) -> int:
    """Return a count as it was given.

    Raises:
        ValueError: It is no whole number, or smaller than it can be.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: there is nothing to plan for fewer than {least}. Give {least} or more.")
    return value
