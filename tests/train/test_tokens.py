import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradpress.train import UserError
from gradpress.train.text import Document
from gradpress.train.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from gradpress.train.tokens import (
    copy_tokens,
    encode,
    prepare_tokens,
    splitmix64,
    training_batch,
    validation_windows,
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def step(self):\n    return self.step + 1\n"] * 20, 300)


@given(text=st.text(max_size=200))
@settings(deadline=None)
def test_every_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_tokenizer_file_round_trip(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    save_tokenizer(tokenizer, path)
    assert load_tokenizer(path).to_str() == tokenizer.to_str()
    path.write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(path)


def test_training_a_tokenizer_is_deterministic():
    texts = [f"word{number % 7} and {number % 11}" for number in range(300)]
    assert train_tokenizer(texts, 290).to_str() == train_tokenizer(texts, 290).to_str()


def test_documents_end_with_the_end_of_text_token(tokenizer):
    array = encode(tokenizer, [Document("a", "self"), Document("b", "return")])
    assert array.dtype == np.uint16
    assert np.count_nonzero(array == 0) == 2
    assert array[-1] == 0
    assert tokenizer.decode(list(array), skip_special_tokens=True) == "selfreturn"
    assert len(encode(tokenizer, [])) == 0


def test_splitmix64_published_values():
    # First outputs of the reference generator for the states 0 and 1234567.
    golden = [0xE220A8397B1DCDAF, 6457827717110365317]
    assert splitmix64(np.array([0, 1234567], dtype=np.uint64)).tolist() == golden


@given(
    length=st.integers(50, 400),
    sequence_length=st.integers(1, 12),
    batch_size=st.integers(1, 5),
    seed=st.integers(0, 2**63 - 1),
)
def test_an_epoch_predicts_every_token_once(length, sequence_length, batch_size, seed):
    tokens = np.arange(length, dtype=np.uint16)
    windows = (length - 1) // sequence_length - 1
    targets = []
    for batch in range(-(-windows // batch_size)):
        rows = training_batch(
            tokens, batch, seed=seed, batch_size=batch_size, sequence_length=sequence_length
        )
        assert rows.shape == (batch_size, sequence_length + 1)
        assert rows.dtype == torch.int64
        assert bool((rows.diff(dim=1) == 1).all())
        targets += rows[:, 1:].tolist()
    seen = sorted(token for row in targets[:windows] for token in row)
    assert seen == list(range(seen[0], seen[0] + windows * sequence_length))
    assert seen[0] <= sequence_length


def test_batches_are_a_function_of_seed_and_ordinal():
    tokens = np.arange(1000, dtype=np.uint16)
    options = {"batch_size": 4, "sequence_length": 8}
    forward = [training_batch(tokens, batch, seed=1, **options) for batch in range(60)]
    for batch in reversed(range(60)):
        assert torch.equal(training_batch(tokens, batch, seed=1, **options), forward[batch])
    assert not torch.equal(training_batch(tokens, 0, seed=2, **options), forward[0])
    # 123 windows make an epoch: batch 31 lies in the second one, which has another order.
    assert not torch.equal(forward[0], forward[31])


@given(length=st.integers(12, 500), count=st.integers(1, 60), sequence_length=st.integers(1, 11))
def test_validation_windows_do_not_overlap(length, count, sequence_length):
    starts = validation_windows(np.arange(length), count, sequence_length)
    assert len(starts) == min(count, (length - 1) // sequence_length)
    assert starts[0] == 0
    assert all(b - a >= sequence_length for a, b in itertools.pairwise(starts))
    assert starts[-1] + sequence_length + 1 <= length


def test_tokens_are_cached_in_the_run_folder(small, tmp_path, text_folder):
    config = small()
    first = prepare_tokens(config, tmp_path)
    assert first.description["train"]["documents"] == 38
    assert first.description["validation"]["documents"] == 2
    (tmp_path / "other").mkdir()
    copy_tokens(tmp_path, tmp_path / "other")
    gone = small(text=(str(text_folder / "gone"),))
    for folder in (tmp_path, tmp_path / "other"):
        again = prepare_tokens(gone, folder)
        assert again.digest == first.digest
        assert np.array_equal(again.train, first.train)
        assert np.array_equal(again.validation, first.validation)


def test_too_little_text(small, tmp_path):
    with pytest.raises(UserError, match=r"the validation text has \d+ tokens"):
        prepare_tokens(small(sequence_length=2000), tmp_path)
