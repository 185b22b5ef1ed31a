"""Shards in host memory: the same numbers from every place, and each byte where the options say."""

from __future__ import annotations

import gc
import itertools
import mmap
import os
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig
from torch.distributed.tensor import DTensor

from hf_qlora_fsdp import load_quantized_model
from hf_qlora_fsdp.offloading.host_memory import HostMemory, KeptFile, MappedFile, PinnedMemory
from hf_qlora_fsdp.offloading.offload import HostTensor
from hf_qlora_fsdp.sharding_policy import ShardingPolicy, spread
from tests.test_sharding import assert_identical, compute_sharded
from tests.tiny import make_checkpoint

# ---- The same numbers ------------------------------------------------------------------------------------------------


def places(folder: str) -> dict[str, dict[str, Any]]:
    """Every way to offload, by what it is called here."""
    return {
        "all": {"cpu_offload": True},
        "one layer": {"cpu_offload": True, "cpu_offload_layers": 1},
        "mapped": {"cpu_offload": True, "cpu_offload_dir": Path(folder)},
        "kept": {"cpu_offload": True, "cpu_offload_dir": Path(folder), "cpu_offload_keep_files": True},
        "kept, again": {"cpu_offload": True, "cpu_offload_dir": Path(folder), "cpu_offload_keep_files": True},
        "trained, too": {"cpu_offload": True, "cpu_offload_trainable": True},
        "trained alone": {"cpu_offload_trainable": True},
    }


def compute_all(rank: int, folder: str, variants: list[dict[str, Any]]) -> list[Any]:
    computed = []
    for variant in variants:
        computed += compute_sharded(rank, folder, [variant])
        for _ in range(3):  # tensors of a class of one's own take more than one round
            gc.collect()  # the model goes, and with it the lock on its file
    return computed


@pytest.mark.parametrize(
    ("lora", "tie"),
    [({}, False), ({}, True), ({"use_dora": True}, False), ({"modules_to_save": ["lm_head"]}, False)],
    ids=["untied", "tied", "dora", "modules_to_save"],
)
def test_every_place_gives_the_same_numbers(ranks, tmp_path, lora, tie):
    folder = make_checkpoint(tmp_path / "model", "qwen2", tie=tie)
    (tmp_path / "shards").mkdir()
    ways = places(str(tmp_path / "shards"))
    variants = [{"dtype": torch.bfloat16, **lora, "policy": policy} for policy in ({}, *ways.values())]
    variants += [{**variants[1], "checkpointing": True}]
    for first, *others in ranks.run(compute_all, folder, variants):
        assert any(gradient.any() for gradient in first["gradients"].values())
        for way, other in zip([*ways, "checkpointing"], others, strict=True):
            try:
                assert_identical(other, first)
            except AssertionError as error:
                raise AssertionError(f"{way}: {error}") from error


# ---- Where the bytes are ---------------------------------------------------------------------------------------------


def list_places(rank: int, folder: str, changes: dict[str, Any]) -> tuple[dict[str, str], dict[str, int]]:
    """Return for each parameter whether it is on the host, and how often units came late in three steps."""
    model = load_quantized_model(
        folder,
        peft_config=LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"]),
        policy=ShardingPolicy(param_dtype=torch.bfloat16, **changes),
        progress=False,
    )
    kinds = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        kinds[name] = type(parameter.to_local()).__name__
    return kinds


def test_frozen_matrices_are_offloaded_and_nothing_else(ranks, tmp_path):
    folder = make_checkpoint(tmp_path, "llama", num_hidden_layers=4)
    for kinds in ranks.run(list_places, folder, {"cpu_offload": True}):
        offloaded = {name for name, kind in kinds.items() if kind == "HostTensor"}
        assert offloaded == {
            name for name in kinds if ("proj.base_layer" in name or "embed" in name or "original_module" in name)
        }
    for kinds in ranks.run(list_places, folder, {"cpu_offload": True, "cpu_offload_layers": 2}):
        layers = {name.split(".")[4] for name, kind in kinds.items() if kind == "HostTensor"}
        assert layers == {"1", "3"} and not any("HostTensor" in kind for name, kind in kinds.items() if "embed" in name)


def test_layers_are_spread():
    assert spread(2, 6) == [2, 5] and spread(6, 6) == list(range(6)) and spread(1, 3) == [2]
    for total in (7, 80, 126):
        for count in range(1, total + 1):
            chosen = spread(count, total)
            gaps = {later - earlier for earlier, later in itertools.pairwise(chosen)}
            assert len(chosen) == count and len(gaps) <= 2
    with pytest.raises(ValueError, match=r"cpu_offload_layers=7, but the model has 6 .* Write a number up to 6"):
        spread(7, 6)
    with pytest.raises(ValueError, match=r'^replicate_layers=7, but the model has 6 .* up to 6, or "all"'):
        spread(7, 6, "replicate_layers")


def test_a_shard_that_fsdp_pads_again_keeps_its_memory(ranks, tmp_path):
    """Vocabulary of odd size: the last rank's part is shorter than the others'."""
    folder = make_checkpoint(tmp_path, "llama", vocab_size=511)
    variants = [
        {"dtype": torch.bfloat16, "policy": policy}
        for policy in ({}, {"cpu_offload": True, "cpu_offload_dir": tmp_path})
    ]
    for resident, mapped in ranks.run(compute_sharded, folder, variants):
        assert_identical(mapped, resident)


def test_to_all_but_fsdp_it_is_an_ordinary_tensor():
    from hf_qlora_fsdp.offloading.offload import HostStore

    data = torch.arange(24, dtype=torch.float32).reshape(6, 4)
    tensor = HostTensor(data, HostStore(HostMemory(), torch.device("cpu")).add_unit(1024))
    assert torch.equal(tensor + 1, data + 1) and type(tensor + 1) is torch.Tensor
    assert torch.equal(tensor.to(torch.bfloat16), data.to(torch.bfloat16))
    assert type(tensor[2:4]) is HostTensor and torch.equal(tensor[2:4].clone(), data[2:4])
    room = tensor.new_zeros((3, 4))
    room[:2].copy_(tensor[4:])
    assert torch.equal(room.clone(), torch.cat([data[4:], torch.zeros(1, 4)]))
    assert "HostTensor" in repr(tensor)


# ---- Files -----------------------------------------------------------------------------------------------------------


def fill(memory: HostMemory, *contents: torch.Tensor) -> list[torch.Tensor]:
    regions = []
    for content in contents:
        regions.append(memory.allocate(content.numel()))
        memory.fill(regions[-1], content)
        memory.seal()
    memory.finish()
    return regions


def keep(folder: Path, *contents: torch.Tensor) -> Path:
    """Write a file that stays, as a run that has ended."""
    memory = KeptFile(folder)
    fill(memory, *contents)
    return memory.path


def drawn(seed: int, *sizes: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator) for size in sizes]


def test_mapped_file_has_no_name_and_holds_what_it_is_given(tmp_path):
    contents = drawn(0, 5000, 1, 0, 123_456)
    memory = MappedFile(tmp_path)
    regions = fill(memory, *contents)
    assert list(tmp_path.iterdir()) == []
    for region, content in zip(regions, contents, strict=True):
        assert torch.equal(region, content)
    memory.file.seek(0)
    assert memory.file.read(5000) == bytes(contents[0].tolist())  # it is on the disk, not only in memory


def test_kept_file_is_written_once(tmp_path):
    contents = drawn(1, 5000, 77_777)
    written = keep(tmp_path, *contents).stat().st_mtime_ns
    again = KeptFile(tmp_path)
    assert again.is_reused and not MappedFile(tmp_path).is_reused
    for region, content in zip(fill(again, *contents), contents, strict=True):
        assert torch.equal(region, content)
    assert again.path.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.with_suffix(".json").unlink(), "so it is not ours"),
        (lambda path: path.with_suffix(".json").write_text("{"), "its manifest .*json cannot be read"),
        (lambda path: path.with_suffix(".json").write_text("[1]"), "its manifest .*json cannot be read"),
        (lambda path: path.with_suffix(".json").write_text('{"format": 0}'), "another version"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "changed after its manifest"),
        (lambda path: path.write_bytes(path.read_bytes()), "changed after its manifest"),
    ],
)
def test_kept_file_that_is_stale_is_named(tmp_path, spoil, said):
    spoil(keep(tmp_path, *drawn(2, 5000)))
    with pytest.raises(ValueError, match=f"shards-00000-of-00001.bin.*{said}.*Delete it"):
        KeptFile(tmp_path)


def test_kept_file_of_other_weights_or_in_use_is_named(tmp_path):
    contents = drawn(3, 5000, 6000)
    regions = fill(KeptFile(tmp_path), *contents)
    with pytest.raises(ValueError, match="another run is using it"):
        KeptFile(tmp_path)
    del regions  # the lock goes with the last region
    with pytest.raises(ValueError, match="other weights"):
        fill(KeptFile(tmp_path), *drawn(4, 5000, 6000))
    for others in ((5000, 6001), (5000, 6000, 1)):
        with pytest.raises(ValueError, match="another model"):
            fill(KeptFile(tmp_path), *drawn(3, *others))
    with pytest.raises(ValueError, match="another model"):
        fill(KeptFile(tmp_path), contents[0])
    assert torch.equal(fill(KeptFile(tmp_path), *contents)[1], contents[1])  # none of these has changed it


def test_kept_file_of_a_run_that_was_ended_is_written_anew(tmp_path):
    memory, contents = KeptFile(tmp_path), drawn(5, 5000, 6000)
    region = memory.allocate(5000)
    memory.fill(region, contents[1][:5000])  # and this is where the process was killed
    del memory, region
    assert (tmp_path / "shards-00000-of-00001.bin").stat().st_size == 5000
    memory = KeptFile(tmp_path)
    assert not memory.is_reused and memory.path.stat().st_size == 0
    fill(memory, *contents)
    del memory
    assert torch.equal(fill(KeptFile(tmp_path), *contents)[1], contents[1])


def test_kept_file_with_a_flipped_bit_is_never_trained_on(tmp_path):
    """What a broken disk does, with neither size nor time to show it."""
    contents = drawn(6, 5000, 6000)
    path = keep(tmp_path, *contents)
    before = os.stat(path)
    with path.open("r+b") as file:
        file.seek(mmap.PAGESIZE * 2 + 77)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ValueError, match="its bytes are not those that were written"):
        fill(KeptFile(tmp_path), *contents)


def load_on_a_full_disk(rank: int, folder: str, shards: str) -> tuple[str, str]:
    """Let no file of rank 1 grow beyond 100 KB, which is what a full disk looks like from inside."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if rank == 1 else soft, hard))
    policy = ShardingPolicy(cpu_offload=True, cpu_offload_dir=Path(shards), cpu_offload_keep_files=True)
    try:
        load_quantized_model(folder, policy=policy, progress=False)
    except Exception as error:
        return type(error).__name__, str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return "none", ""


def test_a_disk_that_fills_up_ends_all_ranks_with_a_reason(ranks, tmp_path):
    """And at once: the other rank is not left in a collective."""
    (tmp_path / "shards").mkdir()
    first, second = ranks.run(load_on_a_full_disk, make_checkpoint(tmp_path / "model"), str(tmp_path / "shards"))
    assert (first[0], second[0]) == ("RankError", "ValueError")
    assert "has no room for this rank's shards" in second[1]
    assert "Rank 1 failed while sharding" in first[1] and second[1] in first[1]
    assert not list((tmp_path / "shards").glob("shards-00001*")), "what was written before would fill the disk"


def test_memory_is_unregistered_while_it_is_still_mapped(monkeypatch):
    """Afterwards, its addresses may be those of another mapping."""
    calls: list[tuple[str, bool]] = []

    def note(call: str, address: int) -> int:
        lines = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
        calls.append((call, any(int(start, 16) <= address < int(end, 16) for start, end in lines)))
        return 0

    cudart = SimpleNamespace(
        cudaHostRegister=lambda address, size, flags: note("register", address),
        cudaHostUnregister=lambda address: note("unregister", address),
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    part = PinnedMemory().allocate(1 << 26)[5:10]
    assert calls == [("register", True)] and not part.any()
    del part
    assert calls == [("register", True), ("unregister", True)]


def test_folder_that_is_missing_or_closed_or_full(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="is no folder"):
        MappedFile(tmp_path / "nowhere")
    memory = MappedFile(tmp_path)
    with pytest.raises(ValueError, match=r"no room for this rank's shards: .* are free .*larger disk"):
        memory.allocate(1 << 60)
    assert MappedFile(tmp_path).allocate(10).numel() == 10


def test_process_group_is_not_needed_for_the_file_names(tmp_path):
    assert not dist.is_initialized() or dist.get_world_size() == 1
    assert KeptFile(tmp_path).path.name == "shards-00000-of-00001.bin"
