"""tools.check_data: what is missing, broken, in both parts or in two classes is named, all in one pass."""

import contextlib
import io
import shutil
import sys

import pytest
from PIL import Image

import tools
from common.cli import Refused
from tools import check_data


def problems(*words):
    """The lines with which the data are refused."""
    said = io.StringIO()
    with pytest.raises(Refused) as refused, contextlib.redirect_stderr(said):
        check_data.main([*map(str, words)])
    return [*said.getvalue().splitlines(), str(refused.value)]


def counts(missing=0, broken=0, both=0, two=0):
    return f"{missing} missing, {broken} broken, {both} for training and testing, {two} in two classes"


def test_sound_folders(jpegs, capsys):
    check_data.main(["--data-dir", jpegs["data_dir"]])
    assert capsys.readouterr().out == "all 69 images of 3 classes are there\n"
    check_data.main(["--data-dir", jpegs["data_dir"], "--decode"])
    assert capsys.readouterr().out == "all 69 images of 3 classes are there and can be read\n"


def test_sound_lists(jpeg_lists, tmp_path, capsys):
    lists = ["--train-list", jpeg_lists["train_list"], "--test-list", jpeg_lists["test_list"]]
    more = ["--more-lists", str(tmp_path / "dev.txt")]  # of training images
    check_data.main(["--dataset", "image_list", "--data-dir", jpeg_lists["data_dir"], *lists, *more])
    assert capsys.readouterr().out == "all 75 images of 3 classes are there\n"


def test_all_broken_images_are_named(jpegs, tmp_path):
    broken = [tmp_path / "data" / "train" / "class 1" / f"{i}.jpg" for i in (0, 7)]
    for file in broken:
        file.write_bytes(file.read_bytes()[:300])
    (tmp_path / "data" / "test" / "class 2" / "a.png").write_text("")
    check_data.main(["--data-dir", jpegs["data_dir"]])
    *lines, last = problems("--data-dir", jpegs["data_dir"], "--decode")
    named = [line.partition(": not readable as an image (")[0] for line in lines]
    assert named == [*map(str, broken), f"{tmp_path}/data/test/class 2/a.png"]
    assert last == f"--data-dir {tmp_path}/data: of 70 images {counts(broken=3)}"


@pytest.mark.parametrize("decode", [[], ["--decode"]])
def test_all_missing_images_are_named(jpeg_lists, tmp_path, decode):
    missing = [tmp_path / "data" / name for name in ("train/class 0/3.jpg", "test/class 1/0.jpg")]
    for file in missing:
        file.unlink()
    lists = ["--train-list", jpeg_lists["train_list"], "--test-list", jpeg_lists["test_list"]]
    *lines, last = problems("--dataset", "image_list", "--data-dir", tmp_path / "data", *lists, *decode)
    assert [line.partition(": no such image")[0] for line in lines] == [*map(str, missing)]
    assert last.endswith(f"of 69 images {counts(missing=2)}")


def test_another_edition(jpeg_lists, tmp_path):
    for k in (0, 1):
        shutil.rmtree(tmp_path / "data" / "train" / f"class {k}")
    lists = ["--train-list", jpeg_lists["train_list"], "--test-list", jpeg_lists["test_list"]]
    *lines, last = problems("--dataset", "image_list", "--data-dir", tmp_path / "data", *lists)
    assert len(lines) == 40 and last.endswith("; is it another edition of the data set?")


def test_an_image_of_both_parts(jpeg_lists, tmp_path):
    """In both lists; with other development images, too."""
    with open(tmp_path / "test.txt", "a") as file:
        file.write("\ntrain/class 2/5.jpg 2")
    lists = ["--train-list", jpeg_lists["train_list"], "--test-list", jpeg_lists["test_list"]]
    words = ["--dataset", "image_list", "--data-dir", tmp_path / "data", *lists]
    both = f"{tmp_path}/data/train/class 2/5.jpg: for testing and for training"
    assert problems(*words)[0] == both
    (tmp_path / "dev.txt").write_text("test/class 0/1.jpg 0")
    lines = problems(*words, "--more-lists", tmp_path / "dev.txt")
    assert lines[1] == f"{tmp_path}/data/test/class 0/1.jpg: for testing and for training"
    assert lines[2].endswith(f"of 71 images {counts(both=2)}")


def test_copies_under_other_names(jpegs, tmp_path):
    data = tmp_path / "data"
    shutil.copy(data / "train/class 0/1.jpg", data / "test/class 0/copy.jpg")
    shutil.copy(data / "train/class 0/2.jpg", data / "train/class 1/copy.jpg")
    shutil.copy(data / "train/class 0/3.jpg", data / "train/class 0/copy.jpg")  # does no harm
    check_data.main(["--data-dir", str(data)])
    lines = problems("--data-dir", data, "--decode")
    assert lines == [
        f"{data}/train/class 1/copy.jpg: of class class 1 and class 0, where it is train/class 0/2.jpg",
        f"{data}/test/class 0/copy.jpg: for testing and for training, where it is train/class 0/1.jpg",
        f"--data-dir {data}: of 72 images {counts(both=1, two=1)}",
    ]


def test_links_to_one_image_are_seen_without_reading(jpegs, tmp_path):
    data = tmp_path / "data"
    (data / "test/class 1/link.jpg").symlink_to(data / "train/class 0/1.jpg")
    lines = problems("--data-dir", data)
    assert len(lines) == 3 and lines[-1].endswith(counts(both=1, two=1))


@pytest.mark.parametrize(
    "words, line",
    [
        (["--dataset", "foo"], "--dataset: invalid choice: 'foo' (choose from "),
        (
            ["--data-dir", "nowhere"],
            "--data-dir nowhere: no such folder; docs/data.md says what image_folder needs there",
        ),
        (["--data-dir", "."], "--data-dir .: needs train/CLASS/"),
        (["--dataset", "image_list", "--data-dir", "."], "--train-list: image_list needs one"),
        (["--dataset", "places_lt", "--data-dir", "."], "--train-list Places_LT_train.txt: no such file"),
        (["--decoed"], "unrecognized arguments: --decoed"),
    ],
)
def test_one_line_where_it_cannot_look(words, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (only,) = problems(*words)
    assert only.startswith(line)


def test_greys_and_palettes_are_sound(jpegs, tmp_path, capsys):
    Image.new("L", (70, 70)).save(tmp_path / "data/train/class 0/grey.png")
    Image.new("P", (70, 70), 3).save(tmp_path / "data/train/class 0/palette.png")
    check_data.main(["--data-dir", jpegs["data_dir"], "--decode"])
    assert "all 71 images" in capsys.readouterr().out


def test_problems_end_it_with_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check_data", "--data-dir", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as ended:
        tools.run(check_data.main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        f"--data-dir {tmp_path}/none: no such folder; docs/data.md says what image_folder needs there\n"
    )
