"""A model that cannot be loaded is refused by arithmetic, with advice that fits the place that is short."""

from __future__ import annotations

import pickle

import pytest
import torch

from hf_qlora_fsdp.errors import DoesNotFitError
from hf_qlora_fsdp.loading.fitting import Need, available_bytes, check_fits
from tests.tiny import make_checkpoint

GIB = 2**30


def need(**changes) -> Need:
    values = {
        "resident_bytes": 18 * GIB,
        "transient_bytes": 2 * GIB + GIB // 2,
        "tensor_bytes": GIB // 2,
        "world_size": 2,
        "ranks_per_host": 2,
    }
    return Need(**(values | changes))


OFFLOADED = {"resident_bytes": 0, "offloaded_bytes": 18 * GIB}
MAPPED = {**OFFLOADED, "mapped": True, "staging_bytes": GIB}


def test_peak_is_the_formula_of_the_loader():
    transient = 2 * GIB + GIB // 2
    assert need().peak("cuda") == {"cuda": 18 * GIB + transient, "host": 2 * (GIB // 2)}
    assert need(**OFFLOADED).peak("cuda") == {"cuda": transient, "host": 2 * (18 * GIB + GIB // 2)}
    assert need(**MAPPED).peak("cuda") == {"disk": 36 * GIB, "cuda": transient, "host": 2 * (GIB + GIB // 2)}
    assert "disk" not in need(**MAPPED, kept=True).peak("cuda")  # it is there already
    assert need().peak("cpu") == {"host": 2 * (18 * GIB + transient)}
    assert need(**OFFLOADED).peak("cpu") == {"host": 2 * (18 * GIB + transient)}


def test_what_fits_to_the_byte_is_let_through():
    enough = need().peak("cuda")
    check_fits("m", need(), "cuda", enough)
    with pytest.raises(ValueError, match="cards"):
        check_fits("m", need(), "cuda", enough | {"cuda": enough["cuda"] - 1})
    with pytest.raises(ValueError, match="host"):
        check_fits("m", need(), "cuda", enough | {"host": enough["host"] - 1})
    check_fits("m", need(), "cuda", {"cuda": enough["cuda"]})  # the host is not asked


def test_a_refusal_reaches_another_process_whole():
    """Pools and launchers pickle what their processes raise, and hang or fail where it cannot be read back."""
    with pytest.raises(DoesNotFitError) as caught:
        check_fits("m", need(), "cuda", {"cuda": 0})
    arrived = pickle.loads(pickle.dumps(caught.value))
    assert str(arrived) == str(caught.value) and vars(arrived) == vars(caught.value)


@pytest.mark.parametrize(
    ("changes", "place", "advice"),
    [
        ({}, "cuda", "cpu_offload=True"),
        (OFFLOADED, "cuda", "--nproc_per_node 4"),
        (OFFLOADED, "host", "cpu_offload_dir=PATH"),
        (MAPPED, "disk", "larger disk"),
        ({}, "host", "smaller model"),
    ],
)
def test_advice_is_about_the_place_that_is_short(changes, place, advice):
    plenty = {"cuda": 1000 * GIB, "host": 1000 * GIB, "disk": 1000 * GIB}
    with pytest.raises(ValueError, match=r"'m' in 4 bits over 2 ranks needs .* are free") as error:
        check_fits("m", need(**changes), "cuda", plenty | {place: GIB // 4})
    assert advice in str(error.value)


def test_swap_counts_only_where_memory_may_be_swapped():
    cpu = torch.device("cpu")
    assert available_bytes(cpu, with_swap=True)["host"] >= available_bytes(cpu, with_swap=False)["host"] - GIB


def load_too_large(rank, model, tmp_path):
    import hf_qlora_fsdp.loader as loader

    read = []
    original = loader.Weights.read
    loader.Weights.read = lambda self, name: read.append(name) or original(self, name)
    free = loader.available_bytes
    loader.available_bytes = lambda device, **_: {"host": 1024}
    try:
        loader.load_quantized_model(model, progress=False)
    except (ValueError, RuntimeError) as error:
        return str(error), read
    finally:
        loader.Weights.read, loader.available_bytes = original, free
    return "loaded", read


def test_loader_asks_before_it_reads(ranks, tmp_path):
    model = make_checkpoint(tmp_path / "model")
    for said, read in ranks.run(load_too_large, model, tmp_path):
        assert "needs" in said and "1.0 KiB are free" in said
        assert read == []
