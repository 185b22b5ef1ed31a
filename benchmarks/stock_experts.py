"""What plain upstream makes of a mixture of experts: `rehearse`, but with transformers, TRL, PEFT and FSDP2 alone.

Takes the options of `hf-qlora-fsdp rehearse` that `experts.py` gives it, and writes the same figures. Nothing of
this package takes part but its stopwatch. Random weights are written to disk first, because `from_pretrained` reads
nothing else; that is not timed. "Matmul share" counts the multiplications of the same model as ours.

    python benchmarks/experts.py --row mixtral-4-layers --row mixtral-4-layers-stock --minutes 10
    python benchmarks/stock_experts.py CONFIG --seq 2048 --batch 1 --target-modules q_proj k_proj v_proj o_proj

The first makes the config of four layers itself, runs ours beside it, and records both: 100 s on two H200, most of them
for writing and reading 13 GB.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PrinterCallback
from trl import SFTConfig, SFTTrainer

from hf_qlora_fsdp.launch import default_num_processes, is_worker
from hf_qlora_fsdp.loading.adapters import inject_adapter
from hf_qlora_fsdp.loading.blueprint import build_quantized_meta_model
from hf_qlora_fsdp.memory_trace import MemoryTrace
from hf_qlora_fsdp.ranks import rank
from hf_qlora_fsdp.rehearsal import command as rehearsal
from hf_qlora_fsdp.rehearsal.report import present
from hf_qlora_fsdp.rehearsal.workers import Rehearsal, Stopwatch, make_tokenizer
from hf_qlora_fsdp.speed.matmul_share import measure_matmul_rate


class StockRehearsal(Rehearsal):
    """The same few steps, by upstream."""

    def run(self) -> dict[str, Any] | None:
        """Load, train and measure. A collective."""
        with tempfile.TemporaryDirectory() as folder:
            args = self._stock_arguments(folder)
            if not args.use_cpu:
                self.device = torch.device("cuda", torch.cuda.current_device())
            shared: list[Any] = [folder]
            if dist.is_initialized():
                dist.broadcast_object_list(shared)
            if rank() == 0:
                self._write_checkpoint(shared[0])
            if dist.is_initialized():
                dist.barrier()
            self.trace = MemoryTrace(self.device)
            self.matmul_rate = measure_matmul_rate(self.device, torch.bfloat16)
            watch = Stopwatch(self)
            self.trace.begin("load")
            began = time.monotonic()
            quantization = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
                bnb_4bit_quant_storage=torch.bfloat16,
            )
            model = AutoModelForCausalLM.from_pretrained(
                f"{shared[0]}/model", quantization_config=quantization, dtype=torch.bfloat16
            )
            load_seconds = time.monotonic() - began
            trainer = SFTTrainer(
                model=model,
                args=args,
                train_dataset=self._data(),
                processing_class=make_tokenizer(),
                peft_config=self._adapter(),
                callbacks=[watch],
            )
            trainer.remove_callback(PrinterCallback)
            self.begin("first step")
            trainer.train()
            self.trace.stop()
            outcome = self._result(SimpleNamespace(model=self._twin(load_seconds), state=trainer.state), watch)
            if outcome is not None:
                del outcome["parameters"]  # those in 4 bits are the twin's, not upstream's
            return outcome

    def _stock_arguments(self, folder: str) -> SFTConfig:
        options = self.options
        return SFTConfig(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            gradient_accumulation_steps=options.grad_accumulation,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            bf16=True,
            fsdp=True,
            fsdp_config={"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"},
            use_cpu=not torch.cuda.is_available(),
            max_length=None,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )

    def _write_checkpoint(self, folder: str) -> None:
        config = AutoConfig.from_pretrained(self.options.model)
        num_bytes = 2 * self._twin(0).num_parameters()
        if shutil.disk_usage(folder).free < num_bytes:
            raise ValueError(f"{folder} has no room for {num_bytes:,} bytes. Set TMPDIR to a folder that has.")
        with self.device:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(f"{folder}/model")
        del model
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _twin(self, load_seconds: float) -> Any:
        """Return what this package would train, on the meta device: its matrices are counted."""
        twin = build_quantized_meta_model(self.options.model, None, torch.bfloat16, hub={})
        model: Any = inject_adapter(twin, self._adapter())
        model.load_report = SimpleNamespace(seconds=load_seconds)
        return model


def main() -> int:
    """Start the workers, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    rehearsal.add_arguments(parser)
    options = parser.parse_args()
    if not is_worker():
        count = default_num_processes() if options.nproc == "auto" else int(options.nproc)
        agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        return subprocess.run([*agent, *sys.argv], check=False).returncode
    handed_on = argparse.Namespace(**rehearsal.vars_to_hand_on(options))
    stock = StockRehearsal(handed_on)
    try:
        outcome = stock.run()
    except Exception as error:
        outcome = stock.describe_failure(error)
        if outcome is not None and options.json is not None:
            Path(options.json).write_text(json.dumps(outcome))
        raise
    return 0 if outcome is None else present(outcome, options.json, options.plot)


if __name__ == "__main__":
    sys.exit(main())
