"""common.runs: folders, checkpoints, the log and the result."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

import cmo
from common import cli, models, runs, synthetic
from tests.conftest import ROOT, TINY, environment, launch, lines_of, parse, refusal, run_here, state_of


def tiny(folder, **options):
    return parse("cmo.py", **{**TINY, "p_mix": 0.0, "output_dir": folder, **options})


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The folder and the result of a finished run."""
    folder = tmp_path_factory.mktemp("original") / "run"
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    return folder, cmo.main(tiny(folder))


@pytest.fixture
def finished(original, tmp_path):
    """A copy of them."""
    shutil.copytree(original[0], tmp_path / "run")
    return tmp_path / "run", original[1]


def begin(args):
    return runs.Run(Accelerator(), args)


def strict(text):
    """JSON without NaN and Infinity."""

    def refuse(constant):
        raise AssertionError(f"{constant} in JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_a_run_leaves(tmp_path, capsys):
    folder, result = tmp_path / "run", cmo.main(tiny(tmp_path / "run"))
    names = [".lock", "args.json", "checkpoint.pt", "metrics.jsonl", "model.safetensors", "result.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert strict((folder / "args.json").read_text())["imbalance"] == 100
    lines = [strict(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert [line["lr"] for line in lines] == pytest.approx([0.05, 0.0005])
    stored = strict((folder / "result.json").read_text())
    assert stored == json.loads(json.dumps(result))
    printed = strict(capsys.readouterr().out)
    assert printed == {key: value for key, value in stored.items() if not isinstance(value, list)}
    assert stored["class_names"] == list(synthetic.SHAPES) and stored["imbalance_reached"] == 100
    assert stored["class_counts"] == [500, 299, 179, 107, 64, 38, 23, 13, 8, 5]
    assert stored["shape"] == [3, 24, 24] and stored["threads"] == 1 and len(stored["data_sha256"]) == 2
    assert result["script"] == "cmo.py" and result["num_processes"] == 1 and result["precision"] == "no"
    assert len(result["per_class"]) == 10 and result["best_on_test"] >= result["all"]
    assert set(result["versions"]) == {"torch", "torchvision", "accelerate", "numpy"}
    assert len(result["script_sha256"]) == 64


def test_result_is_of_the_final_weights(finished):
    folder, result = finished
    packed = Path(folder, "model.safetensors").read_bytes()
    assert hashlib.sha256(packed).hexdigest() == result["weights_sha256"]
    loaded = models.load(folder).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in state_of(folder).items())


def test_a_folder_in_use_is_refused(finished):
    folder, _ = finished
    line = refusal(begin, tiny(folder))
    assert line == f"--output-dir {folder}: holds a run; --resume, --overwrite, or name another"
    (folder / "checkpoint.pt").unlink()  # to save space: the result is not lost
    assert refusal(begin, tiny(folder)) == line


def test_resume_is_stronger_than_overwrite(finished):
    folder, result = finished
    again = cmo.main(tiny(folder, resume=True, overwrite=True))
    assert again["seconds"] == result["seconds"]  # of the epochs that were trained then


def test_a_second_run_is_kept_out_while_one_is_writing(tmp_path):
    """And the lock that a dead run left is none."""
    folder = tmp_path / "run"
    folder.mkdir()
    code = f"import fcntl, time; f = open('{folder}/.lock', 'w'); fcntl.lockf(f, 2); print(1, flush=True)"
    other = subprocess.Popen(
        [sys.executable, "-c", code + "; time.sleep(60)"], stdout=subprocess.PIPE, text=True
    )
    other.stdout.readline()
    line = refusal(begin, tiny(folder))
    assert line == f"--output-dir {folder}: a run is writing there; name another one"
    other.kill()
    other.wait()
    begin(tiny(folder))


def test_overwrite_deletes_the_run_and_nothing_else(finished):
    folder, _ = finished
    (folder / "new_images").mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "new_images" / "mine.jpg").write_text("mine")
    refusal(cmo.main, tiny(folder, overwrite=True, arch="nothing"))  # what is refused changes nothing
    assert json.loads((folder / "args.json").read_text())["arch"] == "resnet8"
    run = begin(tiny(folder, overwrite=True))
    assert run.history == [] and (folder / "checkpoint.pt").exists()
    list(run.epochs(range(0), model=torch.nn.Linear(1, 1)))
    left = [".lock", "args.json", "new_images", "notes.txt"]
    assert sorted(path.name for path in folder.iterdir()) == left
    assert (folder / "new_images" / "mine.jpg").read_text() == "mine"


def test_resuming_a_finished_run_repeats_its_result(finished, capsys):
    folder, result = finished
    (folder / "result.json").unlink()
    again = cmo.main(tiny(folder, resume=True))
    for name in ("all", "few", "per_class", "loss", "seconds", "weights_sha256", "args"):
        assert name == "args" or again[name] == result[name]
    assert "epoch 2 loss" not in capsys.readouterr().err and len(lines_of(folder)) == 2


def test_resume_without_a_checkpoint(tmp_path, capsys):
    assert begin(tiny(tmp_path / "run", resume=True)).history == []
    assert f"note: a new run begins in {tmp_path}/run\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, complaint",
    [
        (dict(lr=0.2), "--lr 0.2: the run in {} has 0.05; give that"),
        (dict(arch="lenet"), "--arch lenet: the run in {} has resnet8; give that"),
    ],
)
def test_resume_with_other_options(finished, options, complaint):
    folder, _ = finished
    assert refusal(begin, tiny(folder, resume=True, **options)) == complaint.format(folder)


def test_resume_with_another_precision(finished, monkeypatch):
    folder, _ = finished
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    line = refusal(begin, tiny(folder, resume=True))
    assert line == f"mixed precision bf16: the run in {folder} has no; give that"


def test_resume_with_other_threads_is_told(finished, capsys):
    folder, _ = finished
    torch.set_num_threads(2)
    begin(tiny(folder, resume=True))
    told = "note: 2 threads, not 1 as before: other draws or last bits\n"
    assert told in capsys.readouterr().err


def test_resume_of_another_script(finished):
    folder, _ = finished
    content = torch.load(folder / "checkpoint.pt")
    content["facts"]["script"] = "bbn.py"
    runs.write(folder / "checkpoint.pt", content)
    line = refusal(begin, tiny(folder, resume=True))
    assert line == f"script cmo.py: the run in {folder} has bbn.py; give that"


def test_resume_with_other_data(tmp_path, jpegs):
    """As many images that are others, for the test alone, too."""
    given = {**jpegs, "image_size": 16, "arch": "resnet8", "epochs": 1, "augment": "weak"}
    cmo.main(tiny(tmp_path / "run", **given))
    for part in ("train", "test"):
        old, new = (tmp_path / "data" / part / "class 0" / name for name in ("0.jpg", "1.jpg"))
        content = old.read_bytes()
        old.write_bytes(new.read_bytes())
        line = refusal(cmo.main, tiny(tmp_path / "run", **given, resume=True))
        assert line == f"--resume: the run in {tmp_path}/run has other images or labels; give it its own"
        old.write_bytes(content)


class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "pickle", "older"])
def test_damaged_checkpoints(finished, damage, monkeypatch):
    """One line, nothing loaded; a pickle with code in it runs nothing."""
    folder, _ = finished
    file = folder / "checkpoint.pt"
    monkeypatch.chdir(folder)
    if damage == "pickle":
        torch.save(Code(), file)
    elif damage == "older":
        torch.save({"script": "cmo.py", "args": {}}, file)
    else:
        content = file.read_bytes()
        file.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"text"}[damage])
    line = refusal(begin, tiny(folder, resume=True))
    assert line == f"--resume: {file} is no checkpoint, or damaged; --overwrite begins anew"
    assert not (folder / "executed").exists()


def test_a_kill_while_writing_leaves_what_was_there(finished, monkeypatch):
    folder, _ = finished
    file = folder / "checkpoint.pt"
    content, before = torch.load(file), file.read_bytes()

    def killed(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            runs.write(file, content | {"epoch": 7})
    assert file.read_bytes() == before
    runs.write(file, content | {"epoch": 7})
    assert torch.load(file)["epoch"] == 7


def test_full_disk(finished, monkeypatch):
    """One line, no half file, and the checkpoint before it in its place."""
    folder, _ = finished
    content = torch.load(folder / "checkpoint.pt")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs.os, "fsync", full)
    line = refusal(runs.write, folder / "checkpoint.pt", content | {"epoch": 7})
    assert line.startswith(f"{folder}/checkpoint.pt: cannot be written ([Errno 28] No space left on device)")
    assert torch.load(folder / "checkpoint.pt")["epoch"] == 1 and not list(folder.glob("*.tmp"))


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for name, cause in (("file", "File exists"), ("x" * 300, "File name too long")):
        with pytest.raises(OSError) as raised:
            begin(tiny(tmp_path / name))
        assert cli.one_line(raised.value) == f"{tmp_path}/{name}: {cause}; mend that, and start again"


def test_loss_that_is_not_finite(tmp_path):
    line = refusal(cmo.main, tiny(tmp_path / "run", lr=1e30))
    assert line == "the network's outputs are not finite; lower --lr"
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_weights_that_are_not_finite_are_not_saved(finished):
    """Those of the last step of an epoch, say, whose loss was finite."""
    folder, _ = finished
    run = begin(tiny(folder, resume=True, epochs=2))
    before = (folder / "checkpoint.pt").read_bytes()
    run.data, run.done = {}, -1
    for epoch in run.epochs(range(1), model=torch.nn.Linear(1, 1)):
        run.objects["model"].weight.data.fill_(float("nan"))
        line = refusal(run.end_epoch, epoch, {})
    assert line == "the weights are not finite; the checkpoint before is kept, lower --lr"
    assert (folder / "checkpoint.pt").read_bytes() == before


def test_the_folder_of_stage_1_is_another(finished):
    folder, _ = finished
    given = dict(stage1=str(folder), output_dir=str(folder), overwrite=True)
    line = refusal(run_here, "decoupled_crt.py", **given)
    assert line == f"--stage1 {folder}: is the folder of this run, too; give another --output-dir"
    assert (folder / "model.safetensors").exists()


def test_launches_that_would_train_something_else(tmp_path, monkeypatch):
    accelerator = Accelerator()
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = refusal(runs.Run, accelerator, tiny(tmp_path / "run"))
    assert line == "several processes, each of which sees itself alone; set ACCELERATE_USE_CPU=true"
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    line = refusal(begin, tiny(tmp_path / "run"))
    assert line == "gradient accumulation: is not for these methods; lower --batch-size instead"
    monkeypatch.setattr(Accelerator, "device", torch.device("mps"))
    line = refusal(begin, tiny(tmp_path / "run"))
    assert line == "device mps: has no double precision; set ACCELERATE_USE_CPU=true"
    assert not (tmp_path / "run").exists()


def test_trackers(tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.is_wandb_available", lambda: False)
    line = refusal(cmo.main, tiny(tmp_path / "run", log_with="wandb"))
    assert line == "--log-with wandb: is not installed; install it, or leave it out"
    line = refusal(tiny, tmp_path / "run", log_with="x")
    assert line.startswith("--log-with x: must be one of tensorboard, wandb, ")


def test_default_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(begin(tiny(None)).folder) == "runs/cmo/synthetic_100_0"


def test_a_closed_stderr_ends_no_run(tmp_path):
    """Nor one that is full; what was trained is kept."""
    line = [sys.executable, str(ROOT / "cmo.py"), "--epochs", "1", "--batch-size", "600"]
    for name, redirection in (("closed", "2>&-"), ("full", "2>/dev/full")):
        command = " ".join([*line, "--output-dir", str(tmp_path / name), redirection])
        done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment())
        assert done.returncode == 0 and json.loads(done.stdout)["epoch"] == 0
        assert (tmp_path / name / "checkpoint.pt").exists()


@pytest.mark.slow
def test_launched_with_several_processes_that_see_themselves_alone(tmp_path):
    done = launch(
        "cmo.py", 2, dict(ACCELERATE_USE_CPU="false", CUDA_VISIBLE_DEVICES=""), output_dir=tmp_path / "run"
    )
    assert done.returncode != 0 and "each of which sees itself alone" in done.stderr
