"""PEFT's API under PEFT's names: what a script gets when its import changes from ``peft`` to ``deltaw``.

wrapper.py     PEFT's two modules around a model
model.py       PeftModel and its classes by task
get_model.py   get_peft_model
switching.py   the methods that add, switch, merge, blend and take out
rows.py        adapter_names: an adapter for each row of a batch
stored.py      adapters as files and as dicts of tensors
vocabulary.py  adapters of a base whose vocabulary has grown
auto.py        AutoPeftModel…: base and adapter from the adapter's folder
kbit.py        a quantised base made ready for training
loraplus.py    LoRA+'s optimiser
trainer.py     how transformers' Trainer recognises all this
"""

from .auto import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from .get_model import get_peft_model, inject_adapter_in_model
from .kbit import prepare_model_for_kbit_training
from .loraplus import create_loraplus_optimizer
from .model import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from .stored import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from .wrapper import LoraModel

__all__ = [
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "LoraModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "create_loraplus_optimizer",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "set_peft_model_state_dict",
]
