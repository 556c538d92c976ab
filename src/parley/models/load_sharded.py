"""Load a model of several ranks, each of which reads its own rows of the safetensors files (see sharding.py)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from parley.config import ModelSection
from parley.errors import ModelError, one_line
from parley.models.config_fields import check_index
from parley.models.device import pick_device, pick_dtype
from parley.models.load import read_config, set_name, set_padding
from parley.models.quantization import quantization_of
from parley.models.resolve import adapter_chain, model_folder
from parley.models.sharding import empty_model, fill, shard
from parley.models.tokenizer import fit_vocabulary, read_tokenizer

SHARDED = ("none", "nf4")
UNSHARDED = "set training.shard: none"


def load_sharded(section: ModelSection) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As `load_model`, with the weights cut over the ranks of the process group; in evaluation mode.

    NF4 is quantised while loading, each rank its own blocks, to the bytes and scales that one process would have.
    Raises ModelError for what cannot be loaded so: an adapter, a checkpoint that was saved quantised, tensors whose
    names are not the model's.
    """
    adapters, base = adapter_chain(section)
    if adapters:
        raise ModelError(f"{section.name} is an adapter, which is not loaded onto a sharded model; {UNSHARDED}")
    device = pick_device(section.device)
    dtype = pick_dtype(section.dtype, device)
    folder = model_folder(base, weights=False)
    config = read_config(folder, base)
    tokenizer = read_tokenizer(folder, base)
    quantization = _quantization(config, base)
    source = SafetensorsSource(model_folder(base), base.name)
    model = empty_model(
        config,
        dtype,
        nf4=quantization == "nf4",
        double=base.double_quantization,
        trust_remote_code=base.trust_remote_code,
    )
    source.check(model)
    if quantization == "nf4":  # as transformers records it
        model.config.quantization_config = {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": base.double_quantization,
        }  # fmt: skip
    shard(model, device)
    set_name(model, base, source.folder)
    fill(model, source, device)
    tokenizer = fit_vocabulary(tokenizer, model.get_input_embeddings().num_embeddings, base)
    set_padding(model, tokenizer)
    return model.eval(), tokenizer


def _quantization(config: PreTrainedConfig, section: ModelSection) -> str:
    saved = quantization_of(config)
    if saved != "none":
        raise ModelError(
            f"{section.name} was saved as {saved}, and sharding quantises 16-bit weights while loading; give the "
            f"16-bit checkpoint with model.quantization: nf4, or {UNSHARDED}"
        )
    wanted = "none" if section.quantization == "auto" else section.quantization
    if wanted not in SHARDED:
        raise ModelError(f"model.quantization: {wanted} is not sharded; there are {', '.join(SHARDED)}, or {UNSHARDED}")
    return wanted


class SafetensorsSource:
    """Rows of the tensors in a folder of safetensors files, by the names of the model's parameters."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.prefix = ""
        check_index(folder)
        index = folder / "model.safetensors.index.json"
        files = [folder / "model.safetensors"]
        if index.is_file():
            files = [folder / file for file in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ModelError(f"{name}: {folder} has no {missing[0]}; sharding reads *.safetensors files")
        try:
            self.files = [safe_open(file, framework="pt") for file in files]
            self.file_of = {key: file for file in self.files for key in file.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{name}: weights in {folder} are damaged ({one_line(error)}); download them again"
            ) from None

    def check(self, model: PreTrainedModel) -> None:
        """Raises ModelError for the first parameter that is missing, or has another shape than config.json says.

        A file of the model without its head has names without the model's own prefix.
        """
        shapes = {
            path.replace(".packed", ".weight"): parameter
            for path, parameter in model.named_parameters()
            if not path.endswith(".absmax")
        }
        prefix = f"{model.base_model_prefix}."
        if not any(path in self.file_of for path in shapes):
            self.prefix = prefix
        for path in shapes:
            if self._key(path) not in self.file_of:
                raise ModelError(
                    f"{self.name}: the checkpoint has no tensor {self._key(path)}, which sharded loading reads by that "
                    f"name; {UNSHARDED}"
                )
            module = model.get_submodule(path.rpartition(".")[0])
            found = list(self.file_of[self._key(path)].get_slice(self._key(path)).get_shape())
            is_linear = path.endswith(".weight") and isinstance(module, torch.nn.Linear)
            wanted = [module.out_features, module.in_features] if is_linear else list(shapes[path].shape)
            if found != wanted:
                raise ModelError(
                    f"{self.name}: {self._key(path)} has shape {found} and config.json describes {wanted}; fetch "
                    "weights and config.json of the same model"
                )

    def rows(self, name: str, rows: slice) -> Tensor:
        key = self._key(name)
        return self.file_of[key].get_slice(key)[rows]

    def _key(self, name: str) -> str:
        return name.removeprefix(self.prefix)
