"""Beside `sharding.py`: frozen shards that lie in host memory while nobody computes with them.

host_memory        pinned, pageable, or mapped from a file
staging            a ring of pinned buffers, through which pageable memory is copied as fast as pinned
offload            the shard that FSDP gathers from either
"""
