"""Forward and backward of a 4-bit layer with its adapter, in as few passes and launches as they can be.

At small batches a GPU waits for Python, at large ones for memory. Both want the same: fewer and larger steps.

- `nested_dequantize.py`: a packed weight becomes 16-bit in one kernel, where bitsandbytes takes three.
- `base_product.py`: products with such a weight, a piece at a time if it is large.
- `lora_linear.py`: base product and low-rank part as one function, the second added into the first.
- `lora_group.py`: the same for layers that read one input, which is read once.
- `joined_product.py`: the same as one product, adapters included, which pays for wide outputs.
- `swiglu.py`: a gated MLP, which keeps half as much for the backward, and is run again only as far as it has to be.
- `silu_product.py`: what lies between its products, in one pass over memory; `silu_product_triton.py` has the kernels.
- `rms_norm.py`: a norm whose weight is not trained, likewise; `rms_norm_triton.py` has the kernels.
- `launching.py`: a Triton kernel that is launched again and again.
- `trial.py`: how a kernel is tried on a device before it is used there.

Nothing here knows what a layer of PEFT looks like, or how one is packed.
"""
