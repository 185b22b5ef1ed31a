"""The command trains what the trainer trains: the same adapter to the bit, whatever file or launcher it comes from."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from trl import DatasetMixtureConfig, SFTConfig, get_dataset
from trl.scripts.utils import DatasetConfig

from hf_qlora_fsdp import cli
from hf_qlora_fsdp.conversion import convert
from hf_qlora_fsdp.train import ranges
from hf_qlora_fsdp.train.arguments import ALL
from hf_qlora_fsdp.train.command import _describe_loss, _is_ours, exit_code, read_data
from hf_qlora_fsdp.train.command_line import read_request
from hf_qlora_fsdp.train.data import check_prepared
from hf_qlora_fsdp.translation import parse_bool
from tests.test_slurm import LAUNCHED, step
from tests.tiny import ROW_FORMS, make_checkpoint, tiny_dataset

ROOT = Path(__file__).parents[2]
NUM_STEPS = 4
CHANGES = {"max_steps": NUM_STEPS, "max_length": 64, "learning_rate": 5e-3, "gradient_accumulation_steps": 1}
CHANGES |= {"lr_scheduler_type": "constant", "logging_steps": 1, "warmup_steps": 0, "report_to": "none"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and rows, in every form and file."""
    folder = tmp_path_factory.mktemp("training")
    make_checkpoint(folder / "model")
    shutil.copytree(folder / "model", folder / "huge")
    wide = {"hidden_size": 2**16, "intermediate_size": 2**16, "num_attention_heads": 512, "num_hidden_layers": 96}
    config = json.loads((folder / "huge" / "config.json").read_text())
    (folder / "huge" / "config.json").write_text(json.dumps(config | wide))
    for form in ROW_FORMS:
        rows = tiny_dataset(24, form)
        rows.to_json(folder / f"{form}.jsonl")
        (folder / f"{form}.json").write_text(json.dumps(rows.to_list()))
        rows.to_parquet(folder / f"{form}.parquet")
        if form != "conversational":  # a table of texts holds no messages
            rows.to_csv(folder / f"{form}.csv")
    return folder


def arguments(folder: Path, output: str, **changes: Any) -> list[str]:
    """The example file, and on the command line what a test on the CPU changes of it."""
    options: dict[str, Any] = {"config": ROOT / "examples" / "train.yaml", "model_name_or_path": folder / "model"}
    options |= {"dataset_name": folder / "conversational.jsonl", "output_dir": folder / output, "use_cpu": True}
    options |= CHANGES | changes
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def environment(**changes: str) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    return plain | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])} | changes


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


COMMAND = ["-m", "hf_qlora_fsdp.cli", "train"]


@pytest.fixture(scope="module")
def finished(folder: Path) -> subprocess.CompletedProcess[str]:
    """The command, with processes of its own: one tree for all that is claimed of it."""
    options = arguments(folder, "own", plot=folder / "curves.png", eval_strategy="steps", eval_steps=2)
    options += ["--eval_dataset_name", str(folder / "conversational.json")]
    done = subprocess.run(
        [sys.executable, *COMMAND, *options], env=environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def train_in_python(_: int, folder: str, changes: dict[str, Any]) -> list[dict[str, Any]]:
    from peft import LoraConfig

    from hf_qlora_fsdp import QLoRAFSDPConfig, QLoRAFSDPTrainer

    rows = Dataset.from_json(f"{folder}/conversational.jsonl", cache_dir=f"{folder}/cache")
    args = QLoRAFSDPConfig(
        f"{folder}/python",
        packing=True,
        per_device_train_batch_size=1,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        **changes,
    )
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = QLoRAFSDPTrainer(f"{folder}/model", args=args, train_dataset=rows, peft_config=lora)
    trainer.train()
    trainer.save_model()
    return trainer.state.log_history


def assert_same_adapter(one: Path, other: Path) -> None:
    ours, theirs = load_file(one / "adapter_model.safetensors"), load_file(other / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys() and len(ours) == 28
    assert all(torch.equal(tensor, theirs[name]) and tensor.any() for name, tensor in ours.items())


def test_the_command_trains_what_the_trainer_does(finished: Any, folder: Path, ranks: Any) -> None:
    history = ranks.run(train_in_python, str(folder), CHANGES)[0]
    assert_same_adapter(folder / "own", folder / "python")
    losses = [entry["loss"] for entry in history if "loss" in entry]
    num_tokens = max(entry.get("num_tokens", 0) for entry in history)
    lines = re.findall(
        r"^step (\d) of 4  loss (\S+)  (\S+) tokens/s  host \S+ MiB  0:\d\d left$", finished.stdout, re.M
    )
    assert [(int(number), loss) for number, loss, _ in lines] == [(i + 1, f"{x:.4g}") for i, x in enumerate(losses)]
    assert all(float(speed.replace(",", "")) > 0 for *_, speed in lines)
    assert f"  tokens       {num_tokens:,.0f}, " in finished.stdout
    assert f"  loss         {losses[0]:.4g} at first, {losses[-1]:.4g} at last" in finished.stdout


def test_it_evaluates_draws_and_says_what_is_next(finished: Any, folder: Path) -> None:
    assert re.findall(r"^step (\d) of 4  eval_loss \S+", finished.stdout, re.M) == ["2", "4"]
    with Image.open(folder / "curves.png") as picture:
        assert len(picture.convert("L").getcolors()) > 20  # drawn on, not blank
    merge = f"hf-qlora-fsdp merge {folder}/model {folder}/own {folder}/own-merged"
    assert f"  next         {merge}\n" in finished.stdout
    assert "\r" not in finished.stdout  # no bar where there is no terminal


LAUNCHERS = {
    "torchrun": [["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *COMMAND]],
    "accelerate": [["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", *COMMAND]],
    "srun": [COMMAND, COMMAND],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_under_a_launcher_it_is_the_same(launcher: str, finished: Any, folder: Path) -> None:
    commands = [[sys.executable, *command, *arguments(folder, launcher)] for command in LAUNCHERS[launcher]]
    variables = [step(rank) if launcher == "srun" else {} for rank in range(2)]
    running = [
        subprocess.Popen(command, env=environment(**given), stdout=subprocess.PIPE, text=True)
        for command, given in zip(commands, variables, strict=False)
    ]
    said = [process.communicate(timeout=240)[0] for process in running]
    assert [process.returncode for process in running] == [0] * len(running)
    assert_same_adapter(folder / launcher, folder / "own")
    assert sum(text.count("hf-qlora-fsdp merge") for text in said) == 1  # one voice


@pytest.mark.slow
def test_a_signal_saves_and_the_same_command_goes_on(finished: Any, folder: Path) -> None:
    # What takes time between steps and changes nothing, so that the signal finds the run still going.
    slowly = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 1, "save_steps": 1}
    rows = folder / "conversational.json"
    command = [sys.executable, *COMMAND, *arguments(folder, "stopped", eval_dataset_name=rows, **slowly)]
    running = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    for line in running.stdout:
        if line.startswith("step 1 of"):
            running.send_signal(signal.SIGUSR1)
            break
    rest = running.communicate(timeout=120)[0]
    assert running.returncode == 75
    assert f"step {NUM_STEPS} of" not in rest and not (folder / "stopped" / "adapter_model.safetensors").exists()
    again = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert again.returncode == 0
    assert "Resuming from" in again.stderr
    assert_same_adapter(folder / "stopped", folder / "own")
    once_more = subprocess.run(
        [*command, "--plot", folder / "again.png"], env=environment(), capture_output=True, text=True, timeout=240
    )
    assert once_more.returncode == 0
    assert f"  steps        {NUM_STEPS}, all of them before it was resumed" in once_more.stdout
    assert "  tokens  " not in once_more.stdout and (folder / "again.png").exists()  # of what was logged then


@pytest.mark.slow
def test_an_interruption_ends_all_without_a_traceback(folder: Path) -> None:
    command = [sys.executable, *COMMAND, *arguments(folder, "interrupted", max_steps=10_000)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = subprocess.Popen(command, env=environment(), start_new_session=True, **pipes)
    assert running.stdout is not None
    next(line for line in running.stdout if line.startswith("step "))
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does
    said = running.communicate(timeout=60)[1]
    assert running.returncode == 130
    assert "Traceback" not in said and said.count("hf-qlora-fsdp: interrupted") == 1


@pytest.mark.slow
def test_on_a_terminal_there_is_a_bar(folder: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    command = [sys.executable, *COMMAND, *arguments(folder, "shown", nproc=1, max_steps=3)]
    with subprocess.Popen(command, env=environment(), stdout=theirs, stderr=subprocess.DEVNULL) as running:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:  # how Linux says that the other end is closed
            pass
    os.close(ours)
    assert running.returncode == 0
    last = [text for text in re.split(r"[\r\n]+", shown.decode()) if "3/3" in text][-1]
    assert re.search(r"100%.*3/3 \[00:\d\d<00:00, .*loss=\d\S+, tokens/s=\S+, host=\S+ MiB\]", last)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "launched", "said"),
    [
        ({"model_name_or_path": "huge", "auto_plan": True, "nproc": 1}, {}, "auto_plan=True found no settings"),
        ({"param_dtype": "float32", "bf16": True}, {}, "You gave param_dtype='float32' with bf16=True"),
        (
            {"dataset_name": "prompt_completion.csv", "max_length": 4, "packing": False},
            {},
            "Write a larger --max_length",
        ),
        (
            {"dataset_name": "prompt_completion.csv", "max_length": 4, "packing": True},
            {},
            "Write a larger --max_length",
        ),
        ({"lora_target_modules": "q_prof"}, {}, "Target modules {'q_prof'} not found"),
        ({"nproc": 3}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "--nproc 3 in"),
    ],
    ids=["memory", "arguments", "rows", "packed rows", "model", "processes"],
)
def test_what_the_workers_refuse_ends_with_one_voice(
    changes: dict[str, Any], launched: dict[str, str], said: str, folder: Path
) -> None:
    command = [sys.executable, *COMMAND, *arguments(folder, "refused", **changes)]
    variables = environment(**launched, **({"MASTER_PORT": free_port()} if launched else {}))
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == (1 if "auto_plan" in said else 2), done.stderr[-4000:]
    assert len(re.findall(f"^hf-qlora-fsdp: .*{re.escape(said)}", done.stderr, re.M)) == 1
    assert ("Traceback" in done.stderr) == ("q_prof" in said)  # an error that is not ours comes with its place
    assert "torch/distributed/elastic" not in done.stderr  # nor a word of the agent's


# -- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ROW_FORMS)
def test_every_file_holds_the_same_rows(form: str, folder: Path) -> None:
    expected = tiny_dataset(24, form).to_list()
    for ending in ("json", "jsonl", "parquet", "csv"):
        if ending == "csv" and form == "conversational":
            continue
        train, held_out = read_data(read_request(given(folder, dataset_name=folder / f"{form}.{ending}")))
        assert train.to_list() == expected and held_out is None


def given(folder: Path, **options: Any) -> list[str]:
    defaults = {"model_name_or_path": folder / "model"}
    return [text for name, value in (defaults | options).items() for text in (f"--{name}", str(value))]


def test_what_is_evaluated_on(folder: Path) -> None:
    rows, strategy = folder / "text.jsonl", {"eval_strategy": "epoch"}
    train, test = read_data(read_request(given(folder, dataset_name=rows, test_split_size=0.25, **strategy)))
    assert (len(train), len(test)) == (18, 6)
    again = read_data(read_request(given(folder, dataset_name=rows, test_split_size=6, **strategy)))
    assert (train.to_list(), test.to_list()) == (again[0].to_list(), again[1].to_list())  # by the seed of the run
    other = read_data(read_request(given(folder, dataset_name=rows, test_split_size=6, seed=1, **strategy)))
    assert other[1].to_list() != test.to_list()
    _, test = read_data(
        read_request(given(folder, dataset_name=rows, eval_dataset_name=folder / "text.csv", **strategy))
    )
    assert test.to_list() == tiny_dataset(24).to_list()
    slices = {"dataset_train_split": "train[:20]", "dataset_test_split": "train[20:]"}
    train, test = read_data(read_request(given(folder, dataset_name=rows, **slices, **strategy)))
    assert train.to_list() + test.to_list() == tiny_dataset(24).to_list()


def test_a_folder_and_a_mixture(folder: Path, tmp_path: Path) -> None:
    for split, rows in (("train", tiny_dataset(8, seed=1)), ("test", tiny_dataset(3, seed=2))):
        rows.to_json(tmp_path / f"{split}.jsonl")
    train, test = read_data(read_request(given(folder, dataset_name=tmp_path, eval_strategy="epoch")))
    assert (train.to_list(), test.to_list()) == (tiny_dataset(8, seed=1).to_list(), tiny_dataset(3, seed=2).to_list())
    config = tmp_path / "mixture.yaml"
    parts = [f"- {{path: {folder / 'text.csv'}, fraction: 0.75}}", f"- {{path: {tmp_path}, fraction: 0.25}}"]
    config.write_text("\n".join(["datasets:", *parts, "eval_strategy: no", "streaming: false"]))
    train, test = read_data(read_request(given(folder, config=config)))
    assert train.to_list() == tiny_dataset(24).to_list() + tiny_dataset(8, seed=1).to_list()  # 24 : 8 is 3 : 1
    assert test is None
    reference = [DatasetConfig("json", data_files=str(folder / "text.jsonl"), fraction=2)]
    reference += [DatasetConfig(str(tmp_path), split="test", fraction=1)]
    parts = [f"- {{path: {folder / 'text.json'}, fraction: 2}}", f"- {{path: {tmp_path}, split: test, fraction: 1}}"]
    config.write_text("\n".join(["datasets:", *parts]))
    train, _ = read_data(read_request(given(folder, config=config)))
    assert train.to_list() == get_dataset(DatasetMixtureConfig(reference))["train"].to_list()
    config.write_text("\n".join(["datasets:", f"- path: {tmp_path}", "streaming: true", "max_steps: 2"]))
    train, _ = read_data(read_request(given(folder, config=config)))
    assert not isinstance(train, Dataset) and list(train) == tiny_dataset(8, seed=1).to_list()


def test_values_of_file_and_command_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_A_FILE", "before")
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model_name_or_path: {folder / 'model'}\ndataset_name: {folder / 'text.json'}\nenv: {{OF_A_FILE: 7}}\n"
        "learning_rate: 1e-4\nmax_length: null\npacking: true\nsave_strategy: no\nlora_r: 8\nuse_peft: true\n"
        "lora_target_modules: [q_proj, v_proj]\nmodel_init_kwargs: {revision: main}\nuse_bnb_nested_quant: false\n"
    )
    request = read_request(["--config", str(config), "--lora_r", "4", "--packing", "False", "--max-steps", "3"])
    assert request.training == {
        "learning_rate": 1e-4,
        "max_length": None,
        "packing": False,
        "save_strategy": "no",
        "max_steps": 3,
        "model_init_kwargs": {"revision": "main"},
        "bnb_4bit_use_double_quant": False,
    }
    assert (request.model.lora_r, request.model.lora_alpha, request.model.lora_dropout) == (4, 32, 0.0)
    assert request.model.lora_target_modules == ["q_proj", "v_proj"]
    assert os.environ["OF_A_FILE"] == "7"


def test_the_public_files_of_others_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever `convert` makes of them has a name here, and a value that the name can have."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()  # where LLaMA-Factory looks
    names = {name: {"file_name": f"{name}.json"} for name in ("identity", "alpaca_en_demo")}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(names))
    for path in sorted((ROOT / "tests" / "conversion" / "files").glob("*.yaml")):
        text = path.read_text().split("\n---\n")[0]
        (tmp_path / "theirs.yaml").write_text(text)
        conversion = convert(tmp_path / "theirs.yaml")
        options = ["--axolotl", str(tmp_path / "theirs.yaml"), "--logging_steps", "7"]
        if conversion.program == "accelerate":  # which says nothing of model and data
            options += ["--model_name_or_path", "x", "--dataset_name", "x"]
        request = read_request(options)
        assert request.notes == conversion.notes
        assert request.training["logging_steps"] == 7  # the command line wins
        for name, value in (conversion.arguments | {"logging_steps": 7}).items():
            if name in request.training:
                assert request.training[name] == value, (path, name)
            elif name != "datasets" and value != ["all-linear"]:
                homes = (request.model, request.data, request.mixture)
                assert [getattr(home, name) for home in homes if hasattr(home, name)] == [value], (path, name)


def test_rows_of_other_forms(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "alpaca.json").write_text(
        json.dumps([{"instruction": "Add.", "output": "3", "input": "1 2", "text": "x"}])
    )
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    (tmp_path / "sharegpt.json").write_text(json.dumps([{"conversations": turns, "id": 7}]))
    read = {}
    for form in ("alpaca", "alpaca_chat", "sharegpt"):
        file = tmp_path / f"{form.partition('_')[0]}.json"
        (read[form],) = read_data(read_request(given(folder, dataset_name=file, dataset_format=form)))[0].to_list()
        mixed = read_data(read_request(given(folder, datasets=file, dataset_format=form)))[0]
        assert mixed.to_list() == [read[form]]
    assert read["alpaca"].keys() == read["alpaca_chat"].keys() == {"prompt", "completion"}
    assert "### Input:\n1 2\n" in read["alpaca"]["prompt"] and read["alpaca"]["completion"] == "3"
    assert read["alpaca_chat"]["prompt"] == [{"role": "user", "content": "Add.\n1 2"}]
    assert [turn["role"] for turn in read["sharegpt"]["messages"]] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("options", "modules"),
    [
        ([], "all-linear"),
        (["--lora_target_modules", "q_proj"], ["q_proj"]),
        (["--lora_target_modules", "q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (["--lora_target_modules", ".*_proj"], ".*_proj"),  # a pattern
        (["--lora_target_parameters", "experts.down_proj"], None),
    ],
)
def test_what_is_adapted(options: list[str], modules: Any, folder: Path) -> None:
    assert read_request([*given(folder, dataset_name="x"), *options]).model.lora_target_modules == modules


def test_rows_with_nothing_to_learn(caplog: pytest.LogCaptureFixture) -> None:
    rows = Dataset.from_list([{"labels": [-100] * 4}, {"labels": [-100, 5]}])
    learned, nothing = rows.select([1]), rows.select([0])
    packed, cut = SFTConfig(use_cpu=True, packing=True), SFTConfig(use_cpu=True, max_length=7)
    check_prepared(rows, rows, packed)
    check_prepared(learned, learned, cut)
    assert not caplog.records
    check_prepared(learned, rows, cut)
    check_prepared(learned, rows, replace(packed, max_length=7, eval_packing=False), evaluation=True)
    assert [record.message for record in caplog.records] == [
        f"1 of 2 rows have no token to learn within max_length=7, and are not {doing} on."
        for doing in ("trained", "evaluated")
    ]
    for kept in (nothing, rows.select([])):
        with pytest.raises(ValueError, match="none is left with a token to learn"):
            check_prepared(kept, rows, packed)


# Files of options that cannot work, and what is said about them.
FILES = {
    "mapping": ("- 1\n", "no mapping"),
    "broken": ("a: [", "cannot be read"),
    "twice": ("lora_r: 8\nlora_r: 16\n", "'lora_r' is there twice"),
    "key": ("lora_rang: 8\n", "Did you mean lora_r.* `hf-qlora"),
    "theirs": ("base_model: x\n", "If the file is one of Axolotl, which has that key, write --axolotl theirs.yaml"),
    "type": ("max_steps: 1.5\n", "invalid int value"),
    "list": ("max_steps: [1]\n", "a list is no value for it"),
    "part": ("datasets: [{paths: a.jsonl}]\n", "it has no path"),
    "part_key": ("datasets: [{path: a.jsonl, weight: 1}]\n", "Known: path"),
    "part_share": ("datasets: [{path: text.json, fraction: 1}, text.csv]\n", "Give each dataset a fraction"),
    "part_form": ("datasets: [text.json, prompt_completion.json]\n", "Bring them into one form"),
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora_rank": 8}, "Did you mean .*--lora_r"),
        ({"max_step": 8}, "--max_steps"),
        ({"max_steps": "many"}, "invalid int value"),
        ({"packing": "perhaps"}, "Truthy value expected"),
        ({"bnb_4bit_quant_type": "nf5"}, "invalid choice"),
        ({"model_name_or_path": ""}, "there is nothing to train"),
        ({"model_name_or_path": "no/such/model"}, "config.json cannot be had"),
        ({"dataset_name": ""}, "there is nothing to train on"),
        ({"dataset_name": "no.jsonl"}, "there is no such file"),
        ({"dataset_name": "no/dataset"}, "cannot be read"),
        ({"dataset_name": "model/tokenizer.model"}, "cannot be read|no such"),
        ({"dataset_name": "notes.md"}, "does not say how rows are written"),
        ({"dataset_name": "damaged.jsonl"}, "cannot be read"),
        ({"dataset_train_split": "training"}, "Unknown split"),
        ({"dataset_config": "en"}, "files have none"),
        ({"datasets": "text.json"}, "Write `datasets` with an entry for each"),
        ({"eval_strategy": "steps"}, "Unknown split"),
        ({"eval_dataset_name": "text.json"}, "Write --eval_strategy steps"),
        ({"eval_dataset_name": "x", "test_split_size": 0.1, "eval_strategy": "epoch"}, "Keep one of them"),
        ({"test_split_size": 0.1}, "Write --eval_strategy steps"),
        ({"test_split_size": 24, "eval_strategy": "epoch"}, "leaves nothing on one side"),
        ({"use_peft": False}, "adapters"),
        ({"load_in_4bit": False}, "only weights in 4 bits"),
        ({"load_in_8bit": True}, "only weights in 4 bits"),
        ({"lora_task_type": "SEQ_CLS"}, "causal language model"),
        ({"use_bnb_nested_quant": True, "bnb_4bit_use_double_quant": False}, "one option with two values"),
        ({"ignore_bias_buffers": True}, "DDP"),
        ({"nproc": "none"}, "no number of processes"),
        ({"nproc": 0}, "no number of processes"),
        ({"dataset_streaming": True}, "--max_steps N"),
        ({"report_to": "no_such_tracker"}, "pip install it"),
        ({"plot": "no/such/folder/x.png"}, "there is no folder for it"),
        ({"plot": "model"}, "a picture is a file"),
        ({"output_dir": "notes.md"}, "'notes.md' is a file"),
        ({"output_dir": "notes.md/run"}, "notes.md' is a file"),
        ({"resume_from_checkpoint": "checkpoint-7"}, "'checkpoint-7' is no folder"),
        ({"model_revision": "v2"}, "only models of the Hub have revisions"),
        ({"model_name_or_path": "unknown_type"}, "does not recognize"),
        ({"model_name_or_path": "sizeless"}, "does not say num_hidden_layers"),
        ({"packing": True, "max_length": "none"}, "Write --max_length N"),
        ({"config": "no.yaml"}, "cannot be read"),
        ({"config": "no.yaml", "axolotl": "x.yaml"}, "hf-qlora-fsdp convert"),
        ({"axolotl": "mapping.yaml"}, "no mapping of keys"),
        ({"dataset_format": "alpaca"}, "a row of Alpaca"),
        ({"dataset_name": "alpaca.jsonl"}, "Write --dataset_format alpaca, or alpaca_chat"),
        ({"dataset_name": "sharegpt.jsonl"}, "Write --dataset_format sharegpt"),
        ({"dataset_name": "other.jsonl"}, "Write --dataset_text_field COLUMN"),
        ({"dataset_name": "other.jsonl", "dataset_text_field": "answer"}, "columns question, reply"),
        ({"eval_dataset_name": "other.jsonl", "eval_strategy": "epoch"}, "Write --dataset_text_field COLUMN"),
        ({"dataset_format": "alpacca"}, "invalid choice"),
        *(({"config": f"{name}.yaml"}, said) for name, (_, said) in FILES.items()),
    ],
    ids=str,
)
def test_what_cannot_work_ends_with_2(
    changes: dict[str, Any],
    said: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, (text, _) in FILES.items():
        (folder / f"{name}.yaml").write_text(text)
    (folder / "notes.md").write_text("# notes")
    (folder / "damaged.jsonl").write_text('{"text": "a"}\n{"text": \n')
    for name, row in {
        "alpaca": {"instruction": "Add.", "output": "3"},
        "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}]},
        "other": {"question": "Why?", "reply": "So."},
    }.items():
        (folder / f"{name}.jsonl").write_text(json.dumps(row))
    for name, change in {"unknown_type": {"model_type": "lama"}, "sizeless": {"num_hidden_layers": None}}.items():
        (folder / name).mkdir(exist_ok=True)
        options = json.loads((folder / "model" / "config.json").read_text()) | change
        text = json.dumps({name: value for name, value in options.items() if value is not None})
        (folder / name / "config.json").write_text(text)
    monkeypatch.chdir(folder)
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    options = {"model_name_or_path": "model"} | changes
    if not str(changes.get("config")).startswith("part"):
        options = {"dataset_name": "text.jsonl"} | options
    options = {name: value for name, value in options.items() if value != ""}
    assert cli.main(["train", *(text for name, value in options.items() for text in (f"--{name}", str(value)))]) == 2
    output = capsys.readouterr()
    assert re.search(said, output.err), output.err
    assert re.search("^hf-qlora-fsdp: ", output.err, re.M) and "Traceback" not in output.err and not output.out


IMPOSSIBLE = {
    "lora_r": ("0", "-1"),
    "lora_alpha": ("0", "-16"),
    "lora_dropout": ("1", "-0.1"),
    "per_device_train_batch_size": ("0", "-1"),
    "per_device_eval_batch_size": ("0",),
    "gradient_accumulation_steps": ("0", "-2"),
    "max_length": ("0", "1", "-7"),
    "pad_to_multiple_of": ("0", "-8", "many"),
    "dataset_num_proc": ("0",),
    "num_train_epochs": ("0", "-1", "inf"),
    "max_steps": ("0", "-5"),
    "learning_rate": ("0", "-0.5", "nan", "inf"),
    "adam_beta1": ("1",),
    "adam_beta2": ("-0.1",),
    "label_smoothing_factor": ("2",),
    "weight_decay": ("-1", "nan"),
    "max_grad_norm": ("-1",),
    "adam_epsilon": ("-0.1",),
    "neftune_noise_alpha": ("-5",),
    "router_aux_loss_coef": ("-0.1",),
    "warmup_steps": ("-1",),
    "seed": ("-1",),
    "data_seed": ("-1",),
    "dataloader_num_workers": ("-1",),
    "logging_steps": ("0",),
    "save_steps": ("0", "-1"),
    "eval_steps": ("0", "-0.5"),
    "save_total_limit": ("0", "-1"),
    "test_split_size": ("0", "-1", "1.5"),
}


def test_a_number_where_upstream_also_takes_a_word(folder: Path, tmp_path: Path) -> None:
    hints = {name: {*get_args(hint)} for kind in ALL for name, hint in get_type_hints(kind).items()}
    assert [name for name, kinds in hints.items() if str in kinds and kinds & {int, float}] == ["pad_to_multiple_of"]
    (tmp_path / "run.yaml").write_text("pad_to_multiple_of: 8\n")
    for options, value in (
        ({"config": tmp_path / "run.yaml"}, 8),
        ({"pad_to_multiple_of": 16}, 16),
        ({"pad_to_multiple_of": "auto"}, "auto"),
    ):
        assert read_request(given(folder, dataset_name="x", **options)).training == {"pad_to_multiple_of": value}


def test_numbers_that_no_run_can_have(folder: Path) -> None:
    assert sorted(IMPOSSIBLE) == sorted(name for names, *_ in ranges._RANGES for name in names.split())
    for name, numbers in IMPOSSIBLE.items():
        for number in numbers:
            with pytest.raises(ValueError, match=f"You gave {name}=.* That cannot work: .* Write "):
                read_request(given(folder, dataset_name="x", eval_strategy="epoch", **{name: number}))
    possible = {"max_steps": -1, "max_length": "none", "lora_dropout": 0, "warmup_steps": 0.1, "test_split_size": 5}
    read_request(given(folder, dataset_name="x", eval_strategy="epoch", **possible))


def test_help_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for name in ("config", "nproc", "plot", "dataset_name", "eval_dataset_name", "lora_r", "cpu_offload", "packing"):
        assert f"--{name}" in text


@pytest.mark.parametrize(("raising", "ours"), [(lambda: parse_bool("x", "perhaps"), True), (lambda: int("x"), False)])
def test_errors_in_our_words_are_told_from_surprising_ones(raising: Any, ours: bool) -> None:
    with pytest.raises(ValueError) as error:
        raising()
    assert _is_ours(error.value) is ours


def test_the_loss_of_a_run_that_was_too_short_to_log_one() -> None:
    assert _describe_loss([{"loss": 2.5}, {"eval_loss": 2}, {"loss": 1.5}, {"train_loss": 2}]) == (
        "2.5 at first, 1.5 at last"
    )
    assert _describe_loss([{"train_loss": 2.0}]) == "2 on average"
    assert _describe_loss([]) == "not logged"


def test_exit_codes() -> None:
    assert exit_code({}) == 0
    assert exit_code({0: 75, 1: 75}) == 75
    assert exit_code({1: 2}) == 2
    assert exit_code({0: 1, 1: -signal.SIGKILL}) == 128 + signal.SIGKILL
