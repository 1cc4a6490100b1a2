"""An adapter's files as they are read without a model: damaged, hostile, old, or with another's notes in them."""

import os
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from deltaw.adapters.peft_format import PICKLED_NAME, WEIGHTS_NAME, Provenance, load_adapter, read_adapter
from deltaw.config import CONFIG_NAME
from deltaw.errors import UserError
from deltaw.nn.walk import adapted_layers


@pytest.mark.parametrize("note", ["", "{", "[]", "3", '{"base_name": 3}', '{"x": 1}', "[" * 50_000])
def test_a_note_that_is_not_ours_is_no_note(saved, note):
    save_file(load_file(saved / WEIGHTS_NAME), saved / WEIGHTS_NAME, metadata={"deltaw": note})
    assert read_adapter(saved).provenance == Provenance()


def test_pickled_weights_are_read_as_data_only(tiny, ids, saved):
    expected = tiny()
    load_adapter(expected, saved)
    torch.save(load_file(saved / WEIGHTS_NAME), saved / PICKLED_NAME)
    (saved / WEIGHTS_NAME).unlink()
    model = tiny()
    load_adapter(model, saved)
    assert torch.equal(model(ids).logits, expected(ids).logits)
    assert read_adapter(saved).num_bytes == (saved / PICKLED_NAME).stat().st_size


class _Evil:
    def __reduce__(self):
        return os.mkdir, ("/tmp/deltaw-was-here",)


@pytest.mark.parametrize("content", [{"a": _Evil()}, [torch.ones(1)], {"a": 3}, b"", b"\x80\x02garbage", b"PK\x03\x04"])
def test_pickles_that_are_more_than_tensors_are_refused(saved, content):
    (saved / WEIGHTS_NAME).unlink()
    if isinstance(content, bytes):
        (saved / PICKLED_NAME).write_bytes(content)
    else:
        torch.save(content, saved / PICKLED_NAME)
    with pytest.raises(UserError, match=PICKLED_NAME):
        read_adapter(saved)
    assert not os.path.exists("/tmp/deltaw-was-here")


def test_a_folder_without_weights_says_so(saved):
    (saved / WEIGHTS_NAME).unlink()
    with pytest.raises(UserError, match=f"it has no {WEIGHTS_NAME} .found {CONFIG_NAME}"):
        read_adapter(saved)


def test_an_oversized_header_is_refused_before_memory_is_asked_for(saved):
    body = (saved / WEIGHTS_NAME).read_bytes()[8:]
    for length in (2**63, 2**40, 2**27, len(body) + 9):
        (saved / WEIGHTS_NAME).write_bytes(struct.pack("<Q", length) + body)
        with pytest.raises(UserError, match=r"not a (readable )?safetensors file"):
            read_adapter(saved)


@settings(deadline=5000, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_raise_nothing_but_user_errors(tiny, saved, data):
    name = data.draw(st.sampled_from([WEIGHTS_NAME, WEIGHTS_NAME, CONFIG_NAME]))
    whole = (saved / name).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little") if name == WEIGHTS_NAME else len(whole)
    damaged = bytearray(whole)
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(whole))) :]
    for _ in range(data.draw(st.integers(0, 3))):
        if damaged:
            damaged[data.draw(st.integers(0, min(header, len(damaged)) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (saved / name).write_bytes(bytes(damaged))
    model = tiny()
    try:
        load_adapter(model, saved)
    except UserError:
        assert not list(adapted_layers(model))
    finally:
        (saved / name).write_bytes(whole)
