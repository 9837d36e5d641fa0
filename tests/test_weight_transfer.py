"""Weights from the trainer's memory: what arrives, who is refused, and whom a lost peer hurts. No engine yet."""

import itertools
import json
import multiprocessing as mp
import os
import signal
import socket
import stat
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import make_hf_model
from memory_trainer import CPU, TIMEOUT_S, Trainer, Worker, work_once
from safetensors.torch import load, load_file

from npd_ascend.errors import UserError
from npd_ascend.model.hf_weights import hf_shapes
from npd_ascend.model.load import load_decoder
from npd_ascend.parallel.plan import cut_model
from npd_ascend.weights import collective
from npd_ascend.weights.collective import device_checksum, packed_sizes, tensor_sums
from npd_ascend.weights.control import Line, TransferError
from npd_ascend.weights.sender import open_sender

PROMPTS = [(3, 4, 5), tuple(range(3, 40))]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_hf_model("pangu").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(source, tmp_path_factory):
    """(RUN/weights, its trainer with version 1 on disk and in memory)."""
    folder = tmp_path_factory.mktemp("run") / "weights"
    trainer = Trainer(folder, source)
    trainer.ask("publish", 1, PROMPTS)
    yield folder, trainer
    trainer.close()


@pytest.fixture
def healed(served):
    yield served
    served[1].ask("heal")


def on_disk(folder, version):
    return load_file(folder / f"v{version}" / "model.safetensors")


def check_same(tensors, wanted):
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name


def test_what_arrives_is_what_is_on_disk_and_the_newest_alone(served):
    folder, trainer = served
    first, late = Worker(folder), Worker(folder, "rollout-1")
    check_same(first.take(1), on_disk(folder, 1))
    for version in (2, 3):
        trainer.ask("step")
        trainer.ask("publish", version, PROMPTS)
        check_same(first.take(version), on_disk(folder, version))
    with pytest.raises(AssertionError):  # so the test sees a step
        check_same(first.take(3), on_disk(folder, 2))
    check_same(late.take(3), on_disk(folder, 3))
    with pytest.raises(TransferError, match=r"weight version 2 did not come from memory.*has version 3, not 2"):
        late.take(2)
    check_same(late.take(3), on_disk(folder, 3))


def test_a_version_that_is_on_disk_already_is_waited_for(served):
    folder, trainer = served
    soon = threading.Timer(0.5, trainer.ask, ["offer", 40])
    soon.start()
    assert Worker(folder).take(40)
    soon.join()
    started = time.monotonic()
    with pytest.raises(TransferError, match="has version 40, not 41"):
        Worker(folder).take(41)
    assert time.monotonic() - started < TIMEOUT_S


def test_the_snapshot_does_not_move_with_the_model(served):
    folder, trainer = served
    trainer.ask("publish", 50, PROMPTS)
    trainer.ask("step")
    check_same(Worker(folder).take(50), on_disk(folder, 50))


def test_a_sender_that_is_closed_has_no_thread_left(source, tmp_path, monkeypatch):
    """One that held a tensor when the interpreter ended would abort the trainer that has just finished its run."""
    monkeypatch.setattr(collective, "checksum", lambda bucket: str(time.sleep(0.5)))
    model, before = load_decoder(source, dtype=torch.float32, device=CPU), set(threading.enumerate())
    with open_sender(tmp_path, torch.float32, timeout_s=TIMEOUT_S) as sender:
        sender.offer(1, model)
        assert len(set(threading.enumerate()) - before) == 2  # one accepts, one makes the checksums
    assert set(threading.enumerate()) == before


def test_every_bit_and_every_place_counts_in_the_sums_of_a_tensor(monkeypatch):
    monkeypatch.setattr(collective, "_PART_WORDS", 8)
    words = torch.randint(-(2**15), 2**15, (21,), generator=torch.Generator().manual_seed(0)).short()

    def checksum_of(words):
        return device_checksum(tensor_sums(words.view(torch.bfloat16)))

    for at, bit in itertools.product(range(21), range(16)):
        other = words.clone()
        other[at] ^= torch.tensor(1 << bit, dtype=torch.int32).short()
        assert checksum_of(other) != checksum_of(words)
    for first, second in itertools.combinations(range(21), 2):
        other = words.clone()
        other[[first, second]] = words[[second, first]]
        assert checksum_of(other) != checksum_of(words)
    assert len(tensor_sums(words.view(torch.bfloat16))) == 3


def test_the_largest_sum_of_a_tensor_does_not_overflow():
    count = collective._PART_WORDS
    largest = torch.full((count,), -(2**15), dtype=torch.int16)
    assert tensor_sums(largest.view(torch.float32)).tolist() == [-(2**15) * (count * (count + 1) // 2)]


def _offer_from_ranks(mesh, source, folder):
    model = load_decoder(source, dtype=torch.float32, device=CPU, cut=lambda decoder: cut_model(decoder, mesh))
    with open_sender(folder, torch.float32, mesh, timeout_s=60, bucket_bytes=1 << 14) as sender:
        sender.offer(1, model, mesh)
        (folder / f"offered-{mesh.rank}").touch()
        while not (folder / "done").exists():
            time.sleep(0.02)


@pytest.mark.parametrize("layout", [(2, 1, False), (2, 2, True)])
def test_tensor_parallel_ranks_send_what_one_rank_sends(ranks, source, tmp_path, layout):
    run = threading.Thread(target=ranks.run, args=(_offer_from_ranks, layout, source, tmp_path))
    run.start()
    try:
        while run.is_alive() and not (tmp_path / "offered-0").exists():
            time.sleep(0.02)
        tensors = Worker(tmp_path).take(1)
    finally:
        (tmp_path / "done").touch()
        run.join()
    wanted = load_file(source / "model.safetensors")
    check_same(tensors, {name: wanted[name] for name in tensors})
    assert wanted.keys() - tensors.keys() <= {"lm_head.weight"}
    assert list(tensors) == list(hf_shapes(load_decoder(source, dtype=torch.float32, device=CPU)))  # workers ask for it
    with pytest.raises(TransferError, match=r"sender\.json: not there, so no trainer sends weights"):
        Worker(tmp_path).take(1)


def test_a_packed_bucket_ends_with_the_tensor_that_makes_it_too_large():
    assert packed_sizes([4, 4, 4, 9, 1, 8], 8) == [12, 9, 9]
    assert packed_sizes([4, 4, 4, 4], 8) == [12, 4]
    assert packed_sizes([8, 8], 16) == [16]  # as large as it may be is not too large
    assert packed_sizes([], 8) == []


@pytest.mark.parametrize("flipped", [[0], [3, 4]])
def test_a_flipped_bit_is_named(healed, flipped):
    folder, trainer = healed
    trainer.ask("publish", 60 + flipped[0], PROMPTS)
    trainer.ask("damage", flipped)
    worker = Worker(folder, f"rollout-{flipped[0]}")
    said = rf"weight version {60 + flipped[0]}: bucket {flipped[0]} of \d+ differs .*\({len(flipped)} in all"
    with pytest.raises(TransferError, match=said):
        worker.take(60 + flipped[0])
    assert "bucket" in trainer.warning_with(f"rollout worker rollout-{flipped[0]} at")
    check_same(worker.take(60 + flipped[0]), on_disk(folder, 60 + flipped[0]))  # it connects anew


def test_who_has_no_token_is_refused(served):
    folder, trainer = served
    sender = json.loads((folder / "sender.json").read_text())
    assert stat.S_IMODE((folder / "sender.json").stat().st_mode) == 0o600
    address = (sender["host"], sender["port"])
    assert sender["host"] == "127.0.0.1"
    stranger = Line(socket.create_connection(address), "0" * 64, "the trainer", TIMEOUT_S, serves=False)
    stranger.send({"worker": "stranger", "ranks": 1})
    with pytest.raises(TransferError, match="the trainer: hung up"):
        stranger.receive()
    trainer.warning_with("does not have the token of this run")
    (folder / "sender.json").write_text(json.dumps(sender | {"token": "0" * 64}))
    try:
        with pytest.raises(TransferError, match="hung up"):
            Worker(folder).take(1)
    finally:
        (folder / "sender.json").write_text(json.dumps(sender))


def test_all_ports_are_bound_to_loopback(served):
    folder, trainer = served
    trainer.ask("publish", 65, PROMPTS)
    worker = Worker(folder)
    worker.take(65)
    listening = {
        line.split()[9]: line.split()[1].split(":")[0]
        for kind in ("tcp", "tcp6")
        for line in Path(f"/proc/{trainer.process.pid}/net/{kind}").read_text().splitlines()[1:]
        if line.split()[3] == "0A"
    }
    links = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{trainer.process.pid}/fd")]
    mine = [listening[link[8:-1]] for link in links if link.startswith("socket:") and link[8:-1] in listening]
    assert len(mine) >= 2  # the trainer's own, and gloo's for the worker
    assert set(mine) == {"0100007F"}
    assert stat.S_IMODE((folder / "meetings").stat().st_mode) == 0o700
    worker.take(65)  # it is still connected


def test_torn_messages_and_silence_end_a_connection_and_nothing_else(served):
    folder, trainer = served
    sender = json.loads((folder / "sender.json").read_text())
    silent = socket.create_connection((sender["host"], sender["port"]))
    torn = Line(socket.create_connection((sender["host"], sender["port"])), sender["token"], "", 1, serves=False)
    torn._write(b"\x00\x00\x00\x20half of it")
    torn.hang_up()
    trainer.warning_with("hung up in the middle of a message")
    trainer.ask("publish", 70, PROMPTS)
    assert Worker(folder).take(70)  # while the silent one is still there
    trainer.warning_with(f":{silent.getsockname()[1]}: said nothing for 4 s")
    silent.close()


@pytest.mark.parametrize("answer", ["half", "changed", "silence"])
def test_a_trainer_that_does_not_answer_properly_is_left(tmp_path, answer):
    server = socket.create_server(("127.0.0.1", 0))
    (tmp_path / "sender.json").write_text(
        json.dumps({"host": "127.0.0.1", "port": server.getsockname()[1], "token": "ab"})
    )

    def serve():
        line = Line(server.accept()[0], "ab", "a worker", 5, serves=True)
        line.receive()
        if answer == "half":
            line._write(b"\x00\x00\x01\x00" + bytes(40))
        elif answer == "changed":
            mac = line._mac
            line._mac = lambda side, number, payload: mac(side, number, payload + b" ")
            line.send({"meeting": "x"})
        left.wait(60)

    left, thread = threading.Event(), threading.Thread(target=serve)
    thread.start()
    said = "does not have the token of this run, or a message was changed" if answer == "changed" else "said nothing"
    try:
        with pytest.raises(TransferError, match=said):
            Worker(tmp_path, timeout_s=0.7).take(1)
        assert thread.is_alive()  # the trainer has not hung up
    finally:
        left.set()
        thread.join()


def test_a_trainer_that_dies_or_hangs_in_the_middle_is_left(source, tmp_path):
    worker, first = Worker(tmp_path), Trainer(tmp_path, source)
    first.ask("publish", 1, PROMPTS)

    def check_left(trainer, how):
        trainer.ask("damage", (), 2)
        threading.Thread(target=trainer.signal_when_stopped, args=[how]).start()
        with pytest.raises(TransferError, match="weight version 1 did not come from memory"):
            worker.take(1)

    check_left(first, signal.SIGKILL)
    first.process.join()
    with pytest.raises(TransferError, match=r"sender\.json: the trainer does not answer"):
        worker.take(1)
    second = Trainer(tmp_path, source)  # over the file that the first has left
    second.ask("offer", 1)
    check_same(worker.take(1), on_disk(tmp_path, 1))
    check_left(second, signal.SIGSTOP)
    second.process.kill()


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_worker_lost_in_the_middle_is_named_and_hurts_nobody(healed, how):
    folder, trainer = healed
    version = 80 + int(how)
    trainer.ask("publish", version, PROMPTS)
    trainer.ask("damage", (), 2)
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    lost = context.Process(target=work_once, args=(folder, version, how.name, theirs), daemon=True)
    lost.start()
    trainer.wait_until_stopped()
    os.kill(lost.pid, how)
    trainer.ask("heal")
    started = time.monotonic()
    trainer.ask("step")
    trainer.ask("publish", version + 1, PROMPTS)
    assert time.monotonic() - started < TIMEOUT_S
    check_same(Worker(folder).take(version + 1), on_disk(folder, version + 1))
    trainer.warning_with(f"rollout worker {how.name} at 127.0.0.1")
    if how == signal.SIGSTOP:
        os.kill(lost.pid, signal.SIGCONT)
        what_came = ours.recv()
        if isinstance(what_came, bytes):  # all of it was in its sockets, and it read them before it saw the time
            check_same(load(what_came), on_disk(folder, version))
        else:
            assert "did not come from memory" in what_came
    lost.join()


def test_a_host_that_is_not_here_is_told(tmp_path):
    with (
        pytest.raises(UserError, match=r"this host cannot listen at 192\.0\.2\.1"),
        open_sender(tmp_path, torch.float32, timeout_s=1, host="192.0.2.1"),
    ):
        pass
