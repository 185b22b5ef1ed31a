"""Every key of a LLaMA-Factory file, and what becomes of it.

Its keys are those of transformers' `TrainingArguments`, most of which are ours as they stand, and its own
(https://github.com/hiyouga/LLaMA-Factory, `src/llamafactory/hparams`). Those that need more than a table are read in
`llama_factory.py` and stand in `READ`.
"""

from __future__ import annotations

from .foreign_keys import Reason, spread

_OWN: dict[str, tuple[str, type]] = {
    "model_name_or_path": ("model_name_or_path", str),
    "model_revision": ("model_revision", str),
    "trust_remote_code": ("trust_remote_code", bool),
    "quantization_type": ("bnb_4bit_quant_type", str),
    "double_quantization": ("bnb_4bit_use_double_quant", bool),
    "moe_aux_loss_coef": ("router_aux_loss_coef", float),
    "cutoff_len": ("max_length", int),
    "preprocessing_num_workers": ("dataset_num_proc", int),
    "lora_rank": ("lora_r", int),
    "lora_dropout": ("lora_dropout", float),
    "use_rslora": ("use_rslora", bool),
    "use_dora": ("use_dora", bool),
}
# Arguments of transformers that are ours as they stand.
_KINDS: tuple[tuple[type, str], ...] = (
    (
        float,
        "learning_rate num_train_epochs weight_decay max_grad_norm adam_beta1 adam_beta2 adam_epsilon warmup_steps",
    ),
    (float, "label_smoothing_factor neftune_noise_alpha eval_delay logging_steps save_steps eval_steps"),
    (
        int,
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps max_steps seed data_seed",
    ),
    (int, "save_total_limit dataloader_num_workers dataloader_prefetch_factor ddp_timeout torch_empty_cache_steps"),
    (int, "eval_accumulation_steps"),
    (bool, "logging_first_step save_only_model load_best_model_at_end greater_is_better dataloader_pin_memory"),
    (bool, "dataloader_drop_last dataloader_persistent_workers ignore_data_skip full_determinism use_cpu tf32"),
    (bool, "push_to_hub hub_private_repo hub_always_push eval_on_start average_tokens_across_devices disable_tqdm"),
    (bool, "logging_nan_inf_filter include_num_input_tokens_seen prediction_loss_only"),
    (dict, "accelerator_config"),
    (
        str,
        "output_dir report_to run_name optim optim_args lr_scheduler_type logging_strategy save_strategy eval_strategy",
    ),
    (str, "metric_for_best_model hub_model_id hub_strategy hub_revision resume_from_checkpoint log_level project"),
    (str, "train_sampling_strategy"),
    (dict, "lr_scheduler_kwargs"),
)
RENAMED: dict[str, tuple[str, type]] = _OWN | {name: (name, kind) for kind, names in _KINDS for name in names.split()}
# What it does where the file says nothing, by our names. The rest of its defaults are ours.
DEFAULTS: dict[str, object] = {"max_length": 2048, "lora_r": 8, "lora_dropout": 0.0, "learning_rate": 5e-5}

_SAME_RESULT = "it changes the speed or the memory, and not the result"
_LOADING = "no rank ever holds the whole model, and each unit is quantised as it is read"
_PREPARED = "TRL tokenises the data, and datasets keeps the result in its cache"
_STAGE = "it belongs to another stage, method or command than supervised fine-tuning with LoRA"
_PLACE = "processes are started by train --nproc, torchrun, accelerate launch or srun"
_TRACKING = "trackers and the Hub take it from their own settings"
UNUSED: dict[str, str] = spread(
    (
        _SAME_RESULT,
        "enable_liger_kernel use_liger_kernel liger_kernel_config use_unsloth use_unsloth_gc use_v1_kernels",
    ),
    (_SAME_RESULT, "use_reentrant_gc gradient_checkpointing_kwargs compute_accuracy plot_loss print_param_status"),
    (_SAME_RESULT, "include_effective_tokens_per_second skip_memory_metrics remove_unused_columns"),
    (_LOADING, "low_cpu_mem_usage offload_folder quantization_device_map device_map cache_dir use_fast_tokenizer"),
    (_PREPARED, "overwrite_cache preprocessing_batch_size buffer_size data_shared_file_system media_dir"),
    (_STAGE, "export_dir export_size export_device export_quantization_bit export_quantization_dataset"),
    (_STAGE, "export_quantization_nsamples export_quantization_maxlen export_legacy_format export_hub_model_id"),
    (_STAGE, "infer_backend infer_dtype use_kv_cache vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_config"),
    (_STAGE, "vllm_max_lora_rank sglang_maxlen sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend"),
    (_STAGE, "do_sample temperature top_p top_k num_beams max_length max_new_tokens repetition_penalty length_penalty"),
    (_STAGE, "skip_special_tokens eval_num_beams generation_max_length generation_num_beams predict_with_generate"),
    (_STAGE, "pref_beta pref_ftx pref_bco_weight pref_loss dpo_label_smoothing kto_chosen_weight kto_rejected_weight"),
    (_STAGE, "simpo_gamma ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards ref_model"),
    (_STAGE, "ref_model_adapters ref_model_quantization_bit reward_model reward_model_adapters reward_model_type"),
    (_STAGE, "reward_model_quantization_bit ld_alpha freeze_trainable_layers freeze_trainable_modules"),
    (
        _STAGE,
        "freeze_extra_modules freeze_vision_tower freeze_multi_modal_projector module_dropout oft_rank oft_target",
    ),
    (_STAGE, "oft_block_size image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels"),
    (_STAGE, "video_min_pixels video_fps video_maxlen use_audio_in_video audio_sampling_rate"),
    (_STAGE, "galore_target galore_rank galore_update_interval galore_scale galore_proj_type galore_layerwise"),
    (_STAGE, "apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_proj_type"),
    (_STAGE, "apollo_scale_type apollo_layerwise apollo_scale_front badam_mode badam_start_block badam_switch_mode"),
    (_STAGE, "badam_switch_interval badam_update_ratio badam_mask_mode badam_verbose pissa_iter asft_alpha eaft_alpha"),
    (_PLACE, "ray_num_workers ray_init_kwargs ray_run_name master_addr master_port ddp_find_unused_parameters"),
    (_PLACE, "ddp_backend ddp_bucket_cap_mb local_rank"),
    (_TRACKING, "hf_hub_token ms_hub_token om_hub_token hub_token use_swanlab swanlab_project swanlab_workspace"),
    ("training is what train does, and it evaluates where eval_strategy says so", "do_train do_eval"),
    (
        _TRACKING,
        "swanlab_run_name swanlab_mode swanlab_api_key swanlab_logdir swanlab_lark_webhook_url swanlab_lark_secret",
    ),
    ("adapters are always written as safetensors", "save_safetensors"),
    ("files of an earlier run stay until they are written again", "overwrite_output_dir"),
    ("padding is left out of the loss", "ignore_pad_token_for_loss"),
    ("the whole is evaluated, and there is one data set to evaluate on", "eval_on_each_dataset"),
)

_LORA: Reason = (
    "train makes a new adapter from rank, alpha, dropout, targets, rsLoRA and DoRA alone",
    "Remove it, or write a script that hands QLoRAFSDPTrainer a LoraConfig with it as peft_config.",
)
_TOKENS: Reason = (
    "it changes the vocabulary or how text is cut into tokens",
    "Save the tokenizer and the model with the change, name their folder as model_name_or_path, and remove it.",
)
_OTHER_MODEL: Reason = (
    "it trains another model than the base model's own configuration describes",
    "Save the base model with the change, name its folder as model_name_or_path, and remove it.",
)
_TRAINER: Reason = ("it belongs to a trainer or an optimizer that is not here", "Remove it.")
_ROWS: Reason = ("TRL reads whole data sets, one after the other, in a random order", "Change the data files instead.")
TEMPLATE: Reason = ("conversations are written by the tokenizer's own chat template", "Put it into the data instead.")
_NOT_4BIT: Reason = ("frozen weights are packed in 4 bits, and multiplied in one 16-bit dtype", "Remove it.")
_COMPILE: Reason = ("bitsandbytes' 4-bit layers and FSDP2's hooks break the graph in every layer", "Remove it.")
_DEEPSPEED: Reason = (
    "DeepSpeed and FSDP both want to shard the model, and only FSDP shards 4-bit weights",
    "Remove it; where it offloads, write fsdp_config: {offload_params: true}.",
)
REFUSED: dict[str, Reason] = spread(
    (_LORA, "adapter_name_or_path adapter_folder create_new_adapter pissa_init pissa_convert loraplus_lr_ratio"),
    (_LORA, "loraplus_lr_embedding freeze_language_model"),
    (_TOKENS, "resize_vocab split_special_tokens add_tokens add_special_tokens new_special_tokens_config"),
    (_TOKENS, "init_special_tokens"),
    (_OTHER_MODEL, "rope_scaling shift_attn mixture_of_depths train_from_scratch use_llama_pro"),
    (
        _TRAINER,
        "use_galore use_apollo use_badam use_adam_mini use_muon use_mca use_megatron_bridge megatron_bridge_args",
    ),
    (_TRAINER, "use_hyper_parallel hyper_parallel_args hyper_parallel_cp_size use_kt use_dft_loss use_asft_loss"),
    (_TRAINER, "use_eaft_loss early_stopping_steps enable_torch_profiler do_predict auto_find_batch_size"),
    (_TRAINER, "optim_target_modules parallelism_config kt_cpu_activation kt_weight_path kt_non_expert_weight_path"),
    (_TRAINER, "kt_expert_checkpoint_path kt_use_lora_experts kt_lora_expert_num kt_lora_expert_intermediate_size"),
    (_ROWS, "streaming mix_strategy interleave_probs disable_shuffling tokenized_path eval_dataset mask_history"),
    (TEMPLATE, "tool_format default_system preserve_thinking"),
    (_NOT_4BIT, "upcast_layernorm upcast_lmhead_output fp8 fp8_backend fp8_enable_fsdp_float8_all_gather pure_bf16"),
    (_NOT_4BIT, "bf16_full_eval fp16_full_eval"),
    (_COMPILE, "torch_compile torch_compile_backend torch_compile_mode"),
    (_DEEPSPEED, "deepspeed"),
)
HARMLESS: dict[str, object] = {
    "mix_strategy": "concat",
    "init_special_tokens": "noise_init",
    "loraplus_lr_embedding": 1e-6,
    "hyper_parallel_cp_size": 1,
    "fp8_backend": "auto",
}
# Read by a function of `llama_factory.py`, which has that subject.
READ: dict[str, str] = spread(
    ("method", "stage finetuning_type quantization_bit quantization_method lora_target lora_alpha additional_target"),
    ("method", "flash_attn"),
    ("precision", "disable_gradient_checkpointing gradient_checkpointing bf16 fp16 fsdp fsdp_config"),
    ("schedule", "packing neat_packing val_size warmup_ratio evaluation_strategy group_by_length"),
    ("data", "template enable_thinking train_on_prompt dataset dataset_dir max_samples"),
)
