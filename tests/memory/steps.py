"""Training steps as users write them, with values, and how close a plan has to come."""

import torch

from gradpress.memory import watch

#: Nothing is estimated: both count storages. What is left are choices by value.
TOLERANCE = 0.03


def measured(model, optimizer, loss, *, batch, sequence, vocabulary, accumulation_steps=1):
    """What two steps take."""
    shape = batch, sequence + 1
    with watch(model, optimizer) as watched:
        for _ in range(2):
            for _ in range(accumulation_steps):
                tokens = torch.randint(0, vocabulary, shape)
                (loss(model, tokens) / accumulation_steps).backward()
                del tokens
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return watched


def check(planned, watched):
    assert abs(planned.peak / watched.peak - 1) <= TOLERANCE, f"{planned}\n{watched}"
    for name, size in watched.peak_by_category.items():
        assert abs(planned.peak_by_category.get(name, 0) - size) <= TOLERANCE * watched.peak, name
