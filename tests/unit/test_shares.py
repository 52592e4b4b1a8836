"""How the processes of a run share its work, without starting any."""

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from guardbench.processes import Processes


def of(rank: int, count: int) -> Processes:
    return Processes(SimpleNamespace(process_index=rank, num_processes=count))


@given(rows=st.integers(0, 200), count=st.integers(1, 17))
def test_shares_are_everything_in_order_and_even(rows: int, count: int) -> None:
    shares = [range(rows)[of(rank, count).share(rows)] for rank in range(count)]
    assert [row for share in shares for row in share] == list(range(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert not rows or shares[0], "the process that speaks has work when any has"
