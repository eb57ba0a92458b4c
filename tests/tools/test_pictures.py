"""tools.learned, tools.features, tools.contexts: the pictures of finished runs."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import csa
import tools
from common import datasets, models
from tests.conftest import TINY, refusal, run_here
from tools import contexts, features, learned

pytest.importorskip("matplotlib", reason="pictures need matplotlib")
SHORT = dict(TINY, epochs=1, lr_steps=(), lr=1e-3)


def size_and_colours(file):
    with Image.open(file) as image:
        return image.size, len(image.convert("RGB").getcolors(2**20))


# What is learned of each class


def finished(folder, script="meta_weights.py", log=()):
    """A folder that looks like a finished run."""
    folder.mkdir()
    result = {"script": script, "class_counts": [500, 50, 5], "args": {"arch": "resnet8"}}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return folder


def test_what_was_learned_of_each_class(tmp_path, capsys):
    """A log may begin without it; class_mean is a number, and not of each class."""
    plain = {"epoch": 0, "class_mean": 50.0, "per_class": [1.0, 2.0, 3.0]}
    rates = [{**plain, "epoch": epoch, "class_rates": [0.5, 0.3, 0.2]} for epoch in (1, 2)]
    both = {**plain, "class_weights": [1.0, 0.5, 2.0], "class_eps": [-1e-3, float("nan"), 2e-3]}
    one, two = finished(tmp_path / "1", log=[plain, *rates]), finished(tmp_path / "2", log=[both])
    counts, found = learned.read(one)
    assert counts == [500, 50, 5] and list(found) == ["class_rates"]
    epochs, values = found["class_rates"]
    assert epochs.tolist() == [2, 3] and values.tolist() == [[0.5, 0.3, 0.2]] * 2
    assert np.isnan(learned.read(two)[1]["class_eps"][1][0, 1])
    learned.main([str(one), str(two), "--output", str(tmp_path / "x.png")])
    assert capsys.readouterr().err == f"drew {tmp_path}/x.png\n"
    size, colours = size_and_colours(tmp_path / "x.png")
    assert size == (12 * 110, 8 * 110) and colours > 100


def test_runs_of_which_nothing_can_be_drawn(tmp_path):
    line = refusal(learned.read, tmp_path)
    assert line == f"{tmp_path}: holds no finished run (result.json); finish it, or name another"
    folder = finished(tmp_path / "run", log=[{"epoch": 0}])
    line = refusal(learned.main, [str(folder)])
    assert line == f"{folder}: its log has nothing of each class; name a run that learns weights or rates"
    (folder / "metrics.jsonl").write_text(json.dumps({"epoch": 0, "class_rates": [1, 2, 3]}))
    line = refusal(learned.main, [str(folder), "--output", "nowhere/x.png"])
    assert line.startswith("--output nowhere/x.png: cannot be written (")


# Features and contexts


@pytest.fixture(scope="module")
def lenet_of_csa(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lenet")
    run_here("csa.py", **SHORT, arch="lenet", bank=0, output_dir=str(folder))
    return folder


def test_features(lenet_of_csa, tmp_path, capsys):
    """Of the network inside what the script makes, with its trained weights."""
    network, test_set = features.read(lenet_of_csa)
    points, labels = features.features_of(network, test_set)
    assert points.shape == (1000, 2) and labels.tolist() == test_set.labels.tolist()
    images = test_set.images[[0, 500, 999]]
    torch.testing.assert_close(torch.from_numpy(points[[0, 500, 999]]), network.features(images))
    trained = models.load(lenet_of_csa).network.neck.state_dict()
    torch.testing.assert_close(network.neck.state_dict(), trained, rtol=0, atol=0)
    capsys.readouterr()
    features.main([str(lenet_of_csa), str(lenet_of_csa), "--output", str(tmp_path / "x.png")])
    assert capsys.readouterr().err.splitlines()[-1] == f"drew {tmp_path}/x.png"
    size, colours = size_and_colours(tmp_path / "x.png")
    assert size == (12 * 110, 5 * 110) and colours > 100


def test_contexts(run_of_csa, tmp_path, capsys):
    """Pixels of the picture against what csa.py does: rows of five images, a pixel of frame between."""
    capsys.readouterr()
    file = tmp_path / "x.png"
    contexts.main([str(run_of_csa), "--rows", "4", "--delta", "0.2", "--output", str(file)])
    assert capsys.readouterr().err.splitlines()[-1] == f"drew {file}"
    side = 24 * 4 + 2
    with Image.open(file) as image:
        assert image.size == (5 * side + 2, 4 * side + 2)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    cells = [pixels[:, 2:-2, 2 + i * side : i * side + side].double() for i in range(5)]
    picture, mask, rest, balanced, blended = (cell[:, : 24 * 4] for cell in cells)
    torch.testing.assert_close(rest, mask / 255 * picture, atol=2.0, rtol=0)
    expected = csa.blend(balanced[None], torch.cat([picture, mask[:1] / 255])[None], 0.5)[0]
    torch.testing.assert_close(blended, expected, atol=2.0, rtol=0)
    masks = mask.unique()
    assert len(masks) > 20 and mask.max() > 250


def test_contexts_are_of_sure_images(run_of_csa):
    """Whose label has delta or more, by head_u in eval mode; balanced images go round the classes."""
    network = models.load(run_of_csa)
    args = contexts.argparse.Namespace(**tools.read_result(run_of_csa)["args"])
    train_set = datasets.load(args)[0].plain()
    args.delta = 0.2
    found, balanced = contexts.gather(network, train_set, args, 5)
    assert found.shape == (5, 4, 24, 24) and balanced.shape == (5, 3, 24, 24)
    with torch.no_grad():
        p = network.eval().network(found[:, :3]).softmax(1).max(1).values
    assert (p >= 0.2).all()
    args.delta = 1.0
    line = refusal(contexts.gather, network, train_set, args, 5)
    assert line == "--rows 5: head_u is sure of fewer images; give less, or a lower --delta"


@pytest.mark.parametrize(
    "main, more, line",
    [
        (features.main, [], "its run is of --arch resnet8; only lenet has features to draw"),
        (contexts.main, [], "is a run of cmo.py; name one of csa.py"),
    ],
)
def test_runs_that_cannot_be_drawn(main, more, line, tmp_path, monkeypatch):
    folder = finished(tmp_path / "run", script="cmo.py")
    monkeypatch.setattr(models, "load", lambda folder: torch.nn.Identity())
    (folder / "result.json").write_text(
        json.dumps({"script": "cmo.py", "args": {"arch": "resnet8", "data_dir": "data"}})
    )
    assert refusal(main, [str(folder), *more]) == f"{folder}: {line}"


@pytest.mark.parametrize("rows", [0, 65])
def test_rows_of_the_picture(run_of_csa, rows):
    line = refusal(contexts.main, [str(run_of_csa), "--rows", str(rows)])
    assert line == f"--rows {rows}: must be 1 to 64, the batch of the run"
