"""The methods that PEFT's wrapper and its inner ``LoraModel`` share: add, switch, merge, blend, take out.

Thin methods over ``nn.inject``, ``adapters.merge`` and ``adapters.blend``, with PEFT's names and signatures; nothing
is held here. An argument that could change no result here is refused by name or said to have none.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from ..adapters import blend, merge
from ..config import LoraConfig
from ..errors import UserError
from ..nn.inject import activate, inject, restore
from ..nn.state import state_of
from ..nn.walk import parameter_counts


class Switching:
    """Adapters of the model that ``get_base_model`` gives."""

    def get_base_model(self) -> nn.Module:
        """The adapted model itself, as ``transformers`` made it."""
        raise NotImplementedError

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """Each adapter's config, by name."""
        return state_of(self.get_base_model()).configs

    @property
    def active_adapters(self) -> list[str]:
        return list(state_of(self.get_base_model()).active.names)

    @property
    def active_adapter(self) -> str:
        """The active adapter; the first where several are. Raises ``UserError`` where none is."""
        names = self.active_adapters
        if not names:
            raise UserError("no adapter is active; set_adapter one")
        if len(names) > 1:
            warnings.warn(f"{len(names)} adapters are active, the first is returned", stacklevel=2)
        return names[0]

    @property
    def active_peft_config(self) -> LoraConfig:
        return self.peft_config[self.active_adapter]

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of what any adapter trains whole; None where none does."""
        return {name for config in self.peft_config.values() for name in config.modules_to_save or ()} or None

    def add_adapter(self, adapter_name: str, peft_config: LoraConfig) -> None:
        """Add a fresh adapter beside those there are; the active one stays active."""
        before = self.active_adapters
        inject(self.get_base_model(), peft_config, adapter_name)
        activate(self.get_base_model(), before)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several at once, the active ones; they train unless ``inference_mode``, as in PEFT."""
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        activate(self.get_base_model(), names, trainable=not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter out; where it was the only active one, the first that remains becomes active, as in PEFT."""
        was_active = self.active_adapters == [adapter_name]
        restore(self.get_base_model(), adapter_name)
        if was_active and self.peft_config:
            activate(self.get_base_model(), list(self.peft_config)[:1])

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base alone inside; the active adapters come back afterwards, but for those deleted meanwhile."""
        before = self.active_adapters
        activate(self.get_base_model(), [])
        try:
            yield
        finally:
            activate(self.get_base_model(), [name for name in before if name in self.peft_config])

    def disable_adapter_layers(self) -> None:
        """The base alone from now on, until ``enable_adapter_layers``."""
        state = state_of(self.get_base_model())
        state.shelved = state.shelved or state.active.names
        activate(self.get_base_model(), [])

    def enable_adapter_layers(self) -> None:
        """The adapters that were active before ``disable_adapter_layers`` again."""
        state = state_of(self.get_base_model())
        if state.shelved:
            activate(self.get_base_model(), [name for name in state.shelved if name in state.configs])
        state.shelved = ()

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Put adapters (the active ones) into the base's weights, for forwards at the base's price.

        Layers that bitsandbytes has quantised have dense stand-ins meanwhile. ``safe_merge`` refuses a result that
        isn't finite. Raises ``UserError`` as ``adapters.merge.merge`` does.
        """
        merge.merge(self.get_base_model(), adapter_names, safe=safe_merge)

    def unmerge_adapter(self) -> None:
        """The base's own weights again, bit for bit."""
        merge.unmerge(self.get_base_model())

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        requantize: bool = False,
    ) -> nn.Module:
        """Merge adapters (the active ones) for good, take all out, and return the plain model; computed in float32.

        A quantised base becomes dense as a whole, and takes the memory of that: rounding the sum to few bits again
        throws most of a small adapter away. ``requantize`` does so all the same (not for bitsandbytes' live layers); a
        warning says what was lost. ``progressbar`` prints a line before and after.
        """
        if progressbar:
            print(f"merging {', '.join(adapter_names or self.active_adapters)} …", flush=True)
        merged = merge.merge_and_unload(self.get_base_model(), adapter_names, safe=safe_merge, requantize=requantize)
        if progressbar:
            print("merged", flush=True)
        return merged

    def unload(self) -> nn.Module:
        """Take all adapters out and return the model as it was found."""
        restore(self.get_base_model())
        return self.get_base_model()

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add an adapter that is a blend of others: Σᵢ wᵢ·ΔWᵢ, or one of PEFT's other ``combination_type``s.

        The active adapters stay active. ``svd_full_matrices`` only ever chose which unused singular vectors are
        computed. Raises ``UserError`` as ``adapters.blend.blend`` does.
        """
        if svd_driver is not None:
            raise UserError(f"svd_driver={svd_driver!r}: torch chooses the driver here; leave it out")
        blend.blend(
            self.get_base_model(),
            adapters,
            weights,
            adapter_name,
            method=combination_type,
            svd_rank=svd_rank,
            svd_clamp=svd_clamp,
            density=density,
            majority_sign_method=majority_sign_method,
        )

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters; 4-bit weights count as many as they stand for."""
        return parameter_counts(self.get_base_model())

    def print_trainable_parameters(self) -> None:
        """The line that every PEFT tutorial prints."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )
