"""Everything on a GPU, in at most nine minutes: `bash benchmarks/gpu.sh [--output FILE.jsonl]`.

Each part is a process of its own, under a limit of time, and gives one JSON line as soon as it ends:

script:  a script, for two epochs on the synthetic set and two in the shape of CIFAR-100-LT
resume:  cmo.py, killed after its first epoch and gone on, has the weights of an unbroken run, bit for bit
epoch:   an epoch of `cmo.py --p-mix 0`, ResNet-32, batches of 128, without test. Against it the same network,
         not compiled, with the loading of released code: torchvision's transforms of each image, from PIL, in
         4 worker processes, a copy of each batch, .item() of each loss. Then the kernels and copies of 30
         steps, and the share of a step's time that they leave idle
whole:   200 epochs of `cmo.py --p-mix 0`, tested every 10

The first two run side by side. Images are CIFAR-100-LT's, imbalance 100, where --data-dir holds CIFAR-100,
else random ones in its shape and class sizes. `--steps 2` is a trial: so many batches an epoch, and 2 epochs
for 200; on a CPU with ResNet-8, and nothing compiled. A part that fails says so, and the exit code is 1.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from torchvision import transforms

import benchmarks
import cmo
from benchmarks.speed import PILImages
from benchmarks.sync import SCRIPTS, TINY
from common import cli, datasets
from common.runs import Run

ROOT = Path(__file__).parent.parent
HAS_CUDA = torch.cuda.is_available()
ARCH = "resnet32" if HAS_CUDA else "resnet8"
BATCH, WHOLE = 128, 84  # images of a step, steps of an epoch of CIFAR-100-LT
SECONDS = 510 if HAS_CUDA else 3600  # for all parts; a trial on a CPU has no nine minutes
SETTINGS = {  # words of a part, and what `accelerate launch` sets for them
    "fp32": {"ACCELERATE_MIXED_PRECISION": "no"},
    "bf16": {"ACCELERATE_MIXED_PRECISION": "bf16"},
    "inductor": {"ACCELERATE_DYNAMO_BACKEND": "inductor"},
    "reduce-overhead": {
        "ACCELERATE_DYNAMO_BACKEND": "inductor",
        "ACCELERATE_DYNAMO_MODE": "reduce-overhead",
    },
}
CHECKS = [f"script {name} bf16" for name in SCRIPTS]
CHECKS += ["script cmo.py bf16 inductor", "script cmo.py bf16 reduce-overhead", "resume cmo.py bf16"]
MEASURES = []
for compiler in ("", " inductor", " reduce-overhead"):
    MEASURES += [f"epoch fp32{compiler}", f"epoch bf16{compiler}"]
MEASURES.append("whole fp32 inductor" if HAS_CUDA else "whole fp32")
LIMITS = {"script": 100, "resume": 100, "epoch": 70, "whole": SECONDS}  # seconds, at most those that are left


def has_cifar100(args):
    return Path(args.data_dir, "cifar-100-python").is_dir()


def load(args, share, load=datasets.load):
    """(train, test) of datasets.load, or random images for CIFAR-100; of the test images a share."""
    if args.dataset == "cifar100_lt" and not has_cifar100(args):
        train, test = random_cifar100(args)
    else:
        train, test = load(args)
    return train, test.subset(torch.arange(0, len(test), 1 / share).long())


class ShortSampler(datasets.EpochSampler):
    """The first `most` images of an epoch."""

    most = WHOLE * BATCH

    def __len__(self):
        return min(self.size, self.most)

    def __iter__(self):
        return itertools.islice(super().__iter__(), self.most)


def random_cifar100(args):
    """(train, test) of random pixels, in the shape and the class sizes of CIFAR-100-LT."""
    generator, parts = np.random.RandomState(0), []
    for counts in (datasets.long_tail_counts(500, 100, args.imbalance or 1), [100] * 100):
        labels = np.repeat(np.arange(100), counts)
        pixels = generator.randint(0, 256, (len(labels), 3, 32, 32), dtype=np.uint8)
        parts.append((torch.from_numpy(pixels), labels))
    names = [str(k) for k in range(100)]
    return datasets.in_memory(*parts, names, datasets.CIFAR_STATISTICS, 4, args)


def parse(script, words, options, folder):
    """The module of a script, and its Args."""
    module = importlib.import_module(script.removesuffix(".py"))
    places = ["--data-dir", options.data_dir, "--output-dir", str(folder)]
    return module, cli.parse(module.Args, module.RECIPES, module.__doc__, [*words, *places])


def check_script(options, script):
    torch.set_num_threads(1)  # as others run beside it
    line = {}
    for dataset in ("synthetic", "cifar100_lt"):
        words = ["--dataset", dataset, *TINY.split(), *SCRIPTS[script].split(), "--epochs", "2"]
        if dataset == "cifar100_lt":
            words += ["--arch", ARCH, "--batch-size", str(BATCH)]
        module, args = parse(script, words, options, options.folder / dataset)
        result = module.main(args)
        line |= {name: result[name] for name in ("precision", "compiler")}
        line |= {f"{dataset}_loss": result["loss"], f"{dataset}_seconds": result["seconds"]}
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
    return line


def check_resume(options, script):
    words = [*TINY.split(), *SCRIPTS[script].split(), "--epochs", "3", "--output-dir"]
    command = [sys.executable, str(ROOT / script), *words]
    unbroken, broken = options.folder / "unbroken", options.folder / "broken"
    subprocess.run([*command, str(unbroken)], stdout=subprocess.DEVNULL, check=True)
    run = subprocess.Popen([*command, str(broken)], stderr=subprocess.PIPE, text=True)
    for told in run.stderr:
        if told.startswith("epoch 1 "):
            run.kill()
    run.wait()
    line = {"epochs_before_the_kill": len((broken / "metrics.jsonl").read_text().splitlines())}
    subprocess.run([*command, str(broken), "--resume"], stdout=subprocess.DEVNULL, check=True)
    results = [json.loads((folder / "result.json").read_text()) for folder in (unbroken, broken)]
    line["equal"] = results[0]["weights_sha256"] == results[1]["weights_sha256"]
    if not line["equal"]:
        line["failed"] = "the resumed run has other weights"
    if run.returncode != -signal.SIGKILL:
        line["failed"] = "the run ended before it was killed"
    return line


def measure_epoch(options, rounds=3):
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))
    device = accelerator.device
    words = ["--dataset", "cifar100_lt", "--arch", ARCH, "--p-mix", "0", "--epochs", "1"]
    _, args = parse("cmo.py", words, options, options.folder)
    run = Run(accelerator, args)
    train_set, _ = datasets.load(args)
    class_counts = train_set.class_counts.float().to(device)
    loader = datasets.train_loader(train_set, args)
    few_steps = min(30, len(loader))
    few = datasets.train_loader(train_set, args, size=few_steps * BATCH)
    model = cmo.make_model(train_set, args)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=args.wd)
    model, optimizer, loader, few = accelerator.prepare(model, optimizer, loader, few)

    pil = PILImages(train_set)
    crop, flip = transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip()
    normalize = transforms.Normalize(*train_set.statistics)
    pil.transform = transforms.Compose([crop, flip, transforms.ToTensor(), normalize])
    keywords = dict(shuffle=True, drop_last=True, num_workers=4, pin_memory=HAS_CUDA)
    pil_loader = DataLoader(pil, BATCH, **keywords)
    network = cmo.make_model(train_set, args).to(device)
    network.backbone[0] = torch.nn.Identity()  # their pixels are normalised
    sgd = torch.optim.SGD(network.parameters(), args.lr, momentum=0.9, weight_decay=args.wd)

    def our_epoch(loader=loader):
        for epoch in run.epochs(range(1), model=model, optimizer=optimizer):
            cmo.train_one_epoch(run, model, loader, (), optimizer, class_counts, epoch, args)
            run.means()

    def released_epoch():
        network.train()
        for images, labels in itertools.islice(pil_loader, len(loader)):
            images, labels = images.to(device), labels.to(device)
            with accelerator.autocast():
                loss = F.cross_entropy(network(images), labels)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            loss.item()

    line = {"arch": ARCH, "batch_size": BATCH, "steps": len(loader)}
    line["precision"] = accelerator.mixed_precision
    line["first_epoch_seconds"] = benchmarks.timed(our_epoch, device)
    ours, released = benchmarks.in_turn([our_epoch, released_epoch], device, rounds)
    line |= {"epoch_seconds": ours, "released_epoch_seconds": released, "released_over_ours": released / ours}
    if not HAS_CUDA:
        return line | {"skipped": "the kernels, which need CUDA"}
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            benchmarks.timed(partial(our_epoch, few), device)
        line["tf32"] = torch.backends.cudnn.allow_tf32
        return line | of_kernels(profiler.key_averages(), few_steps, 1e3 * ours / len(loader))
    except Exception as error:  # what is measured is kept
        return line | {"failed": f"the profiler: {error}"}


def of_kernels(averages, steps, ms_per_step):
    """What the GPU does in a step, of profiled `steps`; ms_per_step: of the epoch without the profiler."""
    milliseconds = {}
    for event in averages:
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            milliseconds[event.key] = event.self_device_time_total / 1e3 / steps
    busy = sum(milliseconds.values())
    if not busy:
        return {"failed": "the profiler saw no kernel"}
    five = sorted(milliseconds, key=milliseconds.get, reverse=True)[:5]
    line = {"ms_per_step": ms_per_step, "kernel_ms_per_step": busy, "idle_share": 1 - busy / ms_per_step}
    return line | {"percent_of_kernels": [[round(100 * milliseconds[name] / busy), name] for name in five]}


def measure_whole(options):
    epochs = "200" if options.steps >= WHOLE else "2"
    words = ["--dataset", "cifar100_lt", "--arch", ARCH, "--p-mix", "0", "--epochs", epochs]
    module, args = parse("cmo.py", [*words, "--eval-every", "10"], options, options.folder)
    result = module.main(args)
    return {name: result[name] for name in ("precision", "compiler", "all", "peak_memory_gb")}


PARTS = {"script": check_script, "resume": check_resume, "epoch": measure_epoch, "whole": measure_whole}


def work_on(part, options):
    """The line of a part, in the process of its own."""
    name, *words = part.split()
    for word in words:
        os.environ.update(SETTINGS.get(word, {}))
    if options.steps < WHOLE:
        ShortSampler.most = options.steps * BATCH
        datasets.EpochSampler = ShortSampler
    datasets.load = partial(load, share=min(options.steps / WHOLE, 1))
    return PARTS[name](options, *[word for word in words if word not in SETTINGS])


def run_part(part, seconds, options):
    """The line of a part, from a process that is ended after `seconds`."""
    if not HAS_CUDA and part.endswith(("inductor", "reduce-overhead")):
        return {"part": part, "skipped": "compiled, for which a trial on a CPU has no time"}
    folder = options.folder / part.replace(" ", "_")
    folder.mkdir()
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", part, "--folder", str(folder)]
    command += ["--steps", str(options.steps), "--data-dir", options.data_dir]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    begun, line = time.monotonic(), {"part": part}
    with open(folder / "told", "w") as told:
        process = subprocess.Popen(command, env=environment, stdout=told, stderr=told, start_new_session=True)
        try:
            process.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            line["failed"] = f"took more than {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and the processes that it started
    told = (folder / "told").read_text().splitlines()
    if (folder / "line.json").exists():
        line |= json.loads((folder / "line.json").read_text())
    elif "failed" not in line:
        line["failed"] = told[-1][:300] if told else f"exit code {process.returncode}"
    if "failed" in line:
        print(f"{part}:", *told[-30:], sep="\n    ", file=sys.stderr)
    log = folder / "metrics.jsonl"
    if part.startswith("whole") and log.exists():
        epochs = [json.loads(epoch)["seconds"] for epoch in log.open()]
        line |= {"epochs": len(epochs), "seconds": sum(epochs), "median_seconds": statistics.median(epochs)}
    return line | {"part_seconds": time.monotonic() - begun}


def tell(line, options):
    """Print the line of a part, and append it to the file of results."""
    line = {"benchmark": "gpu", **line, **options.facts}
    benchmarks.show(line)
    sys.stdout.flush()
    if options.output:
        with open(options.output, "a") as file:
            file.write(json.dumps(line) + "\n")
    return line


def run_all(options):
    """The lines of all parts."""
    options.facts = benchmarks.machine(torch.device("cuda" if HAS_CUDA else "cpu"))
    options.facts["commit"] = options.commit or options.facts["commit"]
    options.facts["images"] = "CIFAR-100-LT" if has_cifar100(options) else "random"
    end, lines = time.monotonic() + SECONDS, []

    def limited(part):
        left = end - time.monotonic()
        return run_part(part, min(LIMITS[part.split()[0]], left) if HAS_CUDA else left, options)

    with ThreadPoolExecutor(min(len(CHECKS), os.cpu_count())) as side_by_side:
        jobs = [side_by_side.submit(limited, part) for part in CHECKS if part.startswith(options.parts)]
        for job in as_completed(jobs):
            lines.append(tell(job.result(), options))
    for part in MEASURES:
        if part.startswith(options.parts):
            lines.append(tell(limited(part), options))
    return lines


def main():
    parser = benchmarks.parser(__doc__)
    parser.add_argument("--steps", type=int, default=WHOLE, help="of an epoch; fewer for a trial")
    parser.add_argument("--data-dir", default="data", help="folder of CIFAR-100 (cifar-100-python)")
    parser.add_argument("--output", help="file that the lines are appended to")
    parser.add_argument("--parts", nargs="+", default=[""], help="those alone that begin so, such as epoch")
    parser.add_argument("--commit", help="of the code, for the lines, where it is not a git checkout")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # these two: of the processes that this one starts
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.parts = tuple(options.parts)
    if not any(part.startswith(options.parts) for part in CHECKS + MEASURES):
        parser.error(f"--parts: there are {', '.join(CHECKS + MEASURES)}")
    if options.part:
        line = work_on(options.part, options)
        (options.folder / "line.json").write_text(json.dumps(line))
        return
    if not HAS_CUDA:
        print("note: no CUDA here: a trial on the CPU, without what is for a GPU alone", file=sys.stderr)
    if options.output:
        Path(options.output).touch()  # now, rather than after the first part, it may fail
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        lines = run_all(options)
    failed = [line["part"] for line in lines if "failed" in line]
    print(f"{len(lines)} parts, {len(failed)} failed", *failed, sep="\n    ", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
