"""PEFT's old ``.bin`` files: what torch's own reader makes of them, without an unpickler."""

import pytest
import torch
from torch import nn

from deltaw.adapters.pickled import read_pickled
from deltaw.errors import UserError

SHARED = torch.arange(12.0)
TENSORS = {
    "matrix": torch.randn(3, 5),
    "transposed": torch.randn(5, 3).T,
    "a view's middle": torch.randn(10, 4)[2:5, 1:3],
    "repeated": torch.ones(1, 1).expand(1, 1),
    "parameter": nn.Parameter(torch.randn(2, 2)),
    "one number": torch.tensor(3.0),
    "nothing": torch.empty(0, 4),
    "half": torch.randn(7).half(),
    "bfloat16": torch.randn(7, 3).bfloat16(),
    "double": torch.randn(3, dtype=torch.float64),
    "whole": torch.arange(5),
    "yes and no": torch.tensor([True, False, True]),
    "first half of a storage": SHARED[:6],
    "second half": SHARED[6:],
}


def test_every_kind_of_tensor_as_torch_reads_it(tmp_path):
    torch.save(TENSORS, tmp_path / "a.bin")
    theirs, ours = torch.load(tmp_path / "a.bin", weights_only=True), read_pickled(tmp_path / "a.bin")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor) and ours[name].dtype == tensor.dtype, name


def test_what_is_read_is_a_private_copy_of_the_file(tmp_path):
    torch.save({"a": torch.ones(4)}, tmp_path / "a.bin")
    read_pickled(tmp_path / "a.bin")["a"].zero_()
    assert torch.equal(read_pickled(tmp_path / "a.bin")["a"], torch.ones(4))


def test_the_format_of_torch_before_1_6_is_refused_by_name(tmp_path):
    torch.save({"a": torch.ones(4)}, tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"a.bin: not readable as tensors only: .*zip"):
        read_pickled(tmp_path / "a.bin")
