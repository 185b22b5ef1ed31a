"""The command line, `hf-qlora-fsdp`. A command imports what it needs when it runs, so `--help` answers at once."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence

from .demo import add_arguments as add_demo_arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv (`Sequence[str]`, *optional*): Arguments; those of the process by default.
    Returns:
        `int`: Exit code: 0; 1 if the command failed, with the reason on stderr; 130 if it was interrupted.
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
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        print(f"hf-qlora-fsdp: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _run_demo(args: argparse.Namespace) -> int:
    from .demo import launch

    return launch(args)


def _version() -> str:
    try:
        return importlib.metadata.version("hf_qlora_fsdp")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
