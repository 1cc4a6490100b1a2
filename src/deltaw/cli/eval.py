"""``deltaw eval``: loss and perplexity on held-out data, and the share of exact answers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from .options import parse
from .reading import HeldOutOptions


@dataclass(frozen=True, kw_only=True)
class Options(HeldOutOptions):
    """Measure a model, with or without an adapter, on data it has not seen.

    Loss and perplexity are means over all supervised tokens (never means of means). With --match, the model also
    answers every example greedily, and the share of exact answers is counted.
    """

    adapter: str | None = None
    """Adapter to measure, its folder or its name in a store; without one, the base."""
    match: Literal["none", "text", "json"] = "none"
    """Also compare generated answers: as text, or as JSON objects."""
    limit: int | None = None
    """Use only the first so many examples."""
    max_length: int = 1024
    """Tokens of one example beyond which it is cut."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """Tokens that count: the assistant's turns (completions), or all, whatever weight a turn has."""
    micro_batch_tokens: int = 2048
    """Tokens in one forward pass: memory against speed."""

    def __post_init__(self) -> None:
        from ..errors import UserError

        super().__post_init__()
        for name, least in (("limit", 1), ("max_length", 2), ("micro_batch_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} {value}: expected at least {least}")


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
        f"over {result['supervised_tokens']:,} supervised tokens of "
        f"{result['examples'] - result['unsupervised_examples']:,} examples"
    )
    if result["exact_match"] is not None:
        out.print(f"exact answers {result['exact_match']:.1%} of {result['examples']:,} examples")
    for line in _left_out(result, options.max_length):
        out.print(line, style="yellow", markup=False, soft_wrap=True)
    return 0


def _left_out(result: dict[str, Any], max_length: int) -> list[str]:
    """What of the data the loss has not seen, and what to do about it."""
    lines = []
    if cut := result["truncated_examples"]:
        lines.append(f"{_examples(cut)} longer than --max-length {max_length}: the loss has not seen what is behind it")
    if lost := result["unsupervised_examples"]:
        lines.append(
            f"{_examples(lost)} left out of the loss: nothing of the answer within --max-length {max_length} "
            f"(first: {result['first_unsupervised']}); raise it to count them"
        )
    return lines


def _examples(count: int) -> str:
    return f"{count:,} example is" if count == 1 else f"{count:,} examples are"


def evaluate(options: Options) -> dict[str, Any]:
    """Measure as the options say; plain JSON values."""
    from ..data.render import render_all
    from ..train.answers import answers, exact_match
    from ..train.evaluate import mean_loss
    from ..train.forward import examine
    from ..train.prepare import check_length
    from .models import load_model
    from .screen import counted

    examples = options.examples()[: options.limit]
    model, tokenizer = load_model(
        options.model,
        options.adapter,
        store=options.store,
        dtype=options.dtype,
        quantization=options.quantization,
        device=options.device,
        allow_other_base=options.allow_other_base,
    )
    check_length(model.config, options.max_length)
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
        "first_unsupervised": rendered.first_unsupervised,
        "exact_match": None if found is None else exact_match(found),
        "adapter": options.adapter,
    }
