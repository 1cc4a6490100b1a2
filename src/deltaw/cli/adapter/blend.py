"""``deltaw adapter blend``: one adapter out of several, with what that changes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from ..options import parse
from ..reading import BaseOptions

if TYPE_CHECKING:
    from ...adapters.blend import Recipe
    from ...adapters.parity import Parity
    from ...adapters.peft_format import StoredAdapter


@dataclass(frozen=True, kw_only=True)
class Options(BaseOptions):
    """Make one adapter out of several: deltaw adapter blend runs/a=0.7 runs/b=0.3 --out c

    --method cat, the default, is the weighted sum Σ w·ΔW and nothing else, at the sum of the ranks; svd is the best
    approximation of it at a smaller rank (--svd-rank). The other methods are PEFT's, by its names and numbers: linear
    mixes factors, whose product has cross terms that belong to no adapter; magnitude_prune, ties, dare_linear and
    dare_ties prune (--density) before they mix; with _svd behind them they do so on whole ΔW's. Weights may be
    negative.

    The result is compared with Σ w·ΔW, from the factors, and with all adapters active at once at their weights, on
    real text. cat must say the same, svd nearly so; of the others the figures are told. They stand beside the result
    (parity.json), too.
    """

    adapters: tyro.conf.Positional[tuple[str, ...]]
    """ADAPTER=WEIGHT, two or more; an adapter is its folder, a hub id, or a name in the store."""
    out: Path
    """Folder for the result; it must not exist yet."""
    method: Literal[
        "cat",
        "svd",
        "linear",
        "magnitude_prune",
        "ties",
        "dare_linear",
        "dare_ties",
        "magnitude_prune_svd",
        "ties_svd",
        "dare_linear_svd",
        "dare_ties_svd",
    ] = "cat"
    """How they become one."""
    density: float | None = None
    """Share of entries that are kept, for the methods that prune: over 0, up to 1."""
    majority_sign_method: Literal["total", "frequency"] = "total"
    """How ties elects a sign: by the total of the entries, or by how often it occurs."""
    svd_rank: int | None = None
    """Rank of the result, for svd and the methods on whole ΔW's; the largest of the adapters' where none is given."""
    svd_clamp: float | None = None
    """Quantile at which these methods clamp the result's factors: over 0.5, up to 1."""
    seed: int = 0
    """What dare drops."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Number format to compare in. float32 leaves rounding out of the figures; auto, the base's own, may take half the
    memory."""
    tokens: int = 512
    """Tokens of text to compare on; more than the text has means all of it."""
    allow_loss: bool = False
    """Keep the result even if it differs from its source by more than is tolerated."""
    skip_parity: bool = False
    """Compare factors only, and load no base: for adapters whose base is not on this machine."""
    json: bool = False
    """Print one JSON object."""

    def __post_init__(self) -> None:
        from ...errors import UserError

        if self.tokens < 2:
            raise UserError(f"--tokens {self.tokens}: expected at least 2")
        if len(self.adapters) < 2:
            raise UserError(f"{len(self.adapters)} adapters to blend: expected two or more, such as a=0.7 b=0.3")


def main(args: list[str]) -> int:
    options = parse(Options, "adapter blend", args)
    from ..program import command
    from ..screen import duration, out, print_json, quiet_libraries, size

    quiet_libraries()
    result = blend_to_folder(options)
    if options.json:
        print_json(result)
        return 0
    facts = f"rank {result['rank']} on {result['modules']} modules, {size(result['bytes'])}"
    what = " + ".join(f"{weight:g}·{name}" for name, weight in result["weights"])
    out.print(
        f"{what} by {options.method} → {options.out} ({facts}, {duration(result['seconds'])})",
        markup=False,
        soft_wrap=True,
    )
    distance = "infinitely" if result["distance"] is None else f"{result['distance']:.2g}"
    out.print(f"‖ΔW − Σ w·ΔW‖ / ‖Σ w·ΔW‖ = {distance} (most at {result['worst']})", markup=False, soft_wrap=True)
    if result["text"] is None:
        out.print("no logits were compared (--skip-parity)")
    else:
        out.print(f"against all of them active at their weights: {result['text']}", markup=False, soft_wrap=True)
    if result["passed"] is False:
        out.print("kept although that is more than is tolerated (--allow-loss)", style="yellow", soft_wrap=True)
    out.print(f"Next: {command('chat', '--adapter', options.out)}", markup=False, soft_wrap=True)
    return 0


def blend_to_folder(options: Options) -> dict[str, Any]:
    """Blend, write, read again, compare, keep; plain JSON values."""
    import dataclasses

    import torch

    from ...adapters import parity
    from ...adapters.blend import Recipe
    from ...adapters.blend_files import blend_stored
    from ...adapters.peft_format import read_adapter, write_adapter
    from ...adapters.store import locate_adapter
    from ...errors import UserError
    from ...files import new_folder
    from ..screen import counted

    started = time.perf_counter()
    if options.out.exists() or options.out.is_symlink():
        raise UserError(f"--out {options.out}: exists already; give a new folder, or remove that one")
    recipe = Recipe(
        method=options.method,
        svd_rank=options.svd_rank,
        svd_clamp=options.svd_clamp,
        density=options.density,
        majority_sign_method=options.majority_sign_method,
    )
    weighted = [_weighted(text) for text in options.adapters]
    stored = [read_adapter(locate_adapter(name, options.store)) for name, _ in weighted]
    weights = [weight for _, weight in weighted]
    torch.manual_seed(options.seed)
    with counted("blending") as progress:
        blended = blend_stored(stored, weights, recipe, allow_other_base=options.allow_other_base, progress=progress)
    said = " ".join(f"{weight:g}·{_hash(part)[:16]}" for weight, part in zip(weights, stored, strict=True))
    history = blended.adapter.provenance.after(f"blend {options.method} of {said}")
    facts = {
        "step": "blend",
        "weights": weighted,
        "recipe": {**dataclasses.asdict(recipe), "seed": options.seed},
        "rank": blended.adapter.config.r,
        "modules": len(blended.adapter.factors),
        "distance": blended.distance,
        "worst": blended.worst[0],
    }
    with new_folder(options.out) as scratch:
        write_adapter(dataclasses.replace(blended.adapter, provenance=history), scratch)
        written = read_adapter(scratch)
        text = None
        if options.skip_parity:
            report = parity.without(**facts)
        else:
            found = _compare(stored, weights, written, options)
            tolerance = _tolerance(recipe, found)
            parity.require(found, tolerance, allow=options.allow_loss, what="blend")
            report, text = parity.report(found, tolerance, **facts), str(found)
        parity.write_report(scratch, report)
    sizes = {"bytes": written.num_bytes, "seconds": round(time.perf_counter() - started, 3)}
    return report | sizes | {"out": str(options.out), "text": text}


def _weighted(text: str) -> tuple[str, float]:
    """(adapter, weight) of ADAPTER=WEIGHT."""
    from ...errors import UserError

    name, _, weight = text.rpartition("=")
    try:
        if not name:
            raise ValueError
        return name, float(weight)
    except ValueError:
        raise UserError(f"{text}: expected ADAPTER=WEIGHT, such as runs/a=0.7") from None


def _tolerance(recipe: Recipe, found: Parity) -> Any:
    import torch

    from ...adapters import parity

    if recipe.method == "cat":
        return parity.tolerance_for(getattr(torch, found.dtype))
    return parity.LOSSY if recipe.method == "svd" else parity.OTHER


def _compare(stored: list[StoredAdapter], weights: list[float], written: StoredAdapter, options: Options) -> Parity:
    """All adapters at once, each at its weight, which is Σ w·ΔW exactly; and what was written, on the same text."""
    from ...adapters import parity
    from ...adapters.peft_format import load_adapter
    from ...nn.inject import activate, restore
    from ...nn.walk import adapted_layers
    from ..models import base_of, load_model
    from ..screen import err

    network, tokenizer = load_model(
        options.model or base_of(stored[0]),
        None,
        dtype=options.dtype,
        quantization=options.quantization,
        device=options.device,
    )
    ids = parity.reference_ids(tokenizer, options.tokens)
    with err.status("the adapters at their weights, on text"):
        base_TS = parity.sampled_logits(network, ids)
        names = [f"part{i}" for i in range(len(stored))]
        for name, part, weight in zip(names, stored, weights, strict=True):
            load_adapter(network, part, name, allow_other_base=options.allow_other_base)
            for _, layer in adapted_layers(network):
                if name in layer.adapters:
                    layer.adapter(name).scaling *= weight
        activate(network, names)
        source_TV = parity.reference_logits(network, ids)
    with err.status("the result, on the same text"):
        for name in names:
            restore(network, name)
        load_adapter(network, written, "result", allow_other_base=options.allow_other_base)
        result = parity.window_logits(network, ids)
        return parity.parity_of(source_TV, result, base_TS=base_TS, dtype=network.dtype)


def _hash(stored: StoredAdapter) -> str:
    from ...adapters.store.content import content_hash

    return content_hash(stored.path)
