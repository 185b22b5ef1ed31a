"""`QLoRAFSDPTrainer` against plain `SFTTrainer`, and every way into it.

**The reference** is `training.stock`: SFTTrainer, bitsandbytes and PEFT in one process, with the model whole and no
code of this package. accelerate deals batches to ranks in turn (`BatchSamplerShard`), so two ranks with a batch of one
see in each step the two rows that one process with a batch of two sees.

**The bounds.** In float32, a sum of K terms carries a rounding error of about sqrt(K) times the unit roundoff; the
longest sums here are the 256 products of `down_proj`, and each of the n steps starts from the weights that the rounding
of the steps before has moved. Relative bound: n sqrt(256) 2^-24, 2e-5 for 20 steps; a gradient that is not reduced, or
reduced in bfloat16, shows at 1e-3. In bfloat16 two runs are two roundings of one float32 trajectory, which is known,
and stray from it by chance and equally far. Errors stay in the weights, so a trajectory is only a few independent
draws; with four of them the mean squares of two such runs differ sixteenfold once in a hundred times (F test).
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import training
from tests.distributed import RankPool
from tests.tiny import HIDDEN_SIZE, VOCAB_SIZE, make_checkpoint, make_model, tiny_dataset

NUM_STEPS = 20


def bound(num_steps: int) -> float:
    return num_steps * 256**0.5 * 2**-24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), dtype=torch.float32)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("out"))


# ---- Trajectories ----------------------------------------------------------------------------------------------------


def train_ours(rank: int, folder: str, specs: dict[str, dict[str, Any]]) -> dict[str, training.Run]:
    """Train once a spec: `rows` and `peft` of a spec say what, the rest are arguments."""
    from hf_qlora_fsdp.speed.fused_norms import FusedNorm
    from hf_qlora_fsdp.speed.fusion import FusedLora

    runs = {}
    for name, spec in specs.items():
        changes = dict(spec)
        rows, peft = changes.pop("rows", "equal"), changes.pop("peft", None)
        changes |= {"eval_strategy": "steps", "eval_steps": 3}
        trainer = training.ours(folder, make_rows(rows), changes, peft, eval_dataset=training.equal_rows(3))
        first = training.adapter_of(trainer.model)
        runs[name] = training.run(trainer)
        runs[name].extra = {
            "eval_losses": [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log],
            "num_fused": [
                sum(isinstance(module.forward, kind) for module in trainer.model.modules())
                for kind in (FusedLora, FusedNorm)
            ],
            "first": first,
            "trained_dtypes": {p.dtype for p in trainer.model.parameters() if p.requires_grad},
            "state_dtypes": {s["exp_avg"].dtype for s in trainer.optimizer.optimizer.state.values()}
            | {s["exp_avg_sq"].dtype for s in trainer.optimizer.optimizer.state.values()},
            "num_states": len(trainer.optimizer.optimizer.state),
            "devices": {p.device.type for p in trainer.model.parameters()},
            "checkpointed": trainer.model.is_gradient_checkpointing,
        }
    return runs


def train_stock(
    rank: int, folder: str, specs: dict[str, dict[str, Any]], firsts: dict[str, Any]
) -> dict[str, training.Run]:
    """Train plain TRL once a spec, from the same adapter, with the batches of both ranks in one."""
    runs = {}
    for name, spec in specs.items():
        changes = {key: value for key, value in spec.items() if key not in ("rows", "peft", "param_dtype")}
        changes["per_device_train_batch_size"] = 2 * changes.get("per_device_train_batch_size", 1)
        dtype = torch.float32 if spec.get("param_dtype") == "float32" else torch.bfloat16
        trainer = training.stock(folder, make_rows(spec.get("rows", "equal")), changes, dtype, spec.get("peft"))
        training.fill_adapter(trainer.model, firsts[name])
        runs[name] = training.run(trainer)
    return runs


def make_rows(kind: str) -> Any:
    return training.equal_rows(8) if kind == "equal" else tiny_dataset(8, kind)


@pytest.fixture(scope="module")
def trajectories(ranks: RankPool, folder: str, out: str) -> dict[str, training.Run]:
    base = {"folder": out, "max_steps": NUM_STEPS}
    specs = {
        "float32": base | {"param_dtype": "float32"},
        "bfloat16": base,
        "offload": base | {"cpu_offload": True, "cpu_offload_pin_memory": False},
        "checkpointing": base | {"gradient_checkpointing": True},
        "gathered": base | {"reshard_after_forward": False},
        "unfused": base | {"param_dtype": "float32", "fuse_lora": False},
    }
    whole = {name: specs[name] for name in ("float32", "bfloat16")}
    ours = ranks.run(train_ours, folder, specs)[0]
    firsts = {name: run.extra["first"] for name, run in ours.items()}
    alone = training.alone()
    one = alone.run(train_ours, folder, {n: s | {"per_device_train_batch_size": 2} for n, s in whole.items()})[0]
    reference = alone.run(train_stock, folder, whole, firsts)[0]
    return ours | {f"one {n}": r for n, r in one.items()} | {f"stock {n}": r for n, r in reference.items()}


def assert_close(run: training.Run, reference: training.Run, num_steps: int) -> None:
    assert len(run.losses) == len(reference.losses) == num_steps
    assert run.losses == pytest.approx(reference.losses, rel=bound(num_steps), abs=0)
    assert run.grad_norms == pytest.approx(reference.grad_norms, rel=bound(num_steps), abs=0)


def test_the_model_learns(trajectories: dict[str, training.Run]) -> None:
    """Without this, equal trajectories could be equal because nothing moves."""
    for name, run in trajectories.items():
        assert run.losses[-1] < run.losses[0] - 1, name


def test_layers_run_fused_unless_told_otherwise(trajectories: dict[str, training.Run]) -> None:
    assert trajectories["float32"].extra["num_fused"] == [2 * 7, 2 * 2 + 1]
    assert trajectories["unfused"].extra["num_fused"] == [0, 0]
    assert_close(trajectories["float32"], trajectories["unfused"], NUM_STEPS)


def test_two_processes_of_one_equal_one_process_of_two_in_float32(trajectories: dict[str, training.Run]) -> None:
    assert_close(trajectories["float32"], trajectories["one float32"], NUM_STEPS)


@pytest.mark.parametrize("run", ["float32", "one float32"])
def test_trajectory_equals_plain_trl_in_float32(trajectories: dict[str, training.Run], run: str) -> None:
    assert_close(trajectories[run], trajectories["stock float32"], NUM_STEPS)


@pytest.mark.parametrize("run", ["bfloat16", "one bfloat16"])
@pytest.mark.parametrize("what", ["losses", "grad_norms"])
def test_bfloat16_strays_from_float32_no_further_than_plain_trl(
    trajectories: dict[str, training.Run], run: str, what: str
) -> None:
    truth, mine, theirs = (
        torch.tensor(getattr(trajectories[name], what)) for name in ("one float32", run, "stock bfloat16")
    )
    stray = (theirs - truth).square().mean()
    assert stray.sqrt() < 0.05 * truth.mean(), "the bound itself must say something"
    assert (mine - truth).square().mean() < 16 * stray


@pytest.mark.parametrize("run", ["offload", "checkpointing", "gathered"])
def test_memory_savers_change_no_bit(trajectories: dict[str, training.Run], run: str) -> None:
    assert trajectories[run].losses == trajectories["bfloat16"].losses
    assert trajectories[run].grad_norms == trajectories["bfloat16"].grad_norms
    evaluated = trajectories[run].extra["eval_losses"]
    assert evaluated == trajectories["bfloat16"].extra["eval_losses"] and evaluated[-1] < evaluated[0]
    for name, tensor in trajectories["bfloat16"].adapter.items():
        assert torch.equal(trajectories[run].adapter[name], tensor), name
    assert trajectories[run].extra["checkpointed"] == (run == "checkpointing")


def test_losses_are_not_rounded_to_bfloat16(trajectories: dict[str, training.Run]) -> None:
    """TRL divides the sum over all tokens by their number. Upstream's sum is a bfloat16: test_seams.py shows it."""
    losses = torch.tensor(trajectories["bfloat16"].losses, dtype=torch.float64)
    sums = losses * training.TOKENS_A_STEP
    assert ((sums - sums.round()).abs() > 1e-3).sum() > NUM_STEPS / 2
    assert (losses.bfloat16() != losses).all()


def test_masters_and_adam_states_are_float32(trajectories: dict[str, training.Run]) -> None:
    extra = trajectories["bfloat16"].extra
    assert extra["trained_dtypes"] == extra["state_dtypes"] == {torch.float32}
    assert extra["num_states"] == 2 * 7 * 2  # layers, linears, A and B


# ---- What SFTTrainer does, done here as there ------------------------------------------------------------------------

FEATURES: dict[str, dict[str, Any]] = {
    "unequal rows": {"rows": "text"},
    "accumulation": {"rows": "text", "gradient_accumulation_steps": 2},
    "clipping": {"max_grad_norm": 0.05},
    "packing": {"rows": "text", "packing": True, "packing_strategy": "bfd", "max_length": 64},
    "padding-free": {"rows": "text", "padding_free": True, "max_length": None, "per_device_train_batch_size": 2},
    "completion-only": {"rows": "prompt_completion"},
    "assistant-only": {"rows": "conversational", "assistant_only_loss": True},
    "weight decay and schedule": {
        "weight_decay": 0.1,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
    },
    "dft": {"rows": "text", "loss_type": "dft"},
    "trained head": {"peft": {"modules_to_save": ["lm_head"]}},
}
FEATURE_STEPS = 4


@pytest.fixture(scope="module")
def features(ranks: RankPool, folder: str, out: str) -> dict[str, tuple[training.Run, training.Run]]:
    base = {"folder": out, "max_steps": FEATURE_STEPS, "param_dtype": "float32"}
    specs = {name: base | changes for name, changes in FEATURES.items()}
    specs["larger batch"] = specs["unequal rows"] | {"per_device_train_batch_size": 2}
    ours = ranks.run(train_ours, folder, specs)[0]
    firsts = {name: run.extra["first"] for name, run in ours.items()}
    reference = training.alone().run(train_stock, folder, specs, firsts)[0]
    return {name: (ours[name], reference[name]) for name in specs}


@pytest.mark.parametrize("feature", FEATURES)
def test_feature_equals_plain_trl(features: dict[str, tuple[training.Run, training.Run]], feature: str) -> None:
    assert_close(*features[feature], FEATURE_STEPS)


def test_features_are_on(features: dict[str, tuple[training.Run, training.Run]]) -> None:
    """Each changes the numbers; otherwise the test above compares plain runs."""
    assert max(features["clipping"][0].grad_norms) > 0.05, "the norm before clipping is logged"
    assert features["trained head"][0].adapter["base_model.model.lm_head.modules_to_save.weight"].shape == (512, 128)
    plain = features["unequal rows"][0].losses
    for name in ("accumulation", "packing", "padding-free", "completion-only", "assistant-only", "dft"):
        assert features[name][0].losses[0] != pytest.approx(plain[0], rel=1e-3), name


def test_accumulation_equals_a_larger_batch(features: dict[str, tuple[training.Run, training.Run]]) -> None:
    assert_close(features["accumulation"][0], features["larger batch"][0], FEATURE_STEPS)


def save_after_a_forward(rank: int, folder: str, out: str, evaluates: bool) -> dict[str, bool]:
    """Train, run the model without a backward, and say for each way to train whether float32 masters were saved."""
    from safetensors.torch import load_file

    ways = {
        "as it comes": ({}, None),
        "kept gathered": ({"reshard_after_forward": False}, None),
        "trained head": ({}, {"modules_to_save": ["lm_head"]}),
    }
    saved = {}
    for way, (changes, peft) in ways.items():
        sets = {"eval_dataset": training.equal_rows(3)}
        trainer = training.ours(folder, training.equal_rows(8), {"folder": out, "max_steps": 2} | changes, peft, **sets)
        trainer.train()
        expected = training.adapter_of(trainer.model)
        if evaluates:
            trainer.evaluate()
        else:
            prompt = torch.tensor([[3, 4, 5]], device=trainer.args.device)
            trainer.model.generate(input_ids=prompt, max_new_tokens=2, do_sample=False)
        trainer.save_model(f"{out}/{way}")
        read = load_file(f"{out}/{way}/adapter_model.safetensors")
        named = {name.replace(".modules_to_save", ""): tensor for name, tensor in expected.items()}
        saved[way] = read.keys() == named.keys() and all(torch.equal(read[name], named[name]) for name in named)
    return saved


@pytest.mark.parametrize("evaluates", [True, False], ids=["evaluated", "generated"])
def test_what_was_gathered_is_saved_from_its_shards(ranks: RankPool, folder: str, out: str, evaluates: bool) -> None:
    """A unit that a forward keeps for its backward waits for one in vain, and shows 16 bits meanwhile."""
    for saved in ranks.run(save_after_a_forward, folder, out, evaluates):
        assert saved == dict.fromkeys(("as it comes", "kept gathered", "trained head"), True)


# ---- Every way in ----------------------------------------------------------------------------------------------------


def come_in(rank: int, folder: str, out: str, ways: list[str]) -> dict[str, dict[str, Any]]:
    """Train two steps from the same weights, given in different ways."""
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig, TrainingArguments
    from trl import ModelConfig, SFTConfig, get_quantization_config

    from hf_qlora_fsdp import QLoRAFSDPConfig, QLoRAFSDPTrainer, load_quantized_model

    lora = LoraConfig(**training.LORA)
    fp4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")

    def model(way: str) -> Any:
        storage = {"uint8": torch.uint8, "bf16": torch.bfloat16}.get(way.partition(" ")[0])
        if storage is not None:
            loaded = training.plain_model(folder, torch.bfloat16, bnb_4bit_quant_storage=storage)
            return get_peft_model(loaded, lora) if "PeftModel" in way else loaded
        if way.startswith("sharded"):
            return load_quantized_model(folder, peft_config=lora if "PeftModel" in way else None, progress=False)
        return folder

    results = {}
    for way in ways:
        changes = training.arguments(out, max_steps=2)
        named: dict[str, Any] = {} if "PeftModel" in way or way == "default adapter" else {"peft_config": lora}
        cls = {"SFTConfig": SFTConfig, "TrainingArguments": TrainingArguments}.get(way, QLoRAFSDPConfig)
        if way == "fp4 argument":
            named["quantization_config"] = fp4
        if way == "fp4 init kwargs":
            changes["model_init_kwargs"] = {
                "quantization_config": fp4,
                "attn_implementation": "eager",
                "dtype": "bfloat16",
            }
        if way == "TRL script":  # what trl/scripts/sft.py passes when it is asked for --load_in_4bit
            model_args = ModelConfig(model_name_or_path=folder, load_in_4bit=True, use_bnb_nested_quant=True)
            named["quantization_config"] = get_quantization_config(model_args)
            changes["model_init_kwargs"] = {
                "revision": model_args.model_revision,
                "trust_remote_code": False,
                "attn_implementation": model_args.attn_implementation,
                "dtype": model_args.dtype,
            }
        if way == "fp4 config":
            changes |= {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}
        if way == "TrainingArguments":
            changes["bf16"] = True  # without it they say float32, and are taken at their word
        args = cls(**changes)
        with training.listening() as said:
            trainer = QLoRAFSDPTrainer(model(way), args, train_dataset=training.equal_rows(8), **named)
            run = training.run(trainer)
        layouts = {
            (m.layout.quant_type, m.layout.double_quant) for m in trainer.model.modules() if hasattr(m, "layout")
        }
        results[way] = {
            "losses": run.losses,
            "said": said,
            "layouts": layouts,
            "trained": {p.dtype for p in trainer.model.parameters() if p.requires_grad},
            "attention": trainer.model.config._attn_implementation,
            "learning_rate": trainer.args.learning_rate,
            "marked": trainer.model.get_base_model().is_loaded_in_4bit,
            "r": trainer.model.peft_config["default"].r,
            "moved": max(t.abs().max().item() for n, t in run.adapter.items() if "lora_B" in n),
        }
    return results


WAYS = ["folder", "uint8 model", "bf16 model", "uint8 PeftModel", "sharded model", "sharded PeftModel"]
OTHER_WAYS = [
    "TRL script",
    "SFTConfig",
    "TrainingArguments",
    "default adapter",
    "fp4 argument",
    "fp4 init kwargs",
    "fp4 config",
]


@pytest.fixture(scope="module")
def ways(ranks: RankPool, folder: str, out: str) -> dict[str, dict[str, Any]]:
    return ranks.run(come_in, folder, out, WAYS + OTHER_WAYS)[0]


@pytest.mark.parametrize("way", [*WAYS, "TRL script", "SFTConfig", "TrainingArguments", "default adapter"])
def test_every_way_in_starts_from_the_same_bits(ways: dict[str, dict[str, Any]], way: str) -> None:
    """LoRA starts at zero, so the first loss is the base model's, and any way to the same 4 bits gives the same one."""
    assert ways[way]["losses"][0] == ways["folder"]["losses"][0]
    assert ways[way]["layouts"] == {("nf4", True)}
    assert ways[way]["trained"] == {torch.float32}
    assert ways[way]["moved"] > 1e-3
    assert ways[way]["marked"]


@pytest.mark.parametrize("way", ["uint8 model", "bf16 model", "uint8 PeftModel"])
def test_a_model_in_memory_costs_a_line(ways: dict[str, dict[str, Any]], way: str) -> None:
    lines = [line for line in ways[way]["said"] if "less at the peak" in line]
    assert len(lines) == 1
    assert "loaded whole by every rank" in lines[0]


def test_the_good_way_says_nothing_of_it(ways: dict[str, dict[str, Any]]) -> None:
    assert not [line for way in ("folder", "sharded PeftModel") for line in ways[way]["said"] if "peak" in line]


def test_an_adapter_added_later_is_announced(ways: dict[str, dict[str, Any]]) -> None:
    assert [line for line in ways["sharded model"]["said"] if "unit of their own" in line]
    assert not [line for line in ways["sharded PeftModel"]["said"] if "unit of their own" in line]


@pytest.mark.parametrize("way", ["SFTConfig", "TrainingArguments"])
def test_plain_arguments_are_taken_over(ways: dict[str, dict[str, Any]], way: str) -> None:
    assert ways[way]["learning_rate"] == 5e-3
    assert [line for line in ways[way]["said"] if "taken over as QLoRAFSDPConfig" in line]


def test_the_default_adapter_is_announced(ways: dict[str, dict[str, Any]]) -> None:
    assert [line for line in ways["default adapter"]["said"] if "r=16, alpha=32 on all linear layers" in line]
    assert ways["default adapter"]["r"] == 16
    assert not [line for line in ways["folder"]["said"] if "No peft_config" in line]


@pytest.mark.parametrize("way", ["fp4 argument", "fp4 init kwargs", "fp4 config"])
def test_quantization_config_is_heard(ways: dict[str, dict[str, Any]], way: str) -> None:
    assert ways[way]["layouts"] == {("fp4", False)}
    assert ways[way]["losses"][0] != ways["folder"]["losses"][0]


def test_the_dtype_that_trl_fills_in_costs_a_line(ways: dict[str, dict[str, Any]]) -> None:
    assert [line for line in ways["TRL script"]["said"] if "dtype=float32, which has no effect" in line]


def test_attn_implementation_is_heard(ways: dict[str, dict[str, Any]]) -> None:
    assert ways["fp4 init kwargs"]["attention"] == "eager"
    assert ways["folder"]["attention"] == "sdpa"


# ---- What is refused -------------------------------------------------------------------------------------------------


def be_refused(rank: int, folder: str, eight_bit: str, out: str) -> dict[str, tuple[str, str]]:
    from datasets import Dataset
    from peft import LoraConfig, PromptTuningConfig, get_peft_model
    from transformers import BitsAndBytesConfig

    from hf_qlora_fsdp import QLoRAFSDPConfig, QLoRAFSDPTrainer

    rows = training.equal_rows(4)
    nf4 = BitsAndBytesConfig(load_in_4bit=True)

    def start(model: Any = folder, dataset: Any = rows, named: dict[str, Any] | None = None, **changes: Any) -> None:
        args = QLoRAFSDPConfig(**training.arguments(out, **changes))
        QLoRAFSDPTrainer(model, args, train_dataset=dataset, **(named or {}))

    eight = make_model()
    eight.is_loaded_in_8bit = True
    nameless = make_model()
    nameless.is_loaded_in_4bit = True
    adapted = get_peft_model(make_model(), LoraConfig(**training.LORA))
    mixed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.float16)
    cases: dict[str, dict[str, Any]] = {
        "unquantised": {"model": make_model()},
        "8-bit": {"model": eight},
        "unquantised PeftModel": {"model": adapted},
        "not a model": {"model": Path(folder)},
        "nameless": {"model": nameless},
        "two adapters": {"model": adapted, "named": {"peft_config": LoraConfig(**training.LORA)}},
        "two configs": {"named": {"quantization_config": nf4}, "model_init_kwargs": {"quantization_config": nf4}},
        "8-bit config": {"named": {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}},
        "load_in_8bit": {"model_init_kwargs": {"load_in_8bit": True}},
        "device_map": {"model_init_kwargs": {"device_map": "auto"}},
        "dtype": {"model_init_kwargs": {"dtype": "float16"}},
        "storage": {"named": {"quantization_config": mixed}},
        "unknown init kwarg": {"model_init_kwargs": {"atn_implementation": "eager"}},
        "not LoRA": {"named": {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)}},
        "template of another model": {"chat_template_path": folder},
        "template with a wrong suffix": {"chat_template_path": f"{folder}/config.json"},
        "no dataset": {"dataset": None},
        "not a dataset": {"dataset": [{"text": "a"}]},
        "empty": {"dataset": rows.select([])},
        "eval columns": {"named": {"eval_dataset": {"a": rows, "b": Dataset.from_list([{"x": "a"}])}}},
        "columns": {"dataset": Dataset.from_list([{"question": "a", "answer": "b"}])},
        "prompt alone": {"dataset": Dataset.from_list([{"prompt": "a"}])},
        "decoder class": {"transformer_layer_cls_to_wrap": ["GPT2Block"]},
    }
    return {name: training.refusal(start, **case) for name, case in cases.items()}


@pytest.fixture(scope="module")
def refusals(ranks: RankPool, folder: str, out: str) -> dict[str, tuple[str, str]]:
    return ranks.run(be_refused, folder, "", out)[0]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("unquantised", ["LlamaForCausalLM", "not quantised", "folder as model"]),
        ("8-bit", ["in 8 bits", "folder as model"]),
        ("unquantised PeftModel", ["not quantised", "folder as model"]),
        ("not a model", ["PosixPath", "as a string"]),
        ("nameless", ["LlamaForCausalLM", "processing_class"]),
        ("two adapters", ["peft_config", "Pass one"]),
        ("two configs", ["quantization_config", "model_init_kwargs", "Keep one"]),
        ("8-bit config", ["load_in_8bit", "4-bit"]),
        ("load_in_8bit", ["load_in_8bit", "4-bit"]),
        ("device_map", ["device_map='auto'", "Leave it out"]),
        ("dtype", ["float16", "bfloat16", "Leave dtype out"]),
        ("storage", ["float16", "bfloat16", "garbage"]),
        ("unknown init kwarg", ["atn_implementation", "Leave it out"]),
        ("not LoRA", ["PromptTuningConfig", "LoraConfig"]),
        ("template of another model", ["chat_template_path", ".jinja"]),
        ("template with a wrong suffix", ["chat_template_path", ".jinja"]),
        ("no dataset", ["train_dataset", "load_dataset"]),
        ("not a dataset", ["list", "Dataset.from_list"]),
        ("empty", ["no rows", "filtered"]),
        ("columns", ["'answer', 'question'", "messages", "formatting_func"]),
        ("eval columns", ["eval_dataset['b']", "['x']"]),
        ("prompt alone", ["'prompt'", "completion"]),
        ("decoder class", ["GPT2Block", "LlamaDecoderLayer"]),
    ],
)
def test_refused_in_three_parts(refusals: dict[str, tuple[str, str]], case: str, words: list[str]) -> None:
    kind, message = refusals[case]
    assert kind == "ValueError", message
    for word in words:
        assert word in message


def watch_the_loader(rank: int, folder: str, out: str) -> dict[str, Any]:
    """Stop where the loader and the tokenizer are called, and return what they were given."""
    from unittest import mock

    from hf_qlora_fsdp import QLoRAFSDPConfig, QLoRAFSDPTrainer

    options = {"revision": "abc", "attn_implementation": "eager", "token": "t", "low_cpu_mem_usage": True}
    args = QLoRAFSDPConfig(**training.arguments(out, model_init_kwargs=options, trust_remote_code=True))
    with (
        mock.patch("hf_qlora_fsdp.trainer.load_quantized_model", side_effect=InterruptedError) as load,
        mock.patch("transformers.AutoProcessor.from_pretrained") as tokenizer,
        contextlib.suppress(InterruptedError),
    ):
        QLoRAFSDPTrainer("org/name", args, train_dataset=training.equal_rows(4))
    given = dict(load.call_args.kwargs)
    return {
        "model": load.call_args.args + tokenizer.call_args.args,
        "options": {name: given.get(name) for name in (*options, "trust_remote_code")},
        "tokenizer": tokenizer.call_args.kwargs,
        "kept": args.model_init_kwargs == options,
    }


def test_model_init_kwargs_reach_the_loader(folder: str, out: str) -> None:
    seen = training.alone().run(watch_the_loader, folder, out)[0]
    assert seen["model"] == ("org/name", "org/name")
    assert seen["options"] == {
        "revision": "abc",
        "attn_implementation": "eager",
        "token": "t",
        "low_cpu_mem_usage": None,  # always so here
        "trust_remote_code": True,
    }
    assert seen["tokenizer"] == {"revision": "abc", "token": "t", "trust_remote_code": True}
    assert seen["kept"], "the user's dictionary is not changed"


# ---- Evaluation, callbacks, generation, and what happens around a run ------------------------------------------------


def evaluate_around(rank: int, folder: str, out: str) -> dict[str, Any]:
    """Evaluate before, during and after training, on two sets, with metrics and a callback; load the best model."""
    import warnings

    import numpy as np
    from transformers import TrainerCallback

    # TRL deprecates the logits that compute_metrics gets (sft_trainer.py, `return_outputs=True`); they are still due.
    warnings.filterwarnings("ignore", message=".*logits.*", category=FutureWarning)
    events = []

    class Witness(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            events.append(("step", state.global_step))

        def on_evaluate(self, args, state, control, metrics, **kwargs):
            events.append(("evaluate", state.global_step))

    def accuracy(prediction: Any) -> dict[str, float]:
        guesses, labels = np.argmax(prediction.predictions[:, :-1], -1), prediction.label_ids[:, 1:]
        return {"accuracy": float((guesses == labels).mean()), "rows": float(len(labels))}

    changes = {
        "folder": out,
        "param_dtype": "float32",
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_odd_loss",
        "greater_is_better": True,  # so that the best is the first checkpoint, and not the model as it is anyway
        "per_device_eval_batch_size": 1,
    }
    sets = {"even": training.equal_rows(4), "odd": training.equal_rows(5)}
    with training.listening() as said:
        trainer = training.ours(
            folder,
            training.equal_rows(8),
            changes,
            eval_dataset=sets,
            compute_metrics=accuracy,
            callbacks=[Witness()],
        )
        before = trainer.evaluate()
        prompt = torch.tensor([[7, 8, 9, 10]])
        generated_before = trainer.model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False).tolist()
        run = training.run(trainer)
        best = trainer.state.best_model_checkpoint
        after = trainer.evaluate()
        generated_after = trainer.model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False).tolist()
    from safetensors.torch import load_file

    saved = load_file(f"{best}/adapter_model.safetensors")
    return {
        "before": before,
        "during": [entry for entry in run.log if "eval_odd_loss" in entry and "train_loss" not in entry],
        "after": after,
        "events": events,
        "best": best,
        "said": said,
        "best_is_in_memory": all(torch.equal(saved[name], value) for name, value in run.adapter.items()),
        "names": (sorted(saved), sorted(run.adapter)),
        "generated": (generated_before, generated_after),
    }


def evaluate_stock(rank: int, folder: str, out: str, adapter: dict[str, torch.Tensor] | None = None) -> dict[str, Any]:
    """Evaluate and generate with plain TRL, before any step."""
    changes = {"folder": out, "per_device_eval_batch_size": 1}
    sets = {"even": training.equal_rows(4), "odd": training.equal_rows(5)}
    trainer = training.stock(folder, training.equal_rows(8), changes, torch.float32, eval_dataset=sets)
    for module in trainer.model.modules():
        # On a CPU with AVX512-BF16, bitsandbytes evaluates in bfloat16 whatever the dtype (nn/modules.py, Linear4bit).
        module.support_avx512bf16_for_cpu = False
    prompt = torch.tensor([[7, 8, 9, 10]])
    generated = trainer.model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False).tolist()
    return trainer.evaluate() | {"generated": generated}


@pytest.fixture(scope="module")
def evaluations(ranks: RankPool, folder: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return ranks.run(evaluate_around, folder, str(tmp_path_factory.mktemp("evaluations")))


@pytest.fixture(scope="module")
def stock_evaluation(folder: str, out: str) -> dict[str, Any]:
    return training.alone().run(evaluate_stock, folder, out)[0]


@pytest.mark.parametrize("name", ["even", "odd"])
def test_evaluation_before_training_equals_plain_trl(
    evaluations: list[dict[str, Any]], stock_evaluation: dict[str, Any], name: str
) -> None:
    """Five rows over two ranks: accelerate pads with a sixth, which must not count."""
    for result in evaluations:
        key = f"eval_{name}_loss"
        assert result["before"][key] == pytest.approx(stock_evaluation[key], rel=bound(1))
        assert result["before"][f"eval_{name}_rows"] == {"even": 4, "odd": 5}[name]
        assert 0 <= result["before"][f"eval_{name}_accuracy"] <= 1


def test_evaluation_during_and_after_training(evaluations: list[dict[str, Any]]) -> None:
    for result in evaluations:
        assert ("evaluate", 0) in result["events"]
        during = [event for event in result["events"] if event == ("step", 1) or event[1] == 2]
        assert during == [("step", 1), ("step", 2), ("evaluate", 2), ("evaluate", 2)]
        # The best is the checkpoint of step 2 here, so that is what an evaluation afterwards sees again.
        at_step_2 = next(e for e in result["during"] if e["step"] == 2)
        assert result["after"]["eval_odd_loss"] == at_step_2["eval_odd_loss"]
        assert result["after"]["eval_odd_loss"] < result["before"]["eval_odd_loss"]


def test_the_best_model_is_loaded_at_the_end(evaluations: list[dict[str, Any]]) -> None:
    for result in evaluations:
        assert result["best"].endswith("checkpoint-2")
        assert result["best_is_in_memory"], result["names"]
    assert [line for line in evaluations[0]["said"] if "best adapter" in line]
    assert evaluations[1]["said"] == [], "rank 0 speaks alone"


def test_all_ranks_generate(evaluations: list[dict[str, Any]], stock_evaluation: dict[str, Any]) -> None:
    """Before training the adapter is zero, and the tokens are the plain model's; afterwards they are others."""
    for result in evaluations:
        assert result["generated"][0] == stock_evaluation["generated"]
    assert evaluations[0]["generated"] == evaluations[1]["generated"]
    assert evaluations[0]["generated"][1] != stock_evaluation["generated"]


def use_twice(rank: int, folder: str, out: str) -> dict[str, Any]:
    """Two trainers one after the other with one args object, one with dropout, and one on a stream of rows."""
    from hf_qlora_fsdp import QLoRAFSDPConfig, QLoRAFSDPTrainer

    args = QLoRAFSDPConfig(**training.arguments(out, max_steps=2, gradient_checkpointing=True))
    before = args.to_dict()
    runs = [training.run(QLoRAFSDPTrainer(folder, args, train_dataset=training.equal_rows(8))) for _ in range(2)]
    after = args.to_dict()
    dropped = training.run(
        training.ours(folder, training.equal_rows(8), {"folder": out, "max_steps": 12}, {"lora_dropout": 0.2})
    )
    stream = training.equal_rows(8).to_iterable_dataset()
    streamed = training.run(training.ours(folder, stream, {"folder": out, "max_steps": 2}))
    return {
        "losses": [run.losses for run in runs],
        "streamed": streamed.losses,
        "changed": {name for name in before if before[name] != after[name]},
        "dropped": dropped.losses,
    }


def test_the_same_args_serve_twice(ranks: RankPool, folder: str, out: str) -> None:
    result = ranks.run(use_twice, folder, out)[0]
    assert result["losses"][0] == result["losses"][1]
    assert result["changed"] == set()
    assert result["dropped"][-1] < result["dropped"][0] - 0.3
    assert len(result["streamed"]) == 2


def show_table(rank: int, folder: str, out: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        training.ours(folder, training.equal_rows(8), {"folder": out, "cpu_offload": True})
    return printed.getvalue()


def test_the_table_at_the_start(ranks: RankPool, folder: str, out: str) -> None:
    """Counted here from the shapes that tiny.py gives the model, and not from the model."""
    text, silence = ranks.run(show_table, folder, out)
    assert silence == ""
    rows = {line.split("  ")[1].strip(): line.strip().partition("  ")[2].strip() for line in text.splitlines()[1:]}
    key_size, inner = 64, 256
    linears = [(HIDDEN_SIZE, HIDDEN_SIZE)] * 2 + [(HIDDEN_SIZE, key_size)] * 2 + [(HIDDEN_SIZE, inner)] * 3
    in_4bit = 2 * sum(k * n for k, n in linears)
    in_16bit = 2 * VOCAB_SIZE * HIDDEN_SIZE + 5 * HIDDEN_SIZE
    trained = 2 * sum(8 * (k + n) for k, n in linears)
    assert rows["model"] == f"{folder}, sharded over 2 ranks"
    assert rows["units"] == "2 decoder layers, embedding, norm and head"
    assert rows["4-bit"] == f"{in_4bit / 1000:.1f}K parameters, nf4 double-quantised"
    assert rows["16-bit"] == f"{in_16bit / 1000:.1f}K parameters"
    assert rows["trained"] == f"{trained / 1000:.1f}K parameters, float32 masters"
    assert "bfloat16" in rows["dtypes"]
    assert rows["offload"].startswith("frozen weights in pageable host memory")
    assert rows["patches"] == "accelerate-cpu-fsdp, trl-head-gradient"
    # Half of: codes, a byte a scale (64 weights), a float32 a 256 scales, one offset; each part in steps of 16 bytes.
    packed = 2 * sum(
        align(k * n // 2) + align(k * n // 64) + align(4 * -(-k * n // 64 // 256)) + 16 for k, n in linears
    )
    local_kib = (packed + 2 * in_16bit + 4 * trained) / 2 / 1024
    assert rows["a rank"] == f"{local_kib:.1f} KiB on cpu (codes, scales, adapter)"


def align(num_bytes: int) -> int:
    return -(-num_bytes // 16) * 16
