"""The command line, `hf-qlora-fsdp`. A command imports what it needs when it runs, so `--help` answers at once."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence
from typing import Any

from .demo.command import add_arguments as add_demo_arguments
from .doctor.command import add_arguments as add_doctor_arguments
from .errors import exit_code_of
from .planning.command import add_arguments as add_plan_arguments
from .rehearsal.command import add_arguments as add_rehearsal_arguments
from .translation import refusal

WHICH_BASE = """\
which base:
  trained    the weights that the adapter was trained on, quantised and dequantised as in training. Take it where the
             merged model shall answer as the trained one did when it was evaluated.
  original   the base's own weights, without the rounding that the adapter was trained on top of and has learned to
             make up for. Take it to quantise the merged model in another way, or to go on training in 16 bits, and
             evaluate what you get.

  measured   held-out loss (nats a token)    above the trained model's    distance of a token's log-probability    right
  trained    0.0143                          0.0001 +- 0.0001             0.0010                                   0.917
  original   0.0200                          0.0058 +- 0.0012             0.0161                                   0.750
  The trained model's own loss is 0.0142, and 0.917 of its answers are right. SmolLM2-135M on 192 held-out orders of the
  demo, answers on 24 of them, 2026-11-22, torch 2.13.0, transformers 5.23.0, peft 0.21.2, bitsandbytes 0.50.2;
  benchmarks/merge_bases.py measures it again.

A base that is stored in 4 bits has no original weights and needs --base-weights trained.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv (`Sequence[str]`, *optional*): Arguments; those of the process by default.
    Returns:
        `int`: Exit code: 0; 1 if the answer is no, or the command failed; 2 if what was asked for cannot work, with the
            reason on stderr; 130 if it was interrupted.
    Raises:
        SystemExit: The arguments are no command (2), or `--help` or `--version` (0).
    """
    parser = argparse.ArgumentParser("hf-qlora-fsdp", description="QLoRA fine-tuning, sharded by FSDP2.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(required=True, metavar="command")
    demo = commands.add_parser(
        "demo",
        help="fine-tune a small model in 4 bits over several processes, and count what it learned",
        description="Fine-tune a small chat model, sharded in 4 bits over several processes, to turn free-text orders "
        "into JSON, and score it on orders whose words and phrasings it has never seen. Minutes on two CPU cores.",
    )
    add_demo_arguments(demo)
    demo.set_defaults(run=_run_demo)
    _add_plan(commands)
    _add_rehearse(commands)
    _add_train(commands)
    _add_merge(commands)
    _add_check(commands)
    _add_doctor(commands)
    _add_convert(commands)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        print(f"hf-qlora-fsdp: {error}", file=sys.stderr)
        return exit_code_of(error)
    except KeyboardInterrupt:
        return 130


def _run_demo(args: argparse.Namespace) -> int:
    from .demo.command import launch

    return launch(args)


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="see which settings fit and how fast they are, from config.json alone",
        description="Add up what a run takes of cards, host and disk, by cause, try the settings there are, and name "
        "the fastest that fits. Arithmetic alone: no weight is read and no card is asked. Exits with 0 if something "
        "fits, with 1 otherwise, and says then what is the least that would have to change.",
    )
    add_plan_arguments(plan)
    plan.set_defaults(run=_run_plan)


def _run_plan(args: argparse.Namespace) -> int:
    from .planning.command import launch

    return launch(args)


def _add_rehearse(commands: Any) -> None:
    rehearse = commands.add_parser(
        "rehearse",
        help="see whether a model fits and how fast it trains, before it is downloaded",
        description="Train a model of the real shapes with random weights for a few steps, and report the memory of "
        "cards and host by phase, and the speed. Only config.json is needed. Exits with 0 if it fits, with 1 "
        "otherwise, and says then what was missing and what would help. Starts its own processes, or runs under "
        "torchrun.",
    )
    add_rehearsal_arguments(rehearse)
    rehearse.set_defaults(run=_run_rehearse)


def _run_rehearse(args: argparse.Namespace) -> int:
    from .rehearsal.command import launch

    return launch(args)


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="fine-tune a model, from a YAML file or flags in the manner of TRL",
        add_help=False,  # its options are fields of dataclasses of TRL, which takes seconds to import
        prefix_chars="\0",  # so nothing is an option here, and all of it is handed on
    )
    train.add_argument("arguments", nargs=argparse.REMAINDER)
    train.set_defaults(run=_run_train)


def _run_train(args: argparse.Namespace) -> int:
    from .train.command import launch

    return launch(args.arguments)


def _add_merge(commands: Any) -> None:
    merge = commands.add_parser(
        "merge",
        help="merge an adapter into its base model, shard by shard, on any machine",
        description="Merge a LoRA, rsLoRA or DoRA adapter into its base model without ever holding the model. The same "
        "command goes on after an interruption.",
        epilog=WHICH_BASE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    merge.add_argument("base", metavar="BASE", help="Hub id or folder of the base model")
    merge.add_argument("adapter", metavar="ADAPTER", help="folder of the adapter, or of a checkpoint")
    merge.add_argument("output", metavar="OUT", help="new folder for the merged model")
    merge.add_argument(
        "--base-weights", choices=("original", "trained"), default="original", help="see below (%(default)s)"
    )
    merge.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="of the output (default: the base's)"
    )
    merge.add_argument("--save-4bit", action="store_true", help="write a checkpoint in 4 bits, as bitsandbytes does")
    trained = merge.add_argument_group(
        "how the base was quantised in training, and how a 4-bit output is",
        "Adapters trained with this package say it themselves, in base_quantization.json.",
    )
    trained.add_argument("--quant-type", choices=("nf4", "fp4"), help="(default: what is recorded, else nf4)")
    trained.add_argument(
        "--double-quant",
        action=argparse.BooleanOptionalAction,
        help="whether block scales are quantised as well (default: what is recorded, else yes)",
    )
    trained.add_argument(
        "--skip-modules", nargs="*", metavar="NAME", help="left in 16 bits (default: what is recorded, else the head)"
    )
    trained.add_argument(
        "--compute-dtype",
        choices=("bfloat16", "float16", "float32"),
        help="param_dtype of the training (default: what is recorded, else bfloat16)",
    )
    merge.add_argument("--device", help="where to compute (default: a GPU if there is one)")
    merge.set_defaults(run=_run_merge)


def _run_merge(args: argparse.Namespace) -> int:
    from .merging.merger import merge_adapter

    folder = merge_adapter(
        args.base,
        args.adapter,
        args.output,
        base_weights=args.base_weights,
        dtype=args.dtype,
        save_4bit=args.save_4bit,
        quant_type=args.quant_type,
        double_quant=args.double_quant,
        skip_modules=args.skip_modules,
        compute_dtype=args.compute_dtype,
        device=args.device,
    )
    print(f'The merged model lies in {folder}. To load it: AutoModelForCausalLM.from_pretrained("{folder}")')
    return 0


def _add_check(commands: Any) -> None:
    check = commands.add_parser(
        "check",
        help="look for damage in an adapter or a checkpoint",
        description="Look for damage in an adapter or a training checkpoint: files cut short or altered, tensors that "
        "are missing, zero, not finite or of another shape than config and base say, an optimizer of another run. "
        "Exits with 0 if nothing is wrong, with 1 otherwise. No pickle is opened.",
    )
    check.add_argument("folder", metavar="DIR", help="folder of the adapter or checkpoint")
    check.set_defaults(run=_run_check)


def _run_check(args: argparse.Namespace) -> int:
    from .checking import check_adapter

    report = check_adapter(args.folder)
    print(report)
    return 0 if report.ok else 1


def _add_doctor(commands: Any) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="see whether runs will work on this machine, and what to do if not",
        description="Examine libraries, GPUs, links, memory, disks and environment, and train a tiny model for one "
        "step over two processes, compared with one. Says for each finding why it matters and what to do. Exits with 0 "
        "if runs will work, with 1 otherwise.",
    )
    add_doctor_arguments(doctor)
    doctor.set_defaults(run=_run_doctor)


def _run_doctor(args: argparse.Namespace) -> int:
    from .doctor.command import launch

    return launch(args)


def _add_convert(commands: Any) -> None:
    convert = commands.add_parser(
        "convert",
        help="turn a file of Axolotl, LLaMA-Factory or accelerate into one for train",
        description="Turn the YAML file of an Axolotl or LLaMA-Factory run with QLoRA, or of accelerate config, into "
        "one for train --config. Each key is used, or named in a comment with the reason why it makes no difference; "
        "one that cannot be honoured is an error.",
    )
    convert.add_argument(
        "files",
        metavar="FILE",
        nargs="+",
        help="the other program's file, or the files of a run that is written in two",
    )
    convert.add_argument("-o", "--output", metavar="OUT", help="new file to write (default: print)")
    convert.set_defaults(run=_run_convert)


def _run_convert(args: argparse.Namespace) -> int:
    from .conversion import convert
    from .train.ranges import check_ranges

    found = convert(*args.files)
    try:
        check_ranges(found.arguments)
    except ValueError as error:
        raise ValueError(f"{found.name} of {found.program} asks for what no run can have. {error}") from error
    text = found.to_yaml()
    if args.output is None:
        print(text, end="")
        return 0
    try:
        with open(args.output, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise refusal(f"-o {args.output}", "there is such a file already", "Give the name of a new one.") from error
    except OSError as error:
        raise refusal(
            f"-o {args.output}", f"it cannot be written ({error})", "Name a file in another folder."
        ) from error
    print(f"Written: {args.output}. To train with it: hf-qlora-fsdp train --config {args.output}")
    return 0


def _version() -> str:
    try:
        return importlib.metadata.version("hf_qlora_fsdp")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
