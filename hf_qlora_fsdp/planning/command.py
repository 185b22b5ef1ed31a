"""What `hf-qlora-fsdp plan` runs: options in, a plan out (`planner.py`)."""

from __future__ import annotations

import argparse
import logging
import warnings
from typing import Any

from ..units import format_bytes, parse_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the plan."""
    parser.add_argument("model", metavar="MODEL", help="Hub id, folder or config.json; nothing else of it is opened")
    machine = parser.add_argument_group("what there is")
    machine.add_argument("--gpus", type=int, metavar="N", help="cards (default: those of this machine)")
    machine.add_argument("--gpus-per-host", type=int, metavar="N", help="of these, on one host (all)")
    machine.add_argument(
        "--card", metavar="NAME", help="3090, 4090, 5090, A10G, A5000, A6000, L40S, A100, H100 or H200"
    )
    machine.add_argument("--device-memory", metavar="SIZE", help="of a card, as 24GiB (what the card has)")
    machine.add_argument("--host-memory", metavar="SIZE", help="of a host, as 64GiB (no limit)")
    machine.add_argument("--swap", metavar="SIZE", help="of a host, for weights that may be swapped out (none)")
    machine.add_argument("--link", metavar="NAME", help="between cards: pcie4x16, nvlink4, or bytes a second as 20GB")
    machine.add_argument("--host-link", metavar="NAME", help="between a card and its host, likewise")
    run = parser.add_argument_group("what is trained")
    run.add_argument("--seq", type=int, default=2048, help="tokens a sequence (%(default)s)")
    run.add_argument("--batch", type=int, help="sequences a card takes at a time (what is fastest)")
    run.add_argument("--target-batch", type=int, metavar="N", help="sequences of a step, all cards together (16)")
    run.add_argument("--lora-r", type=int, default=16, help="rank of the adapter (%(default)s)")
    run.add_argument(
        "--target-modules", nargs="+", default=["all-linear"], metavar="NAME", help="what it adapts (all-linear)"
    )
    run.add_argument("--param-dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    run.add_argument("--use-liger-kernel", action="store_true", help="with liger-kernel")
    run.add_argument("--no-fuse-lora", action="store_true", help="a 4-bit layer and its adapter one after the other")
    run.add_argument("--trust-remote-code", action="store_true", help="run code from the model's repository")
    output = parser.add_argument_group("what comes out")
    output.add_argument("--json", metavar="FILE", help="write all figures there, or to stdout (-)")
    output.add_argument("--plot", metavar="FILE", help="draw bars by cause into this PNG; needs matplotlib")
    output.add_argument("--emit", metavar="FILE", help="write script.py or config.yaml with these settings")
    output.add_argument("--dataset", metavar="NAME", help="for --emit: Hub id, or a JSON, CSV or Parquet file")


def launch(args: argparse.Namespace) -> int:
    """Make a plan and present it.

    Args:
        args (`argparse.Namespace`): Of `add_arguments`.
    Returns:
        `int`: Exit code: 0 if it fits, 1 if not.
    Raises:
        ValueError: An option is out of range, or there is no such model.
    """
    sizes = {name: _read_size(name, getattr(args, name)) for name in ("device_memory", "host_memory", "swap")}
    if args.dataset and not args.emit:
        raise ValueError(f"--dataset {args.dataset} is for the file that --emit writes, and none is asked for. Add it.")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)  # libraries about each other

    from .files import DEFAULT_DATASET, check_emit, emit
    from .planner import plan
    from .report import check_outputs, present

    check_emit(args.emit)
    check_outputs({"--json": args.json, "--plot": args.plot, "--emit": args.emit})
    found = plan(
        args.model,
        **_find_cards(args, sizes.pop("device_memory")),
        host_memory=sizes["host_memory"],
        swap=sizes["swap"] or 0,
        link=args.link,
        host_link=args.host_link,
        gpus_per_host=args.gpus_per_host,
        seq=args.seq,
        batch=args.batch,
        target_batch=args.target_batch,
        lora_r=args.lora_r,
        target_modules="all-linear" if args.target_modules == ["all-linear"] else args.target_modules,
        use_liger_kernel=args.use_liger_kernel,
        fuse_lora=not args.no_fuse_lora,
        param_dtype=args.param_dtype,
        trust_remote_code=args.trust_remote_code,
    )
    code = present(found, args.json, args.plot)
    if args.emit and found.fits:
        estimate = found.chosen.estimate
        settings = found.chosen.settings.describe(len(found.weight.layers))
        summary = f"{settings}; {format_bytes(estimate.card_bytes)} of a card"
        emit(found, args.emit, summary, args.dataset or DEFAULT_DATASET)
    elif args.emit:
        logging.getLogger("hf_qlora_fsdp").warning("%s is not written: nothing fits.", args.emit)
    return code


def _read_size(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise ValueError(f"--{name.replace('_', '-')} {error}") from None


def _find_cards(args: argparse.Namespace, device_bytes: int | None) -> dict[str, Any]:
    """Return what is said about cards, or what is true of this machine's."""
    given: dict[str, Any] = {"num_gpus": args.gpus, "card": args.card, "device_memory": device_bytes}
    if args.gpus is not None and (args.card or device_bytes):
        return given
    import torch

    here = torch.cuda.device_count()
    if not here:
        missing = "--gpus" if args.gpus is None else "--card or --device-memory"
        raise ValueError(
            f"This machine has no card to go by, and {missing} is not given. Write --gpus 2 --card 4090, or "
            "--gpus 2 --device-memory 24GiB."
        )
    given["num_gpus"] = args.gpus or here
    if not (args.card or device_bytes):
        from .cards import find_card

        name, total = torch.cuda.get_device_name(0), torch.cuda.mem_get_info(0)[1]
        given["device_memory"] = total
        try:
            given["card"] = find_card(name).name
        except ValueError:
            logging.getLogger("hf_qlora_fsdp").warning("%s is not in the table: its speed is a guess.", name)
    return given
