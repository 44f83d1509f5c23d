import random

import pytest
import torch

from gradpress.train import RunOptions, TrainConfig

WORDS = ("tensor", "gradient", "is", "was", "small", "large", "train", "press", "memory", "step")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    """Forty short documents of pseudo-random words."""
    folder = tmp_path_factory.mktemp("text")
    generator = random.Random(0)
    for number in range(40):
        words = [generator.choice(WORDS) + str(generator.randrange(10)) for _ in range(120)]
        (folder / f"{number:02}.txt").write_text(" ".join(words))
    return folder


@pytest.fixture
def small(text_folder):
    """Makes configurations of a model that steps in milliseconds."""

    def make(**options):
        return TrainConfig.create(
            **{
                "hidden_size": 32,
                "intermediate_size": 48,
                "heads": 2,
                "layers": 1,
                "vocab_size": 300,
                "rank": 8,
                "update_proj_gap": 3,
                "batch_size": 2,
                "sequence_length": 16,
                "steps": 8,
                "eval_every": 4,
                "eval_batches": 2,
                "text": (str(text_folder),),
                **options,
            }
        )

    return make


@pytest.fixture
def quiet():
    """How the tests carry runs out: one thread of the CPU, no plot."""

    def make(**options):
        usual = {"threads": 1, "device": "cpu", "plot": False, "save_every": 2}
        return RunOptions(**{**usual, **options})

    return make
