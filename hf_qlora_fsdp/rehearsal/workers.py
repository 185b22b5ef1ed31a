"""What each rank of a rehearsal does: train as a script would, with a trace of memory and a stopwatch beside it."""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import AutoConfig, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

from ..config import QLoRAFSDPConfig
from ..errors import DoesNotFitError
from ..memory_trace import COLUMNS, MemoryTrace
from ..ranks import rank, world_size
from ..sharding import base_model
from ..speed.matmul_share import count_multiplications, measure_matmul_rate
from ..summary import count_parameters
from ..trainer import QLoRAFSDPTrainer
from ..units import parse_bytes
from .memory_cap import FIRST_STEP_BYTES, LATER_BYTES, MemoryCap
from .shortage import describe_refusal, describe_shortage, is_out_of_memory

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")
_WARM_UP_STEPS = 3
"""Steps that are not timed, of at least twice as many: kernels are chosen and caches filled in them."""


class Rehearsal:
    """A few steps of training on random weights, measured.

    Args:
        options (`argparse.Namespace`): Of `command.add_arguments`, checked.
        heartbeat (`Path`, *optional*): See `MemoryTrace`.
    """

    def __init__(self, options: argparse.Namespace, heartbeat: Path | None = None) -> None:
        self.options, self.heartbeat = options, heartbeat
        self.device = torch.device("cpu")
        self.trace: MemoryTrace | None = None
        self.cap: MemoryCap | None = None
        self.matmul_rate = 0.0
        self.retries_before = 0

    def run(self) -> dict[str, Any] | None:
        """Load, train and measure. A collective.

        Returns:
            `dict`, *optional*: The result, on rank 0.
        Raises:
            ValueError: The model cannot be loaded so, or an option cannot work.
            RuntimeError: Memory was missing, among others.
        """
        with tempfile.TemporaryDirectory() as folder:
            args = self._arguments(folder)
            if not args.use_cpu:
                self.device = torch.device("cuda", torch.cuda.current_device())
            self.trace = MemoryTrace(self.device, heartbeat=self.heartbeat)
            # Before there is a cap: it takes 0.4 GiB, which the run itself may not have.
            self.matmul_rate = measure_matmul_rate(self.device, args.compute_dtype)
            if self.options.device_memory:
                self.cap = MemoryCap(parse_bytes(self.options.device_memory), self.device)
            watch = Stopwatch(self)
            self.trace.begin("load")
            trainer = QLoRAFSDPTrainer(
                self.options.model,
                args,
                train_dataset=self._data(),
                processing_class=make_tokenizer(),
                peft_config=self._adapter(),
                callbacks=[watch],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.remove_callback(trainer.preemption)  # a signal ends a rehearsal at once; there is nothing to save
            self.begin("first step")
            trainer.train()
            self.trace.stop()
            return self._result(trainer, watch)

    def begin(self, phase: str) -> None:
        """Begin a phase, with the cap adjusted to what the one before has left on the card."""
        assert self.trace is not None
        self.trace.begin(phase)
        self.retries_before = self._count_retries()
        if self.cap is not None:
            self.cap.settle(LATER_BYTES if phase == "steady" else FIRST_STEP_BYTES)

    def describe_failure(self, error: Exception) -> dict[str, Any] | None:
        """Return a failure as an outcome, if it is one that a rehearsal is there to find."""
        refused = isinstance(error, ValueError)
        if not refused and not is_out_of_memory(error):
            return None
        phase = self.trace.phase if self.trace else "start"
        failure = {"rank": rank(), "phase": phase, "reason": "refused", "said": str(error), "time": time.time()}
        if not refused:
            failure["reason"] = "out of memory"
            failure |= describe_shortage(error, phase, self.options, self.device)
        elif isinstance(error, DoesNotFitError) and error.place is not None:
            failure |= describe_refusal(error, self.options)
        if self.trace is not None:
            self.trace.stop()
        mine = self._measured()
        return {"fits": False, "failure": failure, **self._header(), **combine([mine])}

    # -- what is trained ---------------------------------------------------------------------------------------------

    def _arguments(self, folder: str) -> QLoRAFSDPConfig:
        options = self.options
        model_options: dict[str, Any] = {"random_weights": True}
        if options.attn_implementation:
            model_options["attn_implementation"] = options.attn_implementation
        return QLoRAFSDPConfig(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            gradient_accumulation_steps=options.grad_accumulation,
            gradient_checkpointing=not options.no_gradient_checkpointing,
            activation_offloading=options.activation_offloading,
            param_dtype=options.param_dtype,
            expert_chunk=options.expert_chunk,
            fuse_lora=not options.no_fuse_lora,
            use_liger_kernel=options.use_liger_kernel,
            cpu_offload=options.cpu_offload,
            cpu_offload_pin_memory=not options.no_pin,
            cpu_offload_layers=options.cpu_offload_layers,
            cpu_offload_dir=options.cpu_offload_dir,
            replicate_layers=options.replicate_layers,
            model_init_kwargs=model_options,
            trust_remote_code=options.trust_remote_code,
            max_length=None,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )

    def _adapter(self) -> LoraConfig:
        names = self.options.target_modules
        targets = "all-linear" if names == ["all-linear"] else names
        rank_ = self.options.lora_r
        return LoraConfig(r=rank_, lora_alpha=2 * rank_, target_modules=targets, task_type="CAUSAL_LM")

    def _data(self) -> Dataset:
        """Random tokens. A long run sees the same ones again, which costs as much and takes less memory."""
        options = self.options
        config = AutoConfig.from_pretrained(options.model, trust_remote_code=options.trust_remote_code)
        num_rows = options.batch * options.grad_accumulation * min(options.steps, 8) * world_size()
        generator = torch.Generator().manual_seed(0)
        vocab_size = config.get_text_config().vocab_size
        tokens = torch.randint(vocab_size, (num_rows, options.seq), generator=generator).tolist()
        return Dataset.from_dict({"input_ids": tokens, "labels": tokens})

    # -- what is measured --------------------------------------------------------------------------------------------

    def _measured(self) -> dict[str, Any]:
        """Return this rank's part."""
        trace = self.trace
        mine: dict[str, Any] = {"rank": rank(), "phases": [], "samples": []}
        if trace is not None:
            mine |= {"phases": [phase for phase in trace.phases if "peaks" in phase], "samples": trace.thinned()}
        if self.cap is not None:
            mine["outside"] = self.cap.first_outside_bytes, self.cap.outside_bytes
        return mine | {"matmul_rate": self.matmul_rate, "retries": self._count_retries() - self.retries_before}

    def _count_retries(self) -> int:
        """Return how often torch found no room so far, waited for the card, gave back what it had cached, and asked
        again."""
        if self.device.type != "cuda":
            return 0
        return torch.cuda.memory_stats(self.device).get("num_alloc_retries", 0)

    def _header(self) -> dict[str, Any]:
        on_gpu = self.device.type == "cuda"
        limit = self.cap.limit_bytes if self.cap else None
        return {
            "model": self.options.model,
            # Under torchrun they are those of the command line, `run` among them.
            "options": {name: value for name, value in vars(self.options).items() if name not in ("model", "run")},
            "world_size": world_size(),
            "device": torch.cuda.get_device_name(self.device) if on_gpu else "CPU",
            "device_bytes": torch.cuda.mem_get_info(self.device)[1] if on_gpu else None,
            "limit_bytes": limit,
            "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        }

    def _result(self, trainer: Any, watch: Stopwatch) -> dict[str, Any] | None:
        everybody: list[Any] = [None] * world_size()
        dist.all_gather_object(everybody, self._measured())
        if rank() != 0:
            return None
        options, report = self.options, trainer.model.load_report
        matmuls = count_multiplications(base_model(trainer.model))
        flops = matmuls.flops_per_token(options.seq, not options.no_gradient_checkpointing)
        timed = watch.seconds[min(_WARM_UP_STEPS, options.steps // 2) :]
        seconds = statistics.median(timed)
        rate = options.seq * options.batch * options.grad_accumulation / seconds
        matmul_rate = statistics.mean(mine["matmul_rate"] for mine in everybody)
        outcome = {
            **self._header(),
            **combine(everybody),
            "parameters": count_parameters(trainer.model),
            "load_seconds": report.seconds,
            "step_seconds": watch.seconds,
            "seconds_per_step": seconds,
            "num_timed_steps": len(timed),
            "tokens_per_second_per_device": rate,
            "flops_per_token": flops,
            "matmul_flops_per_second": matmul_rate,
            "matmul_share": rate * flops / matmul_rate,
            "allocator_retries": max(mine["retries"] for mine in everybody),
            "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        }
        used = max(phase["peaks"]["used"] for phase in outcome["phases"])
        over = used - self.cap.limit_bytes if self.cap else 0
        return {"fits": over <= 0, "over_limit_bytes": max(over, 0), **outcome}


class Stopwatch(TrainerCallback):
    """Times each step, with the device drained before and after, and ends the phase of the first one.

    Args:
        rehearsal (`Rehearsal`): Whose phases they are.
    """

    def __init__(self, rehearsal: Rehearsal) -> None:
        self.rehearsal, self.began = rehearsal, 0.0
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._drain()
        if state.global_step > 0 and self.rehearsal.cap is not None:
            self.rehearsal.cap.settle()
        self.began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._drain()
        self.seconds.append(time.monotonic() - self.began)
        if rank() == 0:
            print(f"step {state.global_step} of {state.max_steps}: {self.seconds[-1]:.3g} s", flush=True)
        if state.global_step == 1:
            self.rehearsal.begin("steady")

    def _drain(self) -> None:
        if self.rehearsal.device.type == "cuda":
            torch.cuda.synchronize(self.rehearsal.device)


def combine(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Put together what the ranks measured: of the cards the fullest one, of the host the sum.

    The sum of the ranks' peaks, which need not be at one moment, is the most that the host can have been asked for.
    """
    phases = []
    for same in zip(*(mine["phases"] for mine in ranks), strict=False):
        peaks = {name: max(phase["peaks"][name] for phase in same) for name in ("allocated", "reserved", "used")}
        names = ("anonymous", "file", "shared", "pinned", "host")
        peaks |= {name: sum(phase["peaks"][name] for phase in same) for name in names}
        phases.append(
            {"name": same[0]["name"], "began": same[0]["began"], "seconds": same[0]["seconds"], "peaks": peaks}
        )
    outside = [mine["outside"] for mine in ranks if "outside" in mine]
    return {
        "phases": phases,
        "outside_allocator_bytes": [max(values) for values in zip(*outside, strict=True)],
        "trace": {"columns": COLUMNS, "ranks": {mine["rank"]: mine["samples"] for mine in ranks}},
    }


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that is never asked: the data are tokens already."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, "<pad>": 2}, merges=[])),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
