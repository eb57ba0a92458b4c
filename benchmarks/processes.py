"""One process against two on the same cores: `python -m benchmarks.processes [--arch resnet32]`.

Trains cmo.py on the synthetic set, once in a process with all threads and once in two with half of them
each, and compares images per second between the first epoch and the last, where nothing is tested.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import benchmarks

SCRIPT = Path(__file__).parent.parent / "cmo.py"


def run(processes, words, folder):
    """(images per second, a median over the epochs, result) of a run."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "ACCELERATE_USE_CPU": "true"}
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*start, str(SCRIPT), *words, "--output-dir", folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    result = json.loads(Path(folder, "result.json").read_text())
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").open()]
    batch_size = result["args"]["batch_size"]
    images = sum(result["class_counts"]) // batch_size * batch_size
    return statistics.median(images / line["seconds"] for line in lines[1:-1]), result


def main():
    parser = benchmarks.parser(__doc__)
    parser.add_argument("--arch", default="resnet32")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=5, help="at least 3")
    options = parser.parse_args()
    words = ["--arch", options.arch, "--batch-size", str(options.batch_size), "--lr", "0.01"]
    words += ["--epochs", str(options.epochs), "--eval-every", str(options.epochs)]
    with tempfile.TemporaryDirectory() as folder:
        one, result = run(1, words, f"{folder}/one")
        two, _ = run(2, words, f"{folder}/two")
    line = {"benchmark": "processes", "arch": options.arch, "batch_size": options.batch_size}
    line |= {"one": one, "two": two, "two_over_one": two / one, "cores": os.cpu_count()}
    line |= {"device": result["device"], "torch": result["versions"]["torch"], "commit": result["commit"]}
    benchmarks.show(line)


if __name__ == "__main__":
    main()
