"""What an adapter may train beside low-rank layers: single rows of embeddings, and bare parameters.

Found in the model by its config, checked against what else stands there, and made: three steps, so that injection
and loading share the first and nothing is put in place before all is known to fit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..config import LoraConfig
from ..errors import UserError
from .embedding import AdaptedEmbedding
from .linear import AdaptedLinear
from .lowrank import Active
from .parameters import AdaptedParameters, parameter_targets
from .saved import SavedModule
from .tokens import TokenLayer, TokenRows, TokenTarget, token_targets

WRAPPERS = (AdaptedLinear, AdaptedEmbedding, TokenLayer, AdaptedParameters, SavedModule)
"""Whatever may stand in the place of one of the base's modules."""


@dataclass(frozen=True)
class Extras:
    """Rows and parameters that a config means in one model."""

    tokens: list[TokenTarget]
    parameters: dict[str, list[str]]
    """Module → its parameters, in the module's own order."""

    @property
    def parameter_names(self) -> list[str]:
        """Whole names of the parameters."""
        return [f"{module}.{parameter}" for module, own in self.parameters.items() for parameter in own]

    @property
    def module_names(self) -> list[str]:
        """Names of the modules that are touched."""
        return [name for target in self.tokens for name in target.modules] + list(self.parameters)

    @classmethod
    def find(cls, config: LoraConfig, bases: Mapping[str, nn.Module], embedding: str | None) -> Extras:
        """``bases`` are the model's own modules by name, ``embedding`` names the input embedding. Raises ``UserError``
        for what the model doesn't have or what can't be trained so."""
        rows = token_targets(config.trainable_token_indices, bases, embedding)
        return cls(rows, parameter_targets(config, bases))

    def check_free(self, modules: Mapping[str, nn.Module], taken: Collection[str]) -> None:
        """``UserError`` where a module is adapted or saved in another way, now or by this config (``taken``)."""
        kinds: list[tuple[str, type[nn.Module], list[str]]] = [
            ("trainable_token_indices", TokenLayer, [name for target in self.tokens for name in target.modules]),
            ("target_parameters", AdaptedParameters, list(self.parameters)),
        ]
        flipped = [t for t in taken if isinstance(getattr(modules[t], "base_layer", modules[t]), Conv1D)]
        if self.parameters and flipped:
            raise UserError(
                f"target_parameters does not go with {flipped[0]}, which keeps its weight the other way round "
                "(fan_in_fan_out, which PEFT refuses beside it); leave one of the two out"
            )
        for field, kind, names in kinds:
            for name in names:
                others = any(isinstance(m, WRAPPERS) and not isinstance(m, kind) for m in modules[name].modules())
                if others or any(f"{t}.".startswith(f"{name}.") or f"{name}.".startswith(f"{t}.") for t in taken):
                    raise UserError(
                        f"{field}: {name} is adapted or saved in another way already; leave one of the two out"
                    )
            taken = [*taken, *names]

    def make(
        self, config: LoraConfig, modules: Mapping[str, nn.Module], active: Active, trained: Mapping[str, Tensor] | None
    ) -> Iterator[tuple[str, TokenLayer | AdaptedParameters, nn.Module]]:
        """(module's name, what will stand there, the new adapter in it); fresh values where ``trained`` has none.

        ``trained`` has rows under the name of their module, factors under ``{module}.{parameter}.lora_A`` and ``_B``.
        """
        for target in self.tokens:
            rows: TokenRows | None = None
            for name in target.modules:
                module = modules[name]
                layer = module if isinstance(module, TokenLayer) else TokenLayer(module, name, active)
                rows = rows or layer.fresh_adapter(target, trained)
                yield name, layer, rows
        for name, parameters in self.parameters.items():
            module = modules[name]
            carrier = module if isinstance(module, AdaptedParameters) else AdaptedParameters(module, name, active)
            yield name, carrier, carrier.fresh_adapter(parameters, config, trained)
