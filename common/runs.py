"""A run: its folder, seeds, log, checkpoint and result.

OUTPUT/args.json            the options
OUTPUT/metrics.jsonl        one line per epoch
OUTPUT/checkpoint.pt        the last whole epoch, for --resume
OUTPUT/model.safetensors    the trained network, for models.load, tools.predict and --stage1
OUTPUT/result.json          the result of the last epoch
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

import accelerate
import numpy as np
import torch
import torchvision
from accelerate.tracking import filter_trackers
from accelerate.utils import gather_object, set_seed, tqdm
from safetensors.torch import save

from common.cli import Refused, flag, say, show
from common.datasets import epoch_seed
from common.evaluation import SPLITS

FREE = ("output_dir", "data_dir", "resume", "overwrite", "num_workers", "log_with")  # may change on resuming


class Run:
    """What a training loop tells and asks. rng: of NumPy, new each epoch, for draws that processes share."""

    def __init__(self, accelerator, args):
        self.accelerator, self.args, self.is_main = accelerator, args, accelerator.is_main_process
        self.options = json.loads(json.dumps(dataclasses.asdict(args)))  # tuples become lists, as in a file
        self.script = Path(sys.modules[type(args).__module__].__file__)
        name = [args.dataset, *([f"{args.imbalance:g}"] if args.imbalance else []), str(args.seed)]
        self.folder = Path(args.output_dir or Path("runs", self.script.stem, "_".join(name)))
        self.facts = {"script": self.script.name, "mixed precision": accelerator.mixed_precision}
        self.draws = {"processes": accelerator.num_processes, "loader processes": args.num_workers}
        self.draws["threads"] = torch.get_num_threads()  # they decide the last bits on a CPU
        accelerator.project_configuration.set_directories(str(self.folder))
        accelerator.log_with = filter_trackers(args.log_with, str(self.folder))
        self.refuse_launch()
        if self.is_main:
            self.lock()
        self.checkpoint = self.find_checkpoint()
        self.history = self.checkpoint["history"] if self.checkpoint else []
        self.done = self.checkpoint["epoch"] if self.checkpoint else -1  # the last epoch before this start
        self.same_everywhere("options or checkpoints", (self.options, self.facts, self.history[-1:]))
        accelerator.init_trackers("log", {name: str(value) for name, value in self.options.items()})
        torch.backends.cudnn.deterministic = True  # or a resumed run would differ on a GPU

    def refuse_launch(self):
        """Refused where the launcher's settings would train something else."""
        processes = self.accelerator.num_processes
        if int(os.environ.get("WORLD_SIZE", 1)) != processes:
            raise Refused("several processes, each of which sees itself alone; set ACCELERATE_USE_CPU=true")
        if self.accelerator.device.type == "mps":
            raise Refused("device mps: has no double precision; set ACCELERATE_USE_CPU=true")
        if self.accelerator.gradient_accumulation_steps != 1:
            raise Refused("gradient accumulation: is not for these methods; lower --batch-size instead")
        stage1 = self.options.get("stage1")
        if stage1 and Path(stage1).resolve() == self.folder.resolve():
            raise Refused(f"--stage1 {stage1}: is the folder of this run, too; give another --output-dir")
        for name, value in self.options.items():
            if name.endswith("batch_size") and value % processes:
                raise Refused(f"{flag(name)} {value}: not a multiple of the {processes} processes")
        if self.args.log_with and not self.accelerator.log_with:
            raise Refused(f"--log-with {self.args.log_with}: is not installed; install it, or leave it out")

    def lock(self):
        """Make the folder, and keep a second run out of it as long as this process lives."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock_file = open(self.folder / ".lock", "w")
            fcntl.lockf(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(f"--output-dir {self.folder}: a run is writing there; name another one") from None

    def find_checkpoint(self):
        """The checkpoint to go on from, or None for a new run. Refused where the folder fits neither."""
        file = self.folder / "checkpoint.pt"
        is_used = file.exists() or (self.folder / "result.json").exists()
        if self.args.resume and not is_used:
            say(f"note: a new run begins in {self.folder}")
        if not is_used or (self.args.overwrite and not self.args.resume):
            return None
        if not self.args.resume:
            raise Refused(f"--output-dir {self.folder}: holds a run; --resume, --overwrite, or name another")
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
            then = checkpoint["facts"] | checkpoint["options"]
        except Exception:  # a damaged file fails in many ways
            raise Refused(f"--resume: {file} is no checkpoint, or damaged; --overwrite begins anew") from None
        for name, now in (self.facts | self.options).items():
            if name not in FREE and then.get(name) != now:
                label = name if name in self.facts else flag(name)
                raise Refused(f"{label} {now}: the run in {self.folder} has {then.get(name)}; give that")
        for name, before in checkpoint["draws"].items():
            if self.draws[name] != before:
                say(f"note: {self.draws[name]} {name}, not {before} as before: other draws or last bits")
        return checkpoint

    def same_everywhere(self, what, value):
        """Refused where the processes have other values. Waits for all of them."""
        if len({json.dumps(other) for other in gather_object([value])}) > 1:
            raise Refused(f"the processes have other {what}; give them the same --output-dir, --data-dir")

    def set_data(self, train_set, *others):
        """Keep what the data are: equal on all processes and on resuming. others: test set, meta set, .."""
        self.class_counts = train_set.class_counts
        hashes = [part.sha256() for part in (train_set, *others)]
        self.same_everywhere("data", hashes)
        if self.checkpoint and self.checkpoint["data"]["data_sha256"] != hashes:
            raise Refused(f"--resume: the run in {self.folder} has other images or labels; give it its own")
        self.data = {
            "class_names": train_set.class_names,
            "class_counts": self.class_counts.tolist(),
            "imbalance_reached": (self.class_counts.max() / self.class_counts.min()).item(),
            "shape": list(train_set.shape),
            "statistics": [list(values) for values in train_set.statistics],
            "data_sha256": hashes,
        }

    def epochs(self, numbers, **objects):
        """Those of the range `numbers` that are left. objects (model, optimizer, ..): for the checkpoint."""
        if self.is_main and self.args.overwrite and not self.history:
            for file in ("checkpoint.pt", "metrics.jsonl", "model.safetensors", "result.json"):
                (self.folder / file).unlink(missing_ok=True)
        if self.is_main:
            write(self.folder / "args.json", json.dumps(self.options, indent=1))
        if self.accelerator.scaler:
            objects["scaler"] = self.accelerator.scaler
        self.objects = {name: self.unwrap(thing) for name, thing in objects.items()}
        if self.checkpoint and self.done in numbers:
            for name, thing in self.objects.items():
                thing.load_state_dict(self.checkpoint["state"][name])
            say(f"resumed {self.folder} after epoch {self.done + 1}")
            self.checkpoint = None  # frees its memory
        self.epoch = self.last_epoch = numbers.stop - 1
        for epoch in range(max(numbers.start, self.done + 1), numbers.stop):
            self.epoch, self.begun, self.logged = epoch, time.perf_counter(), {}
            seed = epoch_seed(self.args.seed, epoch)  # a resumed run repeats the unbroken one
            self.rng = np.random.default_rng(seed)
            set_seed(seed % 2**31, device_specific=True)
            yield epoch

    def unwrap(self, thing):
        """The module inside a prepared one."""
        if isinstance(thing, torch.nn.Module):
            return self.accelerator.unwrap_model(thing, keep_torch_compile=False)
        return thing

    def steps(self, loader):
        """The batches of `loader`, under a progress bar on a terminal."""
        is_shown = self.is_main and sys.stderr and sys.stderr.isatty()
        bar = tqdm(loader, desc=f"epoch {self.epoch + 1}", leave=False, disable=not is_shown)
        for step, batch in enumerate(bar, 1):
            yield batch
            if step % 100 == 0:  # also a look at whether it is finite
                bar.set_postfix(loss=f"{self.means()['loss']:.4f}")

    def log(self, **values):
        """Keep this step's scalars, `loss` and any others, on the device. The log gets their means."""
        for name, value in values.items():
            self.logged.setdefault(name, []).append(value.detach().float())

    def means(self):
        """Means over the epoch's steps and all processes. Refused where one is not finite."""
        means = {}
        for name, values in self.logged.items():
            means[name] = self.accelerator.reduce(torch.stack(values).mean(), reduction="mean").item()
            if not np.isfinite(means[name]):
                raise Refused(f"{name} is not finite in epoch {self.epoch + 1}; lower --lr {self.args.lr:g}")
        return means

    def end_epoch(self, epoch, accuracy, **facts):
        """Write the log and the checkpoint. accuracy: of evaluation.per_split; facts: of the method."""
        line = {"epoch": epoch, **self.means(), **accuracy, **facts}
        if "optimizer" in self.objects:
            line["lr"] = self.objects["optimizer"].param_groups[0]["lr"]
        line["seconds"] = time.perf_counter() - self.begun
        self.history.append(line)
        state = {name: thing.state_dict() for name, thing in self.objects.items()}
        if not all(value.isfinite().all() for value in state["model"].values()):
            raise Refused("the weights are not finite; the checkpoint before is kept, lower --lr")
        if self.is_main:
            content = {"facts": self.facts, "options": self.options, "draws": self.draws, "data": self.data}
            content |= {"epoch": epoch, "history": self.history, "state": state}
            write(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.history))
            write(self.folder / "checkpoint.pt", content)
        numbers = {name: value for name, value in line.items() if isinstance(value, float)}
        self.accelerator.log(numbers, step=epoch)
        shown = [f"{name} {numbers[name]:.4g}" for name in ("loss", *SPLITS) if name in numbers]
        say(f"epoch {epoch + 1} {' '.join(shown)} ({line['seconds']:.1f} s)")

    def finish(self, **facts):
        """The result of the last epoch, and facts: a dict, one JSON line on stdout, and result.json."""
        state, device = self.objects["model"].state_dict(), self.accelerator.device
        weights = save({name: tensor.cpu().contiguous() for name, tensor in state.items()})
        packages = torch, torchvision, accelerate, np
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        memory = torch.cuda.max_memory_allocated() or 1024 * kilobytes
        result = {
            "script": self.script.name,
            "dataset": self.args.dataset,
            "seed": self.args.seed,
            **self.history[-1],
            "best_on_test": max(line["all"] for line in self.history if "all" in line),
            "seconds": sum(line["seconds"] for line in self.history),
            "peak_memory_gb": memory / 1e9,
            "num_processes": self.accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "precision": self.accelerator.mixed_precision,
            "compiler": self.accelerator.state.dynamo_plugin.backend.value.lower(),
            "versions": {package.__name__: package.__version__ for package in packages},
            "commit": commit(),
            "command": shlex.join(sys.argv),
            "script_sha256": hashlib.sha256(self.script.read_bytes()).hexdigest(),
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
            "args": self.options,
            **self.data,
            **facts,
        }
        if self.is_main:
            write(self.folder / "model.safetensors", weights)
            write(self.folder / "result.json", json.dumps(result, indent=1))
            short = {name: value for name, value in result.items() if not isinstance(value, list)}
            show(json.dumps(short), sys.stdout)
        self.accelerator.end_training()
        return result


def write(path, content):
    """Write text, bytes, or what torch.save takes. A kill at any moment leaves the old file or the new."""
    content = content.encode() if isinstance(content, str) else content
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # a full disk is either
        beside.unlink(missing_ok=True)
        raise Refused(f"{path}: cannot be written ({error}); what was there is kept") from None


def commit():
    """Short hash of the code that runs, with + where files differ from it. None without git."""
    command = "git describe --always --dirty=+ --exclude='*'"
    told = subprocess.run(command, shell=True, cwd=Path(__file__).parent, capture_output=True, text=True)
    return told.stdout.strip() or None
