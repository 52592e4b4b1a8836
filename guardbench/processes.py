"""One run on several processes: which part of the work is this one's, and what the others found.

Processes are started by `accelerate launch` or `torchrun`; torch.distributed carries what they say.
All of them walk through the same program. What reads or writes the workspace is done by the first one,
`main`, and told to the others; so the workspace need not be seen by every node (but see
`StageFolder.checkpoint_own`). A process that was
started alone is `main`, its part is everything, and nothing here costs it anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import (  # type: ignore[import-untyped]
    broadcast,
    broadcast_object_list,
    gather_object,
    send_to_device,
)
from torch import Tensor

from guardbench.errors import GuardbenchError, PeerError

T = TypeVar("T")
_PIECE = 1 << 24  # numbers of a tensor that are sent at once
_SMALL = 1 << 14  # numbers; that many tensors are one message
HOURS_TO_WAIT = 6
"""For a process that says nothing: the longest that `main` decodes or works alone. One that has died
is noticed at once by gloo, which sees its connection close, and by the launcher, which stops the rest."""


class Processes:
    """The processes of a run, as one of them sees them.

    Attributes:
        rank: this one's number, from 0.
        count: how many there are.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.rank = int(accelerator.process_index)
        self.count = int(accelerator.num_processes)

    @property
    def main(self) -> bool:
        """Whether this process reads and writes the workspace and speaks to the user."""
        return self.rank == 0

    def times(self, device: str) -> str:
        """The name of a device, `2 x NVIDIA H200` where two processes have one each."""
        return device if self.count == 1 else f"{self.count} x {device}"

    def share(self, count: int) -> slice:
        """This process's rows of `count`: contiguous, in the order of ranks, as even as can be.

        Where there are fewer rows than processes, `main` has the first.
        """
        first, last = (-(-count * rank // self.count) for rank in (self.rank, self.rank + 1))
        return slice(first, last)

    def rounds(self, things: Sequence[T]) -> list[Sequence[T]]:
        """As many of `things` at a time as there are processes, one for each, in order."""
        return [things[first : first + self.count] for first in range(0, len(things), self.count)]

    def total(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes; no gradient passes."""
        if self.count == 1:
            return value
        return torch.as_tensor(self._accelerator.reduce(value.detach().clone(), "sum"))

    def sum_gradients(self, model: torch.nn.Module) -> None:
        """Replaces every gradient of `model` by its sum over all processes, in its place."""
        if self.count == 1:
            return
        sent, small = [], []
        for parameter in model.parameters():
            if parameter.grad is None:
                continue
            if parameter.grad.numel() < _SMALL:
                small.append(parameter.grad)
                continue
            # As it lies in memory, which is alike on all: a copy costs as much as the message.
            grad = (
                parameter.grad.permute(0, 2, 3, 1) if parameter.grad.ndim == 4 else parameter.grad
            )
            if not grad.is_contiguous():
                parameter.grad = grad = parameter.grad.contiguous()
            sent.append(torch.distributed.all_reduce(grad, async_op=True))
        together = torch.cat([grad.flatten() for grad in small])
        torch.distributed.all_reduce(together)
        for grad, part in zip(
            small, torch.split(together, [g.numel() for g in small]), strict=True
        ):
            grad.copy_(part.view_as(grad))
        for message in sent:
            message.wait()

    def take_over(self, model: torch.nn.Module) -> None:
        """Gives every process the parameters and buffers that `model` has in the first."""
        if self.count > 1:
            for value in model.state_dict().values():
                broadcast(value)

    def collect(self, found: T) -> list[T]:
        """What every process found, in the order of ranks; every process is given all of it."""
        if self.count == 1:
            return [found]
        return list(gather_object([send_to_device(found, "cpu")]))

    def gathered(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """The rows that every process has found of each name, in the order of ranks, on the CPU."""
        parts = self.collect({name: rows.cpu() for name, rows in found.items()})
        return {name: torch.cat([part[name] for part in parts]) for name in found}

    def require_alike(self, facts: Mapping[str, str | None]) -> None:
        """Refuses processes that differ in what shapes the result, which would lose or mix images.

        Args:
            facts: of this process, by name; None where it is not known.

        Raises:
            GuardbenchError: names the first that differs, and how.
        """
        first, *others = self.collect(dict(facts))
        for rank, found in enumerate(others, start=1):
            for name, value in first.items():
                other = found[name]
                if value is not None and other is not None and other != value:
                    raise (GuardbenchError if self.main else PeerError)(
                        f"process {rank} has {name} {_short(other)}, and the first {_short(value)}; "
                        "give all processes the same command, files and packages."
                    )

    def from_main(self, work: Callable[[], T]) -> T:
        """What `work` gives to `main`, which alone does it; raises everywhere what it raises there."""
        if self.count == 1:
            return work()
        told: list[tuple[T | None, str | None]] = [(None, None)]
        if self.main:
            try:
                told = [(work(), None)]
            except Exception as error:  # whatever it is, the others must not wait for it
                broadcast_object_list([(None, str(error))])
                raise
        broadcast_object_list(told)
        value, problem = told[0]
        if problem is not None:
            raise PeerError(problem)
        return value  # type: ignore[return-value]

    def tensor_from_main(self, work: Callable[[], Tensor]) -> Tensor:
        """The tensor that `work` gives to `main`; on the CPU in the others, sent in pieces as it lies.

        What is told by `from_main` is pickled and held several times over.
        """
        if self.count == 1:
            return work()
        found: list[Tensor] = []

        def described() -> tuple[torch.Size, torch.dtype]:
            found.append(work())
            return found[0].shape, found[0].dtype

        shape, dtype = self.from_main(described)
        value = found[0] if found else torch.empty(shape, dtype=dtype)
        for part in torch.split(value.reshape(-1), _PIECE):
            sent = part.to(self._accelerator.device)
            broadcast(sent)
            if not self.main:
                part.copy_(sent)
        return value

    @contextmanager
    def local_first(self) -> Iterator[None]:
        """Inside, the first process of a node is done before its others begin: a cache is built once."""
        with self._accelerator.local_main_process_first():
            yield


def _short(fact: str) -> str:
    """A fact for an error: a SHA-256 by its first digits."""
    return fact[:16] if len(fact) == 64 else fact[:80]


def lost_peer(error: RuntimeError) -> str | None:
    """What to tell of an error when it is that of a process whose peer has died, else None."""
    words = str(error).lower()
    lost = ("connection", "gloo", "nccl", "timed out", "distributed", "peer")
    if not torch.distributed.is_initialized() or not any(word in words for word in lost):
        return None
    return (
        f"another process of this run has stopped, or said nothing for {HOURS_TO_WAIT} hours; its own "
        "message says why. Start all of them again to go on from here."
    )
