"""Loading in 4 bits never holds the dense model: measured, in a process of its own, on a model of a billion weights."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from deltaw.nn.load import skeleton

CONFIG = LlamaConfig(
    hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
    vocab_size=32000, dtype="bfloat16", architectures=["LlamaForCausalLM"],
)  # fmt: skip

CHILD = """
import json, sys, time
from deltaw.nn.load import base_bytes, load_base

def kilobytes(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1])

load_base(sys.argv[1], quantization="nf4")  # what the libraries hold, they hold before
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before, started = kilobytes("VmRSS"), time.perf_counter()
model, _ = load_base(sys.argv[2], quantization=sys.argv[3] if len(sys.argv) > 3 else None)
print(json.dumps({
    "bytes": base_bytes(model),
    "peak": 1024 * (kilobytes("VmHWM") - before),
    "seconds": time.perf_counter() - started,
}))
"""


def write_billion(folder, tokenizer_into, *, layers_a_shard=4):
    """Random weights in bfloat16, shard by shard; returns the largest tensor's bytes."""
    CONFIG.save_pretrained(folder)
    tokenizer_into(folder)
    tensors = dict(skeleton(folder).named_parameters())
    shards = {}
    for name in tensors:
        layer = int(name.split(".")[2]) // layers_a_shard if ".layers." in name else "rest"
        shards.setdefault(f"model-{layer}.safetensors", []).append(name)
    for file, names in shards.items():
        made = {n: torch.empty(tensors[n].shape, dtype=torch.bfloat16).normal_(std=0.02) for n in names}
        save_file(made, folder / file, metadata={"format": "pt"})
    places = {name: file for file, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return max(2 * p.numel() for p in tensors.values())


def measure(*args):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-W", "ignore", "-c", CHILD, *map(str, args)]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, check=True, text=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak can't be reset on this system")
def test_the_peak_is_the_4_bit_model_and_a_little(saved, tokenizer_into, tmp_path):
    warm_up, folder = saved("llama"), tmp_path / "billion"
    folder.mkdir()
    largest = write_billion(folder, tokenizer_into)
    found = measure(warm_up, folder, "nf4")
    assert sum(p.numel() for p in skeleton(folder).parameters()) > 10**9
    assert found["bytes"] < 0.8e9
    assert found["peak"] < found["bytes"] + 2 * largest + 300e6, found

    from deltaw import load_base
    from deltaw.nn.save_quantized import save_quantized

    model, tokenizer = load_base(folder, quantization="nf4")
    save_quantized(model, tokenizer, tmp_path / "stored", shard_size="200MB")
    again = measure(warm_up, tmp_path / "stored")
    assert again["bytes"] == found["bytes"] and again["peak"] < again["bytes"] + 2 * largest + 300e6, again
