"""What a training step makes the host wait for: `python -m benchmarks.sync [SCRIPT.py ...]`.

Runs a tiny training of each script on the synthetic set, one epoch a stage, and profiles a few steps of each
epoch, loading included. Per step it counts what waits for the device: on a GPU what torch's own check reports
(torch.cuda.set_sync_debug_mode), elsewhere the operations behind .item(), float() and bool() of a tensor and
behind indexing by a mask, which would. Then the operations that take the most time.
"""

import argparse
import contextlib
import importlib
import io
import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.profiler import ProfilerActivity, profile

from common import cli, runs

ROOT = Path(__file__).parent.parent
WAITING = ("aten::_local_scalar_dense", "aten::nonzero")
# one_hot checks its input on CPUs alone; Adam counts its steps in a tensor that stays on the CPU
HARMLESS = ("aten::one_hot", "Optimizer.step#Adam.step")
BEFORE, STEPS = 3, 10  # steps before the profiled ones, and those
TINY = dict(epochs=1, lr_steps=(), warmup=0, batch_size=64)
# Options that let every part of the method take part at once.
ALL_OF = {
    "bag_of_tricks.py": dict(stage2_epochs=1, stage2_lr_steps=(), stage3_epochs=1, stage3_lr_steps=()),
    "balanced_meta_softmax.py": dict(epochs=2, stage2_epochs=2, meta_batch_size=40),
    "class_rectification.py": dict(),
    "cmo.py": dict(mix_start=-1, mix_end=0, drw=True, drw_epoch=0, las=True, las_epochs=1, las_batch_size=64),
    "csa.py": dict(start_aug=0, delta=0.0),
    "decoupled_crt.py": dict(stage2_epochs=2, stage2_lr_steps=()),
    "equalization_loss.py": dict(),
    "meta_weights.py": dict(epochs=2, pretrain_epochs=1, dev_per_class=5, dev_batch_size=40),
}


class Watch:
    """Takes the place of Run.steps: profiles steps BEFORE to BEFORE + STEPS of every epoch."""

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
                    torch.cuda.set_sync_debug_mode("default") if cuda else None
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


def measure(script, folder):
    """A line of JSON for each epoch: waits per step, and the operations with the most time, in percent."""
    module = importlib.import_module(script.removesuffix(".py"))
    watch, original = Watch(runs.Run.steps), runs.Run.steps
    runs.Run.steps = lambda run, loader: watch(run, loader)
    try:
        options = {**TINY, **ALL_OF.get(script, {}), "output_dir": str(Path(folder, script))}
        with contextlib.redirect_stdout(io.StringIO()):
            module.main(cli.build(module.Args, module.RECIPES, **options))
    finally:
        runs.Run.steps = original
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
    for epoch, (events, reported) in enumerate(watch.epochs):
        waits = reported if torch.cuda.is_available() else sum(map(waits_on_a_gpu, events))
        events = events.key_averages()
        total = sum(event.self_cpu_time_total for event in events)
        longest = sorted(events, key=lambda event: -event.self_cpu_time_total)[:4]
        shares = {event.key: round(100 * event.self_cpu_time_total / total) for event in longest}
        line = {"benchmark": "sync", "of": script, "epoch": epoch}
        yield line | {"waits_per_step": waits / STEPS, "percent_of_time": shares}


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scripts", nargs="*", default=sorted(path.name for path in ROOT.glob("*.py")))
    with tempfile.TemporaryDirectory() as folder:
        for script in parser.parse_args(argv).scripts:
            for line in measure(script, folder):
                facts = {"torch": torch.__version__, "commit": runs.commit()}
                device = "cuda" if torch.cuda.is_available() else "cpu"
                print(json.dumps(line | {"device": runs.device_name(torch.device(device)), **facts}))
                sys.stdout.flush()


if __name__ == "__main__":
    main()
