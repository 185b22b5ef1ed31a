"""`hf-qlora-fsdp doctor`: will a run work on this machine, and if not, what is to be done?

    examination.py          asks, in a process that may die of the answer
      software_checks.py      Python, libraries and versions, patches
      kernel_checks.py        the 4-bit arithmetic
      environment_checks.py   variables that hurt
      gpu_checks.py           GPUs, links between them, NCCL and gloo
      host_checks.py          memory, pinned memory, disks
      live_test.py            two processes, one sharded step, compared with one process
    findings.py             what is found: level, what, why, fix

Up to the examination, everything here is from the standard library: the doctor must not need what it looks for.
"""

from __future__ import annotations

import argparse
import json
import time

from .examination import CHECKS, LIVE_TEST, examine
from .findings import count_levels, format_finding


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the doctor's options."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--no-live-test", action="store_true", help="leave out the test with two processes")


def launch(args: argparse.Namespace) -> int:
    """Examine this machine, and print what is found as it is found.

    Args:
        args (`argparse.Namespace`): Of `add_arguments`.
    Returns:
        `int`: Exit code: 0 if runs will work, 1 if there is an error among the findings.
    """
    started = time.monotonic()
    names = [check.name for check in CHECKS if not (args.no_live_test and check.name == LIVE_TEST)]
    reports = []
    for check, finding in examine(names):
        reports.append((check, finding))
        if not args.json:
            print(format_finding(check, finding), flush=True)
    counts = count_levels(finding for _, finding in reports)
    healthy, seconds = not counts["error"], time.monotonic() - started
    if args.json:
        findings = [{"check": check, **finding.as_dict()} for check, finding in reports]
        print(json.dumps({"healthy": healthy, "seconds": round(seconds, 1), "findings": findings}, indent=1))
    else:
        counted = ", ".join(f"{counts[level]} {level}{'s' * (counts[level] != 1)}" for level in ("error", "warning"))
        print(f"\n{'Healthy' if healthy else 'Not healthy'}: {counted}, in {seconds:.0f} s.")
    return 0 if healthy else 1
