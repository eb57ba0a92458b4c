"""A run: its output folder, seeds, log, checkpoints and result.

OUTPUT/args.json          the options
OUTPUT/metrics.jsonl      one line per epoch
OUTPUT/checkpoint/        epoch_NNNN.pt with its manifest epoch_NNNN.json; the last two are kept
OUTPUT/result.json        the result of the last epoch
"""

import dataclasses
import hashlib
import io
import json
import os
import platform
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import accelerate
import numpy as np
import psutil
import torch
import torchvision
from accelerate.utils import broadcast_object_list
from torchvision.utils import save_image
from tqdm import tqdm

from common import cli, datasets, models
from common.evaluation import ACCURACIES

# Options that may change on resuming: they train nothing.
NOT_COMPARED = ("output_dir", "data_dir", "resume", "overwrite", "num_workers", "visualize", "dry_run")
SAME = ("dataset", "imbalance", "train_list", "test_list", "image_size", "arch")  # in both of two stages
STAGE1_SCRIPTS = ("cmo.py", "decoupled_crt.py", "balanced_meta_softmax.py")
CHECK_EVERY = 100  # steps between two looks at the loss
GONE = "Connection (closed|reset) by peer|remote process exited"  # what gloo and NCCL say of a dead process
PER_CLASS = ("class_counts", "per_class")  # of the last epoch alone
OF_CLASSES = ("class_", "per_class")  # how the names of lists of a value for each class begin


def start(accelerator, args, epochs=None):
    """The Run of `args`, of `epochs` (all stages; default args.epochs). Refuses at once what cannot work."""
    is_command = type(args).__module__ == "__main__"  # and not called from Python
    if is_command:
        end_at_signals(lambda: "nothing was trained")
    models.check_name(args.arch)
    if args.check_data or args.dry_run:
        datasets.check(args)
    if args.check_data:
        raise SystemExit(0)
    processes = accelerator.num_processes
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started > 1 and processes == 1:
        cli.fail(
            f"{started} processes were started but each sees 1; set ACCELERATE_USE_CPU=true before torchrun"
        )
    counting = [field.name for field in dataclasses.fields(args) if cli.counts(field, args)]
    for name in [name for name in counting if name.endswith("batch_size")]:
        size = getattr(args, name)
        if size % processes:
            lower = size // processes * processes
            near = f"{lower} or {lower + processes}" if lower else str(processes)
            cli.fail(f"{cli.flag(name)} {size}: not a multiple of {processes} processes; use {near}")
    torch.backends.cudnn.deterministic = True  # a resumed run repeats the unbroken one on a GPU, too
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")  # torch's own use of it, in jvp
    for name in [name for name in counting if name.endswith("lr_steps")]:
        length = name.replace("lr_steps", "epochs")
        end = getattr(args, length)
        late = " ".join(str(step) for step in getattr(args, name) if step >= end)
        if late:
            end = f"{cli.flag(length)} {end}"
            cli.say(f"note: {cli.flag(name)} {late}: not before the end of {end}, so without effect")
    run = Run(accelerator, args, args.epochs if epochs is None else epochs)
    run.is_command = is_command
    if is_command:
        end_at_signals(run.kept)
        sys.excepthook = run.explain
    return run


def script_of(args):
    return Path(sys.modules[type(args).__module__].__file__).name


def output_folder(args):
    """args.output_dir, by default runs/SCRIPT/DATASET_IMBALANCE_SEED."""
    name = [args.dataset, *([f"{args.imbalance:g}"] if args.imbalance else []), str(args.seed)]
    return Path(args.output_dir or Path("runs", Path(script_of(args)).stem, "_".join(name)))


class Run:
    """What a loop tells and asks: set_data, track, begin_epoch, steps, record, end_epoch, finish."""

    def __init__(self, accelerator, args, epochs):
        self.accelerator, self.args, self.main = accelerator, args, accelerator.is_main_process
        self.epochs = epochs  # of all stages
        self.script = script_of(args)
        self.folder, self.shape = output_folder(args), ()
        self.history, self.per_class, self.tracked, self.recorded = [], {}, {}, {}
        self.commit = commit()  # of the code that runs, whatever is checked out later
        self.checkpoint = self.look()
        self.data = (self.checkpoint or {}).get("data")
        if args.dry_run:  # in a folder of its own
            self.temporary = tempfile.TemporaryDirectory()  # gone with this process, too
            self.folder, self.checkpoint = Path(broadcast_object_list([self.temporary.name])[0]), None
            self.lasting = []  # seconds of each stage
        self.first_epoch = self.checkpoint["epoch"] + 1 if self.checkpoint else 0
        self.is_made = self.checkpoint is not None
        accelerator.wait_for_everyone()  # all processes have looked before the first one writes

    @property
    def files(self):
        return [self.folder / name for name in ("args.json", "metrics.jsonl", "result.json")]

    def kept(self):
        """What --resume finds; a checkpoint is whole, being written beside and renamed."""
        if self.args.dry_run:
            self.temporary.cleanup()
            return "of a dry run nothing is kept"
        saved = epochs_in(self.folder / "checkpoint")
        kept = f"goes on after epoch {saved[-1] + 1}" if saved else "has no epoch to go on from"
        return f"--resume {kept}"

    def explain(self, kind, error, trace):
        """One line for an error that is not the program's own; others keep their traceback."""
        size, memory = "x".join(map(str, self.shape)), peak_memory(self.accelerator.device) / 1e9
        batch = f"--batch-size {self.args.batch_size}, images of {size}, peak {memory:.1f} GB"
        if issubclass(kind, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
            line = f"out of memory ({batch}); halve --batch-size"
        elif "DataLoader worker (pid" in str(error):  # and not an error in one
            line = f"a loader process died ({batch}); if it was for lack of memory, lower --num-workers"
        elif self.accelerator.num_processes > 1 and re.search(GONE, str(error)):
            line = "another process of the run has ended"
        else:
            sys.__excepthook__(kind, error, trace)
            return
        cli.say(f"{line}; {self.kept()}", here=True)
        leave(1)

    # -------------------------------------------------------------------------------- folder and checkpoint

    def look(self):
        """The checkpoint to go on from, or None for a new run; refuses a folder that fits neither."""
        args, folder = self.args, self.folder
        if args.resume == "no":
            used = any(file.exists() for file in self.files) or epochs_in(folder / "checkpoint")
            if used and not args.overwrite:
                line = (
                    f"--output-dir {folder}: in use; add --resume to go on or --overwrite to delete its run"
                )
                cli.say(f"note: {line}") if args.dry_run else cli.fail(line)
            there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
            if not (there.is_dir() and os.access(there, os.W_OK)):
                cli.fail(
                    f"--output-dir {folder}: {there} is not a folder that can be written; name another one"
                )
            return None
        checkpoint = load_checkpoint(folder / "checkpoint")
        if checkpoint is None:
            if self.files[2].exists() or epochs_in(folder / "checkpoint"):
                cli.fail(
                    f"--resume: no whole checkpoint in {folder}; --overwrite instead deletes what it holds"
                )
            if args.resume == "yes":
                cli.fail(f"--resume: no checkpoint in {folder}; --resume auto would start a new run")
            return None
        then, now = checkpoint, self.facts()
        if then["script"] != now["script"]:
            cli.fail(f"--resume: the run in {folder} is of {then['script']}; name another --output-dir")
        if then["precision"] != now["precision"]:
            cli.fail(
                f"--resume: begun with precision {then['precision']}, not {now['precision']}; launch it so"
            )
        compared = [k for k in now["args"] if k not in NOT_COMPARED]
        differing = [k for k in compared if then["args"].get(k) != now["args"][k]]
        if differing:
            lines = [f"{cli.flag(k)} {now['args'][k]}: the run has {then['args'].get(k)}" for k in differing]
            cli.fail(*[f"{line}; give that to resume {folder}, or another --output-dir" for line in lines])
        if then["num_processes"] != now["num_processes"]:
            cli.say(f"note: from {then['num_processes']} processes to {now['num_processes']}, same batches")
        self.history, self.per_class = checkpoint["history"], checkpoint["per_class"]
        return checkpoint

    def facts(self):
        args = json.loads(json.dumps(dataclasses.asdict(self.args)))  # tuples become lists, as in a file
        processes, precision = self.accelerator.num_processes, self.accelerator.mixed_precision
        return {"script": self.script, "args": args, "num_processes": processes, "precision": precision}

    def set_data(self, train_set, test_set, *more):
        """Keep in checkpoints and result what the data are, with `more` sets that it trains with.

        Those of a resumed run have to be its own, and the training images those of --stage1.
        """
        self.all_names, self.classes = train_set.all_names, train_set.classes
        counts = f"{len(self.classes)} classes, {len(train_set)} training and {len(test_set)} test images"
        hashes = [part.sha256() for part in (train_set, test_set, *more)]
        then, self.data = self.data, {"counts": counts, "sha256": hashes}
        if then and then != self.data:
            parts = zip(("training", "test", "development"), then["sha256"], hashes, strict=False)
            others = " and ".join(name for name, old, new in parts if old != new)
            has = then["counts"] if then["counts"] != counts else f"other {others} images or labels"
            given = f"the data are {counts}, but the run in {output_folder(self.args)} has {has}"
            cli.fail(f"--resume: {given}; give it its own, or another --output-dir")
        stage1 = getattr(self.args, "stage1", None)
        if stage1 and read_result(stage1).get("data_sha256", hashes)[0] != hashes[0]:
            cli.fail(f"--stage1 {stage1}: its run had other training images; give the same data")

    def of_all_classes(self, name, values):
        """`values`; those of each class, [K], as the name tells, with None or no images where left out."""
        if not name.startswith(OF_CLASSES):
            return values
        of, other = dict(zip(self.classes, values, strict=True)), 0 if name == "class_counts" else None
        return [of.get(k, other) for k in range(len(self.all_names))]

    def track(self, epochs, **objects):
        """Begin the stage of the range `epochs` and return those that are left to run, numbered on.

        objects (model, optimizer, ...) are what its checkpoints hold, and are loaded from the last of them.
        """
        self.stage, self.tracked = epochs, {}
        if self.accelerator.scaler is not None:
            objects["scaler"] = self.accelerator.scaler
        for name, thing in objects.items():
            is_module = isinstance(thing, torch.nn.Module)
            thing = self.accelerator.unwrap_model(thing, keep_torch_compile=False) if is_module else thing
            self.tracked[name] = thing
        if self.checkpoint and self.checkpoint["epoch"] in epochs:
            for name, thing in self.tracked.items():
                thing.load_state_dict(self.checkpoint["state"][name])
            self.checkpoint = None  # frees its memory
            cli.say(f"resumed {self.folder} after epoch {self.first_epoch}")
        elif self.main and not self.is_made:
            try:
                (self.folder / "checkpoint").mkdir(parents=True, exist_ok=True)
                if self.args.overwrite:
                    patterns = ("checkpoint/epoch_*", "new_images.png", "new_images/*")
                    old = [file for pattern in patterns for file in self.folder.glob(pattern)]
                    for file in (*self.files, *old):
                        file.unlink(missing_ok=True)
                write_file(self.files[0], json.dumps(self.facts()["args"], indent=1))
            except OSError as e:
                cli.fail(f"--output-dir {self.folder}: cannot be written ({e.strerror})")
        self.is_made = True
        left = range(max(epochs.start, self.first_epoch), epochs.stop)
        return left[len(left) // 2 :][:1] if self.args.dry_run else left

    # --------------------------------------------------------------------------------------------- an epoch

    def begin_epoch(self, epoch, *loaders):
        """Seed everything from (seed, epoch), so that a resumed run repeats the unbroken one."""
        self.epoch, self.begun, self.recorded = epoch, time.perf_counter(), {}
        self.stats, self.rate = {"loss": None}, None  # of an epoch without steps
        self.steps_per_epoch, self.step_seconds = 0, 0.0
        seed = datasets.epoch_seed(self.args.seed, epoch, stream=99)
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        for loader in loaders:
            loader.set_epoch(epoch)

    def steps(self, loader):
        """The batches of `loader`, with a progress bar on a terminal and now and then a look at the loss.

        A dry run stops after two, so what runs beside it is zipped with strict=False.
        """
        label = f"epoch {self.epoch + 1}/{self.epochs}"
        bar = tqdm(loader, label, leave=False, disable=not (self.main and sys.stderr.isatty()))
        every, last = (1, min(2, len(loader))) if self.args.dry_run else (CHECK_EVERY, len(loader))
        self.steps_per_epoch, ends = len(loader), [self.begun]
        for step, batch in enumerate(bar, 1):
            self.shape = shape_of(batch)
            yield batch
            if step % every == 0 or step == last:
                self.stats = self.means()
                bar.set_postfix(loss=f"{self.stats['loss']:.4f}")
                ends.append(time.perf_counter())
            if self.args.dry_run and step == last:
                break
        self.step_seconds = ends[-1] - ends[-2]
        batch = getattr(loader, "total_batch_size", self.args.batch_size)
        self.rate = len(loader) * batch / (time.perf_counter() - self.begun)

    def record(self, **values):
        """Keep this step's scalars, `loss` and any others, on the device; the log gets their means."""
        for name, value in values.items():
            self.recorded.setdefault(name, []).append(value.detach().float())

    def means(self):
        """Means over the epoch's steps and all processes. Stops them all where a value is not finite."""
        means = {}
        for name, values in self.recorded.items():
            values = self.accelerator.reduce(torch.stack(values), reduction="mean").cpu()
            wrong = (~values.isfinite()).nonzero()
            if len(wrong):
                where = f"epoch {self.epoch + 1}, step {wrong[0].item() + 1}"
                how = f"lr {self.lr():g}, precision {self.accelerator.mixed_precision}"
                kept = f"the checkpoint of epoch {self.epoch} is kept, " if self.history else ""
                cli.fail(f"{name} is not finite in {where} ({how}); {kept}lower the learning rate")
            means[name] = values.double().mean().item()
        return means

    def lr(self):
        """The learning rate, of the first group; None in a stage without an optimiser."""
        return self.tracked["optimizer"].param_groups[0]["lr"] if "optimizer" in self.tracked else None

    def end_epoch(self, epoch, accuracy):
        """Log the epoch and write its checkpoint. accuracy: what evaluation.per_split returned."""
        accuracy = {name: self.of_all_classes(name, values) for name, values in accuracy.items()}
        self.per_class = {name: accuracy.pop(name) for name in PER_CLASS}
        testing = accuracy.pop("test_seconds", None)
        line = {"epoch": epoch, "lr": self.lr(), **self.stats, **accuracy, "images_per_second": self.rate}
        line["seconds"] = time.perf_counter() - self.begun
        self.history.append(line)
        formats = {"lr": ".3g", "loss": ".4f", **dict.fromkeys(ACCURACIES, ".2f")}
        shown = " ".join(f"{k} {'-' if line[k] is None else format(line[k], f)}" for k, f in formats.items())
        if not self.args.dry_run:
            cli.say(f"epoch {epoch + 1}/{self.epochs} {shown} ({line['seconds']:.1f} s)")
        if self.main:
            write_file(self.files[1], "".join(json.dumps(line) + "\n" for line in self.history))
            state = {name: thing.state_dict() for name, thing in self.tracked.items()}
            content = {**self.facts(), "epoch": epoch, "history": self.history, "per_class": self.per_class}
            content |= {"data": self.data, "state": state}
            save_checkpoint(self.folder / "checkpoint", epoch, content)
        if self.args.dry_run:
            self.check_stage(epoch, *testing)

    def check_stage(self, epoch, first, testing, batches):
        """Of a dry run: read the checkpoint back and say how long the stage takes.

        first: seconds of an epoch's first test batch, which starts the loader; testing: of another.
        """
        self.accelerator.wait_for_everyone()
        state = load_checkpoint(self.folder / "checkpoint")["state"]
        for name, thing in self.tracked.items():
            thing.load_state_dict(state[name])
        if not self.steps_per_epoch:  # all but the test is one
            tested = first + testing * (batches > 1)
            self.steps_per_epoch, self.step_seconds = 1, time.perf_counter() - self.begun - tested
        steps = self.steps_per_epoch
        seconds = len(self.stage) * (steps * self.step_seconds + first + (batches - 1) * testing)
        self.lasting.append(seconds)
        size = (self.folder / "checkpoint" / f"epoch_{epoch:04d}.pt").stat().st_size / 1e6
        each = f"{steps} steps of {self.step_seconds:.2g} s and {batches} test batches of {testing:.2g} s"
        took = f"about {seconds / 60:.1f} minutes; checkpoints of {size:.1f} MB"
        cli.say(f"epochs {self.stage.start + 1} to {self.stage.stop}: each {each}, in all {took}")

    def save_grid(self, name, *columns):
        """Draw a PNG into the run's folder: a row shows an image of each of `columns`.

        [N, C, H, W] or [N, H, W], uint8, bool, or floating-point in 0..1; small images are drawn larger.
        """
        if self.main and not self.args.dry_run:
            columns = [column[:, None] if column.ndim == 3 else column for column in columns]
            columns = [c / 255 if c.dtype == torch.uint8 else c.float() for c in columns]
            channels = max(column.shape[1] for column in columns)
            cells = torch.stack([c.expand(-1, channels, -1, -1) for c in columns], dim=1).flatten(0, 1)
            cells = torch.nn.functional.interpolate(cells, scale_factor=max(1, 96 // cells.shape[-1]))
            try:
                save_image(cells, self.folder / name, nrow=len(columns))
                cli.say(f"drew {self.folder / name}")
            except OSError as e:  # it trains nothing
                cli.say(f"note: {self.folder / name}: not drawn ({e.strerror or e})")

    # ------------------------------------------------------------------------------------------- the result

    def best(self, accuracy):
        """The best accuracy(line of the log) of the last stage's epochs."""
        return max(accuracy(line) for line in self.history if line["epoch"] in self.stage)

    def finish(self, **facts):
        """The result of the last epoch, and facts: a dict, one JSON line on stdout, and result.json."""
        if self.args.dry_run:
            return self.end_dry_run()
        accelerator, args, last, file = self.accelerator, self.args, self.history[-1], self.files[2]
        result = read_result(self.folder) if self.first_epoch == self.epochs else None
        if result is None:  # and not a finished run, resumed
            result = {"script": self.script}
            result |= {k: getattr(args, k) for k in ("dataset", "imbalance", "seed", "epochs")}
            result |= {k: v for k, v in last.items() if k not in ("epoch", "lr", "seconds")}
            result |= {
                "best_on_test": self.best(lambda line: line["all"]),
                "seconds": sum(line["seconds"] for line in self.history),
                "peak_memory_gb": peak_memory(accelerator.device) / 1e9,
                "num_processes": accelerator.num_processes,
                "device": device_name(accelerator.device),
                "precision": accelerator.mixed_precision,
                "compiler": accelerator.state.dynamo_plugin.backend.value.lower(),
                "versions": {m.__name__: m.__version__ for m in (torch, torchvision, accelerate, np)},
                "commit": self.commit,
                "command": shlex.join([self.script, *sys.argv[1:]]) if self.is_command else None,
                "parameters": sum(p.numel() for p in self.tracked["model"].parameters()),
                "weights_sha256": weights_hash(self.tracked["model"].state_dict()),
                "args": self.facts()["args"],
                "data_sha256": self.data["sha256"],
                **facts,
                "class_names": self.all_names,
                **self.per_class,
            }
            for name, own in last.get("predictions", {}).items():
                best = self.best(lambda line, of=name: line["predictions"][of]["all"])
                result["predictions"] = {**result["predictions"], name: {**own, "best_on_test": best}}
            if self.main:
                write_file(file, json.dumps(result, indent=1))
        if self.main:
            # What there is of every class ("class_...") is long, so only in the files.
            short = {k: v for k, v in result.items() if not k.startswith(OF_CLASSES)}
            print(json.dumps(short), flush=True)
        accelerator.end_training()
        return result

    def end_dry_run(self):
        self.accelerator.wait_for_everyone()
        self.temporary.cleanup()
        seconds, memory = sum(self.lasting), peak_memory(self.accelerator.device) / 1e9
        cli.say(f"--dry-run: the whole run would take about {seconds / 60:.1f} minutes, and {memory:.1f} GB")
        self.accelerator.end_training()
        return {"seconds": seconds}


def end_at_signals(kept):
    """From now on end this process at SIGINT and SIGTERM with one line, which says kept()."""
    own = os.getpid()

    def stop(number, frame):
        if os.getpid() != own:  # a loader process, which inherits this: its parent ends it
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        cli.say(f"stopped by {signal.Signals(number).name}; {kept()}")
        leave(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def leave(code):
    """End this process at once, and its loader processes: one that has just begun would outlive it.

    An exception could be lost in a __del__, such as a loader's, or wait for processes that are gone.
    """
    for child in psutil.Process().children():
        child.kill()
    os._exit(code)


def shape_of(batch):
    """(C, H, W) of the images of a batch, which may be of several streams."""
    return tuple(batch.shape[1:]) if isinstance(batch, torch.Tensor) else shape_of(batch[0])


def read_result(folder):
    """The result of the run in `folder`, or None where it has none that is whole."""
    try:
        result = json.loads(Path(folder, "result.json").read_text())
    except (OSError, ValueError):
        return None
    facts = result if isinstance(result, dict) else {}
    return result if isinstance(facts.get("args"), dict) and "weights_sha256" in facts else None


def read_finished(folder):
    """(result, weights) of the finished run in `folder`. OSError says in one line what is missing."""
    result = read_result(folder)
    if result is None:
        raise OSError(f"{folder}: holds no finished run (no result.json); name another, or finish it")
    result["args"] = {name: tuple(v) if isinstance(v, list) else v for name, v in result["args"].items()}
    checkpoint = load_checkpoint(Path(folder, "checkpoint"))
    weights = checkpoint and checkpoint["state"]["model"]
    if checkpoint is None or weights_hash(weights) != result["weights_sha256"]:
        raise OSError(f"{folder}: its last checkpoint is not there or damaged; train it again")
    return result, weights


def adopt_stage1(args, training):
    """(args with the options `training` of the run that --stage1 names, all options of it, its weights).

    It has to be a finished one of the same data and network, of a script that trains it in one stage. A value
    that is no choice here is not taken. Without --stage1: (args, None, None).
    """
    if args.stage1 is None:
        return args, None, None
    if Path(args.stage1).resolve() == output_folder(args).resolve():
        cli.fail(f"--stage1 {args.stage1}: would be the folder of stage 2, too; name another --output-dir")
    try:
        result, weights = read_finished(args.stage1)
    except OSError as e:
        cli.fail(f"--stage1 {e}")
    theirs, where = {"classifier": "joint", **result["args"]}, f"--stage1 {args.stage1}"
    if result["script"] not in STAGE1_SCRIPTS:  # others have another network, or train it on fewer images
        cli.fail(f"{where}: a run of {result['script']}; use one of {', '.join(STAGE1_SCRIPTS)}")
    if theirs["classifier"] != "joint":
        cli.fail(f"{where}: its run is of --classifier {theirs['classifier']}, not joint")
    if theirs.get("held_out") and not hasattr(args, "held_out"):
        cli.fail(f"{where}: its run left out --held-out images; use one that was trained on all")
    for name in SAME:
        if theirs[name] != getattr(args, name):
            given = f"{cli.flag(name)} {getattr(args, name)}"
            cli.fail(f"{given}: the run of {where} has {theirs[name]}; give the same")
    if theirs["seed"] != args.seed:
        cli.say(
            f"note: --seed {args.seed} is of stage 2 alone; stage 1 in {args.stage1} has {theirs['seed']}"
        )
    own = {name: theirs.get(name, getattr(type(args), name)) for name in training}
    choices = {field.name: field.metadata["choices"] for field in dataclasses.fields(args)}
    own = {name: value for name, value in own.items() if not choices[name] or value in choices[name]}
    for name in [name for name in own if own[name] != getattr(args, name)]:
        cli.say(f"note: {cli.flag(name)} {own[name]} of stage 1 in {args.stage1}, not {getattr(args, name)}")
    return dataclasses.replace(args, **own), theirs, weights


def weights_hash(state):
    """SHA-256 over the names and bytes of a module's parameters and buffers, a state dict."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def peak_memory(device):
    """Bytes: of the device where it counts them, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def device_name(device):
    """The GPU's name, or what the system says of its processor, and the number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    facts = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    models = [line.partition(": ")[2] for line in facts.splitlines() if line.startswith("model name")]
    return f"{device.type} ({(models or [platform.machine()])[0]}, {os.cpu_count()} cores)"


def commit():
    """Short hash of the checkout the code is of, with + where files differ from it; None outside of git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def write_file(path, content):
    """Write beside, flush to disk, rename: a kill at any moment leaves the old file or the new one, whole."""
    beside, content = (
        path.with_name(path.name + ".tmp"),
        content.encode() if isinstance(content, str) else content,
    )
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as e:
        beside.unlink(missing_ok=True)
        cli.fail(
            f"{path}: cannot be written, {len(content) / 1e6:.1f} MB ({e.strerror}); what was there is kept"
        )


def save_checkpoint(folder, epoch, content):
    """Write epoch_NNNN.pt, then its manifest (size, SHA-256); then drop all but this and the one before."""
    values = [value for state in content["state"].values() for value in state.values()]
    floats = [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]
    if not all(value.isfinite().all() for value in floats):
        cli.fail(f"epoch {epoch + 1} ended with weights that are not finite; the last checkpoint is kept")
    buffer = io.BytesIO()
    torch.save(content, buffer)
    manifest = {"size": len(buffer.getbuffer()), "sha256": hashlib.sha256(buffer.getbuffer()).hexdigest()}
    write_file(folder / f"epoch_{epoch:04d}.pt", buffer.getbuffer())
    write_file(folder / f"epoch_{epoch:04d}.json", json.dumps(manifest))
    for file in folder.glob("epoch_*"):
        number = re.match(r"epoch_(\d+)\.", file.name)
        if number and int(number[1]) < epoch - 1:
            file.unlink()


def epochs_in(folder):
    """The 0-based epochs of the checkpoints in `folder`, ascending."""
    names = [re.fullmatch(r"epoch_(\d+)\.json", file.name) for file in folder.glob("epoch_*.json")]
    return sorted(int(name[1]) for name in names if name)


def load_checkpoint(folder):
    """The newest checkpoint that its manifest confirms, or None. Says so when a newer one is damaged."""
    for epoch in reversed(epochs_in(folder)):
        manifest, file = (folder / f"epoch_{epoch:04d}.{kind}" for kind in ("json", "pt"))
        try:
            facts, content = json.loads(manifest.read_text()), file.read_bytes()
            if len(content) == facts["size"] and hashlib.sha256(content).hexdigest() == facts["sha256"]:
                return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            problem = "differs from its manifest"
        except (KeyError, TypeError):
            problem = f"{manifest.name} is no manifest"
        except (OSError, ValueError) as e:
            problem = str(e)
        cli.say(f"note: {file}: damaged ({problem}); going back to the checkpoint before it")
    return None
