"""``deltaw eval``: loss and perplexity on held-out data, and the share of exact answers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from .options import parse


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure a model, with or without an adapter, on data it has not seen.

    Loss and perplexity are means over all supervised tokens (never means of means). With --match, the model also
    answers every example greedily, and the share of exact answers is counted.
    """

    data: str
    """Held-out data: a file or a hub data set."""
    adapter: str | None = None
    """Adapter to measure; without one, the base."""
    model: str | None = None
    """Base model; by default the one that the adapter names."""
    match: Literal["none", "text", "json"] = "none"
    """Also compare generated answers: as text, or as JSON objects."""
    limit: int | None = None
    """Use only the first so many examples."""
    max_new_tokens: int = 256
    """Longest answer."""
    max_length: int = 1024
    """Tokens of one example beyond which it is cut."""
    data_format: Literal["auto", "chat", "prompt", "instruction", "text"] = "auto"
    """How to read the examples, where their keys don't say it."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """Tokens that count."""
    micro_batch_tokens: int = 2048
    """Tokens in one forward pass: memory against speed."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the base."""
    device: str = "auto"
    """cpu, cuda …; auto: CUDA where there is one."""
    json: bool = False
    """Print one JSON object."""


def main(args: list[str]) -> int:
    options = parse(Options, "eval", args)
    from .screen import out, print_json, quiet_libraries

    quiet_libraries()
    result = evaluate(options)
    if options.json:
        print_json(result)
        return 0
    out.print(
        f"loss {result['loss']:.4f}   perplexity {result['perplexity']:.3f}   "
        f"over {result['supervised_tokens']:,} supervised tokens of {result['examples']:,} examples"
    )
    if result["exact_match"] is not None:
        out.print(f"exact answers {result['exact_match']:.1%}")
    if result["truncated_examples"]:
        out.print(f"{result['truncated_examples']} examples were cut at {options.max_length} tokens", style="yellow")
    if result["unsupervised_examples"]:
        out.print(
            f"{result['unsupervised_examples']} of them had no supervised token left and count nowhere", style="yellow"
        )
    return 0


def evaluate(options: Options) -> dict[str, Any]:
    """Measure as the options say; plain JSON values."""
    from ..data.formats import load_examples
    from ..data.render import render_all
    from ..errors import UserError
    from ..train.answers import answers, exact_match
    from ..train.evaluate import mean_loss
    from ..train.forward import examine
    from ..train.run import check_length
    from .models import load_model
    from .screen import counted

    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit {options.limit}: expected at least 1")
    examples = load_examples(options.data, data_format=options.data_format, split="test")[: options.limit]
    model, tokenizer = load_model(options.model, options.adapter, dtype=options.dtype, device=options.device)
    check_length(model, options.max_length)
    with counted("data → tokens") as progress:
        rendered = render_all(
            examples, tokenizer, loss_on=options.loss_on, max_length=options.max_length, progress=progress
        )
    with counted("loss") as progress:
        loss, supervised = mean_loss(examine(model), rendered.examples, options.micro_batch_tokens, progress)
    found = None
    if options.match != "none":
        with counted("answers") as progress:
            found = answers(
                model,
                tokenizer,
                examples,
                match=options.match,
                max_new_tokens=options.max_new_tokens,
                progress=progress,
            )
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "supervised_tokens": supervised,
        "examples": rendered.num_examples,
        "truncated_examples": rendered.num_truncated,
        "unsupervised_examples": rendered.num_unsupervised_after_truncation,
        "exact_match": None if found is None else exact_match(found),
        "adapter": options.adapter,
    }
