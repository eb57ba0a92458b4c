"""common.compare: one row per set of options, means over seeds, and no silent mixing of data sets."""

import json

import pytest
from PIL import Image

from common import compare
from tests.conftest import refusal


def result(seed, value, **args):
    options = dict(dataset="synthetic", imbalance=100.0, loss="ce", lr=0.1, output_dir=f"x{seed}", seed=seed)
    accuracies = {"all": value, "many": value + 1, "medium": None, "few": 0.0}
    args = {**options, **args}
    return {
        "script": "cmo.py",
        "seed": seed,
        "precision": "no",
        **accuracies,
        "seconds": 60,
        "peak_memory_gb": 1.5,
        "commit": "abc",
        "args": args,
    }


def test_rows():
    table = compare.rows([result(0, 50.0), result(1, 52.0), result(0, 60.0, loss="bs")])
    assert table == [
        ["script", "loss", "all", "many", "medium", "few", "seeds", "minutes", "GB", "commit"],
        ["cmo.py", "ce", "51.0 +- 1.4", "52.0 +- 1.4", "-", "0.0 +- 0.0", "2", "1.0", "1.5", "abc"],
        ["cmo.py", "bs", "60.0", "61.0", "-", "0.0", "1", "1.0", "1.5", "abc"],
    ]


def test_options_of_one_script_make_columns_beside_another():
    other = [result(0, 70.0, tau=tau) | {"script": "csa.py"} for tau in (1, 2)]
    for run in other:
        del run["args"]["loss"]  # which csa.py does not have
    table = compare.rows([result(0, 50.0), result(0, 60.0, loss="bs"), *other])
    assert [row[:4] for row in table] == [
        ["script", "loss", "tau", "all"],
        ["cmo.py", "ce", "-", "50.0"],
        ["cmo.py", "bs", "-", "60.0"],
        ["csa.py", "-", "1", "70.0"],
        ["csa.py", "-", "2", "70.0"],
    ]


def test_two_runs_of_a_seed_have_no_spread():
    (_, row) = compare.rows([result(0, 50.0), result(0, 52.0)])
    assert row[1] == "51.0" and row[5] == "1"
    (_, row) = compare.rows([result(0, 50.0), result(0, 52.0), result(1, 53.0)])
    assert row[1] == "52.0 +- 1.4" and row[5] == "2"


def test_files_and_folders(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text(json.dumps(result(0, 50.0), indent=1))
    (tmp_path / "more.jsonl").write_text(
        "\n".join(json.dumps(result(seed, 40.0, loss="bs")) for seed in (0, 1))
    )
    compare.main([str(tmp_path / "run"), str(tmp_path / "more.jsonl")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[1].startswith("|---") and "40.0 +- 0.0" in lines[3]
    compare.main([str(tmp_path / "run"), "--csv"])
    assert capsys.readouterr().out.splitlines() == [
        "script,all,all +-,many,many +-,medium,medium +-,few,few +-,seeds,minutes,GB,commit",
        "cmo.py,50.0,,51.0,,-,,0.0,,1,1.0,1.5,abc",
    ]


def test_different_data_is_refused(capsys):
    line = refusal(lambda: compare.on_one_split([result(0, 1.0), result(0, 1.0, imbalance=10.0)]), capsys)
    assert line == "the runs differ in --imbalance (10.0, 100.0); compare one set at a time"


def test_a_run_that_predicts_in_several_ways_has_a_row_for_each(tmp_path):
    def line(seed):
        predictions = {
            name: {"all": value + seed, "many": 9.0, "medium": None, "few": 1.0}
            for name, value in (("u", 10.0), ("b", 20.0))
        }
        return json.dumps({**result(seed, 20.0 + seed, prediction="b"), "predictions": predictions})

    (tmp_path / "runs.jsonl").write_text("\n".join(line(seed) for seed in (0, 1)))
    table = compare.rows(compare.read([tmp_path / "runs.jsonl"]))
    assert [row[:4] for row in table] == [
        ["script", "prediction", "all", "many"],
        ["cmo.py", "u", "10.5 +- 0.7", "9.0 +- 0.0"],
        ["cmo.py", "b", "20.5 +- 0.7", "9.0 +- 0.0"],
    ]


def test_epochs_are_of_the_prediction_that_counts(tmp_path):
    predictions = {name: {"all": 10.0, "many": 9.0, "medium": None, "few": 1.0} for name in "ub"}
    whole = with_classes(0, 10.0, prediction="b") | {"predictions": predictions}
    (tmp_path / "result.json").write_text(json.dumps(whole))
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"epoch": 0, "all": 5.0}))
    u, b = compare.read([tmp_path])
    assert "history" in b and "history" not in u and u["per_class"] is None


def test_unfinished_runs_are_named(tmp_path, capsys):
    assert refusal(lambda: compare.read([tmp_path]), capsys).startswith(
        f"{tmp_path}/result.json: not a finished run"
    )


def test_precision_makes_a_row_of_its_own():
    table = compare.rows([result(0, 50.0), result(0, 60.0) | {"precision": "bf16"}])
    assert [row[:3] for row in table] == [
        ["script", "precision", "all"],
        ["cmo.py", "no", "50.0"],
        ["cmo.py", "bf16", "60.0"],
    ]


def test_other_json_is_refused(tmp_path, capsys):
    (tmp_path / "speed.jsonl").write_text('{"benchmark": "speed"}')
    assert "not a finished run" in refusal(lambda: compare.read([tmp_path / "speed.jsonl"]), capsys)


def with_classes(*args, **options):
    """A result as result.json has it: of three classes, the second without test images."""
    return result(*args, **options) | {"class_counts": [5, 50, 500], "per_class": [args[1], None, 90.0]}


def test_curve_over_class_sizes():
    runs = [with_classes(0, 50.0), with_classes(1, 52.0), result(2, 1.0)]
    assert compare.class_curve(runs) == ((5, 500), (51.0, 90.0))
    assert compare.class_curve(runs[2:]) == ([], [])


def test_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    for i, (seed, loss) in enumerate(((0, "ce"), (1, "ce"), (0, "bs"))):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "result.json").write_text(json.dumps(with_classes(seed, 50.0 + seed, loss=loss)))
        lines = [json.dumps({"epoch": epoch, "all": 10.0 * epoch}) + "\n" for epoch in range(3)]
        (tmp_path / str(i) / "metrics.jsonl").write_text("".join(lines))
    paths = [str(tmp_path / str(i)) for i in range(3)]
    assert [len(one["history"]) for one in compare.read(paths)] == [3] * 3
    compare.main([*paths, "--plot", str(tmp_path / "x.png")])
    assert capsys.readouterr().err == f"drew {tmp_path}/x.png\n"
    with Image.open(tmp_path / "x.png") as image:
        assert image.size == (17 * 110, 5 * 110) and len(image.convert("RGB").getcolors(2**20)) > 50
    (tmp_path / "lines.jsonl").write_text(json.dumps(result(0, 50.0)))  # as recorded: no classes, no epochs
    compare.main([str(tmp_path / "lines.jsonl"), "--plot", str(tmp_path / "y.png")])
    assert (tmp_path / "y.png").exists()


def test_too_many_rows_for_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    results = [result(0, 50.0, lr=lr) for lr in range(13)]
    line = refusal(lambda: compare.draw(results, tmp_path / "x.png"), capsys)
    assert line == "--plot: 13 rows are too many to tell apart; name runs of 12 or less"


def test_own_data_sets_are_told_apart_by_their_folders(capsys):
    runs = [result(seed, 1.0, dataset="image_folder", data_dir=folder) for seed, folder in enumerate("ab")]
    line = refusal(lambda: compare.on_one_split(runs), capsys)
    assert line == "the runs differ in --data-dir (a, b); compare one set at a time"
    assert len(compare.on_one_split([result(0, 1.0, data_dir="a"), result(1, 1.0, data_dir="b")])) == 2


def test_numbers_of_classes_that_differ(capsys):
    """The splits of all are by the bounds then; of csa.py's other predictions these are not recorded."""
    by_counts = {"many": 7.0, "medium": 8.0, "few": 9.0}
    run = result(0, 1.0, many_classes=36, prediction="b") | {"by_counts": by_counts, "per_class": [1]}
    run["predictions"] = {name: {"all": 2.0, "many": 3.0, "medium": 3.0, "few": 3.0} for name in "ub"}
    u, b, other = compare.on_one_split([*compare.by_prediction(run), result(0, 1.0, many_classes=None)])
    note = "note: the runs differ in --many-classes (36, None); splits are by the bounds"
    assert capsys.readouterr().err.splitlines() == [note]
    assert [u[name] for name in compare.ACCURACIES] == [2.0, None, None, None]
    assert [b[name] for name in compare.ACCURACIES] == [2.0, 7.0, 8.0, 9.0] and other["many"] == 2.0


def test_options_that_an_older_run_lacks():
    """Off ones are the same; else the row says -."""
    new = result(1, 52.0, flip=False, mask=None)
    assert [row[0] for row in compare.rows([result(0, 50.0), new])] == ["script", "cmo.py"]
    table = compare.rows([result(0, 50.0), result(1, 52.0, contrastive=0.5)])
    assert [row[:2] for row in table] == [["script", "contrastive"], ["cmo.py", "-"], ["cmo.py", "0.5"]]


def test_unfinished_runs_are_left_out(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "args.json").write_text("{}")
    (tmp_path / "b.jsonl").write_text(json.dumps(result(0, 1.0)))
    assert len(compare.read([tmp_path / "a", tmp_path / "b.jsonl"])) == 1
    assert capsys.readouterr().err == f"note: {tmp_path}/a: not finished; left out\n"
    line = refusal(lambda: compare.read([tmp_path / "a"]), capsys)
    assert line == f"{tmp_path}/a: no finished run there; name folders of finished runs"


@pytest.mark.parametrize("name", ["nowhere/x.png", "x.foo"])
def test_pictures_that_cannot_be_written(tmp_path, capsys, name):
    line = refusal(lambda: compare.draw([result(0, 1.0)], tmp_path / name), capsys)
    assert line.startswith(f"--plot {tmp_path}/{name}: cannot be written (")


@pytest.mark.parametrize("text", ["[1]", '{"args": {}}'])
def test_lines_that_are_no_results(tmp_path, capsys, text):
    (tmp_path / "x.jsonl").write_text(text)
    assert "not a finished run" in refusal(lambda: compare.read([tmp_path / "x.jsonl"]), capsys)
