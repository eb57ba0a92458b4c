"""No step of a training makes the host wait for the device."""

import pytest

from benchmarks import sync
from tests.test_scripts import FIRST


@pytest.mark.parametrize("script", FIRST)
def test_no_step_waits(script, tmp_path):
    lines = list(sync.measure(script, tmp_path))
    assert lines and all(line["waits_per_step"] == 0 for line in lines)
    assert all("convolution" in " ".join(line["percent_of_time"]) for line in lines)


def test_a_step_that_waits_is_seen(tmp_path, monkeypatch):
    import cmo

    original = cmo.remix_share
    monkeypatch.setitem(sync.ALL_OF, "cmo.py", dict(paste="remix", p_mix=1.0, mix_start=-1, mix_end=0))
    monkeypatch.setattr(
        cmo, "remix_share", lambda lam, n_i, n_j: original(lam + 0 * n_i.sum().item(), n_i, n_j)
    )
    assert [line["waits_per_step"] for line in sync.measure("cmo.py", tmp_path)] == [1]
