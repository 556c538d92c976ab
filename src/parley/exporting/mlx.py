"""The adapter in mlx-lm's layout, for Apple's MLX.

adapters.safetensors holds `<module>.lora_a` (K, R), `<module>.lora_b` (R, N) and, with DoRA, `<module>.m` (N,), by the
module's path in the model. adapter_config.json holds `fine_tune_type`, `num_layers` (counted from the last) and
`lora_parameters`: one rank and scale for all modules, and `keys`, their paths within a layer or within the model. See
https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/LORA.md, and load_adapters in mlx_lm/tuner/utils.py.
"""

from __future__ import annotations

import json
import shlex
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from parley.errors import ModelError
from parley.exporting.adapter import AdapterExporter, AdapterReader
from parley.exporting.comparison import Marks
from parley.exporting.merge import BaseWeights, MergedWeights
from parley.exporting.merged import ROUNDED
from parley.exporting.reader import Reader
from parley.exporting.reference import Reference
from parley.exporting.trained_model import TrainedModel
from parley.exporting.weights import CheckpointWeights
from parley.models.adapter_files import read_adapter_fields
from parley.models.tokenizer import read_tokenizer
from parley.models.vllm_adapters import unread_fields

WEIGHTS, CONFIG, TEMPLATE = "adapters.safetensors", "adapter_config.json", "chat_template.jinja"
FAMILIES = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "granite", "olmo2", "smollm3"}
)
"""Families whose modules have the same names in mlx-lm and in transformers."""
READ_FIELDS = {"use_dora", "rank_pattern", "alpha_pattern"}  # of those that vLLM does not read
LAYERS = "model.layers."
WEIGHT = ".weight"
CLOSE = 1e-5  # of float32 sums in another order, relative to the largest weight


class MlxExporter(AdapterExporter):
    target = "mlx"
    description = "The adapter in mlx-lm's layout, for a 16-bit base."

    def check(self, trained: TrainedModel, quant: str | None) -> None:
        super().check(trained, quant)
        if trained.config.model_type not in FAMILIES:
            raise ModelError(
                f"{trained.name}: {trained.config.model_type} models are not exported to MLX; Parley knows "
                f"{', '.join(sorted(FAMILIES))}; use --to merged"
            )
        folder = trained.base_folder
        if _checkpoint(trained).dequantized or not any(folder.glob("*.safetensors")):
            raise ModelError(
                f"{trained.base_name}: mlx-lm reads 16-bit safetensors, not the base's own files; give the model that "
                "it was made from with --base, or use --to merged"
            )
        fields = read_adapter_fields(trained.adapters[-1])
        unread = [field for field in unread_fields(fields) if field not in READ_FIELDS]
        unread = unread or [name for name in _adapted(trained) if not name.startswith(LAYERS)]
        if unread:
            raise ModelError(
                f"{trained.name}: mlx-lm's adapters have no {', '.join(unread)}; use --to merged, which it reads whole"
            )
        base_tokenizer = read_tokenizer(folder, trained.base.model_copy(update={"chat_template": None}))
        if base_tokenizer.get_vocab() != trained.tokenizer.get_vocab():
            raise ModelError(
                f"{trained.name}: mlx-lm takes the base's tokenizer, and training changed its vocabulary; "
                "use --to merged"
            )

    def write(self, trained: TrainedModel, folder: Path, quant: str | None) -> None:
        tensors, settings = mlx_adapter(trained)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "mlx"})
        (folder / CONFIG).write_text(json.dumps(settings, indent=1), encoding="utf-8")
        if trained.tokenizer.chat_template:
            (folder / TEMPLATE).write_text(trained.tokenizer.chat_template, encoding="utf-8")
            trained.notes.append(f"MLX: mlx-lm takes the base's chat template unless it is given {TEMPLATE}")

    def open(self, trained: TrainedModel, folder: Path, reference: Reference) -> Reader:
        return MlxAdapterReader(trained, folder, reference.dtype)

    def marks(self, trained: TrainedModel, quant: str | None) -> Marks:
        return ROUNDED  # its weights are compared one by one, in float32

    def command(self, trained: TrainedModel, place: Path) -> str:
        local = Path(trained.base.name).is_dir() or "/" not in trained.base.name
        base = str(trained.base_folder) if local else trained.base.name
        sampling = trained.settings.generation
        words = ["mlx_lm.server", "--model", base, "--adapter-path", str(place)]
        for option in ("temperature", "top_p", "top_k", "min_p"):
            value = sampling.model_dump()[option]
            words += [f"--{option.replace('temperature', 'temp').replace('_', '-')}", str(value)]
        template = place / TEMPLATE
        given = f' --chat-template "$(cat {shlex.quote(str(template))})"' if template.is_file() else ""
        return shlex.join(words) + given


def _merged(trained: TrainedModel) -> MergedWeights:
    assert isinstance(trained.weights, MergedWeights)
    return trained.weights


def _checkpoint(trained: TrainedModel) -> CheckpointWeights:
    base = _merged(trained).base
    assert isinstance(base, BaseWeights)  # an adapter on a merged one was refused
    return base.checkpoint


def _adapted(trained: TrainedModel) -> list[str]:
    """Names of the tensors that the adapter changes, in the model's order."""
    weights = _merged(trained)
    return [name for name in weights.shapes() if weights.changes(name) and not name.endswith(".bias")]


def mlx_adapter(trained: TrainedModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the adapter_config.json of the run's adapter."""
    weights, names = _merged(trained), _adapted(trained)
    found = {name: weights.factors(name, dora=True) for name in names}
    factors = {name.removesuffix(WEIGHT): factor for name, factor in found.items() if factor is not None}
    rank = max(a_RK.shape[0] for a_RK, _, _ in factors.values())
    scale = next(scale for _, _, scale in factors.values())
    dora = read_adapter_fields(trained.adapters[-1]).use_dora
    tensors: dict[str, Tensor] = {}
    for module, (a_RK, b_NR, own_scale) in factors.items():
        # mlx-lm has one rank and one scale: smaller ranks get zeros, other scales go into B.
        missing = rank - a_RK.shape[0]
        a_KR = torch.nn.functional.pad(a_RK.float(), (0, 0, 0, missing)).T
        b_RN = torch.nn.functional.pad(b_NR.float() * (own_scale / scale), (0, missing)).T
        tensors |= {f"{module}.lora_a": a_KR.contiguous(), f"{module}.lora_b": b_RN.contiguous()}
        if dora:
            tensors[f"{module}.m"] = weights.dora_magnitude(f"{module}{WEIGHT}").float().contiguous()
    layers, keys = _layers_and_keys(list(factors), trained.config.num_hidden_layers)
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys}
    settings = {"fine_tune_type": "dora" if dora else "lora", "num_layers": layers, "lora_parameters": parameters}
    return tensors, {"model": trained.base_name, **settings}


def _layers_and_keys(modules: list[str], layers: int) -> tuple[int, list[str]]:
    """How many layers from the last are adapted, and which modules of each."""
    by_layer: dict[int, list[str]] = defaultdict(list)
    for module in modules:
        layer, _, inner = module.removeprefix(LAYERS).partition(".")
        by_layer[int(layer)].append(inner)
    same = all(inner == by_layer[layers - 1] for inner in by_layer.values())
    if same and sorted(by_layer) == list(range(layers - len(by_layer), layers)):
        return len(by_layer), by_layer[layers - 1]
    return layers, modules  # layers that differ are named by whole paths


class MlxAdapterReader(AdapterReader):
    """An adapter folder of mlx-lm, read by mlx-lm's rules and merged by its formula into transformers' base model.

    Raises ModelError where a merged weight is not PEFT's. mlx-lm itself is not needed: few GPU machines have it.
    """

    def __init__(self, trained: TrainedModel, folder: Path, dtype: torch.dtype) -> None:
        self._trained, self._base = trained, str(trained.base_folder)
        self.tokenizer = AutoTokenizer.from_pretrained(self._base, local_files_only=True)
        template = folder / TEMPLATE
        if template.is_file():
            self.tokenizer.chat_template = template.read_text(encoding="utf-8")
        self.model = self._load(folder, dtype)

    @property
    def program(self) -> str:
        return f"mlx-lm's rules in transformers {transformers.__version__}"

    @torch.no_grad()
    def _load(self, folder: Path, dtype: torch.dtype) -> Any:
        model = AutoModelForCausalLM.from_pretrained(self._base, dtype=dtype, local_files_only=True).eval()
        settings, tensors = json.loads((folder / CONFIG).read_text(encoding="utf-8")), load_file(folder / WEIGHTS)
        weights, used = _merged(self._trained), set()
        for module in selected_modules([name for name, _ in model.named_modules()], settings):
            name = f"{module}{WEIGHT}"
            merged_NK = fused(weights.base.get(name).float(), module, tensors, settings)
            wanted_NK = weights.get(name).float()
            if (merged_NK - wanted_NK).abs().max() > CLOSE * wanted_NK.abs().max():
                raise ModelError(f"{name}: mlx-lm would compute another weight than PEFT; use --to merged")
            model.get_submodule(module).weight.copy_(merged_NK)
            used |= {f"{module}.{leaf}" for leaf in ("lora_a", "lora_b", "m")}
        unused = sorted(set(tensors) - used)
        if unused:
            raise ModelError(f"{folder}: mlx-lm would refuse {unused[0]}, which is in no adapted module")
        return model


def selected_modules(names: list[str], settings: dict[str, Any]) -> list[str]:
    """Those of a model's modules that mlx-lm puts an adapter on (linear_to_lora_layers in mlx_lm/tuner/utils.py)."""
    keys, layers = set(settings["lora_parameters"]["keys"]), settings["num_layers"]
    indices = {int(name.removeprefix(LAYERS).split(".")[0]) for name in names if name.startswith(LAYERS)}
    # -0 is 0 in a Python slice: no layers mean all.
    last = [f"{LAYERS}{index}." for index in sorted(indices)[-layers:]]
    inner = [name for name in names for prefix in last if name.startswith(prefix) and name[len(prefix) :] in keys]
    return inner + [name for name in names if name in keys]


def fused(weight_NK: Tensor, module: str, tensors: dict[str, Tensor], settings: dict[str, Any]) -> Tensor:
    """The weight (N, K) that `mlx_lm.fuse` makes of a module: LoRALinear.fuse and DoRALinear.fuse."""
    scale = settings["lora_parameters"]["scale"]
    a_KR, b_RN = tensors[f"{module}.lora_a"], tensors[f"{module}.lora_b"]
    rank = settings["lora_parameters"]["rank"]
    if a_KR.shape[1] != rank or b_RN.shape[0] != rank:
        raise ModelError(f"{module}: its matrices have another rank than adapter_config.json says ({rank})")
    adapted_NK = weight_NK + (scale * b_RN.T) @ a_KR.T
    if settings["fine_tune_type"] != "dora":
        return adapted_NK
    return (tensors[f"{module}.m"] / adapted_NK.norm(dim=1))[:, None] * adapted_NK
