"""``--device`` and ``--threads``."""

from __future__ import annotations

import os

import pytest
import torch

from fastfilm.segmentation.support import threads
from fastfilm.segmentation.support.devices import choose
from fastfilm.segmentation.support.errors import UserError


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """PyTorch says that there are so many; nothing is allocated on them."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.setattr("torch.zeros", lambda *_, **__: None)


@pytest.mark.parametrize("name", ["gpu", "GPU:0", "abc", "", "meta", "cuda:x", "cpu gpu"])
def test_a_name_that_is_no_device_is_refused_with_those_that_are(name: str) -> None:
    with pytest.raises(UserError, match="--device must be auto, cpu, cuda") as error:
        choose(name)
    assert ("did you mean cuda" in str(error.value)) == name.lower().startswith("gpu")


@pytest.mark.parametrize("name", ["cuda", "cuda:7"])
def test_a_gpu_where_there_is_none_is_one_clear_message(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    gpus(monkeypatch, 0)
    with pytest.raises(UserError, match=f"--device {name}: PyTorch .*--device cpu computes") as e:
        choose(name)
    assert "\n" not in str(e.value)
    assert choose().type == choose("auto").type == "cpu"


@pytest.mark.parametrize("name", ["xpu", "mps"])
def test_other_devices_that_are_not_there_are_refused(name: str) -> None:
    try:
        torch.zeros(1, device=name)
        pytest.skip("is there")
    except (RuntimeError, AssertionError, NotImplementedError):
        pass
    with pytest.raises(UserError, match=f"--device {name}: not there: .+") as error:
        choose(name)
    assert len(str(error.value)) < 200


def test_processes_get_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 2)
    assert choose() == torch.device("cuda:0") == choose("cuda")
    assert choose("cuda:1") == torch.device("cuda:1")
    assert [choose(n, local=1, world=2).index for n in (None, "cuda")] == [1, 1]
    assert choose("cpu", local=1, world=2).type == "cpu"
    with pytest.raises(UserError, match="cuda:2: there is no such GPU; there are cuda:0, cuda:1"):
        choose(local=2, world=3)
    with pytest.raises(UserError, match="one GPU for 2 processes"):
        choose("cuda:0", world=2)


def test_threads_are_set_and_checked() -> None:
    before = torch.get_num_threads()
    try:
        assert threads.use(1) == torch.get_num_threads() == 1
        with pytest.raises(UserError, match=r"--threads must be 1 to .*, got 0"):
            threads.use(0)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("n", "load", "usable", "said"),
    [
        (4, 1.0, 4, None),
        (4, 9.5, 4, "load 9.5 on 4 cores"),
        (1, 9.5, 4, None),
        (4, 1.0, 2, "4 threads on the 2 cores"),
    ],
)
def test_more_threads_than_are_good_for_are_told(
    monkeypatch: pytest.MonkeyPatch, n: int, load: float, usable: int, said: str | None
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0, 0))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(threads, "cores_here", lambda: usable)
    found = threads.crowded(n)
    assert found is None if said is None else found is not None and said in found


def test_nothing_is_said_about_threads_where_a_gpu_computes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(threads, "crowded", lambda _: "crowded")
    threads.use(None, torch.device("cuda"))
    assert capsys.readouterr().err == ""
    threads.use(None, torch.device("cpu"))
    assert capsys.readouterr().err == "warning: crowded\n"
