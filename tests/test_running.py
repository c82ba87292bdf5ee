"""Many conversations: killed at any moment nothing is lost and nothing done twice, also by two processes."""

import dataclasses
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from multiprocessing import forkserver

import chats
import pytest
import torch

from attnpatch.conversations import batch, results_folder
from attnpatch.conversations.reading.files import Conversation, RejectedRecord
from attnpatch.conversations.result import Analysis
from attnpatch.conversations.results_folder import RunFolder
from attnpatch.errors import AnalysisError, CaptureError
from attnpatch.maps import io
from attnpatch.maps.block_map import BlockMap

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(batch.__file__)))


class Pretended:
    """An analyzer without a model, that keeps count; conversations whose text says so fail."""

    name = "pretended"
    options = batch.BlockAttentionAnalyzer.__init__.__globals__["Options"]()

    def __init__(self):
        self.seen = []

    def analyze_conversation(self, messages, normalize="row", **options):
        self.seen.append(messages[0]["content"])
        if "fail" in messages[0]["content"]:
            raise CaptureError("it was to\nfail")
        if "bug" in messages[0]["content"]:
            raise ZeroDivisionError("a bug")
        labels = [f"{i} {message['role']}" for i, message in enumerate(messages)]
        sizes = torch.ones(len(labels), dtype=torch.int64)
        mass = torch.eye(len(labels))[None]
        metadata = {"tokens": len(labels), "method": "single pass", **options.get("template_options", {})}
        block_map = BlockMap(mass, [0], labels, labels, sizes, sizes, metadata=metadata)
        return Analysis(block_map, seconds=0.5, peak_bytes=1000 * len(self.seen), notes=("noted",))


@pytest.fixture(autouse=True)
def unchecked(request, monkeypatch):
    if "chat_model" not in request.fixturenames:
        monkeypatch.setattr(batch, "check", lambda analyzer, method: None)


def said(*texts, first=1):
    """Conversations of one message each."""
    return [
        Conversation(({"role": "user", "content": text},), f"c{first + i}", f"f.jsonl record {first + i}")
        for i, text in enumerate(texts)
    ]


def run(analyzer, records, folder, **options):
    return batch.analyze_all(analyzer, records, folder, method="single pass", **options)


def test_summary_and_index(tmp_path):
    steps = []
    summary = run(Pretended(), said("a", "fail", "b", "bug"), tmp_path, on_progress=steps.append)
    assert (summary.done, summary.skipped, summary.tokens, summary.seconds) == (2, 0, 2, 1.0)
    assert summary.peak_bytes == 3000
    reasons = ("f.jsonl record 2: it was to fail", "f.jsonl record 4: ZeroDivisionError: a bug")
    assert summary.failed == reasons
    assert [step.outcome for step in steps] == ["done", "failed", "done", "failed"]
    first, second, *_ = chats.index_of(tmp_path)
    assert first == {
        "record": 1, "source": "f.jsonl record 1", "name": "c1", "file": "c1.safetensors", "tokens": 1,
        "messages": 1, "seconds": 0.5, "peak_bytes": 1000, "method": "single pass", "notes": ["noted"],
    }  # fmt: skip
    assert second == {"record": 2, "source": "f.jsonl record 2", "name": "c2", "error": "it was to fail"}


def test_resume_takes_what_is_left_and_tries_failures_again(tmp_path):
    first = Pretended()
    run(first, said("a", "fail", "b"), tmp_path)
    (tmp_path / "c3.safetensors").unlink()
    again = Pretended()
    summary = run(again, said("a", "mended", "b", "new"), tmp_path, resume=True)
    assert again.seen == ["mended", "b", "new"]
    assert (summary.done, summary.skipped, summary.failed) == (3, 1, ())
    assert [line["file"] for line in chats.index_of(tmp_path)] == [f"c{i}.safetensors" for i in (1, 2, 3, 4)]


def test_the_index_says_what_is_so_now(tmp_path):
    """The parts of several processes are in no order of time, and files come and go."""
    names = lambda: [(line.get("name"), "error" in line) for line in chats.index_of(tmp_path)]
    refused = RejectedRecord("f.jsonl record 2", "not JSON")
    run(Pretended(), [*said("a"), refused], tmp_path, shard=(0, 2))
    run(Pretended(), [*said("a"), refused, *said("c", "fail", first=3)], tmp_path, shard=(1, 2))
    assert names() == [("c1", False), (None, True), ("c4", True)]
    # By one process: the failures are in a part that is read later.
    run(Pretended(), said(*"abcd"), tmp_path, resume=True)
    assert names() == [(name, False) for name in ("c1", "c2", "c3", "c4")]
    (tmp_path / "c3.safetensors").unlink()

    class Short(Pretended):
        def analyze_conversation(self, messages, *more, **options):
            raise CaptureError("no memory")

    run(Short(), said(*"abcd"), tmp_path, resume=True)
    assert names() == [("c1", False), ("c2", False), ("c3", True), ("c4", False)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_each_step_of_writing(tmp_path):
    """SIGKILL at each fsync, rename and link of a run, what is being written cut short; then resumed."""
    records = [*said("a", "fail"), RejectedRecord("f.jsonl record 3", "not JSON"), *said("d", first=4)]
    points = 0
    for point in range(100):
        folder = tmp_path / str(point)
        child = os.fork()
        if child == 0:
            die_at(point)
            run(Pretended(), records, folder)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            break
        points += 1
        results = sorted(folder.glob("*.safetensors"))
        assert all(Analysis.load(path).seconds == 0.5 for path in results), "a result that is not whole"
        again = Pretended()
        summary = run(again, records, folder, resume=(folder / "run.json").exists())
        assert summary.skipped == len(results) and summary.done == 2 - len(results)
        assert [line["record"] for line in chats.index_of(folder)] == [1, 2, 3, 4]
        lines = [line for part in folder.glob("index-*.jsonl") for line in part.read_text().splitlines()]
        assert len(lines) == 4
    assert points >= 10


def die_at(point):
    """Replace what makes writes last by what kills this process when it is called for the ``point``-th time."""
    calls = iter(range(1000))

    def deadly(function):
        def called(*arguments):
            if next(calls) == point:
                if function is fsync:
                    size = os.fstat(arguments[0]).st_size
                    os.ftruncate(arguments[0], size - 5)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return called

    fsync = os.fsync
    for name in ("fsync", "replace", "link"):
        setattr(os, name, deadly(getattr(os, name)))


def test_a_damaged_result_is_made_again(tmp_path):
    run(Pretended(), said("a", "b"), tmp_path)
    path = tmp_path / "c1.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    again = Pretended()
    run(again, said("a", "b"), tmp_path, resume=True)
    assert again.seen == ["a"] and Analysis.load(path).seconds == 0.5


def test_a_file_of_another_conversation_is_not_taken_for_done(tmp_path):
    run(Pretended(), said("a", "b"), tmp_path)
    summary = run(Pretended(), said("a", "changed"), tmp_path, resume=True)
    assert summary.skipped == 1
    assert summary.failed == (
        "f.jsonl record 2: c2.safetensors has another conversation of the same name; give another folder",
    )


@pytest.mark.parametrize("cut", [1, 5, 40, "all"])
def test_a_half_written_line_is_cut_and_written_again(cut, tmp_path):
    run(Pretended(), said("a", "b"), tmp_path)
    whole = (tmp_path / "index.jsonl").read_text()
    part = tmp_path / "index-00000.jsonl"
    text = part.read_bytes()
    part.write_bytes(b"" if cut == "all" else text[:-cut])
    (tmp_path / "index.jsonl").unlink()
    again = Pretended()
    run(again, said("a", "b"), tmp_path, resume=True)
    assert again.seen == [] and part.read_bytes() == text
    assert (tmp_path / "index.jsonl").read_text() == whole


def test_what_a_killed_process_left_is_removed_and_what_others_write_is_not(tmp_path):
    run(Pretended(), said("a"), tmp_path)
    mine, theirs = (tmp_path / f".{name}.safetensors.0011aabb.tmp" for name in ("c3", "c2"))
    mine.touch(), theirs.touch()
    run(Pretended(), said("a", "b", "c"), tmp_path, resume=True, shard=(0, 2))
    assert not mine.exists() and theirs.exists()


def test_shards_are_disjoint_and_together_everything(tmp_path):
    records = said(*"abcdefg")
    seen = []
    for rank in range(3):
        analyzer = Pretended()
        run(analyzer, records, tmp_path, shard=(rank, 3))
        seen.append("".join(analyzer.seen))
    assert seen == ["adg", "be", "cf"]
    assert [line["name"] for line in chats.index_of(tmp_path)] == [one.name for one in records]
    # Resumed by another number of processes.
    again = Pretended()
    for rank in range(2):
        run(again, records, tmp_path, shard=(rank, 2), resume=True)
    assert again.seen == []
    assert len(chats.index_of(tmp_path)) == 7
    lines = [line for part in tmp_path.glob("index-*.jsonl") for line in part.read_text().splitlines()]
    assert len(lines) == 7


def test_a_folder_with_results_is_refused(tmp_path):
    records = said("a", "b")
    run(Pretended(), records, tmp_path)
    with pytest.raises(AnalysisError, match="has results already; continue it with --resume"):
        run(Pretended(), records, tmp_path)
    with pytest.raises(AnalysisError, match="has results already; continue it with --resume"):
        run(Pretended(), records, tmp_path, shard=(1, 2))
    with pytest.raises(AnalysisError, match='normalize was "none" and is "row"'):
        run(Pretended(), records, tmp_path, resume=True, normalize="row")
    with pytest.raises(AnalysisError, match='weights was null and is "4 bit"'):
        run(Pretended(), records, tmp_path, resume=True, options={"weights": "4 bit"})
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(AnalysisError, match="is damaged"):
        run(Pretended(), records, tmp_path, resume=True)
    (tmp_path / "run.json").unlink()
    with pytest.raises(AnalysisError, match=r"but no run\.json with the run's options"):
        run(Pretended(), records, tmp_path, resume=True)


@pytest.mark.parametrize("kept", ["nothing", "the folder", "a file"])
@pytest.mark.parametrize("end", ["all fail", "an error"])
def test_a_run_without_a_result_leaves_nothing_behind(end, kept, tmp_path):
    folder = tmp_path / "one" / "two"
    if kept != "nothing":
        folder.mkdir(parents=True)
    if kept == "a file":
        (folder / "mine.txt").write_text("mine")
    if end == "all fail":
        assert len(run(Pretended(), said("fail", "bug"), folder).failed) == 2
    else:
        with pytest.raises(AnalysisError, match="gone"):
            run(Pretended(), vanishing(), folder)
    left = sorted(path.name for path in tmp_path.rglob("*"))
    assert left == {"nothing": [], "the folder": ["one", "two"], "a file": ["mine.txt", "one", "two"]}[kept]
    # Whatever the options of that run were, another one may begin there.
    assert run(Pretended(), said("a"), folder, normalize="none").done == 1
    assert run(Pretended(), said("a"), folder, normalize="none", resume=True).skipped == 1


def vanishing():
    """A file that can no longer be read after a record that is none."""
    yield RejectedRecord("f.jsonl record 1", "not JSON")
    raise AnalysisError("f.jsonl: it is gone")


def test_results_that_were_there_outlive_a_run_that_fails(tmp_path):
    run(Pretended(), said("a"), tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert len(run(Pretended(), said("a", "fail"), tmp_path, resume=True).failed) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert [line["record"] for line in chats.index_of(tmp_path)] == [1, 2]


@pytest.mark.parametrize("options", [{}, {"normalize": "none"}])
def test_what_a_process_left_that_was_killed_before_its_first_result_is_no_result(options, tmp_path):
    pytest.importorskip("fcntl")
    killed = RunFolder(tmp_path, {"some": "options"}, False, (1, 2))
    killed.append({"record": 1, "source": "f.jsonl record 1", "error": "of that run"})
    # While it is at work its folder is its own.
    with pytest.raises(AnalysisError, match="other options"):
        run(Pretended(), said("a"), tmp_path, **options)
    killed.close()
    assert run(Pretended(), said("a"), tmp_path, **options).done == 1
    assert [line["name"] for line in chats.index_of(tmp_path)] == ["c1"]


def test_two_at_once_on_one_part_are_refused(tmp_path):
    pytest.importorskip("fcntl")
    first = RunFolder(tmp_path, {}, False, (0, 1))
    with pytest.raises(AnalysisError, match="another process is working"):
        RunFolder(tmp_path, {}, True, (0, 1))
    first.close()
    RunFolder(tmp_path, {}, True, (0, 1)).close()


def test_an_index_that_changes_while_it_is_merged_is_merged_again(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path, {}, False, (0, 2))
    folder.append({"record": 1, "source": "one", "error": "bad"})
    replace, other = os.replace, tmp_path / "index-00001.jsonl"

    def slow(source, target):
        if not other.exists():
            other.write_text(json.dumps({"record": 2, "source": "two", "error": "bad"}) + "\n")
        replace(source, target)

    monkeypatch.setattr(results_folder.os, "replace", slow)
    folder.merge()
    folder.close()
    assert [line["source"] for line in chats.index_of(tmp_path)] == ["one", "two"]


def test_a_result_that_cannot_be_written_ends_the_run(tmp_path, monkeypatch):
    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Analysis, "save", full)
    with pytest.raises(OSError, match="No space"):
        run(Pretended(), said("a", "b"), tmp_path)


def test_a_header_is_read_of_whole_files_only(tmp_path):
    run(Pretended(), said("a"), tmp_path)
    path, cut = tmp_path / "c1.safetensors", tmp_path / "cut.safetensors"
    whole, facts = path.read_bytes(), io.facts(path)
    content = io.read(path)
    assert facts == {name: value for name, value in content.items() if name in facts}
    assert facts["metadata"]["conversation"]["name"] == "c1"
    for other in [whole[:length] for length in range(len(whole))] + [whole + b" ", b"x" * 500]:
        cut.write_bytes(other)
        assert io.facts(cut) is None
    assert io.facts(tmp_path / "nowhere") is None


def test_tools_reach_the_template(tmp_path):
    tools = ({"name": "look"},)
    with_tools = dataclasses.replace(said("a")[0], tools=tools)
    run(Pretended(), [with_tools], tmp_path)
    assert io.facts(tmp_path / "c1.safetensors")["metadata"]["tools"] == [{"name": "look"}]


# ------------------------------------------------------------------------------------------------- two processes


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def spawning():
    """Processes that begin with everything imported; that takes seconds, and is not what is tested."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    with pytest.MonkeyPatch.context() as patch:
        # The server knows no path of ours but this.
        patch.setenv("PYTHONPATH", os.pathsep.join([ROOT, os.path.dirname(__file__)]))
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return context


def start(spawning, arguments, log):
    port = free_port()
    return [spawning.Process(target=quietly, args=(log, rank, port, arguments)) for rank in range(2)]


def quietly(log, rank, port, arguments):
    file = os.open(f"{log}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    chats.as_process(rank, 2, port, arguments)


def states(folder):
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.safetensors")}


@pytest.mark.long
def test_killed_at_random_moments_and_resumed(spawning, chat_model, tmp_path):
    """Two processes of one gloo group; files that were there once are never written again."""
    count, kills = 30, 5
    path = chats.write_good(tmp_path / "many.jsonl", count, turns=4)
    with path.open("a") as file:
        file.write("not json\n")
    usual = ["analyze", "--model", str(chat_model), "--json", str(path), "--no-pictures"]
    folder, log = tmp_path / "out", tmp_path / "log"
    rng = random.Random(0)
    known, progress = {}, []
    for round_number in range(kills + 3):
        arguments = [*usual, "--out", str(folder), *["--resume"] * (folder / "run.json").exists()]
        processes = start(spawning, arguments, log)
        for process in processes:
            process.start()
        if round_number < kills:
            # They begin to work when a second or two have gone into loading; then at any moment.
            before, deadline = len(states(folder)), time.monotonic() + 60
            last = round_number == kills - 1
            wait = "at work" if last else rng.choice(["anywhere", "at work", "at work"])
            while wait == "at work" and len(states(folder)) == before and time.monotonic() < deadline:
                if not any(process.is_alive() for process in processes):
                    break
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.15 if wait == "at work" else 1.5))
            first, second = rng.sample(processes, 2)
            first.kill()
            if not last:
                time.sleep(rng.uniform(0, 0.1))
                second.kill()
        for process in processes:
            process.join(120)
        after = states(folder)
        assert {name: after.get(name) for name in known} == known, "a result was lost or made twice"
        progress.append(len(after) - len(known))
        known = after
        codes = [process.exitcode for process in processes]
        if round_number == kills - 1 and first.exitcode == -signal.SIGKILL:
            # The one that was left did its share, and says that the other did not.
            assert second.exitcode == 3
            logs = [(tmp_path / f"log.{rank}").read_text() for rank in range(2)]
            assert any("another process ended before its share was done" in log for log in logs)
        if round_number >= kills and codes == [3, 3]:
            break
    assert codes == [3, 3], [(tmp_path / f"log.{rank}").read_text()[-2000:] for rank in range(2)]
    assert sum(made > 0 for made in progress) >= 3, f"the kills came too early or too late: {progress}"
    lines = chats.index_of(folder)
    assert [line["record"] for line in lines] == list(range(1, count + 2))
    assert "not JSON" in lines[-1]["error"]
    assert not any("error" in line for line in lines[:-1])
    assert {line["file"] for line in lines[:-1]} == set(known)
    parts = [
        json.loads(line) for part in folder.glob("index-*.jsonl") for line in part.read_text().splitlines()
    ]
    assert sorted(line["record"] for line in parts) == list(range(1, count + 2))
    assert not list(folder.glob(".*"))
    whole = tmp_path / "whole"
    (process,) = [spawning.Process(target=alone, args=(f"{log}.whole", [*usual, "--out", str(whole)]))]
    process.start(), process.join(120)
    assert process.exitcode == 3
    for name in known:
        killed, plain = (Analysis.load(place / name).block_map for place in (folder, whole))
        assert killed == plain


def alone(log, arguments):
    torch.set_num_threads(1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    from attnpatch.cli.app import app

    app(arguments, prog_name="attnpatch")


@pytest.mark.slow
def test_accelerate_launch(chat_model, tmp_path):
    path = chats.write_good(tmp_path / "few.jsonl", 5)
    # On CPU alone it starts no second process; this way it does, with or without GPUs.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", str(free_port()), "-m", "attnpatch", "analyze"]
    command += ["--model", chat_model, "--json", path, "--out", tmp_path / "out", "--no-pictures"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert len(chats.index_of(tmp_path / "out")) == 5
    shares = [len(part.read_text().splitlines()) for part in sorted((tmp_path / "out").glob("index-*.jsonl"))]
    assert shares == [3, 2]
    assert done.stdout.count("conversations analysed") == 1 and "5" in done.stdout
