"""common.runs: folders, checkpoints, the log and the result."""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

import cmo
from cmo import Args
from common import datasets, runs
from tests.conftest import ROOT, TINY, refusal


def tiny(tmp_path, **options):
    return Args(**{**TINY, "paste": "none", "output_dir": str(tmp_path / "run"), **options})


@pytest.fixture
def finished(tmp_path):
    """The folder and the result of a finished run."""
    return tmp_path / "run", cmo.main(tiny(tmp_path))


def begin(args):
    return runs.start(Accelerator(), args)


def strict(text):
    """JSON without NaN and Infinity."""

    def refuse(constant):
        raise AssertionError(f"{constant} in JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_a_run_leaves(tmp_path, capsys):
    folder, result = tmp_path / "run", cmo.main(tiny(tmp_path))
    assert sorted(path.name for path in folder.iterdir()) == [
        "args.json",
        "checkpoint",
        "metrics.jsonl",
        "result.json",
    ]
    assert sorted(path.name for path in (folder / "checkpoint").iterdir()) == [
        f"epoch_000{epoch}.{kind}" for epoch in (0, 1) for kind in ("json", "pt")
    ]
    assert strict((folder / "args.json").read_text())["imbalance"] == 100
    lines = [strict(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert [line["lr"] for line in lines] == pytest.approx([0.05, 0.0005])
    stored = strict((folder / "result.json").read_text())
    assert stored == json.loads(json.dumps(result))
    printed = strict(capsys.readouterr().out)
    assert printed == {key: value for key, value in stored.items() if not key.startswith(runs.OF_CLASSES)}
    assert stored["class_names"] == list(datasets.SHAPES)
    assert stored["class_counts"] == [500, 299, 179, 107, 64, 38, 23, 13, 8, 5]
    assert result["script"] == "cmo.py" and result["num_processes"] == 1 and result["precision"] == "no"
    assert len(result["per_class"]) == 10 and result["best_on_test"] >= result["all"]
    assert set(result["versions"]) == {"torch", "torchvision", "accelerate", "numpy"}


def test_result_is_of_the_final_weights(finished):
    folder, result = finished
    content = runs.load_checkpoint(folder / "checkpoint")
    model = cmo.models.build("resnet8", 10, 3)
    model.load_state_dict(content["state"]["model"])
    assert runs.weights_hash(model.state_dict()) == result["weights_sha256"]


def test_a_folder_in_use_is_refused(finished, tmp_path, capsys):
    folder, _ = finished
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    line = refusal(lambda: begin(tiny(tmp_path)), capsys)
    assert line == f"--output-dir {folder}: in use; add --resume to go on or --overwrite to delete its run"
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_overwrite_deletes_the_run_and_nothing_else(finished, tmp_path):
    folder, result = finished
    (folder / "notes.txt").write_text("mine")
    again = cmo.main(tiny(tmp_path, overwrite=True, epochs=1, lr_steps=()))
    assert again["weights_sha256"] != result["weights_sha256"]
    assert (folder / "notes.txt").read_text() == "mine"
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1
    assert not (folder / "checkpoint" / "epoch_0001.pt").exists()


def test_refused_runs_leave_nothing(tmp_path, capsys):
    args = tiny(tmp_path, dataset="image_folder", data_dir=str(tmp_path / "nowhere"))
    refusal(lambda: cmo.main(args), capsys)
    assert list(tmp_path.iterdir()) == []


def test_resuming_a_finished_run_repeats_its_result(finished, tmp_path, capsys):
    folder, result = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert cmo.main(tiny(tmp_path, resume="yes")) == json.loads(json.dumps(result))
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert "epoch 2/2" not in capsys.readouterr().err


@pytest.mark.parametrize("content", ['{"script', "[]", "{}", '{"args": {}}'])
def test_a_damaged_result_is_made_up_for(finished, tmp_path, capsys, content):
    folder, result = finished
    (folder / "result.json").write_text(content)
    with pytest.raises(OSError, match="holds no finished run"):
        runs.read_finished(folder)
    again = cmo.main(tiny(tmp_path, resume="yes"))
    assert all(again[name] == result[name] for name in ("weights_sha256", "per_class", "all"))
    assert strict((folder / "result.json").read_text())["weights_sha256"] == result["weights_sha256"]


def test_a_result_that_was_not_written_is_made_up_for(finished, tmp_path):
    folder, result = finished
    (folder / "result.json").unlink()
    again = cmo.main(tiny(tmp_path, resume="yes"))
    assert all(again[key] == result[key] for key in ("all", "few", "per_class", "weights_sha256", "seconds"))


def test_resume_without_a_checkpoint(tmp_path, capsys):
    line = refusal(lambda: begin(tiny(tmp_path, resume="yes")), capsys)
    assert line == f"--resume: no checkpoint in {tmp_path}/run; --resume auto would start a new run"
    assert begin(tiny(tmp_path, resume="auto")).first_epoch == 0


def test_a_result_without_checkpoints_is_not_lost(finished, tmp_path, capsys):
    folder, _ = finished
    for path in (folder / "checkpoint").iterdir():
        path.unlink()
    line = refusal(lambda: begin(tiny(tmp_path, resume="auto")), capsys)
    assert line == f"--resume: no whole checkpoint in {folder}; --overwrite instead deletes what it holds"
    assert (folder / "result.json").exists()


def test_resume_after_a_kill_in_the_first_checkpoint(tmp_path):
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    for name in ("epoch_0000.pt", "epoch_0000.json.tmp"):
        (tmp_path / "run" / "checkpoint" / name).write_bytes(b"half")
    assert cmo.main(tiny(tmp_path, resume="auto"))["epochs"] == 2


def test_resume_with_another_precision(finished, tmp_path, capsys):
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    accelerator = Accelerator(mixed_precision="bf16")
    line = refusal(lambda: runs.start(accelerator, tiny(tmp_path, resume="yes")), capsys)
    assert line == "--resume: begun with precision no, not bf16; launch it so"


def test_full_disk(finished, monkeypatch, capsys):
    """One line, no half file, and the checkpoint before it in its place."""
    folder, _ = finished
    content = runs.load_checkpoint(folder / "checkpoint")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs.os, "fsync", full)
    capsys.readouterr()
    line = refusal(lambda: runs.save_checkpoint(folder / "checkpoint", 2, content | {"epoch": 2}), capsys)
    assert line.startswith(f"{folder}/checkpoint/epoch_0002.pt: cannot be written, 0.")
    assert "(No space left on device)" in line
    assert runs.load_checkpoint(folder / "checkpoint")["epoch"] == 1
    assert len(list((folder / "checkpoint").iterdir())) == 4


def test_resume_with_other_options(finished, tmp_path, capsys):
    folder, _ = finished
    capsys.readouterr()
    line = refusal(lambda: begin(tiny(tmp_path, resume="yes", lr=0.2)), capsys)
    assert line == f"--lr 0.2: the run has 0.05; give that to resume {folder}, or another --output-dir"
    with pytest.raises(SystemExit):
        begin(tiny(tmp_path, resume="auto", lr=0.2, arch="lenet"))
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == [
        "--arch lenet",
        "--lr 0.2",
    ]


def test_resume_of_another_script(finished, tmp_path, capsys):
    folder, _ = finished
    capsys.readouterr()
    for manifest in (folder / "checkpoint").glob("*.json"):
        content = torch.load(manifest.with_suffix(".pt"))
        runs.save_checkpoint(folder / "checkpoint", content["epoch"], content | {"script": "bbn.py"})
    line = refusal(lambda: begin(tiny(tmp_path, resume="yes")), capsys)
    assert line == f"--resume: the run in {folder} is of bbn.py; name another --output-dir"


def test_resume_from_each_epoch_repeats_the_run(finished, tmp_path):
    folder, result = finished
    for name in ("epoch_0001.pt", "epoch_0001.json"):
        (folder / "checkpoint" / name).unlink()
    (folder / "result.json").unlink()
    again = cmo.main(tiny(tmp_path, resume="yes"))
    assert again["weights_sha256"] == result["weights_sha256"] and again["loss"] == result["loss"]
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "bit", "no manifest", '{"size"', "[]", "null"])
def test_damaged_checkpoints(finished, tmp_path, capsys, damage):
    """Named, and the one before is taken; the run still ends as the unbroken one."""
    folder, result = finished
    file = folder / "checkpoint" / "epoch_0001.pt"
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "bit":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "no manifest":
        file.with_suffix(".json").unlink()
    else:
        file.with_suffix(".json").write_text(damage)
    (folder / "result.json").unlink()
    capsys.readouterr()
    again = cmo.main(tiny(tmp_path, resume="yes"))
    errors = capsys.readouterr().err
    assert again["weights_sha256"] == result["weights_sha256"]
    assert f"resumed {folder} after epoch 1" in errors
    if damage != "no manifest":  # which reads as a checkpoint that was never completed
        assert f"note: {file}: damaged" in errors


def test_a_kill_while_writing_leaves_the_checkpoint_before(finished, monkeypatch):
    folder, _ = finished
    content = runs.load_checkpoint(folder / "checkpoint")
    replace = runs.os.replace

    def killed(source, target):
        raise KeyboardInterrupt

    for kill_at in (1, 2):  # at the rename of the weights, at that of the manifest
        calls = []
        monkeypatch.setattr(
            runs.os,
            "replace",
            lambda s, t, n=kill_at, c=calls: killed(s, t) if c.append(1) or len(c) == n else replace(s, t),
        )
        with pytest.raises(KeyboardInterrupt):
            runs.save_checkpoint(folder / "checkpoint", 2, content | {"epoch": 2})
        assert runs.load_checkpoint(folder / "checkpoint")["epoch"] == 1
    monkeypatch.setattr(runs.os, "replace", replace)
    runs.save_checkpoint(folder / "checkpoint", 3, content | {"epoch": 3})
    assert runs.load_checkpoint(folder / "checkpoint")["epoch"] == 3
    assert {path.name[:10] for path in (folder / "checkpoint").iterdir()} == {"epoch_0002", "epoch_0003"}


def test_loss_that_is_not_finite(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cmo.main(tiny(tmp_path, lr=1e30))
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("loss is not finite in epoch 1, step ") and "(lr 1e+30, precision no)" in line
    assert runs.load_checkpoint(tmp_path / "run" / "checkpoint") is None


def test_weights_that_are_not_finite_are_not_saved(tmp_path, capsys):
    content = dict(state={"model": {"weight": torch.tensor([1.0, float("nan")])}})
    line = refusal(lambda: runs.save_checkpoint(tmp_path, 4, content), capsys)
    assert line.startswith("epoch 5 ended with weights that are not finite")
    assert list(tmp_path.iterdir()) == []


def test_schedule_beyond_the_end_is_told(tmp_path, capsys):
    begin(tiny(tmp_path, lr_steps=(1, 160, 180)))
    assert (
        capsys.readouterr().err
        == "note: --lr-steps 160 180: not before the end of --epochs 2, so without effect\n"
    )


def test_resume_with_other_data(tmp_path, jpegs, capsys):
    """Of more classes, or of as many images that are others, for the test alone, too."""
    given = {**jpegs, "image_size": 16, "arch": "resnet8", "epochs": 2}
    cmo.main(tiny(tmp_path, **given))
    resumed, data = tiny(tmp_path, **given, resume="yes"), tmp_path / "data"
    hashes = cmo.main(resumed)["data_sha256"]
    assert len(hashes) == 2
    has = f"the run in {tmp_path}/run has"
    for part, words in (("train", "training"), ("test", "test")):
        old, new = (data / part / "class 0" / name for name in ("0.jpg", "new.jpg"))
        old.rename(new)
        with pytest.raises(SystemExit) as stop:
            cmo.main(resumed)
        line = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2 and line == (
            f"--resume: the data are 3 classes, 60 training and 9 test images, but {has} other "
            f"{words} images or labels; give it its own, or another --output-dir"
        )
        new.rename(old)
    shutil.copytree(data / "train" / "class 0", data / "train" / "class 3")
    shutil.copytree(data / "test" / "class 0", data / "test" / "class 3")
    with pytest.raises(SystemExit):
        cmo.main(resumed)
    line = capsys.readouterr().err.splitlines()[-1]
    counts = "the data are 4 classes, 80 training and 12 test images"
    assert line.startswith(f"--resume: {counts}, but {has} 3 classes, 60 training and 9 test images; ")
    with pytest.raises(SystemExit):  # nor does a dry run go by them
        cmo.main(tiny(tmp_path, **given, resume="yes", dry_run=True))
    assert capsys.readouterr().err.splitlines()[-1] == line


def test_classes_that_are_left_out_are_null(tmp_path, jpegs):
    """So that a class's number in the result is its number in the data."""
    for path in (tmp_path / "data" / "train" / "class 1").iterdir():
        path.unlink()
    given = {**jpegs, "image_size": 16, "arch": "resnet8", "allow_empty_classes": True}
    result = cmo.main(tiny(tmp_path, **given, epochs=1))
    assert result["class_names"] == ["class 0", "class 1", "class 2"]
    assert result["class_counts"] == [20, 0, 20]
    assert [value is None for value in result["per_class"]] == [False, True, False]
    seen = [value for value in result["per_class"] if value is not None]
    assert result["all"] == pytest.approx(sum(seen) / 2) and result["few"] is None
    run = begin(tiny(tmp_path, output_dir=str(tmp_path / "other")))
    run.classes, run.all_names = [1, 2], ["a", "b", "c"]
    run.tracked, run.main, run.stage = {}, False, range(1)
    run.begin_epoch(0)
    accuracy = dict(class_counts=[5, 6], per_class=[7.0, None], class_weights=[0.1, 0.2], rates=[1, 2])
    run.end_epoch(0, accuracy | dict.fromkeys(("all", "many", "medium", "few")))
    assert run.per_class == {"class_counts": [0, 5, 6], "per_class": [None, 7.0, None]}
    assert run.history[0]["class_weights"] == [None, 0.1, 0.2] and run.history[0]["rates"] == [1, 2]


def test_kept_is_the_last_checkpoint(finished, tmp_path):
    (tmp_path / "run" / "checkpoint" / "epoch_0009_mine.json").write_text("")
    assert begin(tiny(tmp_path, resume="yes")).kept() == "--resume goes on after epoch 2"


def test_more_than_ten_thousand_epochs(tmp_path):
    (tmp_path / "epoch_best.pt").write_text("mine")
    for epoch in (9998, 9999, 10000, 10001):
        runs.save_checkpoint(tmp_path, epoch, {"state": {}, "epoch": epoch})
        assert runs.load_checkpoint(tmp_path)["epoch"] == epoch
    assert runs.epochs_in(tmp_path) == [10000, 10001] and len(list(tmp_path.iterdir())) == 5


def test_errors_of_any_process_are_told(tmp_path, monkeypatch, capsys):
    run, codes = begin(tiny(tmp_path)), []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(runs, "leave", codes.append)
    run.explain(MemoryError, MemoryError(), None)
    assert codes == [1] and capsys.readouterr().err.startswith("out of memory (")


def test_signals_to_a_loader_process(monkeypatch, capsys):
    """Which inherits what its parent does at them: it says nothing, and ends only by SIGTERM."""
    handlers, codes = {}, []
    monkeypatch.setattr(runs.signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(runs.os, "_exit", codes.append)
    monkeypatch.setattr(runs, "leave", codes.append)
    runs.end_at_signals(lambda: "all is kept")
    handlers[signal.SIGTERM](signal.SIGTERM, None)
    assert codes == [143] and capsys.readouterr().err == "stopped by SIGTERM; all is kept\n"
    monkeypatch.setattr(runs.os, "getpid", lambda: 1)
    for number in (signal.SIGINT, signal.SIGTERM):
        handlers[number](number, None)
    assert codes == [143, 143] and capsys.readouterr().err == ""


def test_processes_that_do_not_see_each_other(tmp_path, capsys, monkeypatch):
    accelerator = Accelerator()
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = refusal(lambda: runs.start(accelerator, tiny(tmp_path)), capsys)
    assert line.startswith("2 processes were started but each sees 1")


def test_dry_run(tmp_path, capsys, monkeypatch):
    """Of the middle epoch two steps, two batches of the test, a checkpoint and back; nothing stays."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    begun, seen = runs.Run.record, []
    monkeypatch.setattr(runs.Run, "record", lambda run, **v: seen.append(run.epoch) or begun(run, **v))
    evaluate, tested = cmo.evaluation.summarize, []
    monkeypatch.setattr(
        cmo.evaluation, "summarize", lambda labels, *of: tested.append(len(labels)) or evaluate(labels, *of)
    )
    loaded, load = [], runs.load_checkpoint
    monkeypatch.setattr(runs, "load_checkpoint", lambda folder: loaded.append(folder) or load(folder))
    result = cmo.main(tiny(tmp_path, dry_run=True, epochs=5, las=True, las_epochs=2, las_batch_size=64))
    assert seen == [2, 2, 6, 6] and tested == [128, 128] and len(loaded) == 2
    lines = capsys.readouterr().err.splitlines()[-3:]
    assert lines[0].startswith("epochs 1 to 5: each 19 steps of ") and " and 16 test batches of " in lines[0]
    assert lines[1].startswith("epochs 6 to 7: each 21 steps of ") and "; checkpoints of 0." in lines[1]
    took = f"about {result['seconds'] / 60:.1f} minutes, and "
    assert (
        lines[2].startswith(f"--dry-run: the whole run would take {took}") and list(tmp_path.iterdir()) == []
    )


def test_time_of_a_dry_run(tmp_path, monkeypatch, capsys):
    """epochs x (steps x the second step + the first test batch + the others x the second), of all stages."""
    args = tiny(tmp_path, dry_run=True)
    run = begin(args)
    model, saved = torch.nn.Linear(1, 1), {"weight": torch.tensor([[3.0]]), "bias": torch.tensor([4.0])}
    run.stage, run.steps_per_epoch, run.step_seconds, run.tracked = range(10), 30, 0.5, {"model": model}
    (run.folder / "checkpoint").mkdir()
    runs.save_checkpoint(run.folder / "checkpoint", 0, {"state": {"model": saved}})
    run.check_stage(0, 7.0, 2.0, 4)
    assert model.weight.item() == 3 and model.bias.item() == 4  # read back
    run.stage = range(10, 11)
    run.check_stage(0, 7.0, 2.0, 4)
    run.steps_per_epoch, run.begun = 0, time.perf_counter() - 100  # a classifier that is fitted at once
    run.check_stage(0, 7.0, 2.0, 4)
    run.steps_per_epoch, run.begun = 0, time.perf_counter() - 100
    run.check_stage(0, 7.0, 7.0, 1)  # tested in one batch
    seconds = run.end_dry_run()["seconds"]
    assert seconds == pytest.approx(10 * (30 * 0.5 + 7 + 3 * 2.0) + 28 + (100 - 9 + 13) + 100, abs=1)
    assert "in all about 4.7 minutes" in capsys.readouterr().err and not run.folder.exists()


def test_dry_run_begins_at_the_beginning(finished, tmp_path, capsys):
    """Whatever its folder holds; that the run itself could not begin there is told."""
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert begin(tiny(tmp_path, dry_run=True, resume="auto")).first_epoch == 0
    capsys.readouterr()
    assert begin(tiny(tmp_path, dry_run=True)).first_epoch == 0
    assert capsys.readouterr().err.startswith(f"note: --output-dir {folder}: in use; ")
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_dry_run_looks_for_the_images(tmp_path, jpegs, capsys):
    (tmp_path / "data" / "train" / "class 0" / "x.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SystemExit):
        begin(tiny(tmp_path, **{**jpegs, "dry_run": True}))
    assert capsys.readouterr().err.splitlines()[-1].startswith("--check-data: of 70 images 1 missing")
    with pytest.raises(SystemExit) as stop:
        begin(tiny(tmp_path, check_data=True))
    assert stop.value.code == 0 and not (tmp_path / "run").exists()


def test_default_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(begin(Args(seed=3)).folder) == "runs/cmo/synthetic_100_3"
    assert str(begin(Args(dataset="imagenet_lt", imbalance=None)).folder) == "runs/cmo/imagenet_lt_0"


def test_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    line = refusal(lambda: begin(tiny(tmp_path, output_dir=str(tmp_path / "file" / "run"))), capsys)
    assert line.startswith(f"--output-dir {tmp_path}/file/run: {tmp_path}/file is not a folder that can be")


def test_leaving_takes_the_children_along(tmp_path):
    """Whatever they wait for."""
    code = "import subprocess, sys; from common import runs\n"
    code += "print(subprocess.Popen(['sleep', '600'], stdout=2).pid, flush=True); runs.leave(7)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 7
    time.sleep(0.2)
    stat = Path(f"/proc/{int(done.stdout)}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


def test_a_dry_run_goes_by_its_second_step(tmp_path, monkeypatch):
    """The first one warms up; a loader of more batches is not read on."""
    run, ticks = begin(tiny(tmp_path, dry_run=True)), iter([0.0, 5.0, 7.0, 8.0])
    run.tracked = {}
    monkeypatch.setattr(runs.time, "perf_counter", lambda: next(ticks))
    run.begin_epoch(0)
    for _ in run.steps([torch.zeros(64, 3, 8, 9)] * 5):
        run.record(loss=torch.ones(()))
    assert run.step_seconds == 2.0 and run.steps_per_epoch == 5 and run.shape == (3, 8, 9)


def test_what_is_there_is_not_deleted_unasked(tmp_path, capsys):
    """Without --overwrite no file goes, and checkpoints alone are a run, too."""
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    (tmp_path / "run" / "new_images").mkdir()
    files = [
        tmp_path / "run" / name for name in ("checkpoint/epoch_best.pt", "new_images/a.jpg", "new_images.png")
    ]
    for file in files:
        file.write_text("mine")
    cmo.main(tiny(tmp_path, epochs=1, lr_steps=()))
    assert [file.read_text() for file in files] == ["mine"] * 3
    for name in ("args.json", "metrics.jsonl", "result.json"):
        (tmp_path / "run" / name).unlink()
    capsys.readouterr()
    assert ": in use; " in refusal(lambda: begin(tiny(tmp_path)), capsys)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Caught IndexError in DataLoader worker process 0."),
        RuntimeError("[gloo/transport] Connection closed by peer"),  # but there is one process
        OSError("/home/gloor/x.png"),
    ],
    ids=str,
)
def test_other_errors_keep_their_traceback(tmp_path, monkeypatch, error):
    shown = []
    monkeypatch.setattr(runs.sys, "__excepthook__", lambda *what: shown.append(what))
    begin(tiny(tmp_path)).explain(type(error), error, None)
    assert shown == [(type(error), error, None)]
