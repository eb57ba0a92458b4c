"""How fast, how much memory: `python -m benchmarks.NAME`, one JSON line each. On an otherwise idle machine.

Small options make a quick look: --arch resnet8 --steps 4 --rounds 1.
"""

import argparse
import json
import statistics
import sys
import time

import torch

from common import runs


def parser(doc):
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def timed(work, device):
    """Seconds that work() takes."""
    wait(device)
    begun = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - begun


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turn(works, device, rounds):
    """Median seconds of each of the works, timed alternately after one unmeasured round."""
    times = []
    for _ in range(rounds + 1):
        times.append([timed(work, device) for work in works])
    return [statistics.median(seconds) for seconds in zip(*times[1:], strict=True)]


def machine(device):
    """What the numbers depend on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else runs.platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "commit": runs.commit(),
    }


def show(line):
    """One JSON line on stdout; the same to be read on stderr."""
    print(json.dumps(line))
    for name, value in line.items():
        print(f"{name:26} {f'{value:.6g}' if isinstance(value, float) else value}", file=sys.stderr)
