"""Adapters of a base whose vocabulary has grown: they carry the embeddings, for nobody else has the new rows.

PEFT writes the input and the output embedding into such an adapter's file and, when it is loaded, over the base's.
Here they are what ``modules_to_save`` names: the adapter's own copies, in use while it is active. The base's stay as
they are, and PEFT reads the file as it would read its own.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from ..adapters.peft_format import PREFIX, WEIGHTS_NAME, StoredAdapter, save_adapter
from ..config import CONFIG_NAME, as_names
from ..errors import UserError
from ..files import replace_files
from ..nn.embedding import AdaptedEmbedding
from ..nn.linear import AdaptedLinear
from ..nn.saved import SavedModule
from ..nn.walk import logical_modules
from ..targets import saved_whole


def with_own_embeddings(model: nn.Module, adapter: StoredAdapter) -> StoredAdapter:
    """The adapter with the embeddings that its file carries among ``modules_to_save``, where the base's differ.

    Raises ``UserError`` for embeddings of another size: the base is to be resized first.
    """
    modules, extra = _embeddings(model), []
    covered = saved_whole(adapter.config, modules)
    for name in modules.keys() - adapter.factors.keys():
        stored_VH = adapter.others.get(f"{name}.weight")
        own_VH = getattr(modules[name], "base_layer", modules[name]).weight
        if stored_VH is None or not isinstance(own_VH, Tensor):
            continue
        if stored_VH.shape != own_VH.shape:
            raise UserError(
                f"{adapter.path} brings {name} of {tuple(stored_VH.shape)}, this base has {tuple(own_VH.shape)}; "
                f"call model.resize_token_embeddings({stored_VH.shape[0]}) first"
            )
        if name not in covered and not torch.equal(own_VH.to(stored_VH), stored_VH):
            extra.append(name)
    if not extra:
        return adapter
    saved = sorted({*as_names(adapter.config.modules_to_save), *extra})
    return dataclasses.replace(adapter, config=dataclasses.replace(adapter.config, modules_to_save=saved))


def take_embeddings(model: nn.Module, tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Put embeddings that the adapter ``name`` doesn't have itself into the base's own; the rest of ``tensors``.

    For an adapter that is set up already, on a base that was resized afresh: a run that is taken up again.
    """
    rest = dict(tensors)
    with torch.no_grad():
        for owner, module in _not_carried(model, name).items():
            for key, own in module.state_dict().items():
                given = rest.get(f"{PREFIX}{owner}.{key}")
                if given is not None and given.shape == own.shape:
                    own.copy_(given)
                    del rest[f"{PREFIX}{owner}.{key}"]
    return rest


def save(model: nn.Module, folder: Path, name: str, save_embedding_layers: bool | str) -> None:
    """``save_adapter``, with the embeddings if so wished, or if the base was resized (``"auto"``)."""
    wanted = _is_resized(model) if save_embedding_layers == "auto" else save_embedding_layers
    extra = _not_carried(model, name) if wanted else {}
    if not extra:
        save_adapter(model, folder, name)
        return
    with TemporaryDirectory() as scratch:
        path = save_adapter(model, scratch, name)
        config = json.loads((path / CONFIG_NAME).read_text(encoding="utf-8"))
        config["modules_to_save"] = sorted({*(config["modules_to_save"] or ()), *extra})
        with safe_open(path / WEIGHTS_NAME, framework="pt") as file:
            tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
        for owner, module in extra.items():
            own = module.state_dict().items()
            tensors |= {f"{PREFIX}{owner}.{k}": t.detach().cpu().clone().contiguous() for k, t in own}
        save_file(tensors, path / WEIGHTS_NAME, metadata=metadata)
        (path / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        folder.mkdir(parents=True, exist_ok=True)
        replace_files(
            folder,
            {
                WEIGHTS_NAME: lambda to: shutil.copyfile(path / WEIGHTS_NAME, to),
                CONFIG_NAME: lambda to: shutil.copyfile(path / CONFIG_NAME, to),
            },
        )


def _embeddings(model: nn.Module) -> dict[str, nn.Module]:
    """The input and the output embedding by name; wrapped ones as they stand in the model."""
    found = [getattr(model, f"get_{end}put_embeddings", lambda: None)() for end in ("in", "out")]
    ids = {id(module) for module in found if module is not None}
    return {n: m for n, m in logical_modules(model) if id(m) in ids or id(getattr(m, "base_layer", None)) in ids}


def _not_carried(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """Embeddings that the adapter's file would not have: those that it neither adapts nor trains."""
    plain: dict[str, nn.Module] = {}
    for owner, module in _embeddings(model).items():
        if isinstance(module, SavedModule):
            if name not in module.copies:
                plain[owner] = module.base_layer
        elif type(module) in (nn.Embedding, nn.Linear):
            plain[owner] = module
        elif isinstance(module, AdaptedEmbedding | AdaptedLinear):
            warnings.warn(
                f"{owner} was resized and is adapted: its new rows are not stored, keep this base; or train it whole "
                "(modules_to_save) or single rows of it (trainable_token_indices)",
                stacklevel=4,
            )
    return plain


def _is_resized(model: nn.Module) -> bool:
    """Whether the vocabulary has another size than where the base came from; False where that can't be known."""
    if not isinstance(model, PreTrainedModel) or not model.name_or_path:
        return False
    try:
        config = AutoConfig.from_pretrained(model.name_or_path, local_files_only=True)
    except (OSError, ValueError, KeyError):
        return False
    sizes = [getattr(c.get_text_config(), "vocab_size", None) for c in (config, model.config)]
    return None not in sizes and sizes[0] != sizes[1]
