"""benchmarks: each gives its line on a CPU with small options. What the numbers are is not tested."""

import argparse
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch.autograd import DeviceType

import cmo
from benchmarks import csa_step, files, gpu, meta_step, speed, sync
from tests.conftest import ROOT, SCRIPTS, close, environment, parse

SMALL = dict(arch="resnet8", batch_size=32, steps=4, rounds=1, workers=0)


def test_speed(tmp_path):
    options = argparse.Namespace(**SMALL, parts=["step", "loading", "authors"])
    line = speed.measure(options, str(tmp_path))
    ratios = [name for name in line if "_over_" in name]
    assert len(ratios) == 3 and all(line[name] > 0 for name in ratios)
    assert {"device", "torch", "threads", "commit", "precision"} <= set(line)


def test_csa_step(tmp_path):
    assert csa_step.measure(argparse.Namespace(**SMALL), str(tmp_path))["epoch_over_passes"] > 0


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_meta_step():
    """Both ways give one gradient."""
    options = argparse.Namespace(arch="resnet8", batch_size=8)
    steps = meta_step.make_steps(options, Accelerator())
    steps["plain"]()
    product, double = steps["product"](), steps["double"]()
    assert product.norm() > 0
    torch.testing.assert_close(product, double, rtol=1e-4, atol=1e-9)


def test_a_step_that_waits_is_seen(tmp_path, monkeypatch):
    """And cmo.py's own steps do not."""
    original = cmo.weighted_mean

    def waiting(accelerator, losses, weights):
        return original(accelerator, losses, weights * weights.max().item())

    monkeypatch.setattr(cmo, "weighted_mean", waiting)
    (line,) = sync.measure("cmo.py", tmp_path, ["--p-mix", "0"])
    assert line["waits_per_step"] == 1
    assert "convolution" in " ".join(line["percent_of_time"])


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_steps_that_wait(script, tmp_path):
    """None but those that learn from what they have just seen: CSA's bank, the Meta Sampler's draws."""
    most = {"csa.py": 1, "balanced_meta_softmax.py": 1}.get(script, 0)
    lines = sync.measure(script, tmp_path)
    assert lines and all(line["waits_per_step"] <= most for line in lines)


@pytest.mark.slow
def test_files(tmp_path):
    files.generate(tmp_path, 128)
    line = files.measure(tmp_path, argparse.Namespace(limit=16, epochs=2))
    assert line["decode_ours"] > 0 and line["loader_2_workers"] > 0 and len(line["memory_mb"]) == 2


def test_kernels_of_a_step():
    """2 steps of 4 ms each; the profiler saw 6000 microseconds of kernels and copies."""
    kinds = [
        ("convolution", 3000, DeviceType.CUDA, False),
        ("Memcpy HtoD", 2000, DeviceType.CUDA, False),
        *[(f"small {i}", 250, DeviceType.CUDA, False) for i in range(4)],
        ("Optimizer.step#SGD.step", 5000, DeviceType.CUDA, True),  # the time of the kernels within it
        ("cudaLaunchKernel", 7000, DeviceType.CPU, False),
    ]
    names = ("key", "self_device_time_total", "device_type", "is_user_annotation")
    averages = [SimpleNamespace(**dict(zip(names, kind, strict=True))) for kind in kinds]
    line = gpu.of_kernels(averages, 2, ms_per_step=4.0)
    close(line["kernel_ms_per_step"], 3.0)
    close(line["idle_share"], 0.25)
    assert line["percent_of_kernels"][:2] == [[50, "convolution"], [33, "Memcpy HtoD"]]
    assert len(line["percent_of_kernels"]) == 5
    assert "failed" in gpu.of_kernels(averages[-1:], 2, 4.0)


def test_random_images_in_the_shape_of_cifar100(tmp_path):
    """10,847 of them, and of the test images a share."""
    args = parse("cmo.py", dataset="cifar100_lt", data_dir=str(tmp_path))
    train, test = gpu.load(args, share=1)
    assert (len(train), train.class_counts.max(), train.class_counts.min(), len(test)) == (
        10847,
        500,
        5,
        10000,
    )
    assert train.images.shape[1:] == (3, 32, 32) and train.augmentation
    assert len(gpu.load(args, share=2 / 84)[1]) == 239


def test_a_part_that_fails(tmp_path, monkeypatch, capsys):
    """It is told, and so is one that takes too long; the others go on."""
    monkeypatch.setattr(gpu, "CHECKS", ["script nothing.py bf16"])
    monkeypatch.setattr(gpu, "MEASURES", ["epoch fp32 inductor"])
    monkeypatch.setattr(sys, "argv", ["gpu", "--steps", "1", "--output", str(tmp_path / "lines.jsonl")])
    with pytest.raises(SystemExit) as stop:
        gpu.main()
    assert stop.value.code == 1
    failed, skipped = map(json.loads, (tmp_path / "lines.jsonl").open())
    assert failed["failed"] == "KeyError: 'nothing.py'"
    assert failed["part"] == "script nothing.py bf16" and failed["device"] and failed["torch"]
    assert "skipped" in skipped and "failed" not in skipped
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [failed, skipped]
    options = argparse.Namespace(steps=1, data_dir=str(tmp_path), folder=tmp_path)
    assert gpu.run_part("resume cmo.py fp32", 0.1, options)["failed"] == "took more than 0 s"


@pytest.mark.slow
def test_everything_on_a_gpu(tmp_path):
    """Its trial on a CPU, from another folder."""
    file = tmp_path / "lines.jsonl"
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--steps", "2", "--output", str(file)]
    python = environment(PYTHON=sys.executable)
    done = subprocess.run(command, cwd=tmp_path, env=python, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = {line["part"]: line for line in map(json.loads, file.open())}
    assert set(lines) == {*gpu.CHECKS, *gpu.MEASURES}
    assert sum("skipped" in line and "compiled" in line["skipped"] for line in lines.values()) == 6
    assert all(f"script {script} bf16" in lines for script in SCRIPTS)
    assert lines["resume cmo.py bf16"]["equal"]
    assert lines["epoch bf16"]["precision"] == "bf16" and lines["epoch bf16"]["released_over_ours"] > 0
    assert lines["whole fp32"]["epochs"] == 2
