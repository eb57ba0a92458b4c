"""common.learned: the picture of what a run learned of each class."""

import json

import pytest
from PIL import Image

import balanced_meta_softmax
import meta_weights
from common import learned
from tests.conftest import TINY, refusal


def test_picture_of_two_runs(tmp_path, capsys):
    """One has the class rates of stage 2, the other mean weights and mean eps of its second part."""
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    own = dict(TINY, arch="lenet", lr_steps=(), lr=0.001, epochs=1)
    sampler = dict(own, epochs=2, stage2_epochs=2, meta_batch_size=40, output_dir=str(tmp_path / "sampler"))
    balanced_meta_softmax.main(balanced_meta_softmax.Args(**sampler))
    weights = dict(own, epochs=2, pretrain_epochs=1, dev_per_class=5, output_dir=str(tmp_path / "weights"))
    meta_weights.main(meta_weights.Args(**weights))
    counts, found = learned.read(tmp_path / "sampler")
    epochs, values = found["class_rates"]
    assert list(found) == ["class_rates"] and epochs.tolist() == [3, 4] and values.shape == (2, 10)
    assert values.sum(1) == pytest.approx([1, 1]) and counts[:2] == [500, 299]
    _, found = learned.read(tmp_path / "weights")
    assert list(found) == ["class_eps", "class_weights"] and found["class_eps"][0].tolist() == [2]
    capsys.readouterr()
    folders = [str(tmp_path / name) for name in ("sampler", "weights")]
    learned.main([*folders, "--output", str(tmp_path / "x.png")])
    assert capsys.readouterr().err == f"drew {tmp_path}/x.png\n"
    with Image.open(tmp_path / "x.png") as image:
        assert image.size == (12 * 110, 8 * 110) and len(image.convert("RGB").getcolors(2**20)) > 100


def test_runs_that_cannot_be_drawn(tmp_path, capsys):
    line = refusal(lambda: learned.read(tmp_path), capsys)
    assert line == f"{tmp_path}: holds no finished run; name the folder of one"
    (tmp_path / "result.json").write_text(json.dumps({"class_counts": [3, 2]}))
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"epoch": 0}) + "\n")
    line = refusal(lambda: learned.read(tmp_path), capsys)
    assert line == f"{tmp_path}: its log has nothing of each class; a run of a script that learns it has"
