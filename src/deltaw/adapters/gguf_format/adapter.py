"""A LoRA adapter as a GGUF file, and back.

    {tensor}.lora_a   A [R, K]        (of an embedding: Aᵀ [V, R])
    {tensor}.lora_b   B [N, R], rows in llama.cpp's order (of an embedding: B [hidden, R])
    adapter.lora.alpha                one number α for the whole file: ΔW = (α/R)·B·A, R of each tensor

Whatever config an adapter has, each of its modules has a scaling s, and the α that it wants is s·R. Where all want
the same, B is written bit for bit. Where they don't (``alpha_pattern``; rsLoRA with several ranks), B of the others is
multiplied by s·R/α, which is exact but for the rounding of one float32 product.

Nothing else fits into such a file, and llama.cpp takes no more: ``factors_of`` names what an adapter has beyond.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFType, GGUFWriter, Keys
from torch import Tensor
from transformers import PreTrainedModel

from ...config import LoraConfig
from ...errors import UserError
from ...nn.embedding import AdaptedEmbedding
from ...nn.parameters import AdaptedParameters
from ...nn.state import state_of
from ...nn.tokens import TokenLayer
from ...nn.walk import adapted_layers, carriers, embedding_name, head_name, saved_modules
from ..peft_format import Provenance, StoredAdapter
from ..peft_format.keys import factor_keys
from .layout import Layout
from .tensors import Entry, Outtype, decoded, open_gguf, value_of, write_gguf

MERGE_FIRST = "--format gguf-merged puts them into the model"


@dataclass(frozen=True)
class Factors:
    """What an adapter does to one module: ΔW = scaling·B·A."""

    a_RK: Tensor
    b_NR: Tensor
    scaling: float
    is_embedding: bool = False

    @property
    def alpha(self) -> float:
        """The α of a file that holds these as they are; in float32, as GGUF has it."""
        return float(np.float32(self.scaling * self.a_RK.shape[0]))


def factors_of(model: PreTrainedModel, name: str, layout: Layout) -> dict[str, Factors]:
    """What the model's adapter ``name`` does, by module; a start that isn't zero is joined in.

    Raises ``UserError`` with everything that no GGUF adapter can express, and the remedy.
    """
    out: dict[str, Factors] = {}
    dora = []
    for module, layer in adapted_layers(model):
        if name in layer.adapters:
            adapter = layer.adapter(name)
            a_RK, b_NR = (factor.detach() for factor in adapter.joined())
            out[module] = Factors(a_RK, b_NR, adapter.scaling, isinstance(layer, AdaptedEmbedding))
            if adapter.lora_magnitude_vector is not None:
                dora.append(module)
    wrong = {"DoRA's magnitudes": dora} | _beyond_factors(model, name)
    if layout.is_tied:
        ends = [end for end in (head_name(model), embedding_name(model)) if end in out]
        wrong["changes to a tied embedding or head"] = ends
    found = [f"{what} ({_some(modules)})" for what, modules in wrong.items() if modules]
    if found:
        raise UserError(f"a GGUF adapter can't hold {'; '.join(found)}: {MERGE_FIRST}")
    if not out:
        raise UserError(f"adapter {name!r} has no low-rank factors; there is nothing to export")
    for module in out:
        layout.gguf_name(f"{module}.weight")
    return out


def with_one_alpha(factors: Mapping[str, Factors], *, rescale: bool) -> tuple[dict[str, Factors], float, int]:
    """(factors that one α is right for, that α, how many B had to be multiplied for it).

    Raises ``UserError`` for several α's without ``rescale``.
    """
    wanted = Counter(f.alpha for f in factors.values() if f.alpha != 0)
    if not wanted:
        raise UserError("every scaling of the adapter is 0: it does nothing, and there is nothing to export")
    alpha = wanted.most_common(1)[0][0]
    others = [module for module, f in factors.items() if f.alpha != alpha]
    if others and not rescale:
        raise UserError(
            f"a GGUF adapter has one alpha, and this one needs {len(wanted)} (modules like {_some(others)} differ by "
            "alpha_pattern, or by rank under rsLoRA): --rescale multiplies B of those by the ratio"
        )
    out = dict(factors)
    for module in others:
        f, rank = factors[module], factors[module].a_RK.shape[0]
        out[module] = Factors(f.a_RK, f.b_NR.float() * (f.scaling * rank / alpha), alpha / rank, f.is_embedding)
    return out, alpha, len(others)


def write_adapter_gguf(
    path: Path,
    factors: Mapping[str, Factors],
    alpha: float,
    layout: Layout,
    *,
    outtype: Outtype = "f32",
    describe: Callable[[GGUFWriter], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write factors whose α is ``alpha``. Raises ``UserError`` as ``write_gguf`` does."""

    def metadata(writer: GGUFWriter) -> None:
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
        if describe is not None:
            describe(writer)

    entries = [entry for module, f in factors.items() for entry in _entries(module, f, layout)]
    write_gguf(path, layout.family.name, outtype, metadata, entries, progress)


def read_adapter_gguf(path: Path, layout: Layout) -> dict[str, Factors]:
    """The inverse of ``write_adapter_gguf``: factors by the model's module names, float32.

    Raises ``UserError`` for a file that is no LoRA adapter, or one for another architecture; for tensors that the model
    doesn't have, that lack their other half, or that don't fit together.
    """
    with open_gguf(path) as reader:
        kind, arch = value_of(reader, Keys.General.TYPE), value_of(reader, Keys.General.ARCHITECTURE)
        if (kind, value_of(reader, Keys.Adapter.TYPE)) != (GGUFType.ADAPTER, "lora"):
            raise UserError(f"{path}: not a LoRA adapter (general.type is {kind!r}); give an adapter's GGUF")
        if arch != layout.family.name:
            raise UserError(f"{path}: an adapter for {arch!r}, and the model is {layout.family.name!r}; give its base")
        alpha = value_of(reader, Keys.Adapter.LORA_ALPHA)
        halves: dict[str, dict[str, Tensor]] = {}
        for tensor in reader.tensors:
            stem, _, half = tensor.name.rpartition(".lora_")
            if half not in ("a", "b") or stem not in layout.parameters:
                raise UserError(f"{path}: {tensor.name} belongs to nothing in the model; give the adapter's own base")
            halves.setdefault(stem, {})[half] = decoded(tensor)
        out = {}
        for stem, pair in halves.items():
            if len(pair) < 2:
                raise UserError(f"{path}: {stem} has only one of lora_a and lora_b; get a complete copy")
            module = layout.parameters[stem].removesuffix(".weight")
            out[module] = _factors(path, stem, pair, alpha, layout)
    return out


def stored_of(path: Path, factors: Mapping[str, Factors]) -> StoredAdapter:
    """Factors of a GGUF file as an adapter in PEFT's form, for ``load_adapter`` and ``write_adapter``."""
    ranks = {module: f.a_RK.shape[0] for module, f in factors.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    any_module = next(iter(factors))
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=factors[any_module].scaling * ranks[any_module],
        target_modules=list(factors),
        rank_pattern={module: own for module, own in ranks.items() if own != rank},
    )
    parts = {module: {"lora_A": f.a_RK, "lora_B": f.b_NR} for module, f in factors.items()}
    keys = {}
    for module, f in factors.items():
        keys[f"{module}.lora_A"], keys[f"{module}.lora_B"], _ = factor_keys(module, is_embedding=f.is_embedding)
    return StoredAdapter(path, config, parts, {}, Provenance(), path.stat().st_size, keys)


def _entries(module: str, f: Factors, layout: Layout) -> list[Entry]:
    weight = f"{module}.weight"
    own = layout.gguf_name(weight)
    a = f.a_RK.T if f.is_embedding else f.a_RK
    return [
        Entry(f"{own}.lora_a", tuple(a.shape), a.float),
        Entry(f"{own}.lora_b", tuple(f.b_NR.shape), lambda: layout.to_gguf(weight, f.b_NR)),
    ]


def _factors(path: Path, stem: str, pair: Mapping[str, Tensor], alpha: Any, layout: Layout) -> Factors:
    weight, is_embedding = layout.parameters[stem], stem == "token_embd.weight"
    a_RK, b_NR = pair["a"].T.contiguous() if is_embedding else pair["a"], pair["b"]
    if a_RK.dim() != 2 or b_NR.dim() != 2 or a_RK.shape[0] != b_NR.shape[1]:
        shapes = f"{tuple(pair['a'].shape)} and {tuple(b_NR.shape)}"
        raise UserError(f"{path}: {stem}: lora_a and lora_b have shapes {shapes}, which are no factors")
    # llama.cpp takes a missing alpha, or 0, for a scaling of 1.
    scaling = float(alpha) / a_RK.shape[0] if alpha else 1.0
    return Factors(a_RK, layout.from_gguf(weight, b_NR), scaling, is_embedding)


def _beyond_factors(model: PreTrainedModel, name: str) -> dict[str, list[str]]:
    """What else the adapter holds, by kind."""
    biases = state_of(model).biases.get(name)
    held = [(module, carrier) for module, carrier in carriers(model) if name in carrier.adapters]
    return {
        "trained biases": [] if biases is None else list(biases.parameters),
        "modules_to_save": [module for module, saved in saved_modules(model) if name in saved.copies],
        "trainable tokens": [module for module, carrier in held if isinstance(carrier, TokenLayer)],
        "target_parameters": [module for module, carrier in held if isinstance(carrier, AdaptedParameters)],
    }


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
