"""What every test starts from."""

import pytest
import torch

torch.set_num_threads(1)  # the nets are tiny: more threads only wait for each other


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
