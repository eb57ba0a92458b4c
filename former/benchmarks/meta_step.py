"""Cost of the meta gradient of meta_weights.py: `python -m benchmarks.meta_step`.

The gradient of the development loss by the weight of each image, the inner step included: by one forward-mode
product, as in the script, and by differentiating through the step (double backward). Both are timed in turn,
with a plain training step on the same batch; memory is how far each makes that in use grow, in a process of
its own. The images are random, 32x32. Run it on an otherwise idle machine.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator

import meta_weights
from benchmarks.speed import timed
from common import models, runs
from tests import double_backward


def losses(logits, labels):
    return F.cross_entropy(logits, labels, reduction="none")


def make_steps(options, device):
    """{name: a function that does it once} of the three, on one network and batch."""
    network = models.build(options.arch, 10, 0).to(device)
    skeleton, ones = copy.deepcopy(network).to("meta"), torch.ones(options.batch_size, device=device)
    optimizer = torch.optim.SGD(network.parameters(), 1e-3, momentum=0.9, nesterov=True)
    batches = []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(options.batch_size, 3, 32, 32, generator=generator)
        labels = torch.randint(10, (options.batch_size,), generator=generator)
        images = images.to(device, memory_format=torch.channels_last)
        batches.append((images, labels.to(device)))
    accelerator = Accelerator()

    def plain():
        optimizer.zero_grad()
        losses(network(batches[0][0]), batches[0][1]).mean().backward()
        optimizer.step()

    def product():
        arguments = network, skeleton, *batches, lambda _: ones, 1e-3, losses, losses
        return meta_weights.weight_gradients(accelerator, *arguments)[0]

    def double():
        return double_backward.weight_gradients(network, *batches, ones, 1e-3)

    return {"plain": plain, "product": product, "double": double}


def growth(step, device):
    """Megabytes by which the memory in use peaks above what it was; on a CPU that of this process (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6

    def status(name):  # in kilobytes
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith(name)))

    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    step()
    return (status("VmHWM") - before) / 1e3


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="resnet32")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", choices=("plain", "product", "double"), help="print megabytes alone")
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")  # torch's own use of it, in jvp
    options, device = parser.parse_args(), Accelerator().device
    steps = make_steps(options, device)
    if options.memory_of:
        print(growth(steps[options.memory_of], device))
        return
    ours, slow = steps["product"](), steps["double"]()
    line = {"benchmark": "meta_step", "arch": options.arch, "batch_size": options.batch_size}
    line |= {"device": runs.device_name(device), "torch": torch.__version__}
    line |= {"threads": torch.get_num_threads(), "commit": runs.commit()}
    line["relative_difference"] = ((ours - slow).norm() / slow.norm()).item()
    times = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            times[name].append(timed(step, device))
    times = {name: statistics.median(values) for name, values in times.items()}
    line |= {f"{name}_ms": 1e3 * value for name, value in times.items()}
    line["double_over_product"] = times["double"] / times["product"]
    line["meta_step_over_plain"] = (times["product"] + times["plain"]) / times["plain"]
    for name in steps:
        command = [sys.executable, "-m", "benchmarks.meta_step", "--memory-of", name]
        command += ["--arch", options.arch, "--batch-size", str(options.batch_size)]
        line[f"{name}_mb"] = float(subprocess.run(command, capture_output=True, check=True).stdout)
    line["double_over_product_memory"] = line["double_mb"] / line["product_mb"]
    print(json.dumps(line))
    for name, value in line.items():
        print(f"{name:26} {f'{value:,.3g}' if isinstance(value, float) else value}", file=sys.stderr)


if __name__ == "__main__":
    main()
