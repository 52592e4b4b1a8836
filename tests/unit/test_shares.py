"""How the processes of a run share its work, without starting any."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guardbench.attacks.base import plan_batches
from guardbench.errors import GuardbenchError, PeerError
from guardbench.processes import Processes
from guardbench.scoring import part_of


def of(rank: int, count: int) -> Processes:
    return Processes(SimpleNamespace(process_index=rank, num_processes=count))


@given(rows=st.integers(0, 200), count=st.integers(1, 17))
def test_shares_are_everything_in_order_and_even(rows: int, count: int) -> None:
    shares = [range(rows)[of(rank, count).share(rows)] for rank in range(count)]
    assert [row for share in shares for row in share] == list(range(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert not rows or shares[0], "the process that speaks has work when any has"


FACTS = {"train images": "a" * 64, "precision": "bf16"}


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("name", FACTS)
def test_processes_that_differ_are_refused_on_all(monkeypatch, rank: int, name: str) -> None:
    processes = of(rank, 3)
    others = [FACTS, FACTS, {**FACTS, name: "b" * 64}]
    monkeypatch.setattr(processes, "collect", lambda _: [FACTS, FACTS, FACTS])
    processes.require_alike(FACTS)
    monkeypatch.setattr(processes, "collect", lambda _: others)
    with pytest.raises(
        GuardbenchError, match=f"process 2 has {name} b{{16}}, and the first "
    ) as told:
        processes.require_alike(others[rank])
    assert isinstance(told.value, PeerError) == (rank > 0), "the first one alone speaks"


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ("c" * 40, "c" * 40 + "-dirty", "process 1 has commit c{40}-dirty, and the first c{40};"),
        (None, "c" * 40, None),  # git did not answer in time on one of them
        ("c" * 40, None, None),
        (None, None, None),
    ],
)
def test_a_commit_is_told_whole_and_an_unknown_one_is_no_difference(
    monkeypatch, ours, theirs, said
) -> None:
    processes = of(0, 2)
    monkeypatch.setattr(processes, "collect", lambda _: [{"commit": ours}, {"commit": theirs}])
    if said is None:
        processes.require_alike({"commit": ours})
        return
    with pytest.raises(GuardbenchError, match=said):
        processes.require_alike({"commit": ours})


def test_the_reference_engine_gets_the_batches_of_one_process() -> None:
    """pyautoattack draws for a whole batch, so its verdicts hang on who is in it."""
    met = {}
    for count in (1, 3):
        for rank in range(count):
            processes = of(rank, count)
            size = 4
            for index in plan_batches(torch.arange(22) % 5 > 0, size * count):
                mine = part_of(index, processes, size, whole=True)
                met.setdefault(count, set()).update([tuple(mine.tolist())] if len(mine) else [])
    assert met[1] == met[3]
    every = [part_of(torch.arange(11), of(rank, 3), 4, whole=False) for rank in range(3)]
    assert sorted(torch.cat(every).tolist()) == list(range(11))
    assert max(map(len, every)) - min(map(len, every)) <= 1, "as even as can be"
