"""Adapters that mean harm: an error that names the file and the reason, within a second, without asking for memory."""

import itertools
import json
import os
import pickle
import random
import struct
import time
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import deltaw
from deltaw.adapters.peft_format import PICKLED_NAME, WEIGHTS_NAME, load_adapter, read_adapter, save_adapter
from deltaw.config import CONFIG_NAME, read_config
from deltaw.errors import UserError
from deltaw.nn.inject import activate, inject
from deltaw.nn.walk import adapted_layers
from deltaw.targets import choose

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
CONFIG = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
ENDLESS = 10**12
settings.register_profile("hostile", derandomize=True, deadline=5000, suppress_health_check=list(HealthCheck))
FUZZ = settings(settings.get_profile("hostile"), max_examples=100)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / CONFIG_NAME).write_text(json.dumps(CONFIG))
    return tmp_path / "adapter"


def _peak_bytes(*, reset=False):
    """The most memory that this process ever had, since the last reset."""
    with suppress(OSError):
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


@contextmanager
def _at_once(seconds=1.0, num_bytes=100e6):
    """Little of this process's time, and little memory."""
    before, started = _peak_bytes(reset=True), time.process_time()
    yield
    assert time.process_time() - started < seconds
    assert _peak_bytes() - before < num_bytes


def _refused(folder, match=".", name=WEIGHTS_NAME):
    with _at_once(), pytest.raises(UserError, match=match) as caught:
        read_adapter(folder)
    message = str(caught.value)
    assert name in message and message.isprintable() and len(message) < 1000
    message.encode()


def _header(header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def _entry(dtype="F32", shape=(2, 2), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def _twice(second):
    return b"{%s:%s,%s:%s}" % tuple(json.dumps(part).encode() for part in (KEY, _entry(), KEY, second))


def _many(count):
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return ("{" + ",".join(f'"base_model.model.{i}":{entry}' for i in range(count)) + "}").encode()


HEADERS = {
    "empty": (b"", "header too small"),
    "seven bytes": (b"1234567", "claims"),
    "no header": (b"\0" * 8, "EOF"),
    "header shorter than it is": (_header({KEY: _entry()}, bytes(16), length=3), "EOF"),
    "header of 100 MB": (_header(b" " * 100_000_000), "claims 100,000,000 bytes"),
    "header of blanks": (_header(b" " * 30_000_000), "EOF"),
    "one text of 30 MB": (_header(b'{"a":"' + b"\\u0041" * 5_000_000 + b'"}'), "not a readable"),
    "deep lists": (_header(b"[" * 1_000_000), "not a readable"),
    "deep objects": (_header(b'{"a":' * 1_000_000), "recursion limit"),
    "not UTF-8": (_header(b'{"\xff":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'), "invalid UTF-8"),
    "half a surrogate": (_header(b'{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'), "hex escape"),
    "a name twice": (_header(_twice(_entry()), bytes(16)), "2 tensors under 1 names"),
    "a name twice, two places": (_header(_twice(_entry(offsets=(16, 32))), bytes(32)), "invalid offset"),
    "a hidden word": (_header(json.dumps({KEY: _entry()}).replace("_off", "\\u005foff").encode(), bytes(16)), "names"),
    "overlap": (_header({KEY: _entry(), KEY + "2": _entry(offsets=(8, 24))}, bytes(24)), "invalid offset"),
    "beyond the file": (_header({KEY: _entry()}, bytes(8)), "not fully covered"),
    "bytes left over": (_header({KEY: _entry()}, bytes(32)), "not fully covered"),
    "offsets backwards": (_header({KEY: _entry(offsets=(16, 0))}, bytes(16)), "invalid offset"),
    "shape and bytes disagree": (_header({KEY: _entry(shape=(3, 2))}, bytes(16)), "not a readable"),
    "overflowing shape": (_header({KEY: _entry(shape=(2**40, 2**40), offsets=(0, 0))}), "overflow"),
    "endless and empty": (_header({KEY: _entry(shape=(0, 2**64 - 1), offsets=(0, 0))}), "Overflow"),
    "negative": (_header({KEY: _entry(shape=(-1, 2))}), "invalid value"),
    "a million dimensions": (_header({KEY: _entry(shape=[1] * 10**6, offsets=(0, 4))}, bytes(4)), "1000000 dim"),
    "unknown type": (_header({KEY: _entry("\x1b[31m\n" + "x" * 10**6)}), "not a readable"),
    "4 bits": (_header({KEY: _entry("F4", offsets=(0, 2))}, bytes(2)), "float4"),
    "8 bits": (_header({KEY: _entry("F8_E4M3", offsets=(0, 4))}, bytes(4)), "float8.*expected float32"),
    "complex": (_header({KEY: _entry("C64", offsets=(0, 32))}, bytes(32)), "complex64"),
    "name of 10 MB": (_header({"base_model.model." + "k" * 10**7: _entry()}, bytes(16)), "no tensor's name"),
    "name that clears the screen": (_header({"\x1b[2J\n" + KEY: _entry()}, bytes(16)), "no tensor's name"),
    "tensors without end": (_header(_many(120_000)), "120,000 tensors"),
    "texts that are none": (_header({"__metadata__": ["a"], KEY: _entry()}, bytes(16)), "expected a map"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_lying_headers(folder, name):
    content, match = HEADERS[name]
    (folder / WEIGHTS_NAME).write_bytes(content)
    _refused(folder, match)


@pytest.mark.parametrize("note", ["[" * 10**6, json.dumps({"base_name": "x" * 10**6}), '{"versions": {"torch": [1]}}'])
def test_a_note_that_would_keep_a_reader_busy_is_no_note(folder, note):
    (folder / WEIGHTS_NAME).write_bytes(_header({"__metadata__": {"deltaw": note}, KEY: _entry()}, bytes(16)))
    with _at_once():
        assert read_adapter(folder).provenance == type(read_adapter(folder).provenance)()


def test_a_tensor_of_a_terabyte_is_only_looked_at(tiny, folder):
    start = _header({KEY: _entry(shape=(2, 2**37), offsets=(0, 2**40))})
    with (folder / WEIGHTS_NAME).open("wb") as file:
        file.write(start)
        with suppress(OSError):  # no file that large, nothing to be read
            file.truncate(len(start) + 2**40)
    model = tiny()
    with _at_once(), pytest.raises(UserError, match=r"137438953472|lora_B missing|not a readable"):
        load_adapter(model, folder)
    assert not list(adapted_layers(model))


# Pickles, instruction by instruction. "c" names a global, "(…t" is a tuple, "R" a call, "Q" a storage, "}" a dict.

TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
FLOATS = b"ctorch\nFloatStorage\n"


def _text(text):
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _int(number):
    return pickle.dumps(number, protocol=2)[2:-1]


def _storage(kind=FLOATS, name=None, numel=4):
    return b"(" + _text("storage") + kind + (_text("0") if name is None else name) + _text("cpu") + _int(numel) + b"tQ"


def _tensor(storage=None, offset=0, size=b"K\2K\2\x86", stride=b"K\2K\1\x86"):
    storage = _storage() if storage is None else storage
    return TENSOR + b"(" + storage + _int(offset) + size + stride + b"\x89ccollections\nOrderedDict\n)RtR"


def _dict(value=b"", key=None):
    return b"\x80\2}" + (_text(KEY) if key is None else key) + (value or _tensor()) + b"s."


def _bin(folder, pickled, data=bytes(16), *, compression=zipfile.ZIP_STORED, more=()):
    with zipfile.ZipFile(folder / PICKLED_NAME, "w", compression) as archive:
        for name, content in (("data.pkl", pickled), ("data/0", data), *more):
            archive.writestr(f"adapter/{name}", content)


def test_the_pickles_below_are_read_when_they_are_sound(folder):
    _bin(folder, _dict(), struct.pack("<4f", 1, 2, 3, 4))
    (parts,) = read_adapter(folder).factors.values()
    assert torch.equal(parts["lora_A"], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))


def _nested(depth):
    """A tuple of a tuple twice, of a tuple twice …: a hundred bytes that take 2**depth steps to hash or to show."""
    return b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(depth))


LONG_TUPLE = b"(" + b"K\1" * 1000 + b"t"
PICKLES = {
    "memory": (_dict(b"cbuiltins\nbytearray\n" + _int(ENDLESS) + b"\x85R"), "call of 'builtins bytearray'"),
    "a tensor of nothing": (_dict(b"ctorch\nFloatTensor\n" + _int(ENDLESS) + b"\x85R"), "call of 'torch FloatTensor'"),
    "code": (_dict(b"cos\nsystem\n" + _text("true") + b"\x85R"), "call of 'os system'"),
    "object": (_dict(b"cbuiltins\nobject\n)\x81"), "instruction NEWOBJ"),
    "state": (_dict(b"}" + _text("a") + b"b"), "instruction BUILD"),
    "protocol 4": (b"\x80\4\x95" + bytes(8) + b"\x8c\2os\x8c\6system\x93.", "instruction"),
    "a tuple's tuples as a key": (_dict(key=_nested(60)), "nested tuples"),
    "a tuple's tuples called": (_dict(_nested(60) + b")R"), "nested tuples"),
    "a tuple of tuples' tuples": (_dict(LONG_TUPLE), "nested tuples"),
    "only marks": (b"\x80\2" + b"(" * 500_000 + b".", "not readable"),
    "only lists": (b"\x80\2" + b"]" * 500_000 + b".", "instruction EMPTY_LIST"),
    "only dicts": (b"\x80\2" + b"}" * 500_000 + b".", "not readable"),
    "too long": (b"\x80\2" + b"}0" * 2_000_000 + b".", "data.pkl of at most"),
    "no end": (b"\x80\2}", "not readable"),
    "nothing": (b"", "not readable"),
    "no dict": (b"\x80\2K\1.", "expected a dict of tensors, found int"),
    "no tensors": (_dict(b"K\1"), "expected a dict of tensors"),
    "number as key": (_dict(key=b"K\1"), "keys that are no texts"),
    "memo never written": (_dict(b"h\7"), "not readable"),
    "storage elsewhere": (_dict(_tensor(_storage(name=_text("9")))), "data/9"),
    "storage by a tuple": (_dict(_tensor(_storage(name=b"K\1K\2\x86"))), "not readable"),
    "storage without end": (_dict(_tensor(_storage(numel=ENDLESS))), "a storage of 1000000000000 elements in 16"),
    "storage of less than nothing": (_dict(_tensor(_storage(numel=-4))), "a storage of -4 elements"),
    "storage of something else": (_dict(_tensor(_storage(b"ctorch\nUntypedStorage\n"))), "torch UntypedStorage"),
    "view without end": (_dict(_tensor(size=_int(ENDLESS) + b"K\2\x86", stride=b"K\0K\0\x86")), "in 4 elements"),
    "view beyond": (_dict(_tensor(offset=1)), "in 4 elements"),
    "view before": (_dict(_tensor(offset=-1)), "with strides"),
    "view backwards": (_dict(_tensor(stride=_int(-1) + b"K\1\x86")), "with strides"),
    "view of texts": (_dict(_tensor(size=_text("aaaa") + _int(10**9) + b"\x86")), "with strides"),
    "view without strides": (_dict(_tensor(stride=b")")), "not readable"),
}  # fmt: skip


@pytest.mark.parametrize("name", PICKLES)
def test_hostile_pickles(folder, name):
    pickled, match = PICKLES[name]
    _bin(folder, pickled)
    _refused(folder, match, PICKLED_NAME)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (dict(data=bytes(50_000_000), compression=zipfile.ZIP_DEFLATED), "compressed files"),
        (dict(more=[("byteorder", b"big")]), "big-endian"),
        (dict(more=[("byteorder", bytes(50_000_000))]), "big-endian"),
    ],
)
def test_hostile_zips(folder, more, match):
    _bin(folder, _dict(), **more)
    _refused(folder, match, PICKLED_NAME)


def test_a_zip_of_very_many_files(folder):
    entry = b"PK\1\2" + bytes(24) + struct.pack("<H", 3) + bytes(16) + b"a/b"
    directory = entry * 300_000
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 65535, 65535, len(directory), 0, 0)
    (folder / PICKLED_NAME).write_bytes(directory + end)
    _refused(folder, "more files than any adapter", PICKLED_NAME)


def _sound_bin(folder):
    tensors = {KEY: torch.ones(2, 32), KEY.replace("lora_A", "lora_B"): torch.ones(32, 2).T.contiguous().T}
    torch.save(tensors, folder / PICKLED_NAME)
    return (folder / PICKLED_NAME).read_bytes()


@FUZZ
@given(data=st.data())
def test_damaged_zips_raise_nothing_but_user_errors(folder, data):
    whole = bytearray(_sound_bin(folder))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    del whole[data.draw(st.integers(len(whole) // 2, len(whole))) :]
    (folder / PICKLED_NAME).write_bytes(bytes(whole))
    with suppress(UserError):
        assert read_adapter(folder).factors


WORDS = [b"}", b")", b"(", b"t", b"\x85", b"\x86", b"\x87", b"R", b"Q", b"s", b"u", b"q\0", b"q\1", b"h\0", b"h\1"]
WORDS += [b"K\1", b"K\4", b"N", b"\x88", _int(ENDLESS), _int(-1), _text("0"), _text("storage"), TENSOR, FLOATS]
WORDS += [_storage(), _tensor(), _text(KEY), b"ccollections\nOrderedDict\n", b"]", b".", b"0", b"\x81", b"b"]


@FUZZ
@given(words=st.lists(st.sampled_from(WORDS), max_size=40))
def test_arbitrary_instructions_raise_nothing_but_user_errors(folder, words):
    _bin(folder, b"\x80\2}" + b"".join(words) + b".")
    with suppress(UserError):
        read_adapter(folder)


NUMBER = st.sampled_from([0, 1, 2, 4, 16, 2**31, 2**63, 2**64 - 1, -1, 10**30, 1.5, None])
ENTRY = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "BF16", "I64", "BOOL", "F4", "C64", "U8", "F64", "", 3])},
    optional={
        "shape": st.lists(NUMBER, max_size=4) | NUMBER,
        "data_offsets": st.lists(NUMBER, max_size=3),
        "x": NUMBER,
    },
)
NAMES = st.sampled_from([KEY, KEY.replace("_A", "_B"), "base_model.model.x", "__metadata__", "", "\x00", "ä"])


@FUZZ
@given(header=st.dictionaries(NAMES, ENTRY | st.recursive(NUMBER, st.lists), max_size=4), num_bytes=st.integers(0, 64))
def test_arbitrary_headers_raise_nothing_but_user_errors(folder, header, num_bytes):
    (folder / WEIGHTS_NAME).write_bytes(_header(header, bytes(num_bytes)))
    with suppress(UserError):
        read_adapter(folder)


# Places

PLACES = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path),
    "folder": Path.mkdir,
    "nowhere": lambda path: path.symlink_to(path.parent / "nowhere"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME, PICKLED_NAME])
def test_places_that_are_no_files(folder, name, place):
    (folder / name).unlink(missing_ok=True)
    PLACES[place](folder / name)
    _refused(folder, name=name if name == CONFIG_NAME else WEIGHTS_NAME)


@pytest.mark.parametrize("place", [p for p in PLACES if p != "folder"])
def test_places_that_are_no_folders(tmp_path, place):
    PLACES[place](tmp_path / "adapter")
    _refused(tmp_path / "adapter", name="adapter")


def test_names_that_are_no_texts(tmp_path):
    folder = Path(os.fsdecode(bytes(tmp_path) + b"/\xff\n"))
    folder.mkdir()
    (folder / os.fsdecode(b"\xfe\x1b[2J\n")).touch()
    _refused(folder, "it has no", CONFIG_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps(CONFIG))
    (folder / WEIGHTS_NAME).write_bytes(b"")
    _refused(folder, "not a readable safetensors file")


# Configs

MODULES = [f"model.layers.{i}.{part}_proj" for i in range(30) for part in ("q", "k", "v", "gate", "up")]
NAMES_49K = [f"x{i}" for i in range(49_000)]
CONFIGS = {
    "lists": '{"x": [' + "[]," * 600_000 + "[]]}",
    "objects": '{"x": [' + '{"":{}},' * 250_000 + "[]]}",
    "layers": json.dumps(CONFIG | {"layers_to_transform": list(range(300_000))}),
    "layer of 4,000 digits": json.dumps(CONFIG | {"layers_to_transform": 10**4000}),
    "names of lists": json.dumps(CONFIG | {"layers_to_transform": [0], "layers_pattern": NAMES_49K}),
    "repeated repeats": json.dumps(CONFIG | {"target_modules": "(?:a{65535}){65535}"}),
    "deep repeats": json.dumps(CONFIG | {"target_modules": "(" * 90 + "a" + "+)" * 90}),
    "deep pairs": json.dumps(CONFIG | {"rank_pattern": {"(?:" * 20 + "a" + "{2})" * 20: 1}}),
    "long expression": json.dumps(CONFIG | {"target_modules": "|".join(["x.*y"] * 2000)}),
    "a gigabyte": b" " * 2**30,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_hostile_configs(folder, name):
    content, path = CONFIGS[name], folder / CONFIG_NAME
    if name == "a gigabyte":
        with path.open("wb") as file:
            file.truncate(2**30)
    else:
        path.write_text(content)
    with _at_once(), pytest.raises(UserError) as caught:
        choose(read_config(path), MODULES, MODULES, head=None, strict=False)
    assert len(str(caught.value)) < 1000 and str(caught.value).isprintable()


BESIDE_SOUND_WEIGHTS = {
    "tokens": dict(trainable_token_indices=list(range(200_000))),
    "tokens beyond": dict(trainable_token_indices=[10**30]),
    "token names": dict(trainable_token_indices={end: [1] for end in NAMES_49K[:5000]}),
    "parameters": dict(target_parameters=NAMES_49K),
    "every parameter": dict(target_parameters=[""]),
    "modules saved": dict(modules_to_save=["", *NAMES_49K[:100]]),
    "ranks": dict(rank_pattern=dict.fromkeys(NAMES_49K, 1) | {"q_proj": 3}),
    "expressions": dict(rank_pattern={f".*x{i}|q_proj": 3 for i in range(100)}),
    "targets": dict(target_modules=NAMES_49K),
    "left out": dict(exclude_modules=[*NAMES_49K, "q_proj"]),
    "rank 10⁹": dict(r=10**9),
    "4-bit start": dict(loftq_config={"loftq_bits": 10**9}),
}


@pytest.mark.parametrize("name", BESIDE_SOUND_WEIGHTS)
def test_hostile_configs_beside_sound_weights(tiny, folder, name):
    model = tiny()
    inject(model, deltaw.LoraConfig(r=2, target_modules=["q_proj"]))
    save_adapter(model, folder)
    config = CONFIG | BESIDE_SOUND_WEIGHTS[name]
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    model = tiny()
    with _at_once(), pytest.raises(UserError, match=str(folder)) as caught:
        load_adapter(model, folder)
    assert len(str(caught.value)) < 1000 and not list(adapted_layers(model))


@pytest.mark.parametrize("extra", [{}, {"a+": 1}, {"q_proj": 3, "layers.0.q_proj": 4}])
def test_patterns_for_all_modules_there_could_be_are_looked_up_at_once(extra):
    config = deltaw.LoraConfig(rank_pattern=dict.fromkeys(NAMES_49K, 1) | extra, alpha_pattern=extra)
    with _at_once():
        ranks = [config.rank_of(name) for name in MODULES for _ in range(3)]
    assert {*ranks} == ({8, 3} if "q_proj" in extra else {8})
    config.rank_pattern[r".*v_proj"] = 5  # noticed though the patterns were sorted already
    assert config.rank_of(MODULES[2]) == 5


# Power cuts

STEPS = ("open", "replace", "link", "unlink", "chmod", "fsync")


class PowerCut(BaseException):
    """From here on nothing reaches the disk, cleaning up neither."""


def test_a_power_cut_at_any_step_of_a_save_leaves_one_adapter_or_says_what_to_do(tiny, tmp_path, monkeypatch):
    model, seen = tiny(), []
    for name, alpha in (("old", 8), ("new", 99)):
        torch.manual_seed(alpha)
        inject(model, deltaw.LoraConfig(r=2, target_modules="qv", lora_alpha=alpha, init_lora_weights=False), name)
    activate(model, [])

    def generation(folder):
        stored = read_adapter(folder)
        (first, *_) = stored.factors.values()
        whose = [n for n in ("old", "new") if torch.equal(first["lora_A"], _first(model, n))]
        assert whose == [{8: "old", 99: "new"}[stored.config.lora_alpha]]
        return whose[0]

    for step in itertools.count(1):
        folder = save_adapter(model, tmp_path / str(step), "old")
        calls = itertools.count(1)

        def cut(real, calls=calls, step=step):
            def call(*args, **kwargs):
                if next(calls) >= step:
                    raise PowerCut
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in STEPS:
                patch.setattr(os, name, cut(getattr(os, name)))
            with suppress(PowerCut):
                save_adapter(model, folder, "new")
            is_done = next(calls) <= step
        try:
            seen.append(generation(folder))
        except UserError as error:
            told = str(error)
            seen.append("told" if "rename it so, or save the adapter again" in told else told)
            (waiting,) = [p for p in folder.glob(f".{CONFIG_NAME}.*") if p.name in told]
            waiting.rename(folder / CONFIG_NAME)
            assert generation(folder) == "new"
        save_adapter(model, folder, "new")
        assert generation(folder) == "new"
        if is_done:
            break
    order = [name for name, _ in itertools.groupby(seen)]
    assert order == ["old", "told", "new"] and len(seen) > 10


def _first(model, name):
    return next(layer.adapter(name).lora_A for _, layer in adapted_layers(model)).detach()


def test_a_config_that_was_edited_since_is_the_user_s_own_affair(tiny, tmp_path):
    model = tiny()
    inject(model, deltaw.LoraConfig(r=2, target_modules="qv"))
    path = save_adapter(model, tmp_path) / CONFIG_NAME
    path.write_text(path.read_text().replace('"lora_alpha": 8', '"lora_alpha": 4'))
    assert read_adapter(tmp_path).config.lora_alpha == 4


def test_arbitrary_bytes(folder):
    generator = random.Random(0)
    for name in (WEIGHTS_NAME, PICKLED_NAME, CONFIG_NAME):
        (folder / name).write_bytes(generator.randbytes(100_000))
        _refused(folder, name=name)
        (folder / name).unlink()
