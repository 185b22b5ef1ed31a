"""Beside `loader.py`: everything between a checkpoint's files and the pieces of a unit.

weights            safetensors files: where they are, what is in them, one tensor at a time
recipes            from stored names to parameters; expert_recipes: from stored experts to their stack
blueprint          the model on the meta device, with its 4-bit layers in place
adapters           LoRA weights in such a model
sources            where pieces come from: a checkpoint, random_weights, or the shard cache
shard_cache        the quantised weights kept on disk; with cache_reader and cache_writer
fitting            will the shards fit, asked before the first weight is read
"""
