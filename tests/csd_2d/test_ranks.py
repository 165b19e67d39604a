"""Several processes on one edit: real ones, that exchange over gloo, against the same edit in one."""

import signal
import socket
import subprocess
import sys

import pytest
import torch

from csd_2d import ranks
from csd_2d.cli import main as csd
from csd_2d.io.images import read_image, write_image
from tests.forked import Forked
from tests.ranks_child import edits, frames_stack, long_canvas, long_edit, main, smooth


def run(size: int, *arguments: object) -> list[Forked]:
    """As torchrun starts them, less torchrun, and to their end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    started = [Forked(main, *arguments, environment={**address, "RANK": str(rank)}) for rank in range(size)]
    for process in started:
        process.ended()
    return started


def succeeded(processes: list[Forked]) -> None:
    for process in processes:
        assert process.ended() == 0, process.errors


@pytest.fixture(scope="module", params=[2, 3])
def several(request, tiny_pipeline_folder, tmp_path_factory):
    file = tmp_path_factory.mktemp("ranks") / "results.pt"
    succeeded(run(request.param, "edits", file, tiny_pipeline_folder))
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", edits(""))
def test_several_processes_give_the_result_of_one(several, tiny_pipeline_folder, name):
    alone = edits(str(tiny_pipeline_folder))[name]()
    assert len(several[name]) == len(alone)
    for ours, expected in zip(several[name], alone, strict=True):
        # Sums in another order: a few units in the last place of fp32.
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_each_process_makes_its_share_of_the_noise_estimates(several):
    """Three steps of five frames, one row each."""
    assert several["rows"] in ([9, 6], [6, 6, 3])


@pytest.mark.parametrize(("what", "noticed"), [("die", "ended"), ("hang", "did not answer")])
def test_a_process_that_is_lost_ends_the_others_and_leaves_what_was_finished(tmp_path, what, noticed):
    file = tmp_path / "state"
    processes = run(2, what, file)
    assert processes[1].ended() == -signal.SIGKILL if what == "die" else processes[1].ended() != 0
    assert processes[0].ended() == 1
    message = [line for line in processes[0].errors.splitlines() if "LostRankError: " in line][-1]
    assert noticed in message and "--resume goes on" in message

    whole, resumed, steps = frames_stack(), frames_stack(), []
    long_edit(whole, tmp_path / "other")
    long_edit(resumed, file, lambda info: steps.append(info.index))
    assert steps == list(range(5, 12))
    # Sums over other numbers of processes round differently, and a step builds on the ones before.
    torch.testing.assert_close(resumed.latents, whole.latents, atol=1e-5, rtol=0)


@pytest.mark.parametrize("particles", [frames_stack, long_canvas])
def test_what_one_process_began_several_end(tmp_path, particles):
    class Stop(Exception):
        pass

    def stop(info):
        if info.index == 3:
            raise Stop

    file = tmp_path / "state"
    whole = particles()
    long_edit(whole, tmp_path / "other")
    with pytest.raises(Stop):
        long_edit(particles(), file, stop)
    succeeded(run(2, "resume stack" if particles is frames_stack else "resume canvas", file))
    result = torch.load(f"{file}.result", weights_only=True)
    assert result["steps"] == list(range(4, 12))
    expected = [parameter.detach() for parameter in whole.parameters()]
    torch.testing.assert_close(result["latents"], expected, atol=1e-5, rtol=0)


def test_an_error_of_the_edit_is_that_of_all_processes(tmp_path):
    for process in run(2, "not finite", tmp_path / "none"):
        assert process.ended() == 1
        assert "latents are not finite after" in process.errors.splitlines()[-1]


def test_torchrun_and_the_command_line(tmp_path):
    write_image(smooth(20, 30), tmp_path / "in.png")
    arguments = [tmp_path / "in.png", "--prompt", "make it night", "--prior", "analytic", "--steps", "5"]
    command = ["-m", "csd_2d.cli", "panorama", *map(str, arguments)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    together = subprocess.run([*torchrun, *command, tmp_path / "two.png"], capture_output=True, text=True)
    assert together.returncode == 0, together.stderr
    assert together.stdout.count("wrote") == 1
    assert together.stderr.count(" 0/5 ") == 1  # one progress bar
    csd([*command[2:], str(tmp_path / "one.png")])
    assert torch.equal(read_image(tmp_path / "two.png"), read_image(tmp_path / "one.png"))
    assert {entry.name for entry in tmp_path.iterdir()} == {"in.png", "one.png", "two.png"}


def test_a_map_is_shared_out_in_order_whatever_the_number_of_items(monkeypatch):
    """Three processes in one: each call of `all_gather` finds what the others made."""
    monkeypatch.setattr(ranks, "size", lambda: 3)
    for count in range(8):
        items, results = range(count), []
        for rank in range(3):
            monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
            made: list[torch.Tensor] = []
            monkeypatch.setattr(ranks, "all_gather", lambda mine, made=made: made.append(mine) or [mine] * 3)
            list(ranks.shared_map(lambda item: torch.tensor(item), items))
            results.append([int(item) for item in made])
        assert len({len(made) for made in results}) == 1  # all take part in every exchange
        order = [results[item % 3][item // 3] for item in items]
        assert order == list(items)
