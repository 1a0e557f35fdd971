"""A campaign of faults: kills, full disks, vanishing files and the like, at any moment of real runs.

`make faults` runs it. After every fault the target has to be absent, or as it was, or complete; the input untouched;
nothing strange may be left; and the same command has to come to its end afterwards, with the same bytes as ever. Exit
status 1 means that this was not so.
"""

from __future__ import annotations

import argparse
import errno
import gc
import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from support.cli import BY_MAGNITUDE
from support.tiny import BYTE_LEVEL_VOCABULARY, save_byte_level, save_tiny

WATCHED = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.scandir", "os.listdir")
WORK = ".out.llmprune-work"
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
DISK_BYTES = 64 * 2**20
NEUTRAL = ("llmprune.json", "README.md", "sweep.json")  # hold speeds, which differ from run to run


# --- commands ------------------------------------------------------------------------------------------------------

HALF = [*BY_MAGNITUDE, "--pruning-ratio", "0.5", "--max-shard-size", "20KB"]
TEXT = ["--calibration", "TEXT", "--calibration-tokens", "240", "--calibration-seq-len", "40"]
CALIBRATED = ["--intermediate-size", "24", *TEXT]
HEALED = ["--teacher", "TEACHER", "--text", "TEXT", "--tokens", "2048", "--batch-tokens", "128", "--seq-len", "32"]
FOLLOWED = ["--hidden-weight", "1", "--teacher-mode", "streamed"]
COMMANDS = {
    "prune": ["prune", "SOURCE", *HALF],
    "prune, overwriting": ["prune", "SOURCE", *HALF, "--overwrite"],
    "prune, calibrated": ["prune", "SOURCE", *CALIBRATED, "--max-shard-size", "20KB"],
    "prune, fewer tokens": ["prune", "SOURCE", *CALIBRATED, "--vocab-size", "80%", "--max-shard-size", "20KB"],
    "recover": ["recover", "PRUNED", *HEALED, *FOLLOWED, "--max-shard-size", "20KB"],
    "recover, blocks": ["recover", "PRUNED", *HEALED, "--mode", "blocks", "--max-shard-size", "20KB"],
    "sweep": ["sweep", "SOURCE", "--mlp", "25%,50%", *TEXT, "--keep-models"],
    "export": ["export", "SOURCE", "--dtype", "float16", "--max-shard-size", "20KB"],
    "export, overwriting": ["export", "SOURCE", "--dtype", "bfloat16", "--overwrite"],
    "export, gguf": ["export", "SOURCE", "--format", "gguf", "--dtype", "f32", "--no-verify"],
}
RESUMED = ("prune, calibrated", "prune, fewer tokens", "recover", "recover, blocks", "sweep")


@dataclass(frozen=True)
class Scene:
    """One run's own files."""

    root: Path

    @property
    def source(self) -> Path:
        """The input, a copy of its own."""
        return self.root / "source"

    @property
    def teacher(self) -> Path:
        """The model that the input was made from, where it is a pruned one."""
        return self.root / "teacher"

    @property
    def disk(self) -> Path:
        """Where the output goes, a file system of its own where one can be mounted."""
        return self.root / "disk"

    @property
    def output(self) -> Path:
        """The target."""
        return self.disk / "out"

    def arguments(self, command: str) -> list[str]:
        """What a user types."""
        places = {
            **dict.fromkeys(("SOURCE", "PRUNED"), str(self.source)),
            "TEACHER": str(self.teacher),
            "TEXT": str(self.root / "text.txt"),
        }
        return [*(places.get(word, word) for word in COMMANDS[command]), "--output", str(self.output)]


# --- runs in forked processes --------------------------------------------------------------------------------------


def run(arguments: list[str], log: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Run the command line in a forked process, which has imported everything already; its exit code.

    A process that was killed has the negative number of the signal.
    """
    process = os.fork()
    if process == 0:
        code = 1
        try:
            with log.open("ab") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            prepare()
            from llmprune_cli.__main__ import main

            main(arguments)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(BrokenPipeError):
                sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def at_event(number: int, root: Path, act: Callable[[], bool | None]) -> Callable[[], None]:
    """What makes a forked process act at its n-th look at a file below a folder, and again until that succeeds."""
    seen, done, folder = 0, False, str(root)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen, done
        if done or event not in WATCHED or not str(arguments[0]).startswith(folder):
            return
        seen += 1
        if seen >= number:
            done = True
            done = act() is not False

    return lambda: sys.addaudithook(hook)


def count_events(command: str, scene: Scene) -> int:
    """How often a whole run looks at a file of its own."""
    counted = scene.root / "events"

    def count() -> None:
        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event in WATCHED and str(arguments[0]).startswith(folder):
                os.write(descriptor, b".")

        folder, descriptor = str(scene.root), os.open(counted, os.O_CREAT | os.O_WRONLY)
        sys.addaudithook(hook)

    code = run(scene.arguments(command), scene.root / "log", count)
    assert code == 0, (scene.root / "log").read_text()
    return counted.stat().st_size


# --- faults --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What goes wrong in a run, and what that may lead to."""

    prepare: Callable[[], None]  # in the run's own process, before it begins
    codes: set[int]
    mend: Callable[[], None] = lambda: None  # afterwards
    harms_source: bool = False


def kill(scene: Scene, command: str, event: int, chance: random.Random) -> Fault:
    """SIGKILL."""
    return Fault(at_event(event, scene.root, lambda: os.kill(os.getpid(), signal.SIGKILL)), {-signal.SIGKILL})


def interrupt(scene: Scene, command: str, event: int, chance: random.Random) -> Fault:
    """Ctrl-C, or what a scheduler sends."""
    number = chance.choice((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores for what it runs behind
        at_event(event, scene.root, lambda: os.kill(os.getpid(), number))()

    return Fault(prepare, {130})


def full_disk(scene: Scene, command: str, event: int, chance: random.Random) -> Fault:
    """No room for some file."""
    room = chance.randrange(16, 400) * 1024

    def shrink() -> None:
        resize_disk(scene.disk, used_bytes(scene.disk) + room)

    shrink()
    return Fault(lambda: None, {6}, lambda: resize_disk(scene.disk, DISK_BYTES))


def small_files(scene: Scene, command: str, event: int, chance: random.Random) -> Fault:
    """A limit on the size of files."""
    limit = chance.randrange(1, 40) * 1024

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    return Fault(prepare, {6})


def read_only(scene: Scene, command: str, event: int, chance: random.Random) -> Fault:
    """A file system that turns read-only, as one with errors does."""
    closed = False

    def close() -> None:
        nonlocal closed
        closed = True

    def refuse(name: str, arguments: tuple[Any, ...]) -> None:
        writes = name in CHANGES or (name == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))
        if closed and writes and place_of(arguments).startswith(str(scene.disk)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), arguments[0])

    def prepare() -> None:
        at_event(event, scene.root, close)()
        sys.addaudithook(refuse)

    return Fault(prepare, {6})


def place_of(arguments: tuple[Any, ...]) -> str:
    """The path that an operation is about, be it given by the number of an open folder."""
    folder = arguments[-1]
    if str(arguments[0]).startswith("/") or not isinstance(folder, int) or folder < 0:
        return str(arguments[0])
    return str(Path(f"/proc/self/fd/{folder}").readlink() / arguments[0])


def lost_shard(scene: Scene, command: str, event: int, chance: random.Random) -> Fault:
    """A shard of the input that is removed."""
    shard = chance.choice(shards_of(scene.source))
    return Fault(at_event(event, scene.root, lambda: shard.unlink(missing_ok=True)), {3}, harms_source=True)


def other_shard(scene: Scene, command: str, event: int, chance: random.Random) -> Fault:
    """A shard of the input that is written to: the same size, longer, or cut short."""
    shard, how = chance.choice(shards_of(scene.source)), chance.randrange(3)
    other_bytes = bytes(byte & 0x3F for byte in chance.randbytes(64))  # numbers between 0 and 2 in any dtype

    def change() -> None:
        with shard.open("r+b") as file:
            if how == 0:
                file.seek(-64, os.SEEK_END)
                file.write(other_bytes)
            elif how == 1:
                file.seek(0, os.SEEK_END)
                file.write(b"x" * 100)
            else:
                file.truncate(shard.stat().st_size // 2)

    # a file that is cut short under a page that is being read ends the process with SIGBUS: no program can prevent that
    return Fault(at_event(event, scene.root, change), {3, -signal.SIGBUS}, harms_source=True)


def second_run(scene: Scene, command: str, event: int, chance: random.Random) -> Fault:
    """Another llmprune that writes the same target."""
    second = scene.root / "second"

    def start() -> None:
        code = run(scene.arguments(command), scene.root / "log", lambda: None)
        second.write_text(str(code))

    return Fault(at_event(event, scene.root, start), {0, 6})


def broken_pipe(scene: Scene, command: str, event: int, chance: random.Random) -> Fault:
    """Nobody who reads what is printed."""

    def prepare() -> None:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
        os.close(writer)

    return Fault(prepare, {1})


KINDS: dict[str, Callable[[Scene, str, int, random.Random], Fault]] = {
    "kill": kill,
    "interrupt": interrupt,
    "full disk": full_disk,
    "small files": small_files,
    "read-only": read_only,
    "lost shard": lost_shard,
    "other shard": other_shard,
    "second run": second_run,
    "broken pipe": broken_pipe,
}


def mount(*arguments: str | Path) -> bool:
    """Whether a mount succeeds."""
    return subprocess.run(["mount", *map(str, arguments)], stderr=subprocess.DEVNULL).returncode == 0


def require(succeeded: bool) -> None:
    """Stop the campaign where its own machinery fails."""
    if not succeeded:
        raise RuntimeError("cannot mount any more")


def resize_disk(disk: Path, size_bytes: int) -> None:
    """Give a mounted tmpfs another size."""
    require(mount("-o", f"remount,size={size_bytes}", disk))


def used_bytes(disk: Path) -> int:
    """What is used of a file system."""
    usage = os.statvfs(disk)
    return (usage.f_blocks - usage.f_bfree) * usage.f_frsize


def shards_of(folder: Path) -> list[Path]:
    """The safetensors files of a folder."""
    return sorted(folder.glob("*.safetensors"))


# --- the campaign --------------------------------------------------------------------------------------------------


@dataclass
class Campaign:
    """What all runs share."""

    root: Path
    mounts: bool
    expected: dict[str, dict[str, bytes]] = field(default_factory=dict)  # of each command, what it writes
    events: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def scene(self, command: str) -> Iterator[Scene]:
        """Fresh files, with a model at the target where the command is to replace one."""
        scene = Scene(Path(tempfile.mkdtemp(dir=self.root)))
        shutil.copytree(self.given(command), scene.source)
        (scene.root / "teacher").symlink_to(self.root / "model")
        shutil.copyfile(self.root / "text.txt", scene.root / "text.txt")
        scene.disk.mkdir()
        if self.mounts:
            require(mount("-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", scene.disk))
        try:
            if command.endswith("overwriting"):
                shutil.copytree(self.root / "model", scene.output)
            yield scene
        finally:
            if self.mounts:
                subprocess.run(["umount", scene.disk], check=True)
            shutil.rmtree(scene.root)

    def given(self, command: str) -> Path:
        """What a command is given: a model, or a pruned one."""
        return self.root / ("pruned" if "PRUNED" in COMMANDS[command] else "model")

    def learn(self, command: str) -> None:
        """What a command writes when nothing goes wrong, and how many events that takes."""
        with self.scene(command) as scene:
            self.events[command] = count_events(command, scene)
            self.expected[command] = contents(scene.output)

    def try_fault(self, command: str, kind: str, chance: random.Random) -> tuple[int, list[str]]:
        """Run a command into a fault and again without it: the first exit code, and what was not as it has to be."""
        if command not in self.events:
            self.learn(command)
        with self.scene(command) as scene:
            last = self.events[command] // (3 if kind.endswith("shard") else 1)  # later, no shard is read any more
            event = chance.randrange(1, last + 1)
            fault = KINDS[kind](scene, command, event, chance)
            log = scene.root / "log"
            log.touch()
            code = run(scene.arguments(command), log, fault.prepare)
            fault.mend()
            problems = self.judge(command, scene, fault, code, log)
            problems += self.run_again(command, scene, fault, log)
            return code, [f"{command}, {kind}, event {event}: {problem}" for problem in problems]

    def judge(self, command: str, scene: Scene, fault: Fault, code: int, log: Path) -> list[str]:
        """What a fault left that it may not leave."""
        problems = []
        said = log.read_text(errors="replace")
        if code not in fault.codes | {0}:
            problems.append(f"exit code {code}: {said[-2000:]}")
        if "Traceback" in said or "Exception ignored" in said:
            problems.append(f"a traceback: {said[-3000:]}")
        if not fault.harms_source and contents(scene.source) != contents(self.given(command)):
            problems.append("the input was changed")
        names = {path.name for path in scene.disk.iterdir()}
        if names - {"out", WORK, f"{WORK}.lock"}:
            problems.append(f"left behind: {names}")
        if scene.output.exists():
            problems += self.judge_target(command, scene, fault, code)
        elif code == 0:
            problems.append("success without a target")
        elif command.endswith("overwriting") and not (scene.disk / WORK / "old").exists():
            problems.append("the old model is lost")
        return problems

    def judge_target(self, command: str, scene: Scene, fault: Fault, code: int) -> list[str]:
        """What is wrong with a target: it has to be what it was, or complete."""
        found = contents(scene.output)
        if command.endswith("overwriting") and found == contents(self.root / "model"):
            return ["success without a new target"] if code == 0 else []
        if found != self.expected[command] and not (fault.harms_source and found == self.given_by(command, scene)):
            return ["half a target, or another one"]
        written, log = [path.parent for path in scene.output.rglob("llmprune.json")], scene.root / "verify-log"
        verified = [run(["inspect", str(folder), "--verify"], log) for folder in written]
        return [] if written and not any(verified) else [f"does not verify: {log.read_text()}"]

    def given_by(self, command: str, scene: Scene) -> dict[str, bytes]:
        """What a command makes of a source as it is: a fault may have changed it before anything was read."""
        with self.scene(command) as other:
            shutil.rmtree(other.source)
            shutil.copytree(scene.source, other.source)
            code = run(other.arguments(command), other.root / "log")
            return contents(other.output) if code == 0 else {}

    def run_again(self, command: str, scene: Scene, fault: Fault, log: Path) -> list[str]:
        """What is wrong after the same command ran once more, where nothing goes wrong any more."""
        shutil.rmtree(scene.source)
        shutil.copytree(self.given(command), scene.source)
        arguments = scene.arguments(command)
        complete = scene.output.exists() and "--overwrite" not in arguments
        expected = contents(scene.output) if complete else self.expected[command]
        resuming = command in RESUMED and (scene.disk / WORK / "run.json").exists() and not complete
        before = log.stat().st_size
        code = run([*arguments, *(["--resume"] if resuming else [])], log)
        if resuming and fault.harms_source and code == 5:  # the work was on the source that the fault had changed
            code = run(arguments, log)
        said = log.read_text(errors="replace")[before:]
        problems = []
        if code != (6 if complete else 0):
            problems.append(f"exit code {code} afterwards: {said[-2000:]}")
        if not scene.output.exists() or contents(scene.output) != expected:
            problems.append("other bytes afterwards")
        left = {path.name for path in scene.disk.iterdir()} - {"out"}
        scratch = list(Path(tempfile.gettempdir()).glob("llmprune-*"))
        if left or scratch:
            problems.append(f"left behind afterwards: {left or scratch}")
        return problems


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder but those that differ from run to run."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in NEUTRAL
    }


def can_mount(root: Path) -> bool:
    """Whether file systems can be mounted here."""
    probe = root / "probe"
    probe.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", probe):
        return False
    return subprocess.run(["umount", probe]).returncode == 0


def make_inputs(root: Path) -> None:
    """A tiny checkpoint and a text, made in a process of their own, so that the forked ones start from a clean one."""
    process = os.fork()
    if process == 0:
        sizes = {"num_hidden_layers": 3, "initializer_range": 0.15, "vocab_size": BYTE_LEVEL_VOCABULARY}
        save_tiny(root / "model", shard="40KB", **sizes)
        save_byte_level(root / "model")
        lines = (f"{number} times {number + 7} is {number * (number + 7)}." for number in range(300))
        (root / "text.txt").write_text("\n".join(lines))
        pruned = ["--intermediate-size", "24", "--max-shard-size", "20KB", "--output", str(root / "pruned")]
        os._exit(run(["prune", str(root / "model"), *BY_MAGNITUDE, *pruned], root / "log"))
    require(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0)


def cycled(kinds: list[str], count: int) -> Iterator[tuple[str, str]]:
    """All commands with all kinds of faults, again and again."""
    return itertools.islice(itertools.cycle(itertools.product(COMMANDS, kinds)), count)


def run_campaign(
    count: int, seed: int, say: Callable[[str], None], pairs: Sequence[tuple[str, str]] = ()
) -> tuple[Counter[str], list[str]]:
    """Try faults: how often each kind was met with each exit code, and all problems.

    Args:
        pairs: commands and kinds of faults; otherwise all in turn.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import llmprune_cli.commands.export
    import llmprune_cli.commands.prune
    import llmprune_cli.commands.recover.recovery
    import llmprune_cli.commands.sweep.curve  # noqa: F401 (imported once, for all forked processes)

    root = Path(tempfile.mkdtemp(prefix="faults-"))
    scratch, tempfile.tempdir = tempfile.tempdir, str(root / "tmp")
    (root / "tmp").mkdir()
    met: Counter[str] = Counter()
    problems: list[str] = []
    try:
        campaign = Campaign(root, can_mount(root))
        kinds = [kind for kind in KINDS if campaign.mounts or kind != "full disk"]
        if not campaign.mounts:
            say("No file system can be mounted here, so no disk is full; files are too large instead.")
        make_inputs(root)
        gc.freeze()  # else the first collection of every forked process copies all that there is
        chance = random.Random(seed)
        for command, kind in pairs or cycled(kinds, count):
            code, found = campaign.try_fault(command, kind, chance)
            met[f"{kind}: exit code {code}"] += 1
            problems += found
            for problem in found:
                say(problem)
            if met.total() % len(COMMANDS) ** 2 == 0:
                say(f"{met.total()} faults so far, {len(problems)} problems")
    finally:
        tempfile.tempdir = scratch
        shutil.rmtree(root, ignore_errors=True)
    return met, problems


def main() -> None:
    """Run the campaign and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=270, help="faults to try (default: 270)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    met, problems = run_campaign(arguments.count, arguments.seed, lambda text: print(text, flush=True))
    for outcome, times in sorted(met.items()):
        print(f"{outcome}: {times}")
    print(f"faults tried: {met.total()}")
    print(f"targets lost or half-written, or anything else that may not be: {len(problems)}")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
