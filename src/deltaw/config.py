"""What an adapter is asked to be: ``LoraConfig``, with PEFT's field names, meanings and defaults.

ΔW = s·B·A with s = α/r, or α/√r for rsLoRA (Kalajdzievski 2023, eq. 8). A config states rank, alpha and which modules
are adapted; it holds no tensors and imports no torch, so that the command line can read it in no time.

Every field that PEFT 0.21's dataclass has is here: honoured, or refused by name as soon as it is given a value that
would change the result (``_REFUSED``). A setting that is accepted and then does nothing does not exist.
What stands in ``targets.py``: how names choose modules. What stands in ``nn/starts.py``: the initialisers.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from .errors import UserError, short
from .files import replace_text
from .hub import read_object, resolve_file
from .patterns import MAX_EXPRESSIONS, MAX_PATTERNS, Matcher, check_pattern, is_plain
from .settings import EvaConfig, LoftQConfig, is_number, is_whole

CONFIG_NAME = "adapter_config.json"
MAX_RANK = 65_536
"""No hidden size in use is larger; a rank beyond it is a damaged or hostile file."""

MAX_LAYERS = 10_000
"""Layer numbers in a config: more than the layers of any model."""


class TaskType(StrEnum):
    """What the adapted model is for; PEFT's names."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(StrEnum):
    """The one method family of this project; a file of another is refused by this name."""

    LORA = "LORA"


INITS = ("gaussian", "orthogonal", "pissa", "olora", "eva", "loftq")
"""Strings that ``init_lora_weights`` takes beside ``True``, ``False`` and ``pissa_niter_[number]``."""

_PISSA_NITER = re.compile(r"pissa_niter_[1-9]\d?")

_WITHOUT_EFFECT: dict[str, object] = {"megatron_core": "megatron.core", "qalora_group_size": 16}
"""Fields that only mean something beside a refused one: PEFT's default, or nothing, is all they may say."""

_OTHER_INITS = ("corda", "mica", "lora_ga")

_REFUSED: dict[str, str] = {
    "megatron_config": "Megatron's parallel layers",
    "corda_config": "CorDA starts",
    "lora_ga_config": "LoRA-GA starts",
    "velora_config": "VeLoRA",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "monteclora_config": "MonteCLoRA",
    "layer_replication": "replicated layers",
    "lora_bias": "a bias inside lora_B",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "ensure_weight_tying": "tying adapters of tied layers",
}
"""Fields of PEFT's LoraConfig that are understood and not done, with what each would have been."""


@dataclass(kw_only=True)
class PeftConfig:
    """The fields that every PEFT method shares."""

    task_type: TaskType | str | None = None
    """What the model is for; ``"CAUSAL_LM"`` for a decoder."""
    peft_type: PeftType | str | None = PeftType.LORA
    """Always LORA here."""
    auto_mapping: dict[str, Any] | None = None
    """PEFT's note on a base class outside its task types; kept as it came."""
    peft_version: str | None = None
    """Version of the library that wrote the file; kept as it came, and filled in on saving."""
    base_model_name_or_path: str | None = None
    """The base that the adapter was trained on."""
    revision: str | None = None
    """The base's revision on the hub."""
    inference_mode: bool = False
    """True: loaded for use, the adapter's weights are frozen."""

    @classmethod
    def from_pretrained(cls, path: str | Path, **hub: Any) -> LoraConfig:
        """Read ``adapter_config.json`` from a folder or hub id. Raises ``UserError`` on anything unreadable."""
        return read_config(resolve_file(path, CONFIG_NAME, **hub))


@dataclass(kw_only=True)
class LoraConfig(PeftConfig):
    """PEFT's ``LoraConfig``: same fields, same defaults, validated."""

    r: int = 8
    """Rank of ΔW."""
    lora_alpha: int | float = 8
    """α of the scaling α/r."""
    lora_dropout: float = 0.0
    """Probability that an input of A is dropped while training."""
    target_modules: list[str] | set[str] | str | None = None
    """Which modules: suffixes of names, a regular expression over whole names, or a strategy (see ``targets``)."""
    exclude_modules: list[str] | set[str] | str | None = None
    """Modules left out of the above: suffixes or one regular expression."""
    fan_in_fan_out: bool = False
    """True for layers that store W as [in, out] (transformers' Conv1D); seen from the layer's class, kept for files."""
    bias: str = "none"
    """Which biases train: ``none``, ``all`` of the model's, or ``lora_only``, those of adapted layers."""
    use_rslora: bool = False
    """Scale by α/√r instead of α/r."""
    modules_to_save: list[str] | set[str] | None = None
    """Modules trained and saved whole, beside the adapters (a new head, say)."""
    init_lora_weights: bool | str = True
    """True: A Kaiming-uniform, B zero; ``gaussian``: A normal with deviation 1/r, B zero; False: both random; or
    ``orthogonal``, ``pissa``, ``pissa_niter_16``, ``olora``, ``eva``, ``loftq`` (see ``nn/starts.py``)."""
    layers_to_transform: list[int] | int | None = None
    """Only these layer numbers."""
    layers_pattern: list[str] | str | None = None
    """Name of the list that holds the numbered layers, where it is not found by itself."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Rank per module: name suffix or regular expression → r."""
    alpha_pattern: dict[str, int | float] = field(default_factory=dict)
    """Alpha per module: name suffix or regular expression → α."""
    use_dora: bool = False
    """DoRA: magnitude and direction apart (Liu et al. 2024, eq. 5)."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Rows of the embedding that train: token ids of the input embedding, or name of an embedding → ids."""
    target_parameters: list[str] | None = None
    """Bare parameters to adapt, by suffix of their names: the fused experts of mixture-of-experts models."""
    loftq_config: LoftQConfig | dict[str, Any] = field(default_factory=dict)
    """How ``init_lora_weights="loftq"`` quantises; LoftQ's defaults where it is left empty."""
    eva_config: EvaConfig | dict[str, Any] | None = None
    """How ``init_lora_weights="eva"`` looks at the data; EVA's defaults where it is None."""

    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    corda_config: dict[str, Any] | None = None
    lora_ga_config: dict[str, Any] | None = None
    velora_config: dict[str, Any] | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: dict[str, Any] | None = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: dict[str, Any] | None = None
    lora_bias: bool = False
    use_bdlora: dict[str, Any] | None = None
    arrow_config: dict[str, Any] | None = None
    kasa_config: dict[str, Any] | None = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        self._refuse_what_is_not_done()
        self._check_types()
        self._check_values()

    def _refuse_what_is_not_done(self) -> None:
        if self.peft_type not in (None, PeftType.LORA):
            raise UserError(
                f"peft_type={short(self.peft_type)}: only LORA adapters are supported; train or export as LoRA"
            )
        self.peft_type = PeftType.LORA
        for name, what in _REFUSED.items():
            if getattr(self, name):
                raise UserError(
                    f"LoraConfig({name}={short(getattr(self, name))}): {what} is not supported; leave {name} out"
                )
        for name, default in _WITHOUT_EFFECT.items():
            if getattr(self, name) not in (None, default):
                raise UserError(f"LoraConfig({name}={short(getattr(self, name))}) has no effect; leave {name} out")
        if isinstance(self.init_lora_weights, str) and self.init_lora_weights.startswith(_OTHER_INITS):
            raise UserError(
                f"init_lora_weights={self.init_lora_weights!r} is not supported; use True, False or {', '.join(INITS)}"
            )
        runtime = self.runtime_config or {}
        if any((runtime if isinstance(runtime, Mapping) else getattr(runtime, "__dict__", {"": True})).values()):
            raise UserError("LoraConfig(runtime_config=…): GPU offload of single layers is not supported; leave it out")

    def _check_types(self) -> None:
        def names(value: object) -> bool:
            return isinstance(value, list | set | tuple) and all(isinstance(name, str) for name in value)

        def token_ids(value: object) -> bool:
            if not isinstance(value, list | tuple) or not 0 < len(value) <= MAX_PATTERNS:
                return False
            return all(is_whole(i) and i >= 0 for i in value) and len({*value}) == len(value)

        def expect(name: str, ok: bool, wanted: str) -> None:
            if not ok:
                raise UserError(f"LoraConfig({name}={short(getattr(self, name))}): expected {wanted}")

        expect("r", is_whole(self.r) and 0 < self.r <= MAX_RANK, f"a whole number from 1 to {MAX_RANK:,}")
        expect("lora_alpha", is_number(self.lora_alpha), "a finite number")
        expect("lora_dropout", is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1, "a number in [0, 1)")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            expect(name, value is None or isinstance(value, str) or names(value), "a list of names or one string")
        expect("modules_to_save", self.modules_to_save is None or names(self.modules_to_save), "a list of names")
        expect("bias", self.bias in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'")
        layers = self.layers_to_transform
        ok = layers is None or is_whole(layers) or (isinstance(layers, list | tuple) and all(map(is_whole, layers)))
        few = not isinstance(layers, list | tuple) or len(layers) <= MAX_LAYERS
        expect("layers_to_transform", ok and few, f"a layer number or a list of at most {MAX_LAYERS:,}")
        pattern = self.layers_pattern
        few = pattern is None or isinstance(pattern, str) or (names(pattern) and len(pattern) <= MAX_EXPRESSIONS)
        expect("layers_pattern", few, f"a name or at most {MAX_EXPRESSIONS:,} of them")
        for name, fits, wanted in (
            ("rank_pattern", lambda r: is_whole(r) and 0 < r <= MAX_RANK, f"names with ranks from 1 to {MAX_RANK:,}"),
            ("alpha_pattern", is_number, "names with finite alphas"),
        ):
            value = {} if getattr(self, name) is None else getattr(self, name)
            setattr(self, name, value)
            ok = isinstance(value, Mapping) and all(isinstance(k, str) and fits(v) for k, v in value.items())
            expect(name, ok, wanted)
        for name in ("fan_in_fan_out", "use_rslora", "use_dora", "inference_mode"):
            expect(name, isinstance(getattr(self, name), bool), "true or false")
        for name in ("peft_version", "base_model_name_or_path", "revision"):
            expect(name, isinstance(getattr(self, name), str | None), "a text")
        mapping = self.auto_mapping
        flat = isinstance(mapping, dict) and all(isinstance(v, str | int | float | None) for v in mapping.values())
        expect("auto_mapping", mapping is None or flat, "names with plain values")
        parameters = self.target_parameters
        expect("target_parameters", parameters is None or names(parameters), "a list of names")
        self.target_parameters = as_names(parameters) or None
        tokens = self.trainable_token_indices
        by_name = isinstance(tokens, Mapping) and all(isinstance(k, str) and token_ids(v) for k, v in tokens.items())
        wanted = "token ids (each once, from 0), or names of embeddings with token ids"
        expect("trainable_token_indices", tokens is None or by_name or token_ids(tokens), wanted)
        for name, kind in (("loftq_config", LoftQConfig), ("eva_config", EvaConfig)):
            setattr(self, name, self._part(name, kind, getattr(self, name)))

    def _part(self, name: str, kind: type[LoftQConfig | EvaConfig], value: object) -> Any:
        """One start's own settings as PEFT keeps them: nothing where that start isn't chosen."""
        start = name.removesuffix("_config")
        if dataclasses.is_dataclass(value) and not isinstance(value, type):  # PEFT's own class, too
            value = dataclasses.asdict(value)
        is_chosen = str(self.init_lora_weights).lower() == start
        if not value:
            return kind() if is_chosen else {} if start == "loftq" else None
        known = {f.name for f in dataclasses.fields(kind)}
        if not isinstance(value, Mapping) or not value.keys() <= known:
            raise UserError(
                f"LoraConfig({name}={short(value)}): expected {kind.__name__} or its fields ({sorted(known)})"
            )
        if not is_chosen and self.init_lora_weights is not True:
            raise UserError(f"LoraConfig({name}=…) goes with init_lora_weights={start!r} only; leave it out")
        return kind(**value)

    def _check_values(self) -> None:
        if self.task_type is not None and self.task_type not in list(TaskType):
            raise UserError(f"task_type={short(self.task_type)}: expected one of {', '.join(TaskType)}")
        init = self.init_lora_weights
        if not isinstance(init, bool):
            if not isinstance(init, str) or not (init.lower() in INITS or _PISSA_NITER.fullmatch(init.lower())):
                raise UserError(
                    f"init_lora_weights={short(init)}: expected True, False, 'pissa_niter_16' (any number from 1 to "
                    f"99) or one of {list(INITS)}"
                )
            self.init_lora_weights = init.lower()
        if self.layers_pattern and self.layers_to_transform is None:
            raise UserError(
                f"layers_pattern={short(self.layers_pattern)} needs layers_to_transform; add it, or leave "
                "layers_pattern out"
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None and not self.is_strategy:
            raise UserError(
                "layers_to_transform does not go with target_modules as a regular expression; put the layer numbers "
                "into the expression, or give target_modules as a list of names"
            )
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                setattr(self, name, set(value))
        self._check_patterns()

    def _check_patterns(self) -> None:
        given: dict[str, Any] = {name: getattr(self, name) or () for name in _NAMING}
        num_names = sum(1 if isinstance(value, str) else len(value) for value in given.values())
        if num_names > MAX_PATTERNS:
            raise UserError(f"{num_names:,} names and patterns in one config (at most {MAX_PATTERNS:,})")
        texts = [(n, given[n]) for n in ("target_modules", "exclude_modules") if isinstance(given[n], str)]
        for name in ("rank_pattern", "alpha_pattern", "layers_pattern"):
            keys = [given[name]] if isinstance(given[name], str) else given[name]
            texts += [(name, key) for key in keys if not is_plain(key)]
        if len(texts) > MAX_EXPRESSIONS:
            raise UserError(f"{len(texts):,} regular expressions in one config (at most {MAX_EXPRESSIONS:,})")
        for name, text in texts:
            check_pattern(name, text, is_suffix=name in ("rank_pattern", "alpha_pattern"))
        self._matcher = Matcher()

    def match(self, expression: str, module: str) -> re.Match[str] | None:
        """One of this config's expressions over a whole name, in bounded time (``patterns.Matcher``)."""
        return self._matcher.fullmatch(expression, module)

    def pattern_key(self, patterns: Collection[str], module: str) -> str | None:
        """The first key that names ``module``, as PEFT matches it: a whole name, a dotted suffix, or an expression."""
        return self._matcher.key_for(patterns, module)

    @property
    def is_strategy(self) -> bool:
        """Whether ``target_modules`` is one of the named strategies and not a regular expression."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() in STRATEGIES

    def rank_of(self, module: str) -> int:
        """Rank of one module, by ``rank_pattern`` where it matches."""
        key = self.pattern_key(self.rank_pattern, module)
        return self.r if key is None else self.rank_pattern[key]

    def alpha_of(self, module: str) -> float:
        """Alpha of one module, by ``alpha_pattern`` where it matches."""
        key = self.pattern_key(self.alpha_pattern, module)
        return self.lora_alpha if key is None else self.alpha_pattern[key]

    def scaling_of(self, module: str) -> float:
        """s of ΔW = s·B·A for one module: α/r, or α/√r with ``use_rslora``."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)

    def to_dict(self) -> dict[str, Any]:
        """PEFT's ``adapter_config.json`` as a dict of plain JSON values."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "runtime_config"}
        out = {name: sorted(value) if isinstance(value, set) else value for name, value in out.items()}
        parts = (LoftQConfig, EvaConfig)
        return {name: dataclasses.asdict(value) if isinstance(value, parts) else value for name, value in out.items()}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``adapter_config.json`` into ``folder``."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        replace_text(path / CONFIG_NAME, self.to_json())

    def to_json(self) -> str:
        # Fields in order of their names, but patterns in their own: the first that matches a module counts.
        return json.dumps(dict(sorted(self.to_dict().items())), indent=2) + "\n"


STRATEGIES = ("all-linear", "attention", "mlp", "qv")
"""Named choices of target modules; ``targets.py`` says what each means."""


_NAMING = (
    *("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"),
    *("modules_to_save", "target_parameters"),
)
"""Fields that name modules."""


def read_config(path: Path) -> LoraConfig:
    """Read one ``adapter_config.json``; ``UserError`` names the file and what is wrong with it."""
    raw = read_object(path)
    try:
        return config_from_dict(raw)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def config_from_dict(raw: Mapping[str, Any]) -> LoraConfig:
    """A ``LoraConfig`` from ``adapter_config.json``'s content; fields that no version knows must be empty."""
    LoraConfig(peft_type=raw.get("peft_type"))  # another method has unknown fields too, but its name says more
    known = {f.name for f in dataclasses.fields(LoraConfig)}
    unknown = {key: value for key, value in raw.items() if key not in known}
    for key, value in unknown.items():
        # A newer PEFT may add a field; at a value that switches nothing on, it can't change what the weights mean.
        if value not in (None, False, {}, [], ""):
            raise UserError(f"unknown field {short(key)}={short(value)}: not one that this version understands")
    return LoraConfig(**{key: value for key, value in raw.items() if key in known and key != "runtime_config"})


def as_names(value: Sequence[str] | set[str] | str | None) -> list[str]:
    """A sorted list of names from any of the ways a config may give them."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else sorted(value)
