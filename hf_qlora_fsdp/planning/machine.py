"""What a run may use: cards, what joins them, and the hosts that they are in, as people name them."""

from __future__ import annotations

from dataclasses import dataclass

from .cards import CARDS, Card, find_card, find_link
from .settings import check_count, read_size

_ABOUT = 0.15
"""Cards whose memory differs by less may be meant where only the memory is said."""


@dataclass(frozen=True)
class Machine:
    """What a run may use.

    Args:
        num_gpus (`int`): Cards, all of them together.
        gpus_per_host (`int`): Of these, on one host.
        device_bytes (`int`): Of each card.
        host_bytes (`int`, *optional*): Of each host; without limit if not known.
        swap_bytes (`int`): Of each host.
        card (`Card`): How fast they are.
        link (`float`), host_link (`float`): Bytes a second between cards, and between a card and its host.
    """

    num_gpus: int
    gpus_per_host: int
    device_bytes: int
    host_bytes: int | None
    swap_bytes: int
    card: Card
    link: float
    host_link: float


def describe_machine(
    num_gpus: int,
    gpus_per_host: int | None,
    device_memory: int | str | None,
    host_memory: int | str | None,
    swap: int | str,
    card: str | None,
    link: str | None,
    host_link: str | None,
) -> Machine:
    """Return what a run may use, by the arguments of `planner.plan`.

    Raises:
        ValueError: One of them cannot be, or they say too little.
    """
    check_count("num_gpus", num_gpus)
    per_host = num_gpus if gpus_per_host is None else check_count("gpus_per_host", gpus_per_host)
    if num_gpus % per_host and num_gpus > per_host:
        raise ValueError(
            f"num_gpus={num_gpus} with gpus_per_host={per_host}: hosts would have different numbers of cards, and the "
            "fullest of them decides. Give a multiple, or plan for the fullest host."
        )
    if device_memory is None and card is None:
        raise ValueError(
            "Neither the cards nor their memory are given, and a plan is for cards. Give card, one of "
            f"{', '.join(CARDS)}, or device_memory, '24GiB' say."
        )
    device_bytes = 0 if device_memory is None else read_size("device_memory", device_memory)
    found = find_card(card) if card is not None else _most_like(device_bytes)
    return Machine(
        num_gpus=num_gpus,
        gpus_per_host=min(per_host, num_gpus),
        device_bytes=device_bytes or found.memory_bytes,
        host_bytes=None if host_memory is None else read_size("host_memory", host_memory),
        swap_bytes=read_size("swap", swap, least=0),
        card=found,
        link=find_link(link or found.link),
        host_link=find_link(host_link or found.host_link),
    )


def _most_like(device_bytes: int) -> Card:
    """Return the slowest card of about this memory, so that nobody is promised too much."""
    near = [card for card in CARDS.values() if abs(card.memory_bytes / device_bytes - 1) < _ABOUT]
    if near:
        return min(near, key=lambda card: card.flops)
    return min(CARDS.values(), key=lambda card: abs(card.memory_bytes - device_bytes))
