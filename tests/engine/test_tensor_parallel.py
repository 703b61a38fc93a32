"""The processes of the ranks: that they answer, and how they end. No models here."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from config import Config
from engine.ranks.runner import TensorParallelRunner
from engine.types import BlockUpdate, NewRequest, PrefillChunk, StepHandle, StepPlan, StepResult
from sampling_params import SamplingParams
from tests.engine.fake_ranks import GEOMETRY, FakeRank, Trouble, answer, rank_pids
from tests.engine.waits import PATIENCE, no_wait_runs_out
from utils.errors import ConfigError, EngineClosedError, StepError, WorkerDiedError

ROOT = Path(__file__).parents[2]


def _config(size: int = 2, **options: Any) -> Config:
    return Config(model="none", device="cpu", tensor_parallel_size=size, **options)


def _runner(spec: FakeRank | None = None, size: int = 2) -> TensorParallelRunner:
    checkpoint: Any = None
    return TensorParallelRunner(_config(size), checkpoint, spec or FakeRank())


def _plan(step_id: int) -> StepPlan:
    return StepPlan(step_id, decode=(3, 1, 2))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie has ended; whoever is init here will take it away.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def _assert_ended(pids: list[int]) -> None:
    assert not any(map(_alive, pids)), "workers outlive their engine"


def _wait_for_end(pids: list[int]) -> None:
    """Of workers that have to notice by themselves."""
    deadline = time.monotonic() + PATIENCE
    while any(map(_alive, pids)):
        assert time.monotonic() < deadline, "workers outlive their engine"
        time.sleep(0.02)


def _shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if not name.startswith(("sem.", "torch_"))}


@pytest.fixture
def _interrupts() -> Iterator[None]:
    """Where tests run in the background of a shell, SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before = _shared_memory(), set(os.listdir("/proc/self/fd"))
    yield
    assert _shared_memory() <= before[0]
    assert set(os.listdir("/proc/self/fd")) <= before[1]


def _untimed(handle: StepHandle) -> StepResult:
    """The result without its time, as in `answer`."""
    return replace(handle.result(), ended_at=0.0)


class TestSteps:
    def test_results_are_those_of_the_plans_however_they_are_asked_for(self) -> None:
        prompt = tuple(range(50_000)) * 8
        new = NewRequest(0, 0, prompt, SamplingParams(temperature=0.5, seed=2), 11)
        plans = [
            _plan(0),
            _plan(1),
            # Larger than a socket's buffer.
            StepPlan(3, (new,), (BlockUpdate(0, 0, (5, 6)),), (PrefillChunk(0, 0, 9, True),), (1,)),
            StepPlan(4, decode=(3, 1)),
            StepPlan(5, decode=(3, 1)),
        ]
        runner = _runner(FakeRank(step_seconds=0.01), size=3)
        assert runner.kv_groups == (GEOMETRY,)
        begin = runner.now()
        handles = [runner.execute(plan) for plan in plans]
        results = [handles[i].result() for i in (4, 0, 0, 3, 2, 1)]
        # When a result came is told by the clock here, not by the rank's.
        assert all(begin <= result.ended_at <= runner.now() for result in results)
        assert [_untimed(handles[i]) for i in range(5)] == [answer(plan) for plan in plans]
        assert [result.step_id for result in results] == [5, 0, 0, 4, 3, 1]
        time.sleep(0.3)  # the workers have gone to sleep
        for step_id in (6, 11, 12):
            assert _untimed(runner.execute(_plan(step_id))) == answer(_plan(step_id))
        pids = rank_pids()
        assert len(set(pids)) == 3
        runner.close()
        runner.close()
        _assert_ended(pids)
        with pytest.raises(EngineClosedError):
            runner.execute(_plan(7))

    @pytest.mark.usefixtures("_interrupts")
    def test_an_interrupted_wait_can_be_taken_up_again(self) -> None:
        runner = _runner(FakeRank(step_seconds=0.8))
        handles = [runner.execute(_plan(i)) for i in range(2)]
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            handles[0].result()
        assert [_untimed(handle) for handle in handles] == [answer(_plan(0)), answer(_plan(1))]
        runner.close()

    def test_timeouts_of_the_programs_own_sockets_are_not_the_ranks(self) -> None:
        socket.setdefaulttimeout(0.05)
        try:
            runner = _runner()
        finally:
            socket.setdefaulttimeout(None)
        stopped = rank_pids()[1]
        os.kill(stopped, signal.SIGSTOP)
        threading.Timer(0.3, os.kill, (stopped, signal.SIGCONT)).start()
        new = NewRequest(0, 0, tuple(range(500_000)), SamplingParams(), 0)
        plan = StepPlan(0, (new,), (), (PrefillChunk(0, 0, 1, True),))
        assert _untimed(runner.execute(plan)) == answer(plan)
        runner.close()

    @pytest.mark.usefixtures("_interrupts")
    @pytest.mark.parametrize("closes", [False, True])
    def test_an_interrupt_within_a_message_loses_nothing(self, closes: bool) -> None:
        """The rest of the plan goes to the ranks as soon as they read again."""
        runner = _runner()
        pids = rank_pids()
        os.kill(pids[0], signal.SIGSTOP)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        new = NewRequest(0, 0, tuple(range(500_000)), SamplingParams(), 0)
        with pytest.raises(KeyboardInterrupt):
            runner.execute(StepPlan(0, (new,), (), (PrefillChunk(0, 0, 1, True),)))
        os.kill(pids[0], signal.SIGCONT)
        if not closes:
            assert [_untimed(runner.execute(_plan(i))) for i in (1, 2)] == [
                answer(_plan(i)) for i in (1, 2)
            ]
        runner.close()
        _assert_ended(pids)

    @pytest.mark.usefixtures("_interrupts")
    def test_an_interrupt_of_a_rank_is_the_caller_s_to_handle(self) -> None:
        """Whoever sends one to all processes of a name reaches the ranks too."""
        runner = _runner()
        assert _untimed(runner.execute(_plan(0))) == answer(_plan(0))
        for pid in rank_pids():
            os.kill(pid, signal.SIGINT)
        assert _untimed(runner.execute(_plan(1))) == answer(_plan(1))
        runner.close()

    def test_close_waits_for_what_is_under_way(self) -> None:
        runner = _runner(FakeRank(step_seconds=0.2))
        for i in range(3):
            runner.execute(_plan(10 + i))
        runner.close()

    def test_a_fork_of_the_caller_leaves_the_workers_alone(self) -> None:
        runner = _runner()
        fork = os.fork()
        if not fork:
            # Forgotten here, it would end its ranks.
            del runner
            os._exit(0)
        os.waitpid(fork, 0)
        assert _untimed(runner.execute(_plan(0))) == answer(_plan(0))
        runner.close()

    def test_an_engine_that_is_forgotten_takes_its_workers_with_it(self) -> None:
        runner = _runner()
        pids = rank_pids()
        del runner
        _assert_ended(pids)


RANKS = [0, 1]
OTHERS = ["hang", "lose"]


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("others", OTHERS)
class TestFailure:
    def test_an_error_in_a_step_reaches_the_caller(self, rank: int, others: str) -> None:
        runner = _runner(FakeRank(Trouble("step", rank, "raise", others)))
        pids = rank_pids()
        assert _untimed(runner.execute(_plan(0))) == answer(_plan(0))
        handle = runner.execute(_plan(2))
        with (
            no_wait_runs_out(),
            pytest.raises(StepError, match=f"trouble in step of rank {rank}") as caught,
        ):
            handle.result()
        assert "fake_ranks.py" in str(caught.value.__cause__)
        assert f"rank {rank}" in str(caught.value.__cause__)
        _assert_ended(pids)
        for use in (handle.result, lambda: runner.execute(_plan(3))):
            with no_wait_runs_out(), pytest.raises(StepError, match="construct a new one"):
                use()
        runner.close()
        again = _runner()
        assert _untimed(again.execute(_plan(0))) == answer(_plan(0))
        again.close()

    def test_a_death_in_a_step_is_noticed(self, rank: int, others: str) -> None:
        runner = _runner(FakeRank(Trouble("step", rank, "kill", others)))
        pids = rank_pids()
        handle = runner.execute(_plan(2))
        with no_wait_runs_out(), pytest.raises(WorkerDiedError, match=f"rank {rank} .*SIGKILL"):
            handle.result()
        _assert_ended(pids)
        with no_wait_runs_out(), pytest.raises(WorkerDiedError, match="construct a new one"):
            runner.execute(_plan(3))
        runner.close()

    def test_an_error_while_loading_is_raised_as_it_is(self, rank: int, others: str) -> None:
        with (
            no_wait_runs_out(),
            pytest.raises(ValueError, match=f"trouble in load of rank {rank}") as caught,
        ):
            _runner(FakeRank(Trouble("load", rank, "raise", others)))
        assert "fake_ranks.py" in str(caught.value.__cause__)

    def test_a_death_while_loading_is_noticed(self, rank: int, others: str) -> None:
        with no_wait_runs_out(), pytest.raises(WorkerDiedError, match=f"rank {rank} .*SIGKILL"):
            _runner(FakeRank(Trouble("load", rank, "kill", others)))

    def test_a_death_while_closing_is_noticed(self, rank: int, others: str) -> None:
        runner = _runner(FakeRank(Trouble("close", rank, "kill", others)))
        pids = rank_pids()
        with no_wait_runs_out(), pytest.raises(WorkerDiedError, match=f"rank {rank} .*SIGKILL"):
            runner.close()
        _assert_ended(pids)
        runner.close()


@pytest.mark.parametrize("rank", RANKS)
def test_a_worker_killed_from_outside_while_idle(rank: int) -> None:
    runner = _runner()
    os.kill(rank_pids()[rank], signal.SIGKILL)

    def run_on() -> None:
        # Ranks without collectives do not miss each other, so the first steps may still succeed.
        while True:
            runner.execute(_plan(0)).result()

    with no_wait_runs_out(), pytest.raises(WorkerDiedError, match=f"rank {rank} .*SIGKILL"):
        run_on()
    runner.close()


def test_a_death_while_a_channel_is_full() -> None:
    """No rank reads any more, so that a long message cannot be written to its end."""
    runner = _runner(FakeRank(Trouble("step", 1, "hang")))
    runner.execute(_plan(2))
    prompt = NewRequest(0, 0, tuple(range(100_000)) * 10, SamplingParams(), 0)
    long = StepPlan(3, (prompt,), (), (PrefillChunk(0, 0, 1, False),))
    killer = threading.Timer(1.0, os.kill, (rank_pids()[1], signal.SIGKILL))
    killer.start()
    with no_wait_runs_out(), pytest.raises(WorkerDiedError, match="SIGKILL"):
        runner.execute(long)
    runner.close()


def test_a_process_that_ends_before_it_has_begun(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nexit 3\n")
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))
    with no_wait_runs_out(), pytest.raises(WorkerDiedError, match="exited with 3"):
        _runner()


def test_an_error_that_cannot_be_sent_still_brings_its_text() -> None:
    with no_wait_runs_out(), pytest.raises(Exception, match="1 and 2"):
        _runner(FakeRank(Trouble("load", 1, "raise-unsendable")))


def test_parts_that_cannot_be_sent_are_refused() -> None:
    config = _config(attention_backend=lambda spec: None, scheduler=lambda *a: None)
    checkpoint: Any = None
    with pytest.raises(ConfigError, match="attention_backend") as caught:
        TensorParallelRunner(config, checkpoint, FakeRank())
    assert caught.value.field == "attention_backend"
    with pytest.raises(ConfigError, match="cannot be sent") as caught:
        TensorParallelRunner(_config(), checkpoint, lambda *_: None)  # type: ignore[arg-type]
    assert caught.value.field == "model_runner"


def test_a_result_that_did_not_come_before_close_never_will() -> None:
    runner = _runner(FakeRank(step_seconds=0.2))
    handle = runner.execute(_plan(0))
    runner.close()
    with pytest.raises(EngineClosedError, match="before the result"):
        handle.result()


def test_a_result_that_came_before_another_rank_failed_can_be_had() -> None:
    runner = _runner(FakeRank(Trouble("step", 0, "raise")))
    first, second, third = (runner.execute(_plan(step_id)) for step_id in (0, 1, 2))
    with pytest.raises(StepError):
        third.result()
    assert [_untimed(first), _untimed(second)] == [answer(_plan(0)), answer(_plan(1))]
    runner.close()


def test_the_first_real_cause_counts_however_many_ranks_lost_their_peer() -> None:
    runner = _runner(FakeRank(Trouble("step", 2, "raise", "lose")), size=4)
    handle = runner.execute(_plan(2))
    with no_wait_runs_out(), pytest.raises(StepError, match="trouble in step of rank 2"):
        handle.result()
    runner.close()


def test_what_every_rank_imports_needs_no_torch() -> None:
    """Imports are most of a rank's start; its runner decides what else it needs."""
    code = (
        "import sys, engine.ranks.worker; print({'torch', 'numpy', 'asyncio'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert done.stdout == b"set()\n"


def test_ranks_import_nothing_from_the_current_directory(tmp_path: Path) -> None:
    """A user's own config.py or json.py there is no part of the engine, nor of Python."""
    here = tmp_path / "here"
    here.mkdir()
    for name in ("config.py", "json.py", "socket.py"):
        (here / name).write_text("raise ImportError('imported from the current directory')\n")
    script = tmp_path / "script.py"
    script.write_text(
        "from config import Config\n"
        "from engine.ranks.runner import TensorParallelRunner\n"
        "from tests.engine.fake_ranks import FakeRank\n"
        "config = Config(model='none', device='cpu', tensor_parallel_size=2)\n"
        "TensorParallelRunner(config, None, FakeRank()).close()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=here, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


_RANKS = """
from config import Config
from engine.ranks.runner import TensorParallelRunner
from engine.types import StepPlan
from tests.engine.fake_ranks import {rank}, answer
{before}
plan = StepPlan(2, decode=(1,))
config = Config(model="none", device="cpu", tensor_parallel_size=2)
runner = TensorParallelRunner(config, None, {rank}())
right = runner.execute(plan).result().tokens == answer(plan).tokens
runner.close()
"""
_SLOW = pytest.mark.slow


def _script(
    code: str, *command: str, cwd: Path = ROOT, path: str = str(ROOT)
) -> subprocess.CompletedProcess[str]:
    """Run it with the PYTHONPATH `path`; `command` comes before the interpreter's."""
    return subprocess.run(
        [*command, sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.mark.parametrize("path", ["", pytest.param(f":{ROOT}", marks=_SLOW)])
def test_relative_paths_are_searched_last(path: str, tmp_path: Path) -> None:
    """The current directory may have changed since the engine was imported from there."""
    for name in ("config.py", "json.py", "socket.py", "torch.py"):
        (tmp_path / name).write_text("raise ImportError('imported from the current directory')\n")
    for name in ("engine", "utils", "layers"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    mine = "from tests.engine.fake_ranks import FakeRank\nclass MyRank(FakeRank): pass\n"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "my_rank.py").write_text(mine)
    before = (
        f"import os, sys; os.chdir({str(tmp_path)!r}); sys.path.insert(1, 'mine')\n"
        "from my_rank import MyRank as FakeRank"
    )
    code = _RANKS.format(rank="FakeRank", before=before)
    done = _script(f"{code}\nassert right", path=path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("closed", ["0, 1, 2", *(pytest.param(i, marks=_SLOW) for i in "012")])
def test_a_process_without_standard_streams(closed: str, tmp_path: Path) -> None:
    """What ranks print must not get into a channel that has the number of a closed stream."""
    before = f"import os\nfor number in ({closed},): os.close(number)"
    code = _RANKS.format(rank="Talkative", before=before)
    _script(f"{code}\nopen('right', 'w').write(str(right))", cwd=tmp_path)
    assert (tmp_path / "right").read_text() == "True"


@_SLOW
def test_a_full_shared_memory_folder_is_not_needed() -> None:
    """Containers often have few bytes there, or none that one may write."""
    mount = "mount -t tmpfs -o size=4k none /dev/shm && head -c 4096 /dev/zero > /dev/shm/full"
    unshare = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    try:
        able = subprocess.run([*unshare, mount], capture_output=True, timeout=PATIENCE)
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if able.returncode:
        pytest.skip("this user may not mount a file system")
    code = _RANKS.format(rank="StoredRank", before="")
    done = _script(f"{code}\nassert right", *unshare, f'{mount} && exec "$0" "$@"')
    assert done.returncode == 0, done.stderr


SCRIPT = """
import signal
import socket
import subprocess
import sys
from config import Config
from engine.ranks.runner import TensorParallelRunner
from engine.types import StepPlan
from tests.engine.fake_ranks import FakeRank, Trouble

# As in the fixture above.
signal.signal(signal.SIGINT, signal.default_int_handler)
phase = sys.argv[1]
popen = subprocess.Popen.__init__
def watched(self, *args, **options):
    popen(self, *args, **options)
    print("pid", self.pid, flush=True)
subprocess.Popen.__init__ = watched
config = Config(model="none", device="cpu", tensor_parallel_size=2)
ranks = TensorParallelRunner(config, None, FakeRank(Trouble(phase, 0, "hang")))
print("ready", flush=True)
if phase == "step":
    ranks.execute(StepPlan(2, decode=(1,))).result()
elif phase == "close":
    ranks.close()
else:
    sys.stdin.read()
"""


_PHASES = ["load", "idle", "step", "close"]
_OTHER_SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize(
    ("phase", "how"),
    [
        *product(_PHASES, [signal.SIGKILL]),
        *product(["idle"], _OTHER_SIGNALS),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in product(["load", "step", "close"], _OTHER_SIGNALS)
        ),
    ],
)
def test_workers_end_with_their_parent(phase: str, how: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), phase],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as parent:
        assert parent.stdout is not None
        pids = [int(parent.stdout.readline().split()[1]) for _ in range(2)]
        if phase != "load":
            assert parent.stdout.readline() == "ready\n"
        time.sleep(0.3)  # into the phase
        assert all(map(_alive, pids))
        parent.send_signal(how)
        try:
            parent.wait(PATIENCE)
        finally:
            parent.kill()
        _wait_for_end(pids)
