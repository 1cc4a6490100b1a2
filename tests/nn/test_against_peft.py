"""Logits, gradients, dropout and counts equal real PEFT's, given equal factors."""

import peft
import pytest
import torch
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import deltaw
from deltaw.adapters.peft_format import adapter_tensors
from deltaw.nn.batch import Batch, batch
from deltaw.ops.dropout import DropoutKey

Q = {"llama": "q_proj", "qwen2": "q_proj", "gpt2": "c_attn"}
UP = {"llama": "up_proj", "qwen2": "up_proj", "gpt2": "c_fc"}
EMBEDDING = {"llama": "embed_tokens", "qwen2": "embed_tokens", "gpt2": "wte"}
NORM = {"llama": "norm", "qwen2": "norm", "gpt2": "ln_f"}
CONFIGS = {
    "lora": lambda a: {},
    "rslora": lambda a: dict(use_rslora=True),
    "dora": lambda a: dict(use_dora=True),
    "bias all": lambda a: dict(bias="all"),
    "bias lora_only": lambda a: dict(bias="lora_only"),
    "modules_to_save": lambda a: dict(target_modules=[Q[a]], modules_to_save=["lm_head"]),
    "saved norm with bias all": lambda a: dict(modules_to_save=[NORM[a]], bias="all"),
    "embedding": lambda a: dict(target_modules=[EMBEDDING[a], UP[a]]),
    "patterns": lambda a: dict(rank_pattern={Q[a]: 2}, alpha_pattern={UP[a]: 3, rf".*\.1\..*{Q[a]}": 9}),
    "head": lambda a: dict(target_modules=["lm_head", Q[a]]),
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set to", "ignore:Model has `tie_word_embeddings", "ignore:Setting `save_embedding"
)


def _config(architecture, name):
    return dict(r=4, lora_alpha=6, target_modules="all-linear") | CONFIGS[name](architecture)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients(twins, architecture, ids, name):
    if architecture == "llama" and "bias" in name:
        pytest.skip("no biases")
    pair = twins(architecture, **_config(architecture, name))
    logits = []
    for model in (pair.ours, pair.theirs):
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        logits.append(out.logits)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
    ours, theirs = pair.trainable("ours"), pair.trainable("theirs")
    for key, parameter in ours.items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, key
        torch.testing.assert_close(parameter.grad, theirs[key].grad, atol=1e-5, rtol=1e-5, msg=key)


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_and_the_line_that_tutorials_print(twins, architecture, capsys, name):
    if architecture == "llama" and "bias" in name:
        pytest.skip("no biases")
    pair = twins(architecture, **_config(architecture, name))
    assert pair.ours.get_nb_trainable_parameters() == pair.theirs.get_nb_trainable_parameters()
    pair.ours.print_trainable_parameters()
    ours = capsys.readouterr().out
    pair.theirs.print_trainable_parameters()
    assert ours == capsys.readouterr().out


class _OurMask(nn.Module):
    """Our dropout in the place of PEFT's."""

    def __init__(self, key, p, name):
        super().__init__()
        self.key, self.p, self.name = key, p, name

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        return (rows * self.key.mask(self.p, self.name, 0).scale_for(rows)).view(x.shape)


def test_dropout_with_equal_masks(twins, architecture, ids):
    pair = twins(architecture, **_config(architecture, "lora"), lora_dropout=0.4)
    key = DropoutKey(seed=5, step=2)
    for name, module in pair.theirs.base_model.model.named_modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = _OurMask(key, 0.4, name)
    dropped = []
    with batch(Batch(dropout=key)):
        for model in (pair.ours, pair.theirs):
            for module in model.modules():
                # The adapters' dropout alone: the base's own (GPT-2 has some) would draw from torch's generator.
                module.training = hasattr(module, "lora_dropout") or isinstance(module, deltaw.nn.linear.AdaptedLinear)
            dropped.append(model(input_ids=ids, labels=ids))
            dropped[-1].loss.backward()
    torch.testing.assert_close(dropped[0].logits, dropped[1].logits, atol=1e-5, rtol=1e-5)
    ours, theirs = pair.trainable("ours"), pair.trainable("theirs")
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-5, rtol=1e-5, msg=name)
    plain = pair.ours.eval()(input_ids=ids).logits
    assert (plain - dropped[0].logits).abs().max() > 1e-3


def test_dropout_outside_our_loop_follows_torch_s_generator(twins, ids):
    model = twins("llama", **_config("llama", "lora"), lora_dropout=0.4).ours.train()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(model(input_ids=ids).logits)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_scaled_embedding_of_gemma3():
    def base():
        torch.manual_seed(0)
        sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, head_dim=16)
        return Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=64, num_key_value_heads=1, **sizes)).eval()

    config = dict(r=2, target_modules=["embed_tokens"], init_lora_weights=False)
    ours = deltaw.get_peft_model(base(), deltaw.LoraConfig(**config))
    theirs = peft.get_peft_model(base(), peft.LoraConfig(**config))
    peft.set_peft_model_state_dict(theirs, adapter_tensors(ours.base_model))
    ids = torch.arange(8)[None]
    assert not torch.equal(ours(input_ids=ids).logits, base()(input_ids=ids).logits)
    torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
