"""Names of bases: what the hub and its cache hold is found, and what is nowhere is said to be in one line."""

import json
import shutil

import pytest
import torch

from deltaw import load_base
from deltaw.errors import UserError
from deltaw.nn.load import base_info, load_tokenizer, skeleton


@pytest.mark.parametrize(
    "name", ["nothing", "./no/where", "/no/where", "~nobody/x", "x" * 5000, "nul\0byte", "own/er/x", ""]
)
def test_a_model_that_is_not_there(name):
    with pytest.raises(UserError):
        load_base(name)


def test_a_hub_id_without_a_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nobody/nothing", "nothing"):
        with pytest.raises(
            UserError, match=rf"^{name}: no such model: it isn't in the hub's cache.*; expected smollm2"
        ):
            load_base(name)


@pytest.fixture
def cached(monkeypatch, tmp_path):
    """``cached("gpt2", folder)`` puts a folder's files into the hub's cache; the network is off."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(name, folder):
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, repository / "snapshots" / "abc")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("abc")

    return put


@pytest.mark.parametrize("name", ["tiny", "owner/tiny.v1"])
def test_a_base_in_the_hubs_cache_is_found_by_its_name(cached, pickled, tiny, ids, name):
    cached(name, pickled)
    model, tokenizer = load_base(name)
    assert torch.equal(model(ids).logits, tiny()(ids).logits)
    assert base_info(model).name == name and len(load_tokenizer(name)[0]) == len(tokenizer)


def test_offline_what_another_tool_has_fetched_is_enough(cached, folder, tiny, ids, monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def incomplete(*_, **__):
        raise LocalEntryNotFoundError("README.json is not in the cache")

    cached("owner/tiny", folder)
    monkeypatch.setattr("huggingface_hub.snapshot_download", incomplete)
    assert torch.equal(load_base("owner/tiny")[0](ids).logits, tiny()(ids).logits)


def test_a_cache_without_weights(cached, folder):
    (folder / "model.safetensors").unlink()
    cached("tiny", folder)
    assert skeleton("tiny").config.hidden_size == 32
    with pytest.raises(UserError, match=r"tiny: config\.json but no weights"):
        load_base("tiny")


def test_what_the_hub_says_is_told_in_one_line(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    class Response:
        status_code, headers, request = 403, {}, None

    for error, message in [
        (GatedRepoError("secret\nlines", response=Response()), "owner/x: gated on the hub; accept its terms"),
        (RepositoryNotFoundError("404", response=Response()), "owner/x: no such model: the hub has none, or a private"),
        (OSError("disk full"), r"owner/x: no such model: the hub gave none \(disk full\)"),
    ]:

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(UserError, match=message) as caught:
            load_base("owner/x")
        assert "\n" not in str(caught.value)


def test_pickles_are_fetched_only_where_there_is_nothing_better(monkeypatch, folder, pickled):
    import huggingface_hub

    asked = []

    def download(name, allow_patterns):
        asked.append([p for p in allow_patterns if "model" in p and p != "*.model"])
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load_base("owner/x")
    assert asked == [[], ["model*.safetensors"], ["pytorch_model*.bin"]]  # the config first: it may say no
    load_tokenizer("owner/x")
    assert asked[3:] == [[]]  # no weights at all


def test_what_its_config_refuses_is_never_fetched(monkeypatch, folder):
    import huggingface_hub

    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "awq"}}
    (folder / "config.json").write_text(json.dumps(config))
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, allow_patterns: asked.extend(allow_patterns) or str(folder)
    )
    with pytest.raises(UserError, match="owner/x: quantised by 'awq', which isn't read here"):
        load_base("owner/x", quantization="nf4")
    assert not [pattern for pattern in asked if "safetensors" in pattern or "bin" in pattern]
