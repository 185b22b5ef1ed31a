"""The README says what is true: its script runs, its table is the one of the results, its options are the config's."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from hf_qlora_fsdp import QLoRAFSDPConfig, cli
from hf_qlora_fsdp.planning import cards
from tests.tiny import make_checkpoint, tiny_dataset

LLAMA_2_70B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def replace_once(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, old
    return text.replace(old, new)


def test_script_trains_and_its_adapter_loads(tmp_path):
    """The training script runs as printed, but for the names of model and data and the number of steps."""
    script, loading = code_blocks("python")
    model = make_checkpoint(tmp_path / "model")
    tiny_dataset(16, "conversational").to_json(tmp_path / "data.jsonl")
    script = replace_once(script, '"meta-llama/Llama-2-70b-hf"', repr(model))
    script = replace_once(
        script,
        'load_dataset("trl-lib/Capybara", split="train")',
        f'load_dataset("json", data_files={str(tmp_path / "data.jsonl")!r}, split="train")',
    )
    script = replace_once(script, "max_steps=500", "max_steps=2")
    (tmp_path / "sft.py").write_text(script)
    (command,) = re.findall(r"^    (torchrun .* sft\.py)$", README, flags=re.MULTILINE)
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *command.split()[1:]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        check=True,
        timeout=240,
    )
    loading = replace_once(loading, '"meta-llama/Llama-2-70b-hf"', repr(model))
    loading = replace_once(loading, '"llama-sft/final"', repr(str(tmp_path / "llama-sft" / "final")))
    names = {"AutoModelForCausalLM": AutoModelForCausalLM, "PeftModel": PeftModel}
    exec(loading, names)
    trained = [value for name, value in names["model"].named_parameters() if "lora_B" in name]
    assert trained and all(value.abs().max() > 0 for value in trained)


def test_the_plan_is_what_the_command_prints(tmp_path, monkeypatch, capsys):
    """Line by line; what is left out is marked by dots. The folder stands in for the Hub's model of that name."""
    (command,) = re.findall(r"^    hf-qlora-fsdp (plan \S+ .*)$", README, flags=re.MULTILINE)
    model = tmp_path / command.split()[1]
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(LLAMA_2_70B))
    monkeypatch.chdir(tmp_path)
    assert cli.main(command.split()) == 0
    printed = iter(capsys.readouterr().out.splitlines())
    (block,) = code_blocks("text")
    for line in block.splitlines():
        assert line.strip() == "..." or line in printed, line


@pytest.mark.parametrize("which", ["", "promises", "throughput"])
def test_tables_of_results_are_the_generated_ones(which):
    from benchmarks.table import format_table

    command = f"python benchmarks/table.py {which}".strip()
    assert f"<!-- {command} -->\n{format_table(which)}\n<!-- end of table -->" in README


@pytest.fixture(scope="module")
def comparisons():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import planner_table

        yield planner_table, planner_table.compare()


def test_runs_of_one_day_are_kept_apart(tmp_path, monkeypatch):
    """What a later one did not come to measure is not taken from it, nor what it did from the one before."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import planner_table

    runs = [(6, {"fits": 0, "allocated, steady": 20.4, "host": 9.9}), (8, {"fits": 0, "host": 4.0})]
    file = tmp_path / "results.csv"
    lines = ["date,claim,value,unit,command,hardware,versions"]
    for steps, figures in runs:
        command = f"python benchmarks/offload.py --row 70b-resident --steps {steps}"
        for name, value in figures.items():
            lines.append(f'2026-11-28,"70b-resident: {name}",{value},GiB,{command},2x NVIDIA H200,torch==2.11.0')
    file.write_text("\n".join(lines))
    (run,) = planner_table.read_runs(file)
    assert run.figures == {name: value * 2**30 for name, value in runs[0][1].items()}


def test_table_of_plans_is_the_generated_one(comparisons):
    module, found = comparisons
    table = f"<!-- python benchmarks/planner_table.py -->\n{module.format_table(found)}\n<!-- end of table -->"
    assert table in README


def test_what_is_planned_is_what_was_measured(comparisons):
    """On one and two GPUs, from 1B to 405B, with and without experts and offloading."""
    _, found = comparisons
    assert len(found) >= 16
    for one in found:
        said = f"{one.run.shape} {one.run.words}: {one.error:+.1%}, host {one.host_error:+.1%}"
        assert -0.03 <= one.error <= 0.05, said
        assert abs(one.host_error) <= 0.10, said
        if outside := one.run.figures.get("outside the allocator"):  # with as many channels of NCCL as it likes
            assert abs(cards.outside_bytes(one.run.ranks) / outside - 1) <= 0.02, said
    assert f"<summary>{len(found)} runs, planned and measured</summary>" in README


def test_a_run_is_compared_with_the_latest_that_ended(comparisons, tmp_path):
    """Its figures are those of one run, and a cap of the call's own is no reason to leave it out."""
    module, _ = comparisons
    command = "python benchmarks/offload.py --row 70b-resident --steps 6 --device-memory 24GiB -- --use-liger-kernel"
    lines = ["date,claim,value,unit,command,hardware,versions"]
    for day, figures in ((1, {"host": 8, "allocated, steady": 2, "host, before": 1}), (2, {"allocated, steady": 3})):
        lines += [f'2026-01-0{day},"r: {name}",{size},GiB,{command},2x GPU,v' for name, size in figures.items()]
    lines.append(f'2026-01-03,"r: host",9,GiB,{command},2x GPU,v')
    results = tmp_path / "results.csv"
    results.write_text("\n".join(lines))
    (run,) = module.read_runs(results)
    assert (run.shape, run.ranks, run.figures) == ("llama-2-70b", 2, {"allocated, steady": 3 * 2**30})


def test_table_of_options_is_complete():
    """Every option of our own is in the table, with its default."""
    upstream = {field.name for field in dataclasses.fields(SFTConfig)}
    own = {field.name: field.default for field in dataclasses.fields(QLoRAFSDPConfig) if field.name not in upstream}
    printed = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", README, flags=re.MULTILINE))
    assert printed == {name: f'"{value}"' if isinstance(value, str) else str(value) for name, value in own.items()}


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^    make (\S+)$", README, flags=re.MULTILINE)
    assert targets == ["demo", "test"]
    assert all(f"\n{target}:" in makefile for target in targets)


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#:]+)\)", README))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()
