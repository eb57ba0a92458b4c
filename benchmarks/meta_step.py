"""Cost of the meta gradient of meta_weights.py: `python -m benchmarks.meta_step`.

The gradient of the development loss by the weight of each image, the inner step included: by one forward-mode
product, as in the script, and by differentiating through the step (double backward). Both are timed in turn,
with a plain training step on the same batch; memory is how far each makes that in use grow, in a process of
its own. The images are random, 32x32.
"""

import subprocess
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator

import benchmarks
import meta_weights
from benchmarks.speed import random_images
from common import models

LR = 1e-3


def losses(logits, labels):
    return F.cross_entropy(logits, labels, reduction="none")


def through_the_step(network, batch, dev_batch, weights):
    """What meta_weights.weight_gradients gives, by double backward."""
    weights = weights.clone().requires_grad_()
    theta = dict(network.named_parameters())
    inner_loss = (weights * losses(meta_weights.logits_at(network, theta, batch[0]), batch[1])).sum()
    gradients = torch.autograd.grad(inner_loss, list(theta.values()), create_graph=True)
    ahead = {}
    for (name, parameter), gradient in zip(theta.items(), gradients, strict=True):
        ahead[name] = parameter - LR * gradient
    dev_loss = losses(meta_weights.logits_at(network, ahead, dev_batch[0]), dev_batch[1]).mean()
    return torch.autograd.grad(dev_loss, weights)[0]


def make_steps(options, accelerator):
    """{name: a function that does it once} of the three, on one network and batch."""
    device, batch_size = accelerator.device, options.batch_size
    data = random_images([2 * batch_size // 10 + 1] * 10, 32, 2 * batch_size, device)
    images, labels = data.images.float(), data.labels.to(device)
    batch = images[:batch_size], labels[:batch_size]
    dev_batch = images[batch_size:], labels[batch_size:]
    network = models.build(options.arch, data, seed=0).to(device)
    optimizer = torch.optim.SGD(network.parameters(), LR, momentum=0.9, nesterov=True)
    ones = torch.ones(batch_size, device=device)

    def plain():
        optimizer.zero_grad()
        losses(network(batch[0]), batch[1]).mean().backward()
        optimizer.step()

    def product():
        return meta_weights.weight_gradients(accelerator, network, batch, dev_batch, LR, losses, ones)

    def double():
        return through_the_step(network, batch, dev_batch, ones)

    return {"plain": plain, "product": product, "double": double}


def growth(step, device):
    """Megabytes by which the memory in use peaks above what it was; on a CPU that of this process (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    step()
    return (status("VmHWM") - before) / 1e3


def status(name):
    """Kilobytes that Linux tells of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name)))


def growth_elsewhere(name, options):
    """The same of the step `name` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.meta_step", "--memory-of", name]
    command += ["--arch", options.arch, "--batch-size", str(options.batch_size)]
    return float(subprocess.run(command, capture_output=True, check=True).stdout)


def measure(options, accelerator):
    steps = make_steps(options, accelerator)
    ours, slow = steps["product"](), steps["double"]()
    line = {"benchmark": "meta_step", "arch": options.arch, "batch_size": options.batch_size}
    line |= benchmarks.machine(accelerator.device)
    line["relative_difference"] = ((ours - slow).norm() / slow.norm()).item()
    plain, product, double = benchmarks.in_turn(steps.values(), accelerator.device, options.rounds)
    line |= {"plain_ms": 1e3 * plain, "product_ms": 1e3 * product, "double_ms": 1e3 * double}
    line["double_over_product"] = double / product
    line["meta_step_over_plain"] = (product + plain) / plain
    for name in steps:
        line[f"{name}_mb"] = growth_elsewhere(name, options)
    line["double_over_product_memory"] = line["double_mb"] / line["product_mb"]
    return line


def main():
    parser = benchmarks.parser(__doc__)
    parser.add_argument("--arch", default="resnet32")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", choices=("plain", "product", "double"), help="print megabytes alone")
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")  # torch's own use of it, in jvp
    options, accelerator = parser.parse_args(), Accelerator()
    if options.memory_of:
        print(growth(make_steps(options, accelerator)[options.memory_of], accelerator.device))
    else:
        benchmarks.show(measure(options, accelerator))


if __name__ == "__main__":
    main()
