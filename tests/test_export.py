"""What is saved is what is in memory, and what plain PEFT reads and writes. Resumed runs are in
resuming/test_resuming.py.

Every file is read back by code that is not this package's: safetensors, and `PeftModel.from_pretrained` on a plain
4-bit model in one process. Logits are compared in float32: 14 linear layers, each with sums of at most 256 terms, give
a bound of 14 sqrt(256) 2^-24 of the largest logit.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import training
from tests.distributed import RankPool
from tests.tiny import make_checkpoint

LOGIT_BOUND = 14 * 256**0.5 * 2**-24
TOKENS = [[7, 8, 9, 10, 60, 61, 62, 63]]
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), dtype=torch.float32)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("out"))


def logits_of(model: Any) -> torch.Tensor:
    model.eval()
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False  # bitsandbytes' evaluation in bfloat16, whatever the dtype
    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS)).logits.float()


# ---- Saving ----------------------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fsdp activation checkpointing": {"fsdp_config": {"activation_checkpointing": True}},
    "bfloat16": {"param_dtype": "bfloat16"},
}


def save_variants(rank: int, folder: str, out: str) -> dict[str, dict[str, Any]]:
    results = {}
    for name, changes in VARIANTS.items():
        changes = {"param_dtype": "float32", "save_strategy": "steps", "save_steps": 2, "max_steps": 3} | changes
        here = f"{out}/{name}"
        with training.listening() as said:
            trainer = training.ours(folder, training.equal_rows(8), {"folder": here, **changes})
            run = training.run(trainer)
        trainer.save_model(f"{here}/saved")
        results[name] = {"adapter": run.adapter, "logits": logits_of(trainer.model), "said": said}
    return results


@pytest.fixture(scope="module")
def saved(ranks: RankPool, folder: str, out: str) -> list[dict[str, dict[str, Any]]]:
    return ranks.run(save_variants, folder, out)


def load_plainly(rank: int, folder: str, out: str) -> dict[str, torch.Tensor]:
    """Load each adapter as its user will: one process, no code of this package."""
    from peft import PeftModel

    results = {}
    for name in VARIANTS:
        base = training.plain_model(folder, torch.float32)
        results[name] = logits_of(PeftModel.from_pretrained(base, f"{out}/{name}/saved"))
    results["base"] = logits_of(training.plain_model(folder, torch.float32))
    return results


@pytest.fixture(scope="module")
def plain_logits(saved: list[dict[str, dict[str, Any]]], folder: str, out: str) -> dict[str, torch.Tensor]:
    return training.alone().run(load_plainly, folder, out)[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_saved_tensor_is_the_one_in_memory(
    saved: list[dict[str, dict[str, Any]]], out: str, variant: str
) -> None:
    written = load_file(f"{out}/{variant}/saved/{ADAPTER}")
    in_memory = saved[0][variant]["adapter"]
    assert len(written) == 2 * 7 * 2
    assert written.keys() == in_memory.keys()
    for name, tensor in written.items():
        assert torch.equal(tensor, in_memory[name]), name
        assert tensor.dtype == torch.float32


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "bfloat16"])
def test_plain_peft_computes_the_trained_models_logits(
    saved: list[dict[str, dict[str, Any]]], plain_logits: dict[str, torch.Tensor], variant: str
) -> None:
    atol = LOGIT_BOUND * plain_logits[variant].abs().max().item()
    for result in saved:
        assert torch.allclose(result[variant]["logits"], plain_logits[variant], rtol=0, atol=atol)
    assert (plain_logits[variant] - plain_logits["base"]).abs().max() > 1000 * atol, "the adapter must matter"


def test_checkpoints_hold_the_adapter_and_not_the_base(saved: list[dict[str, dict[str, Any]]], out: str) -> None:
    checkpoint = Path(out, "plain", "checkpoint-2")
    assert load_file(checkpoint / ADAPTER).keys() == load_file(Path(out, "plain", "saved", ADAPTER)).keys()
    names = {path.name for path in checkpoint.iterdir()}
    assert names == {
        ADAPTER,
        "adapter_config.json",
        "base_quantization.json",
        "optimizer.safetensors",
        "optimizer.json",
        "scheduler.json",
        "random_states.safetensors",
        "trainer_state.json",
        "training_args.json",
        "manifest.json",
        "README.md",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    trained_bytes = sum(tensor.nbytes for tensor in load_file(checkpoint / ADAPTER).values())
    largest = max(path.stat().st_size for path in checkpoint.iterdir())
    assert largest < 2 * trained_bytes + 20_000, "two Adam states and a header; the base would be twice that"
    assert json.loads((checkpoint / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert (Path(out, "plain", "saved") / "tokenizer.json").is_file()


def test_fsdp_activation_checkpointing_becomes_the_other_one(saved: list[dict[str, dict[str, Any]]]) -> None:
    assert [line for line in saved[0]["fsdp activation checkpointing"]["said"] if "gradient_checkpointing=True" in line]


# ---- Never an empty adapter ------------------------------------------------------------------------------------------


def freeze_and_save(rank: int, folder: str, out: str) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    from hf_qlora_fsdp import QLoRAFSDPConfig, QLoRAFSDPTrainer

    trainer = training.ours(folder, training.equal_rows(8), {"folder": out})
    trainer.model.requires_grad_(False)
    frozen_later = training.refusal(trainer.save_model, f"{out}/frozen")

    def start(model: Any) -> None:
        args = QLoRAFSDPConfig(**training.arguments(out))
        QLoRAFSDPTrainer(model, args, train_dataset=training.equal_rows(8)).train()

    def adapted() -> Any:
        return get_peft_model(training.plain_model(folder, torch.bfloat16), LoraConfig(**training.LORA))

    frozen = adapted()
    frozen.requires_grad_(False)
    wrapped = adapted()
    apply_activation_checkpointing(wrapped, check_fn=lambda module: isinstance(module, LlamaDecoderLayer))
    return {
        "frozen later": frozen_later,
        "frozen": training.refusal(start, frozen),
        "wrapped": training.refusal(start, wrapped),
        "files": os.path.exists(f"{out}/frozen/{ADAPTER}"),
    }


@pytest.fixture(scope="module")
def empty(ranks: RankPool, folder: str, out: str) -> list[dict[str, Any]]:
    return ranks.run(freeze_and_save, folder, out)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("frozen later", ["No parameter", "is_trainable=True"]),
        ("frozen", ["No parameter", "is_trainable=True"]),
        ("wrapped", ["28 tensors are trained", "_checkpoint_wrapped_module", "gradient_checkpointing=True"]),
    ],
)
def test_an_adapter_without_tensors_is_refused(empty: list[dict[str, Any]], case: str, words: list[str]) -> None:
    """Plain PEFT writes 40 bytes for a model whose layers were wrapped; here the trainer says so when it is made."""
    for result in empty:
        kind, message = result[case]
        assert kind == "EmptyAdapterError", message
        assert not result["files"]
        for word in words:
            assert word in message


def test_what_is_written_is_found_in_as_many_walks_for_any_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """One walk for each trained tensor took 20 s of the start of a 70B model, and of each of its checkpoints."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_qlora_fsdp.export import check_exportable

    walk, walks = torch.nn.Module.named_parameters, {1: 0, 4: 0}
    for depth in walks:
        config = LlamaConfig(num_hidden_layers=depth, hidden_size=32, intermediate_size=32, num_attention_heads=2)
        model = get_peft_model(LlamaForCausalLM(config), LoraConfig(**training.LORA))
        walked: list[bool] = []

        def counted(module: Any, *args: Any, model: Any = model, walked: list[bool] = walked, **options: Any) -> Any:
            walked.append(module is model)
            return walk(module, *args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.Module, "named_parameters", counted)
            check_exportable(model)
        walks[depth] = sum(walked)
    assert walks[1] == walks[4] > 0


# ---- Reading back ----------------------------------------------------------------------------------------------------


def write_plainly(rank: int, folder: str, path: str) -> torch.Tensor:
    """Write an adapter with plain PEFT, B drawn at random, and return its logits."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(training.plain_model(folder, torch.float32), LoraConfig(**training.LORA))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.05 * torch.randn_like(parameter)
    model.save_pretrained(path)
    return logits_of(model)


def read_back(rank: int, folder: str, path: str, out: str) -> dict[str, Any]:
    from hf_qlora_fsdp.export import load_adapter

    changes = {"folder": out, "param_dtype": "float32"}
    trainer = training.ours(folder, training.equal_rows(8), changes)
    load_adapter(trainer.model, path)
    logits = logits_of(trainer.model)
    smaller = training.ours(folder, training.equal_rows(8), changes, {"r": 4})
    fewer = training.ours(folder, training.equal_rows(8), changes, {"target_modules": ["q_proj", "v_proj"]})
    return {
        "logits": logits,
        "r": training.refusal(load_adapter, smaller.model, path),
        "targets": training.refusal(load_adapter, fewer.model, path),
        "resume r": training.refusal(smaller.train, resume_from_checkpoint=f"{out}/plain/checkpoint-2"),
        "args": json.loads(Path(out, "plain", "saved", "training_args.json").read_text()),
        "nothing there": training.refusal(load_adapter, trainer.model, out),
    }


@pytest.fixture(scope="module")
def read(
    ranks: RankPool, saved: list[dict[str, dict[str, Any]]], folder: str, out: str
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    path = f"{out}/plain-peft"
    written = training.alone().run(write_plainly, folder, path)[0]
    return written, ranks.run(read_back, folder, path, out)


def test_an_adapter_of_plain_peft_loads_here(read: tuple[torch.Tensor, list[dict[str, Any]]]) -> None:
    written, results = read
    for result in results:
        assert torch.allclose(result["logits"], written, rtol=0, atol=LOGIT_BOUND * written.abs().max().item())


def test_the_arguments_are_saved(read: tuple[torch.Tensor, list[dict[str, Any]]]) -> None:
    assert {"learning_rate": 5e-3, "param_dtype": "float32", "max_steps": 3}.items() <= read[1][0]["args"].items()


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("r", ["[8, 128]", "[4, 128]", "peft_config"]),
        ("resume r", ["r=8", "peft_config now has 4", "Set r=8"]),
        ("targets", ["0 and 20 tensors", "down_proj", "peft_config"]),
        ("nothing there", ["no adapter_model.safetensors", "checkpoint"]),
    ],
)
def test_another_adapter_is_refused(
    read: tuple[torch.Tensor, list[dict[str, Any]]], case: str, words: list[str]
) -> None:
    for result in read[1]:
        kind, message = result[case]
        assert kind == "ValueError", message
        for word in words:
            assert word in message


def save_only_the_model(rank: int, folder: str, out: str) -> dict[str, Any]:
    changes = {"folder": out, "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    whole = training.run(training.ours(folder, training.equal_rows(8), changes))
    with training.listening() as said:
        trainer = training.ours(folder, training.equal_rows(8), changes)
        rest = training.run(trainer, resume_from_checkpoint=f"{out}/checkpoint-1")
    return {"losses": (whole.losses, rest.losses), "said": said, "files": sorted(os.listdir(f"{out}/checkpoint-1"))}


def test_save_only_model(ranks: RankPool, folder: str, tmp_path: Path) -> None:
    result = ranks.run(save_only_the_model, folder, str(tmp_path))[0]
    assert ADAPTER in result["files"]
    assert not [name for name in result["files"] if name.startswith(("optimizer", "scheduler", "random"))]
    assert [line for line in result["said"] if "without optimizer states" in line]
    assert result["losses"][0] == result["losses"][1]
