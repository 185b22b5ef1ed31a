"""What `hf-qlora-fsdp train` runs: a file of options, or a few flags, become a trained adapter.

    this process                       N processes, started by torch's agent, or all there is under a launcher
    read_request  names and values     load_data           the same rows on every rank
    check, read   conditions, data     QLoRAFSDPTrainer    load, quantise, shard
    run_workers   start them           trainer.train       a bar, or lines (`progress.py`)
    exit_code     pass theirs on       save, summarise     a PEFT adapter, and what to do with it

What can be seen to be wrong without a model is seen before any process is started: names (`command_line.py`), numbers
(`ranges.py`), files, and a Hub that cannot be reached (`conditions.py`). Whatever is wrong is said once and ends with
exit code 2, and what does not fit with 1.

SIGTERM and SIGUSR1 are handed on to the workers, which finish the step, save a checkpoint and exit with 75; so does
this process then, and the same command with `--resume_from_checkpoint True` goes on.
"""

from __future__ import annotations

import contextlib
import logging
import shlex
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..launch import default_num_processes, is_worker, run_workers
from ..units import format_bytes, format_seconds, format_table

if TYPE_CHECKING:
    from .arguments import Request

_PACKAGE = str(__package__).partition(".")[0]
_HANDED_ON = (signal.SIGTERM, signal.SIGUSR1)
_SECONDS_FOR_RANK_0 = 5
"""How long the other ranks wait before they say what rank 0, if it failed for the same reason, has said by then."""


# -- this process ----------------------------------------------------------------------------------------------------


def launch(arguments: Sequence[str]) -> int:
    """Train, in processes of its own or as one of a launcher's.

    Args:
        arguments (`Sequence[str]`): What follows `train` on the command line.
    Returns:
        `int`: Exit code: 0; 2 if what was asked for cannot work; 75 if a signal ended the run and it was saved; that of
            the worker that failed otherwise.
    Raises:
        ValueError: What was asked for cannot work, and no process was started.
        SystemExit: `--help` was asked for.
    """
    if is_worker():
        return take_part(arguments)
    from .command_line import read_request
    from .conditions import check_conditions

    request = read_request(arguments)
    quieten(sys.stdout.isatty())
    check_conditions(request)
    read_data(request)
    num_processes = _num_processes(request)
    with _agent_silenced():
        failed = run_workers("hf_qlora_fsdp.train.command", arguments, num_processes, handed_on=_HANDED_ON)
    return exit_code(failed)


@contextlib.contextmanager
def _agent_silenced() -> Iterator[None]:
    """Leave it to the workers, and to `exit_code`, to say how they ended: torch's agent would have the last word."""
    log = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def quieten(with_bars: bool) -> None:
    """Let only a terminal have the bars of datasets that are read and prepared, and only one rank.

    A warning of transformers that is meant for PEFT and TRL (1.16), which read a property by its old name, is left out.
    """
    from datasets import disable_progress_bars

    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    if not with_bars:
        disable_progress_bars()


def read_data(request: Request) -> tuple[Any, Any]:
    """Return the rows to train on, and to evaluate on or `None`."""
    from .data import load_data

    strategy = request.training.get("eval_strategy", "no")
    return load_data(
        request.data,
        request.mixture,
        eval_name=request.data.eval_dataset_name,
        form=request.data.dataset_format,
        evaluate=getattr(strategy, "value", strategy) != "no",
        seed=request.training.get("seed", 42),
        text_field=request.training.get("dataset_text_field", "text"),
    )


def _num_processes(request: Request) -> int:
    nproc = request.run.nproc
    if nproc == "auto":
        return 2 if request.training.get("use_cpu") else default_num_processes()
    if not nproc.isdecimal() or int(nproc) < 1:
        raise ValueError(f"--nproc {nproc} is no number of processes. Give 1 or more, or auto.")
    return int(nproc)


def exit_code(failed: Mapping[int, int]) -> int:
    """Return the exit code for a run whose workers ended so, as a shell would: 128 and the signal that killed one.

    Args:
        failed (`Mapping[int, int]`): Of `run_workers`.
    """
    killed = {rank: -code for rank, code in failed.items() if code < 0}
    for rank, number in killed.items():
        why = " Linux does so when the host or the cgroup runs out of memory." if number == signal.SIGKILL else ""
        print(f"Rank {rank} was ended by {signal.Signals(number).name}.{why}", file=sys.stderr)
    if killed:
        return 128 + next(iter(killed.values()))
    return failed[min(failed)] if failed else 0


# -- the N processes -------------------------------------------------------------------------------------------------


def take_part(arguments: Sequence[str]) -> int:
    """Train, as one of the ranks.

    Args:
        arguments (`Sequence[str]`): What follows `train` on the command line.
    Returns:
        `int`: Exit code: 0; 1 if a file, a connection or another rank failed; 2 if what was asked for cannot work; 130
            if it was interrupted.
    Raises:
        SystemExit: A signal ended the run and it was saved (75), or `--help` was asked for (0).
    """
    from ..errors import RankError, exit_code_of
    from ..ranks import rank

    run: Run | None = None
    try:
        run = Run(arguments)
        run.load()
        run.train()
    except (ValueError, OSError, RankError) as error:
        surprising = run is not None and not _is_ours(error)
        if surprising and run is not None and run.trainer is not None:
            raise  # in the middle of training no option is to blame
        if rank() != 0:  # as a rule all fail for one reason, and the first to end makes the launcher end the others
            time.sleep(_SECONDS_FOR_RANK_0)
        if surprising:
            traceback.print_exception(error)
        print(f"hf-qlora-fsdp: {error}", file=sys.stderr, flush=True)
        return exit_code_of(error)
    except KeyboardInterrupt:  # a terminal sends it to every rank, and each would show where it was
        if rank() == 0:
            print("hf-qlora-fsdp: interrupted. What was saved last can be gone on from.", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT
    return 0


def _is_ours(error: BaseException) -> bool:
    """Return whether this package raised an error itself, in words for the user."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and str(frame.tb_frame.f_globals.get("__package__")).partition(".")[0] == _PACKAGE


class Run:
    """One rank's part in a run. What was asked for is read and checked when it is made, then it loads and trains.

    Args:
        arguments (`Sequence[str]`): What follows `train` on the command line.
    Raises:
        ValueError: They cannot work.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        from ..ranks import fail_together, log_once, rank, world_size
        from .command_line import read_request
        from .conditions import check_conditions
        from .progress import Progress

        self.began = time.monotonic()
        self.request = request = read_request(arguments)
        self.args = request.training_arguments()
        if request.run.nproc not in ("auto", str(world_size())):
            raise ValueError(
                f"--nproc {request.run.nproc} in a run of {world_size()} processes that a launcher has started: it can "
                "start no others. Leave it out, or start the command without a launcher."
            )
        self.with_bar = sys.stdout.isatty() and not self.args.disable_tqdm
        quieten(self.with_bar and rank() == 0)
        for note in request.notes:
            log_once("%s", note)
        with fail_together("reading the data"):
            check_conditions(request)
            self.train_data, self.eval_data = read_data(request)
        self.trainer: Any = None
        self.progress = Progress(self.args.device, self.with_bar)

    def load(self) -> None:
        """Load the model and make the trainer. Every rank calls it."""
        from transformers.trainer_callback import PrinterCallback, ProgressCallback
        from trl import get_peft_config

        from ..trainer import QLoRAFSDPTrainer
        from .data import check_prepared

        trainer = QLoRAFSDPTrainer(
            model=str(self.request.model.model_name_or_path),
            args=self.args,
            train_dataset=self.train_data,
            eval_dataset=self.eval_data,
            peft_config=get_peft_config(self.request.model),
        )
        check_prepared(trainer.train_dataset, self.train_data, self.args)
        if self.eval_data is not None:
            check_prepared(trainer.eval_dataset, self.eval_data, self.args, evaluation=True)
        for theirs in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(theirs)
        trainer.add_callback(self.progress)
        self.trainer = trainer

    def train(self) -> None:
        """Train, save the adapter, and say how it went. Every rank calls it."""
        from .conditions import parse_checkpoint

        try:
            self.trainer.train(resume_from_checkpoint=parse_checkpoint(self.args.resume_from_checkpoint))
        except SystemExit:  # a signal ended the run, which has curves as well
            self._draw()
            raise
        self.trainer.save_model(self.args.output_dir)
        self._draw()
        self._summarise()

    def _draw(self) -> None:
        if self.request.run.plot is None or not self.trainer.is_world_process_zero():
            return
        from .curves import draw_curves

        title = f"{self.request.model.model_name_or_path}, LoRA r={self.request.model.lora_r}"
        draw_curves(self.trainer.state.log_history, self.progress.samples, title, self.request.run.plot)

    def _summarise(self) -> None:
        """Print what was done and what to do next, on rank 0; memory is that of all ranks."""
        import torch.distributed as dist

        trainer, progress, seconds = self.trainer, self.progress, time.monotonic() - self.began
        peaks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(peaks, progress.peak_bytes)
        if not trainer.is_world_process_zero():
            return
        card, host = max(peak[0] for peak in peaks), sum(peak[1] for peak in peaks)
        memory = [f"{format_bytes(card)} on the fullest card"] * bool(card) + [f"{format_bytes(host)} of the host"]
        ranks = f"{len(peaks)} rank{'s' * (len(peaks) > 1)}"
        now, num_steps = len(progress.samples), str(trainer.state.global_step)
        if not now:
            num_steps += ", all of them before it was resumed"
        elif now < trainer.state.global_step:
            num_steps += f", {now} of them since it was resumed"
        tokens = f"{progress.num_tokens:,}, {progress.tokens_per_second:,.0f} a second on {ranks}" if now else ""
        model, folder = str(self.request.model.model_name_or_path), str(self.args.output_dir)
        rows = [
            ("steps", f"{num_steps}, in {format_seconds(seconds)} with loading"),
            ("tokens", tokens),
            ("loss", _describe_loss(trainer.state.log_history)),
            ("peak memory", ", ".join(memory)),
            ("adapter", folder),
            ("curves", self.request.run.plot or ""),
            ("next", shlex.join(["hf-qlora-fsdp", "merge", model, folder, f"{folder.rstrip('/')}-merged"])),
        ]
        print(format_table([row for row in rows if row[1]], title="trained"), flush=True)


def _describe_loss(history: Sequence[Mapping[str, Any]]) -> str:
    losses = [entry["loss"] for entry in history if "loss" in entry]
    if losses:
        return f"{losses[0]:.4g} at first, {losses[-1]:.4g} at last"
    means = [entry["train_loss"] for entry in history if "train_loss" in entry]  # fewer steps than logging_steps
    return f"{means[-1]:.4g} on average" if means else "not logged"


if __name__ == "__main__":
    sys.exit(take_part(sys.argv[1:]))
