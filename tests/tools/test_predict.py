"""tools.predict: classes of images, and the accuracy that the run recorded, of any script's run."""

import csv
import io
import json

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import tools
from common import datasets, models
from tests.conftest import refusal, run_here
from tools import predict


@pytest.fixture
def photos(tmp_path, jpegs, capsys):
    """(run folder, result) of a run on files that worker processes read."""
    folder = tmp_path / "run"
    result = run_here("cmo.py", **{**jpegs, "epochs": 1, "num_workers": 1, "output_dir": str(folder)})
    capsys.readouterr()
    return folder, result


def printed(capsys, *words):
    predict.main([*map(str, words)])
    return capsys.readouterr().out


def accuracy(capsys, *words):
    return json.loads(printed(capsys, *words))


def recorded(result):
    names = ("all", "many", "medium", "few", "class_mean", "top5", "ece")
    return {name: result[name] for name in names}


def test_files(photos, tmp_path, capsys):
    """Accuracy of the run, of its test folder and of a list of it; classes of images; other folders."""
    folder, result = photos
    data = tmp_path / "data"
    for given in (data, data / "test"):
        told = accuracy(capsys, folder, "--data-dir", given)
        assert {name: told[name] for name in recorded(result)} == pytest.approx(recorded(result))
    lines = [f"test/class {k}/{i}.jpg {k}" for k in (0, 2) for i in range(3)]  # without one class
    (tmp_path / "list.txt").write_text("\n".join(lines))
    told = accuracy(capsys, folder, "--test-list", tmp_path / "list.txt")
    expected = [result["per_class"][k] for k in (0, 2)]
    assert told["class_mean"] == pytest.approx(sum(expected) / 2)

    # Classes
    network = models.load(folder)
    first, other = data / "test/class 1/0.jpg", data / "test/class 2/1.jpg"
    said = printed(capsys, folder, other, data / "test/class 1").splitlines()
    assert [line.partition(": ")[0] for line in said] == [
        *map(str, [other, *[data / f"test/class 1/{i}.jpg" for i in range(3)]])
    ]
    pixels = datasets.fit(72)(datasets.read_image(first))
    with torch.no_grad():
        probabilities = network(pixels[None]).softmax(1)[0]
    best = probabilities.argsort(descending=True).tolist()
    shown = ", ".join(f"class {k} {probabilities[k]:.3f}" for k in best)
    assert said[1] == f"{first}: {shown}"
    table = list(csv.DictReader(io.StringIO(printed(capsys, folder, first, "--csv"))))
    assert table[0]["class 1"] == f"class {best[0]}" and table[0]["image"] == str(first)
    assert float(table[0]["probability 3"]) == pytest.approx(probabilities[best[2]].item(), abs=1e-6)

    # What cannot be read
    line = refusal(predict.main, [str(folder), str(data / "none.jpg")])
    assert line == f"{data}/none.jpg: no such image or folder; name another"
    (data / "test" / "oak").mkdir()
    line = refusal(predict.main, [str(folder), "--data-dir", str(data)])
    assert line.startswith(f"{data}/test/oak: the run has no class of this name")
    line = refusal(predict.main, [str(folder), str(data / "test" / "oak")])
    assert line == f"{data}/test/oak: there is no image in this folder; name another"
    line = refusal(predict.main, [str(folder), "--data-dir", str(data / "test" / "oak")])
    assert line.startswith(f"--data-dir {data}/test/oak: no image in a class folder there")
    line = refusal(predict.main, [str(folder), "--data-dir", "nowhere"])
    assert line.startswith("--data-dir nowhere: no such folder")


def test_the_own_set_of_a_run(run_of_csa, capsys):
    """Of another script, whose network predicts with one of several heads."""
    capsys.readouterr()
    result = tools.read_result(run_of_csa)
    told = accuracy(capsys, run_of_csa, "--dataset", "synthetic")
    assert {name: told[name] for name in recorded(result)} == pytest.approx(recorded(result))


@pytest.fixture
def grey(tmp_path, monkeypatch):
    """A network for grey images of 28 pixels, and what predict needs of its run."""
    images = datasets.LabelledImages([], [], list("abc"), (1, 28, 28), ((0.0,), (1.0,)))
    network = models.build("lenet", images, 0).eval()
    network.images = images
    result = {"script": "cmo.py", "args": {"batch_size": 2}, "precision": "no"}
    monkeypatch.setattr(models, "load", lambda folder: network)
    monkeypatch.setattr(tools, "read_result", lambda folder: result)
    return network


def test_grey_networks_get_grey_images(grey, tmp_path, capsys):
    """In colour or not, of any size; the last batch is smaller."""
    pixels = torch.randint(0, 256, (1, 28, 28), dtype=torch.uint8)
    image = v2.functional.to_pil_image(pixels)
    image.save(tmp_path / "grey.png")
    image.convert("RGB").save(tmp_path / "rgb.png")
    image.resize((56, 56), Image.Resampling.NEAREST).save(tmp_path / "two.png")
    lines = printed(capsys, "run", tmp_path).splitlines()
    with torch.no_grad():
        probabilities = grey(pixels[None]).softmax(1)[0]
    best = probabilities.argmax().item()
    said = [line.partition(": ")[2] for line in lines]
    assert len(said) == 3 and said[0] == said[1]
    assert said[0].startswith(f"{'abc'[best]} {probabilities[best]:.3f}, ")


@pytest.mark.parametrize(
    "words, line",
    [
        (["run"], "name either images or, with --data-dir or --test-list, test data"),
        (["run", "a.png", "--data-dir", "x"], "name either images or, with --data-dir or --test-list, test"),
        (["run", "a.png"], "run: holds no finished run (result.json); finish it, or name another"),
        ([], "the following arguments are required: run"),
        (["run", "--image-size", "x"], "--image-size: invalid int value: 'x'"),
    ],
)
def test_one_line_where_it_cannot_predict(words, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal(predict.main, words).startswith(line)


def test_precision_is_that_of_the_run(grey):
    """As Accelerate's autocast in the run's own test."""
    images = torch.randint(0, 256, (4, 1, 28, 28), dtype=torch.uint8)
    _, single = predict.predict(grey, [images])
    _, half = predict.predict(grey, [images], "bf16")
    assert not torch.equal(single, half)
    torch.testing.assert_close(single, half, atol=0.05, rtol=0)
