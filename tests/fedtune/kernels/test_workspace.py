from __future__ import annotations

import threading

import torch

from fedtune.kernels.workspace import Purpose, release_workspaces, workspace

CPU = torch.device("cpu")


def address(
    numel: int, dtype: torch.dtype = torch.float32, purpose: Purpose = "panel"
) -> tuple[int, int]:
    buffer = workspace(numel, dtype, CPU, purpose)
    return buffer.untyped_storage().data_ptr(), buffer.untyped_storage().nbytes()


def test_a_buffer_is_used_again_and_grows_to_the_largest_request() -> None:
    release_workspaces()
    large = address(1000)
    assert large[1] == 4000
    assert address(10) == large
    assert address(2000)[1] == 8000
    assert workspace(10, torch.float32, CPU).shape == (10,)


def test_purposes_dtypes_and_threads_do_not_share() -> None:
    release_workspaces()
    found = [address(100), address(100, torch.float64), address(100, purpose="values")]
    other: list[tuple[int, int]] = []
    thread = threading.Thread(target=lambda: other.append(address(100)))
    thread.start()
    thread.join()
    # The other thread's buffer may have taken its place once it ended; ours is still held.
    assert len({pointer for pointer, _ in found}) == 3
    assert other[0] not in found


def test_a_buffer_made_in_inference_mode_can_be_written_to_later() -> None:
    release_workspaces()
    with torch.inference_mode():
        workspace(8, torch.float32, CPU)
    workspace(8, torch.float32, CPU).fill_(1.0)


def test_released_buffers_are_given_back() -> None:
    workspace(1000, torch.float32, CPU)
    release_workspaces()
    assert address(10)[1] == 40
