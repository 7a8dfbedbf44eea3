"""Names that other projects use for the keys of a recipe, and what to write instead.

The names come from Hugging Face transformers (config.json and TrainingArguments), Megatron-LM, GPT-NeoX and nanoGPT.
"""

from __future__ import annotations

from collections.abc import Mapping


def _table(entries: Mapping[str, str]) -> Mapping[str, str]:
    return {_plain(other): ours for ours, others in entries.items() for other in others.split()}


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


_RECIPE_KEYS = _table(
    {
        "model.preset": "model_name model_type model_name_or_path",
        "model.n_layer": "num_hidden_layers num_layers n_layers layers depth",
        "model.n_head": "num_attention_heads num_heads n_heads heads",
        "model.n_kv_head": "num_key_value_heads num_query_groups num_kv_heads n_kv_heads",
        "model.d_model": "hidden_size n_embd embed_dim embedding_dim model_dim dim",
        "model.activation": "hidden_act activation_function swiglu squared_relu",
        "model.d_ff": "intermediate_size ffn_hidden_size n_inner ffn_dim mlp_dim",
        "model.vocab_size": "padded_vocab_size n_vocab vocabulary_size",
        "model.seq_len": "max_position_embeddings seq_length block_size n_positions n_ctx context_length max_seq_len "
        "max_seq_length sequence_length",
        "model.position": "position_embedding_type pos_emb position_embedding",
        "model.rope_theta": "rotary_base rotary_emb_base",
        "model.norm": "normalization norm_type",
        "model.qk_norm": "qk_layernorm",
        "model.tie_embeddings": "tie_word_embeddings weight_tying",
        "model.dropout": "hidden_dropout attention_dropout resid_pdrop attn_pdrop embd_pdrop hidden_dropout_prob",
        "model.logit_softcap": "final_logit_softcapping",
        "model.init": "init_method",
        "data.tokenizer": "tokenizer_model tokenizer_name tokenizer_path tokenizer_name_or_path vocab_file",
        "data.train": "data_path train_data_path train_data_paths train_file dataset",
        "data.validation": "valid_data_path valid_data_paths validation_file val_data eval_data",
        "data.document_mask": "reset_attention_mask reset_position_ids",
        "data.eod": "eos_token_id eod_token",
        "batch.global_size": "global_batch_size train_batch_size batch_size",
        "optimizer.type": "optim optimizer_type",
        "optimizer.lr": "learning_rate max_lr peak_lr",
        "optimizer.betas": "adam_beta1 adam_beta2 beta1 beta2",
        "optimizer.eps": "adam_eps adam_epsilon epsilon",
        "optimizer.clip": "clip_grad grad_clip gradient_clipping max_grad_norm",
        "optimizer.muon_momentum": "momentum",
        "schedule.type": "lr_scheduler_type lr_decay_style",
        "schedule.warmup_updates": "warmup_iters warmup_steps lr_warmup_iters warmup warmup_ratio lr_warmup_fraction",
        "schedule.min_lr": "min_learning_rate",
        "schedule.decay_updates": "lr_wsd_decay_iters decay_steps",
        "length.updates": "train_iters max_iters max_steps num_steps total_steps train_steps iterations steps",
        "length.tokens": "train_tokens max_tokens",
        "length.epochs": "num_train_epochs num_epochs",
        "evaluation.every": "eval_interval eval_steps",
        "evaluation.samples": "eval_iters",
        "checkpoint.every": "save_interval save_steps checkpoint_interval checkpoint_factor",
        "checkpoint.keep_last": "save_total_limit keep_last_n_checkpoints",
        "log.every": "log_interval logging_steps",
        "run_dir": "output_dir out_dir save_dir save",
        "init_from": "pretrained_checkpoint load",
        "precision": "dtype torch_dtype params_dtype bf16 fp16",
        "seed": "random_seed",
    }
)
_DEEPSPEED_KEYS = _table(
    {
        "train_micro_batch_size_per_gpu": "micro_batch_size per_device_train_batch_size train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps": "gradient_accumulation_steps grad_accum",
        "zero_optimization.stage": "zero_stage zero_optimization",
        "tensor_parallel.autotp_size": "tensor_model_parallel_size model_parallel_size tensor_parallel",
        "pipeline.stages": "pipeline_model_parallel_size pipe_parallel_size pipeline",
        "sequence_parallel_size": "context_parallel_size sequence_parallel_size",
        "activation_checkpointing.number_checkpoints": "gradient_checkpointing recompute_granularity "
        "checkpoint_num_layers checkpoint_activations activation_checkpointing",
    }
)
_OPPOSITE = _table({"model.tie_embeddings": "untie_embeddings_and_output_weights no_weight_tying"})
_PRESETS = {
    _plain(name): preset
    for preset, names in {
        "gpt2-124m": ("gpt2-small", "gpt2-117m"),
        "gpt2-355m": ("gpt2-medium", "gpt2-345m"),
        "gpt2-774m": ("gpt2-large",),
        "gpt2-1.5b": ("gpt2-xl", "gpt2-1558m", "gpt2-1542m"),
        "llama-1b": ("tinyllama", "tinyllama-1.1b"),
        "llama-7b": ("llama2-7b", "llama-2-7b-hf"),
        "llama-70b": ("llama2-70b", "llama-2-70b-hf"),
    }.items()
    for name in names
}


def key_of_synonym(name: str) -> str | None:
    """Return the dotted key of a recipe that another project calls `name`, or None."""
    return _RECIPE_KEYS.get(_plain(name)) or _OPPOSITE.get(_plain(name))


def remedy_for_synonym(name: str) -> str | None:
    """Return what to write instead of a key of another project, or None if the name is not known."""
    if ours := _RECIPE_KEYS.get(_plain(name)):
        return f"write {ours}"
    if ours := _OPPOSITE.get(_plain(name)):
        return f"write {ours}, which means the opposite"
    if ours := _DEEPSPEED_KEYS.get(_plain(name)):
        return f"set {ours} in the DeepSpeed config, or ds.{ours}=VALUE on the command line"
    return None


def preset_of_synonym(name: str) -> str | None:
    """Return the preset of the model that is published as `name`, or None."""
    return _PRESETS.get(_plain(name.rpartition("/")[2]))
