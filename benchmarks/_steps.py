"""One configuration of train_step.py in a process of its own: build it, then make a step whenever asked.

    python benchmarks/_steps.py '{"kind": "deltaw", …}'        (the fields of ``Setting``)

A line on standard input is a step, an answer on standard output its seconds and the process's peak memory so far. With
``breakdown`` set, the process answers once instead, with where the time of so many steps goes.

kinds
  floor    the frozen products that a step cannot do without, packed for the machine's library, and nothing else
  peft     PEFT's adapter on the plain transformers model, torch's AdamW
  full     the plain transformers model with every weight trained
  deltaw   what ``deltaw train`` does in a step, through the same ``Job``
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from _common import peak_rss_bytes, rss_bytes

RATE = 1e-4
FORWARD, BACKWARD = "forward", "backward"

Step = Callable[[], float]
"""Makes one step; returns its loss."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a worker is asked to build."""

    kind: str
    model: str
    """A name that ``deltaw.load_base`` knows, or a key of ``RANDOM_MODELS``."""
    dtype: str
    rows: int
    tokens: int
    """Of each row."""
    adapter: dict[str, Any] = field(default_factory=dict)
    """Fields of ``LoraConfig``."""
    options: dict[str, Any] = field(default_factory=dict)
    """Flags of ``deltaw train``."""
    breakdown: int = 0
    """Steps to take apart, instead of answering to standard input."""


def main() -> None:
    setting = Setting(**json.loads(sys.argv[1]))
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer

    def answer(**what: object) -> None:
        print(json.dumps(what), file=answers, flush=True)

    if setting.breakdown:
        from _breakdown import take_apart, watch_kernels

        watch_kernels()
        answer(**take_apart(build(setting), setting.breakdown))
        return
    step = build(setting)
    before = rss_bytes()
    loss = step()  # warm-up, which also allocates the optimiser's state
    answer(loss=loss, rss_before_bytes=before)
    for _ in sys.stdin:
        started = time.perf_counter()
        step()
        answer(seconds=time.perf_counter() - started, peak_rss_bytes=peak_rss_bytes())


def build(setting: Setting) -> Step:
    import torch

    model = load_model(setting.model, setting.dtype)
    torch.manual_seed(0)
    ids = torch.randint(10, model.config.vocab_size - 100, (setting.rows, setting.tokens))
    return {"floor": _floor, "peft": _peft, "full": _full, "deltaw": _deltaw}[setting.kind](setting, model, ids)


def _peft(setting: Setting, model: Any, ids: Any) -> Step:
    import peft

    config = peft.LoraConfig(task_type="CAUSAL_LM", **setting.adapter)
    return _plain_step(peft.get_peft_model(model, config).train(), ids)


def _full(setting: Setting, model: Any, ids: Any) -> Step:
    return _plain_step(model.requires_grad_(True).train(), ids)


def _plain_step(model: Any, ids: Any) -> Step:
    import torch

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def _deltaw(setting: Setting, model: Any, ids: Any) -> Step:
    from deltaw.data.render import Rendered, Tokens
    from deltaw.train.events import Stepped
    from deltaw.train.options import TrainOptions
    from deltaw.train.prepare import Prepared
    from deltaw.train.run import make_job

    learnt = [False] + [True] * (setting.tokens - 1)
    examples = [Tokens(input_ids=row, supervised=learnt, origin="benchmark") for row in ids.tolist()]
    rendered = Rendered(
        examples=examples,
        num_examples=len(examples),
        num_truncated=0,
        truncated_tokens=0,
        num_unsupervised_after_truncation=0,
        first_unsupervised=None,
    )
    options = TrainOptions(
        **{"max_steps": 10**6, "batch_size": len(examples), "micro_batch_tokens": ids.numel()},
        **{"learning_rate": RATE, "lr_scheduler": "constant", "warmup_steps": 0, "eval_every": 0, "save_every": 0},
        **setting.adapter,
        **setting.options,
    )
    tokenizer: Any = None  # the examples are tokens already
    prepared = Prepared(tokenizer=tokenizer, train=rendered, eval=None, model=model, hashes={}, base_bytes=0)
    events = make_job(options, prepared).run()

    def step() -> float:
        return next(event.loss for event in events if isinstance(event, Stepped))

    return step


def _floor(setting: Setting, model: Any, ids: Any) -> Step:
    import torch

    inputs: dict[int, Any] = {}
    packed = []
    for rows, weight_NK in _products(model, ids):
        x_TK = inputs.setdefault(weight_NK.shape[1], torch.randn(ids.numel(), weight_NK.shape[1]).to(weight_NK.dtype))
        packed.append((x_TK[:rows], torch.ops.mkldnn._reorder_linear_weight(weight_NK, rows)))
    del model

    def step() -> float:
        with torch.no_grad():
            for x_TK, weight in packed:
                torch.ops.mkldnn._linear_pointwise(x_TK, weight, None, "none", [], "")
        return 0.0

    return step


def _products(model: Any, ids: Any) -> Iterator[tuple[int, Any]]:
    """(rows, dense W [N, K]) of every frozen product of a step: y = x·Wᵀ, and dx = dy·W where dx is wanted.

    With an adapter beside every layer but the head, dx is wanted of all that lies behind the first adapter. Which that
    is, a small forward tells: every layer's output is made to want a gradient, and inputs are asked whether they do.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    wants_dx: dict[Any, bool] = {}

    def watch(module: Any, args: Any, output: Any) -> Any:
        wants_dx[module] = args[0].requires_grad
        return output if output.requires_grad else output.requires_grad_()

    head = model.get_output_embeddings()
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    handles = [module.register_forward_hook(watch) for module in linears]
    model(input_ids=ids[:1, :8])
    for handle in handles:
        handle.remove()
    predicted = ids.shape[0] * (ids.shape[1] - 1)
    for turn in (FORWARD, BACKWARD):
        for module in linears if turn == FORWARD else reversed(linears):
            weight_NK = module.weight.T if isinstance(module, Conv1D) else module.weight
            rows = predicted if module is head else ids.numel()
            if turn == FORWARD:
                yield rows, weight_NK.detach().contiguous()
            elif wants_dx[module]:
                yield rows, weight_NK.detach().T.contiguous()


def load_model(name: str, dtype: str) -> Any:
    """A frozen model: a real one by its name, or one with random weights, the same in every process."""
    import torch

    if name not in RANDOM_MODELS:
        from deltaw import load_base

        return load_base(name, dtype=dtype)[0]
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(RANDOM_MODELS[name](), dtype=getattr(torch, dtype))
    return model.requires_grad_(False).eval()


def _llama(**shape: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**shape, max_position_embeddings=2048, tie_word_embeddings=False, attention_bias=False)


def _gpt2() -> Any:
    """GPT-2 small; without the dropout of its own, which deltaw never applies to a frozen base."""
    from transformers import GPT2Config

    return GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


RANDOM_MODELS: dict[str, Callable[[], Any]] = {
    "Llama blocks": lambda: _llama(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32_000,
    ),
    "GPT-2": _gpt2,
    "tiny": lambda: _llama(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1_000,
    ),
}
"""Architectures whose figures don't depend on what the weights are."""


if __name__ == "__main__":
    main()
