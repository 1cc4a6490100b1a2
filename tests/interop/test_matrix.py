"""Numbers and files of every case equal real PEFT's."""

import pytest
import torch

import deltaw

DOUBLES = (".original_module.bias", ".modules_to_save.bias")
"""With ``bias="all"`` PEFT writes the bias of a module that is saved whole twice more."""


def test_step_0_is_the_base(twins):
    with torch.no_grad():
        base = twins.bench.outputs(twins.bench.prototype)
    config = twins.ours.peft_config["default"]
    if (config.use_dora and twins.bench.names.has_biases) or config.trainable_token_indices:
        # The bias stands outside DoRA's scale and is added by itself, and the logits of single rows are a product of
        # their own: both round differently.
        torch.testing.assert_close(twins.at_start, base, atol=1e-6, rtol=1e-6)
    else:
        assert torch.equal(twins.at_start, base)


def test_outputs_and_gradients(twins, helpers):
    helpers.assert_equal_numbers(twins)
    assert (twins.bench.outputs(twins.ours) - twins.at_start).abs().max() > 1e-3


def test_switched_off_it_is_the_base_and_switched_on_itself(twins):
    bench = twins.bench
    adapted = bench.outputs(twins.ours)
    with twins.ours.disable_adapter():
        assert torch.equal(bench.outputs(twins.ours), bench.outputs(bench.prototype))
    assert torch.equal(bench.outputs(twins.ours), adapted)


def test_modules_ranks_scalings_and_counts(twins, helpers, capsys):
    assert helpers.layers_of_ours(twins.ours) == helpers.layers_of_theirs(twins.theirs)
    printed = []
    for model in (twins.ours, twins.theirs):
        model.print_trainable_parameters()
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


def test_files(twins, helpers, tmp_path):
    bench, ours, theirs = twins.bench, twins.ours, twins.theirs
    places = [tmp_path / name for name in ("ours", "theirs", "ours by them", "theirs by us")]
    from_ours, from_theirs, ours_by_them, theirs_by_us = places
    # Trainable: in memory of their own, where products come out as ours do to the bit, and not in the file's pages.
    ours.save_pretrained(from_ours)
    helpers.save_theirs(theirs, from_theirs)
    read_by_them, read_by_us = bench.load_theirs(from_ours), bench.load_ours(from_theirs, is_trainable=True)
    helpers.save_theirs(read_by_them, ours_by_them)
    read_by_us.save_pretrained(theirs_by_us)

    written = helpers.tensors(from_ours)
    for place in places[1:]:
        tensors = helpers.tensors(place)
        for key in tensors.keys() - written.keys():  # PEFT adds what the base has already
            assert place is not theirs_by_us and (key.endswith(DOUBLES) or _is_of_the_base(bench, key, tensors[key]))
        assert all(torch.equal(tensors[k], t) and tensors[k].dtype == t.dtype for k, t in written.items()), place

    config = helpers.config(from_ours)
    for place in places[1:]:
        assert helpers.config(place) == config, place
    assert helpers.layers_of_ours(read_by_us) == helpers.layers_of_theirs(read_by_them)
    assert torch.equal(bench.outputs(read_by_us), bench.outputs(ours))
    assert torch.equal(bench.outputs(read_by_them), bench.outputs(theirs))


def test_an_embedding_that_does_more_than_look_up_is_refused(bench_of):
    positions = dict(target_modules=["embed_positions"])
    with pytest.raises(deltaw.UserError, match=r"embed_positions \(OPTLearnedPositionalEmbedding\)"):
        bench_of("opt").adapt_ours(positions)
    bench_of("gpt2").adapt_ours(dict(target_modules=["wpe"]))  # plain, though its ids are positions


def _is_of_the_base(bench, key, tensor):
    own = bench.prototype.state_dict()
    return torch.equal(own[key.removeprefix("base_model.model.").replace(".base_layer.", ".")], tensor)
