"""How the processes of a run share its work, without starting any."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from test_sre2l import load_digits, make_task

from guardbench.distillers.squeeze import Squeeze, _batches
from guardbench.distillers.sre2l import Recover, _groups, _part, _ready
from guardbench.models import build_model
from guardbench.processes import Processes
from guardbench.store import write_bytes


def of(rank: int, count: int) -> Processes:
    return Processes(SimpleNamespace(process_index=rank, num_processes=count))


@given(rows=st.integers(0, 200), count=st.integers(1, 17))
def test_shares_are_everything_in_order_and_even(rows: int, count: int) -> None:
    shares = [range(rows)[of(rank, count).share(rows)] for rank in range(count)]
    assert [row for share in shares for row in share] == list(range(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert not rows or shares[0], "the process that speaks has work when any has"


@pytest.mark.parametrize(("count", "parts"), [(1, 1), (1, 3), (6, 8), (5, 4)])
def test_every_process_takes_a_step_in_as_many_parts(tmp_path, count: int, parts: int) -> None:
    """BN layers wait for each other at each part: one more on one process would stop the run."""
    task, train = make_task(tmp_path), load_digits()
    model = build_model("convnet-d3-bn-small", channels=1, classes=10, resolution=8, seed=1)
    params = Squeeze.model_validate({**task.recipe.params["squeeze"], "accumulate": parts})
    picked, seen = torch.arange(64), []
    for rank in range(count):
        task.run.__dict__["processes"] = of(rank, count)
        generator = torch.Generator().manual_seed(0)
        batches = list(_batches(task, train, model, params, picked, generator))
        assert len(batches) == parts
        assert all(len(batch.images) for batch in batches)
        seen += [label for batch in batches for label in batch.labels.tolist()]
    assert seen == train.labels[picked].tolist()


def test_recovered_chunks_are_found_again_whatever_their_size(tmp_path) -> None:
    groups = _groups(10, 5, Recover(iterations=1, lr=0.1, r_bn=1.0, jitter=0))
    write_bytes(_part(tmp_path, 0), save({"images": torch.zeros(20, 1, 2, 2)}))
    assert _ready(tmp_path, groups) == ([_part(tmp_path, 0)], 2)
    write_bytes(_part(tmp_path, 2), save({"images": torch.zeros(30, 1, 2, 2)}))
    assert _ready(tmp_path, groups)[1] == 5, "a chunk of a run with more processes"
