"""A LoRA adapter folded into its base in float32, one module at a time.

PEFT does the arithmetic: its modules are built around base weights of no memory, and each is given the base's tensor
and merged when it is asked for. This covers rsLoRA, DoRA, rank and alpha patterns, modules_to_save and trainable tokens
without a second implementation of any.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from parley.errors import ModelError
from parley.exporting.weights import CheckpointWeights
from parley.models.adapter_files import WEIGHTS_FILE, read_adapter_fields
from parley.models.adapters import load_adapter
from parley.models.base_answers import BASE_CHANGING_INITS

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class BaseWeights:
    """A checkpoint by the names of the model's state dict: a head tied to the embedding is found under its own name."""

    def __init__(self, checkpoint: CheckpointWeights, config: PreTrainedConfig) -> None:
        self.checkpoint, self.tied = checkpoint, bool(config.tie_word_embeddings)
        # Read from a model on no device: a state dict has the same names and shapes everywhere.
        with torch.device("meta"):
            state = AutoModelForCausalLM.from_config(config).state_dict()
        self._shapes = {name: tuple(value.shape) for name, value in state.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of the model's state dict with their shapes, in its order."""
        return self._shapes

    def get(self, name: str) -> Tensor:
        if name == HEAD and self.tied:
            name = EMBEDDING
        return self.checkpoint.get(name)


class MergedWeights:
    """`base` with the adapter in `folder` added; tensors that the adapter changes are float32, others as they were.

    `tied` says whether head and embedding are still one tensor: an adapter may change one of them alone.

    Raises ModelError for an adapter that does not fit, or that changes more than single modules.
    """

    def __init__(self, base: BaseWeights | MergedWeights, config: PreTrainedConfig, folder: Path) -> None:
        fields = read_adapter_fields(folder)
        for field in ("layer_replication", "target_parameters"):
            if fields.model_dump().get(field):
                raise ModelError(f"{folder}: {field} cannot be merged tensor by tensor; export it with --to adapter")
        if str(fields.init_lora_weights).lower().startswith(BASE_CHANGING_INITS):
            raise ModelError(
                f"{folder}: init_lora_weights {fields.init_lora_weights} moved a part of the base into the adapter, "
                "which its file does not hold; save it again as a plain adapter"
            )
        self.base: BaseWeights | MergedWeights = base
        copied = _copies_of_base(folder, fields.modules_to_save or [], base.shapes())
        self._adapted = load_adapter(model_skeleton(config, {name: base.get(name) for name in copied}), folder)
        self._model = self._adapted.get_base_model()
        self.tied: bool = base.tied and not self.changes(HEAD) and not self.changes(EMBEDDING)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.base.shapes()

    def changes(self, name: str) -> bool:
        """Whether the adapter changes the tensor `name`."""
        path, _, attribute = name.rpartition(".")
        module = self._model.get_submodule(path)
        if isinstance(module, BaseTunerLayer):
            return attribute == "weight" or self._bias_trained(module)
        if isinstance(module, TrainableTokensWrapper):
            return True
        # modules_to_save may name a module above the one that holds the tensor.
        return _saved_parent(self._model, path) is not None or self._bias_of(module, attribute)

    def factors(self, name: str, *, dora: bool = False) -> tuple[Tensor, Tensor, float] | None:
        """A (R, K), B (N, R) and the scale of B A for the weight `name`; None where it is not adapted.

        Raises ModelError where the adapter changes it by more than that; `dora` lets DoRA's magnitudes through.
        """
        if not self.changes(name):
            return None
        path, _, attribute = name.rpartition(".")
        module = self._model.get_submodule(path)
        adapter = self._adapted.active_adapter
        plain = isinstance(module, LoraLinear) and attribute == "weight" and (dora or not module.use_dora[adapter])
        if not plain or self._bias_trained(module):
            raise ModelError(f"{name} is changed by more than LoRA matrices; merge it with --to gguf")
        a, b = module.lora_A[adapter].weight.detach(), module.lora_B[adapter].weight.detach()
        return a, b, module.scaling[adapter]

    def dora_magnitude(self, name: str) -> Tensor:
        """DoRA's magnitudes (N,) of the adapted weight `name`."""
        module = self._model.get_submodule(name.rpartition(".")[0])
        assert isinstance(module, LoraLinear)
        return module.lora_magnitude_vector[self._adapted.active_adapter].weight.detach()

    @torch.no_grad()
    def get(self, name: str) -> Tensor:
        path, _, attribute = name.rpartition(".")
        if not self.changes(name):
            return self.base.get(name)
        saved = _saved_parent(self._model, path)
        if saved is not None:
            wrapper, inner = saved
            copy = wrapper.modules_to_save[self._adapted.active_adapter]
            return copy.get_submodule(inner).get_parameter(attribute).detach()
        module = self._model.get_submodule(path)
        if isinstance(module, TrainableTokensWrapper):
            module = module.token_adapter
        if not isinstance(module, BaseTunerLayer):
            return module.get_parameter(attribute).detach()
        return self._merged(module, name, attribute)

    def _merged(self, module: BaseTunerLayer, name: str, attribute: str) -> Tensor:
        plain = self._plain_factors(module, attribute)
        if plain is not None:
            a_RK, b_NR, scale = plain
            weight_NK = self.base.get(name).to(torch.float32, copy=True)
            return weight_NK.addmm_(b_NR.float(), a_RK.float(), alpha=scale)
        layer = module.get_base_layer()
        empty = layer.get_parameter(attribute)
        # Trained biases of the base were loaded with the adapter; all other tensors are the base's.
        if attribute == "weight" or not self._config_bias():
            setattr(layer, attribute, nn.Parameter(self.base.get(name).float(), requires_grad=False))
        try:
            module.merge(safe_merge=True)
            return layer.get_parameter(attribute).detach()
        except ValueError as error:
            raise ModelError(f"{name}: the adapter cannot be merged ({error}); train again") from None
        finally:
            module.merged_adapters.clear()
            setattr(layer, attribute, empty)

    def _plain_factors(self, module: BaseTunerLayer, attribute: str) -> tuple[Tensor, Tensor, float] | None:
        """A, B and their scale where the adapter adds B A to a matrix and nothing else.

        PEFT's merge makes three more copies of a matrix, which takes twice the time of the rest.
        """
        if not isinstance(module, LoraLinear) or attribute != "weight" or self._bias_trained(module):
            return None
        adapter = self._adapted.active_adapter
        if module.fan_in_fan_out or module.lora_variant:
            return None
        return module.lora_A[adapter].weight, module.lora_B[adapter].weight, module.scaling[adapter]

    def _config_bias(self) -> bool:
        return self._adapted.active_peft_config.bias != "none"

    def _bias_trained(self, module: BaseTunerLayer) -> bool:
        return self._config_bias() or bool(self._adapted.active_peft_config.lora_bias)

    def _bias_of(self, module: nn.Module, attribute: str) -> bool:
        return attribute == "bias" and self._adapted.active_peft_config.bias == "all"


def _saved_parent(model: nn.Module, path: str) -> tuple[ModulesToSaveWrapper, str] | None:
    """The wrapper of modules_to_save that holds the module at `path`, and the rest of the path inside it."""
    parts = path.split(".")
    for depth in range(1, len(parts) + 1):
        try:
            module = model.get_submodule(".".join(parts[:depth]))
        except AttributeError:
            return None
        if isinstance(module, ModulesToSaveWrapper):
            return module, ".".join(parts[depth:])
    return None


def _copies_of_base(folder: Path, saved: list[str], shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Names of the base's tensors that an adapter's file holds as well: PEFT saves an embedding that it adapts.

    They have to equal the base's own, which load_adapter checks.
    """
    try:
        with safe_open(folder / WEIGHTS_FILE, "pt") as file:
            keys = list(file.keys())
    except (SafetensorError, OSError):
        return []  # load_adapter says what is wrong with it
    stored = [key.removeprefix("base_model.model.") for key in keys if ".lora_" not in key]
    names = [name.replace(".base_layer.", ".") for name in stored]
    return [name for name in names if name in shapes and not any(part in saved for part in name.split("."))]


def model_skeleton(config: PreTrainedConfig, filled: dict[str, Tensor]) -> PreTrainedModel:
    """A model of `config` whose matrices have shape and type but no memory, for PEFT to attach to.

    Each is one number, expanded, but for those `filled`; vectors are real, as trained biases are copied into them.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            shape = parameter.shape
            empty = torch.zeros(1).expand(shape) if len(shape) > 1 else torch.zeros(shape)
            value = filled.get(f"{path}.{name}", empty).to(torch.float32)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    return model


def merged_weights(
    config: PreTrainedConfig, checkpoint: CheckpointWeights, adapters: Iterable[Path]
) -> BaseWeights | MergedWeights:
    """A checkpoint with `adapters` merged into it, the one nearest to the base first."""
    weights: BaseWeights | MergedWeights = BaseWeights(checkpoint, config)
    for folder in adapters:
        weights = MergedWeights(weights, config, folder)
    return weights
