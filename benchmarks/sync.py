"""What a training step makes the host wait for: `python -m benchmarks.sync [SCRIPT.py ...]`.

Runs a tiny training of each script on the synthetic set and profiles a few steps of each stage, loading
included. Per step it counts what waits for the device: on a GPU what torch's own check reports
(torch.cuda.set_sync_debug_mode), elsewhere the operations behind .item(), float() and bool() of a tensor and
behind indexing by a mask, which would. Then the operations that take the most time.
"""

import contextlib
import importlib
import io
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.profiler import ProfilerActivity, profile

import benchmarks
from common import cli
from common.runs import Run

WAITING = ("aten::_local_scalar_dense", "aten::nonzero")
# one_hot checks its input on CPUs alone; Adam counts its steps in a tensor that stays on the CPU
HARMLESS = ("aten::one_hot", "Optimizer.step#Adam.step")
BEFORE, STEPS = 3, 10  # steps before the profiled ones, and those
TINY = "--epochs 1 --lr-steps --warmup 0 --batch-size 64 --lr 0.01"
# Options that let every part of the method take part at once.
SCRIPTS = {
    "bag_of_tricks.py": "--epochs 2 --drw-epoch 1 --stage3-epochs 1",
    "balanced_meta_softmax.py": "--stage2-epochs 2 --epochs 2 --meta-batch-size 40",
    "bbn.py": "",
    "class_rectification.py": "",
    "cmo.py": "--drw --drw-epoch 0 --mix-start 0 --mix-end 0",
    "csa.py": "--start 0 --delta 0",
    "decoupled_crt.py": "--stage2-epochs 2",
    "equalization_loss.py": "",
    "meta_weights.py": "--pretrain-epochs 0",
    "ride.py": "--drw-epoch 0 --p-mix 0.5 --mix-start 0 --mix-end 0",
}


class Watch:
    """Takes the place of Run.steps: profiles STEPS steps of every epoch."""

    def __init__(self, steps):
        self.steps, self.epochs = steps, []

    def __call__(self, run, loader):
        cuda, found = torch.cuda.is_available(), []
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
        with contextlib.ExitStack() as watching:
            for i, batch in enumerate(self.steps(run, loader)):
                if i == BEFORE:
                    profiler = watching.enter_context(profile(activities=activities))
                    if cuda:
                        found = watching.enter_context(warnings.catch_warnings(record=True))
                        warnings.simplefilter("always")
                        torch.cuda.set_sync_debug_mode("warn")
                if i == BEFORE + STEPS:
                    if cuda:
                        torch.cuda.set_sync_debug_mode("default")
                    watching.close()
                    self.epochs.append((profiler.events(), len(found)))
                yield batch


def waits_on_a_gpu(event):
    """Whether an operation profiled on a CPU would wait."""
    waits = event.name in WAITING
    while event is not None and waits:
        waits = event.name not in HARMLESS
        event = event.cpu_parent
    return waits


def measure(script, folder, more=()):
    """A line for each epoch: waits per step, and the operations with the most time, in percent."""
    module = importlib.import_module(script.removesuffix(".py"))
    words = [*TINY.split(), *SCRIPTS[script].split(), *more, "--output-dir", str(Path(folder, script))]
    args = cli.parse(module.Args, module.RECIPES, module.__doc__, words)
    original = Run.steps
    watch = Watch(original)
    Run.steps = lambda run, loader: watch(run, loader)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            module.main(args)
    finally:
        Run.steps = original
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
    lines = []
    for epoch, (events, reported) in enumerate(watch.epochs):
        waits = reported if torch.cuda.is_available() else sum(map(waits_on_a_gpu, events))
        averages = sorted(events.key_averages(), key=lambda event: -event.self_cpu_time_total)
        total = sum(event.self_cpu_time_total for event in averages)
        shares = {event.key: round(100 * event.self_cpu_time_total / total) for event in averages[:4]}
        line = {"benchmark": "sync", "of": script, "epoch": epoch}
        lines.append(line | {"waits_per_step": waits / STEPS, "percent_of_time": shares})
    return lines


def main():
    parser = benchmarks.parser(__doc__)
    parser.add_argument("scripts", nargs="*", default=list(SCRIPTS))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        for script in parser.parse_args().scripts:
            for line in measure(script, folder):
                benchmarks.show(line | benchmarks.machine(device))
                sys.stdout.flush()


if __name__ == "__main__":
    main()
