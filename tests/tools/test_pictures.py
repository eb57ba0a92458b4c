"""tools.learned, tools.contexts, tools.pictures: the pictures of finished runs."""

import importlib
import io
import itertools
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

import bbn
import csa
import ride
import tools
from common import datasets, models
from tests.conftest import SCRIPTS, TINY, forget, parse, refusal, run_here
from tools import contexts, learned, pictures

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


# Contexts


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


def test_contexts_are_of_csa(tmp_path):
    folder = finished(tmp_path / "run", script="cmo.py")
    line = refusal(contexts.main, [str(folder)])
    assert line == f"{folder}: is a run of cmo.py; name one of csa.py"


@pytest.mark.parametrize("rows", [0, 65])
def test_rows_of_the_picture(run_of_csa, rows):
    line = refusal(contexts.main, [str(run_of_csa), "--rows", str(rows)])
    assert line == f"--rows {rows}: must be 1 to 64, the batch of the run"


# Where networks look


@pytest.fixture(scope="module")
def data():
    train_set, test_set = datasets.load(parse("cmo.py"))
    return train_set.plain(), test_set


def network_of(script, data, **options):
    """What the script would train, before that; its classifier is made to differ between classes."""
    args = parse(script, **options)
    network = importlib.import_module(script.removesuffix(".py")).make_model(data[0], args).eval()
    for name, buffer in network.named_buffers():
        if name.endswith("means"):  # of NCM
            buffer.copy_(torch.eye(10, buffer.shape[1]))
    return network


def mask_of(maps, weights):
    """csa.py's, (1 - CAM)^2, of maps and a weight of each of their channels."""
    return csa.background_masks(maps, weights, (24, 24)).detach()


def test_grad_cam_of_a_linear_head_has_a_closed_form(data):
    """That of CSA's masks, for given classes and for the predicted ones."""
    network = network_of("cmo.py", data)
    images, labels = data[1].images[::50], data[1].labels[::50]
    maps = network.feature_map(images)
    cam, logits = pictures.grad_cam(network, images, labels)
    torch.testing.assert_close(logits, network(images).detach())
    expected = mask_of(maps, network.classifier.weight[labels])
    torch.testing.assert_close((1 - cam) ** 2, expected, rtol=0, atol=1e-5)
    assert 0.05 < cam.mean() < 0.95 and (cam.amax((1, 2, 3)) > 0.9).sum() > 10
    cam, _ = pictures.grad_cam(network, images)
    expected = mask_of(maps, network.classifier.weight[logits.argmax(1)])
    torch.testing.assert_close((1 - cam) ** 2, expected, rtol=0, atol=1e-5)


def test_grad_cam_of_branches(data):
    """One sum over the channels of both blocks."""
    network = network_of("bbn.py", data)
    assert isinstance(network, bbn.BBN)
    images, labels = data[1].images[::50], data[1].labels[::50]
    trunk = network.trunk(images)
    maps = torch.cat([network.cb_block[0](trunk), network.rb_block[0](trunk)], dim=1)
    cam, _ = pictures.grad_cam(network, images, labels)
    expected = mask_of(maps, network.classifier.weight[labels])
    torch.testing.assert_close((1 - cam) ** 2, expected, rtol=0, atol=1e-5)


def test_grad_cam_of_experts(data):
    """One sum over the channels of all; their heads are cosines, whose gradient goes with the image."""
    network = network_of("ride.py", data)
    assert isinstance(network, ride.Experts)
    images, labels = data[1].images[::50], data[1].labels[::50]
    trunk = network.trunk(images)
    maps = [expert.backbone(trunk) for expert in network.experts]
    features = [each.mean((2, 3)).detach().requires_grad_() for each in maps]
    logits = sum(expert.classifier(f) for expert, f in zip(network.experts, features, strict=True))
    weights = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), features)
    cam, _ = pictures.grad_cam(network, images, labels)
    expected = mask_of(torch.cat(maps, dim=1), torch.cat(weights, dim=1))
    torch.testing.assert_close((1 - cam) ** 2, expected, rtol=0, atol=1e-5)


def test_grad_cam_of_layers_behind_the_map(data):
    """LeNet has layers between map and head: the gradient is not the same at every place."""
    network = network_of("cmo.py", data, arch="lenet")
    images, labels = data[1].images[::50], data[1].labels[::50]
    maps = network.feature_map(images).detach().requires_grad_()
    logits = network.classifier(network.pool(maps))
    (gradient,) = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), maps)
    cam, _ = pictures.grad_cam(network, images, labels)
    expected = mask_of(maps, gradient.mean((2, 3)))
    torch.testing.assert_close((1 - cam) ** 2, expected, rtol=0, atol=1e-5)


def test_the_last_map_has_places(data):
    """A ResNet-10 ends with one pixel of these images; the map before has four."""
    network = network_of("cmo.py", data, arch="resnet10")
    _, maps = pictures.last_maps(network, data[1].images[:2])
    assert [tuple(each.shape) for each in maps] == [(2, 256, 2, 2)]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    line = refusal(pictures.grad_cam, torch.nn.Sequential(torch.nn.Flatten()), torch.ones(1, 3, 2, 2))
    assert line.startswith("cam: the network has no feature map of more than a pixel")


MORE = [
    ("bbn.py", dict(manifold=True)),
    ("bbn.py", dict(arch="lenet")),
    ("ride.py", dict(arch="lenet")),
    ("class_rectification.py", dict(level="instance")),
    *[("decoupled_crt.py", dict(classifier=name)) for name in ("lws", "las", "tau", "ncm")],
]


@pytest.mark.parametrize("script, options", [*[(script, {}) for script in SCRIPTS], *MORE])
def test_networks_of_every_script(script, options, data):
    """A map of the class that is asked for, and as many features as the classifiers take."""
    network, images = network_of(script, data, **options), data[1].images[::100]
    cams = [pictures.grad_cam(network, images, torch.full((10,), k))[0] for k in (0, 9)]
    assert cams[0].shape == (10, 1, 24, 24)
    assert all(cam.isfinite().all() and 0 <= cam.min() and cam.max() > 0.5 for cam in cams)
    assert not torch.equal(*cams)
    width = 2 if options.get("arch") == "lenet" else 64
    widths = {"bbn.py": 2 * width, "ride.py": 3 * (2 if width == 2 else 48)}
    if options.get("manifold"):
        widths = {}
    features = pictures.features_of(network, [(images[:6], None), (images[6:], None)])
    assert features.shape == (10, widths.get(script, width))


def test_features_are_what_the_classifier_takes(data):
    network, images = network_of("csa.py", data), data[1].images[::100]
    with torch.no_grad():
        expected = network.network.features(images)
    features = pictures.features_of(network, [(images, None)])
    torch.testing.assert_close(torch.from_numpy(features), expected)
    line = refusal(pictures.features_of, torch.nn.Identity(), [])
    assert line == "features: the network has no module called classifier, whose input they are"


def given(*words):
    return pictures.parse([*map(str, words)])


def test_rows(data):
    """Half of the most frequent classes, half of the rarest; the same images again, or others by --seed."""
    test_set, counts = data[1], data[0].class_counts.tolist()

    def classes(*words):
        return test_set.labels[pictures.choose(test_set, counts, given("cam", "run", *words))].tolist()

    assert classes() == [0, 1, 2, 7, 8, 9]
    assert classes("--images", 3) == [0, 1, 9] and classes("--images", 1) == [0]
    assert classes("--images", 22) == [*range(10), 0, 9, *range(10)]
    assert classes("--classes", "tall bar", 3, "disk", 3) == [8, 3, 0, 3]
    chosen = [pictures.choose(test_set, counts, given("cam", "run", "--seed", seed)) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    repeated = pictures.choose(test_set, counts, given("cam", "run", "--classes", *[3] * 5))
    assert len(set(repeated)) == 5
    rest = test_set.subset((test_set.labels < 7).nonzero()[:, 0])
    chosen = pictures.choose(rest, counts, given("cam", "run"))
    assert rest.labels[chosen].tolist() == [0, 1, 2, 4, 5, 6]


@pytest.mark.parametrize(
    "words, line",
    [
        (["--images", 0], "0 rows: give --images, or --classes, for 1 to 40"),
        (["--images", 41], "41 rows: give --images, or --classes, for 1 to 40"),
        (["--classes", "cat"], "--classes cat: no such class; there are disk, square, plus, ring, "),
        (["--classes", "10"], "--classes 10: no such class; there are disk, "),
        (["--images", 2, "--classes", "disk"], "--classes: not allowed with argument --images"),
        (["--images", "x"], "--images: invalid int value: 'x'"),
    ],
)
def test_rows_that_cannot_be_drawn(words, line, data):
    def rows():
        return pictures.choose(data[1], [500] * 10, given("cam", "run", *words))

    assert refusal(rows).startswith(line)
    few = data[1].subset(range(50))
    line = refusal(pictures.choose, few, [500] * 10, given("cam", "run", "--classes", *[0] * 30, *[1]))
    assert line == "class square: has 0 test images; ask for fewer"


def overlapping(figure):
    """Pairs of texts of the figure of which one lies over the other, or one alone that it cuts."""
    figure.savefig(io.BytesIO(), dpi=figure.dpi)
    outside = set()  # matplotlib has labels of ticks, too, that it does not draw
    for axes in figure.axes:
        for i, axis in enumerate((axes.xaxis, axes.yaxis)):
            low, high = sorted(axis.get_view_interval())
            for label in axis.get_ticklabels(which="both"):
                if not (axes.axison and low <= label.get_position()[i] <= high):
                    outside.add(label)
    boxes = []
    for text in figure.findobj(Text):
        if text.get_text() and text.get_visible() and text not in outside:
            boxes.append((text.get_text(), text.get_window_extent().padded(-1)))
    found = [(text,) for text, box in boxes if box.x0 < -1 or box.x1 > figure.bbox.x1 + 1]
    for (text, box), (other, other_box) in itertools.combinations(boxes, 2):
        if box.overlaps(other_box):
            found.append((text, other))
    return found


def test_cam(run_of_csa):
    """A column for each run: what it predicts, with which probability, and whether that is right."""
    figure = pictures.draw(given("cam", run_of_csa, run_of_csa, "--images", 4))
    panels = [axes for axes in figure.axes if axes.images]
    network, result = models.load(run_of_csa), tools.read_result(run_of_csa)
    names, counts = result["class_names"], result["class_counts"]
    _, test_set = datasets.load(parse("csa.py"))
    images, labels = test_set.__getitems__(
        pictures.choose(test_set, counts, given("cam", "x", "--images", 4))
    )
    probabilities = network(images).softmax(1)
    assert len(panels) == 4 * 3
    for i, label in enumerate(labels.tolist()):
        picture, *columns = panels[3 * i : 3 * i + 3]
        assert picture.get_ylabel().startswith(names[label])
        p, k = probabilities[i].max(0)
        mark = "✓" if k == label else "✗"
        said = [axes.get_xlabel() for axes in columns]
        assert said == [f"{mark} {names[k]} {p:.2f}"] * 2
    assert overlapping(figure) == []
    # Of the true class
    figure = pictures.draw(given("cam", run_of_csa, "--classes", 9, "--true-class"))
    _, axes = [axes for axes in figure.axes if axes.images]
    images, labels = test_set.__getitems__(
        pictures.choose(test_set, counts, given("cam", "x", "--classes", 9))
    )
    expected, _ = pictures.grad_cam(network, images, labels)
    np.testing.assert_allclose(axes.images[1].get_array(), expected[0, 0], atol=1e-6)


# What they learn


def test_two_dimensions():
    """Two features are left as they are; of more the two directions of the largest variance, in percent."""
    two = np.random.RandomState(0).randn(40, 2)
    points, labels = pictures.in_two_dimensions(two, tsne=False)
    assert points is two and list(labels) == ["feature 1", "feature 2"]
    angle = np.linspace(0, 2 * np.pi, 41)[:-1]
    ellipse = np.stack([3 * np.cos(angle), np.sin(angle)], axis=1)  # variances 9 : 1
    turned, _ = np.linalg.qr(np.random.RandomState(0).randn(5, 5))
    points, labels = pictures.in_two_dimensions(7 + ellipse @ turned[:2], tsne=False)
    np.testing.assert_allclose(np.abs(points), np.abs(ellipse), atol=1e-12)
    assert labels == ["component 1 (90 % of the variance)", "component 2 (10 % of the variance)"]


def test_tsne(monkeypatch):
    features = np.random.RandomState(0).randn(12, 5)
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    line = refusal(pictures.in_two_dimensions, features, tsne=True)
    assert line == "--tsne: needs scikit-learn; pip install scikit-learn, or leave it out"
    monkeypatch.undo()
    pytest.importorskip("sklearn")
    points, labels = pictures.in_two_dimensions(features, tsne=True)
    assert points.shape == (12, 2) and labels == ("t-SNE 1", "t-SNE 2")


def test_some_of_each_class(data):
    few = pictures.some_of_each_class(data[0], 200)
    assert few.class_counts.tolist() == [20] * 7 + [13, 8, 5]
    assert pictures.some_of_each_class(data[1], 3).class_counts.tolist() == [1] * 10


def test_features(lenet_of_csa, tmp_path, capsys):
    """LeNet's two, of training images above those of test images; a marker for each split."""
    figure = pictures.draw(
        given("features", lenet_of_csa, lenet_of_csa, "--points", 500, "--splits", 100, 20)
    )
    above, other, below, _ = figure.axes
    assert above.get_title().endswith("337 training images") and below.get_title() == "500 test images"
    assert (below.get_xlabel(), below.get_ylabel()) == ("feature 1", "feature 2")
    assert [len(points.get_offsets()) for points in below.collections[:3]] == [200, 150, 150]
    assert [len(points.get_offsets()) for points in above.collections] == [200, 111, 26]
    network = models.load(lenet_of_csa).network
    few = pictures.some_of_each_class(datasets.load(parse("csa.py"))[1], 500)
    with torch.no_grad():
        expected = network.features(few.images[few.labels >= 7])
    np.testing.assert_allclose(below.collections[2].get_offsets(), expected, rtol=1e-4, atol=1e-4)
    shapes = {len(points.get_paths()[0].vertices) for points in below.collections[:3]}
    assert len(shapes) == 3
    assert overlapping(figure) == []


@pytest.fixture(scope="module")
def lenet_of_csa(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lenet")
    run_here("csa.py", **SHORT, arch="lenet", bank=0, output_dir=str(folder))
    return folder


# What they get right


def recorded(folder, size=100, **facts):
    """A folder with the result of a run on `size` classes with long names."""
    folder.mkdir()
    counts = datasets.long_tail_counts(500, size, 100)
    result = {
        "script": "cmo.py",
        "class_names": [f"a class with a long name {k}" for k in range(size)],
        "class_counts": counts,
        "per_class": [100 * k / (size - 1) for k in range(size)],
        "data_sha256": ["a", "b"],
        "shape": [3, 32, 32],
        "args": {"data_dir": "data"},
    }
    (folder / "result.json").write_text(json.dumps(result | facts))
    return folder


def test_classes(tmp_path):
    """A point for each class with test images, and the means of tenths of the classes."""
    untested = [None, *[50.0] * 99]
    runs = [recorded(tmp_path / "a"), recorded(tmp_path / "b", per_class=untested)]
    figure = pictures.draw(given("classes", *runs))
    means, points, _, other_means, *_ = figure.axes[0].lines
    assert len(points.get_xdata()) == 100 and points.get_ydata()[99] == 100
    np.testing.assert_allclose(means.get_ydata(), [100 / 99 * (10 * i + 4.5) for i in range(10)])
    np.testing.assert_allclose(other_means.get_ydata(), [50] * 10)
    assert figure.axes[0].get_xscale() == "log"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["a", "b"]
    assert overlapping(figure) == []
    figure = pictures.draw(given("classes", *runs[:1] * 2))  # once more the same
    assert overlapping(figure) == []


def test_confusion(run_of_csa, lenet_of_csa, tmp_path):
    """On the diagonal, from the most frequent class on, the accuracies that the runs recorded."""
    folder = shutil.copytree(run_of_csa, tmp_path / "run")
    result = tools.read_result(folder)
    result["class_counts"].reverse()  # so that the last class is the most frequent one
    (folder / "result.json").write_text(json.dumps(result))
    figure = pictures.draw(given("classes", folder, lenet_of_csa, "--confusion"))
    for axes, run in zip(figure.axes, (folder, lenet_of_csa), strict=False):
        shares = np.square(axes.images[0].get_array())
        np.testing.assert_allclose(np.diag(shares), tools.read_result(run)["per_class"][::-1], atol=1e-4)
        np.testing.assert_allclose(shares.sum(1), 100, rtol=1e-5)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == result["class_names"][::-1]
    assert overlapping(figure) == []


def test_confusion_of_a_hundred_classes(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "load_data", lambda *given: (None, None, None))
    monkeypatch.setattr(pictures, "confusion_of", lambda *given: torch.eye(100))
    runs = [recorded(tmp_path / "a"), recorded(tmp_path / "b")]
    figure = pictures.draw(given("classes", *runs, "--confusion"))
    assert overlapping(figure) == []
    many = recorded(tmp_path / "many", size=101)
    line = refusal(pictures.draw, given("classes", many, "--confusion"))
    assert line == "--confusion: of 101 classes nothing could be read; at most 100"


# All of it


@pytest.mark.parametrize(
    "words, line",
    [
        ([], "the following arguments are required: picture"),
        (["x"], "picture: invalid choice: 'x'"),
        (["cam"], "the following arguments are required: RUN"),
        (["cam", "nowhere"], "nowhere: holds no finished run (result.json); finish it, or name another"),
        (["features", "nowhere"], "nowhere: holds no finished run (result.json); finish it, or name another"),
        (["classes", "nowhere"], "nowhere: holds no finished run (result.json); finish it, or name another"),
        (["classes", "a", "--output", "nowhere/x.png"], "--output nowhere/x.png: cannot be written ("),
        (["classes", "a", "--output", "x.y"], "--output x.y: cannot be written ("),
        (["classes", *["a"] * 20], "classes: 20 runs are too many to tell apart; name 12"),
        (["classes", "a", "other"], "other: has other classes than a; draw it by itself"),
        (["features", "a", "other"], "other: has other classes than a; draw it by itself"),
        (["cam", "a", "images"], "images: has other test images than a; draw it by itself"),
        (["cam", "a", "size"], "size: has other test images than a; draw it by itself"),
        (["classes", "a", "size", "--confusion"], "size: has other test images than a; draw it by itself"),
        (["features", "a", "--splits", "20", "100"], "--splits 20 100: the first is the larger one"),
        (["classes", "old"], "old: its result.json has no data_sha256; run its script anew"),
    ],
)
def test_one_line_where_nothing_can_be_drawn(words, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recorded(tmp_path / "a")
    recorded(tmp_path / "other", size=10)
    recorded(tmp_path / "images", data_sha256=["a", "c"])
    recorded(tmp_path / "size", shape=[3, 64, 64])
    recorded(tmp_path / "old")
    old = json.loads((tmp_path / "old" / "result.json").read_text())
    del old["data_sha256"]
    (tmp_path / "old" / "result.json").write_text(json.dumps(old))
    assert refusal(pictures.main, words).startswith(line)


def test_other_data(run_of_csa, tmp_path, monkeypatch):
    """Where the folder of the data now holds others than the run had."""
    folder = shutil.copytree(run_of_csa, tmp_path / "run")
    result = tools.read_result(folder)
    result["data_sha256"][1] = "x"
    (folder / "result.json").write_text(json.dumps(result))
    for words in (["cam"], ["features"], ["classes", "--confusion"]):
        line = refusal(pictures.draw, given(*words, folder, "--data-dir", "elsewhere"))
        assert line == f"--data-dir elsewhere: has other test images than the run in {folder} had"


def test_without_matplotlib(tmp_path, monkeypatch):
    folder = recorded(tmp_path / "a")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    line = refusal(pictures.main, ["classes", str(folder)])
    assert line == "tools.pictures: needs matplotlib; pip install matplotlib"


def test_titles():
    assert pictures.titles_of(["runs/cmo/x_0", "runs/bbn/x_0"]) == ["cmo", "bbn"]
    assert pictures.titles_of(["runs/cmo/x_0", "runs/cmo/x_1"]) == ["x_0", "x_1"]
    assert pictures.titles_of(["runs/cmo/x_0"]) == ["x_0"]
    assert pictures.titles_of(["a" * 50], letters=20) == ["\n".join(["a" * 20, "a" * 20, "a" * 10])]


def draw_here(folder, file, capsys, name, *more):
    pictures.main([name, str(folder), *more, "--output", str(file)])
    assert capsys.readouterr().err.splitlines()[-1] == f"drew {file}"
    size, colours = size_and_colours(file)
    assert size[0] > 500 and colours > 50


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_picture_of_every_script(script, tmp_path, capsys):
    more = dict(stage2_epochs=2) if script in ("decoupled_crt.py", "balanced_meta_softmax.py") else {}
    run_here(script, **SHORT, **more, output_dir=str(tmp_path / "run"))
    forget()
    capsys.readouterr()
    for name, *more in (["cam"], ["features"], ["classes"], ["classes", "--confusion"]):
        draw_here(tmp_path / "run", tmp_path / "x.png", capsys, name, *more)


def test_files(tmp_path, jpegs, capsys):
    """Images that are read from files by worker processes, of a folder that was moved."""
    run_here("cmo.py", **{**jpegs, "epochs": 1, "num_workers": 1, "output_dir": str(tmp_path / "run")})
    (tmp_path / "data").rename(tmp_path / "moved")
    capsys.readouterr()
    for name in ("cam", "features"):
        draw_here(tmp_path / "run", tmp_path / "x.png", capsys, name, "--data-dir", str(tmp_path / "moved"))
    line = refusal(pictures.main, ["cam", str(tmp_path / "run")])
    assert line.startswith(
        f"--data-dir {tmp_path}/data: no such folder; docs/data.md says what image_folder needs there"
    )
