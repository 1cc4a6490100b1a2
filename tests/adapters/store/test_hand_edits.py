"""People lay folders into a store, rename, cut off, link and edit: each is one line, and hides nothing else."""

import json
import os
import shutil

import pytest

from deltaw.adapters.store import Store, shown
from deltaw.errors import UserError

STATE = "current.json"


def _problems(store, name, **options):
    entries = {entry.name: entry for entry in store.entries(**options)}
    assert entries["sound"].version is not None and entries["sound"].problems == ()
    assert all("\n" not in problem for problem in entries[name].problems)
    return entries[name].problems


@pytest.fixture
def sound(store, make, three):
    """A sound name beside those that are damaged."""
    return store.publish(make("sound", 9), "sound")


def test_a_plain_adapter_laid_there_by_hand_is_listed_and_found(store, make, sound):
    shutil.copytree(make("plain", 5), store.path / "plain")
    entry = next(entry for entry in store.entries(check=True) if entry.name == "plain")
    assert entry.problems == () and entry.num_versions == 1
    assert entry.version.published_at is None and entry.version.about.r == 2
    version = store.resolve("plain")
    assert version.path == store.path / "plain" and version == entry.version == store.resolve(str(version))
    assert store.versions("plain") == [version] and store.line("plain") == [version.sha256]
    assert version.sha256 == store.publish(make("plain", 5), "other").sha256
    with pytest.raises(UserError, match="no such version or tag"):
        store.resolve("plain@prod")
    for change in (lambda: store.rollback("plain"), lambda: store.tag("plain", "prod")):
        with pytest.raises(UserError, match="laid there by hand, which has no versions; publish it"):
            change()
    with pytest.raises(UserError, match="laid there by hand; move it away, then publish it"):
        store.publish(make("plain", 5), "plain")
    generation = store.generation("plain")
    shutil.copy(make("v7", 7) / "adapter_model.safetensors", store.path / "plain")
    assert store.generation("plain") != generation
    assert store.collect_garbage(keep=1)[0].path.parent.name == "tickets" and (store.path / "plain").is_dir()
    store.remove("plain")
    assert "plain" not in store.names()


def test_a_plain_adapter_that_is_none(store, make, sound):
    plain = store.path / "plain"
    shutil.copytree(make("plain", 5), plain)
    (plain / "adapter_model.safetensors").write_bytes(b"\0" * 20)
    assert "not a readable safetensors file" in _problems(store, "plain")[0]
    (plain / "adapter_model.safetensors").unlink()
    os.symlink(make("elsewhere") / "adapter_model.safetensors", plain / "adapter_model.safetensors")
    assert "a link out of its folder; copy the file there instead" in _problems(store, "plain")[0]
    with pytest.raises(UserError, match="a link out of its folder"):
        store.resolve("plain")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "not readable as JSON"),
        ("{", "not readable as JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "its versions are none"),
        (b"\xff\xfe", "not readable as JSON"),
        ("[" * 100_000, "lists and objects|not readable"),
        (" " * (3 * 2**20), "bytes are not"),
        ({"format": 2}, "written by a newer deltaw .format 2.; upgrade"),
        ({"versions": ["../../etc"]}, "its versions are none, or not each a SHA-256"),
        ({"versions": 5}, "its versions are none"),
        ({"line": []}, "its line of current versions is empty"),
        ({"line": ["0" * 64]}, "some that it doesn't know"),
        ({"tags": {"prod": "0" * 64}}, "its tags are none, or of versions"),
        ({"tags": {"../x": None}}, "its tags are none"),
        ({"tags": []}, "its tags are none"),
        ({"generation": "x"}, "its generation is no whole number"),
        (None, "not readable as JSON"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_damaged_state_is_told_and_mended(store, three, sound, content, match):
    path = store.path / "tickets" / STATE
    if isinstance(content, dict):
        path.write_text(json.dumps(json.loads(path.read_text()) | content))
    elif content is None:
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (problem,) = _problems(store, "tickets")
    with pytest.raises(UserError, match=match):
        raise UserError(problem)
    assert "rollback tickets --to VERSION" in problem and shown(three[0]) in problem
    assert "tickets" in store.names()
    for change in (
        lambda: store.resolve("tickets"),
        lambda: store.versions("tickets"),
        lambda: store.rollback("tickets"),
        lambda: store.remove(f"tickets@{three[0]}"),
    ):
        with pytest.raises(UserError, match=match):
            change()
    assert store.collect_garbage() == []  # of a damaged name nothing is garbage
    if content is not None:
        assert store.rollback("tickets", three[1][:7]).sha256 == three[1]
        assert store.resolve("tickets").sha256 == three[1] and len(store.versions("tickets")) == 3
        assert _problems(store, "tickets", check=True) == ()
    store.remove("tickets")


def _cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _link(path, to):
    shutil.move(path, to)
    os.symlink(to, path)


WEIGHTS = "adapter_model.safetensors"
DAMAGES = [
    (shutil.rmtree, "its folder is missing"),
    (lambda v: _link(v, v.parent.parent.parent / "outside"), "a link; versions are folders of the store"),
    (lambda v: (v / WEIGHTS).unlink(), f"{WEIGHTS}: missing, or no file"),
    (lambda v: _link(v / WEIGHTS, v.parent.parent.parent / "outside"), f"{WEIGHTS}: missing, or no file"),
    (lambda v: _cut(v / WEIGHTS), "bytes, published were"),
    (lambda v: (v / "adapter_config.json").write_text("{}"), "2 bytes, published were"),
    (lambda v: (v / "version.json").write_text("{"), "version.json: not readable as JSON"),
    (lambda v: (v / "version.json").write_text('{"files": {"../x": 1}}'), "not this version's note"),
    (lambda v: (v / "version.json").unlink(), "version.json: not readable"),
]


@pytest.mark.parametrize(("damage", "match"), DAMAGES, ids=[match[:25] for _, match in DAMAGES])
def test_a_damaged_version_is_told_gone_round_and_mended(store, three, sound, make, damage, match):
    damage(store.path / "tickets" / three[2])
    (problem,) = _problems(store, "tickets")
    assert match in problem and f"tickets@{shown(three[2])}" in problem and "roll back" in problem
    with pytest.raises(
        UserError, match=f"can't be used .*publish it again, or go to another version .{shown(three[1])}"
    ):
        store.resolve("tickets")
    assert [v.sha256 for v in store.versions("tickets")] == [three[1], three[0]]
    assert store.rollback("tickets").sha256 == three[1]
    with pytest.raises(UserError, match="can't be used"):
        store.rollback("tickets", three[2])
    assert store.publish(make("again", 2), "tickets").sha256 == three[2]  # mends it
    assert _problems(store, "tickets", check=True) == ()
    damage_again = store.path / "tickets" / three[1]
    shutil.rmtree(damage_again)
    store.remove(f"tickets@{three[1]}")  # what is gone can be forgotten
    assert _problems(store, "tickets") == ()


def test_changed_bytes_are_found_where_every_byte_is_read(store, three, sound, make):
    _flip(store.path / "tickets" / three[0] / WEIGHTS)
    assert _problems(store, "tickets") == ()
    (problem,) = _problems(store, "tickets", check=True)
    assert "changed since it was published (it now is " in problem and "publish it again or remove it" in problem
    store.publish(make("v0", 0), "tickets")
    assert _problems(store, "tickets", check=True) == ()


def test_everything_else_that_may_lie_in_a_store(store, three, sound, make, tmp_path):
    (store.path / "notes.txt").write_text("mine")
    (store.path / "empty").mkdir()
    (store.path / "photos").mkdir()
    (store.path / "photos" / "cat.png").write_text("")
    (store.path / ".DS_Store").write_text("")
    (store.path / "has space").mkdir()
    (store.path / "\x1b[31mred\n").mkdir()
    (store.path / ("y" * 200)).mkdir()
    (store.path / "__base__").mkdir()
    os.symlink(tmp_path, store.path / "outside")
    os.symlink("tickets", store.path / "alias")
    os.symlink("nowhere", store.path / "dangling")
    os.mkfifo(store.path / "fifo")
    shutil.copytree(store.path / "tickets", store.path / "TICKETS")
    (store.path / "cut" / ("a" * 64)).mkdir(parents=True)
    shutil.copy(make() / "adapter_config.json", store.path / "sound")
    problems = {entry.name: " ".join(entry.problems) for entry in store.entries()}
    assert all(problem.isprintable() for problem in problems.values())
    assert ".DS_Store" not in problems and "a file; a store holds folders" in problems["notes.txt"]
    for name, said in {
        "empty": "an empty folder", "photos": "no adapter in it", "has space": "no name", "\x1b[31mred\n": "no name",
        "y" * 200: "no name", "__base__": "that is the base", "outside": f"a link to {tmp_path}", "alias": "a link to",
        "dangling": "a link to nowhere", "fifo": "a file", "TICKETS": "in case alone", "tickets": "in case alone",
        "cut": "its first publishing was cut off", "sound": "beside its versions, which nothing reads",
    }.items():  # fmt: skip
        assert said in problems[name]
    assert store.names() == ["TICKETS", "sound", "tickets"]
    for name in ("outside", "alias", "dangling"):
        for change in (store.resolve, store.generation, store.rollback):
            with pytest.raises(UserError, match="a link; a store follows none"):
                change(name)
        with pytest.raises(UserError, match="a link or a file, where a folder of versions must be"):
            store.publish(make(), name)
    for name in ("photos", "notes.txt", "fifo"):
        with pytest.raises(UserError, match=r"a link or a file|no adapter's folder"):
            store.publish(make(), name)
    assert {garbage.path.name for garbage in store.collect_garbage()} == {"cut", "empty"}
    assert (store.path / "photos" / "cat.png").exists() and (store.path / "notes.txt").exists()
    store.remove("outside")
    assert tmp_path.exists() and not (store.path / "outside").is_symlink()


def test_a_store_that_may_not_be_written_can_be_read(store, three, make, monkeypatch):
    for folder, _, _ in os.walk(store.path):
        os.chmod(folder, 0o555)
    real = os.open

    def no_writing(path, flags, *args, **options):
        if flags & (os.O_RDWR | os.O_WRONLY):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", no_writing)  # root may write anywhere
    reader = Store(store.path)
    assert reader.resolve("tickets").sha256 == three[2] and reader.names() == ["tickets"]
    assert reader.entries()[0].problems == () and reader.generation("tickets")
    with pytest.raises(PermissionError):
        reader.publish(make(), "x")
    for folder, _, _ in os.walk(store.path):
        os.chmod(folder, 0o755)
