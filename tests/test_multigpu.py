"""What only GPUs can show: NCCL beside gloo, pinned memory, copy streams, CUDA's kernels.

The same claims as on the CPU, on two devices. Where rounding differs by kernel, two bfloat16 results are held against
one float32 result, from which sharded may stray no further than plain bitsandbytes and PEFT do (see test_trainer.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests import training
from tests.distributed import RankPool
from tests.tiny import make_checkpoint

# These run with other versions than the rest of the suite; what their libraries warn of is not what is tested.
pytestmark = [pytest.mark.multigpu, pytest.mark.filterwarnings("default")]

NUM_STEPS = 8
BASE = {"use_cpu": False, "max_steps": NUM_STEPS, "model_init_kwargs": {"attn_implementation": "eager"}}
PROMPT = [[7, 8, 9, 10]]


@pytest.fixture(scope="module")
def gpus() -> Iterator[RankPool]:
    with RankPool(world_size=2, backend="cpu:gloo,cuda:nccl") as pool:
        yield pool


@pytest.fixture(scope="module")
def gpu() -> Iterator[RankPool]:
    """One process that sees one device: TRL refuses to run on several without a launcher."""
    with RankPool(world_size=1, backend="cpu:gloo,cuda:nccl", env={"CUDA_VISIBLE_DEVICES": "0"}) as pool:
        yield pool


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("out"))


# ---- Gradients -------------------------------------------------------------------------------------------------------


def rows(device: Any) -> torch.Tensor:
    return torch.tensor(training.equal_rows(2)["input_ids"], device=device)


def mean_loss(model: Any, tokens: torch.Tensor, num_rows: int) -> torch.Tensor:
    logits = model(input_ids=tokens).logits[:, :-1].float()
    summed = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    return summed / (num_rows * (tokens.shape[1] - 1))


def sharded_gradients(rank: int, folder: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the adapter, B drawn anew, and its gradients on two ranks with a row each."""
    from peft import LoraConfig

    from hf_qlora_fsdp import load_quantized_model
    from hf_qlora_fsdp.mesh import make_mesh, mesh_device

    lora = LoraConfig(**training.LORA)
    model = load_quantized_model(folder, peft_config=lora, attn_implementation="eager", progress=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.to_local().normal_(std=0.02)
    mean_loss(model, rows(mesh_device(make_mesh()))[rank : rank + 1], 1).backward()
    gradients = {
        name.replace(".default.", "."): p.grad.full_tensor().cpu()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    return training.adapter_of(model), gradients


def dense_model(folder: str, dtype: torch.dtype) -> Any:
    """Return a plain model with the weights that the sharded one multiplies with, whole and in `dtype`.

    They are dequantised to bfloat16 first. For few tokens, bitsandbytes' own layer multiplies without that rounding,
    in a fused kernel, so it is no reference for what the rest of the arithmetic may cost.
    """
    model = training.plain_model(folder, torch.bfloat16, "cuda:0").dequantize()
    return model.float() if dtype == torch.float32 else model


def plain_gradients(
    rank: int, folder: str, adapter: dict[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    from peft import LoraConfig, get_peft_model

    plain = dense_model(folder, dtype)
    plain.set_attn_implementation("eager")
    model = get_peft_model(plain, LoraConfig(**training.LORA))
    training.fill_adapter(model, {name: value.to("cuda:0") for name, value in adapter.items()})
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    mean_loss(model, rows("cuda:0"), 2).backward()
    return {name.replace(".default.", "."): p.grad.cpu() for name, p in model.named_parameters() if p.requires_grad}


def test_sharded_gradients_equal_plain_ones(gpus: RankPool, gpu: RankPool, folder: str) -> None:
    (adapter, gradients), (_, others) = gpus.run(sharded_gradients, folder)
    truth = gpu.run(plain_gradients, folder, adapter, torch.float32)[0]
    plain = gpu.run(plain_gradients, folder, adapter, torch.bfloat16)[0]
    assert gradients.keys() == truth.keys() == plain.keys()
    for name, tensor in truth.items():
        assert torch.equal(gradients[name], others[name]), f"{name} differs between the ranks"
        assert tensor.norm() > 0, name
        # Rounding a product to bfloat16 costs up to 2^-8 of it, which is the floor: plain PEFT may be lucky once.
        stray = max((plain[name] - tensor).norm(), 2**-8 * tensor.norm())
        assert (gradients[name] - tensor).norm() < 2 * stray, name


# ---- Trajectories ----------------------------------------------------------------------------------------------------

SPECS: dict[str, dict[str, Any]] = {
    "resident": {},
    "again": {},
    "pinned": {"cpu_offload": True},
    "pageable": {"cpu_offload": True, "cpu_offload_pin_memory": False},
    "one layer": {"cpu_offload_layers": 1},
    "mapped": {"cpu_offload_dir": tempfile.gettempdir()},
    "trained, too": {"cpu_offload": True, "cpu_offload_trainable": True, "fuse_lora": False},
    "activations": {"activation_offloading": True},
    "checkpointing": {"gradient_checkpointing": True},
    "checkpointing and activations": {"gradient_checkpointing": True, "activation_offloading": True},
    "whole": {"replicate_layers": "all"},
    "checkpointing, one whole": {"gradient_checkpointing": True, "replicate_layers": 1},
    "checkpointing, pinned": {"gradient_checkpointing": True, "cpu_offload": True},
}


def train_specs(rank: int, folder: str, out: str) -> dict[str, training.Run]:
    runs = {}
    for name, changes in SPECS.items():
        trainer = training.ours(folder, training.equal_rows(8), {"folder": out, **BASE, **changes})
        first = training.adapter_of(trainer.model)
        head, heads = trainer.model.get_output_embeddings(), []
        norm = trainer.model.get_base_model().model.norm
        norm.register_forward_hook(lambda *_, head=head, heads=heads: heads.append(str(head.weight.device)))
        runs[name] = training.run(trainer)
        frozen = [p for p in trainer.model.parameters() if not p.requires_grad]
        frozen = [p.to_local() if isinstance(p, DTensor) else p for p in frozen]
        trained = [p.to_local() for p in trainer.model.parameters() if p.requires_grad]
        runs[name].extra = {
            "first": first,
            "heads": set(heads),
            "frozen": {(p.device.type, p.is_pinned()) for p in frozen},
            "trained": {p.device.type for p in trained},
        }
    return runs


def train_plain(rank: int, folder: str, out: str, first: dict[str, torch.Tensor], dtype: torch.dtype) -> training.Run:
    changes = {"folder": out, **BASE, "per_device_train_batch_size": 2, "model_init_kwargs": None}
    dense = dense_model(folder, dtype)
    trainer = training.stock(folder, training.equal_rows(8), changes, dtype, device="cuda:0", model=dense)
    training.fill_adapter(trainer.model, {name: value.to("cuda:0") for name, value in first.items()})
    return training.run(trainer)


@pytest.fixture(scope="module")
def trajectories(gpus: RankPool, gpu: RankPool, folder: str, out: str) -> dict[str, training.Run]:
    runs = gpus.run(train_specs, folder, out)[0]
    first = runs["resident"].extra["first"]
    for name, dtype in (("plain float32", torch.float32), ("plain bfloat16", torch.bfloat16)):
        runs[name] = gpu.run(train_plain, folder, out, first, dtype)[0]
    return runs


def test_trajectory_follows_plain_trl(trajectories: dict[str, training.Run]) -> None:
    truth, plain, ours = (
        torch.tensor(trajectories[name].losses) for name in ("plain float32", "plain bfloat16", "resident")
    )
    assert ours[-1] < ours[0] - 0.2
    assert (ours - truth).square().mean() < 16 * (plain - truth).square().mean()


# With the optimizer on the CPU, and the adapter unfused in a unit of its own, roundings differ: see below.
SAME_BITS = [name for name in SPECS if name not in ("resident", "trained, too")]


@pytest.mark.parametrize("name", SAME_BITS)
def test_memory_savers_change_no_bit(trajectories: dict[str, training.Run], name: str) -> None:
    """`again` is the same run once more: if it differs, the kernels are to blame and the other cases say nothing."""
    assert trajectories[name].losses == trajectories["resident"].losses
    for key, tensor in trajectories["resident"].adapter.items():
        assert torch.equal(trajectories[name].adapter[key], tensor), key


def test_the_head_runs_on_the_gpu_under_offload(trajectories: dict[str, training.Run]) -> None:
    """TRL multiplies where `lm_head.weight` is when the final norm is done; upstream leaves it on the host."""
    for name in ("pinned", "pageable", "resident"):
        assert trajectories[name].extra["heads"] == {"cuda:0"}, name


def test_frozen_shards_are_offloaded_and_the_adapter_is_not(trajectories: dict[str, training.Run]) -> None:
    assert trajectories["resident"].extra["frozen"] == {("cuda", False)}
    assert trajectories["pinned"].extra["frozen"] == {("cpu", True), ("cuda", False)}  # norms stay
    for name in ("pageable", "mapped", "one layer"):
        assert trajectories[name].extra["frozen"] == {("cpu", name == "one layer"), ("cuda", False)}
    for name in SPECS:
        assert trajectories[name].extra["trained"] == {"cpu" if name == "trained, too" else "cuda"}, name


def test_the_optimizer_on_the_host_differs_by_rounding(trajectories: dict[str, training.Run]) -> None:
    ours, theirs = (torch.tensor(trajectories[name].losses) for name in ("resident", "trained, too"))
    assert (ours - theirs).abs().max() < 0.02 * ours.max()


# ---- Resuming, evaluating, generating --------------------------------------------------------------------------------


def resume(rank: int, folder: str, out: str, offload: bool) -> tuple[training.Run, training.Run]:
    changes = {**BASE, "folder": out, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "cpu_offload": offload}
    peft = {"lora_dropout": 0.1}
    whole = training.run(training.ours(folder, training.equal_rows(8), changes, peft))
    rest = training.ours(folder, training.equal_rows(8), changes | {"save_strategy": "no"}, peft)
    return whole, training.run(rest, resume_from_checkpoint=f"{out}/checkpoint-2")


@pytest.mark.parametrize("offload", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(
    gpus: RankPool, folder: str, tmp_path_factory: pytest.TempPathFactory, offload: bool
) -> None:
    for whole, rest in gpus.run(resume, folder, str(tmp_path_factory.mktemp("resume")), offload):
        assert len(whole.losses) == 4
        assert rest.losses == whole.losses
        for name, tensor in whole.adapter.items():
            assert torch.equal(rest.adapter[name], tensor), name


def generate(rank: int, folder: str, out: str) -> dict[str, Any]:
    changes = {**BASE, "folder": out, "max_steps": 2, "param_dtype": "float32"}
    sets = {"eval_dataset": training.equal_rows(5)}
    trainer = training.ours(folder, training.equal_rows(8), changes, **sets)
    prompt = torch.tensor(PROMPT, device=trainer.args.device)
    before = trainer.evaluate()["eval_loss"]
    tokens = [trainer.model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False).tolist()]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    tokens.append(trainer.model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False).tolist())
    trainer.save_model(f"{out}/saved")
    return {"tokens": tokens, "eval": (before, after)}


def generate_plainly(rank: int, folder: str, out: str) -> list[Any]:
    from peft import PeftModel

    model = training.plain_model(folder, torch.float32, "cuda:0")
    model.set_attn_implementation("eager")
    prompt = torch.tensor(PROMPT, device="cuda:0")
    tokens = [model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False).tolist()]
    tuned = PeftModel.from_pretrained(model, f"{out}/saved")
    return [*tokens, tuned.generate(input_ids=prompt, max_new_tokens=8, do_sample=False).tolist()]


def test_all_ranks_generate_what_plain_peft_generates(gpus: RankPool, gpu: RankPool, folder: str, out: str) -> None:
    """In float32, where no two logits are equal. Saved, the adapter generates the same on one device without us."""
    results = gpus.run(generate, folder, out)
    plain = gpu.run(generate_plainly, folder, out)[0]
    for result in results:
        assert result["tokens"] == plain
        assert result["eval"][1] < result["eval"][0]
