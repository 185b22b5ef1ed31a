"""Base and adapter made one model, tensor by tensor: `hf-qlora-fsdp merge`.

edits              an adapter as a list of edits; the arithmetic is `lora_math.py`'s
plan               what will be done with each stored tensor
merger             doing it
folder, shards     the folder that is filled, and its files
"""
