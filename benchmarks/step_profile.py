"""Where the time of a step goes: kernels, communication that nothing hides, and a GPU that waits.

Takes the model and the options of `hf-qlora-fsdp rehearse`, runs the same steps, and profiles one of the later ones on
every rank; rank 0 tells. "busy" is the time in which any kernel runs, "idle" the rest of the step; "communication
alone" is when nothing but NCCL runs.

    python benchmarks/step_profile.py config.json --seq 2048 --steps 6
    python benchmarks/step_profile.py config.json --seq 2048 --steps 6 --prefetch --pools

`--pools` tells of the step before it what torch held without using it (`memory_pools.py`).
`--prefetch` has each decoder layer gather the next one when it begins itself, rather than when its Python ends: what
that is worth where a layer's Python waits for the device.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import time
from typing import Any

import torch
from memory_pools import describe_pools
from torch.autograd import DeviceType

from hf_qlora_fsdp.anatomy import plan_units
from hf_qlora_fsdp.launch import default_num_processes, is_worker
from hf_qlora_fsdp.ranks import rank
from hf_qlora_fsdp.rehearsal import command as rehearsal
from hf_qlora_fsdp.rehearsal import workers as rehearsal_ranks
from hf_qlora_fsdp.rehearsal.report import describe
from hf_qlora_fsdp.rehearsal.workers import Rehearsal, Stopwatch
from hf_qlora_fsdp.sharding import base_model

NUM_SHOWN = 30


class ProfiledStopwatch(Stopwatch):
    """Times each step, and profiles the last but one, which is not timed among the others."""

    def __init__(self, rehearsal: Rehearsal) -> None:
        super().__init__(rehearsal)
        self.profile: Any = None
        self.before: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.rehearsal.options.prefetch:
            prefetch_layers(kwargs["model"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_begin(args, state, control, **kwargs)
        if state.global_step == state.max_steps - 3 and self.rehearsal.options.pools:
            self.before = torch.cuda.memory._snapshot()["segments"]
            torch.cuda.memory._record_memory_history(enabled="all", context=None, max_entries=10**6)
        if state.global_step == state.max_steps - 2:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.profile = torch.profiler.profile(activities=activities)
            self.profile.__enter__()
            self.began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if self.before is not None:
            before, self.before = self.before, None
            snapshot = torch.cuda.memory._snapshot()
            torch.cuda.memory._record_memory_history(enabled=None)
            if rank() == 0:
                events = snapshot["device_traces"][torch.cuda.current_device()]
                print(describe_pools(before, events, snapshot["segments"]), flush=True)
        if self.profile is not None:
            profile, self.profile = self.profile, None
            profile.__exit__(None, None, None)
            if rank() == 0:
                print_profile(profile, self.seconds.pop())
            else:
                self.seconds.pop()


def prefetch_layers(model: Any) -> None:
    """Have each decoder layer gather the next one when it begins."""
    base = base_model(model)
    layers: list[Any] = [base.get_submodule(unit.modules[0]) for unit in plan_units(base) if unit.is_decoder_layer]
    for layer, following in itertools.pairwise(layers):
        layer.set_modules_to_forward_prefetch([following])


def print_profile(profile: Any, seconds: float) -> None:
    """Print the sums, then the kernels and the host's functions that take most."""
    events = [event for event in profile.events() if event.device_type == DeviceType.CUDA]
    spans = [(event.time_range.start, event.time_range.end, "nccl" in event.name) for event in events]
    busy = measure_union([span[:2] for span in spans])
    computing = measure_union([span[:2] for span in spans if not span[2]])
    idle = 1e3 * seconds - busy / 1e3
    print(
        f"profiled step: {1e3 * seconds:.0f} ms, GPU busy {busy / 1e3:.0f} ms, idle {idle:.0f} ms, "
        f"communication alone {(busy - computing) / 1e3:.0f} ms, {len(events)} kernels and copies"
    )
    totals: dict[str, list[float]] = {}
    for event in events:
        total = totals.setdefault(event.name[:100], [0, 0])
        total[0] += event.time_range.elapsed_us() / 1e3
        total[1] += 1
    for name, (milliseconds, count) in sorted(totals.items(), key=lambda item: -item[1][0])[:NUM_SHOWN]:
        print(f"{milliseconds:9.2f} ms {count:6.0f}  {name}")
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=NUM_SHOWN, max_name_column_width=60))


def measure_union(spans: list[tuple[float, float]]) -> float:
    """Return the length of what intervals cover together."""
    covered = end = 0.0
    for first, last in sorted(spans):
        covered += max(0.0, last - max(first, end))
        end = max(end, last)
    return covered


def main() -> int:
    """Start the workers, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    rehearsal.add_arguments(parser)
    parser.add_argument("--prefetch", action="store_true")
    parser.add_argument("--pools", action="store_true")
    options = parser.parse_args()
    rehearsal.check(options)
    if options.pools and not torch.cuda.is_available():
        parser.error("--pools is of a GPU's memory, and there is none")
    if not is_worker():
        count = default_num_processes() if options.nproc == "auto" else int(options.nproc)
        agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        return subprocess.run([*agent, "--", *sys.argv], check=False).returncode
    handed_on = argparse.Namespace(**rehearsal.vars_to_hand_on(options))
    rehearsal_ranks.Stopwatch = ProfiledStopwatch  # type: ignore[misc]
    outcome = Rehearsal(handed_on).run()
    if outcome is not None:
        print(describe(outcome))
    return 0


if __name__ == "__main__":
    sys.exit(main())
