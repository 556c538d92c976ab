"""FastLanguageModel: the signatures tutorials use, on top of Parley's own loading and adapters."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoTokenizer, BatchEncoding, PreTrainedModel

import parley.compat.unsloth as unsloth
from parley.compat.unsloth import FastLanguageModel, FastModel, FastQwen2Model, is_bfloat16_supported
from parley.errors import ModelError, ParleyError, UsageError

TURNS = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def loaded(tiny_llama_folder: Path) -> tuple[Any, Any]:
    return FastLanguageModel.from_pretrained(str(tiny_llama_folder), load_in_4bit=False)


def test_signatures_are_those_of_tutorials() -> None:
    loading = inspect.signature(FastLanguageModel.from_pretrained).parameters
    assert list(loading)[:4] == ["model_name", "max_seq_length", "dtype", "load_in_4bit"]
    defaults = {name: loading[name].default for name in ("max_seq_length", "dtype", "load_in_4bit", "load_in_8bit")}
    assert defaults == {"max_seq_length": 2048, "dtype": None, "load_in_4bit": True, "load_in_8bit": False}
    adapter = inspect.signature(FastLanguageModel.get_peft_model).parameters
    assert list(adapter)[:6] == ["model", "r", "target_modules", "lora_alpha", "lora_dropout", "bias"]
    assert adapter["random_state"].default == 3407
    assert adapter["use_gradient_checkpointing"].default == "unsloth"


@pytest.mark.parametrize(
    ("options", "flag"),
    [({}, "is_loaded_in_4bit"), ({"load_in_4bit": False, "load_in_8bit": True}, "is_loaded_in_8bit")],
)
def test_weights_are_quantised_as_asked(tiny_llama_folder: Path, options: dict[str, bool], flag: str) -> None:
    model, _ = FastLanguageModel.from_pretrained(str(tiny_llama_folder), **options)
    assert vars(model)[flag]


def test_without_quantisation_weights_are_the_checkpoints(loaded: tuple[Any, Any]) -> None:
    model, _ = loaded
    assert isinstance(model, PreTrainedModel)
    assert model.dtype == torch.float32
    assert not model.training


def test_full_fine_tuning_trains_every_weight(tiny_llama_folder: Path) -> None:
    model, _ = FastLanguageModel.from_pretrained(str(tiny_llama_folder), full_finetuning=True)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


def test_dtype_and_device_are_taken(tiny_llama_folder: Path) -> None:
    model, _ = FastLanguageModel.from_pretrained(
        str(tiny_llama_folder), dtype=torch.bfloat16, load_in_4bit=False, device_map={"": "cpu"}
    )
    assert (model.dtype, model.device.type) == (torch.bfloat16, "cpu")


def test_adapter_is_as_asked(loaded: tuple[Any, Any]) -> None:
    model = FastLanguageModel.get_peft_model(
        loaded[0],
        r=4,
        target_modules=["q_proj", "v_proj"],
        lora_alpha=8,
        use_gradient_checkpointing=False,
        use_rslora=True,
        loftq_config={},
        layers_to_transform=[1],
    )
    assert isinstance(model, PeftModel)
    assert model.training
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_rslora) == (4, 8, True)
    adapted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(adapted) == 4
    assert all("layers.1.self_attn" in name for name in adapted)
    assert not model.is_gradient_checkpointing
    assert FastLanguageModel.for_training(model).is_gradient_checkpointing
    assert not FastLanguageModel.for_inference(model).training


def test_the_same_random_state_gives_the_same_adapter(tiny_llama_folder: Path) -> None:
    def start(seed: int) -> torch.Tensor:
        model, _ = FastLanguageModel.from_pretrained(str(tiny_llama_folder), load_in_4bit=False)
        model = FastLanguageModel.get_peft_model(model, random_state=seed)
        return next(p for name, p in model.named_parameters() if "lora_A" in name).detach()

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


def test_options_without_meaning_are_named_in_one_line(
    tiny_llama_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    FastLanguageModel.from_pretrained(
        str(tiny_llama_folder), load_in_4bit=False, fast_inference=True, gpu_memory_utilization=0.6
    )
    said = [record.getMessage() for record in caplog.records if record.name.startswith("parley.compat")]
    assert said == ["from_pretrained: fast_inference, gpu_memory_utilization have no meaning here"]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"load_in_4bits": True}, UsageError, "unknown option 'load_in_4bits'; did you mean 'load_in_4bit'"),
        ({"rope_scaling": {"factor": 2.0}}, UsageError, "rope_scaling.*not offered here; set it in the model's config"),
        ({"load_in_fp8": True}, UsageError, "not offered here; use load_in_4bit or load_in_8bit"),
        ({"load_in_8bit": True, "load_in_16bit": True}, UsageError, "set one of them"),
        ({"dtype": "float17"}, UsageError, "model.dtype: got 'float17'"),
        ({"model_name": "./no-such-model"}, ModelError, "no-such-model"),
    ],
)
def test_loading_errors_are_one_line(
    tiny_llama_folder: Path, options: dict[str, Any], error: type[ParleyError], said: str
) -> None:
    with pytest.raises(error, match=said) as caught:
        FastLanguageModel.from_pretrained(**{"model_name": str(tiny_llama_folder), **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"lora_alfa": 16}, UsageError, "unknown option 'lora_alfa'; did you mean 'lora_alpha'"),
        ({"target_modules": ["no_proj"]}, ModelError, "no_proj matches no module"),
        ({"finetune_last_n_layers": 2}, UsageError, "list the layers in layers_to_transform"),
        ({"loftq_config": {"loftq_bits": 4}}, UsageError, "loftq makes up for NF4 rounding"),
        ({"r": 0}, UsageError, "lora.r: got 0"),
    ],
)
def test_adapter_errors_are_one_line(
    loaded: tuple[Any, Any], options: dict[str, Any], error: type[ParleyError], said: str
) -> None:
    with pytest.raises(error, match=said) as caught:
        FastLanguageModel.get_peft_model(loaded[0], **options)
    assert "\n" not in str(caught.value)


def test_a_second_adapter_is_refused(loaded: tuple[Any, Any]) -> None:
    model = FastLanguageModel.get_peft_model(loaded[0])
    with pytest.raises(UsageError, match="has an adapter already"):
        FastLanguageModel.get_peft_model(model)


def test_template_gives_ids_unless_a_dictionary_is_asked_for(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1]
    ids = tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, return_tensors="pt")
    assert isinstance(ids, torch.Tensor)
    assert isinstance(tokenizer.apply_chat_template(TURNS, return_dict=True), BatchEncoding)
    assert tokenizer.apply_chat_template(TURNS) == tokenizer.apply_chat_template(TURNS, return_dict=True)["input_ids"]


def test_tokenizer_is_saved_pickled_and_mapped_like_any_other(
    loaded: tuple[Any, Any], tiny_llama_folder: Path, tmp_path: Path
) -> None:
    tokenizer = loaded[1]
    plain = AutoTokenizer.from_pretrained(tiny_llama_folder)
    assert isinstance(tokenizer, type(plain))
    tokenizer.save_pretrained(tmp_path / "own")
    assert type(AutoTokenizer.from_pretrained(tmp_path / "own")) is type(plain)
    revived = pickle.loads(pickle.dumps(tokenizer))
    assert revived.apply_chat_template(TURNS) == tokenizer.apply_chat_template(TURNS)
    rows = Dataset.from_dict({"turns": [TURNS] * 4})
    mapped = rows.map(lambda row: {"ids": tokenizer.apply_chat_template(row["turns"])}, num_proc=2)
    assert mapped[3]["ids"] == tokenizer.apply_chat_template(TURNS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of machines without a GPU")
def test_there_is_no_bf16_without_a_gpu() -> None:
    assert is_bfloat16_supported() is False


def test_import_changes_nothing_in_the_libraries() -> None:
    """Every function of the classes that others patch is the same object after the import."""
    script = (
        "import transformers, peft\n"
        "owners = [transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase, transformers.Trainer,"
        " transformers.LlamaForCausalLM, peft.PeftModel]\n"
        "before = [dict(vars(owner)) for owner in owners]\n"
        "import parley.compat.unsloth\n"
        "assert before == [dict(vars(owner)) for owner in owners]\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("options", "adapted"),
    [
        ({}, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ({"finetune_mlp_modules": False}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ({"finetune_attention_modules": False, "target_modules": None}, {"gate_proj", "up_proj", "down_proj"}),
        ({"finetune_vision_layers": True, "finetune_mlp_modules": False, "target_modules": ["q_proj"]}, {"q_proj"}),
    ],
)
def test_layers_are_chosen_as_fastmodel_s_notebooks_do(
    tiny_llama_folder: Path, options: dict[str, Any], adapted: set[str]
) -> None:
    model, _ = FastModel.from_pretrained(str(tiny_llama_folder), load_in_4bit=False)
    model = FastModel.get_peft_model(model, r=4, **options)
    assert {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad} == adapted


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"finetune_language_layers": False}, "would train nothing of a text model"),
        ({"finetune_attention_modules": False, "finetune_mlp_modules": False}, "set one of them"),
        ({"finetune_mlp_modules": False, "target_modules": ".*q_proj"}, "choose from a list"),
    ],
)
def test_layers_that_cannot_be_chosen_are_refused(loaded: tuple[Any, Any], options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        FastModel.get_peft_model(loaded[0], **options)


def test_embeddings_among_the_targets_are_trained_whole(
    loaded: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = FastLanguageModel.get_peft_model(loaded[0], target_modules=["q_proj", "embed_tokens", "lm_head"])
    config = model.peft_config["default"]
    assert (set(config.target_modules), set(config.modules_to_save)) == ({"q_proj"}, {"embed_tokens", "lm_head"})
    assert "embed_tokens and lm_head: trained whole, as modules_to_save" in caplog.text


def test_older_and_other_options_of_loading(tiny_llama_folder: Path) -> None:
    name = str(tiny_llama_folder)
    model, _ = FastQwen2Model.from_pretrained(
        name, max_seq_length=None, torch_dtype=torch.bfloat16, load_in_4bit=False, attn_implementation="eager"
    )
    assert (model.dtype, model.config._attn_implementation) == (torch.bfloat16, "eager")
    with pytest.raises(UsageError, match="got both dtype and torch_dtype"):
        FastLanguageModel.from_pretrained(name, dtype=torch.float32, torch_dtype=torch.float32)
    with pytest.raises(UsageError, match=r"from_pretrained\(attn_implementation='no-such'\)") as caught:
        FastLanguageModel.from_pretrained(name, load_in_4bit=False, attn_implementation="no-such")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (lambda: unsloth.FastVisionModel.from_pretrained("x"), "FastVisionModel is for vision models"),
        (lambda: unsloth.UnslothVisionDataCollator(None, None), "UnslothVisionDataCollator is for vision models"),
        (lambda: unsloth.FastSentenceTransformer.from_pretrained("x"), "is for embedding models"),
    ],
)
def test_what_is_out_of_scope_says_so_by_name_once_it_is_used(use: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        use()


def test_embeddings_have_a_learning_rate_of_their_own(
    tiny_llama_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rates = []
    for targets in (["q_proj", "embed_tokens"], ["q_proj"]):
        model, tokenizer = FastLanguageModel.from_pretrained(str(tiny_llama_folder), load_in_4bit=False)
        model = FastLanguageModel.get_peft_model(model, r=4, target_modules=targets, use_gradient_checkpointing=False)
        trainer = unsloth.UnslothTrainer(
            model=model,
            tokenizer=tokenizer,
            train_dataset=Dataset.from_dict({"text": ["Ahoy matey!"] * 8}),
            args=unsloth.UnslothTrainingArguments(
                output_dir=str(tmp_path),
                learning_rate=1e-3,
                embedding_learning_rate=1e-5,
                max_steps=1,
                warmup_ratio=0.0,
                report_to="none",
                save_strategy="no",
            ),
        )
        unsloth.unsloth_train(trainer)
        rates.append([(group["initial_lr"], len(group["params"])) for group in trainer.optimizer.param_groups])
    assert rates[0] == [(1e-3, 4), (1e-5, 1)]
    # The fused step's flat parameter, and the group without weight decay that TRL's checkpoints have.
    assert rates[1] == [(1e-3, 1), (1e-3, 0)]
    assert "embedding_learning_rate: neither embeddings nor output head are trained" in caplog.text
    unsloth.PatchDPOTrainer()
    assert "nothing is patched here; import DPOTrainer and DPOConfig from parley" in caplog.text
    unsloth.PatchFastRL("GRPO", FastLanguageModel)
    assert "nothing is patched here; import GRPOTrainer and GRPOConfig from parley" in caplog.text


def test_arguments_that_trl_dropped_are_taken(tmp_path: Path) -> None:
    args = unsloth.UnslothTrainingArguments(output_dir=str(tmp_path), warmup_ratio=0.1, max_seq_length=77)
    assert (args.warmup_steps, args.max_length) == (0.1, 77)
    assert args.get_warmup_steps(200) == 20
    args = unsloth.UnslothTrainingArguments(output_dir=str(tmp_path), warmup_ratio=0.1, warmup_steps=5)
    assert args.get_warmup_steps(200) == 5


def test_targets_of_other_families_are_left_out_with_a_line(
    loaded: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = FastModel.get_peft_model(loaded[0], target_modules=["q_proj", "shared_mlp.input_linear"])
    assert list(model.peft_config["default"].target_modules) == ["q_proj"]
    assert "LlamaForCausalLM has no shared_mlp.input_linear" in caplog.text
