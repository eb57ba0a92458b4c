"""benchmarks: each gives its line on a CPU with small options. What the numbers are is not tested."""

import argparse

import pytest
import torch
from accelerate import Accelerator

import cmo
from benchmarks import csa_step, files, meta_step, speed, sync
from tests.conftest import SCRIPTS

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
