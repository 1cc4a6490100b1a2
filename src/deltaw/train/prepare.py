"""What a run is made from, read and rendered before anything is written: the data, then the base."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data.formats import Example, load_examples, sha256_of
from ..data.records import split_of
from ..data.render import Rendered, render_all
from ..errors import UserError
from ..nn.load import base_bytes, base_info, load_base, load_tokenizer
from ..nn.quantized import num_quantized
from . import checkpoint
from .options import TrainOptions

Counted = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
"""Opens a bar over slow work with this name, which is then told (done, total)."""

log = logging.getLogger("deltaw")


def uncounted(what: str) -> AbstractContextManager[Callable[[int, int], None]]:
    """No bar."""
    return nullcontext(lambda done, total: None)


@dataclass(frozen=True, kw_only=True)
class Data:
    """The data as the model will see them."""

    tokenizer: PreTrainedTokenizerBase
    train: Rendered
    eval: Rendered | None


@dataclass(frozen=True, kw_only=True)
class Prepared(Data):
    """Data and base; nothing written yet."""

    model: PreTrainedModel
    hashes: dict[str, str]
    """SHA-256 of each of what the run is made from: base, training data, held-out data."""
    base_bytes: int


def prepare_data(options: TrainOptions, counted: Counted = uncounted) -> Data:
    """Read the data and render them; of the base, only tokenizer and config are read."""
    examples = _read(options)
    log.info("read %d examples from %s", len(examples[0]), options.data)
    tokenizer, config = load_tokenizer(options.model)
    check_length(config, options.max_length)
    return _rendered(options, tokenizer, examples, counted)


def prepare(options: TrainOptions, counted: Counted = uncounted) -> Prepared:
    """Read the data, then the base, and render the one for the other."""
    examples = _read(options)
    log.info("read %d examples from %s; loading %s", len(examples[0]), options.data, options.model)
    with counted("loading the base") as progress:
        model, tokenizer = load_base(
            options.model,
            quantization=options.quantization,
            dtype=options.dtype,
            device=options.device,
            progress=progress,
        )
    if options.full and num_quantized(model):
        raise UserError(f"--full --model {options.model}: its weights are in 4 bits and can't train; give dense ones")
    check_length(model.config, options.max_length)
    hashes = {checkpoint.TRAINING_DATA: data_sha256(options)}
    if options.eval_data is not None:
        hashes[checkpoint.HELD_OUT_DATA] = sha256_of(options.eval_data, split=_eval_split(options))
    info = base_info(model)
    if info is not None:
        hashes[checkpoint.BASE] = info.sha256
    data = _rendered(options, tokenizer, examples, counted)
    return Prepared(**vars(data), model=model, hashes=hashes, base_bytes=base_bytes(model))


def data_sha256(options: TrainOptions) -> str:
    """Identity of the training data."""
    return sha256_of(options.data, split=_train_split(options))


def check_length(config: PreTrainedConfig, max_length: int) -> None:
    """Raises ``UserError`` for examples longer than the model can take."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and max_length > longest:
        raise UserError(f"--max-length {max_length}: the model takes at most {longest} tokens; lower it to that")


def data_warnings(data: Data) -> list[str]:
    """What happened to the data on its way to the model, in words; nothing is cut or left out unsaid."""
    out = []
    for name, part in (("training", data.train), ("held-out", data.eval)):
        if part is None:
            continue
        if part.num_truncated:
            out.append(
                f"{part.num_truncated} of {part.num_examples} {name} examples are longer than --max-length and lose "
                f"{part.truncated_tokens:,} tokens at their end"
            )
        if part.num_unsupervised_after_truncation:
            out.append(
                f"{part.num_unsupervised_after_truncation} {name} examples have no supervised token left and are "
                f"left out (first: {part.first_unsupervised}); a larger --max-length keeps them"
            )
    return out


def _read(options: TrainOptions) -> tuple[list[Example], list[Example] | None]:
    """Training and held-out examples."""
    if not options.data:
        raise UserError("--data: expected a JSONL, CSV or Parquet file, or a hub data set; give one")
    train = load_examples(options.data, data_format=options.data_format, split=_train_split(options))
    if options.eval_data is None:
        return train, None
    return train, load_examples(options.eval_data, data_format=options.data_format, split=_eval_split(options))


def _train_split(options: TrainOptions) -> str:
    return split_of(options.data, options.data_split, default="train", flag="--data-split")


def _eval_split(options: TrainOptions) -> str:
    return split_of(options.eval_data or "", options.eval_split, default="test", flag="--eval-split")


def _rendered(
    options: TrainOptions,
    tokenizer: PreTrainedTokenizerBase,
    examples: tuple[list[Example], list[Example] | None],
    counted: Counted,
) -> Data:
    def rendered(part: Sequence[Example], what: str) -> Rendered:
        with counted(what) as progress:
            return render_all(
                part, tokenizer, loss_on=options.loss_on, max_length=options.max_length, progress=progress
            )

    train, held_out = examples
    return Data(
        tokenizer=tokenizer,
        train=rendered(train, "training data → tokens"),
        eval=None if held_out is None else rendered(held_out, "held-out data → tokens"),
    )
