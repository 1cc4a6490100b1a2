"""Where a step's time goes, by part: torch's profiler, its events sorted by what they stand in.

Every event's own time (without its children's) belongs to the part that its name, or else the nearest name around it,
has in ``RULES``. Names come from

  torch      its operators, and autograd Functions with their backward (``_Adapted``, ``_AdaptedBackward``)
  modules    the forward of each module of the model: "module LlamaRMSNorm"
  bases      the two products of a frozen weight: "frozen product"
  kernels    compiled kernels of this project: "kernel norm_bf16"

A backward operator that stands in no Function of ours goes where the forward operator went that it belongs to.
What no operator and no kernel took is Python: the interpreter, dispatch, and memory that is handed out and back.
"""

from __future__ import annotations

import functools
import re
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

PRODUCTS = "frozen products"
LOW_RANK = "low-rank products"
ATTENTION = "attention"
NORMS = "norms"
ROTARY = "rotary embedding"
ACTIVATION = "activation"
LOSS = "loss, beyond its products"
OPTIMISER = "optimiser, clipping"
MODEL = "rest of the model"
PYTHON = "Python"
PARTS = (PRODUCTS, LOW_RANK, ATTENTION, NORMS, ROTARY, ACTIVATION, LOSS, OPTIMISER, MODEL, PYTHON)

RULES = (
    # torch's own operators, where they say enough by themselves; all others go by what they stand in
    (r"^mkldnn::_(linear_pointwise|mkl_linear)|^aten::mkldnn_linear", PRODUCTS),
    (r"^aten::(scaled_dot_product|_scaled_dot_product)", ATTENTION),
    (r"^aten::(native_layer_norm|rms_norm|_fused_rms_norm)", NORMS),
    (r"^aten::(silu|gelu)", ACTIVATION),
    (r"^aten::_fused_adam|^torch::autograd::AccumulateGrad|^Optimizer", OPTIMISER),
    (r"^aten::|^mkldnn::|^torch::|^autograd::", None),
    # modules: what their own operators do, beside those of the modules and Functions in them
    (r"^module .*rotary", ROTARY),
    (r"^module .*attention", ROTARY),  # the products and attention itself have names of their own
    (r"^module .*norm", NORMS),
    (r"^module .*(mlp|silu|gelu|activation)", ACTIVATION),
    (r"^module .*(linear|conv1d)", MODEL),
    (r"^module ", MODEL),
    # Functions, kernels, and what was given a name below
    (r"frozen product|frozen_?linear|packed_(product|linear)|gemm", PRODUCTS),
    (r"optimi[sz]er|adam|clip|get_total_norm", OPTIMISER),
    (r"cross_?entropy|loss|logits", LOSS),
    (r"rotary|rotate|rope", ROTARY),
    (r"attention|attend", ATTENTION),
    (r"norm(?!al)", NORMS),
    (r"silu|swiglu|gelu|gate|activation|mlp", ACTIVATION),
    (r"adapted|low_?rank|lora|dora|column_scale|dropout", LOW_RANK),
    (r"^kernel |^_[A-Z]\w*$", MODEL),
)
"""(pattern of a name, its part); the first that matches counts, None: the name around it decides. Without case."""


def take_apart(step: Callable[[], float], num_steps: int) -> dict[str, Any]:
    """Seconds of a step by part (means), the profiled step, the same without a profiler, calls a step."""
    from torch.profiler import ProfilerActivity, profile

    step()
    plain = []
    for _ in range(num_steps):
        started = time.perf_counter()
        step()
        plain.append(time.perf_counter() - started)
    _watch_modules()
    _watch_functions()
    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        started = time.perf_counter()
        for _ in range(num_steps):
            step()
        seconds = (time.perf_counter() - started) / num_steps
    parts = dict.fromkeys(PARTS, 0.0)
    events = [event for event in profiler.events() if event.device_type.name == "CPU"]
    forward = {e.sequence_nr: e for e in events if e.sequence_nr >= 0 and _node(e) is None}  # the last of a number
    for event in events:
        parts[_part(event, forward)] += event.self_cpu_time_total / 1e6 / num_steps
    parts[PYTHON] += seconds - sum(parts.values())
    return {
        "parts": parts,
        "seconds": seconds,
        "seconds_without_profiler": statistics.median(plain),
        "calls": sum(_is_call(event) and not _is_call(event.cpu_parent) for event in events) // num_steps,
    }


def _is_call(event: Any) -> bool:
    """Whether an event is an operator of torch or a kernel."""
    return event is not None and event.name.startswith(("aten::", "mkldnn::", "kernel "))


def _part(event: Any, forward: dict[int, Any]) -> str:
    """Where an event's own time counts."""
    if not _is_call(event) and not event.name.startswith(("torch::", "Optimizer")):
        return PYTHON  # a range's own time: its operators and kernels are events of their own
    node = _node(event)
    part = _named_part(event, within=node)
    if part is None and node is not None and node.sequence_nr in forward:
        part = _named_part(forward[node.sequence_nr])
    return part or MODEL


def _node(event: Any) -> Any:
    """The step of autograd's backward that an event stands in; None: it belongs to the forward."""
    while event is not None and not event.name.startswith("autograd::engine::evaluate_function"):
        event = event.cpu_parent
    return event


def _named_part(event: Any, within: Any = None) -> str | None:
    """By the nearest name that says something, from the event outwards."""
    while event is not None and event is not within:
        part = _rule(event.name)
        if part is not None:
            return part
        event = event.cpu_parent
    return None


@functools.cache
def _rule(name: str) -> str | None:
    return next((part for pattern, part in RULES if re.search(pattern, name, re.IGNORECASE)), None)


def watch_kernels() -> None:
    """Give every compiled kernel's calls a name. Before anything else asks for one."""
    try:
        from deltaw import kernels
    except ImportError:
        return
    find = kernels.function

    @functools.cache
    def function(name: str, signature: str) -> Any:
        kernel = find(name, signature)
        return None if kernel is None else _named(f"kernel {name}", kernel)

    kernels.function = function


def _watch_modules() -> None:
    """Give the forward of each module a name, from here on."""
    import torch
    from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

    open_ranges: list[Any] = []

    def enter(module: Any, args: Any) -> None:
        open_ranges.append(torch.profiler.record_function(f"module {type(module).__name__}"))
        open_ranges[-1].__enter__()

    def leave(module: Any, args: Any, output: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    register_module_forward_pre_hook(enter)
    register_module_forward_hook(leave, always_call=True)


def _watch_functions() -> None:
    """Name the two products of every kind of frozen weight, and the optimiser's three doings, from here on."""
    modules = [module for name, module in sys.modules.items() if name.startswith("deltaw.")]
    kinds = {kind for module in modules for kind in vars(module).values() if isinstance(kind, type)}
    for kind in kinds:
        for names, label in (
            (("multiply", "multiply_transposed"), "frozen product"),
            (("clip", "step", "load_state"), "optimizer"),
        ):
            if all(hasattr(kind, name) for name in names):
                for name in names:
                    if name in vars(kind):
                        setattr(kind, name, _named(label, vars(kind)[name]))


def _named(label: str, function: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(label):
            return function(*args, **kwargs)

    return call
