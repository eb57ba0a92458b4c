"""common.features: the picture of a LeNet's features, of any script's run."""

import pytest
import torch
from PIL import Image

import csa
import decoupled_crt
from common import features, models
from tests.conftest import TINY, refusal


def tiny(folder, **options):
    return {**TINY, "arch": "lenet", "epochs": 1, "lr_steps": (), "output_dir": str(folder), **options}


def test_picture_of_two_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    decoupled_crt.main(decoupled_crt.Args(**tiny(tmp_path / "lws"), classifier="lws", stage2_epochs=1))
    csa.main(csa.Args(**tiny(tmp_path / "csa"), delta=0.0))
    for name in ("lws", "csa"):
        network, test_set = features.read(tmp_path / name)
        points, labels = features.features(network, test_set, batch_size=300)
        assert points.shape == (1000, 2) and labels.tolist() == test_set.labels.tolist()
        images = test_set.__getitems__([0, 500, 999])[0]
        torch.testing.assert_close(torch.from_numpy(points[[0, 500, 999]]), network.features(images))
        trained = [part.abs().sum().item() for part in network.neck.parameters()]
        fresh = models.build("lenet", 10, 0, (3, 24, 24)).neck.parameters()
        assert trained != [part.abs().sum().item() for part in fresh]
    capsys.readouterr()
    features.main([str(tmp_path / "lws"), str(tmp_path / "csa"), "--output", str(tmp_path / "x.png")])
    assert capsys.readouterr().err.splitlines()[-1] == f"drew {tmp_path}/x.png"
    with Image.open(tmp_path / "x.png") as image:
        assert image.size == (12 * 120, 5 * 120) and len(image.convert("RGB").getcolors(2**20)) > 100


def test_runs_that_cannot_be_drawn(tmp_path, capsys):
    assert "holds no finished run" in refusal(lambda: features.read(tmp_path), capsys)
    csa.main(csa.Args(**tiny(tmp_path / "run", arch="resnet8"), delta=0.0))
    capsys.readouterr()
    line = refusal(lambda: features.read(tmp_path / "run"), capsys)
    assert line == f"{tmp_path}/run: its run is of --arch resnet8; only lenet has features to draw"
