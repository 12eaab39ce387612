"""What every program shares around a model: device and threads, run folders, checkpoints.

A checkpoint is one file of plain tensors and plain values, written to a temporary name and renamed, read with
`weights_only=True` and checksums compared. It names its format, kind and version, and the tokenizer (fingerprint and
place) it belongs to. Of training states the last two are kept.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import platform
import reprlib
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
import yaml

from configs.errors import UserError
from configs.files import read_text, replace_text

M = TypeVar("M", bound=torch.nn.Module)
FORMAT = "latentforge-checkpoint"
VERSION = 1


# ---------------------------------------------------------------------------------------------- device and process
def pick_device(name: str = "auto") -> torch.device:
    """`auto` is the GPU when there is one. Raises UserError for a device this machine lacks."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # streams, graphs, waiting and memory counts go by the current one
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used: {str(error).splitlines()[0]}. Try cpu, cuda or auto") from None
    return device


def asked_threads(cores: int) -> int:
    """What OMP_NUM_THREADS asks for, of "4,2" for nested regions the first; `cores` where it is unset or empty.

    Raises UserError for what is no such number.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if asked and not (asked.isdecimal() and int(asked)):
        raise UserError(f"OMP_NUM_THREADS={asked}: expected the number of threads, at least 1; or unset it for one a core")
    return int(asked) if asked else cores


def tune_process() -> int:
    """Use the cores this process may run on, and keep big buffers in the process; returns the number of threads.

    glibc hands every large buffer back to the kernel when it is freed, and the page faults of taking it again cost
    more than half of a small model's training step. Both are process settings, so programs call this, models never.
    """
    threads = asked_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    torch.set_num_threads(threads)
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)
        libc.mallopt(m_top_pad, 256 << 20)
    return threads


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32 ones there."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)  # older than Ampere it is slower than float32
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def wants_compile(setting: bool | None, device: torch.device) -> bool:
    """Whether to compile. TorchInductor needs a GPU or a C++ compiler: `auto` goes by that; True without raises UserError."""
    can = device.type == "cuda" or any(shutil.which(cc) for cc in (os.environ.get("CXX", "g++"), "clang++"))
    if setting and not can:
        raise UserError(
            "--compile needs a C++ compiler on the CPU (Debian: apt install g++); install one or leave the flag out"
        )
    return can if setting is None else setting


def environment() -> dict[str, Any]:
    """Versions, machine and commit, for run folders and reports."""
    import transformers

    def git(*args: str) -> str:
        try:
            root = Path(__file__).resolve().parent.parent
            done = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip()

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else ""),
    }


def processor_name() -> str:
    """The CPU's model name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def held(path: Path) -> IO[str] | None:
    """A lock that ends with the process, however that ends, or when it is closed; None while another has it.

    Where the file system knows no locks (some of clusters), it is taken to be free.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = open(path, "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            lock.close()
            if isinstance(error, BlockingIOError):
                return None
            raise
    return lock


# ------------------------------------------------------------------------------------------------------ run folder
class Run:
    """runs/NAME/: config.yaml (resolved), environment.json, metrics.jsonl, log.txt. Opened again, it appends.

    With `tensorboard` the figures of metrics.jsonl are TensorBoard events, too. Raises UserError where that
    package is not installed.
    """

    def __init__(self, folder: str | Path, tensorboard: bool = False) -> None:
        self._tensorboard = _tensorboard_writer() if tensorboard else None
        self._events: Any = None
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._start = time.time()

    def describe(self, config: dict[str, Any]) -> None:
        """Write config.yaml and environment.json: once nothing speaks against the run, as the folder may hold another's."""
        replace_text(self.folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        replace_text(self.folder / "environment.json", json.dumps(environment(), indent=1))

    def log(self, line: str) -> None:
        """One line for people: standard error and log.txt."""
        from tqdm import tqdm

        tqdm.write(line, file=sys.stderr)
        with open(self.folder / "log.txt", "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def metrics(self, **values: Any) -> None:
        """One line of metrics.jsonl."""
        values = {"time": round(time.time() - self._start, 3), **values}
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        self._show([values])

    def go_on_from(self, step: int) -> None:
        """Of metrics.jsonl keep what led to the save at `step` (a killed run may have logged more; 0: a fresh start), and go
        on with its time."""
        path = self.folder / "metrics.jsonl"
        lines = []
        for text in read_text(path).splitlines() if path.exists() else []:
            try:
                lines.append(json.loads(text))
            except ValueError:  # a line cut short by a kill
                continue
        told = [(x.get("step"), x.get("time")) if isinstance(x, dict) else (None, None) for x in lines]
        if not all(isinstance(n, int) and isinstance(seconds, (int, float)) for n, seconds in told):
            raise UserError(f"{path} is damaged: expected JSON objects with step and time; move it away, then --resume")
        lines = [line for line in lines if line["step"] <= step and not line.get("final")]
        replace_text(path, "".join(json.dumps(line) + "\n" for line in lines))  # a kill in the middle must not lose the lines
        self._start -= lines[-1]["time"] if lines else 0.0
        if self._tensorboard:  # its events can only be added to: written anew, they are what metrics.jsonl is
            for old in self.folder.glob("events.out.tfevents.*"):
                old.unlink()
            self._events = self._tensorboard(str(self.folder))
            self._show(lines)

    def _show(self, lines: list[dict[str, Any]]) -> None:
        """Add lines of metrics.jsonl to the TensorBoard events: each number under its name (final/NAME for the last
        validation's, some of which have a training figure's name), at its step and time."""
        if self._events:
            for line in lines:
                group = "final/" if line.get("final") else ""
                for key, value in line.items():
                    if isinstance(value, (int, float)) and key not in ("step", "time", "final"):
                        self._events.add_scalar(group + key, value, line["step"], walltime=self._start + line["time"])
            self._events.flush()


def training_ended(folder: Path) -> bool:
    """Whether the training of this run folder came to its end (asked to stop, a trainer saves and may exit with 0, too)."""
    path = folder / "metrics.jsonl"
    try:
        last = json.loads((read_text(path).splitlines() or ["{}"])[-1])
    except (FileNotFoundError, ValueError):  # cut short, by a full disk say: --resume drops it
        return False
    return isinstance(last, dict) and bool(last.get("final"))


def _tensorboard_writer() -> Callable[[str], Any]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs a package: pip install tensorboard, or leave the flag out") from None
    return SummaryWriter


# ----------------------------------------------------------------------------------------------------- checkpoints
UNREADABLE = {errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE}  # what says nothing of a file's content


def weights_digest(model: torch.nn.Module) -> str:
    """What tells two models of one shape apart."""
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


class Damaged(UserError):
    """A checkpoint that is not what was written."""


def save_checkpoint(path: str | Path, kind: str, content: dict[str, Any], before: Path | None = None) -> None:
    """Write a checkpoint so that `path` always holds a whole one: temporary file, fsync, rename.

    With `before`, what `path` held moves there first: then a whole one is at either place at any instant.

    Raises UserError when the disk is full; what `path` held before stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, "kind": kind, "version": VERSION, **content}, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        kept = f"the one saved before is intact: {path}" if path.exists() else "there was none before"
        cause: BaseException = error
        while not isinstance(cause, OSError) and cause.__context__:  # torch's zip writer hides it behind errors of its own
            cause = cause.__context__
        reason = cause.strerror if isinstance(cause, OSError) else str(error).splitlines()[0]
        free = shutil.disk_usage(path.parent).free >> 20
        raise UserError(
            f"cannot write checkpoint {path} ({reason}; {free} MiB free on that disk). No new checkpoint was saved; "
            f"{kept}. Free some space and go on with --resume, or choose another --checkpoint_dir"
        ) from None
    if before and path.exists():
        path.replace(before)
    temporary.replace(path)
    if os.name == "posix":  # else a power cut could take the renames back
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def remove_temporaries(folder: Path, name: str) -> None:
    """Remove what killed runs left half written of `name`'s checkpoints."""
    for path in folder.glob(f".{name}.*.tmp"):
        path.unlink(missing_ok=True)


def load_checkpoint(path: str | Path, kind: str) -> dict[str, Any]:
    """Read a checkpoint of `kind` onto the CPU.

    Raises UserError when it is missing, cannot be read, is no checkpoint of ours, of another kind or of another format
    version, and Damaged when it is cut short or a bit of it has changed.
    """
    path = Path(path)
    makers = {"ae": "ae/train_ae.py", "student": "student/train_student.py", "token_model": "student/baseline.py"}
    if not path.is_file():
        hint = f"; train one with {makers[kind]}" if kind in makers else ""
        raise UserError(f"checkpoint {path} does not exist{hint}")
    try:
        with open(path, "rb") as file:
            # torch.save writes a zip archive with a CRC-32 of each tensor, which torch.load does not compare; and for a part
            # that a flipped bit has made a folder, it returns memory that nobody wrote
            archive = zipfile.ZipFile(file)  # and nothing in it is compressed, so that it cannot unpack to more than there is
            changed = (part.filename for part in archive.infolist() if part.external_attr or part.compress_type)
            if part := next(changed, None) or archive.testzip():
                raise zipfile.BadZipFile(f"wrong checksum or attributes of {part}")
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error type of its own: a damaged file can end in almost any
        if isinstance(error, OSError) and error.errno in UNREADABLE:
            raise UserError(f"checkpoint {path} cannot be read ({error.strerror}); it may be sound") from None
        reason = error if isinstance(error, zipfile.BadZipFile) else type(error).__name__
        raise Damaged(
            f"checkpoint {path} is damaged or no PyTorch file ({reason}, {path.stat().st_size} bytes); write it again"
        ) from None
    told = [content.get(key) for key in ("format", "kind", "version")] if isinstance(content, dict) else []
    if not all(isinstance(x, (str, int)) for x in told) or told[:1] != [FORMAT]:
        raise UserError(f"{path} is no checkpoint of this project: expected format {FORMAT!r}")
    if told[1] != kind:
        raise UserError(f"{path} is a checkpoint of kind {reprlib.repr(told[1])}, expected {kind!r}")
    if told[2] != VERSION:
        raise UserError(f"{path} has format version {reprlib.repr(told[2])}, this code reads {VERSION}; train it again")
    return content


def load_model(path: str | Path, kind: str, build: Callable[[dict[str, Any]], M]) -> tuple[M, dict[str, Any]]:
    """A model and its checkpoint's content; `build` makes the model of a config.

    Raises UserError as `load_checkpoint` and `build`, and for a config that is not that of the weights: such a one is built
    without memory first, as it could name any size.
    """
    content = load_checkpoint(path, kind)
    config, state, tokenizer = (content.get(key) for key in ("config", "state", "tokenizer"))
    if not isinstance(config, dict) or not isinstance(state, dict) or not isinstance(tokenizer, dict):
        raise UserError(f"checkpoint {path} lacks config, weights or tokenizer; write it again")
    if not all(isinstance(tokenizer.get(key), str) for key in ("fingerprint", "path")):
        raise UserError(f"checkpoint {path} does not say which tokenizer it belongs to; write it again")
    if not all(isinstance(x, torch.Tensor) and x.nbytes <= x.untyped_storage().nbytes() for x in state.values()):
        raise UserError(f"checkpoint {path}: its weights are no tensors, or larger than what is stored; write it again")
    largest = sum(x.numel() for x in state.values())
    for key, value in config.items():
        if isinstance(value, int) and value > (len(state) if str(key).endswith("layers") else largest):
            raise UserError(f"checkpoint {path}: its weights do not fit its config ({key} of {value})")
    with torch.device("meta"):
        wanted = {key: value.shape for key, value in build(config).state_dict().items()}
    differ = [key for key in {*wanted, *state} if key not in state or wanted.get(key) != state[key].shape]
    if differ:
        raise UserError(f"checkpoint {path}: its weights do not fit its config ({', '.join(map(str, differ))[:200]})")
    model = build(config)
    load_weights(model, state, path)
    return model.eval(), content


def state_before(path: Path) -> Path:
    """Where the training state is kept that was saved before the one at `path`."""
    return path.with_suffix(".prev.pt")


def state_aside(path: Path) -> Path:
    """Where the state of a training that was here before is kept until the new one has saved: nothing resumes from it."""
    return path.with_suffix(".old.pt")


def set_state_aside(path: Path) -> None:
    """Put the newest of a training's states aside, for another that begins anew in its place, and remove the one before."""
    for state in reversed(saved_states(path)):
        state.replace(state_aside(path))  # the newest comes last, and stays


def saved_states(path: Path) -> list[Path]:
    """The training states to resume from, newest first: `path` and the one before it, as far as they exist."""
    return [state for state in (path, state_before(path)) if state.is_file()]


def load_state(path: Path, kind: str, log: Callable[[str], None]) -> dict[str, Any]:
    """The newest whole training state. Where that is the one before `path`, this is said, and it takes the place of `path`.

    Raises UserError when there is none, and as `load_checkpoint`.
    """
    found = saved_states(path)
    if not found:
        aside = state_aside(path)
        of_before = (
            f" ({aside} is of the training before: rename it to {path.name} to go on with that)" if aside.is_file() else ""
        )
        raise UserError(f"--resume: {path} does not exist, so nothing was saved there{of_before}; train without --resume")
    for state in found:
        try:
            content = load_checkpoint(state, kind)
        except Damaged as error:
            problem = str(error)
            continue
        if state != path:
            why = problem if path in found else f"{path} is missing (killed in the middle of a save)"
            log(f"{why.removesuffix('; write it again')}; going on from the save before it, step {content['step']}")
            state.replace(path)  # else the next save would keep the damaged one and drop this
        return content
    raise UserError(f"--resume: {' and '.join(map(str, found))}: damaged, and no other state is kept; train without --resume")


def load_weights(model: torch.nn.Module, state: dict[str, torch.Tensor], path: str | Path) -> None:
    """`load_state_dict`, with a UserError for weights that do not fit the model."""
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(
            f"checkpoint {path}: its weights do not fit its config ({' '.join(str(error).split())[:200]})"
        ) from None


def check_fingerprint(ours: str, theirs: str, what: str, other: str) -> None:
    """Raise UserError unless two tokenizers are the same."""
    if ours != theirs:
        raise UserError(
            f"{what} was made with another tokenizer ({ours[:12]}) than {other} ({theirs[:12]}): token ids would mean other "
            "words. Use files made with the same tokenizer"
        )
