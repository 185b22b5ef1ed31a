"""What is read from a shard cache is what was written to it, byte for byte, or it is not used and that is said.

The reference is the first load, which `test_loader.py` holds against transformers.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from hf_qlora_fsdp import loader
from hf_qlora_fsdp.loading import cache_writer, shard_cache, weights
from hf_qlora_fsdp.loading.cache_writer import CacheWriter
from hf_qlora_fsdp.loading.weights import BLOCK_BYTES, Weights
from hf_qlora_fsdp.units import format_bytes
from tests.distributed import RankPool, run_ranks
from tests.test_loader import LORA, Loaded, assert_equal, load, load_reference, measure_loading
from tests.tiny import make_checkpoint

FP4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")


# ---- On the ranks ----------------------------------------------------------------------------------------------------


def load_and_write(rank: int, folder: str, cache: Any, options: dict[str, Any] | None = None) -> Loaded:
    """Load a model through the cache, and wait until the cache is written.

    Args:
        folder (`str`): The checkpoint.
        cache (`Path` or list of them): The folder for caches, of all ranks or of each.
        options (`dict[str, Any]`, *optional*): Of `load_quantized_model`.
    """
    cache = cache[rank] if isinstance(cache, list) else cache
    loaded = load(rank, folder, {**(options or {}), "shard_cache_dir": cache})
    loaded["wrote"] = bool(cache_writer._FINISHING)
    cache_writer.finish_writing()
    return loaded


def load_apart(rank: int, folders: list[str], cache: Path) -> Loaded:
    """Give each rank a checkpoint of its own."""
    return load_and_write(rank, folders[rank], cache)


def load_on_nodes(rank: int, folder: str, cache: Any) -> Loaded:
    """Pretend that each rank is a node of its own."""
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    return load_and_write(rank, folder, cache)


def load_on_a_full_disk(rank: int, folder: str, cache: Path) -> Loaded:
    """Let no file of rank 1 grow beyond 100 KB, which is what a full disk looks like from inside."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if rank == 1 else soft, hard))
    try:
        return load_and_write(rank, folder, cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def load_beside_another(rank: int, folder: str, cache: Path, mine: Path, theirs: Path) -> Loaded:
    """Load while another job does: both have found no cache before either of them writes one."""
    consult = shard_cache.consult

    def consult_and_wait(*args: Any) -> Any:
        consulted = consult(*args)
        mine.touch()
        while not theirs.exists():
            time.sleep(0.01)
        return consulted

    loader.consult = consult_and_wait
    try:
        return load_and_write(rank, folder, cache)
    finally:
        loader.consult = consult


def die_while_writing(rank: int, folder: str, cache: Path) -> None:
    """Be killed when half of the tensors are written."""
    write, num_written = CacheWriter._write_tensor, 0

    def write_and_die(self: CacheWriter, *args: Any) -> None:
        nonlocal num_written
        write(self, *args)
        num_written += 1
        if num_written == len(self.offsets) // 2:
            os.kill(os.getpid(), signal.SIGKILL)

    CacheWriter._write_tensor = write_and_die
    load_and_write(rank, folder, cache)


def lose_the_checkpoint(rank: int, folder: str, cache: Path) -> tuple[str, str]:
    """Load from a damaged cache when the checkpoint can be opened, and not be read."""
    read = weights.Weights.read

    def fail_to_read(self: Weights, name: str) -> torch.Tensor:
        if self.files[0].startswith(folder):
            raise OSError("the disk is gone")
        return read(self, name)

    weights.Weights.read = fail_to_read
    try:
        load(rank, folder, {"shard_cache_dir": cache})
    except Exception as error:
        return type(error).__name__, str(error)
    finally:
        weights.Weights.read = read
    return "none", ""


def read_arguments(rank: int, folder: str) -> tuple[bool, str | None]:
    from hf_qlora_fsdp.config import QLoRAFSDPConfig
    from hf_qlora_fsdp.inputs import read_model_options

    chosen = {"shard_cache": False, "shard_cache_dir": folder} if rank else {}
    options = read_model_options(QLoRAFSDPConfig(folder, **chosen), None)
    return options["shard_cache"], options["shard_cache_dir"]


# ---- In one process --------------------------------------------------------------------------------------------------


def caches(root: Path) -> list[Path]:
    """Return the caches in a folder, and see that there is nothing else."""
    found = sorted(root.iterdir()) if root.is_dir() else []
    assert not [path for path in found if path.name.startswith(".")]
    for path in found:
        assert not list(path.glob("*.json.*")) and (path / "manifest.json").is_file()
    return found


def assert_same(loaded: list[Loaded], reference: list[Loaded], from_cache: bool) -> None:
    for mine in loaded:
        assert mine["report"].from_cache is from_cache
        assert mine["trained"] == reference[0]["trained"]
        assert_equal(mine["parameters"], reference[0]["parameters"])
        assert_equal(mine["buffers"], reference[0]["buffers"])
        assert torch.equal(mine["logits"], reference[0]["logits"])


def lines(loaded: list[Loaded]) -> list[str]:
    return [line for mine in loaded for line in mine["lines"]]


def garble(folder: str) -> None:
    """Overwrite all of a checkpoint's tensors but the bytes that identify it, and set the clock back."""
    for file in Path(folder).glob("*.safetensors"):
        before = os.stat(file)
        with file.open("r+b") as stream:
            for stored in Weights([str(file)]).tensors.values():
                middle = stored.offset + (stored.num_bytes - 64) // 2
                for start, end in ((stored.offset, middle), (middle + 64, stored.offset + stored.num_bytes)):
                    stream.seek(start)
                    stream.write(b"\xff" * (end - start))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


# ---- The same model --------------------------------------------------------------------------------------------------


def test_cached_load_is_the_first_one(ranks, tmp_path):
    """With adapters, which are drawn from the same seed whether the cache is written, read, or off."""
    folder = make_checkpoint(tmp_path / "model", "qwen2", tie=True, max_shard_size="200KB")
    options = {"peft_config": LoraConfig(**LORA)}
    plain = ranks.run(load, folder, {**options, "shard_cache": False, "shard_cache_dir": tmp_path / "shards"})
    assert lines(plain) == [] and not (tmp_path / "shards").exists()

    first = ranks.run(load_and_write, folder, tmp_path / "shards", options)
    assert_same(first, plain, from_cache=False)
    (cache,) = caches(tmp_path / "shards")
    files = sorted(path.name for path in cache.iterdir())
    assert files == ["manifest.json", "rank-0.safetensors", "rank-1.safetensors"]
    stored = load_file(cache / files[1]) | load_file(cache / files[2])
    num_bytes = sum(tensor.nbytes for tensor in stored.values())
    size = format_bytes(num_bytes)
    assert [line.split(":")[0] for line in lines(first)] == [f"Writing a shard cache of {size} to {cache}"]
    about = json.loads((cache / "manifest.json").read_text())["about"]
    assert (about["model"], about["world_size"], about["param_dtype"]) == (folder, 2, "bfloat16")
    assert about["quantization"]["bnb_4bit_quant_type"] == "nf4" and "bitsandbytes" in about["versions"]

    garble(folder)  # from here on, whoever reads 16 bits gets something else
    again = ranks.run(load_and_write, folder, tmp_path / "shards", options)
    assert_same(again, plain, from_cache=True)
    assert lines(again) == [f"Reading {size} from the shard cache {cache}, not the checkpoint."]
    reports = [mine["report"] for mine in again]
    assert sum(report.bytes_read for report in reports) == num_bytes == reports[0].checkpoint_bytes
    assert num_bytes < plain[0]["report"].checkpoint_bytes
    assert reports[0].largest_tensor_bytes == plain[0]["report"].largest_tensor_bytes

    Path(folder).rename(tmp_path / "moved")
    assert_same(ranks.run(load_and_write, str(tmp_path / "moved"), tmp_path / "shards", options), plain, True)


@pytest.mark.slow
def test_other_numbers_of_ranks_and_nodes(ranks, tmp_path):
    """Four ranks on two nodes, and one rank, read what two ranks wrote."""
    folder = make_checkpoint(tmp_path / "model", num_hidden_layers=3)
    first = ranks.run(load_and_write, folder, tmp_path / "shards")
    for world_size, env in ((4, {"LOCAL_WORLD_SIZE": "2"}), (1, {})):
        again = run_ranks(load_and_write, world_size, folder, tmp_path / "shards", env=env)
        assert_same(again, first, from_cache=True)
        read = [mine["report"].bytes_read for mine in again]
        assert sum(read[:2]) == again[0]["report"].checkpoint_bytes  # a node reads all of it, once
    assert len(caches(tmp_path / "shards")) == 1


def test_nodes_that_share_a_disk(ranks, tmp_path):
    folder, root = make_checkpoint(tmp_path / "model"), tmp_path / "shards"
    first = ranks.run(load_on_nodes, folder, root)
    assert [loaded["wrote"] for loaded in first] == [True, False]
    (cache,) = caches(root)
    assert sorted(path.name for path in cache.iterdir()) == ["manifest.json", "rank-0.safetensors"]
    assert_same(ranks.run(load_on_nodes, folder, root), first, from_cache=True)
    # What one rank wrote is cut for two, and what two wrote is read by one, twice.
    assert_same(ranks.run(load_and_write, folder, root), first, from_cache=True)
    shutil.rmtree(root)
    ranks.run(load_and_write, folder, root)
    assert_same(ranks.run(load_on_nodes, folder, root), first, from_cache=True)


def test_nodes_with_disks_of_their_own(ranks, tmp_path):
    folder, roots = make_checkpoint(tmp_path / "model"), [tmp_path / "0", tmp_path / "1"]
    first = ranks.run(load_on_nodes, folder, roots)
    assert [len(caches(root)) for root in roots] == [1, 1]
    shutil.rmtree(roots[1])
    second = ranks.run(load_on_nodes, folder, roots)
    assert_same(second[:1], first, from_cache=True)
    assert_same(second[1:], first, from_cache=False)
    assert_same(ranks.run(load_on_nodes, folder, roots), first, from_cache=True)


# ---- Which cache -----------------------------------------------------------------------------------------------------


def test_settings_that_change_the_bytes_have_caches_of_their_own(ranks, tmp_path):
    folder, root = make_checkpoint(tmp_path / "model", "qwen2"), tmp_path / "shards"
    skipping = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["up_proj"])
    settings: list[dict[str, Any]] = [
        {},
        {"quantization_config": FP4},
        {"quantization_config": skipping},
        {"param_dtype": torch.float32},
        {"peft_config": LoraConfig(**LORA, bias="all")},  # biases in float32
    ]
    for number, options in enumerate(settings, 1):
        plain = ranks.run(load, folder, options)
        assert_same(ranks.run(load_and_write, folder, root, options), plain, from_cache=False)
        assert len(caches(root)) == number
        assert_same(ranks.run(load_and_write, folder, root, options), plain, from_cache=True)
    others = {"rms_norm_eps": 0.5, "cpu_offload": True, "peft_config": LoraConfig(**LORA)}
    assert ranks.run(load_and_write, folder, root, others)[0]["report"].from_cache
    assert len(caches(root)) == len(settings)


def test_a_changed_checkpoint_is_another_one(ranks, tmp_path):
    folder, root = make_checkpoint(tmp_path / "model"), tmp_path / "shards"
    ranks.run(load_and_write, folder, root)
    file = tmp_path / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    changed = ranks.run(load_and_write, folder, root)
    assert_same(changed, ranks.run(load, folder, {}), from_cache=False)
    assert len(caches(root)) == 2


def test_ranks_that_do_not_agree_keep_nothing(ranks, tmp_path):
    folders = [make_checkpoint(tmp_path / "one"), make_checkpoint(tmp_path / "other", seed=1)]
    loaded = ranks.run(load_apart, folders, tmp_path / "shards")
    assert lines(loaded) == [] and caches(tmp_path / "shards") == []


def test_revisions_of_the_hub(ranks, tmp_path):
    """Two commits with other weights, and one that changed something else."""
    hub = tmp_path / "hub" / "models--org--name"
    (hub / "blobs").mkdir(parents=True)
    (hub / "refs").mkdir()
    for number, seed in enumerate((0, 1, 0)):
        commit, snapshot = f"{number}" * 40, hub / "snapshots" / (f"{number}" * 40)
        make_checkpoint(snapshot, seed=seed)
        file, blob = snapshot / "model.safetensors", hub / "blobs" / (f"{seed}" * 64)
        file.rename(blob)
        file.symlink_to(blob)
        (hub / "refs" / f"v{number}").write_text(commit)
    found = []
    for number in range(3):
        options = {"cache_dir": str(tmp_path / "hub"), "revision": f"v{number}"}
        found.append(ranks.run(load_and_write, "org/name", tmp_path / "shards", options)[0]["report"].from_cache)
        revisions = {
            json.loads((cache / "manifest.json").read_text())["about"]["revision"]
            for cache in caches(tmp_path / "shards")
        }
    assert found == [False, False, True] and revisions == {"0" * 40, "1" * 40}


def test_identity_of_a_checkpoint(tmp_path):
    one = make_checkpoint(tmp_path / "one", max_shard_size="200KB")
    other = make_checkpoint(tmp_path / "other", max_shard_size="200KB", seed=1)

    def identify(folder: str | Path) -> list[dict[str, object]]:
        for file in Path(folder).glob("*.safetensors"):
            os.utime(file, (1, 1), follow_symlinks=True)  # as archives and images leave them
        return Weights(sorted(map(str, Path(folder).glob("*.safetensors")))).identify()

    assert len(identify(one)) > 2
    assert identify(one) == identify(shutil.copytree(one, tmp_path / "copy")) != identify(other)
    file = Path(one, "model-00001-of-00005.safetensors")
    before = Weights([str(file)]).identify()
    os.utime(file, (1, 2))
    assert Weights([str(file)]).identify() != before
    # A file of the Hub's cache is its hash, whenever it was downloaded.
    blob, link = tmp_path / "blobs" / ("ab" * 32), tmp_path / "snapshots" / file.name
    blob.parent.mkdir(), link.parent.mkdir()
    shutil.copy(file, blob)
    link.symlink_to(blob)
    assert Weights([str(link)]).identify() == [{"name": file.name, "bytes": file.stat().st_size, "blob": "ab" * 32}]


def test_weights_in_4_bits_are_not_cached(ranks, tmp_path):
    load_reference(make_checkpoint(tmp_path / "16-bit")).save_pretrained(tmp_path / "4-bit")
    loaded = ranks.run(load_and_write, str(tmp_path / "4-bit"), tmp_path / "shards")
    assert lines(loaded) == [] and not (tmp_path / "shards").exists()


def test_choice_of_the_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(shard_cache.constants, "HF_HOME", str(tmp_path))
    assert shard_cache.choose_folder(True, None) is None  # as tests/conftest.py has it
    assert shard_cache.choose_folder(True, tmp_path) == tmp_path
    assert shard_cache.choose_folder(False, tmp_path) is None
    monkeypatch.setenv(shard_cache.FOLDER_VARIABLE, "~/x")
    assert shard_cache.choose_folder(True, None) == Path.home() / "x"
    monkeypatch.delenv(shard_cache.FOLDER_VARIABLE)
    assert shard_cache.choose_folder(True, None) == tmp_path / "hf_qlora_fsdp" / "shards"


def test_arguments_of_a_run_reach_the_loader(ranks, tmp_path):
    assert ranks.run(read_arguments, str(tmp_path)) == [(True, None), (False, str(tmp_path))]


# ---- Damage ----------------------------------------------------------------------------------------------------------


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def change_checksum(path: Path) -> None:
    manifest = json.loads(path.read_text())
    manifest["checksums"]["model.norm.weight"][0] ^= 1
    path.write_text(json.dumps(manifest))


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a byte of a tensor": ("rank-1.safetensors", lambda path: flip(path, -5), "rank-1.safetensors of the shard cache"),
    "a byte of the header": ("rank-0.safetensors", lambda path: flip(path, 9), "rank-0.safetensors"),
    "cut short": ("rank-1.safetensors", lambda path: os.truncate(path, path.stat().st_size - 1), "rank-1.safetensors"),
    "missing": ("rank-0.safetensors", Path.unlink, "rank-0.safetensors is missing"),
    "no manifest": ("manifest.json", Path.unlink, "manifest.json cannot be used"),
    "broken manifest": ("manifest.json", lambda path: os.truncate(path, 100), "manifest.json cannot be used"),
    "manifest of other contents": (
        "manifest.json",
        lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"files": ["rank-0.safetensors"]})),
        "manifest.json cannot be used",
    ),
    "another checksum": ("manifest.json", change_checksum, "'model.norm.weight' in"),
}


def test_damage_is_named_and_made_anew(ranks, tmp_path):
    folder, root = make_checkpoint(tmp_path / "model"), tmp_path / "shards"
    first = ranks.run(load_and_write, folder, root)
    (cache,) = caches(root)
    shutil.copytree(cache, tmp_path / "whole")
    for damage, (name, apply, message) in DAMAGES.items():
        shutil.rmtree(root)
        shutil.copytree(tmp_path / "whole", cache)
        apply(cache / name)
        second = ranks.run(load_and_write, folder, root)
        named = [line for line in lines(second) if message in line and "damaged" in line and "anew" in line]
        assert len(named) == 1, (damage, lines(second))
        if second[0]["report"].from_cache:  # all of it was read but one tensor, and the next load writes it again
            assert_same(second, first, from_cache=True)
            assert caches(root) == []
            second = ranks.run(load_and_write, folder, root)
        assert_same(second, first, from_cache=False)
        assert_same(ranks.run(load_and_write, folder, root), first, from_cache=True)


def test_damage_without_a_checkpoint_is_an_error(ranks, tmp_path):
    folder, root = make_checkpoint(tmp_path / "model"), tmp_path / "shards"
    ranks.run(load_and_write, folder, root)
    (cache,) = caches(root)
    flip(cache / "rank-1.safetensors", -5)
    results = ranks.run(lose_the_checkpoint, folder, root)
    assert sorted(error for error, _ in results) == ["RankError", "ValueError"]
    for _, message in results:
        assert str(cache / "rank-1.safetensors") in message and "the disk is gone" in message


# ---- Trouble while writing -------------------------------------------------------------------------------------------


def test_full_disk_costs_one_line(ranks, tmp_path):
    folder, root = make_checkpoint(tmp_path / "model"), tmp_path / "shards"
    plain = ranks.run(load, folder, {})
    loaded = ranks.run(load_on_a_full_disk, folder, root)
    assert_same(loaded, plain, from_cache=False)
    (line,) = [line for line in lines(loaded) if "was not written" in line]
    assert "File too large" in line and caches(root) == []
    assert "free" in shard_cache._prepare(root, 1 << 60) and not shard_cache._prepare(root, 1)
    (tmp_path / "file").touch()
    loaded = ranks.run(load_and_write, folder, tmp_path / "file" / "shards")
    assert_same(loaded, plain, from_cache=False)
    assert len(lines(loaded)) == 1 and "No shard cache is" in lines(loaded)[0]


def test_load_that_fails_leaves_nothing(ranks, tmp_path):
    folder, root = make_checkpoint(tmp_path / "model"), tmp_path / "shards"
    for error, _ in ranks.run(lose_the_checkpoint, folder, root):
        assert error in ("OSError", "RankError")
    assert caches(root) == []


@pytest.mark.slow
def test_jobs_at_once_and_a_job_that_is_killed(tmp_path):
    folder, root = make_checkpoint(tmp_path / "model"), tmp_path / "shards"
    with RankPool(1) as one, RankPool(1) as other:
        places = [tmp_path / "one", tmp_path / "other"]
        results: list[Any] = [None, None]

        def run(number: int, pool: RankPool) -> None:
            results[number] = pool.run(load_beside_another, folder, root, places[number], places[1 - number])

        threads = [threading.Thread(target=run, args=job) for job in enumerate((one, other))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert_same(results[0] + results[1], results[0], from_cache=False)
        (cache,) = caches(root)
        assert_same(one.run(load_and_write, folder, root), results[0], from_cache=True)

        shutil.rmtree(cache)
        with pytest.raises(RuntimeError, match="exit code -9"):
            other.run(die_while_writing, folder, root)
        (leftover,) = root.iterdir()
        assert leftover.name.startswith(f".writing-{cache.name}-")
        assert_same(one.run(load_and_write, folder, root), results[0], from_cache=False)
        assert leftover.exists()  # for all that anybody knows, its writer may be alive
        assert_same(one.run(load_and_write, folder, root), results[0], from_cache=True)
        for path in [*leftover.iterdir(), leftover]:
            os.utime(path, (time.time() - 3700,) * 2)
        one.run(load_and_write, folder, root, {"quantization_config": FP4})
        assert len(caches(root)) == 2


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    large = torch.arange(BLOCK_BYTES // 2 + 10, dtype=torch.int32)  # two whole blocks, and a little
    return {"large": large, "row": torch.randn(1, 7).bfloat16(), "scalar": torch.tensor(3.0), "none": torch.empty(0, 4)}


def start_writers(root: Path, nonce: str, parts: list[dict[str, torch.Tensor]]) -> Iterator[threading.Thread]:
    (root / nonce).mkdir()
    for number, part in enumerate(parts):
        writer = CacheWriter(root / nonce, root / "final", {"facts": nonce}, len(parts), number)
        with writer.writing(part, budget_bytes=100):
            for name, tensor in part.items():
                writer.put({name: tensor})
                assert not writer.queue  # on a CPU nothing waits: it would be memory of the device
        yield writer.thread


def test_writers_finish_once(tmp_path, tensors):
    """Ranks that are done at the same moment, in two runs at once: one whole folder, and nothing beside it."""
    small = {name: tensors[name] for name in ("row", "scalar", "none")}
    for number in range(20):
        root = tmp_path / str(number)
        root.mkdir()
        both = [tensors if number == 0 else {"row": small["row"]}, {"scalar": small["scalar"]}]
        threads = [*start_writers(root, ".writing-a", both), *start_writers(root, ".writing-b", both)]
        for thread in threads:
            thread.join()
        assert [path.name for path in root.iterdir()] == ["final"]
        assert sorted(path.name for path in (root / "final").iterdir()) == [
            "manifest.json", "rank-0.safetensors", "rank-1.safetensors",
        ]  # fmt: skip
        assert_equal(load_file(root / "final" / "rank-0.safetensors"), both[0])
    # The other one is between creating the manifest and renaming the folder.
    (tmp_path / ".writing-c").mkdir()
    writer = CacheWriter(tmp_path / ".writing-c", tmp_path / "final", {}, 1, 0)
    (writer.staging / "manifest.json").touch()
    with writer.writing({}, budget_bytes=0):
        pass
    writer.thread.join()
    assert (writer.staging / "manifest.json").exists()
    cache_writer._FINISHING.clear()


# ---- Reading ahead, and memory ---------------------------------------------------------------------------------------


def test_reading_ahead(tmp_path, tensors):
    tensors |= {f"row.{index}": torch.randn(1, 100) for index in range(20)}
    save_file(tensors, tmp_path / "file")
    opened = Weights([str(tmp_path / "file")])
    seen: dict[str, int] = {}

    def check(name: str, number: int, block: memoryview) -> None:
        seen[name] = seen.get(name, 0) + len(block)
        if name == "row.19":
            raise ValueError("this one")

    with opened.reading_ahead(tensors, budget_bytes=1000, check=check):
        ahead = opened._ahead
        assert torch.equal(opened.read("row.5"), tensors["row.5"])  # out of turn
        for name in list(tensors)[:-1]:
            if name != "row.5":
                tensor = opened.read(name)
                assert tensor.dtype == tensors[name].dtype and torch.equal(tensor, tensors[name])
            held = {other: opened.tensors[other].num_bytes for other in ahead.held}
            assert ahead.bytes_held == sum(held.values())
            assert ahead.bytes_held <= 1000 or len({*held} - {name, "row.5"}) == 0
            opened.release([name])
        with pytest.raises(ValueError, match="this one"):
            opened.read("row.19")
    with safe_open(tmp_path / "file", "pt") as file:
        assert set(file.keys()) == set(tensors)
    assert seen == {name: tensor.nbytes for name, tensor in tensors.items() if tensor.nbytes}
    assert opened.bytes_read == sum(tensor.nbytes for tensor in tensors.values()) - tensors["row.19"].nbytes


def test_peak_memory(ranks, tmp_path):
    """Writing a cache and reading one stay under the peak that `loader.py` promises."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 512, "num_hidden_layers": 16, "head_dim": 64}
    folder = make_checkpoint(tmp_path / "model", tie=True, max_shard_size="2MB", **sizes)
    options = {"peft_config": LoraConfig(**LORA), "shard_cache_dir": tmp_path / "shards"}
    for _ in range(2):
        for measured in ranks.run(measure_loading, folder, options):
            bound = measured["S"] + 2 * measured["U"] + measured["T"]
            assert measured["S"] <= measured["peak"] <= bound < 0.85 * measured["whole"], measured
            assert measured["remaining"] <= measured["S"] * 1.001 + 4096, measured
        ranks.run(finish_writing)
    assert len(caches(tmp_path / "shards")) == 1


def finish_writing(rank: int) -> None:
    cache_writer.finish_writing()
