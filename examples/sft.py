"""Supervised fine-tuning, written as for TRL: only the names of two classes and their import differ.

    torchrun --nproc_per_node 2 examples/sft.py \\
        --model meta-llama/Llama-3.1-70B-Instruct \\
        --dataset trl-lib/Capybara \\
        --packing --max_length 4096 \\
        --per_device_train_batch_size 1 --gradient_accumulation_steps 8 \\
        --output_dir llama-sft

`--model` is a Hub id or a folder, `--dataset` a Hub id or a JSONL file. Every field of `SFTConfig` is an option too.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from peft import LoraConfig
from trl import TrlParser

from hf_qlora_fsdp import QLoRAFSDPConfig, QLoRAFSDPTrainer


@dataclass
class ScriptArguments:
    """What is trained, and on what."""

    model: str = field(metadata={"help": "Hub id or folder of the model."})
    dataset: str = field(metadata={"help": "Hub id of the dataset, or a JSONL file."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})


def main() -> None:
    """Train and save."""
    script_args, training_args = TrlParser((ScriptArguments, QLoRAFSDPConfig)).parse_args_and_config()

    if script_args.dataset.endswith((".json", ".jsonl")):
        dataset = load_dataset("json", data_files=script_args.dataset, split="train")
    else:
        dataset = load_dataset(script_args.dataset, split="train")

    trainer = QLoRAFSDPTrainer(
        model=script_args.model,
        args=training_args,
        train_dataset=dataset,
        peft_config=LoraConfig(
            r=script_args.lora_r,
            lora_alpha=2 * script_args.lora_r,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
