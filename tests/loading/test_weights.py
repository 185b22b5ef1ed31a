"""Checkpoints are found wherever transformers finds them, and damage is named before anything is read."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_qlora_fsdp.loading.weights import Weights, find_weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"layer.{index}.weight": torch.randn(8, 4, generator=generator) for index in range(4)}


@pytest.fixture
def single(tmp_path: Path, tensors) -> Path:
    folder = tmp_path / "single"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def sharded(tmp_path: Path, tensors) -> Path:
    folder = tmp_path / "sharded"
    folder.mkdir()
    weight_map = {}
    for number, names in enumerate([["layer.0.weight", "layer.1.weight"], ["layer.2.weight", "layer.3.weight"]], 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 512}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def cache_as_hub_would(folder: Path, cache: Path, revision: str = "main") -> None:
    """Lay a folder into a Hub cache, as a download of that revision leaves it."""
    repository = cache / "models--org--name"
    snapshot = repository / "snapshots" / COMMIT
    shutil.copytree(folder, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / revision).write_text(COMMIT)


def assert_holds(weights: Weights, tensors: dict[str, torch.Tensor]) -> None:
    assert set(weights.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert weights.tensors[name].shape == tuple(tensor.shape)
        assert torch.equal(weights.read(name), tensor)


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_folder(kind, request, tensors):
    weights = Weights(find_weights(str(request.getfixturevalue(kind))))
    assert len({stored.file for stored in weights.tensors.values()}) == (1 if kind == "single" else 2)
    assert_holds(weights, tensors)


@pytest.mark.parametrize("revision", ["main", "v2", COMMIT])
@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_hub_cache_offline(kind, revision, request, tensors, tmp_path):
    cache_as_hub_would(request.getfixturevalue(kind), tmp_path / "hub", "main" if revision == COMMIT else revision)
    files = find_weights("org/name", cache_dir=str(tmp_path / "hub"), revision=revision)
    assert all(str(tmp_path / "hub") in file for file in files)
    assert_holds(Weights(files), tensors)


def test_hub_cache_of_another_revision(single, tmp_path):
    cache_as_hub_would(single, tmp_path / "hub")
    with pytest.raises((ValueError, OSError), match="org/name"):
        find_weights("org/name", cache_dir=str(tmp_path / "hub"), revision="v2")


def test_hub_cache_that_lacks_a_shard(sharded, tmp_path):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    cache_as_hub_would(sharded, tmp_path / "hub")
    with pytest.raises((ValueError, OSError), match=r"model-00002-of-00002\.safetensors"):
        find_weights("org/name", cache_dir=str(tmp_path / "hub"))


def test_single_file_comes_before_an_index_as_in_transformers(single, sharded, tensors):
    save_file({"other": torch.ones(1)}, single / "model.safetensors")
    shutil.copytree(single, sharded, dirs_exist_ok=True)
    assert set(Weights(find_weights(str(sharded))).tensors) == {"other"}


def test_subfolder(single, tmp_path, tensors):
    outer = tmp_path / "outer"
    shutil.copytree(single, outer / "inner")
    assert_holds(Weights(find_weights(str(outer), subfolder="inner")), tensors)


def test_bytes_are_counted_when_they_are_read(sharded, tensors):
    weights = Weights(find_weights(str(sharded)))
    assert weights.num_bytes == sum(tensor.nbytes for tensor in tensors.values()) == 512
    assert weights.bytes_read == 0  # headers are not weights
    weights.read("layer.3.weight")
    assert weights.bytes_read == 128


def test_missing_shard_names_file_and_tensor(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"'model-00002-of-00002\.safetensors' is missing.*'layer\.2\.weight'.*again"):
        find_weights(str(sharded))


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_truncated_file_names_file_and_first_tensor_lost(kind, request):
    folder = request.getfixturevalue(kind)
    file = sorted(folder.glob("*.safetensors"))[-1]
    content = file.read_bytes()
    first = "layer.0.weight" if kind == "single" else "layer.2.weight"
    second = first.replace("0", "1").replace("2", "3")
    data = 8 + struct.unpack("<Q", content[:8])[0]
    order = sorted(load_file(file), key=lambda name: json.loads(content[8:data])[name]["data_offsets"])
    assert order[:2] == [first, second]
    for length, lost in ((data + 128, second), (data + 127, first), (data, first)):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match=rf"{file.name!r} .*cut short.*{lost!r} on.*download it again") as caught:
            Weights(find_weights(str(folder)))
        assert str(file) in str(caught.value)


@pytest.mark.parametrize("length", [0, 7, 8, 100])
def test_truncated_header(single, length):
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"'model\.safetensors' .*cut short or damaged, its header included"):
        Weights(find_weights(str(single)))


def test_no_safetensors_at_all(single):
    """A page of HTML, say, that a proxy put in the place of the file."""
    (single / "model.safetensors").write_text("<html>" + "Sign in to continue " * 20 + "</html>")
    with pytest.raises(ValueError, match=r"'model\.safetensors' .*damaged, its header included"):
        Weights(find_weights(str(single)))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "is a LoRA adapter.*base model that its adapter_config"),
        (["pytorch_model.bin"], r"holds pickled \.bin weights.*save_pretrained"),
        (["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"], r"holds pickled \.bin weights"),
        (["config.json"], "has neither model.safetensors nor model.safetensors.index.json"),
        ([], "has neither model.safetensors nor model.safetensors.index.json"),
    ],
)
@pytest.mark.parametrize("in_cache", [False, True])
def test_other_formats_are_named(tmp_path, files, message, in_cache):
    folder = tmp_path / "folder"
    folder.mkdir()
    for file in files:
        (folder / file).write_text("{}")
    hub: dict[str, str] = {}
    if in_cache:
        cache_as_hub_would(folder, tmp_path / "hub")
        hub = {"cache_dir": str(tmp_path / "hub")}
    with pytest.raises(ValueError, match=message):
        find_weights("org/name" if in_cache else str(folder), **hub)
