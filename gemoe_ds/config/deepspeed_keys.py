"""What becomes of every key of a DeepSpeed file: one table of DeepSpeed 0.19.8's own keys.

    honoured   DeepSpeed gets the value as it stands
    recipe     the recipe sets it: "auto", or the same value (gemoe_ds/config/deepspeed.py)
    ignored    has no effect here; a line says so and why
    refused    ends the run with the way out

A value that asks for nothing (false, null, "auto", {}, `enabled: false`, or what stands behind `=`)
is neither refused nor mentioned. The keys of a section that is ignored or refused as a whole share
its fate. tests/config/test_deepspeed_keys.py compares all of it with the installed DeepSpeed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Fate = Literal["honoured", "recipe", "ignored", "refused"]


@dataclass(frozen=True)
class Key:
    """`kind`: flag, count (0 or more), size (1 or more), even (2 or more), whole, number, share
    (0 to 1), text, list, section, any, or a choice `a|b`; with `?` it may be null.

    `off`: values that ask for nothing.
    """

    kind: str
    fate: Fate
    why: str = ""
    off: tuple[str, ...] = ()
    of_deepspeed: bool = True  # False: people write it, and DeepSpeed does not read it


KEYS: dict[str, Key] = {}  # by dotted path
RENAMED = {  # further names of the same key: DeepSpeed's internal and its former ones
    "bfloat16": "bf16",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": (
        "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    ),
    "tensor_parallel.tensor_parallel": "tensor_parallel.tp",
    "tensor_parallel.replace_with_kernel_inject": "tensor_parallel.kernel_inject",
}


def _add(section: str, fate: Fate, words: str, why: str = "", *, of_deepspeed: bool = True) -> None:
    """Each word is `name:kind`, or `name:kind=off,off`."""
    for word in words.split():
        left, _, off = word.partition("=")
        name, _, kind = left.partition(":")
        path = f"{section}.{name}" if section else name
        values = tuple(off.split(",")) if off else ()
        KEYS[path] = Key(kind or "any", fate, why, values, of_deepspeed)


def _section(name: str, fate: Fate, words: str, why: str = "") -> None:
    """A section whose keys share one fate."""
    _add("", fate, f"{name}:section", why)
    _add(name, fate, words, why)


_add(
    "",
    "recipe",
    """train_batch_size:size train_micro_batch_size_per_gpu:size gradient_accumulation_steps:size
    gradient_clipping:number optimizer:section scheduler:section bf16:section fp16:section
    zero_optimization:section""",
)
# their params: gemoe_ds/config/deepspeed_sections.py
_add("optimizer", "recipe", "type:text params:any")
_add("optimizer", "ignored", "legacy_fusion:flag", "it is for Lamb")
_add("scheduler", "recipe", "type:text params:any")

# Precision: model.dtype is that of activations and frozen weights; what trains is float32.
_add("bf16", "recipe", "enabled:flag")
_add(
    "bf16",
    "refused",
    "bf16_master_weights_and_grads:flag bf16_optimizer_states:flag",
    "what trains is float32 under every dtype; remove it",
)
_add("bf16", "ignored", "immediate_grad_update:flag", "what trains is float32")
_add(
    "bf16",
    "ignored",
    "check_grad_overflow:flag=true",
    "every step is checked, and skipped if its gradient is not finite (train.max_skipped_steps)",
)
_add("fp16", "recipe", "enabled:flag")
_add(
    "fp16",
    "recipe",
    """auto_cast loss_scale initial_scale_power loss_scale_window hysteresis
    consecutive_hysteresis min_loss_scale fp16_master_weights_and_grads""",
)
_section(
    "torch_autocast",
    "refused",
    "enabled dtype lower_precision_safe_modules",
    "model.dtype of the recipe sets the precision; remove the section",
)
_section(
    "data_types",
    "refused",
    "grad_accum_dtype:text=fp32,float32 param_dtype buffer_dtype keep_in_fp32_modules=auto,[]",
    "gradients are float32, and model.dtype of the recipe is that of the rest; remove it",
)
_add(
    "",
    "refused",
    "communication_data_type:text=fp32",
    "gradients are reduced in float32, so that any number of ranks takes the same step; remove it",
)
_add(
    "",
    "refused",
    "gradient_allreduce_op:text=mean prescale_gradients:flag gradient_predivide_factor:number=1",
    "losses count on the mean over all ranks, taken in float32; remove it",
)

# ZeRO
_add(
    "zero_optimization",
    "honoured",
    """stage:0|1|2|3 contiguous_gradients:flag reduce_scatter:flag allgather_partitions:flag
    use_multi_rank_bucket_allreduce:flag overlap_comm:flag? parameter_alignment:flag
    log_trace_cache_warnings:flag
    enable_sanity_checks:flag memory_efficient_linear:flag override_module_apply:flag
    reduce_bucket_size:size allgather_bucket_size:even sub_group_size:count
    offload_optimizer:section? offload_param:section? cpu_offload:flag? cpu_offload_param:flag?""",
)
_STAGE_3 = """prefetch_bucket_size:count param_persistence_threshold:count
    model_persistence_threshold:count max_live_parameters:count max_reuse_distance:count
    use_all_reduce_for_fetch_params:flag allgather_sequential:flag"""
_add("zero_optimization", "honoured", " ".join(f"stage3_{w}" for w in _STAGE_3.split()))
_add(
    "zero_optimization",
    "refused",
    "leaf_module:section stage3_module_granularity_threshold:whole=0",
    "ZeRO 3 gathers the parameters of routers and of experts one module at a time; remove it",
)
_add("zero_optimization.leaf_module", "refused", "classes names name_suffixes", "see leaf_module")
_add(
    "zero_optimization",
    "refused",
    "ignore_unused_parameters:flag=true",
    "an expert that no token takes has no gradient, and that is no error; remove it",
)
_OFFLOAD = "device:none|cpu|nvme nvme_path:text? pin_memory:flag buffer_count:count "
_add("zero_optimization.offload_param", "honoured", _OFFLOAD + "buffer_size:count max_in_cpu:count")
_add(
    "zero_optimization.offload_optimizer",
    "honoured",
    _OFFLOAD + "pipeline_read:flag pipeline_write:flag fast_init:flag cpuadam_cores_perc:share",
)
_ADAM = "needs DeepSpeed's own Adam for CPUs, and torch's AdamW is what steps here; remove it"
_add("zero_optimization.offload_optimizer", "refused", "ratio:share=1 super_offload:flag", _ADAM)
_add("zero_optimization", "refused", "zenflow:section?", _ADAM)
_add(
    "zero_optimization.zenflow",
    "refused",
    """topk_ratio select_strategy select_interval update_interval overlap_step offload auto_ratio
    full_warm_up_rounds pt_reserved_cores_perc steps_per_epoch""",
    "see zenflow",
)
_add(
    "zero_optimization",
    "refused",
    """zero_hpz_partition_size:count=0,1 zero_quantized_weights:flag
    zero_quantized_nontrainable_weights:flag zero_quantized_gradients:flag""",
    "ZeRO++ is not proven here: checkpoints and equal gradients count on ordinary partitions; "
    "remove it",
)
_add(
    "zero_optimization",
    "refused",
    "compute_grad_norm:flag=true",
    "the norm decides whether a step is taken; remove it",
)
_add(
    "zero_optimization",
    "refused",
    "legacy_stage1:flag mics_shard_size:whole=-1,0,1 mics_hierarchical_params_gather:flag "
    "zeropp_loco_param",
    "DeepSpeed has removed it; remove it here too",
)
_add(
    "zero_optimization",
    "ignored",
    """load_from_fp32_weights:flag=true elastic_checkpoint:flag pipeline_loading_checkpoint:flag
    stage3_gather_16bit_weights_on_model_save:flag""",
    "checkpoints are gemoe_ds's own: whole, and read by any number of ranks",
)
_add(
    "zero_optimization",
    "ignored",
    "round_robin_gradients:flag",
    "it reorders the partitions that checkpoints are read from, to copy faster to the CPU",
)
_add("zero_optimization", "ignored", "save_muon_momentum_buffer_in_memory:flag", "AdamW steps here")
_add(
    "zero_optimization",
    "ignored",
    "cpu_offload_use_pin_memory:flag?",
    "DeepSpeed reads offload_optimizer.pin_memory and offload_param.pin_memory instead",
)
_add(
    "",
    "ignored",
    "allgather_size:count",
    "DeepSpeed's former name of zero_optimization.allgather_bucket_size",
)
_add("", "honoured", "zero_allow_untested_optimizer:flag")
_add(
    "",
    "ignored",
    "zero_force_ds_cpu_optimizer:flag",
    "torch's AdamW steps on the CPU where the optimizer is offloaded",
)

# What is logged
_add(
    "",
    "honoured",
    """steps_per_print:size? wall_clock_breakdown:flag memory_breakdown:flag dump_state:flag
    disable_python_gc:flag vocabulary_size:count? log_level:debug|info|warning|error|critical?""",
)
_section(
    "comms_logger", "honoured", "enabled:flag prof_all:flag prof_ops:list verbose:flag debug:flag"
)
_section("tensorboard", "honoured", "enabled:flag output_path:text job_name:text")
_section("csv_monitor", "honoured", "enabled:flag output_path:text job_name:text")
_section("wandb", "honoured", "enabled:flag group:text? team:text? project:text")
_section(
    "comet",
    "honoured",
    """enabled:flag samples_log_interval:size project:text? workspace:text? api_key:text?
    experiment_name:text? experiment_key:text? online:flag? mode:text?""",
)
_section(
    "flops_profiler",
    "honoured",
    """enabled:flag recompute_fwd_factor:number profile_step:size module_depth:whole
    top_modules:size detailed:flag output_file:text?""",
)
_add("", "honoured", "timers:section")
_section("timers.throughput", "honoured", "enabled:flag synchronized:flag")

# What the recipe has in another place
_section(
    "activation_checkpointing",
    "ignored",
    """partition_activations number_checkpoints contiguous_memory_optimization
    synchronize_checkpoint_boundary profile cpu_checkpointing""",
    "only models that call deepspeed.checkpointing follow it; "
    "model.activation_checkpointing=true of the recipe recomputes activations",
)
_section(
    "expert_parallel",
    "refused",
    """enabled autoep_size expert_tensor_parallel_size validate_folding_routing async_split_plan
    preset_model moe_layer_pattern expert_pattern router_pattern use_grouped_mm
    disable_triton_grouped_mm route_norm route_scale score_apply combine_impl row_weighting_impl
    gate_up_impl comm_backend comm_num_sm comm_qp_margin comm_max_tokens_per_rank num_expert_groups
    num_limited_groups score_func top_k load_balance_coeff routed_scaling_factor expert_w1 expert_w2
    expert_w3 num_experts_attr top_k_attr has_shared_experts shared_experts_pattern
    shared_experts_gate_pattern expert_activation""",
    "gemoe_ds converts the experts itself; remove the section and set parallel.ep_size in the "
    "recipe",
)
_section(
    "tensor_parallel",
    "refused",
    """autotp_size=0,1 dtype tp_overlap_comm vocab_parallel_lm_head vocab_parallel_ce_backend tp
    injection_policy_tuple partition_config preset_model keep_module_on_host kernel_inject""",
    "no tensor is split over ranks here; remove the section, and set parallel.ep_size in the "
    "recipe, which shards the experts",
)
_section(
    "pipeline",
    "refused",
    """stages=auto,1 partition seed_layers activation_checkpoint_interval pipe_partitioned
    grad_partitioned""",
    "there is no pipeline parallelism here; remove the section, and set parallel.ep_size in the "
    "recipe, which shards the experts",
)
_add(
    "",
    "refused",
    "sequence_parallel_size:size=1 data_parallel_size:size",
    "every rank reads samples of its own; remove it, and lower train.micro_batch_size or "
    "data.max_length for memory",
)
_add(
    "",
    "ignored",
    "seq_parallel_communication_data_type:text=fp32",
    "there is no sequence parallelism here",
)
_add(
    "",
    "refused",
    "use_data_before_expert_parallelism:flag",
    "gemoe_ds forms the groups of experts itself (parallel.ep_size); remove it",
)
_add(
    "",
    "refused",
    "managed_gradient_accumulation:flag=true",
    "DeepSpeed counts the micro-batches (train.gradient_accumulation_steps of the recipe); "
    "remove it",
)
_add("", "ignored", "dataloader_drop_last:flag", "samples have a loader of their own")
_section(
    "checkpoint",
    "ignored",
    """tag_validation load_universal use_node_local_storage parallel_write checkpoint_serialization
    writer""",
    "checkpoints are gemoe_ds's own, which any number of ranks can read (checkpoint.every and "
    "checkpoint.keep of the recipe)",
)
_add(
    "", "ignored", "datastates_ckpt:any", "checkpoints are gemoe_ds's own, written beside training"
)
_section(
    "aio",
    "ignored",
    "block_size queue_depth intra_op_parallelism single_submit overlap_events use_gds",
    "nothing is offloaded to NVMe",
)
_add("", "ignored", "disable_allgather:flag", "DeepSpeed reads it and does nothing with it")

# What there is nothing like here
_section(
    "compile",
    "ignored",
    """deepcompile autoep_non_moe free_activation free_activation_threshold=10485760
    offload_activation offload_activation_pin_memory=true offload_opt_states double_buffer=true
    symmetric_memory debug_log offload_parameters sync_before_reduce sync_after_reduce
    sync_before_allgather sync_after_allgather keep_int_input_tensors=true keep_all_input_tensors
    passes""",
    "the model runs uncompiled",
)
_section(
    "autotuning",
    "refused",
    """enabled fast results_dir exps_dir overwrite start_profile_step end_profile_step metric
    metric_path tuner_type tuner_early_stopping tuner_num_trials arg_mappings model_info
    model_info_path mp_size max_train_batch_size min_train_batch_size
    max_train_micro_batch_size_per_gpu min_train_micro_batch_size_per_gpu
    num_tuning_micro_batch_sizes""",
    "remove the section; gemoe train RECIPE --estimate RANKS says what fits",
)
_section(
    "hybrid_engine",
    "refused",
    """enabled max_out_tokens inference_tp_size release_inference_cache pin_parameters
    tp_gather_partition_size enable_cuda_graph""",
    "it is for RLHF, which is not done here; remove the section",
)
_section(
    "data_efficiency",
    "refused",
    "enabled seed data_sampling data_routing",
    "samples are drawn by gemoe_ds, uniformly; remove the section",
)
_section(
    "weight_quantization",
    "refused",
    "enabled num_bits q_type q_groups quantized_initialization post_init_quant",
    "weights are kept in model.dtype; remove the section",
)
for _name, _way_out in {
    "amp": "model.dtype of the recipe sets the precision",
    "nebula": "checkpoints are written beside training anyway",
    "compression_training": "the model is trained unquantized and unpruned",
    "quantize_training": "the model is trained unquantized",
    "sparse_gradients": "gradients of embeddings are dense",
    "sparse_attention": "attention is the backbone's own",
    "eigenvalue": "it belonged to quantize_training",
    "elasticity": "train.global_batch_size of the recipe holds for any number of ranks, and "
    "resume=auto goes on with another one",
    "graph_harvesting": "steps are launched one by one",
    "curriculum_learning": "samples are drawn uniformly",
    "progressive_layer_drop": "every layer is used in every step",
}.items():
    _add("", "refused", _name, f"DeepSpeed has removed it; remove it here too: {_way_out}")

# Written in files that many people have, and not read by this DeepSpeed
_add("compile", "ignored", "disable backend kwargs enabled", "see compile", of_deepspeed=False)
_add(
    "",
    "ignored",
    "comms_config:any monitor_config:any",
    "DeepSpeed does not read it; it knows comms_logger, tensorboard, csv_monitor, wandb and comet",
    of_deepspeed=False,
)
for _name in [path for path in KEYS if path.startswith("zero_optimization.stage3_")]:
    RENAMED[_name.replace("stage3_", "")] = _name
