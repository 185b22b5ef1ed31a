"""The doctor: healthy where runs work, and never ill of what it looks for.

What is broken here is broken for real: libraries that are missing, too old, raise or crash on import, and workers whose
weights or gradients are altered, through folders on `PYTHONPATH`. The doctor has no switch for any of that.
"""

from __future__ import annotations

import configparser
import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from hf_qlora_fsdp import cli
from hf_qlora_fsdp.compat.versions import LIBRARIES, Support
from hf_qlora_fsdp.doctor import environment_checks, gpu_checks, host_checks, live_test, software_checks
from hf_qlora_fsdp.doctor.examination import CHECKS
from hf_qlora_fsdp.doctor.findings import Finding, format_finding

ROOT = Path(__file__).parents[2]
ALL = [check.name for check in CHECKS if check.name != "links"]  # says nothing where there are no two GPUs


def start_doctor(*options: str, python: str = sys.executable, path: str = "", **environment: str) -> subprocess.Popen:
    command = [python, "-m", "hf_qlora_fsdp.cli", "doctor", *options]
    # What other tests have left in this process's environment (upstream writes ACCELERATE_* there) is not asked about.
    inherited = {
        name: value for name, value in os.environ.items() if not [*environment_checks.find_variables({name: value})]
    }
    paths = [path, str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = {**inherited, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **environment}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def levels(report: dict[str, Any], check: str) -> list[str]:
    return [finding["level"] for finding in report["findings"] if finding["check"] == check]


def said(report: dict[str, Any], check: str) -> str:
    return " ".join(" ".join(finding.values()) for finding in report["findings"] if finding["check"] == check)


# -- A healthy machine, and a broken one -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken_python(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """A Python without transformers, a folder in which other libraries are broken, and one that lacks an extra."""
    home = tmp_path_factory.mktemp("python")
    venv.create(home, with_pip=False, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)}))
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith("transformers"):
            (site / entry.name).symlink_to(entry)
    folder = tmp_path_factory.mktemp("broken")
    lacking = tmp_path_factory.mktemp("lacking")
    (lacking / "matplotlib.py").write_text("raise ModuleNotFoundError('no matplotlib', name='matplotlib')")
    for name, source in {
        "bitsandbytes": "raise ImportError('libcudart.so.13: cannot open shared object file')",
        "datasets": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    }.items():
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(source)
    (folder / "safetensors-0.1.dist-info").mkdir()
    (folder / "accelerate-0.34.2.dist-info").mkdir()
    for metadata in folder.glob("*.dist-info"):
        name, version = metadata.name.removesuffix(".dist-info").split("-")
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return str(home / "bin" / "python"), str(folder), str(lacking)


@pytest.fixture(scope="module")
def reports(broken_python: tuple[str, str, str]) -> dict[str, Any]:
    """What the doctor says of this machine and of the broken one. Both are asked at the same time."""
    python, folder, lacking = broken_python
    doctors = {
        "healthy": start_doctor("--json", path=lacking, CUDA_LAUNCH_BLOCKING="1", CUDA_VISIBLE_DEVICES=""),
        "broken": start_doctor("--json", python=python, path=folder, CUDA_VISIBLE_DEVICES=""),
    }
    reports = {}
    for name, doctor in doctors.items():
        out, err = doctor.communicate(timeout=240)
        assert not err
        reports[name] = {**json.loads(out), "code": doctor.returncode}
    return reports


def test_a_healthy_machine(reports: dict[str, Any]) -> None:
    report = reports["healthy"]
    assert report["code"] == 0 and report["healthy"] is True
    assert {finding["check"] for finding in report["findings"]} == set(ALL)
    assert levels(report, "environment") == ["warning"], said(report, "environment")  # the variable that was set
    assert levels(report, "hf_qlora_fsdp") == ["note", "ok"] and "matplotlib" in said(report, "hf_qlora_fsdp")
    for check in (*LIBRARIES, "quantisation", "kernels", "patches", "collectives", "live test"):
        assert set(levels(report, check)) == {"ok"}, said(report, check)
    assert "SwiGLU and RMSNorm run as operations of torch" in said(report, "kernels")
    assert "2 processes on the CPU over gloo" in said(report, "live test")
    assert said(report, "patches").count("Until") == 4  # one a patch


@pytest.mark.gpu
def test_kernels_are_tried_on_a_gpu() -> None:
    from hf_qlora_fsdp.doctor.kernel_checks import check_kernels

    findings = [finding for finding in check_kernels() if "cuda:0" in finding.what]
    assert [finding.level for finding in findings] == ["ok"] * 3, findings


def test_a_broken_machine_is_examined_to_the_end(reports: dict[str, Any]) -> None:
    report = reports["broken"]
    assert report["code"] == 1 and report["healthy"] is False
    assert list(dict.fromkeys(finding["check"] for finding in report["findings"])) == ALL
    for check, what, fix in (
        ("transformers", "transformers is not installed.", 'pip install "transformers>=5.17,<6"'),
        ("bitsandbytes", "libcudart.so.13: cannot open shared object file", "--force-reinstall"),
        ("datasets", "killed by SIGSEGV", "Reinstall the library"),
        ("accelerate", "0.34.2 is too old: >=1.15", 'pip install "accelerate>=1.15"'),
    ):
        assert levels(report, check)[-1] == "error" and levels(report, check).count("error") == 1
        assert what in said(report, check) and fix in said(report, check)
    for check in ("peft", "trl", "hf_qlora_fsdp", "quantisation", "live test"):
        assert "It needs" in said(report, check) and levels(report, check)[-1] == "note"
    for check in ("python", "torch", "safetensors", "memory", "disks"):
        assert "error" not in levels(report, check)


def test_a_python_without_any_library_is_told_all_that_is_missing(tmp_path: Path) -> None:
    venv.create(tmp_path, with_pip=False, symlinks=True)
    doctor = start_doctor("--json", python=str(tmp_path / "bin" / "python"))
    out, err = doctor.communicate(timeout=60)
    assert doctor.returncode == 1 and not err
    for name in LIBRARIES:
        assert f"{name} is not installed." in said(json.loads(out), name)


def test_a_hanging_check_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from hf_qlora_fsdp.doctor import examination

    pid = tmp_path / "pid"
    (tmp_path / "packaging").mkdir()
    hang = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    (tmp_path / "packaging" / "__init__.py").write_text(hang)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    checks = [examination.Check(check.name, check.run, timeout_seconds=3) for check in CHECKS]
    monkeypatch.setattr(examination, "CHECKS", checks)
    found = list(examination.examine(["packaging", "shared memory"]))
    assert [name for name, _ in found] == ["packaging", "shared memory"]
    assert found[0][1].level == "error" and "no answer within" in found[0][1].what
    status = Path(f"/proc/{pid.read_text()}/status")
    assert not status.exists()


def test_an_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        cli.main(["doctor", "--live"])
    assert refused.value.code == 2
    assert "unrecognized arguments: --live" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_machine_with_gpus() -> None:
    import torch

    doctor = start_doctor("--json")
    report = json.loads(doctor.communicate(timeout=300)[0])
    assert doctor.returncode == 0 and report["healthy"] is True, report
    assert said(report, "gpus").count("compute capability") == torch.cuda.device_count()
    assert "NF4 on cuda:0" in said(report, "quantisation")
    assert "pinned memory works" in said(report, "locked memory")
    if torch.cuda.device_count() > 1:
        assert "2 GPUs over NCCL" in said(report, "live test")
        assert "copies between GPUs" in said(report, "links")


# -- The live test -----------------------------------------------------------------------------------------------------

# Rank 1's gradients never arrive, and one number of each k_proj and v_proj is the next one that bfloat16 has.
FAULTS = """
import os
if "RANK" in os.environ:
    import torch
    from hf_qlora_fsdp import packed_linear
    backward, dequantize = torch.Tensor.backward, packed_linear.dequantize
    def lose(loss):
        backward(loss * (os.environ["RANK"] == "0"))
    def alter(packed, layout, *options):
        weight = dequantize(packed, layout, *options)
        if layout.shape == (64, 128):
            weight[0, 0] *= 1 + 2**-7
        return weight
    torch.Tensor.backward, packed_linear.dequantize = lose, alter
"""


def test_the_live_test_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAULTS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    weights, gradients = live_test.check_live()
    assert weights.level == gradients.level == "error"
    assert "4 of 14 4-bit weights are not what bitsandbytes makes of them" in weights.what
    assert "28 of 29 gradients" in gradients.what


def test_the_comparison_takes_no_nan_and_no_gradient_of_half_the_ranks() -> None:
    import torch

    truth = torch.linspace(-1, 1, 100)
    plain = {"weight/w": truth, "gradient/g": truth.bfloat16().float(), "loss": torch.tensor(5.0)}
    plain |= {"truth/gradient/g": truth, "truth/loss": torch.tensor(5.0)}
    good = {name: plain[name] for name in ("weight/w", "gradient/g", "loss")}
    assert [finding.level for finding in live_test.compare(good, plain, "here", 1)] == ["ok"]
    for name, wrong in (
        ("gradient/g", truth / 2),
        ("gradient/g", truth * float("nan")),
        ("loss", torch.tensor(5.1)),
        ("weight/w", truth.nextafter(truth + 1)),
    ):
        assert [finding.level for finding in live_test.compare({**good, name: wrong}, plain, "here", 1)] == ["error"]


# -- The parts ---------------------------------------------------------------------------------------------------------


def test_versions_are_those_of_setup_cfg_and_constraints() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    required = [Requirement(line) for line in config["options"]["install_requires"].split()]
    assert {need.name: need.specifier for need in required} == {
        name: Requirement(f"{name}{support.supported}").specifier for name, support in LIBRARIES.items()
    }
    lines = (ROOT / "constraints.txt").read_text().split("# Tools.")[0].splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    for name, support in LIBRARIES.items():
        assert support.tested[-1:] == ((pinned[name],) if name in pinned else ()), name


def test_versions_are_judged() -> None:
    support = Support(">=5.17,<6", ("5.17.0", "5.23.0"))
    assert [support.judge(version) for version in ("5.16.9", "5.17", "5.23.0", "5.24", "6.0")] == (
        ["too old", "", "", "untested", "too new"]
    )
    assert LIBRARIES["torch"].judge("2.13.0a0+git12ab") == ""


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, []),
        ({"NCCL_P2P_DISABLE": "0", "CUDA_LAUNCH_BLOCKING": "", "PYTORCH_CUDA_ALLOC_CONF": ""}, []),
        ({"NCCL_P2P_DISABLE": "1"}, ["warning"]),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}, ["warning", "warning"]),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, ["error"]),
        ({"LOCAL_RANK": "0"}, ["warning"]),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True,garbage_collection_threshold:0.8"}, []),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}, ["warning"]),
        ({"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}, ["warning"]),
        ({"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "^docker0"}, []),
        ({"GLOO_SOCKET_IFNAME": "eth99"}, ["error"]),
        ({"NCCL_SOCKET_IFNAME": "ib9,lo"}, ["error"]),
        ({"HF_QLORA_FSDP_SHARD_CACHE_DIR": ""}, ["note"]),
    ],
)
def test_variables_that_hurt(environ: dict[str, str], expected: list[str]) -> None:
    findings = [
        *environment_checks.find_variables(environ),
        *environment_checks.find_allocator_options(environ),
        *environment_checks.find_interfaces(environ),
    ]
    assert [finding.level for finding in findings] == expected
    for finding in findings:
        assert any(finding.what.startswith(name) for name in environ)


def test_a_module_that_cannot_be_imported_is_found_in_any_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hf_qlora_fsdp.merging.merger", None)
    (found,) = software_checks.check_package()
    assert found.level == "error" and "hf_qlora_fsdp.merging.merger cannot be imported" in found.what


def test_a_folder_that_cannot_be_written_to_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("HF_QLORA_FSDP_SHARD_CACHE_DIR", str(tmp_path / "not there yet"))
    monkeypatch.chdir(tmp_path)
    home, shards, working = host_checks.check_disks()
    assert home.level == "error" and f"{tmp_path}/file is a file" in home.what and "export HF_HOME" in home.fix
    assert shards.level == working.level != "error" and not (tmp_path / "not there yet").exists()


def test_the_topology_is_read() -> None:
    lines = [
        "\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m",
        "GPU0\t X \tNV18\tSYS\tPIX\t0-63\t0\t\tN/A",
        "GPU1\tNV18\t X \tSYS\tSYS\t0-63\t0\t\tN/A",
        "GPU2\tSYS\tSYS\t X \tPHB\t64-127\t1\t\tN/A",
        "NIC0\tPIX\tSYS\tPHB\t X ",
    ]
    kinds = gpu_checks._read_topology(lines)
    assert kinds == {(0, 1): "NV18", (1, 0): "NV18", **dict.fromkeys([(0, 2), (2, 0), (1, 2), (2, 1)], "SYS")}
    assert gpu_checks._read_topology([]) == {}


def test_a_finding_that_is_no_good_news_says_why_and_what_to_do() -> None:
    with pytest.raises(AssertionError, match="no reason or no remedy"):
        Finding("error", "It is broken.")
    with pytest.raises(AssertionError, match="no reason or no remedy"):
        Finding("note", "It is worth knowing.", "It matters.")
    text = format_finding("gpus", Finding("error", "It is broken. " * 20, "It matters.", "Mend it."))
    assert text.startswith("error    gpus           It is broken.")
    assert "why: It matters." in text and "fix: Mend it." in text
    assert max(map(len, text.splitlines())) <= 120
