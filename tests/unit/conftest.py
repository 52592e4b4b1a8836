import pytest
import torch


@pytest.fixture
def one_thread():
    """Thousands of tiny forward passes: a second thread only costs, most on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
