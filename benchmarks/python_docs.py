"""The classic first exercise on real text: r=8, alpha=16 on q_proj and v_proj, three epochs, answers before and after.

    python benchmarks/python_docs.py [--limit 600]

The data are chat pairs out of Python's own documentation (examples/python_docs.py); whole modules are held out.
Writes the run's figures and the five answers; ``report.py`` puts them into docs/training.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from _common import describe_machine, save

ROOT = Path(__file__).parents[1]
DELTAW = [sys.executable, "-c", "import sys; from deltaw.cli import main; sys.exit(main())"]
TRAIN = {
    "--r": "8",
    "--lora-alpha": "16",
    "--target-modules": "q_proj,v_proj",
    "--epochs": "3",
    "--learning-rate": "1e-3",
    "--micro-batch-tokens": "1024",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=600, help="training examples (all: 0)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        limit = ["--limit", str(args.limit)] if args.limit else []
        command = [sys.executable, str(ROOT / "examples" / "python_docs.py"), "--out", scratch, *limit]
        subprocess.run(command, check=True)
        flags = [word for pair in TRAIN.items() for word in pair]
        data = ["--data", str(folder / "train.jsonl"), "--eval-data", str(folder / "heldout.jsonl")]
        train = [*DELTAW, "train", *data, "--out", str(folder / "run"), "--json", *flags]
        summary = json.loads(subprocess.run(train, check=True, stdout=subprocess.PIPE, text=True).stdout)
        compare = ["--adapter", str(folder / "run"), "--data", str(folder / "heldout.jsonl"), "--n", "5", "--json"]
        compared = subprocess.run(
            [*DELTAW, "compare", *compare, "--max-new-tokens", "64"], check=True, stdout=subprocess.PIPE, text=True
        )
        result = {
            "machine": describe_machine(),
            "setting": TRAIN,
            "summary": summary,
            "compared": json.loads(compared.stdout)["compared"],
        }
    result["summary"]["config"] = {k: v for k, v in summary["config"].items() if k not in ("data", "eval_data", "out")}
    save(Path(__file__).stem, result)


if __name__ == "__main__":
    main()
