"""What makes a step faster, or smaller, and changes nothing that is computed beyond rounding.

    fusion             which layers run as one function with their adapter; the functions are in `kernels/`
    fused_norms        which norms run as one function
    packed_attention   packed sequences one by one, without a mask
    checkpointing      only as many decoder layers computed twice as memory demands; with fsdp_state and
                       activation_room
    shard_steps        clipping and the optimizer on the shards themselves
    deferred_metrics   TRL's metrics read once a step, when the device is waited for anyway
    loss_filter        losses that are no numbers left out of the log, by the device
    kept_gathered      units gathered once a step, not once a micro-batch, where they stay whole anyway
    module_walks       walks through all modules, once instead of in every step
    spared_states      random generators left alone by gradient checkpointing where no layer asks them
    frozen_objects     no search for garbage among what was there before training
    matmul_share       how near a step comes to what the card can multiply

What each was worth, and what did not help, is in `benchmarks/LOG.md`.
"""
