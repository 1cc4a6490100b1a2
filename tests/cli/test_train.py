"""`deltaw train`: YAML and flags, preview, reports, Ctrl-C."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from deltaw.cli.options import parse, yaml_args
from deltaw.cli.train import Interrupts, Options
from deltaw.errors import UserError
from deltaw.train.events import Started
from deltaw.train.options import TrainOptions

COMMAND = [sys.executable, "-c", "import sys; from deltaw.cli import main; sys.exit(main())"]


@pytest.fixture
def flags(data, tiny_base, tmp_path):
    """A run of three steps, as flags."""
    return [
        "train", "--data", data, "--model", str(tiny_base), "--out", str(tmp_path / "run"), "--dtype", "float32",
        "--max-length", "128", "--batch-size", "2", "--epochs", "1", "--r", "4", "--learning-rate", "1e-2",
    ]  # fmt: skip


# --- YAML ---


def _read(tmp_path, text, *args):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return parse(Options, "train", yaml_args(Options, path) + list(args), negatable=True)


def test_every_key_can_stand_in_the_file(tmp_path):
    values = dict(
        data="a.jsonl", model="m", out="o", eval_data="b.jsonl", data_format="chat", loss_on="all", max_length=9, r=3,
        lora_alpha=7.5, lora_dropout=0.25, target_modules="qv", use_dora=True, use_rslora=True,
        init_lora_weights="gaussian", bias="all", full=False, quantization="none", dtype="bfloat16", device="cpu",
        epochs=1.5, max_steps=4, batch_size=5, gradient_accumulation=6, micro_batch_tokens=70,
        gradient_checkpointing=True, learning_rate=3e-4, lr_scheduler="linear", warmup_steps=8, weight_decay=0.5,
        max_grad_norm=2.5, eval_every=11, save_every="epoch", early_stop_patience=12, seed=13, resume=True,
        overwrite=False, preview=14, find_lr=True, tensorboard=True, json=True, data_split="train[:9]",
        eval_split="x", loraplus_lr_ratio=1.0, optimizer="paged-adamw", publish_to="store", publish_as="name",
    )  # fmt: skip
    assert values.keys() == set(Options.__dataclass_fields__)
    for dash in ("-", "_"):
        text = "".join(f"{key.replace('_', dash)}: {json.dumps(value)}\n" for key, value in values.items())
        read = _read(tmp_path, text)
        assert {key: str(v) if key in ("out", "publish_to") else v for key, v in vars(read).items()} == values


@pytest.mark.parametrize("rate", ["2e-4", "2.0e-4", "0.0002", "'2e-4'"])
def test_a_rate_is_a_number_however_it_is_written(tmp_path, rate):
    # To YAML 1.1, 2e-4 is a string: it has no dot.
    assert _read(tmp_path, f"learning-rate: {rate}\n").learning_rate == 2e-4


def test_lists_booleans_nulls_and_an_empty_file(tmp_path):
    read = _read(tmp_path, "target-modules: [q_proj, v_proj]\nuse_dora: no\ninit-lora-weights: false\nmax-steps: null")
    assert read.target_modules == "q_proj,v_proj"
    assert (read.use_dora, read.init_lora_weights, read.max_steps) == (False, "false", None)
    assert _read(tmp_path, "init_lora_weights: true\nuse-dora: yes").use_dora is True
    assert _read(tmp_path, "# nothing\n") == Options()


def test_the_command_line_overrules_the_file(tmp_path):
    read = _read(tmp_path, "r: 4\nuse-dora: true\nseed: 3\n", "--r", "8", "--no-use-dora")
    assert (read.r, read.use_dora, read.seed) == (8, False, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning-rat: 1", "'learning-rat' is not a key; expected some of batch-size"),
        ("r: {of: 4}", "'r': expected one value or a plain list, found {'of': 4}"),
        ("target-modules: [[q]]", "'target-modules': expected one value or a plain list"),
        ("use-dora: maybe", "'use-dora': expected true or false, found 'maybe'"),
        ("- r\n- 4", "expected keys and values, one a line"),
        ("just text", "expected keys and values, one a line"),
        ("r: [4", "not readable as YAML"),
        ("r: !!python/object/apply:os.system ['true']", "not readable as YAML"),
        ("r: four", "Error parsing --r"),
        ("resume: true\noverwrite: true", "exclude each other"),
    ],
)
def test_mistakes_in_the_file_are_one_line(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        _read(tmp_path, text)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_run_from_a_file(run, flags, tmp_path, only_json):
    path = tmp_path / "run.yml"
    path.write_text("".join(f"{key[2:]}: {value}\n" for key, value in zip(flags[1::2], flags[2::2], strict=True)))
    code, out, _ = run("train", path, "--max-steps", 1, "--json")
    summary = only_json(out)
    assert code == 0 and summary["steps"] == 1 and summary["config"]["learning_rate"] == 0.01
    assert summary["config"].keys() == TrainOptions().to_dict().keys()


# --- what is shown ---


def test_a_run_reports_and_says_what_to_do_next(run, flags, data, tmp_path):
    code, out, err = run(*flags, "--eval-data", data)
    assert code == 0
    words = " ".join(err.split())
    assert "6 examples of" in words and "3 steps" in words and "held-out loss" in words and "loading" in words
    assert re.search(r"held-out loss +\d+\.\d{4} → \d+\.\d{4} \(step 3\)", out)
    assert f"Next: deltaw chat --adapter {tmp_path / 'run'}" in out.replace("\n", "")
    code, _, err = run(*flags)
    assert code == 2 and "already holds a run" in err


def test_a_finished_run_is_not_resumed(run, flags):
    run(*flags)
    code, out, err = run(*flags, "--resume")
    assert code == 0 and "finished after 3 steps" in " ".join(err.split()) and "steps" in out


def test_a_full_run_reports_too(run, flags):
    code, _, err = run(*flags, "--full")
    assert code == 2 and "--full trains every weight and has no adapter; leave out --r, or --full" in err
    where = flags.index("--r")
    code, out, _ = run(*flags[:where], *flags[where + 2 :], "--full")
    assert code == 0 and "written" in out and "--adapter" not in out


def test_preview_marks_exactly_the_supervised_tokens(run, flags, tmp_path):
    code, out, _ = run(*flags, "--preview", 2)
    assert code == 0 and not (tmp_path / "run").exists()
    assert re.findall(r"⟦([^⟧]*)⟧", out) == ["red<|im_end|>", "blue<|im_end|>", " "]
    assert "<|im_start|>assistant\n⟦red" in out
    assert re.search(r"chats.jsonl:1: \d+ tokens, 2 supervised", out)
    assert re.search(r"6 examples, \d+ tokens, of which \d+ are learnt \(marked ⟦ ⟧\). Lengths: \d+ to \d+", out)


def test_preview_reads_no_weights(run, flags, tiny_base, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_base, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    code, out, err = run(*flags, "--model", bare, "--preview", 1)
    assert code == 0 and "⟦red<|im_end|>⟧" in out and "loading" not in err
    code, _, err = run(*flags, "--model", bare, "--preview", 1, "--max-length", 9999)
    assert code == 2 and "the model takes at most 512 tokens" in err
    assert run(*flags, "--model", bare)[0] == 2  # training needs them


def test_preview_shows_that_weight_0_is_not_learnt(run, flags, tmp_path):
    turns = [("user", "a", None), ("assistant", "bad", 0), ("user", "b", None), ("assistant", "good", 1)]
    path = tmp_path / "weights.jsonl"
    rows = [{"role": role, "content": text, "weight": weight} for role, text, weight in turns]
    path.write_text(json.dumps({"messages": rows}) + "\n")
    code, out, _ = run(*flags, "--data", path, "--preview", 1)
    assert code == 0 and "assistant\nbad<|im_end|>" in out and "⟦good<|im_end|>⟧" in out


def test_preview_spells_out_what_would_steer_the_terminal(run, flags, tmp_path):
    path = tmp_path / "steering.jsonl"
    path.write_text(json.dumps({"prompt": "a\x1b[31mred\x07\tb\n", "completion": "c\x9bd 👩\u200d🚀"}) + "\n")
    code, out, _ = run(*flags, "--data", path, "--preview", 1)
    assert code == 0 and "\x1b" not in out and "\x9b" not in out
    assert r"a\x1b[31mred\x07" in out and r"⟦c\x9bd 👩‍🚀" in out


def test_splits_of_the_hub_are_named_by_flags(run, flags, monkeypatch):
    import datasets

    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 3
    asked = []

    def load_dataset(repository, name=None, split=""):
        asked.append((repository, name, split))
        if split == "none":
            raise ValueError("Unknown split \"none\". Should be one of ['train', 'held'].")
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub = [*flags, "--data", "some/data:main", "--eval-data", "some/data", "--max-steps", 1, "--preview", 1]
    assert run(*hub)[0] == 0
    assert run(*hub, "--data-split", "train[:90%]", "--eval-split", "held")[0] == 0
    assert asked == [
        ("some/data", "main", "train"), ("some/data", None, "test"),
        ("some/data", "main", "train[:90%]"), ("some/data", None, "held"),
    ]  # fmt: skip
    code, _, err = run(*hub, "--eval-split", "none")
    assert code == 2 and "some/data: no readable file or hub data set, split none (Unknown split" in err
    assert "Should be one of ['train', 'held'].)" in err


def test_the_identity_of_data_is_that_of_their_split(run, flags, monkeypatch, only_json):
    import datasets

    def load_dataset(repository, name=None, split=""):
        turns = [{"role": "user", "content": split}, {"role": "assistant", "content": "b"}]
        return [{"messages": turns}] * 3

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub = [*flags, "--data", "some/data", "--max-steps", 1, "--json"]
    code, out, _ = run(*hub, "--data-split", "train[:9]")
    one = only_json(out)
    other = only_json(run(*hub, "--overwrite")[1])
    assert code == 0 and one["data_sha256"] != other["data_sha256"]
    assert (one["config"]["data_split"], other["config"]["data_split"]) == ("train[:9]", None)
    assert run(*hub, "--resume")[0] == 0
    code, _, err = run(*hub, "--resume", "--data-split", "train[:9]")
    assert code == 2 and "--data-split None → train[:9], other training data" in err


def test_preview_as_json_and_with_all_tokens(run, flags, only_json):
    code, out, _ = run(*flags, "--preview", 1, "--json")
    (example,) = only_json(out)["examples"]
    assert code == 0
    assert [text for text, is_supervised in example["pieces"] if is_supervised] == ["red<|im_end|>"]
    assert len(example["input_ids"]) == len(example["supervised"]) and sum(example["supervised"]) == 2
    (example,) = only_json(run(*flags, "--preview", 1, "--json", "--loss-on", "all")[1])["examples"]
    assert example["supervised"] == [False] + [True] * (len(example["input_ids"]) - 1)


def test_preview_says_what_is_cut(run, flags):
    code, out, _ = run(*flags, "--preview", 6, "--max-length", 36)
    words = " ".join(out.split())
    assert code == 0 and "cut off" in words and "are longer than --max-length and lose" in words


def test_find_lr_suggests(run, flags, tmp_path, only_json):
    code, out, _ = run(*flags, "--find-lr", "--json")
    assert code == 0 and 1e-6 < only_json(out)["suggestion"] < 1e-1
    assert not (tmp_path / "run").exists()
    out = run(*flags, "--find-lr")[1]
    assert re.search(r"Suggested: --learning-rate \d\.\de-0\d", out)
    bars = [line.count("█") for line in out.splitlines() if "█" in line]
    assert (min(bars), max(bars)) == (1, 40), "the curve fills the width, however little the loss moves"


def test_an_unwritable_place_is_refused_before_anything_is_read(run, flags, tmp_path):
    (tmp_path / "file").write_text("")
    code, out, err = run(*flags, "--out", tmp_path / "file/run")
    assert code == 2 and not out and err.count("\n") == 1 and "can't be written" in err


# --- Ctrl-C ---


def test_interrupts_before_training_while_training_and_again():
    started = Started(
        first_step=0, num_steps=1, num_examples=1, num_tokens=1, trainable_parameters=1, total_parameters=1
    )
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        interrupts(started)
        assert not interrupts.should_stop()
        signal.raise_signal(signal.SIGINT)
        assert interrupts.should_stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_ctrl_c_saves_and_resume_finishes(flags, tmp_path, environment, only_json):
    command = [*COMMAND, *flags, "--max-steps", "40", "--save-every", "0"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        deadline = time.monotonic() + 60
        while not (metrics.is_file() and '"step"' in metrics.read_text()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "Stopping after this step, then saving" in err
    assert "Saved. Go on with the same command and --resume" in " ".join(err.split())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "interrupted" and 0 < summary["steps"] < 40
    done = subprocess.run([*command, "--resume", "--json"], capture_output=True, text=True, env=environment, check=True)
    summary = only_json(done.stdout)
    assert (summary["status"], summary["steps"]) == ("done", 40)
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in steps if line["event"] == "step"] == list(range(1, 41))


def test_ctrl_c_during_set_up_ends_cleanly(flags, tmp_path, environment):
    script = """
import sys, time, deltaw.train.prepare as prepare
prepare.load_base = lambda *a, **k: (print("loading", flush=True), time.sleep(60))
from deltaw.cli import main
sys.exit(main())"""
    command = [sys.executable, "-c", script, *flags]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout.readline() == "loading\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "deltaw train: interrupted" and "Traceback" not in err
    assert not (tmp_path / "run").exists()
