"""EVA's figures: in which directions each layer's inputs vary most, and how many of them each layer is worth.

While batches go through the base, each layer keeps the leading principal components of its inputs (Paischer et al.
2024, arXiv:2410.07170, §3), by incremental PCA (``ops/pca.py``), as in PEFT. Memory is ρ·r rows for each distinct
input, whatever the number of tokens; q, k and v see one tensor and share one decomposition. It ends when no component
that would be used turns further than τ from one batch to the next.

The sum of all ranks stays what the config says, but goes to the components, of all layers together, that explain most
of their layer's variance: a layer gets between no rank at all and ρ times its own.

Left out: what is done with them (``nn/eva.py``).
Shapes: T tokens of a batch, K inputs, R rank, C components.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import LoraConfig
from ..errors import UserError
from ..ops.pca import IncrementalPca
from ..settings import EvaConfig
from .linear import AdaptedLinear

_MAX_PASSES, _MAX_BATCHES = 3, 200
"""How often all batches are gone through at most, and how many runs that may be; directions that turn even then are
hardly better than their neighbours."""


@dataclass(frozen=True, slots=True, eq=False)
class EvaBatch:
    """A forward to watch."""

    run: Callable[[], object]
    """Puts the batch through the model."""
    counts_T: Tensor | None = None
    """Which of its tokens count, bool; None: every one."""


def eva_state(
    layers: Mapping[str, AdaptedLinear], config: LoraConfig, batches: Iterable[EvaBatch]
) -> dict[str, Tensor]:
    """name → A [rank, K] in float32, the rank being what redistribution gave the layer, perhaps 0.

    Raises ``UserError`` where there are no batches or layers, for layers that no batch reaches, for a rank beyond a
    layer's inputs, and where all batches together have fewer tokens than components are wanted.
    """
    settings = settings_of(config)
    first = next(iter(batches), None)
    if first is None or not layers:
        raise UserError("EVA has no data: give at least one batch" if layers else "EVA has no linear layers to start")
    leaders = _shared_inputs(layers, first)
    wanted: dict[str, int] = {}
    for name, leader in leaders.items():
        rank, width = config.rank_of(name), layers[name].in_features
        if rank > width:
            raise UserError(
                f"init_lora_weights='eva': {name} has {width} inputs and no rank {rank}; give {width} at most"
            )
        wanted[leader] = max(wanted.get(leader, 0), min(round(rank * settings.rho), width))
    pcas = {leader: IncrementalPca(num_components) for leader, num_components in wanted.items()}
    ranks = _observe(layers, leaders, pcas, batches, settings.tau, budget=sum(map(config.rank_of, layers)))
    return {name: _directions(pcas[leaders[name]], ranks[name], settings.whiten) for name in layers}


def _observe(
    layers: Mapping[str, AdaptedLinear],
    leaders: Mapping[str, str],
    pcas: Mapping[str, IncrementalPca],
    batches: Iterable[EvaBatch],
    tau: float,
    budget: int,
) -> dict[str, int]:
    """Run the batches, again and again, until the components in use have come to rest; returns everyone's rank."""
    turning, ranks, num_batches = set(pcas), dict[str, int](), 0
    for _ in range(_MAX_PASSES):
        for batch in batches:
            num_batches += 1
            with _hooks({name: layers[name] for name in turning}, _adding_to(pcas, batch.counts_T)):
                batch.run()
            if any(pca.num_rows == 0 for pca in pcas.values()):
                continue
            ranks = _share_out({name: pcas[leader].explained_C for name, leader in leaders.items()}, budget)
            turning = {n for n, pca in pcas.items() if not (pca.cosines_C[: ranks[n]] >= tau).all()}
            if not turning or num_batches >= _MAX_BATCHES:
                return ranks
        for name, pca in pcas.items():
            if pca.num_rows == 0:
                raise UserError(
                    f"EVA wants {pca.num_components} components of what {name} gets, and the data give it "
                    f"{pca.num_waiting} tokens that count; give more data, or a smaller r"
                )
    return ranks


def _share_out(explained: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Ranks that add up to the budget: each goes to the component that explains most of those left.

    Layers with one input have the same components, and the one named first is served first.
    """
    owners = torch.cat([torch.full((len(values),), i) for i, values in enumerate(explained.values())])
    order = torch.cat([values.cpu() for values in explained.values()]).argsort(descending=True, stable=True)
    counts = owners[order[:budget]].bincount(minlength=len(explained))
    return dict(zip(explained, counts.tolist(), strict=True))


def _directions(pca: IncrementalPca, rank: int, whiten: bool) -> Tensor:
    a_RK = pca.components_CK[:rank].clone()
    if whiten:
        root_R = pca.singular_C[:rank].sqrt()
        a_RK /= root_R.masked_fill(root_R == 0, 1)[:, None]
    return a_RK


def _shared_inputs(layers: Mapping[str, nn.Module], batch: EvaBatch) -> dict[str, str]:
    """Layer → the first layer that gets the very same tensor; those that lead come first, then those that follow."""
    leaders: dict[str, str] = {}
    seen: list[tuple[weakref.ref[Tensor], str]] = []  # weak: the tensors are not kept beyond their own time

    def look(name: str, x: Tensor) -> None:
        if name not in leaders:
            leaders[name] = next((leader for tensor, leader in reversed(seen) if tensor() is x), name)
            if leaders[name] == name:
                seen.append((weakref.ref(x), name))

    with _hooks(layers, look):
        batch.run()
    if missing := [name for name in layers if name not in leaders]:
        raise UserError(f"EVA: the first batch doesn't reach {missing[0]}; leave such modules out of target_modules")
    return {name: leaders[name] for name in sorted(leaders, key=lambda name: leaders[name] != name)}


def _adding_to(pcas: Mapping[str, IncrementalPca], counts_T: Tensor | None) -> Callable[[str, Tensor], None]:
    def add(name: str, x: Tensor) -> None:
        x_TK = x.reshape(-1, x.shape[-1])
        # A layer that sees only part of the tokens (an expert) no longer knows which: there all count.
        if counts_T is not None and len(counts_T) == len(x_TK):
            x_TK = x_TK[counts_T.to(x.device)]
        try:
            pcas[name].add(x_TK)
        except ValueError as error:
            raise UserError(f"EVA: {error} of what {name} gets; check the base and its dtype") from None

    return add


@contextmanager
def _hooks(layers: Mapping[str, nn.Module], look: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While open, ``look(name, input)`` is called whenever one of the layers is."""

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: look(name, args[0] if args else next(iter(kwargs.values())))

    handles = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def settings_of(config: LoraConfig) -> EvaConfig:
    """EVA's own part of a config with ``init_lora_weights="eva"``."""
    assert isinstance(config.eva_config, EvaConfig)  # the config's own check made it one
    return config.eva_config
