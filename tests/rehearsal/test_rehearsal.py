"""Rehearsals: the real trainer on random weights, what it reports, and running out of memory as an answer.

The ranks run the code of the workers; the command itself, which starts them and takes half a minute, is run once.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from hf_qlora_fsdp import cli
from hf_qlora_fsdp.rehearsal import command as rehearsal
from hf_qlora_fsdp.rehearsal.report import describe
from hf_qlora_fsdp.rehearsal.shortage import Shapes, advise, describe_shortage, is_out_of_memory
from tests.distributed import RankPool, run_ranks
from tests.tiny import make_checkpoint

ROOT = Path(__file__).parents[2]
MIB = 2**20


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A config and nothing else."""
    folder = tmp_path_factory.mktemp("config")
    whole = make_checkpoint(tmp_path_factory.mktemp("whole"))
    return str(shutil.copy(f"{whole}/config.json", folder))


def options(model: str, *words: str, **changes: Any) -> argparse.Namespace:
    """Parse and check options. What is refused where there is no card goes into `changes`."""
    parser = argparse.ArgumentParser()
    rehearsal.add_arguments(parser)
    args = parser.parse_args([model, *words])
    rehearsal.check(args)
    return argparse.Namespace(**(vars(args) | changes))


def take_part(rank: int, args: argparse.Namespace, folder: str | None) -> Any:
    return rehearsal.take_part(args, folder and Path(folder))


# ---- Options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "1"], "--steps 1: the first step is no measure of the others. Give 2 or more"),
        (["--batch", "0"], "--batch 0: there is nothing to train. Give 1 or more"),
        (["--nproc", "many"], "--nproc many is no number of processes. Give 1 or more, or auto"),
        (["--nproc", "0"], "--nproc 0"),
        (["--device-memory", "24"], "--device-memory '24' is not a size: .* Write 24GiB"),
        (["--no-pin"], "--no-pin says how offloaded weights are kept, and none are. Add --cpu-offload"),
        (["--json", "/no/such/folder/out.json"], "--json /no/such/folder/out.json: there is no folder for it"),
        (["--json", "/tmp"], "--json /tmp: no file can be written there. Name another"),
        (["--plot", "/tmp"], "--plot /tmp: no file can be written there. Name another"),
        (["--cpu-offload-layers", "0"], "--cpu-offload-layers 0: there is nothing to offload. Give 1 or more"),
        (["--cpu-offload-dir", "/no/such/folder"], "--cpu-offload-dir /no/such/folder is no folder, .* Make it"),
    ],
)
def test_options_that_cannot_work(
    config: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["rehearse", config, *words]) == 2
    assert re.match(f"hf-qlora-fsdp: {message}", capsys.readouterr().err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
@pytest.mark.parametrize("words", [["--device-memory", "24GiB"], ["--activation-offloading"]])
def test_what_is_about_cards_is_refused_by_name_on_a_cpu(
    config: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["rehearse", config, *words]) == 2
    said = capsys.readouterr().err
    assert f"{' '.join(words)} is about the memory of a card, and this machine has none. Leave it out" in said


def test_a_plot_without_matplotlib(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--plot x.png needs matplotlib, .*pip install matplotlib"):
        rehearsal.launch(options(config, "--plot", "x.png"))


def test_liger_that_is_not_installed(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--use-liger-kernel needs liger-kernel, .*pip install liger-kernel"):
        rehearsal.launch(options(config, "--use-liger-kernel"))


@pytest.mark.parametrize("name", ["empty", "nothing.json", "./nothing"])
def test_a_model_without_config(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    with pytest.raises(ValueError, match=f"'{name}' has no config.json, which says .*Give the folder"):
        rehearsal.find_config(name)


def test_an_unknown_hub_id_is_a_reason_and_not_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["rehearse", "nobody/nothing"]) == 1
    assert capsys.readouterr().err.startswith("hf-qlora-fsdp: ")


# ---- What is measured ------------------------------------------------------------------------------------------------


def test_multiplications_against_a_count_by_hand(tmp_path: Path) -> None:
    from peft import LoraConfig

    from hf_qlora_fsdp.loading.adapters import inject_adapter
    from hf_qlora_fsdp.loading.blueprint import build_quantized_meta_model
    from hf_qlora_fsdp.speed.fusion import fuse_lora
    from hf_qlora_fsdp.speed.matmul_share import count_multiplications

    LlamaConfig(
        hidden_size=256, intermediate_size=640, num_hidden_layers=3, vocab_size=1000,
        num_attention_heads=8, num_key_value_heads=2, head_dim=32,
    ).save_pretrained(tmp_path)  # fmt: skip
    rebuild = partial(build_quantized_meta_model, str(tmp_path), None, torch.bfloat16, hub={})
    model = rebuild()
    inject_adapter(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    counted = count_multiplications(model)
    # Of a layer: q and o 256 x 256, k and v 256 x 64, gate, up and down 256 x 640.
    layer = 2 * 256 * 256 + 2 * 256 * 64 + 3 * 256 * 640
    assert counted.frozen == 3 * layer == 3 * 655360
    assert counted.head == 256 * 1000
    assert counted.trained == 3 * (4 * (256 + 256) + 4 * (640 + 256))
    assert counted.attention == 3 * 8 * 32
    # A sequence of 5: token t sees t tokens, 15 pairs, 3 a token. A pair costs two products of 32 in each of 8 heads.
    pairs = 3 * 2 * 2 * 32 * 8 * 3
    plain = 4 * 3 * layer + 4 * 256000 + 6 * counted.trained + 3 * pairs
    assert counted.flops_per_token(5, checkpointing=False) == plain
    # What is done again: the layers' forward, without the head.
    again = 2 * 3 * layer + 2 * counted.trained + pairs
    assert counted.flops_per_token(5, checkpointing=True) == plain + again
    # A fused MLP is not run to its end again.
    inject_adapter(other := rebuild(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    before = count_multiplications(other)
    fuse_lora(other)
    spared = before.flops_per_token(5, True) - count_multiplications(other).flops_per_token(5, True)
    assert spared == 2 * 3 * (256 * 640 + 4 * (640 + 256))
    assert before.flops_per_token(5, False) == count_multiplications(other).flops_per_token(5, False)


def test_kinds_of_host_memory_and_their_peaks(tmp_path: Path) -> None:
    run_ranks(trace_kinds, 1, tmp_path)  # in a process where nobody else takes or gives back memory


def trace_kinds(rank: int, tmp_path: Path) -> None:
    from hf_qlora_fsdp.memory_trace import COLUMNS, MemoryTrace

    size = 64 * MIB
    file = tmp_path / "file"
    file.write_bytes(bytes(size))
    trace = MemoryTrace(torch.device("cpu"), interval_seconds=0.002, heartbeat=tmp_path / "heartbeat")
    taken = {
        "nothing": lambda: None,
        "anonymous": lambda: touch(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)),
        "shared": lambda: touch(mmap.mmap(-1, size)),
        "file": lambda: touch(mmap.mmap(os.open(file, os.O_RDWR), size)),
    }
    for phase, take in taken.items():
        trace.begin(phase)
        held = take()
        time.sleep(0.05)
        assert held is None or held is not trace
        del held
    trace.stop()
    peaks = {phase["name"]: phase["peaks"] for phase in trace.phases}
    for kind in ("anonymous", "shared", "file"):
        for other in ("anonymous", "shared", "file"):
            grown = peaks[kind][other] - peaks["nothing"][other]
            # The kernel lets its counts lag, and pytest allocates a little meanwhile.
            assert (size if kind == other else 0) - 2 * MIB < grown < (size if kind == other else 0) + 8 * MIB
        assert peaks[kind]["host"] >= peaks["nothing"]["host"] + size - 2 * MIB
        assert peaks[kind]["used"] == peaks[kind]["pinned"] == 0
    assert (tmp_path / "heartbeat").read_text().split("\n")[0] == "file"
    thinned = trace.thinned(10)
    assert len(thinned) <= 10 < len(trace.samples)
    assert [max(column) for column in zip(*thinned, strict=True)] == [
        max(column) for column in zip(*trace.samples, strict=True)
    ]
    assert len(thinned[0]) == len(COLUMNS)


def touch(memory: mmap.mmap) -> mmap.mmap:
    for place in range(0, len(memory), mmap.PAGESIZE):
        memory[place] = 1
    return memory


# ---- On the ranks ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcome(ranks: RankPool, config: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    words = ["--seq", "32", "--batch", "2", "--grad-accumulation", "2", "--steps", "5", "--lora-r", "4"]
    args = options(config, *words, "--cpu-offload", "--no-pin")
    folder = tmp_path_factory.mktemp("outcome")
    mine, other = ranks.run(take_part, args, str(folder))
    assert other is None
    assert json.loads(json.dumps(mine)) == rehearsal.collect(folder, {}, 2, 0)
    return rehearsal.collect(folder, {}, 2, 0) or {}


def test_a_rehearsal(outcome: dict[str, Any]) -> None:
    assert outcome["fits"] and outcome["world_size"] == 2 and outcome["device"] == "CPU"
    assert [phase["name"] for phase in outcome["phases"]] == ["load", "first step", "steady"]
    for before, after in zip(outcome["phases"], outcome["phases"][1:], strict=False):
        assert before["began"] + before["seconds"] <= after["began"] + 0.5
        for kind in ("anonymous", "file"):
            assert before["peaks"][kind] > 0
        assert before["peaks"]["host"] <= sum(before["peaks"][kind] for kind in ("anonymous", "file", "shared"))
    # The shapes of tests/tiny.py: two layers, all linear weights in 4 bits; q, k, v, o, gate, up, down adapted.
    assert outcome["parameters"]["4bit"] == 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256)
    assert outcome["parameters"]["trained"] == 2 * 4 * (2 * 256 + 2 * 192 + 3 * 384)
    assert len(outcome["step_seconds"]) == 5 and min(outcome["step_seconds"]) > 0
    timed = sorted(outcome["step_seconds"][2:])
    assert outcome["num_timed_steps"] == 3 and outcome["seconds_per_step"] == timed[1]
    assert outcome["tokens_per_second_per_device"] == pytest.approx(32 * 2 * 2 / timed[1])
    share = outcome["tokens_per_second_per_device"] * outcome["flops_per_token"] / outcome["matmul_flops_per_second"]
    assert outcome["matmul_share"] == pytest.approx(share) and 0 < share < 1
    # Untrained weights guess all of 512 tokens alike: the loss starts at log(512) = 6.24.
    assert len(outcome["losses"]) == 5 and outcome["losses"][0] == pytest.approx(6.24, abs=0.1)
    assert sorted(outcome["trace"]["ranks"]) == ["0", "1"]
    table = describe(outcome)
    for words in ("load first step steady", "options cpu_offload, no_pin", "It fits.", "LoRA r=4 on all-linear"):
        assert words in " ".join(table.split()), table
    assert "clear its cache" not in table
    crowded = " ".join(describe(outcome | {"allocator_retries": 7}).split())
    assert "so full that torch had to wait, clear its cache and ask again, 7 times after the first step" in crowded


WORDS = {
    "--seq 64": ("max_length", None),  # the data are cut already
    "--batch 3": ("per_device_train_batch_size", 3),
    "--grad-accumulation 5": ("gradient_accumulation_steps", 5),
    "--steps 7": ("max_steps", 7),
    "--cpu-offload": ("cpu_offload", True),
    "--cpu-offload --no-pin": ("cpu_offload_pin_memory", False),
    "--cpu-offload-layers 2": ("cpu_offload_layers", 2),
    "--cpu-offload-dir shards": ("cpu_offload_dir", "shards"),
    "--no-gradient-checkpointing": ("gradient_checkpointing", False),
    "--no-fuse-lora": ("fuse_lora", False),
    "--expert-chunk 1GiB": ("expert_chunk", "1GiB"),
    "--use-liger-kernel": ("use_liger_kernel", True),
    "--use-liger-kernel --steps 7": ("liger_kernel_config", None),  # the trainer sees what of it is to be left out
    "--replicate-layers all": ("replicate_layers", "all"),
    "--param-dtype float32": ("param_dtype", "float32"),
}


def read_arguments(rank: int, config: str, folder: str) -> dict[str, Any]:
    from hf_qlora_fsdp.rehearsal.workers import Rehearsal

    return {
        words: getattr(Rehearsal(options(config, *words.split()))._arguments(folder), name)
        for words, (name, _) in WORDS.items()
    }


def test_every_option_reaches_the_trainer(ranks: RankPool, config: str, tmp_path: Path) -> None:
    read = ranks.run(read_arguments, config, str(tmp_path))[0]
    assert read == {words: value for words, (_, value) in WORDS.items()}


class OverTheCap:
    """Trains to the end, on a card on which CUDA and NCCL had grown."""

    def __init__(self, *_: Any) -> None: ...

    def run(self) -> dict[str, Any]:
        return {"fits": False, "over_limit_bytes": 5 * MIB}


def test_more_than_the_cap_is_a_result(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_qlora_fsdp.rehearsal.workers.Rehearsal", OverTheCap)
    monkeypatch.setenv("RANK", "0")
    told = rehearsal.take_part(options(config), tmp_path)
    assert rehearsal.collect(tmp_path, {}, 1, 0) == told == {"fits": False, "over_limit_bytes": 5 * MIB}


def test_the_picture(outcome: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from hf_qlora_fsdp.rehearsal.report import draw

    draw(outcome, str(tmp_path / "timeline.png"))
    image = (tmp_path / "timeline.png").read_bytes()
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    assert [int.from_bytes(image[place : place + 4], "big") for place in (16, 20)] == [1600, 640]


def test_a_model_that_cannot_be_loaded_is_an_outcome(ranks: RankPool, tmp_path: Path) -> None:
    """Terabytes of weights: refused before anything is allocated, in words, on every rank."""
    huge = {"hidden_size": 2**16, "intermediate_size": 2**16, "num_attention_heads": 512, "num_hidden_layers": 96}
    LlamaConfig(**huge).save_pretrained(tmp_path)
    folder = tmp_path / "outcome"
    folder.mkdir()
    both = ranks.run(take_part, options(str(tmp_path)), str(folder))
    assert [one["failure"]["rank"] for one in both] == [0, 1]
    collected = rehearsal.collect(folder, {0: 1, 1: 1}, 2, 0)
    assert collected is not None and not collected["fits"]
    assert collected["failure"]["phase"] == "load" and collected["failure"]["reason"] == "refused"
    assert collected["failure"]["place"] == "host" and collected["failure"]["missing_bytes"] > 2**40
    said = describe(collected)
    assert "TiB on the host, for 2 ranks, while it loads" in said and "TiB were missing" in said
    assert "What would help:\n  a host with more memory" in said
    from hf_qlora_fsdp.rehearsal.report import present

    assert present(collected, str(tmp_path / "out.json"), None) == 1
    assert json.loads((tmp_path / "out.json").read_text()) == collected


def test_a_rank_that_only_notices_leaves_the_word_to_the_one_that_failed(tmp_path: Path) -> None:
    outcomes = [{"fits": False, "failure": {"rank": rank, "time": 5.0 - rank}} for rank in (0, 1)]
    for rank, outcome in enumerate(outcomes):
        (tmp_path / rehearsal.FAILURE_FILES.format(rank)).write_text(json.dumps(outcome))
    assert rehearsal.collect(tmp_path, {0: 1, 1: 1}, 2, 0) == outcomes[1], "the first one in time"
    assert rehearsal._another_failed(tmp_path)


# ---- Out of memory ---------------------------------------------------------------------------------------------------


def test_what_the_allocator_of_the_host_says_is_understood(config: str) -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
    args = options(config, "--cpu-offload", activation_offloading=True)
    found = describe_shortage(raised.value, "steady", args, torch.device("cpu"))
    assert found["place"] == "host" and found["asked_bytes"] == 2**60
    assert any("--cpu-offload-dir" in item for item in found["advice"])
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("Connection closed by peer"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_advice_is_computed_and_leaves_out_what_is_on() -> None:
    shapes = Shapes(layer_bytes=200 * MIB, num_layers=80, shards_bytes=17_000 * MIB, peak_bytes=19_000 * MIB)
    words = ("--batch", "3", "--no-gradient-checkpointing")
    plain = advise(options("x", *words), shapes, 1001 * MIB, 2, "steady")
    assert "leave --no-gradient-checkpointing out" in plain[0]
    assert plain[1].startswith("--activation-offloading")
    assert plain[2].startswith("--batch 2 --grad-accumulation 2")
    assert plain[3] == "--cpu-offload-layers 6 of 80, which makes 1.2 GiB of room on a card"
    assert plain[4].startswith("--cpu-offload, which makes 16.6 GiB of room")
    assert plain[5:] == ["--seq 1024, if the data allow it", "--nproc 4: more cards, each with half the weights"]
    assert advise(options("x", *words), shapes, 1001 * MIB, 2, "load") == [*plain[3:5], plain[6]], "no less to load"
    layers_off = options("x", "--cpu-offload-layers", "6", activation_offloading=True)
    more = advise(layers_off, shapes, 1001 * MIB, 2, "steady")
    assert more[0].startswith("--cpu-offload-layers 12 of 80, which makes 1.2 GiB")
    far = advise(options("x", activation_offloading=True), shapes, 80 * 200 * MIB + 1, 2, "steady")
    assert not any("layers" in item for item in far), "more layers than there are"
    replicated = options("x", "--replicate-layers", "all", "--seq", "512", activation_offloading=True)
    fewer = advise(replicated, shapes, 1001 * MIB, 2, "load")
    assert fewer[0] == "fewer --replicate-layers, or none: each takes 200.0 MiB of a card beside its part"
    assert len(fewer) == 2, "it does not go with offloading"
    all_on = options("x", "--cpu-offload", "--seq", "512", activation_offloading=True)
    everything = advise(all_on, shapes, 1, 2, "steady")
    assert everything == ["--nproc 4: more cards, each with half the weights"]


@pytest.mark.parametrize("num_kills", [0, 1])
def test_a_killed_rank_is_explained(tmp_path: Path, num_kills: int) -> None:
    (tmp_path / rehearsal.HEARTBEATS.format(0)).write_text(f"load\n{2**30}\n")
    (tmp_path / rehearsal.HEARTBEATS.format(1)).write_text(f"first step\n{3 * 2**30}\n")
    outcome = rehearsal.collect(tmp_path, {1: -signal.SIGKILL}, 2, num_kills)
    assert outcome is not None
    said = describe(outcome)
    assert said.startswith("It does not fit (first step): Rank 1 was killed (SIGKILL), which is what Linux does when")
    assert "rank 0 1.0 GiB, rank 1 3.0 GiB" in said
    assert ("counts 1 such kill" in said) == bool(num_kills)
    assert rehearsal.collect(tmp_path, {1: 1}, 2, 0) is None, "an ordinary traceback says more"


# ---- The command -----------------------------------------------------------------------------------------------------


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "hf_qlora_fsdp.cli", "rehearse", *words]


@pytest.mark.slow
def test_the_command(config: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "timeline.png"
    words = [config, "--seq", "64", "--steps", "3", "--json", "-", "--plot", str(plot)]
    done = subprocess.run(command(*words), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["fits"] and outcome["world_size"] == 2 and len(outcome["step_seconds"]) == 3
    assert outcome["seconds"] > sum(phase["seconds"] for phase in outcome["phases"])
    assert outcome["options"]["seq"] == 64
    assert "It fits." in done.stderr and "step 3 of 3" in done.stderr
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert os.listdir(Path(config).parent) == ["config.json"], "something was left there"


@pytest.mark.slow
def test_a_rank_that_is_killed_is_explained_and_none_is_left(config: str) -> None:
    running = subprocess.Popen(command(config, "--steps", "100000"), cwd=ROOT, text=True, stdout=subprocess.PIPE)
    assert running.stdout is not None
    for line in running.stdout:
        if line.startswith("step 2 of"):
            break
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    workers = [pid for pid in children if b"hf_qlora_fsdp.rehearsal" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    os.kill(int(workers[1]), signal.SIGKILL)
    said = running.stdout.read()
    assert running.wait(timeout=60) == 1
    assert "It does not fit (steady): Rank 1 was killed (SIGKILL)" in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    running.stdout.close()


# A model of which one layer in 4 bits, and one step of 16 sequences, is far more than is left beside CUDA and NCCL.
LARGE = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 8, "vocab_size": 32000}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("limit", "phase", "reason", "advice"),
    [
        ("2GiB", "load", "refused", "--cpu-offload, which makes"),
        ("6GiB", "first step", "out of memory", "--batch 8 --grad-accumulation 2"),
    ],
)
def test_out_of_memory_on_a_card_is_an_answer(tmp_path: Path, limit: str, phase: str, reason: str, advice: str) -> None:
    LlamaConfig(**LARGE, num_attention_heads=32, num_key_value_heads=8).save_pretrained(tmp_path)
    words = [str(tmp_path), "--device-memory", limit, "--batch", "16", "--nproc", "1", "--json", "-"]
    done = subprocess.run(command(*words), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    outcome = json.loads(done.stdout)
    failure = outcome["failure"]
    assert (failure["phase"], failure["reason"]) == (phase, reason), failure["said"]
    assert failure["place"] == "card" and failure["missing_bytes"] > 0
    assert (failure["asked_bytes"] or 0) > 0 or reason == "refused", "nothing was asked for"
    assert any(advice in item for item in failure["advice"])
    assert all(one["peaks"]["used"] <= outcome["limit_bytes"] for one in outcome["phases"])
    assert "Traceback" not in done.stderr


@pytest.mark.gpu
def test_a_card_that_is_made_smaller(tmp_path: Path) -> None:
    LlamaConfig(**LARGE, num_attention_heads=32, num_key_value_heads=8).save_pretrained(tmp_path)
    words = [str(tmp_path), "--device-memory", "12GiB", "--nproc", "1", "--steps", "4", "--json", "-"]
    done = subprocess.run(command(*words), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    for one in outcome["phases"]:
        assert 0 < one["peaks"]["allocated"] <= one["peaks"]["reserved"] < one["peaks"]["used"] <= 12 * 2**30
    assert 0 < outcome["outside_allocator_bytes"][0] <= outcome["outside_allocator_bytes"][1]
    assert 0.02 < outcome["matmul_share"] < 1
