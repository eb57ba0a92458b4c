"""common.evaluation: splits by training count, exact counting, null where there is nothing to count."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration

from common import datasets, evaluation, models
from common.cli import Args, Refused
from tests.conftest import ROOT, environment


def sizes(counts, *limits):
    return [int(part.sum()) for part in evaluation.split_classes(torch.tensor(counts), *limits).values()]


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
    splits = evaluation.split_classes(torch.tensor([101, 100, 20, 19]))
    assert splits["many"].tolist() == [True, False, False, False]
    assert splits["medium"].tolist() == [False, True, True, False]
    assert splits["few"].tolist() == [False, False, False, True]
    assert sizes([101, 100, 20, 19], 100, 21) == [1, 1, 2]  # iNaturalist counts 20 as few


def test_summary_by_hand():
    """3 classes of 200, 50, 5 training images; test images 4, 2, 2 of which 3, 1, 0 are right."""
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    first = torch.tensor([0, 0, 0, 1, 1, 0, 0, 1])
    second = torch.tensor([1, 1, 1, 0, 0, 2, 2, 0])
    top = torch.stack([first, second], 1)
    confidences = torch.full((8,), 0.75)
    result = evaluation.summarize(labels, top, confidences, torch.tensor([200, 50, 5]))
    assert result["all"] == pytest.approx(50)
    assert (result["many"], result["medium"], result["few"]) == (75, 50, 0)
    assert result["per_class"] == [75, 50, 0]
    assert result["top5"] == pytest.approx(100 * 6 / 8)
    assert result["ece"] == pytest.approx(25)  # confident to 0.75, right in half


def test_what_is_not_there_is_null():
    labels, top = torch.tensor([0, 0]), torch.tensor([[0], [1]])
    result = evaluation.summarize(labels, top, torch.ones(2), torch.tensor([200, 150, 5]))
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


def test_every_image_counts_once():
    """A last batch that is not full, and BatchNorm's statistics left alone."""
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))
    _, test_set = datasets.load(Args())
    loader = accelerator.prepare(datasets.test_loader(test_set, Args(batch_size=96)))
    model = models.build("resnet8", test_set, 0)
    before = model.backbone[2].running_mean.clone()
    labels, top, confidences = evaluation.predict(accelerator, model, loader)
    assert labels.equal(test_set.labels)
    assert top.shape == (1000, 5) and confidences.shape == (1000,)
    logits = model.eval()(test_set.images)
    torch.testing.assert_close(top[:, 0], logits.argmax(1))
    assert model.backbone[2].running_mean.equal(before)


class Nan(torch.nn.Module):
    def forward(self, images):
        return images * float("nan")


def test_outputs_that_are_not_finite_are_refused():
    with pytest.raises(Refused, match="the network's outputs are not finite; lower --lr"):
        evaluation.predict(Accelerator(), Nan(), [(torch.zeros(2, 3), torch.tensor([0, 1]))])


def test_epochs_between_two_tests():
    run = SimpleNamespace(args=Args(eval_every=3), last_epoch=7, class_counts=torch.tensor([3, 3]))
    run.accelerator, tested = Accelerator(), []
    loader = [(torch.eye(2), torch.tensor([0, 1]))]
    for run.epoch in range(8):
        if evaluation.per_split(run, torch.nn.Identity(), loader):
            tested.append(run.epoch)
    assert tested == [2, 5, 7]


EVALUATE = """
import json
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from common import datasets, evaluation, models
from common.cli import Args


def main():  # in a function: a DDP model that outlives it as a global can abort the interpreter's exit
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))
    train_set, test_set = datasets.load(Args())
    model = accelerator.prepare(models.build("resnet8", test_set, 1))
    for size in (997, 1, 2, 3, 7, 10):
        part = test_set.subset(torch.arange(size))
        loader = accelerator.prepare(datasets.test_loader(part, Args(batch_size=96)))
        labels, top, confidences = evaluation.predict(accelerator, model, loader)
        if accelerator.is_main_process:
            facts = evaluation.summarize(labels, top, confidences, train_set.class_counts)
            facts |= dict(processes=accelerator.num_processes, labels=labels.tolist(), top=top.tolist())
            print(json.dumps(facts))
    accelerator.end_training()


main()
"""


def test_evaluation_is_exact_over_processes(tmp_path):
    """997 test images, a prime number, and a few, in batches of 96 over 1 and 2 processes: each once."""
    script, results = tmp_path / "evaluate.py", []
    script.write_text(EVALUATE)
    for start in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]):
        command, env = [sys.executable, *start, str(script)], environment(PYTHONPATH=str(ROOT))
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
        assert done.returncode == 0, done.stderr
        results.append([json.loads(line) for line in done.stdout.splitlines()])
    for size, one, two in zip((997, 1, 2, 3, 7, 10), *results, strict=True):
        assert (one.pop("processes"), two.pop("processes")) == (1, 2)
        assert len(one["labels"]) == size
        assert one.pop("ece") == pytest.approx(two.pop("ece"), abs=1e-4)
        assert one == two
