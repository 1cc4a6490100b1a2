"""What a config means in one model, beside the modules that its targets name: what is saved whole, which biases train,
which single rows and bare parameters; and what of it all can't be.
"""

from __future__ import annotations

from torch import nn

from ..config import LoraConfig, as_names
from ..errors import UserError
from ..targets import saved_whole
from .embedding import is_embedding
from .extras import Extras
from .saved import SavedModule
from .state import state_of
from .storage import is_linear
from .walk import AdaptedLayer, Carrier, base_of, embedding_name, logical_modules


def check_layers(config: LoraConfig, chosen: dict[str, nn.Module]) -> None:
    """Every chosen module must be one that can be adapted; all that can't are named in one error."""
    fits = {n: is_linear(m) or is_embedding(m) or isinstance(m, AdaptedLayer) for n, m in chosen.items()}
    bad = {n: type(m).__name__ for n, m in chosen.items() if not fits[n]}
    if bad:
        shown = ", ".join(f"{name} ({kind})" for name, kind in list(bad.items())[:5])
        raise UserError(
            f"target_modules chooses {len(bad)} modules that are neither linear nor an embedding: {shown}"
            f"{' …' if len(bad) > 5 else ''}; narrow it to layers that `deltaw modules MODEL` lists"
        )


def modules_to_save(config: LoraConfig, modules: dict[str, nn.Module], chosen: list[str], *, strict: bool) -> list[str]:
    """Modules to copy; loaded configs (not ``strict``) may name some that aren't there, since PEFT guesses heads."""
    saved = saved_whole(config, modules)
    missing = [end for end in as_names(config.modules_to_save) if strict and not any(n.endswith(end) for n in saved)]
    if missing:
        raise UserError(f"modules_to_save: no module is called {', '.join(missing)}; give names that the model has")
    # A module that is copied whole can't hold adapters, of this config or another, nor a second module to save.
    nested = [inner for inner in [*saved, *chosen] for outer in saved if inner.startswith(f"{outer}.")]
    adapted = [n for n in saved if n in chosen or any(isinstance(m, Carrier) for m in modules[n].modules())]
    holders = [n for n in saved if any(isinstance(m, SavedModule) for m in list(modules[n].modules())[1:])]
    if bad := [*nested, *adapted, *holders]:
        raise UserError(f"modules_to_save: {bad[0]} is adapted or saved for itself already; leave one of the two out")
    return saved


def bias_parameters(
    modules: dict[str, nn.Module], chosen: list[str], saved: list[str], which: str, *, strict: bool
) -> dict[str, nn.Parameter]:
    """Biases to train, by their name in the model without adapters; modules that are saved whole bring their own.

    ``strict``: that there are none is a ``UserError``. A stored adapter may ask for biases of a model without any.
    """
    owners = {"none": {}, "lora_only": {n: modules[n] for n in chosen}, "all": modules}[which]
    owners = {n: module for n, module in owners.items() if not any(f"{n}.".startswith(f"{s}.") for s in saved)}
    found = {n: getattr(base_of(module), "bias", None) for n, module in owners.items()}
    biases = {f"{n}.bias" if n else "bias": b for n, b in found.items() if isinstance(b, nn.Parameter)}
    if strict and which != "none" and not biases:
        raise UserError(f"bias={which!r}: the model has no such biases; use bias='none'")
    return biases


def find_extras(model: nn.Module, config: LoraConfig) -> Extras:
    """The single rows and bare parameters that a config means. Raises ``UserError`` where the model hasn't got them."""
    if not (config.trainable_token_indices or config.target_parameters):
        return Extras([], {})
    originals = state_of(model).originals
    bases = {name: originals.get(name, base_of(module)) for name, module in logical_modules(model)}
    return Extras.find(config, bases, embedding_name(model))
