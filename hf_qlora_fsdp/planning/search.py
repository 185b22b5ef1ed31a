"""Trying settings: the fastest that fits, and if none does, the least that would have to change.

There are few settings worth trying, and they come in families, each with one number to be chosen:

    on the cards                n layers computed twice, from none to all
    activations offloaded       all of them computed twice, their inputs on the host
    layers offloaded            k layers on the host, with activations or without
    all weights offloaded       likewise; in memory that may be swapped out, where there is swap

Within a family less is faster, so the least number that fits is found by halving. That is done for each batch that
divides the sequences of a step, and the fastest of all that fit is taken. What differs by less than a hundredth is
equally fast to a bound; of such the one is taken that leaves most to the host.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..units import format_bytes
from .machine import Machine
from .memory_estimate import MemoryEstimate, estimate
from .settings import Settings, check_settings, is_possible
from .time_model import TimeBounds, bound_time
from .weighing import ModelWeight

_FEWEST_TOKENS = 128
_GPUS_OF_A_HOST, _MOST_GPUS = 8, 64
_EQUALLY_FAST = 0.01


@dataclass(frozen=True)
class Candidate:
    """Settings that were tried.

    Args:
        family (`str`): What they do about memory.
        settings (`Settings`): All of them.
        estimate (`MemoryEstimate`): What they take.
        time (`TimeBounds`): How long a step takes at least.
        obstacles (`list[str]`): Why they do not fit.
        reason (`str`): Why they were not chosen.
    """

    family: str
    settings: Settings
    estimate: MemoryEstimate
    time: TimeBounds
    obstacles: list[str]
    reason: str = ""


@dataclass(frozen=True)
class Change:
    """Something that would let the model fit.

    Args:
        option (`str`): The argument of `plan` to change: `"device_memory"`, `"host_memory"`, `"num_gpus"`, `"seq"`
            or, where it is among the fixed settings, `"replicate_layers"`.
        value (`int`): What to change it to.
        factor (`float`): How many times more (or, of `seq`, less) that is.
        text (`str`): In words.
    """

    option: str
    value: int
    factor: float
    text: str


class Search:
    """Looks for settings that fit.

    Args:
        weight (`ModelWeight`): The model.
        machine (`Machine`): What there is.
        fixed (`dict`): Settings that are not to be changed, by name.
    """

    def __init__(self, weight: ModelWeight, machine: Machine, fixed: dict[str, Any]) -> None:
        self.weight, self.machine, self.fixed = weight, machine, fixed
        self.num_layers = len(weight.layers)

    def run(self, start: Settings, batches: list[tuple[int, int]]) -> list[Candidate]:
        """Return the best of each family for each batch.

        Args:
            start (`Settings`): What is not searched for.
            batches (`list[tuple[int, int]]`): Sequences at a time, and how often a step.
        Raises:
            ValueError: What is fixed cannot be.
        """
        tried: dict[Settings, Candidate] = {}
        check_settings(start, self.num_layers)
        for batch, times in batches:
            settings = replace(start, batch=batch, gradient_accumulation_steps=times)
            for family, make, most in self.families(settings):
                if is_possible(make(most), self.num_layers):
                    candidate = self._find_least(family, make, most)
                    tried.setdefault(candidate.settings, candidate)
        return list(tried.values())

    def families(self, settings: Settings) -> Iterator[tuple[str, Callable[[int], Settings], int]]:
        """Yield families: a name, what makes settings of a number, and the number that takes least memory."""
        count = self.num_layers

        def change(**wanted: Any) -> Settings:
            return replace(settings, **{name: value for name, value in wanted.items() if name not in self.fixed})

        def keep(number: int) -> Settings:
            return change(checkpoint_layers=None if number == count else number)

        def offload(activations: bool, number: int) -> Settings:
            return change(cpu_offload=True, activation_offloading=activations, cpu_offload_layers=max(1, number))

        def offload_all(activations: bool, pinned: bool, _: int) -> Settings:
            pinning = {} if pinned else {"cpu_offload_pin_memory": False}
            return change(cpu_offload=True, activation_offloading=activations, **pinning)

        yield "on the cards", keep, count
        yield "activations offloaded", lambda _: change(activation_offloading=True), 0
        for also, activations in (("", False), (" and activations", True)):
            yield f"layers{also} offloaded", functools.partial(offload, activations), count
            yield f"all weights{also} offloaded", functools.partial(offload_all, activations, True), 0
            if self.machine.swap_bytes:
                swappable = functools.partial(offload_all, activations, False)
                yield f"all weights{also} in swappable memory", swappable, 0

    def _find_least(self, family: str, make: Callable[[int], Settings], most: int) -> Candidate:
        """Return the candidate with the least number that fits, or with the largest if none does."""
        best, low, high = self.judge(family, make(most)), 0, most
        while low < high and not best.obstacles:
            middle = (low + high) // 2
            candidate = self.judge(family, make(middle)) if is_possible(make(middle), self.num_layers) else None
            if candidate is None or candidate.obstacles:
                low = middle + 1
            else:
                best, high = candidate, middle
        return best

    def judge(self, family: str, settings: Settings) -> Candidate:
        """Estimate settings, and say what the machine lacks for them."""
        machine = self.machine
        taken = estimate(self.weight, settings, machine.card.compute_capability)
        time = bound_time(self.weight, settings, machine.card, machine.link, machine.host_link)
        obstacles = []
        if taken.card_bytes > machine.device_bytes:
            fullest = max(taken.card.values(), key=lambda moment: moment.total)
            missing = format_bytes(taken.card_bytes - machine.device_bytes)
            obstacles.append(f"a card lacks {missing} ({fullest.name})")
        missing_bytes = missing_on_host(taken, machine)
        if missing_bytes > 0:
            obstacles.append(f"the host lacks {format_bytes(missing_bytes)}")
        return Candidate(family, settings, taken, time, obstacles)

    # -- what would let it fit ---------------------------------------------------------------------------------------

    def find_changes(self, start: Settings, batches: list[tuple[int, int]], tried: list[Candidate]) -> list[Change]:
        """Return what would let some settings fit, each by itself, the least first."""
        machine, changes = self.machine, []
        on_host = [one for one in tried if missing_on_host(one.estimate, machine) <= 0]
        if on_host:
            need = min(one.estimate.card_bytes for one in on_host)
            text = f"cards of {format_bytes(need)} instead of {format_bytes(machine.device_bytes)}"
            changes.append(Change("device_memory", need, need / machine.device_bytes, text))
        on_card = [one for one in tried if one.estimate.card_bytes <= machine.device_bytes]
        if on_card and machine.host_bytes is not None:
            need = machine.host_bytes + min(missing_on_host(one.estimate, machine) for one in on_card)
            text = f"{format_bytes(need)} of host memory instead of {format_bytes(machine.host_bytes)}"
            changes.append(Change("host_memory", need, need / machine.host_bytes, text))
        if start.replicate_layers is not None:
            fewer = Search(self.weight, machine, self.fixed | {"replicate_layers": None})
            if fewer._fits(replace(start, replicate_layers=None), batches):
                changes.append(Change("replicate_layers", 0, 1.0, "no layers whole on every card"))
        for count in self._more_gpus():
            if self._fits_with(count, start, batches):
                changes.append(Change("num_gpus", count, count / machine.num_gpus, f"{count} cards of this kind"))
                break
        seq = start.seq // 2
        while seq >= _FEWEST_TOKENS:
            if self._fits(replace(start, seq=seq), batches):
                text = f"sequences of {seq} tokens instead of {start.seq}"
                changes.append(Change("seq", seq, start.seq / seq, text))
                break
            seq //= 2
        return sorted(changes, key=lambda change: change.factor)

    def _fits(self, start: Settings, batches: list[tuple[int, int]]) -> bool:
        return any(not one.obstacles for one in self.run(start, batches[:1]))

    def _more_gpus(self) -> Iterator[int]:
        """Yield larger numbers of cards: one by one while one host holds them, then host by host."""
        one_host = self.machine.gpus_per_host == self.machine.num_gpus
        if one_host:
            yield from range(self.machine.num_gpus + 1, _GPUS_OF_A_HOST)
        step = _GPUS_OF_A_HOST if one_host else self.machine.gpus_per_host
        first = (self.machine.num_gpus // step + 1) * step
        yield from range(first, max(_MOST_GPUS, first) + 1, step)

    def _fits_with(self, count: int, start: Settings, batches: list[tuple[int, int]]) -> bool:
        machine = self.machine
        per_host = min(count, _GPUS_OF_A_HOST) if machine.gpus_per_host == machine.num_gpus else machine.gpus_per_host
        larger = Search(self.weight, replace(machine, num_gpus=count, gpus_per_host=per_host), self.fixed)
        return larger._fits(replace(start, num_ranks=count, ranks_per_host=per_host), batches)


def missing_on_host(taken: MemoryEstimate, machine: Machine) -> int:
    """Return how many bytes a host lacks; not more than zero if none."""
    if machine.host_bytes is None:
        return 0
    swappable = machine.swap_bytes if taken.settings.cpu_offload and not taken.settings.pins_memory else 0
    return max(taken.host_bytes - machine.host_bytes - swappable, taken.pinned_bytes - machine.host_bytes)


def find_fast(candidates: list[Candidate]) -> list[Candidate]:
    """Return those that are as fast as the fastest, the one that takes least of the host first."""
    best = max(one.time.tokens_per_second for one in candidates)
    fast = [one for one in candidates if one.time.tokens_per_second >= best * (1 - _EQUALLY_FAST)]
    return sorted(fast, key=lambda one: (one.estimate.host_bytes, one.estimate.card_bytes))


def find_nearest(candidates: list[Candidate], machine: Machine) -> Candidate:
    """Return what lacks least, in parts of what there is."""

    def lack(one: Candidate) -> float:
        on_card = max(0, one.estimate.card_bytes - machine.device_bytes) / machine.device_bytes
        return on_card + max(0, missing_on_host(one.estimate, machine)) / (machine.host_bytes or 1)

    return min(candidates, key=lack)


def explain(candidate: Candidate, chosen: Candidate, is_fast: bool) -> Candidate:
    """Return a candidate with the reason why it was not chosen."""
    if candidate.obstacles:
        return replace(candidate, reason="; ".join(candidate.obstacles))
    mine, best = candidate.time.tokens_per_second, chosen.time.tokens_per_second
    if is_fast:
        more = candidate.estimate.host_bytes - chosen.estimate.host_bytes
        where = f"{format_bytes(more)} more of the host" if more else "as much of the host and more of a card"
        return replace(candidate, reason=f"fits, as fast, and takes {where}")
    return replace(candidate, reason=f"fits, {1 - mine / best:.1%} slower: waits for {candidate.time.bound}")
