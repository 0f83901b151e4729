from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from models.gift.tensors import code_type, on_device
from tests.models.gift.planted import planted


@pytest.mark.parametrize(
    ("cardinality", "expected"),
    [(1, np.uint8), (256, np.uint8), (257, np.int16), (32_768, np.int16), (32_769, np.int32), (2**31, np.int32)],
)
def test_codes_take_the_smallest_integers_that_hold_them(cardinality, expected):
    assert code_type(cardinality) == expected
    assert np.array([cardinality - 1]).astype(code_type(cardinality))[0] == cardinality - 1


def test_codes_are_small_on_a_device_and_as_prepared_on_the_cpu(tmp_path):
    data = planted(tmp_path)
    assert max(data.cardinalities) < 256
    assert on_device(data, "train", torch.device("cpu")).codes.dtype == torch.int32
    there = on_device(data, "train", torch.device("meta"))  # any that is not the CPU
    assert there.codes.dtype == torch.uint8
    assert there.numeric.dtype == torch.float32
    wide = replace(data, cardinalities=(*data.cardinalities[:-1], 300))
    assert on_device(wide, "train", torch.device("meta")).codes.dtype == torch.int16
