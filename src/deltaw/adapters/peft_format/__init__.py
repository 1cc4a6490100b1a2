"""PEFT's two files, ``adapter_config.json`` and ``adapter_model.safetensors``.

keys.py          PEFT's keys, and nowhere else
provenance.py    what this project adds in the header: hashes of base and data, versions
state_dict.py    an adapter of a model as tensors under those keys, and back
save.py          the files, both or neither
read.py          the files without any model
experts.py       adapters from before experts were fused, in today's form
match.py         what a file's tensors are in a model; every mismatch named
load.py          a stored adapter into a model, with a receipt

Writing is atomic; reading maps the file and copies nothing that is only used.

Reading is strict both ways: a tensor that nothing takes, or a module whose tensor is missing, is an error that names
it. The well-known silent failure, a mismatched prefix that serves the bare base, can't happen here.
"""

from .keys import PICKLED_NAME, PREFIX, WEIGHTS_NAME
from .load import TAKEN_OFF, Receipt, load_adapter
from .provenance import Provenance
from .read import StoredAdapter, read_adapter
from .save import save_adapter, write_adapter
from .state_dict import adapter_tensors, set_adapter_tensors

__all__ = [
    "PICKLED_NAME",
    "PREFIX",
    "TAKEN_OFF",
    "WEIGHTS_NAME",
    "Provenance",
    "Receipt",
    "StoredAdapter",
    "adapter_tensors",
    "load_adapter",
    "read_adapter",
    "save_adapter",
    "set_adapter_tensors",
    "write_adapter",
]
