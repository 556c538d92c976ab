import numpy as np
import pytest
import torch

from parley.data.packing import Document
from parley.train_step.packed_batch import StagingBuffer, pack


def example(length: int, learned: list[int]) -> Document:
    ids = np.arange(10, 10 + length)
    return Document.from_lists(ids, np.where(np.isin(np.arange(length), learned), ids, -100))


def test_a_pack_predicts_each_supervised_token_from_the_row_before_it() -> None:
    packed = pack([example(3, [0, 2]), example(4, [1])])
    assert packed.row_S.tolist() == [1, 3]
    assert packed.target_S.tolist() == [12, 11]
    assert packed.position_T.tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert packed.start_T.tolist() == [0, 0, 0, 3, 3, 3, 3]
    assert packed.end_T.tolist() == [3, 3, 3, 7, 7, 7, 7]


def test_the_first_token_of_a_document_is_never_counted() -> None:
    assert example(3, [0, 2]).supervised_tokens == 1


def test_padding_is_documents_of_their_own_that_teach_nothing() -> None:
    padded = pack([example(3, [2])]).padded(5)
    assert padded.start_T.tolist() == [0, 0, 0, 3, 4]
    assert padded.end_T.tolist() == [3, 3, 3, 4, 5]
    assert padded.row_S.tolist() == [1]


def test_what_stands_behind_the_last_supervised_token_of_a_document_is_not_needed() -> None:
    packed = pack([example(3, []), example(5, [1, 3]), example(2, []), example(3, [2])])
    needed = packed.trimmed()
    assert needed.lengths == (3, 2)  # rows that predict the tokens 1 to 3, and 1 to 2
    assert needed.ids_T.tolist() == [10, 11, 12, 10, 11]
    assert needed.position_T.tolist() == [0, 1, 2, 0, 1]
    assert needed.start_T.tolist() == [0, 0, 0, 3, 3]
    assert needed.end_T.tolist() == [3, 3, 3, 5, 5]
    assert needed.row_S.tolist() == [0, 2, 4]
    assert needed.target_S.tolist() == packed.target_S.tolist() == [11, 13, 12]


def test_staging_hands_out_what_was_sent_and_grows() -> None:
    staging = StagingBuffer(torch.device("cpu"), tokens=4)
    packed = pack([example(9, [4, 5])])
    assert staging.reserve(9)
    assert not staging.reserve(9)
    batch = staging.upload(packed, 0.25, packed.lengths)
    assert batch.ids_T.tolist() == packed.ids_T.tolist()
    assert batch.target_S.tolist() == [14, 15]
    assert float(batch.scale) == 0.25


def test_a_padded_pack_needs_its_own_room() -> None:
    staging = StagingBuffer(torch.device("cpu"), tokens=9)
    packed = pack([example(9, list(range(9)))]).padded(128)
    with pytest.raises(AssertionError, match="reserve"):
        staging.upload(packed, 1.0, None)
    staging.reserve(128)
    assert staging.upload(packed, 1.0, None).tokens == 128
