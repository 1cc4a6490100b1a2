"""Which modules of a model a config means: names in, names out, no tensors.

Four ways to say it (PEFT's rules for the first three):
  a list of names        each is a whole module name or a dotted suffix of one (``q_proj``, ``mlp.up_proj``)
  a regular expression   one string, matched against whole names
  None                   the architecture's usual choice, attention's q and v
  a strategy             ``all-linear``  every linear layer but the output head (QLoRA, Dettmers et al. 2023, §5)
                         ``attention``   every linear layer inside attention
                         ``mlp``         every linear layer of a numbered block outside attention, routers left out
                         ``qv``          query and value projections (LoRA, Hu et al. 2021, §7.1), or the fused qkv

Unlike PEFT, every name given must match something: a misspelt target that trains nothing is the oldest silent
failure of this field.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from .config import LoraConfig, as_names
from .errors import UserError, short
from .patterns import tails_of

_QUERY_VALUE = {"q_proj", "query", "q", "query_proj", "wq", "v_proj", "value", "v", "value_proj", "wv"}
_FUSED_QKV = {"qkv_proj", "c_attn", "query_key_value", "Wqkv", "qkv", "in_proj", "att_proj"}
_ROUTERS = {"gate", "router", "shared_expert_gate"}


def choose(
    config: LoraConfig,
    modules: Collection[str],
    linear: Collection[str],
    *,
    head: str | None,
    parameters: Collection[str] = (),
    strict: bool = True,
) -> list[str]:
    """Names of the modules to adapt, in the model's order.

    ``modules`` are all module names, ``linear`` those of linear layers among them, ``head`` the output head's name,
    ``parameters`` those of bare parameters that are adapted too: with them, no ``target_modules`` means no modules.
    Raises ``UserError`` naming every target that matches nothing, the closest real names first. ``strict=False`` is
    for configs that came with trained weights: other tools let names through that match nothing, and there it is the
    weights that say what was trained.
    """
    if parameters and not config.target_modules:
        chosen = []
    elif config.is_strategy or config.target_modules is None:
        strategy = "qv" if config.target_modules is None else str(config.target_modules).lower()
        chosen = _by_strategy(strategy, [name for name in linear if name != head])
        if not chosen:
            raise UserError(f"target_modules={strategy!r} matches no layer of this model; {_listing(linear)}")
    elif isinstance(config.target_modules, str):
        expression = config.target_modules
        chosen = [name for name in modules if name and config.match(expression, name)]
        if not chosen:
            raise UserError(
                f"target_modules={short(expression)} (a regular expression over whole names) matches no module; "
                f"{_listing(linear, like=expression)}"
            )
    else:
        wanted = as_names(config.target_modules)
        if strict:
            _check_all_match("target_modules", wanted, modules, linear)
        wanted_set = set(wanted)
        chosen = [name for name in modules if matches_suffix(name, wanted_set)]
    if strict and config.exclude_modules and not isinstance(config.exclude_modules, str):
        _check_all_match("exclude_modules", as_names(config.exclude_modules), modules, linear)
    kept = [name for name in chosen if not _is_excluded(config, name) and _is_in_layers(config, name)]
    if not kept and (chosen or not parameters):
        raise UserError(
            f"exclude_modules={short(as_names(config.exclude_modules))}, "
            f"layers_to_transform={short(config.layers_to_transform)} and "
            f"modules_to_save={short(as_names(config.modules_to_save))} leave none of the {len(chosen)} modules "
            "chosen; give at least one that stays"
        )
    if strict:
        _check_patterns_match(config, [*kept, *parameters])
        _check_layers_exist(config, chosen)
    return kept


def compact(chosen: Collection[str], modules: Iterable[str]) -> list[str]:
    """The shortest list of names that means exactly ``chosen`` to PEFT: last parts where they suffice, else whole."""
    leaves = {name.rpartition(".")[2] for name in chosen}
    meant = {name for name in modules if name.rpartition(".")[2] in leaves}
    return sorted(leaves) if meant == set(chosen) else sorted(chosen)


def matches_suffix(name: str, suffixes: Collection[str]) -> bool:
    """PEFT's rule for lists: a whole name or a dotted suffix of it."""
    return any(tail in suffixes for tail in tails_of(name))


def saved_whole(config: LoraConfig, modules: Iterable[str]) -> list[str]:
    """Names that ``modules_to_save`` means: whatever ends so, as in PEFT (``norm``: ``layernorm`` too).

    Entries without a match are left to the caller, who knows whether they may be.
    """
    ends = tuple(as_names(config.modules_to_save))
    return [name for name in modules if name and name.endswith(ends)]


def _by_strategy(strategy: str, linear: list[str]) -> list[str]:
    if strategy == "all-linear":
        return linear
    if strategy == "mlp":
        return [n for n in linear if not _in_attention(n) and _layer_of(n) is not None and _leaf(n) not in _ROUTERS]
    attention = [name for name in linear if _in_attention(name)]
    if strategy == "attention":
        return attention
    return [name for name in attention if _leaf(name) in _QUERY_VALUE | _FUSED_QKV]


def _check_all_match(field: str, wanted: list[str], modules: Collection[str], linear: Collection[str]) -> None:
    there = {tail for name in modules for tail in tails_of(name)}
    missing = [name for name in wanted if name not in there]
    if missing:
        raise UserError(f"{field}: no module is called {', '.join(missing)}; {_listing(linear, like=missing[0])}")


def _check_layers_exist(config: LoraConfig, chosen: list[str]) -> None:
    """Every layer number asked for must be one that the targets have."""
    asked = config.layers_to_transform
    has = {number for name in chosen if (number := _counted_layer(config, name)) is not None}
    missing = sorted({*([asked] if isinstance(asked, int) else asked or ())} - has)
    if missing:
        raise UserError(f"layers_to_transform: no layer {missing} among the targets, whose layers are {sorted(has)}")


def _is_excluded(config: LoraConfig, name: str) -> bool:
    if config.modules_to_save:
        saved, parts = set(config.modules_to_save), name.split(".")
        if any(matches_suffix(".".join(parts[: i + 1]), saved) for i in range(len(parts))):
            return True
    if isinstance(config.exclude_modules, str):
        return config.match(config.exclude_modules, name) is not None
    return matches_suffix(name, config.exclude_modules or ())


def _is_in_layers(config: LoraConfig, name: str) -> bool:
    if config.layers_to_transform is None or config.layers_to_transform == []:
        return True
    wanted = config.layers_to_transform
    return _counted_layer(config, name) in ([wanted] if isinstance(wanted, int) else wanted)


def _counted_layer(config: LoraConfig, name: str) -> int | None:
    """Number of a module's layer, counted where ``layers_pattern`` says, if it says."""
    patterns = as_names(config.layers_pattern)
    matches = (config.match(rf"(?:|.*?\.)(?:{pattern})\.(?P<number>\d+)\..*", name) for pattern in patterns)
    return next((int(m["number"]) for m in matches if m), None) if patterns else _layer_of(name)


def _layer_of(name: str) -> int | None:
    """Number of the layer a module stands in: the first number in its name that something is counted by."""
    found = re.match(r"(?:|.*?\.)[^.]+\.(\d+)\.", name)
    return int(found[1]) if found else None


def _check_patterns_match(config: LoraConfig, chosen: list[str]) -> None:
    given: Mapping[str, Mapping[str, object]] = {
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
    }
    for field, patterns in given.items():
        for key in patterns:
            if not any(config.pattern_key([key], name) for name in chosen):
                raise UserError(f"{field}: {key!r} matches none of the adapted modules; {_listing(chosen, like=key)}")


def _in_attention(name: str) -> bool:
    parent = name.rpartition(".")[0].lower()
    return "attn" in parent or "attention" in parent


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _listing(names: Iterable[str], like: str = "", limit: int = 12) -> str:
    """ "This model has …": last parts of names with their counts, the closest to ``like`` first."""
    counts = Counter(map(_leaf, names))
    word = like.rpartition(".")[2]
    ranked = sorted(counts, key=lambda leaf: -difflib.SequenceMatcher(None, word, leaf).ratio()) if word else counts
    shown = [f"{leaf} (×{counts[leaf]})" if counts[leaf] > 1 else leaf for leaf in list(ranked)[:limit]]
    more = f" and {len(counts) - limit} more" if len(counts) > limit else ""
    return f"this model has {', '.join(shown)}{more}; `deltaw modules MODEL` lists them"
