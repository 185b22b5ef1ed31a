r"""Claim: mixtures of experts train with their experts in 4 bits, sharded, with LoRA on attention or on every expert.

Each row is one `hf-qlora-fsdp rehearse` (random weights of the real shapes, the real trainer) held to what it promises
(`promises.py`).

All rows took 7.5 minutes on two H200 (28 November 2026), 30 to 50 s a row of 8x7B or four layers, 90 s 8x22B, which
pins 48 GiB of the host, and Qwen3-MoE. Stock writes 13 GB to `TMPDIR` first. What runs when `--minutes` are over is
ended, and what has not run is said:

    NCCL_BUFFSIZE=1048576 NCCL_MAX_NCHANNELS=8 NCCL_NVLS_ENABLE=0 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True \
        python benchmarks/experts.py --minutes 9.5 --row mixtral-attention --row mixtral-experts \
        --row mixtral-experts-offload --row mixtral-4-layers --row mixtral-4-layers-stock --row mixtral-8x22b \
        --row qwen3-moe-30b

The same with `--tiny --steps 4 --results /dev/null` sees on two cores of a CPU that the rows run, in 3 minutes.

The variables save memory beside what torch allocates, 14.3, 15.6, 12.8 and 17.5 GiB in the four rows that promise 16,
18, 16 and 24. Segments that expand leave fewer holes between tensors, and eight channels of NCCL instead of all take
0.3 GiB less (`LOG.md`): 1.2 GiB lay outside.

What a card holds of a Mixtral-8x7B over two (46.4 billion parameters in decoder layers, 0.516 bytes each):

    11.2 GiB  half of the packed weights        1.4 GiB  two layers, gathered
     1.6 GiB  LoRA r=16 on every expert, its float32 masters, gradients and moments, halved
     1.2 GiB  activations: 0.5 that go into layers, and those inside the one that runs
     0.3 GiB  experts in 16 bits, a chunk at a time; 0.2 GiB embedding and head, halved
     1.2 GiB  context, NCCL and kernels

A layer that is offloaded frees 0.35 GiB of that, and two that are on their way take as much each; the row of 16 GiB
offloads as many as make up for its LoRA on experts. Of a Mixtral-8x22B, a layer is 0.60 GiB a card, 33.5 GiB in all;
the rest, counted as above, takes 11 GiB of the 24.

The two rows of four layers compare with plain transformers, TRL and FSDP2 (`stock_experts.py`), which keeps experts in
16 bits, so that all of a Mixtral-8x7B would be 84 GiB a card before it is sharded.
"""

from __future__ import annotations

import sys
from typing import Any

from promises import GIB, Claim, Row, main

MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXTRAL_8X7B = (
    MIXTRAL
    | {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "max_position_embeddings": 32768}
)
QWEN3_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SHAPES: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": MIXTRAL_8X7B,
    "mixtral-8x7b-4-layers": MIXTRAL_8X7B | {"num_hidden_layers": 4},
    "mixtral-8x22b": MIXTRAL
    | {"vocab_size": 32000, "hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56}
    | {"num_attention_heads": 48, "max_position_embeddings": 65536},
    "qwen3-30b-a3b": QWEN3_MOE
    | {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48}
    | {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 40960}
    | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    "tiny": MIXTRAL
    | {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    | {"num_attention_heads": 8, "max_position_embeddings": 512},
    "tiny-qwen3": QWEN3_MOE
    | {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512}
    | {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 64},
}

SEQ_2048 = ("--seq", "2048", "--batch", "1", "--lora-r", "16")
ATTENTION = (*SEQ_2048, "--target-modules", "q_proj", "k_proj", "v_proj", "o_proj")
MIXTRAL_OFFLOADED = ("--cpu-offload-layers", "8")
MIXTRAL_22B_OFFLOADED = ("--cpu-offload-layers", "40")
ROWS = {
    "mixtral-attention": Row("mixtral-8x7b", ATTENTION, 16 * GIB, loads_below=True),
    "mixtral-experts": Row("mixtral-8x7b", SEQ_2048, 18 * GIB, loads_below=True),
    "mixtral-experts-offload": Row("mixtral-8x7b", (*SEQ_2048, *MIXTRAL_OFFLOADED), 16 * GIB, loads_below=True),
    "mixtral-4-layers": Row("mixtral-8x7b-4-layers", ATTENTION),
    "mixtral-4-layers-stock": Row("mixtral-8x7b-4-layers", ATTENTION, script="stock_experts.py"),
    "mixtral-8x22b": Row("mixtral-8x22b", (*SEQ_2048, *MIXTRAL_22B_OFFLOADED), 24 * GIB, loads_below=True),
    "qwen3-moe-30b": Row("qwen3-30b-a3b", SEQ_2048, 18 * GIB, loads_below=True, tiny="tiny-qwen3"),
}

if __name__ == "__main__":
    sys.exit(main(Claim(__file__, __doc__.splitlines()[0], ROWS, SHAPES)))
