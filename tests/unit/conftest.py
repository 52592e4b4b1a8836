from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from guardbench import stages
from guardbench.stages import StageFolder


@pytest.fixture
def one_thread():
    """Thousands of tiny forward passes: a second thread only costs, most on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch):
    """Runs something that ends with a kill behind its nth checkpoint, after which all is as it was."""

    def run(checkpoint: int, work: Callable[[], object]) -> None:
        real, written = StageFolder.checkpoint, []

        def dies(self: StageFolder, state: Mapping[str, Any], **more: bool) -> None:
            real(self, state, **more)
            written.append(self.name)
            if len(written) == checkpoint:
                raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(stages, "CHECKPOINT_EVERY_S", -1.0)
            patched.setattr(StageFolder, "checkpoint", dies)
            with pytest.raises(KeyboardInterrupt):
                work()

    return run
