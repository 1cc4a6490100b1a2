"""A tokenizer as llama.cpp's metadata.

Two kinds of byte-pair encoding are known by what ``tokenizer.json`` says of them:

    gpt2    pieces of text, cut by a regular expression, as bytes; merges by rank. The expression has a name in
            llama.cpp, and one without a name is refused.
    llama   SentencePiece: ▁ for a space, ``<0x0A>`` for a byte without a piece. llama.cpp joins what gives the piece
            with the best score; here a piece's score is minus the rank of the first merge that makes it.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType
from transformers import PreTrainedTokenizerBase

from ...errors import UserError, short

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_EXPRESSIONS = {_WORDS % "": "qwen2", _WORDS % "{1,3}": "llama-bpe", _TEKKEN: "tekken"}
_LAST = -1e6
"""Score of a piece that no merge makes."""


def write_vocabulary(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, num_rows: int) -> None:
    """Tokens, their kinds, merges or scores, special tokens, chat template; ``num_rows`` of the embedding are named.

    Raises ``UserError`` for a tokenizer of another kind, or with more tokens than the model.
    """
    told = _told(tokenizer)
    is_sentencepiece = bool(told["model"].get("byte_fallback"))
    if told["model"]["type"] != "BPE":
        raise UserError(f"a tokenizer of type {told['model']['type']}; export to GGUF knows byte-pair encoding only")
    tokens, kinds = _tokens(tokenizer, num_rows, is_sentencepiece=is_sentencepiece)
    if is_sentencepiece:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre(cut_name(tokenizer))
        writer.add_token_list(tokens)
        writer.add_token_scores(_scores(told["model"]["merges"], tokens))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(cut_name(tokenizer))
        writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(is_sentencepiece and _begins_with_space(told))
    special = _special(tokenizer, num_rows, merges=not is_sentencepiece)
    special.add_to_gguf(writer, quiet=True)


def _told(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What ``tokenizer.json`` says."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError("the tokenizer has no tokenizer.json; export needs one")
    told: dict[str, Any] = json.loads(backend.to_str())
    return told


def _tokens(
    tokenizer: PreTrainedTokenizerBase, num_rows: int, *, is_sentencepiece: bool
) -> tuple[list[str], list[TokenType]]:
    """Text and kind of every row; rows beyond the tokenizer's last token are unused."""
    by_id = {i: text for text, i in tokenizer.get_vocab().items()}
    if max(by_id) >= num_rows:
        raise UserError(f"the tokenizer has {max(by_id) + 1:,} tokens and the model {num_rows:,}; give the model's own")
    added: dict[int, Any] = tokenizer.added_tokens_decoder
    unknown = tokenizer.unk_token_id if is_sentencepiece else None
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(num_rows)]
    kinds = []
    for i, text in enumerate(tokens):
        if i not in by_id:
            kinds.append(TokenType.UNUSED)
        elif i == unknown:
            kinds.append(TokenType.UNKNOWN)
        elif i in added:
            kinds.append(TokenType.CONTROL if added[i].special else TokenType.USER_DEFINED)
            if is_sentencepiece and not added[i].special:
                tokens[i] = text.replace("▁", " ")  # such tokens are looked for in the text as it came
        elif is_sentencepiece and re.fullmatch("<0x[0-9A-F]{2}>", text):
            kinds.append(TokenType.BYTE)
        else:
            kinds.append(TokenType.NORMAL)
    return tokens, kinds


def _scores(merges: list[Any], tokens: list[str]) -> list[float]:
    first: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        first.setdefault("".join(pair), rank)
    return [float(-first[text]) if text in first else _LAST for text in tokens]


def cut_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """llama.cpp's name of the way in which text is cut before it is encoded; ``UserError`` where there is none."""
    told = _told(tokenizer)
    if told["model"].get("byte_fallback"):
        return "default"
    cut = told.get("pre_tokenizer") or {}
    parts = cut.get("pretokenizers", [cut])
    kinds = [part.get("type") for part in parts]
    last = parts[-1]
    if kinds[-1:] == ["ByteLevel"] and not last.get("add_prefix_space"):
        if kinds == ["ByteLevel"] and last.get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and last.get("use_regex", True):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and parts[0].get("behavior") == "Isolated" and not parts[0].get("invert"):
            name = _EXPRESSIONS.get(parts[0]["pattern"].get("Regex", ""))
            if name is not None and not last.get("use_regex", True):
                return name
    raise UserError(
        f"the tokenizer cuts text in a way that has no known name in llama.cpp ({short(cut, 200)}); export the adapter "
        "alone, for a GGUF of the base that others converted"
    )


def _begins_with_space(told: dict[str, Any]) -> bool:
    """Whether a text is encoded as if a space stood before it."""
    normalizer, cut = told.get("normalizer") or {}, told.get("pre_tokenizer") or {}
    parts = [*normalizer.get("normalizers", [normalizer]), *cut.get("pretokenizers", [cut])]
    return any(
        part.get("type") == "Prepend" or (part.get("type") == "Metaspace" and part.get("prepend_scheme") != "never")
        for part in parts
    )


def _special(tokenizer: PreTrainedTokenizerBase, num_rows: int, *, merges: bool) -> SpecialVocab:
    """Special tokens, merges and chat template, as the gguf package reads them from files."""
    with tempfile.TemporaryDirectory(prefix="deltaw-") as folder:
        tokenizer.save_pretrained(folder)
        special = SpecialVocab(Path(folder), load_merges=merges, n_vocab=num_rows)
    # What it does to a text is asked of the tokenizer itself: some templates are more than that class reads.
    whole: list[int] = tokenizer("a")["input_ids"]
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    start = next((whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare), [])
    end = whole[len(start) + len(bare) :]
    if start not in ([], [tokenizer.bos_token_id]) or end not in ([], [tokenizer.eos_token_id]):
        raise UserError(f"the tokenizer puts tokens {start} before a text and {end} behind it; GGUF knows BOS and EOS")
    special.add_special_token = {"bos": bool(start), "eos": bool(end)}
    return special
