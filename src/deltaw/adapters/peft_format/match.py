"""What a stored adapter's tensors are in one model; nothing is changed here, and every mismatch is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...nn.embedding import AdaptedEmbedding
from ...nn.extras import Extras
from ...nn.linear import AdaptedLinear
from ...nn.parameters import ParameterShape
from ...nn.scope import bias_parameters
from ...nn.storage import frozen_weight, is_linear
from ...nn.walk import head_name, linear_names
from ...targets import choose, saved_whole
from .keys import ROWS, parameter_paths
from .read import StoredAdapter


def match_extras(
    stored: StoredAdapter, extras: Extras, modules: dict[str, nn.Module], *, copy: bool
) -> tuple[StoredAdapter, dict[str, Tensor]]:
    """(what is left of the adapter, values for single rows and bare parameters as ``Extras.make`` takes them)."""
    factors, others = dict(stored.factors), dict(stored.others)
    found: list[tuple[str, Tensor | None, tuple[int, ...], torch.device]] = []
    strange: list[str] = []
    for module, parameters in extras.parameters.items():
        base = getattr(modules[module], "base_layer", modules[module])
        for parameter, path in parameter_paths(module, parameters).items():
            name, parts, on = f"{module}.{parameter}", factors.pop(path, {}), base.get_parameter(parameter).device
            shape_a, shape_b = ParameterShape(base, parameter).of_factors(stored.config.rank_of(name))
            found.append((f"{name}.lora_A", parts.get("lora_A"), shape_a, on))
            found.append((f"{name}.lora_B", parts.get("lora_B"), shape_b, on))
            strange += [f"{name}.{part} not expected" for part in parts if part not in ("lora_A", "lora_B")]
    for target in extras.tokens:
        owner = target.modules[0]
        weight = getattr(modules[owner], "base_layer", modules[owner]).get_parameter("weight")
        shape = (len(target.indices), weight.shape[1])
        found.append((owner, others.pop(f"{owner}.{ROWS}", None), shape, weight.device))
    problems = strange + [
        f"{name} missing" if tensor is None else f"{name} is {tuple(tensor.shape)} {tensor.dtype}, needed is {shape}"
        for name, tensor, shape, _ in found
        if tensor is None or tuple(tensor.shape) != shape or not tensor.is_floating_point()
    ]
    if problems:
        raise UserError(f"{stored.path}: does not fit this base: {'; '.join(problems[:4])}. Check the base model")
    trained = {name: tensor.to(on, copy=copy) for name, tensor, _, on in found if tensor is not None}
    return dataclasses.replace(stored, factors=factors, others=others), trained


def match_factors(
    model: nn.Module, stored: StoredAdapter, modules: dict[str, nn.Module], parameters: Sequence[str]
) -> list[str]:
    """Modules of the model that the adapter's factors belong to; every mismatch in one error."""
    problems: list[str] = []
    for name, parts in stored.factors.items():
        module = modules.get(name)
        needed = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if stored.config.use_dora else set())
        if module is None:
            problems.append(f"{name}: the model has no such module")
        elif missing := needed - parts.keys():
            problems.append(f"{name}: {', '.join(sorted(missing))} missing")
        elif unknown := parts.keys() - needed:
            problems.append(f"{name}: {', '.join(sorted(unknown))} not expected (use_dora is false)")
        else:
            problems += _misfits(name, parts, module, stored.config.rank_of(name))
    expected: list[str] = []
    if not problems:  # names are only worth comparing when the modules exist
        linear, head = linear_names(model), head_name(model)
        expected = choose(stored.config, list(modules), linear, head=head, parameters=parameters, strict=False)
        problems += [f"{name}: named by the config, without weights" for name in expected if name not in stored.factors]
        unnamed = sorted(stored.factors.keys() - expected)
        problems += [f"{name}: weights, but not named by the config" for name in unnamed]
    if problems:
        more = f" (and {len(problems) - 4} more)" if len(problems) > 4 else ""
        raise UserError(f"{stored.path}: does not fit this base: {'; '.join(problems[:4])}{more}. Check the base model")
    return expected


def _misfits(name: str, parts: dict[str, Tensor], module: nn.Module, rank: int) -> list[str]:
    if not (is_linear(module) or isinstance(module, AdaptedLinear | AdaptedEmbedding | nn.Embedding)):
        return [f"{name}: {type(module).__name__} can't be adapted"]
    if isinstance(module, nn.Embedding | AdaptedEmbedding):
        outputs, inputs = module.embedding_dim, module.num_embeddings
    else:
        storage = module.storage if isinstance(module, AdaptedLinear) else frozen_weight(module)
        outputs, inputs = storage.out_features, storage.in_features
    wanted = {"lora_A": (rank, inputs), "lora_B": (outputs, rank), "lora_magnitude_vector": (outputs,)}
    return [
        f"{name}.{part} is {tuple(tensor.shape)} {tensor.dtype}, this base with r={rank} needs {wanted[part]}"
        for part, tensor in parts.items()
        if tuple(tensor.shape) != wanted[part] or not tensor.is_floating_point()
    ]


def match_others(
    stored: StoredAdapter, modules: dict[str, nn.Module], chosen: list[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """(tensors to apply, tensors that only repeat the base): biases and modules_to_save; anything else is an error."""
    apply: dict[str, Tensor] = {}
    ignored: list[str] = []
    saved = saved_whole(stored.config, modules)
    own: dict[str, Tensor] = {}
    for module in saved:
        original = getattr(modules[module], "base_layer", modules[module])
        own |= {f"{module}.{key}": tensor for key, tensor in original.state_dict().items()}
    own |= bias_parameters(modules, chosen, saved, stored.config.bias, strict=False)
    problems = [f"{name} missing" for name in own if name not in stored.others]
    for name, tensor in stored.others.items():
        owner, _, attribute = name.rpartition(".")
        base = modules.get(owner)
        current = own.get(name, None if base is None else getattr(getattr(base, "base_layer", base), attribute, None))
        if not isinstance(current, Tensor):
            problems.append(f"{name} (the model has no such tensor)")
        elif current.shape != tensor.shape or current.is_floating_point() != tensor.is_floating_point():
            given, wanted = (f"{tuple(t.shape)} {t.dtype}" for t in (tensor, current))
            problems.append(f"{name} is {given}, in this base {wanted}")
        elif name in own:
            apply[name] = tensor
        elif torch.equal(current.to(tensor), tensor):
            ignored.append(name)
        else:
            problems.append(f"{name} (trained, but neither in modules_to_save nor one of the config's biases)")
    if problems:
        raise UserError(f"{stored.path}: tensors that this base can't take: {'; '.join(problems[:4])}")
    return apply, ignored
