"""Rows of the embedding that are trained alone (`trainable_token_indices`), tied to the head and not."""

from __future__ import annotations

import pytest
import torch

from tests.test_sharding import INPUT_IDS, assert_identical, compute_sharded, reference_model, row_by_row
from tests.tiny import make_checkpoint


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_gradients_of_rows_are_those_of_one_process(ranks, tmp_path, tie):
    folder = make_checkpoint(tmp_path, "llama", tie=tie)
    rows = {"trainable_token_indices": {"embed_tokens": sorted({*INPUT_IDS[0, :3].tolist(), 9})}}
    expected = row_by_row(reference_model(folder, torch.bfloat16, **rows))
    (name,) = (name for name in expected[0]["gradients"] if "trainable_tokens_delta" in name)
    assert expected[0]["gradients"][name].any()
    variants = [{"dtype": torch.bfloat16, **rows, **way} for way in ({}, {"checkpointing": True}, {"offload": True})]
    for rank, results in enumerate(ranks.run(compute_sharded, folder, variants)):
        for computed in results:
            assert_identical(computed, expected[rank])
