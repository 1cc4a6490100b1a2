"""Exit codes, help, and one clear line for every mistake."""

import os
import subprocess
import sys
import time

import pytest

import deltaw.cli as cli
from deltaw.cli.program import command
from deltaw.config import LoraConfig
from deltaw.nn.inject import inject
from deltaw.nn.load import load_base
from deltaw.nn.walk import parameter_counts

COMMAND = [sys.executable, "-c", "import sys; from deltaw.cli import main; sys.exit(main())"]


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_verb(run, args):
    code, out, err = run(*args)
    assert code == 0 and not err
    assert all(f"\n  {verb} " in out for verb in cli.VERBS)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_explains_itself(run, verb):
    code, out, err = run(verb, "--help")
    assert code == 0 and not err
    assert f"usage: deltaw {verb}" in out and "--help" in out


def test_help_is_quick_and_imports_no_torch():
    script = "import sys; from deltaw.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    times = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.5


def test_mistakes_in_flags_import_no_torch():
    script = "import sys; from deltaw.cli import main; main(['train', '--foo']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0


def test_version(run):
    assert run("--version")[:2] == (0, "deltaw 0.1.0\n")


MISTAKES = [
    (["nope"], "deltaw nope: no verb 'nope'; expected one of demo, train"),
    (["train"], "deltaw train: --data: expected a JSONL, CSV or Parquet file, or a hub data set; give one"),
    (["train", "--foo", "1"], "deltaw train: Unrecognized options: --foo, 1; see deltaw train --help"),
    (["train", "--learning-rat", "1"], "(perhaps --learning-rate)"),
    (["train", "stray"], "Unrecognized options: stray"),
    (["train", "--r", "x"], "Error parsing --r: invalid literal for int() with base 10: 'x'"),
    (["train", "--loss-on", "x"], "invalid choice 'x' for argument '--loss-on'. Expected one of ('assistant', 'all')"),
    (["train", "--epochs"], "Missing value for argument '--epochs'"),
    (["train", "--batch-size", "0"], "deltaw train: --batch-size 0: expected at least 1"),
    (["train", "--data", "nope.jsonl"], "nope.jsonl: no such file"),
    (["train", "nope.yaml"], "nope.yaml: not readable as YAML"),
    (["train", "--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
    (["eval"], "deltaw eval: --data must be given; see deltaw eval --help"),
    (["compare"], "deltaw compare: --data and --adapter must be given; see deltaw compare --help"),
    (["eval", "--data", "nope.csv"], "nope.csv: no such file"),
    (["eval", "--data", "DATA", "--model", "nope"], "nope: no such model: it isn't in the hub's cache"),
    (["eval", "--data", "DATA", "--limit", "0"], "--limit 0: expected at least 1"),
    (["compare", "--data", "DATA", "--adapter", "./nope"], "./nope: no such folder"),
    (
        ["compare", "--data", "DATA", "--adapter", "TMP"],
        "is not an adapter: it has no adapter_config.json (found chats",
    ),
    (["compare", "--data", "DATA", "--adapter", "x", "--n", "0"], "--n 0: expected at least 1"),
    (["eval", "--data", "DATA", "--max-new-tokens", "0"], "--max-new-tokens 0: expected at least 1"),
    (["eval", "--data", "DATA", "--micro-batch-tokens", "0"], "--micro-batch-tokens 0: expected at least 1"),
    (["eval", "--data", "DATA", "--data-split", "dev"], "is a file, and only hub data sets have splits"),
    (["train", "--data", "DATA", "--data-split", "dev"], "is a file, and only hub data sets have splits"),
    (["train", "--data", "DATA", "--full", "--use-dora"], "--full trains every weight and has no adapter; leave out"),
    (["demo", "--resume"], "--resume: of which run? Name its folder with --out"),
    (["demo", "--overwrite"], "--overwrite: of which run? Name its folder with --out"),
    (["chat", "--adapter", "./nope"], "./nope: no such folder"),
    (["chat", "--model", "TMP"], "a folder without config.json"),
    (["chat", "--temperature", "-1"], "temperature=-1.0"),
    (["modules", "TMP"], "a folder without config.json"),
]


@pytest.mark.parametrize(
    ("args", "message"), MISTAKES, ids=lambda value: " ".join(value) if type(value) is list else ""
)
def test_a_mistake_is_one_line_and_exit_code_2(run, data, tmp_path, args, message):
    code, out, err = run(*({"DATA": data, "TMP": tmp_path}.get(arg, arg) for arg in args))
    assert code == 2 and not out
    *before, last = err.splitlines()
    assert message in last
    assert all(line.startswith(("loading ", "looking up ")) for line in before)


def test_malformed_data_are_named_by_line(run, data, tiny_base):
    with open(data, "a") as file:
        file.write('{"messages": [}\n')
    code, _, err = run("train", "--data", data, "--model", tiny_base)
    assert code == 2
    assert err.startswith(f"deltaw train: 1 bad line in {data}; first: line 7: malformed JSON at column")
    assert err.count("\n") == 1


def test_complaints_are_read_from_plain_boxes_too():
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*COMMAND, "compare"], capture_output=True, text=True, check=False, env=environment)
    assert done.stderr == "deltaw compare: --data and --adapter must be given; see deltaw compare --help\n"


def test_other_peoples_faults_and_ours(run, monkeypatch):
    def raising(error):
        def main(args):
            raise error

        monkeypatch.setattr("deltaw.cli.modules.main", main)
        return run("modules")

    import deltaw.cli.modules  # noqa: F401

    code, _, err = raising(RuntimeError("boom"))
    assert code == 1 and "Traceback" in err and err.endswith("please report it with the lines above\n")
    code, _, err = raising(PermissionError(13, "Permission denied", "/etc/x"))
    assert code == 2 and err == "deltaw modules: Permission denied: /etc/x; check the path, rights and space\n"
    code, _, err = raising(OSError(28, "No space left on device"))
    assert code == 2 and "No space left" in err and err.count("\n") == 1
    assert raising(OSError("something odd"))[0] == 1
    assert raising(KeyboardInterrupt())[::2] == (130, "deltaw modules: interrupted\n")


def test_as_a_command():
    done = subprocess.run([*COMMAND, "train", "--nope"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout
    with subprocess.Popen([*COMMAND, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # as `| head -0` does
        assert process.wait(20) in (0, 120)
        assert b"Traceback" not in process.stderr.read()


def test_modules_lists_what_can_be_adapted(run, tiny_base, only_json):
    code, out, err = run("modules", tiny_base, "--json", "--r", 4)
    found = only_json(out)
    assert code == 0 and not err
    row = next(row for row in found["modules"] if row["name"] == "k_proj")
    assert (row["shape"], row["count"], row["parameters_each"]) == ([16, 32], 2, 4 * 48)
    assert row["strategies"] == ["all-linear", "attention"]
    assert "k_proj" in run("modules", "--model", tiny_base)[1]


def test_modules_lists_embeddings_apart(run, tiny_base, only_json):
    found = only_json(run("modules", tiny_base, "--json", "--r", 4)[1])
    (row,) = found["embeddings"]
    (vocabulary, width), names = row["shape"], row["modules"]
    assert (row["name"], row["count"], width, names) == ("embed_tokens", 1, 32, ["model.embed_tokens"])
    assert row["parameters"] == row["parameters_each"] == 4 * (vocabulary + width)
    assert row["strategies"] == [] and "embed_tokens" not in [row["name"] for row in found["modules"]]
    # What it says is what it costs, and all-linear is what all-linear trains.
    for targets, said in ((names, row["parameters"]), ("all-linear", found["strategies"]["all-linear"])):
        model, _ = load_base(tiny_base)
        inject(model, LoraConfig(r=4, target_modules=targets))
        assert parameter_counts(model)[0] == said
    shown = run("modules", tiny_base)[1]
    assert shown.index("\nembeddings") < shown.index("\nembed_tokens") and "by name only" in shown


def test_commands_are_shown_as_they_can_be_typed(monkeypatch, tmp_path):
    path = tmp_path / "my env" / "bin" / "deltaw"
    path.parent.mkdir(parents=True)
    path.write_text("")
    path.chmod(0o755)
    monkeypatch.setattr("sys.argv", [str(path)])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    assert command("chat", "--adapter", "my run") == "'my env/bin/deltaw' chat --adapter 'my run'"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert command("chat") == f"'{path}' chat"
    monkeypatch.setenv("PATH", str(path.parent))
    assert command("chat") == "deltaw chat"
    for started in ("-c", "/usr/bin/pytest", "/no/such/deltaw"):
        monkeypatch.setattr("sys.argv", [started])
        assert command("chat") == "deltaw chat"
