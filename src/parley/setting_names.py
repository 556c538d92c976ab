"""Settings as axolotl, LLaMA-Factory, TRL's scripts and Unsloth's notebooks name them, and what they are here."""

from __future__ import annotations

from collections.abc import Iterable

_HERE = {
    "model.name": "base_model model_name_or_path model_name model_id pretrained_model_name_or_path",
    "model.quantization: nf4": "load_in_4bit quantization_bit quantization_method",
    "model.quantization: int8": "load_in_8bit",
    "model.max_seq_length": "sequence_len cutoff_len max_length model_max_length",
    "model.dtype": "torch_dtype bf16 fp16",
    "model.chat_template": "template",
    "model.trust_remote_code": "trust_remote_code",
    "data.source": "datasets dataset dataset_name dataset_path train_file data_path train_data dataset_dir",
    "data.heldout (5%)": "val_set_size val_size test_size",
    "data.limit": "max_samples",
    "data.columns": "field_messages message_property_mappings",
    "data.train_on": "train_on_inputs train_on_prompt roles_to_train mask_history",
    "output": "output_dir save_path",
    "lora": "adapter finetuning_type use_peft peft peft_config",
    "lora.r": "lora_r lora_rank rank",
    "lora.lora_alpha": "lora_alpha alpha",
    "lora.lora_dropout": "lora_dropout dropout",
    "lora.target_modules": "lora_target lora_target_modules lora_target_linear",
    "training.method": "stage rl",
    "training.per_device_train_batch_size": "micro_batch_size batch_size train_batch_size",
    "training.gradient_accumulation_steps": "gradient_accumulation_steps grad_accum",
    "training.num_train_epochs": "num_epochs epochs num_train_epochs n_epochs",
    "training.max_steps": "max_steps steps iters",
    "training.learning_rate": "learning_rate lr",
    "training.lr_scheduler_type": "lr_scheduler lr_scheduler_type scheduler",
    "training.optim": "optimizer optim",
    "training.warmup_steps": "warmup_steps warmup",
    "training.weight_decay": "weight_decay",
    "training.seed": "seed",
    "training.gradient_checkpointing": "gradient_checkpointing",
    "training.packing": "sample_packing packing",
}
_SETTING_OF = {name: setting for setting, names in _HERE.items() for name in names.split()}
_MOST = 8  # in one message


def setting_named(name: str, section: str = "") -> str | None:
    """Parley's setting for another program's `name`; of those of `section` where one is named. None for unknown."""
    setting = _SETTING_OF.get(name)
    return setting if setting is not None and setting.startswith(section) else None


def translation(names: Iterable[str]) -> str | None:
    """Two or more keys of another program's file, each with Parley's setting; None for fewer."""
    known = [f"{name} is {_SETTING_OF[name]}" for name in names if name in _SETTING_OF]
    if len(known) < 2:
        return None
    more = f" and {len(known) - _MOST} more" if len(known) > _MOST else ""
    return "; ".join(known[:_MOST]) + more
