"""Every key of an Axolotl file, and what becomes of it.

The keys are those of Axolotl 0.18 (https://docs.axolotl.ai/docs/config-reference.html) with the ones that older files
still have. Those that need more than a table stand in `READ` and are read in `axolotl.py`, those of a data set stand in
`READ_OF_DATASET` and are read in `axolotl_data.py`.

Axolotl's defaults are not ours: it trains one epoch, with batches of one and a cosine schedule. A file that leaves a
key out has asked for these (`DEFAULTS`), so they are written out.
"""

from __future__ import annotations

from .foreign_keys import Reason, spread

# Ours under another name, or the same, with the type.
RENAMED: dict[str, tuple[str, type]] = {
    "base_model": ("model_name_or_path", str),
    "model_revision": ("model_revision", str),
    "revision_of_model": ("model_revision", str),
    "trust_remote_code": ("trust_remote_code", bool),
    "output_dir": ("output_dir", str),
    "sequence_len": ("max_length", int),
    "pad_to_multiple_of": ("pad_to_multiple_of", int),
    "sample_packing": ("packing", bool),
    "eval_sample_packing": ("eval_packing", bool),
    "num_epochs": ("num_train_epochs", float),
    "max_steps": ("max_steps", int),
    "learning_rate": ("learning_rate", float),
    "weight_decay": ("weight_decay", float),
    "max_grad_norm": ("max_grad_norm", float),
    "adam_beta1": ("adam_beta1", float),
    "adam_beta2": ("adam_beta2", float),
    "adam_epsilon": ("adam_epsilon", float),
    "neftune_noise_alpha": ("neftune_noise_alpha", float),
    "noisy_embedding_alpha": ("neftune_noise_alpha", float),
    "seed": ("seed", int),
    "logging_steps": ("logging_steps", int),
    "save_total_limit": ("save_total_limit", int),
    "save_only_model": ("save_only_model", bool),
    "load_best_model_at_end": ("load_best_model_at_end", bool),
    "metric_for_best_model": ("metric_for_best_model", str),
    "greater_is_better": ("greater_is_better", bool),
    "resume_from_checkpoint": ("resume_from_checkpoint", str),
    "dataset_num_proc": ("dataset_num_proc", int),
    "dataset_processes": ("dataset_num_proc", int),
    "dataloader_num_workers": ("dataloader_num_workers", int),
    "dataloader_pin_memory": ("dataloader_pin_memory", bool),
    "dataloader_prefetch_factor": ("dataloader_prefetch_factor", int),
    "dataloader_drop_last": ("dataloader_drop_last", bool),
    "accelerator_config": ("accelerator_config", dict),
    "ddp_timeout": ("ddp_timeout", int),
    "torch_empty_cache_steps": ("torch_empty_cache_steps", int),
    "hub_strategy": ("hub_strategy", str),
    "hub_revision": ("hub_revision", str),
    "lora_r": ("lora_r", int),
    "lora_alpha": ("lora_alpha", int),
    "lora_dropout": ("lora_dropout", float),
    "lora_modules_to_save": ("lora_modules_to_save", list),
    "lora_target_parameters": ("lora_target_parameters", list),
    "peft_use_rslora": ("use_rslora", bool),
    "peft_use_dora": ("use_dora", bool),
}
# What Axolotl does where the file says nothing, by our names.
DEFAULTS: dict[str, object] = {
    "output_dir": "./model-out",
    "max_length": 512,
    "num_train_epochs": 1.0,
    "lora_dropout": 0.0,
    "save_total_limit": 4,
}

_SAME_RESULT = "it chooses a kernel, which changes the speed or the memory and not the result"
_LAYOUT = "sharding is FSDP2's, over all ranks that are started"
_LOADING = "no rank ever holds the whole model, and each unit is quantised as it is read"
_EVALUATION = "it only adds a measurement or a sample, which nothing here takes"
_TRACKING = "it names the run for a tracker, which takes it from its environment variable or its own settings"
_SERVICE = "it belongs to a service or a command beside training"
_PREPARED = "TRL tokenises and packs the data itself, and datasets keeps the result in its cache"
_FOUND = "the model's own configuration says it"
_WATCHED = "a loss that is infinite or not a number stops the run (on_nonfinite), a large one is shown"
_FREED = "it changes when memory is freed, and no result"
UNUSED: dict[str, str] = spread(
    (
        _SAME_RESULT,
        "flash_attn_cross_entropy flash_attn_fuse_mlp flash_attn_fuse_qkv flash_attn_rms_norm flash_optimum",
    ),
    (_SAME_RESULT, "lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel fused_attn_kernel sdpa_varlen"),
    (_SAME_RESULT, "cut_cross_entropy chunked_cross_entropy chunked_cross_entropy_num_chunks flex_attn_compile_kwargs"),
    (_SAME_RESULT, "liger_rope liger_rms_norm liger_rms_norm_gated liger_layer_norm liger_swiglu liger_glu_activation"),
    (_SAME_RESULT, "liger_cross_entropy liger_fused_linear_cross_entropy tiled_mlp tiled_mlp_num_shards"),
    (_SAME_RESULT, "tiled_mlp_use_original_mlp use_kernels experts_implementation expert_backend moe_bnb_fast"),
    (_SAME_RESULT, "use_scattermoe use_sonicmoe moe_grouped_backend moe_dequant_chunk_size"),
    (_SAME_RESULT, "large_head_attention flash_attn_d512 gemma4_hybrid_attn_impl torch_compile_options"),
    (_LAYOUT, "ddp ddp_bucket_cap_mb ddp_broadcast_buffers ddp_find_unused_parameters dp_shard_size"),
    (_LAYOUT, "world_size local_rank device device_map use_ray ray_num_workers ray_run_name resources_per_worker"),
    (_LOADING, "qlora_sharded_model_loading low_cpu_mem_usage max_memory gpu_memory_limit lora_on_cpu"),
    (_LOADING, "experimental_skip_move_to_device embeddings_skip_upcast"),
    (_EVALUATION, "do_causal_lm_eval eval_causal_lm_metrics do_bench_eval bench_dataset bench_split eval_table_size"),
    (_EVALUATION, "eval_max_new_tokens generate_samples num_generation_samples generation_max_new_tokens"),
    (_EVALUATION, "generation_temperature generation_top_p generation_top_k generation_prompt_ratio"),
    (_EVALUATION, "generation_do_sample lm_eval_tasks lm_eval_batch_size lm_eval_post_train lm_eval_model"),
    (_EVALUATION, "profiler_steps profiler_steps_start include_tokens_per_second include_tkps"),
    (_TRACKING, "wandb_entity wandb_run_id wandb_watch wandb_log_model wandb_mode mlflow_tracking_uri"),
    (_TRACKING, "mlflow_experiment_name hf_mlflow_log_artifacts comet_api_key comet_workspace comet_project_name"),
    (_TRACKING, "comet_experiment_key comet_mode comet_online comet_experiment_config trackio_project_name"),
    (_TRACKING, "trackio_space_id use_otel_metrics otel_metrics_host otel_metrics_port swanlab_project swanlab_mode"),
    (_TRACKING, "swanlab_experiment_name swanlab_description swanlab_workspace swanlab_api_key swanlab_log_model"),
    (_TRACKING, "swanlab_web_host swanlab_api_host swanlab_lark_webhook_url swanlab_lark_secret"),
    (_TRACKING, "swanlab_log_completions swanlab_completion_log_interval swanlab_completion_max_buffer"),
    (_SERVICE, "gradio_title gradio_share gradio_server_name gradio_server_port gradio_max_new_tokens"),
    (_SERVICE, "gradio_temperature merge_lora merge_method strict axolotl_config_path is_preprocess"),
    (_SERVICE, "hf_use_auth_token tokenizer_save_jinja_files save_safetensors"),
    (_PREPARED, "dataset_prepared_path num_dataset_shards_to_save dataset_keep_in_memory push_dataset_to_hub"),
    (_PREPARED, "sample_packing_group_size sample_packing_bin_size sample_packing_eff_est total_num_tokens"),
    (_PREPARED, "sample_packing_mp_start_method multipack_real_batches preprocess_iterable remove_unused_columns"),
    (_PREPARED, "total_supervised_tokens"),
    ("padding is left out of the loss, however long it is", "pad_to_sequence_len"),
    (_FOUND, "model_type type_of_model is_falcon_derived_model is_llama_derived_model is_mistral_derived_model"),
    (_FOUND, "is_qwen_derived_model cls_model_config tokenizer_type processor_type tokenizer_use_fast"),
    (_WATCHED, "loss_watchdog_threshold loss_watchdog_patience"),
    (_FREED, "gc_steps gc_collect_steps"),
    ("the adapter of every checkpoint is read back and compared", "save_first_step"),
    ("experts are always quantised here", "quantize_moe_experts"),
    ("recomputation is not reentrant here, with the same result", "gradient_checkpointing_kwargs"),
)

_SFT: Reason = ("this is supervised fine-tuning", "Remove it, or write a script with TRL's trainer for it.")
_TOKENS: Reason = (
    "it changes the vocabulary or the tokenizer, and rows of the embedding with it",
    "Save the tokenizer and the model with the change, name their folder as base_model, and remove it.",
)
OTHER_MODEL: Reason = (
    "it trains another model than the base model's own configuration describes",
    "Save the base model with the change, name its folder as base_model, and remove it.",
)
LORA: Reason = (
    "train makes the adapter from lora_r, lora_alpha, lora_dropout, the target modules, rsLoRA and DoRA alone",
    "Remove it, or write a script that hands QLoRAFSDPTrainer a LoraConfig with it as peft_config.",
)
_NOT_4BIT: Reason = (
    "the frozen weights are in 4 bits of bitsandbytes here",
    "Remove it, and write load_in_4bit: true.",
)
_TRAINER: Reason = ("it belongs to a trainer or an optimizer that is not here", "Remove it.")
_SCHEDULE: Reason = ("it shapes the learning rate in a way of Axolotl's own", "Write lr_scheduler and warmup_steps.")
_ROWS: Reason = ("TRL reads and packs rows in its own order and in full", "Change the data files instead.")
_MESH: Reason = ("the model is sharded over all ranks in one dimension", "Remove it.")
_COMPILE: Reason = ("bitsandbytes' 4-bit layers and FSDP2's hooks break the graph in every layer", "Remove it.")
_DEEPSPEED: Reason = (
    "DeepSpeed and FSDP both want to shard the model, and only FSDP shards 4-bit weights",
    "Remove it; where it offloads, write fsdp_config: {offload_params: true}.",
)
_VISION: Reason = ("train takes rows of text", "Remove it, or write a script with QLoRAFSDPTrainer and your collator.")
_LOSS: Reason = ("the loss here is the mean of the tokens' negative log-likelihoods", "Remove it.")
_FSDP: Reason = ("gathered parameters have one dtype, or packed bytes are corrupted", "Remove it.")
_MISTRAL: Reason = (
    "TRL writes conversations with a tokenizer of transformers and its chat template",
    "Remove it, and name a base model that has these.",
)
_LINEARIZED: Reason = (
    "such a checkpoint only fits Axolotl's own Llama 4",
    "Remove it, and name the original checkpoint as base_model: experts are quantised as they are read.",
)
REFUSED: dict[str, Reason] = spread(
    (
        _SFT,
        "rl trl vllm ebft reward_model process_reward_model center_rewards_coefficient num_labels orpo_alpha rl_beta",
    ),
    (_SFT, "simpo_gamma cpo_alpha kto_desirable_weight kto_undesirable_weight dpo_beta dpo_use_weighting rpo_alpha"),
    (_SFT, "dpo_label_smoothing precompute_ref_log_probs dpo_use_liger_kernel dpo_padding_free dpo_loss_type"),
    (_SFT, "dpo_loss_weights dpo_use_logits_to_keep dpo_generate_during_eval dpo_norm_loss max_prompt_len"),
    (_SFT, "kd_trainer kd_ce_alpha kd_alpha kd_temperature diffusion"),
    (_TOKENS, "tokens added_tokens_overrides tokenizer_config tokenizer_legacy"),
    (_TOKENS, "resize_token_embeddings_to_32x mean_resizing_embeddings shrink_embeddings fix_untrained_tokens"),
    (_TOKENS, "peft_trainable_token_indices"),
    (_MISTRAL, "tokenizer_use_mistral_common"),
    (OTHER_MODEL, "base_model_config overrides_of_model_kwargs model_kwargs rope_scaling reinit_weights"),
    (
        OTHER_MODEL,
        "scaling_softmax scaling_softmax_factor scaling_softmax_bias s2_attention use_onebitllms dense_mixer",
    ),
    (LORA, "lora_model_dir lora_fan_in_fan_out lora_rank_pattern lora_alpha_pattern peft_layers_to_transform peft"),
    (LORA, "peft_layers_pattern peft_layer_replication peft_ensure_weight_tying loraplus_lr_ratio"),
    (LORA, "loraplus_lr_embedding use_mora mora_type relora relora_steps relora_prune_ratio relora_prune_method"),
    (LORA, "relora_cpu_offload unfrozen_parameters"),
    (_NOT_4BIT, "load_in_8bit gptq fp8 fp8_enable_fsdp_float8_all_gather qat quantization model_quantization_config"),
    (_NOT_4BIT, "model_quantization_config_kwargs float32 nonexpert_quantization use_dsv4_kernels use_glm_dsa_kernels"),
    (_NOT_4BIT, "dsv4_fp8_nonexpert_mode dsv4_fp8_lora_kernel dsv4_shared_mlp_lora_kernel dsv4_bf16_all"),
    (_NOT_4BIT, "dsv4_fp4_grouped_mode gemma4_fp8_nonexpert gemma4_nf4_nonexpert nvfp4_merge_aware"),
    (_NOT_4BIT, "nvfp4_merge_aware_start_step"),
    (_TRAINER, "trainer_cls optim_target_modules torchdistx_path embedding_lr embedding_lr_scale lr_groups adam_beta3"),
    (_TRAINER, "adam_epsilon2 lisa_n_layers lisa_step_interval lisa_layers_attribute early_stopping_patience"),
    (_TRAINER, "dynamic_checkpoint auto_find_batch_size layer_offloading spectrum_top_fraction spectrum_model_name"),
    (_TRAINER, "grokfast_alpha grokfast_lamb recipe auto_resume_from_checkpoints dion_lr dion_momentum"),
    (_TRAINER, "dion_rank_fraction dion_rank_multiple_of qgalore_rank qgalore_update_proj_gap qgalore_scale"),
    (_TRAINER, "qgalore_proj_type qgalore_proj_quant qgalore_proj_bits qgalore_proj_group_size qgalore_gamma_proj"),
    (_TRAINER, "qgalore_cos_threshold qgalore_queue_size"),
    (_SCHEDULE, "lr_quadratic_warmup cosine_constant_lr_ratio jagged_restart_steps jagged_restart_warmup_steps"),
    (_SCHEDULE, "jagged_restart_anneal_steps lr_div_factor"),
    (_ROWS, "test_datasets pretraining_dataset streaming dataset_shard_num dataset_shard_idx skip_prepare_dataset"),
    (_ROWS, "shuffle_before_merging_datasets dataset_exact_deduplication curriculum_sampling min_sample_len"),
    (_ROWS, "sample_packing_sequentially batch_flattening use_pose pose_split_on_token_ids pose_max_context_len"),
    (_ROWS, "pose_num_chunks pretrain_multipack_buffer_size pretrain_multipack_attn pretraining_sample_concatenation"),
    (_ROWS, "streaming_multipack_buffer_size max_packed_sequence_len eval_sequence_len default_system_message"),
    (_ROWS, "chat_template_kwargs eot_tokens"),
    (_MESH, "dp_replicate_size sequence_parallel_degree context_parallel_size heads_k_stride ring_attn_func"),
    (_MESH, "tensor_parallel_size expert_parallel_size expert_parallel_backend"),
    (_COMPILE, "torch_compile torch_compile_backend torch_compile_mode"),
    (_DEEPSPEED, "deepspeed deepcompile"),
    (_VISION, "image_size image_resize_algorithm role_boundaries processor_kwargs freeze_mm_modules"),
    (_LOSS, "use_eaft eaft_alpha eaft_k use_dynamic_finetuning liger_use_token_scaling"),
    (_FSDP, "fp32_norms fp32_norm_classes"),
    (_LINEARIZED, "llama4_linearized_experts"),
)
HARMLESS: dict[str, object] = {
    "dp_replicate_size": 1,
    "sequence_parallel_degree": 1,
    "context_parallel_size": 1,
    "tensor_parallel_size": 1,
    "expert_parallel_size": 1,
}
# Read by a function of `axolotl.py`, which has that subject.
READ: dict[str, str] = spread(
    ("adapter", "adapter load_in_4bit bnb_config_kwargs lora_target_modules lora_target_linear"),
    ("adapter", "peft_init_lora_weights peft_autocast_adapter_dtype"),
    ("sharding", "fsdp fsdp_config fsdp_version fsdp_final_state_dict_type gradient_checkpointing"),
    ("sharding", "activation_offloading selective_checkpointing"),
    ("precision", "bf16 fp16 bfloat16 float16 tf32 attn_implementation flash_attention sdp_attention"),
    ("precision", "xformers_attention flex_attention sage_attention eager_attention"),
    ("model", "model_config overrides_of_model_config plugins special_tokens"),
    ("batches", "micro_batch_size gradient_accumulation_steps batch_size eval_batch_size group_by_length"),
    ("batches", "shuffle_merged_datasets"),
    ("schedule", "optimizer optim_args lr_scheduler lr_scheduler_kwargs cosine_min_lr_ratio warmup_steps warmup_ratio"),
    ("saving", "save_steps saves_per_epoch save_strategy eval_steps evals_per_epoch eval_strategy evaluation_strategy"),
    ("saving", "val_set_size"),
    ("data", "datasets train_on_inputs chat_template chat_template_jinja excess_length_strategy"),
    ("trackers", "hub_model_id use_wandb wandb_project wandb_name use_tensorboard use_mlflow mlflow_run_name"),
    ("trackers", "use_comet use_trackio trackio_run_name use_swanlab"),
)

# The same for each of `datasets`.
UNUSED_OF_DATASET: dict[str, str] = spread(
    (_PREPARED, "preprocess_shards"),
    ("datasets runs no code that comes with data", "trust_remote_code"),
)
_COLUMNS: Reason = (
    "train takes conversations as TRL has them, all that the assistant says being trained",
    "Write the data in that form: messages with role and content.",
)
REFUSED_OF_DATASET: dict[str, Reason] = spread(
    (_ROWS, "shards shards_idx input_transform input_format logprobs_field temperature"),
    (("TRL loads the newest revision of a data set", "Save the data to a file and name it as path."), "revision"),
    (_COLUMNS, "conversation field_human field_model field_tools field_thinking template_thinking_key"),
    (_COLUMNS, "message_field_training message_field_training_detail split_thinking drop_system_message"),
)
HARMLESS_OF_DATASET: dict[str, object] = {
    "field_tools": "tools",
}
READ_OF_DATASET: dict[str, str] = spread(
    ("source", "path name split ds_type data_files"),
    ("form", "type field chat_template chat_template_jinja"),
    ("conversation", "field_messages message_field_role message_field_content message_property_mappings"),
    ("conversation", "roles roles_to_train train_on_eos train_on_eot"),
)
