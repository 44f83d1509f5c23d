"""The devices of the parity suite."""

import pytest
import torch
from tests.cuda.devices import Parity

DEVICES = ["emulator", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def parity(request):
    return Parity(request.param)
