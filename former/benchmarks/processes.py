"""One process against two on the same cores: `python -m benchmarks.processes [--arch resnet32]`.

Trains cmo.py on the synthetic set, once in a process with all threads and once in two with half of them
each, and compares images per second after the first epoch, without evaluation. Run it on an otherwise idle
machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import runs

ROOT = Path(__file__).parent.parent


def images_per_second(processes, words, folder):
    """Median over the epochs but the first."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "ACCELERATE_USE_CPU": "true"}
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(start if processes > 1 else []), str(ROOT / "cmo.py"), *words]
    done = subprocess.run([*command, "--output-dir", folder], env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    result = json.loads(Path(folder, "result.json").read_text())
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").open()][1:]
    return statistics.median(line["images_per_second"] for line in lines), result


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="resnet32")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args()
    words = ["--arch", options.arch, "--batch-size", str(options.batch_size), "--lr-steps"]
    words += ["--epochs", str(options.epochs)]
    with tempfile.TemporaryDirectory() as folder:
        one, result = images_per_second(1, words, f"{folder}/one")
        two, _ = images_per_second(2, words, f"{folder}/two")
    line = {"benchmark": "processes", "arch": options.arch, "batch_size": options.batch_size}
    line |= {"one": one, "two": two, "two_over_one": two / one, "cores": os.cpu_count()}
    line |= {"device": result["device"], "torch": result["versions"]["torch"], "commit": runs.commit()}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
