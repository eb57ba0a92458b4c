"""common.evaluation: splits by training count, exact counting, null where there is nothing to count."""

import json
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch.utils.data import DataLoader

from common import datasets, evaluation, models
from common.cli import Args
from tests.conftest import ROOT, environment


def sizes(counts, **limits):
    return [int(part.sum()) for part in evaluation.split_classes(counts, **limits).values()]


@pytest.mark.parametrize(
    "num_classes, largest, imbalance, expected",
    [
        (100, 500, 100, [35, 35, 30]),
        (100, 500, 50, [41, 41, 18]),
        (100, 500, 10, [69, 31, 0]),
        (100, 500, 20, [53, 47, 0]),
        (100, 500, 200, [30, 31, 39]),
        (10, 5000, 100, [8, 2, 0]),
        (10, 5000, 50, [9, 1, 0]),
    ],
)
def test_splits_of_the_cifars(num_classes, largest, imbalance, expected):
    assert sizes(datasets.long_tail_counts(largest, num_classes, imbalance)) == expected


def test_boundaries():
    splits = evaluation.split_classes([101, 100, 20, 19])
    assert splits["many"].tolist() == [True, False, False, False]
    assert splits["medium"].tolist() == [False, True, True, False]
    assert splits["few"].tolist() == [False, False, False, True]
    assert sizes([101, 100, 20, 19], few_under=21) == [1, 1, 2]  # iNaturalist counts 20 as few


@pytest.mark.parametrize(
    "num_classes, largest, imbalance, groups, last_of_many, last_of_medium",
    [
        (100, 500, 100, (36, 29), 98, 19),
        (100, 500, 10, (36, 29), 221, 98),
        (10, 5000, 100, (3, 3), 1796, 232),
        (10, 5923, 100, (3, 3), 2128, 274),
    ],
)
def test_groups_of_fixed_size(num_classes, largest, imbalance, groups, last_of_many, last_of_medium):
    """Beside those by counts: of CIFAR-100-LT 100 class 35 has 98 images, class 70 has 19."""
    counts = torch.tensor(datasets.long_tail_counts(largest, num_classes, imbalance))
    split = evaluation.split_classes(counts, many_classes=groups[0], few_classes=groups[1])
    many, medium, few = (split[name].nonzero().flatten().tolist() for name in ("many", "medium", "few"))
    assert many + medium + few == list(range(num_classes))
    assert (len(many), len(few)) == groups
    assert (counts[many[-1]], counts[medium[-1]]) == (last_of_many, last_of_medium)


def test_groups_of_fixed_size_go_by_frequency():
    """Classes in any order; of equal counts the lower number is the more frequent. One of the two will do."""
    split = evaluation.split_classes([5, 80, 20, 300, 20], many_classes=1, few_classes=2)
    assert [part.nonzero().flatten().tolist() for part in split.values()] == [[3], [1, 2], [0, 4]]
    split = evaluation.split_classes([5, 80, 20, 300, 20], few_classes=2)
    assert [part.nonzero().flatten().tolist() for part in split.values()] == [[3], [1, 2], [0, 4]]
    split = evaluation.split_classes([5, 80, 20, 300, 20], many_classes=2)
    assert [part.nonzero().flatten().tolist() for part in split.values()] == [[1, 3], [2, 4], [0]]
    nobody = evaluation.split_classes([5, 80, 20, 300, 20], many_classes=0, few_classes=0)
    assert [int(part.sum()) for part in nobody.values()] == [0, 5, 0]


def test_summary_has_both_groupings():
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    top = torch.tensor([0, 0, 1, 0, 2, 1])[:, None]
    both = evaluation.summarize(labels, top, torch.full((6,), 0.5), [200, 150, 5], many_classes=1)
    assert (both["many"], both["medium"], both["few"]) == (100, 50, 50)
    assert both["by_counts"] == {"many": 75, "medium": None, "few": 50}
    assert "by_counts" not in evaluation.summarize(labels, top, torch.full((6,), 0.5), [200, 150, 5])


def test_several_predictions():
    """Of a model that gives [B, 2, K]: each as if it were alone."""
    accelerator, (train_set, test_set) = Accelerator(), datasets.load(Args())
    loader = accelerator.prepare(DataLoader(test_set, 100, **datasets.loader_options(test_set)))

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = torch.nn.ModuleList(
                models.build("resnet8", 10, seed, (3, 24, 24)) for seed in (0, 1)
            )

        def forward(self, images):
            return torch.stack([part(images) for part in self.parts], 1)

    two, counts = Two(), train_set.class_counts
    args, names = Args(), ("first", "second")
    alone = [evaluation.per_split(accelerator, part, loader, counts, args) for part in two.parts]
    assert alone[0] != alone[1]
    for name, own in zip(names, alone, strict=True):
        args.prediction = name
        both = evaluation.per_split(accelerator, two, loader, counts, args, names)
        predictions = both.pop("predictions")
        assert both == own and list(predictions) == ["first", "second"]
        assert predictions[name] == {k: own[k] for k in ("all", "many", "medium", "few")}


def test_summary_by_hand():
    """3 classes of 200, 50, 5 training images; test images 4, 2, 2 of which 3, 1, 0 are right."""
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    first = torch.tensor([0, 0, 0, 1, 1, 0, 0, 1])
    second = torch.tensor([1, 1, 1, 0, 0, 2, 2, 0])
    top = torch.stack([first, second], 1)
    confidences = torch.full((8,), 0.75)
    result = evaluation.summarize(labels, top, confidences, [200, 50, 5])
    assert result["all"] == pytest.approx(50)
    assert (result["many"], result["medium"], result["few"]) == (75, 50, 0)
    assert result["per_class"] == [75, 50, 0]
    assert result["top5"] == pytest.approx(100 * 6 / 8)
    assert result["ece"] == pytest.approx(25)  # confident to 0.75, right in half


def test_what_is_not_there_is_null():
    labels, top = torch.tensor([0, 0]), torch.tensor([[0], [1]])
    result = evaluation.summarize(labels, top, torch.ones(2), [200, 150, 5])
    assert result["per_class"] == [50, None, None]
    assert (result["many"], result["medium"], result["few"]) == (50, None, None)


def test_calibration_error_by_hand():
    confidences = torch.tensor([0.95, 0.95, 0.55, 0.55])
    correct = torch.tensor([True, True, True, False])
    # two images of accuracy 1 and confidence 0.95 in one bin, two of 0.5 and 0.55 in another
    assert evaluation.calibration_error(confidences, correct) == pytest.approx(
        100 * (2 * 0.05 + 2 * 0.05) / 4
    )
    assert evaluation.calibration_error(torch.ones(3), torch.ones(3, dtype=torch.bool)) == 0


def test_seconds_of_a_dry_run(monkeypatch):
    """Of the first of two batches, which starts the loader, and of the second; with their predictions."""
    now, read = [0.0], []

    def loader():
        for took in (5.0, 1.0, 1.0):
            now[0] += took
            read.append(took)
            yield torch.zeros(2, 3), torch.tensor([0, 1])

    class Batches:
        def __iter__(self):
            return loader()

        def __len__(self):
            return 9

    class Slow(torch.nn.Module):
        def forward(self, images):
            now[0] += 0.25
            return images

    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: now[0])
    facts = Accelerator(), Slow(), Batches(), [3, 3]
    result = evaluation.per_split(*facts, Args(dry_run=True))
    assert result["test_seconds"] == (5.25, 1.25, 9) and read == [5.0, 1.0] and result["all"] == 50
    assert "test_seconds" not in evaluation.per_split(*facts, Args()) and len(read) == 5


def test_every_image_counts_once():
    """A last batch that is not full, and BatchNorm's statistics left alone."""
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))
    _, test_set = datasets.load(Args())
    loader = accelerator.prepare(DataLoader(test_set, 96, **datasets.loader_options(test_set)))
    model = models.build("resnet8", 10, 0, test_set.shape)
    before = model.backbone[1].running_mean.clone()
    labels, top, confidences = evaluation.predict(accelerator, model, loader)
    assert labels.equal(test_set.labels)
    assert top.shape == (1000, 5) and confidences.shape == (1000,)
    logits = model.eval()(test_set.__getitems__(list(range(1000)))[0])
    torch.testing.assert_close(top[:, 0], logits.argmax(1))
    assert model.backbone[1].running_mean.equal(before)


EVALUATE = """
import json
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch.utils.data import DataLoader, Subset
from common import datasets, evaluation, models
from common.cli import Args


def main():  # in a function: a DDP model that outlives it as a global can abort the interpreter's exit
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))
    train_set, test_set = datasets.load(Args())
    facts = train_set.class_counts, test_set.class_names, test_set.shape, (0.5,) * 3, (0.25,) * 3
    part = datasets.ImagesInMemory(test_set.crops[:997, 2, 2], test_set.labels[:997], *facts)
    loader = accelerator.prepare(DataLoader(part, 96, **datasets.loader_options(part)))
    model = accelerator.prepare(models.build("resnet8", 10, 1, test_set.shape))
    result = evaluation.per_split(accelerator, model, loader, train_set.class_counts, Args())
    labels, top, _ = evaluation.predict(accelerator, model, loader)
    if accelerator.is_main_process:
        result |= dict(processes=accelerator.num_processes, labels=labels.tolist(), top=top[:, 0].tolist())
        print(json.dumps(result))
    accelerator.end_training()


main()
"""


def test_evaluation_is_exact_over_processes(tmp_path):
    """997 test images, a prime number, in batches of 96 over 1 and 2 processes: each once, in order."""
    script, results = tmp_path / "evaluate.py", []
    script.write_text(EVALUATE)
    for start in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]):
        command, env = [sys.executable, *start, str(script)], environment(PYTHONPATH=str(ROOT))
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))
    one, two = results
    assert (one.pop("processes"), two.pop("processes")) == (1, 2)
    assert len(one["labels"]) == 997
    assert one.pop("ece") == pytest.approx(two.pop("ece"), abs=1e-4)
    assert one == two
