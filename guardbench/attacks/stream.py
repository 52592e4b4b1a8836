"""The engine's loop: a row leaves the batch the moment it is decided, and the queue refills it.

A job is one search for one image: an attack with nine targets has nine jobs an image. Every random
number comes from the seed and the image's own bytes, so the verdict on an image depends neither on
the images beside it nor on the size of the batch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from guardbench.devices import out_of_memory
from guardbench.errors import GuardbenchError
from guardbench.runtime import draw_on, drawn_so_far

logger = logging.getLogger(__name__)

Rows = dict[str, Tensor]
"""Per-row tensors [n, ...] of the searches in the batch. `stream` owns `image` (int64, the place in
its `x`) and `age` (iterations so far, to which a search that has moved by several adds the others); a
search owns the rest, of which `adv` is the image that it stands at."""

Tell = Callable[[float, int], None]
"""Hears which share of an attack's work is done (0 to 1) and how many images are not yet broken."""
TELL_EVERY_S = 0.5
_TELL: ContextVar[Tell | None] = ContextVar("tell", default=None)


@contextmanager
def telling(tell: Tell) -> Iterator[None]:
    """Inside, attacks tell how far they are, now and then; tells nest as attacks do (`within`)."""
    token = _TELL.set(tell)
    try:
        yield
    finally:
        _TELL.reset(token)


@contextmanager
def within(first: float, last: float) -> Iterator[None]:
    """Inside, what is told is a part of a whole: its 0 to 1 is the whole's `first` to `last`."""
    outer = _TELL.get()
    if outer is None:
        yield
        return
    with telling(lambda share, alive: outer(first + (last - first) * share, alive)):
        yield


class Journal:
    """Where the streams of an attack stand, so that a killed attack goes on in their midst.

    An attack may begin one stream after another. It is deterministic, so on its next run it begins the
    same ones: those that had finished give what they gave, the one that ran goes on.
    """

    def __init__(
        self,
        due: Callable[[], bool],
        write: Callable[[list[dict[str, Any]]], None],
        states: Sequence[dict[str, Any]] = (),
    ) -> None:
        """See `journaling`.

        Args:
            due: whether it is time to write.
            write: gets the states of all streams begun, tensors and plain values.
            states: what an earlier run wrote last.
        """
        self.due, self._write, self._before = due, write, [*states]
        self._states: list[dict[str, Any]] = []

    def begin(self, of: Tensor) -> dict[str, Any]:
        """Where an earlier run left the stream that begins now; empty where there was none.

        Args:
            of: what tells the streams of other images apart, [n].
        """
        place = len(self._states)
        state = self._before[place] if place < len(self._before) else None
        if state is None or not torch.equal(state["of"], of):
            # Of another device, perhaps, where other images survived the stream before.
            self._before = self._before[:place]
            state = None
        self._states.append(state or {"of": of})
        return {} if state is None else state

    def note(self, state: dict[str, Any]) -> None:
        """Replaces the state of the stream begun last."""
        self._states[-1] = {"of": self._states[-1]["of"], **state}

    def write(self) -> None:
        """Hands all states on."""
        self._write(self._states)


_JOURNAL: ContextVar[Journal | None] = ContextVar("journal", default=None)


@contextmanager
def journaling(journal: Journal) -> Iterator[None]:
    """Inside, streams keep a journal and go on from it."""
    token = _JOURNAL.set(journal)
    try:
        yield
    finally:
        _JOURNAL.reset(token)


class Teller:
    """Whether somebody listens and has not heard for `TELL_EVERY_S` seconds."""

    def __init__(self) -> None:
        self._tell, self._last = _TELL.get(), time.monotonic()

    def due(self) -> bool:
        """Whether it is time to tell."""
        return self._tell is not None and time.monotonic() - self._last > TELL_EVERY_S

    def tell(self, share: float, alive: int) -> None:
        """See `Tell`."""
        if self._tell is not None:
            self._tell(share, alive)
        self._last = time.monotonic()


class Fitting:
    """Runs a function on rows, `most` at a time, and on fewer from when memory has run out."""

    def __init__(self, most: int | None = None) -> None:
        self.most = most

    def __call__(
        self, function: Callable[..., tuple[Tensor, ...]], *values: Tensor
    ) -> tuple[Tensor, ...]:
        """What `function` gives for `values`, which have a row an image each.

        Args:
            function: gives tensors with one row for each row that it is given; called again for rows
                whose first try ended for want of memory, so it must leave its arguments as they were.

        Raises:
            GuardbenchError: not even one row fits.
        """
        count = len(values[0])
        while True:
            size = min(self.most or count, max(count, 1))
            try:
                pieces = zip(*(torch.split(value, size) for value in values), strict=True)
                parts = [function(*piece) for piece in pieces]
                return (
                    parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))
                )
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if size == 1:
                    raise GuardbenchError(
                        "one image alone does not fit into the device's memory: free some, or take "
                        "another --device."
                    ) from error
                self.most = size // 2
                logger.info("memory ran out at %d rows; going on with %d", size, self.most)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


_FITS: ContextVar[dict[Any, int] | None] = ContextVar("fits", default=None)


@contextmanager
def remembering_what_fits() -> Iterator[None]:
    """Inside, on one model, a stream begins with as many rows as an earlier one of its kind could keep."""
    token = _FITS.set({})
    try:
        yield
    finally:
        _FITS.reset(token)


class Search(Protocol):
    """One search of an image, advanced for many rows at once by one forward pass or a few."""

    @property
    def longest(self) -> int:
        """Iterations of a search that breaks nothing."""

    def begin(self, x: Tensor, y: Tensor, image: Tensor, job: Tensor) -> Rows:
        """Rows of new searches.

        Args:
            x, y: clean images [n, C, H, W] and labels [n].
            image: their places in what `stream` was given, int64 [n].
            job: which search of its image each row is, int64 [n], from 0.
        """

    def advance(self, model: nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:
        """Moves every row on, in place, by one iteration.

        Returns:
            Whether `adv` is misclassified inside the threat model, and whether the search has
            ended without that; bool [n] each.
        """


def rows_at_once(x: Tensor) -> int:
    """Rows that fill the device without filling its memory, for images like `x` [N, C, H, W].

    A CPU is fastest while a layer's maps stay in its cache. Up to 32 px the first maps are as large as the
    image (see `fit_stem`): on two cores a ConvNet-D3 takes 1.5 times as many gradients a second at 32 rows
    as at 512, a ResNet-18 1.2 times; at 64 px a ResNet-18 is fastest at about 128, where a ConvNet, whose
    first maps are whole at any size, would like 8. A GPU wants many more.
    """
    pixels = x.shape[-2] * x.shape[-1]
    if x.device.type != "cpu":
        return max(8, min(2048, (1 << 23) // pixels))
    return max(8, min(512, (1 << (15 if pixels <= 32 * 32 else 19)) // pixels))


def stream(
    search: Search,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    jobs: int = 1,
    capacity: int | None = None,
    ends: bool = False,
) -> Tensor:
    """Runs every job of every image until one breaks it.

    Jobs queue with the first of all images ahead of the second of any. A broken image's other jobs
    are dropped, running or not; while fewer images are left than the batch holds, several jobs of
    one image run side by side, so the batch stays full to the end.

    Args:
        model: what is attacked.
        x, y: images [N, C, H, W] in [0, 1] and labels [N].
        jobs: searches an image.
        capacity: rows at once, `rows_at_once` unless told; changes speed alone.
        ends: an image that no job breaks comes back as the last of them left it.

    Returns:
        Images [N, C, H, W]: adversarial where broken, clean elsewhere (but see `ends`). Of an image with
        several jobs the verdict is the same at any capacity, but which job breaks it first is not.
    """
    count = len(x)
    if capacity is None:
        capacity = rows_at_once(x)
    if capacity < 1:
        raise GuardbenchError(f"the capacity must be positive, not {capacity}")
    found, broken = x.clone(), torch.zeros(count, dtype=torch.bool, device=x.device)
    moved = broken.clone()  # whose place in `found` holds another image
    rows: Rows = {}
    ahead = 0
    kind, fits = (type(search), x.shape[1:], x.device), _FITS.get()
    fitting = Fitting((fits or {}).get(kind))
    teller, journal = Teller(), _JOURNAL.get()
    if journal is not None and (state := journal.begin(_told_apart(search, jobs, x, y))):
        ahead, broken = int(state["ahead"]), state["broken"].to(x.device, copy=True)
        moved = state["moved"].to(x.device, copy=True)
        found[moved] = state["found"].to(x.device)
        rows = {name: value.to(x.device) for name, value in state["rows"].items()}
        # For a model that answers at random; earlier checkpoints have none.
        draw_on(state.get("drawn", ()))

    def note() -> None:
        if journal is not None:
            facts = {"ahead": ahead, "broken": broken, "moved": moved, "found": found[moved]}
            journal.note({**facts, "rows": rows, "drawn": drawn_so_far()})

    while True:
        active = len(rows["image"]) if rows else 0
        # A refill copies the batch, so it waits until an eighth is free.
        if ahead < jobs * count and active <= capacity - max(1, capacity // 8):
            fresh, ahead = _take(ahead, capacity - active, count, jobs, broken)
            if len(fresh):
                image = fresh % count
                new = search.begin(x[image], y[image], image, fresh // count)
                new |= {"image": image, "age": torch.zeros_like(image)}
                rows = {k: torch.cat([rows[k], v]) for k, v in new.items()} if active else new
        if not rows or not len(rows["image"]):
            note()
            return found
        names = [*rows]
        hit, over, *values = fitting(partial(_advanced, search, model, names), *rows.values())
        if fits is not None and fitting.most is not None:
            fits[kind] = fitting.most
        rows = dict(zip(names, values, strict=True))
        rows["age"] = rows["age"] + 1
        _put(found, moved, rows, hit)
        broken[rows["image"][hit]] = True
        if ends:
            _put(found, moved, rows, over & ~broken[rows["image"]])
        gone = over | broken[rows["image"]]
        if gone.any():
            rows = {k: v[~gone] for k, v in rows.items()}
        if journal is not None and journal.due():
            note()
            journal.write()
        if teller.due():
            queue = torch.arange(ahead, jobs * count, device=x.device) % count
            waiting = int((~broken[queue]).sum()) * search.longest
            running = int((search.longest - rows["age"]).sum())
            share = 1 - (waiting + running) / (jobs * count * search.longest)
            teller.tell(share, int((~broken).sum()))


def _put(found: Tensor, moved: Tensor, rows: Rows, which: Tensor) -> None:
    """Writes where the rows `which` stand, of several rows of one image the first."""
    if which.any():
        place = which.nonzero().squeeze(1)
        place = place[_firsts(rows["image"][place])]
        image = rows["image"][place]
        found[image], moved[image] = rows["adv"][place], True


def _told_apart(search: Search, jobs: int, x: Tensor, y: Tensor) -> Tensor:
    """Numbers by which a stream is known again: its length and its images, on the CPU."""
    length = torch.tensor([float(search.longest), float(jobs)])
    return torch.cat([length, x.flatten(1).sum(1).cpu(), y.cpu().float()])


def _advanced(
    search: Search, model: nn.Module, names: list[str], *values: Tensor
) -> tuple[Tensor, ...]:
    rows = dict(zip(names, values, strict=True))
    hit, over = search.advance(model, rows)
    return hit, over, *(rows[name] for name in names)


def gradient_of(values: Tensor, point: Tensor, *, keep: bool = False) -> Tensor:
    """Gradient in `point` [n, ...] of the sum of `values`, each of which sees its own row alone.

    Args:
        keep: the graph is needed for another gradient.

    Raises:
        GuardbenchError: no gradient reaches the images.
    """
    if not values.requires_grad:
        raise _no_gradient()
    gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
        values.sum(), point, allow_unused=True, retain_graph=keep
    )
    if gradients[0] is None:
        raise _no_gradient()
    return gradients[0]


def _no_gradient() -> GuardbenchError:
    return GuardbenchError(
        "no gradient reaches the images: the model detaches its input or runs without autograd, so"
        " only a black-box attack (square) can judge it"
    )


def _firsts(image: Tensor) -> Tensor:
    """Where every value of `image` [n] occurs first: writing two rows to one place is undefined."""
    order = image.argsort(stable=True)
    ordered = image[order]
    return order[torch.cat([ordered.new_ones(1).bool(), ordered[1:] != ordered[:-1]])]


def _take(ahead: int, room: int, count: int, jobs: int, broken: Tensor) -> tuple[Tensor, int]:
    """The next jobs of images not yet broken, at most `room`, and where the queue then stands."""
    rest = torch.arange(ahead, jobs * count, device=broken.device)
    rest = rest[~broken[rest % count]][:room]
    return rest, (int(rest[-1]) + 1 if len(rest) == room else jobs * count)
