"""A checkpoint is continued by the run that wrote it; what may differ is said, what may not is refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from datasets import Dataset

from hf_qlora_fsdp.resuming.continuity import base_checksum, check_continues, compare_data, describe_data, find_commit

FACTS = {
    "base_model": "some/model",
    "base_checksum": "00ff",
    "adapters": {"default": {"r": 8, "target_modules": ["q_proj"], "use_dora": False}},
    "sequences_per_step": 8,
    "versions": {"torch": "2.13.0"},
}


def test_only_the_same_run_is_continued():
    assert check_continues("c", FACTS, FACTS) == []
    assert check_continues("c", FACTS, {**FACTS, "versions": {"torch": "3.0"}}) == ["torch: 2.13.0 then, 3.0 now"]
    assert check_continues("c", FACTS, {**FACTS, "base_model": "/moved/here"}) == []
    with pytest.raises(ValueError, match=r"some/model.*00ff.*other/model.*1234"):
        check_continues("c", FACTS, {**FACTS, "base_model": "other/model", "base_checksum": "1234"})
    default = FACTS["adapters"]["default"]
    with pytest.raises(ValueError, match=r"r=8.*now has 16"):
        check_continues("c", FACTS, {**FACTS, "adapters": {"default": {**default, "r": 16}}})
    with pytest.raises(ValueError, match=r"target_modules=\['q_proj'\].*\['k_proj', 'q_proj'\]"):
        changed = {**default, "target_modules": ["k_proj", "q_proj"]}
        check_continues("c", FACTS, {**FACTS, "adapters": {"default": changed}})
    with pytest.raises(ValueError, match=r"\['default'\].*\['default', 'other'\]"):
        check_continues("c", FACTS, {**FACTS, "adapters": {"default": default, "other": default}})


def checksums(rank: int) -> list[str]:
    from torch.distributed.fsdp import fully_shard

    from hf_qlora_fsdp.mesh import make_mesh

    found = []
    for change in (None, "value", "order", "rows", "trained"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(*[torch.nn.Linear(5, 5, bias=False) for _ in range(3)]).requires_grad_(False)
        model[2].requires_grad_(True)
        with torch.no_grad():
            if change == "value":
                model[0].weight[3, 3] += 1e-3
            elif change == "order":
                model[0].weight, model[1].weight = model[1].weight, model[0].weight
            elif change == "rows":
                model[0].weight.copy_(model[0].weight.flip(0))
            elif change == "trained":
                model[2].weight += 1
        whole = base_checksum(model)
        del model._base_checksum
        fully_shard(model, mesh=make_mesh())
        found += [whole, base_checksum(model)]
    return found


def test_the_checksum_of_the_base_sees_values_and_order_and_not_the_sharding(ranks):
    for found in ranks.run(checksums):
        whole, sharded, value, value_sharded, order, _, rows, rows_sharded, trained, trained_sharded = found
        assert whole == sharded == trained == trained_sharded
        assert value == value_sharded and rows == rows_sharded
        assert len({whole, value, order, rows}) == 4


def test_bytes_are_summed_by_their_places():
    """Over several chunks, and from any place on, as a rank's shard is."""
    from hf_qlora_fsdp.resuming.continuity import _ByteSum

    content = torch.randint(256, (5 * 2**19 + 3,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    places = torch.arange(content.numel()) % 65_521 + 1
    with ThreadPoolExecutor(2) as pool:
        summed = _ByteSum(pool)
        assert summed(content, 0) == int((places * content).sum())
        for cut in (1, 65_521, 2**20 + 7):
            assert summed(content[:cut], 0) + summed(content[cut:], cut) == summed(content, 0)


def numbers(*values: int, column: str = "input_ids") -> Dataset:
    return Dataset.from_list([{column: [value, value]} for value in values])


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (numbers(*range(100)), None),
        (numbers(*range(200)).select(range(100)), None),
        (numbers(*range(101)), "100 rows then, 101 now"),
        (numbers(*range(1, 101)), "100 rows then as now, but not the same or not in the same order"),
        (numbers(*range(100)).select(range(99, -1, -1)), "not in the same order"),
        (numbers(*range(100), column="ids"), "columns ['input_ids'] then, ['ids'] now"),
        (numbers(*range(100)).to_iterable_dataset(), "100 rows then, streamed now"),
    ],
)
def test_data_are_recognised_by_what_is_in_them(other, difference):
    """And not by where they come from: the second is cut out of others, the first has been made anew."""
    saved, now = {"data": describe_data(numbers(*range(100)))}, {"data": describe_data(other)}
    found = compare_data(saved, now)
    assert found is None if difference is None else difference in found
    assert compare_data({}, now) is None  # a manifest of an earlier version does not say


def test_the_commit_is_found_in_the_cache_and_nowhere_else(tmp_path):
    repository = tmp_path / "models--org--name"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "v2").write_text(commit)
    assert find_commit("org/name", cache_dir=tmp_path, revision="v2") == commit
    assert find_commit("org/name", cache_dir=tmp_path) is None
    assert find_commit("org/other", cache_dir=tmp_path) is None
    (tmp_path / "config.json").write_text("{}")
    assert find_commit(str(tmp_path)) is None


def test_short_data_are_recognised():
    assert describe_data(numbers(1))["rows_sha256"] != describe_data(numbers(2))["rows_sha256"]
    assert describe_data(numbers(1, 2))["num_rows"] == 2
