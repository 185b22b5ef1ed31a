r"""Claim: models far larger than two cards train on them, their frozen weights on the card, in host memory or on disk.

Each row is one `hf-qlora-fsdp rehearse` (random weights of the real shapes, the real trainer) held to what it promises
(`promises.py`).

    export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True NCCL_BUFFSIZE=1048576
    python benchmarks/offload.py --minutes 6 --steps 6 --row 70b-resident --row 70b-pinned --row 70b-unpinned -- \
        --use-liger-kernel
    sudo -E python benchmarks/offload.py --minutes 7 --row 70b-swap-pinned --row 70b-mapped -- --use-liger-kernel
    sudo -E python benchmarks/offload.py --minutes 9 --row 70b-swap -- --use-liger-kernel
    python benchmarks/offload.py --minutes 6 --row 405b -- --use-liger-kernel

On two H200 a row of the first command takes 65 to 100 s. Mapped shards take three and a half minutes (files of 36 GB,
steps of 43 s), and a host that is too small for pinned memory says so within half a minute. Swapping takes seven
minutes (a swap file of 40 GiB, steps of 146 s). The last command took four, of which loading takes two and another was
found to be in vain since (`LOG.md`).

Rows that limit host memory make a control group (version 2 or 1) for their processes, and rows that swap a swap file;
both need root, and both are removed again, whatever happens.
"""

from __future__ import annotations

import sys
from typing import Any

from promises import GB, GIB, Claim, Row, main

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "tie_word_embeddings": False,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-70b": LLAMA
    | {"vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    | {"num_attention_heads": 64, "max_position_embeddings": 4096},
    "llama-3.1-405b": LLAMA
    | {"vocab_size": 128256, "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126}
    | {"num_attention_heads": 128, "max_position_embeddings": 131072},
    "llama-3-8b": LLAMA
    | {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "max_position_embeddings": 8192},
    "tiny": LLAMA
    | {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    | {"num_attention_heads": 8, "max_position_embeddings": 512},
}

SEQ_2048 = ("--seq", "2048", "--activation-offloading")
OFFLOADED = (*SEQ_2048, "--batch", "2", "--cpu-offload")
UNPINNED = (*OFFLOADED, "--no-pin")
ROWS = {
    "8b-pinned": Row("llama-3-8b", OFFLOADED, 7 * GIB),
    "70b-resident": Row("llama-2-70b", (*SEQ_2048, "--batch", "1"), 23 * GIB, 1000, loads_below=True),
    "70b-pinned": Row("llama-2-70b", OFFLOADED, 7 * GIB, 1050, 64 * GB, loads_below=True),
    "70b-unpinned": Row("llama-2-70b", UNPINNED, 7 * GIB, 800, 64 * GB, loads_below=True),
    "70b-mapped": Row("llama-2-70b", OFFLOADED, 7 * GIB, host_limit="32GB", mapped=True, loads_below=True, steps=3),
    "70b-swap": Row("llama-2-70b", UNPINNED, 7 * GIB, host_limit="32GB", swap="40GiB", steps=2),
    "70b-swap-pinned": Row("llama-2-70b", OFFLOADED, 7 * GIB, host_limit="32GB", swap="40GiB", fits=False),
    "405b": Row(
        "llama-3.1-405b",
        ("--seq", "1024", "--batch", "1", "--activation-offloading", "--cpu-offload"),
        16 * GIB,
        40,
        230 * GB,
        loads_below=True,
        steps=4,
    ),
}


if __name__ == "__main__":
    sys.exit(main(Claim(__file__, __doc__.splitlines()[0], ROWS, SHAPES)))
