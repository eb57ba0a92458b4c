"""tools.compare: one row per set of options, means over seeds, and no silent mixing of data sets."""

import json

import pytest
from PIL import Image

from common import recipes
from tests.conftest import ROOT, refusal
from tools import compare


def result(seed, value, **args):
    options = dict(dataset="synthetic", imbalance=100.0, loss="ce", lr=0.1, output_dir=f"x{seed}", seed=seed)
    return {
        "script": "cmo.py",
        "dataset": "synthetic",
        "seed": seed,
        "precision": "no",
        "all": value,
        "many": value + 1,
        "medium": None,
        "few": 0.0,
        "seconds": 60,
        "peak_memory_gb": 1.5,
        "commit": "abc",
        "args": {**options, **args},
    }


def rows(results):
    return compare.table_of(compare.grouped(results))


def test_rows():
    table = rows([result(0, 50.0), result(1, 52.0), result(0, 60.0, loss="bs")])
    assert table == [
        ["script", "loss", "all", "many", "medium", "few", "seeds", "minutes", "GB", "commit"],
        ["cmo.py", "ce", "51.0 +- 1.4", "52.0 +- 1.4", "-", "0.0 +- 0.0", "2", "1.0", "1.5", "abc"],
        ["cmo.py", "bs", "60.0", "61.0", "-", "0.0", "1", "1.0", "1.5", "abc"],
    ]


def test_options_of_one_script_make_columns_beside_another():
    other = [result(0, 70.0, tau=tau) | {"script": "csa.py"} for tau in (1, 2)]
    for run in other:
        del run["args"]["loss"]  # which csa.py does not have
    table = rows([result(0, 50.0), result(0, 60.0, loss="bs"), *other])
    assert [row[:4] for row in table] == [
        ["script", "loss", "tau", "all"],
        ["cmo.py", "ce", "-", "50.0"],
        ["cmo.py", "bs", "-", "60.0"],
        ["csa.py", "-", "1", "70.0"],
        ["csa.py", "-", "2", "70.0"],
    ]


def test_two_runs_of_a_seed_have_no_spread():
    (_, row) = rows([result(0, 50.0), result(0, 52.0)])
    assert row[1] == "51.0" and row[5] == "1"
    (_, row) = rows([result(0, 50.0), result(0, 52.0), result(1, 53.0)])
    assert row[1] == "52.0 +- 1.4" and row[5] == "2"


def test_how_often_a_run_was_tested_makes_no_row():
    assert len(rows([result(0, 50.0, eval_every=1), result(1, 52.0, eval_every=5)])) == 2


def test_files_and_folders(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text(json.dumps(result(0, 50.0), indent=1))
    lines = [json.dumps(result(seed, 40.0, loss="bs")) for seed in (0, 1)]
    (tmp_path / "more.jsonl").write_text("\n".join(lines))
    compare.main([str(tmp_path / "run"), str(tmp_path / "more.jsonl")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[1].startswith("|---") and "40.0 +- 0.0" in lines[3]
    compare.main([str(tmp_path / "run"), "--csv"])
    assert capsys.readouterr().out.splitlines() == [
        "script,all,all +-,many,many +-,medium,medium +-,few,few +-,seeds,minutes,GB,commit",
        "cmo.py,50.0,,51.0,,-,,0.0,,1,1.0,1.5,abc",
    ]


def test_precision_makes_a_row_of_its_own():
    table = rows([result(0, 50.0), result(0, 60.0) | {"precision": "bf16"}])
    assert [row[:3] for row in table] == [
        ["script", "precision", "all"],
        ["cmo.py", "no", "50.0"],
        ["cmo.py", "bf16", "60.0"],
    ]


def test_options_that_an_older_run_lacks():
    """Off ones are the same; else the row says -."""
    new = result(1, 52.0, flip=False, mask=None)
    assert [row[0] for row in rows([result(0, 50.0), new])] == ["script", "cmo.py"]
    table = rows([result(0, 50.0), result(1, 52.0, contrastive=0.5)])
    assert [row[:2] for row in table] == [["script", "contrastive"], ["cmo.py", "-"], ["cmo.py", "0.5"]]


# Training settings


def test_training_settings_that_differ():
    runs = [
        result(0, 1.0, epochs=200, lr_steps=[160, 180]),
        result(0, 1.0, epochs=90, lr_steps=[], loss="bs"),
    ]
    note = compare.training_note(compare.grouped(runs))
    assert note == (
        "note: the rows differ in training settings, too: epochs (200, 90); lr_steps (160 180, none)"
    )


def test_the_method_alone_differs(capsys, tmp_path):
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(result(0, 1.0, loss=loss)) for loss in "ab"))
    compare.main([str(tmp_path / "x.jsonl")])
    assert capsys.readouterr().err == ""


def test_all_settings_of_the_recipes_are_named():
    settings = set(recipes.PLAIN).union(*recipes.EQUAL.values()) - {"splits", "imbalance"}
    assert settings <= set(compare.TRAINING)


# Data


def on(hashes, **options):
    return result(0, 1.0, **options) | {"data_sha256": hashes}


def test_different_data_is_refused():
    line = refusal(compare.check_data, [result(0, 1.0), result(0, 1.0, imbalance=10.0)])
    assert line == "the runs differ in --imbalance (10.0, 100.0); compare one set at a time"


def test_data_are_told_by_what_they_are(capsys):
    """Not by where they lie; a third hash is of development images."""
    compare.check_data([on(["a", "b"], data_dir="x", train_list="1"), on(["a", "b", "c"], train_list="2")])
    assert capsys.readouterr().err == ""
    line = refusal(compare.check_data, [on(["a", "b"]), on(["a", "c"])])
    assert line == "the runs have other test images; compare runs on the same ones"
    line = refusal(compare.check_data, [on(["a", "b"]), on(["c", "b"], imbalance=50.0)])
    assert line == "the runs differ in --imbalance (100.0, 50.0); compare one set at a time"


def test_held_out_images_are_told(capsys):
    compare.check_data([on(["a", "b"]), on(["c", "b"], dev="apart")])
    assert capsys.readouterr().err == "note: the runs have other training images of one data set\n"


def test_own_data_sets_are_told_apart_by_their_folders_where_there_is_no_hash():
    runs = [result(seed, 1.0, dataset="image_folder", data_dir=folder) for seed, folder in enumerate("ab")]
    line = refusal(compare.check_data, runs)
    assert line == "the runs differ in --data-dir (a, b); compare one set at a time"
    compare.check_data([result(0, 1.0, data_dir="a"), result(1, 1.0, data_dir="b")])


def test_other_splits_are_told(capsys):
    compare.check_data([on(["a", "b"], splits=[100, 20]), on(["a", "b"], splits=[100, 21])])
    said = capsys.readouterr().err
    assert said == "note: the runs differ in --splits (100 20, 100 21), so many, medium and few are others\n"


# Several predictions


def predicting(seed):
    predictions = {
        name: {"all": value + seed, "many": 9.0, "medium": None, "few": 1.0}
        for name, value in (("u", 10.0), ("b", 20.0))
    }
    return {**with_classes(seed, 20.0 + seed, prediction="b"), "predictions": predictions}


def test_a_run_that_predicts_in_several_ways_has_a_row_for_each(tmp_path):
    (tmp_path / "runs.jsonl").write_text("\n".join(json.dumps(predicting(seed)) for seed in (0, 1)))
    table = rows(compare.read([tmp_path / "runs.jsonl"]))
    assert [row[:4] for row in table] == [
        ["script", "prediction", "all", "many"],
        ["cmo.py", "u", "10.5 +- 0.7", "9.0 +- 0.0"],
        ["cmo.py", "b", "20.5 +- 0.7", "9.0 +- 0.0"],
    ]


def test_named_rows_tell_their_predictions(tmp_path):
    (tmp_path / "runs.jsonl").write_text(json.dumps({**predicting(0), "row": "CSA"}))
    table = rows(compare.read([tmp_path / "runs.jsonl"]))
    assert [row[:2] for row in table] == [
        ["row", "all"],
        ["CSA, prediction u", "10.0"],
        ["CSA, prediction b", "20.0"],
    ]


def test_epochs_are_of_the_prediction_that_counts(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(predicting(0)))
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"epoch": 0, "all": 5.0}))
    u, b = compare.read([tmp_path])
    assert "history" in b and "history" not in u and u["per_class"] is None


# What cannot be read


def test_folders_without_a_run_are_named(tmp_path):
    assert refusal(compare.read, [tmp_path]).startswith(f"{tmp_path}/result.json: not a finished run")


@pytest.mark.parametrize("text", ["[1]", '{"args": {}}', '{"benchmark": "speed"}', "{", '"script"'])
def test_lines_that_are_no_results(tmp_path, text):
    (tmp_path / "x.jsonl").write_text(text)
    assert "not a finished run" in refusal(compare.read, [tmp_path / "x.jsonl"])


def test_unfinished_runs_are_left_out(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "args.json").write_text("{}")
    (tmp_path / "b.jsonl").write_text(json.dumps(result(0, 1.0)))
    assert len(compare.read([tmp_path / "a", tmp_path / "b.jsonl"])) == 1
    assert capsys.readouterr().err == f"note: {tmp_path}/a: not finished; left out\n"
    line = refusal(compare.read, [tmp_path / "a"])
    assert line == f"{tmp_path}/a: no finished run there; name folders of finished runs"


@pytest.mark.parametrize("file", sorted((ROOT / "results").glob("s[yt][nu]*.jsonl")), ids=lambda f: f.stem)
def test_recorded_results_are_read(file):
    results = compare.read([file])
    groups = compare.grouped(results)
    assert sum(len(group) for _, group in groups) == len(results) and len(rows(results)) == 1 + len(groups)


# Pictures


def with_classes(*args, **options):
    """A result as result.json has it: of three classes, the second without test images."""
    return result(*args, **options) | {"class_counts": [5, 50, 500], "per_class": [args[1], None, 90.0]}


def test_curve_over_class_sizes():
    runs = [with_classes(0, 50.0), with_classes(1, 52.0), result(2, 1.0)]
    assert compare.class_curve(runs) == ([5, 500], [51.0, 90.0])
    assert compare.class_curve(runs[2:]) == ([], [])


def test_curve_over_the_tested_epochs():
    history = [{"epoch": 0}, {"epoch": 1, "all": 4.0}, {"epoch": 2}, {"epoch": 3, "all": 8.0}]
    other = [{"epoch": 3, "all": 6.0}]
    runs = [result(0, 1.0) | {"history": history}, result(1, 1.0) | {"history": other}, result(2, 1.0)]
    assert compare.epoch_curve(runs) == ([2, 4], [4.0, 7.0])
    assert compare.epoch_curve(runs[2:]) == ([], [])


def test_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    for i, (seed, loss) in enumerate(((0, "ce"), (1, "ce"), (0, "bs"))):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "result.json").write_text(json.dumps(with_classes(seed, 50.0 + seed, loss=loss)))
        lines = [json.dumps({"epoch": epoch, "all": 10.0 * epoch}) + "\n" for epoch in range(3)]
        (tmp_path / str(i) / "metrics.jsonl").write_text("".join(lines))
    paths = [str(tmp_path / str(i)) for i in range(3)]
    assert [len(run["history"]) for run in compare.read(paths)] == [3] * 3
    compare.main([*paths, "--plot", str(tmp_path / "x.png")])
    assert capsys.readouterr().err == f"drew {tmp_path}/x.png\n"
    with Image.open(tmp_path / "x.png") as image:
        assert image.size == (17 * 110, 5 * 110) and len(image.convert("RGB").getcolors(2**20)) > 50
    (tmp_path / "lines.jsonl").write_text(json.dumps(result(0, 50.0)))  # as recorded: no classes, no epochs
    compare.main([str(tmp_path / "lines.jsonl"), "--plot", str(tmp_path / "y.png")])
    assert (tmp_path / "y.png").exists()


def test_too_many_rows_for_a_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    groups = compare.grouped([result(0, 50.0, lr=lr) for lr in range(13)])
    line = refusal(compare.draw, groups, tmp_path / "x.png")
    assert line == "--plot: 13 rows are too many to tell apart; name runs of at most 12"


@pytest.mark.parametrize("name", ["nowhere/x.png", "x.foo"])
def test_pictures_that_cannot_be_written(tmp_path, name):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    line = refusal(compare.draw, compare.grouped([result(0, 1.0)]), tmp_path / name)
    assert line.startswith(f"--plot {tmp_path}/{name}: cannot be written (")
