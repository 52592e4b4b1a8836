"""What a stage leaves for itself is believed only as it was written."""

import errno
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guardbench.sealed import read_sealed, read_tensors, write_sealed, write_tensors

SLOWLY = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@SLOWLY
@given(data=st.binary(max_size=200), where=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_no_bit_of_sealed_bytes_can_change(tmp_path: Path, data, where, bit) -> None:
    path = tmp_path / "a.bin"
    write_sealed(path, data)
    assert bytes(read_sealed(path)) == data
    written = bytearray(path.read_bytes())
    for changed in (flipped(written, where, bit), written[: where % len(written)], written + b"x"):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="has changed or was cut"):
            read_sealed(path)


@SLOWLY
@given(where=st.integers(0, 10**6), bit=st.integers(0, 7), half=st.booleans())
def test_no_number_of_sealed_tensors_can_change(tmp_path: Path, where, bit, half) -> None:
    kind = torch.float16 if half else torch.float32
    tensors = {
        "images": torch.linspace(-1, 1, 24).reshape(2, 3, 4).to(kind).transpose(0, 2),
        "labels": torch.arange(5),
        "none": torch.zeros(0, 3),
    }
    path = tmp_path / "a.safetensors"
    write_tensors(path, {name: value.contiguous() for name, value in tensors.items()})
    found = read_tensors(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    written = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(written[:8], "little")
    numbers = flipped(written[header:], where, bit)
    path.write_bytes(written[:header] + numbers)
    with pytest.raises(ValueError, match="has changed or was cut"):
        read_tensors(path)
    path.write_bytes(written[: where % len(written)])
    with pytest.raises(ValueError):  # noqa: PT011  safetensors' words differ by the place
        read_tensors(path)


def test_a_file_that_is_not_there_is_no_damaged_one(tmp_path: Path) -> None:
    for read in (read_sealed, read_tensors):
        with pytest.raises(OSError, match="No such file") as caught:
            read(tmp_path / "a")
        assert caught.value.errno in (errno.ENOENT, None)


def flipped(data: bytearray, where: int, bit: int) -> bytearray:
    found = bytearray(data)
    found[where % len(found)] ^= 1 << bit
    return found
