"""A finished run that several tests look at."""

import pytest

from tests.conftest import TINY, run_here


@pytest.fixture(scope="session")
def run_of_csa(tmp_path_factory):
    folder = tmp_path_factory.mktemp("csa")
    run_here("csa.py", **TINY | dict(epochs=1, lr_steps=()), prediction="average", output_dir=str(folder))
    return folder
