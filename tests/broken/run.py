"""Broken inputs by the thousand, over the real commands: ``python tests/broken/run.py --cases 10000 --seed 1``.

One process imports the product once and runs nothing with it; each case is a child of it (`os.fork`) in a folder of its
own, with a limit of CPU time and of memory, without a network, without other programs, and unable to write anywhere
else: a hook refuses that before the system is asked. Permissions count for root too.

A case is a failure when it ends in an internal error, a traceback, a crash or a hang, or when its error names neither
the setting nor the file that is wrong. ``--only 123`` runs one case of the seed again and shows what it says.
"""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
os.environ.setdefault("GLOG_v", "4")
os.environ["HF_HUB_OFFLINE"] = "1"

CPU_SECONDS, WALL_SECONDS, DATA_BYTES = 60, 150, 6 << 30
KNOWN_CODES = {0, 1, 64, 65, 66, 69, 74, 77, 78, 130, 141, 143}
_ERROR = re.compile(r"^(?:\w*Error|interrupted)\b.*", re.MULTILINE | re.DOTALL)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# of the events that change files, which of their arguments are paths
_CHANGES = {"os.mkdir": (0,), "os.remove": (0,), "os.rmdir": (0,), "os.rename": (0, 1), "os.link": (1,),
            "os.symlink": (1,), "os.chmod": (0,),
            "os.truncate": (0,), "os.utime": (0,), "os.chown": (0,), "shutil.rmtree": (0,), "os.mkfifo": (0,),
            "os.setxattr": (0,)}
_PROGRAMS = ("subprocess.Popen", "os.posix_spawn", "os.exec", "os.system", "os.fork", "os.forkpty", "pty.spawn")


def guard(folder: str) -> None:
    """Refuse, from now on and for ever, writing outside of ``folder``, other programs, connections, and signals."""
    inside = (folder + "/", "/dev/null")

    def check(path: object, event: str) -> None:
        if isinstance(path, int) or path is None:
            return
        real = os.path.realpath(os.fsdecode(path))
        if real != folder and not real.startswith(inside):
            raise PermissionError(errno.EACCES, "Permission denied", os.fsdecode(path))

    def hook(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES:
            check(arguments[0], event)
        elif event in _CHANGES:
            for k in _CHANGES[event]:
                check(arguments[k], event)
        elif event in _PROGRAMS or (event == "os.kill" and arguments[1]):
            raise PermissionError(errno.EACCES, f"no other programs ({event})")
        elif event in ("socket.connect", "socket.sendto") or (event == "socket.getaddrinfo"
                                                              and arguments[0] != "127.0.0.1"):
            raise OSError(errno.ENETUNREACH, "Network is unreachable")

    sys.addaudithook(hook)


def obey_permissions() -> None:
    """Take from root the right to read and write what permissions forbid."""
    if os.geteuid() == 0:
        header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        libc = ctypes.CDLL(None)
        if libc.capget(header, data) == 0:
            for k in (0, 1):
                data[k] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            libc.capset(header, data)


def link_tree(source: Path, target: Path) -> None:
    """Models are linked, for nothing writes to them; runs, caches and the rest are copied."""
    copy = os.link if source.parts[-2:-1] == ("models",) or source.suffix == ".safetensors" else shutil.copy2
    if source.is_dir():
        shutil.copytree(source, target, copy_function=copy)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def furnish(folder: Path, world: Path, needs: tuple[str, ...]) -> None:
    for name in dict.fromkeys(needs):
        link_tree(world / name, folder / name)
    for name in ("home", "tmp", "emptydir", "lockeddir"):
        (folder / name).mkdir()
    (folder / "empty").touch()
    (folder / "binary").write_bytes(bytes(range(256)))
    (folder / "locked").write_text("x")
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "locked").chmod(0)
    (folder / "lockeddir").chmod(0)


def streams(kind: str) -> None:
    """Give the process its stdout and stderr."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    out = os.open("/dev/full" if kind == "full" else "stdout", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    if kind == "pipe":
        reader, out = os.pipe()
        os.close(reader)
    os.dup2(out, 1)
    os.dup2(os.open("stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), 2)
    encoding = kind if kind in ("ascii", "latin-1", "utf-16", "cp037") else "utf-8"
    sys.stderr = open(2, "w", encoding=encoding if encoding in ("ascii", "latin-1") else "utf-8",
                      errors="backslashreplace")
    sys.stdout = open(1, "w", encoding=encoding)
    if kind == "closed":
        sys.stdout.detach()
        sys.stdout = None
        with contextlib.suppress(OSError):
            os.close(1)


def child(folder: Path, world: Path, seed: int, number: int) -> None:
    """Run one case and end the process with its code. It never returns."""
    import cases

    code = 255
    try:
        os.chdir(folder)
        case, randomness = cases.case_of(seed, number)
        furnish(folder, world, case.needs)
        done = case.prepare(randomness) if case.prepare else ""
        (folder / "broken").write_text(done, "utf-8", "backslashreplace")
        os.environ.update({"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"),
                           "HF_HOME": str(folder / "home")})
        tempfile.tempdir = str(folder / "tmp")
        for name, value in case.environment.items():
            os.environ[name] = value.replace("\0", "")
        streams(case.stdout)
        import ms_diffsynth.cli.launch as launch
        import ms_diffsynth.launch.supervise as supervise
        supervise.launch, launch.wait_for_scheduler = (lambda job: 0), (lambda *given: None)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
        resource.setrlimit(resource.RLIMIT_DATA, (DATA_BYTES, DATA_BYTES))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        obey_permissions()
        guard(os.path.realpath(folder))
        from ms_diffsynth.cli.main import main
        sys.argv = ["ms-diffsynth", *case.words]
        code = 254
        code = main(case.words)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException as error:
        import traceback
        with contextlib.suppress(BaseException):
            (folder / "escaped").write_text("".join(traceback.format_exception(error)), "utf-8", "backslashreplace")
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(BaseException):
                stream.flush()
        os._exit(code)


def judge(folder: Path, code: int | None, case: object) -> tuple[str, str]:
    """What is wrong with how a case ended, or an empty string; and its last words."""
    said = (folder / "stderr").read_bytes() if (folder / "stderr").is_file() else b""
    err = said.decode("latin-1" if case.stdout == "latin-1" else "utf-8", "replace")
    escaped = (folder / "escaped").read_text("utf-8", "replace") if (folder / "escaped").is_file() else ""
    found = list(_ERROR.finditer(err))
    last = found[-1].group() if found else err[-300:]
    if found := re.findall(r"(?m)^\w[\w.]*(?:Error|Exception|Interrupt|Exit)\b.*", err):
        last = err[err.rindex(found[-1]):]
        message = re.search(r"(?ms)^\w+Error: .*", err)
        last = message.group() if message and code != 70 else last
    if code == 255:
        return "the case itself failed", escaped
    if code == 254:
        return "traceback", escaped
    if code is None:
        return "hang", err[-500:]
    if code == 70:
        trace = re.findall(r'File ".*?ms_diffsynth/([^"]+)", line (\d+)', err)
        return "internal error", f"{trace[-1] if trace else ''} {last[:500]}"
    if code not in KNOWN_CODES:
        return "crash" if code < 0 else "unknown code", f"{code} {err[-800:]}"
    if "Traceback (most recent call last)" in err:
        return "traceback", err[-800:]
    if not found and not last and (folder / "stdout").is_file():
        last = (folder / "stdout").read_text("utf-8", "replace")[-600:]
    shown = [name.encode("utf-8", "backslashreplace").decode() for name in case.names if name]  # as stderr writes them
    shown += [str(Path(name)) for name in shown]  # http://x is the path http:/x
    if code in (64, 65, 66, 69, 74, 77, 78) and not any(name in last for name in shown):
        return "names nothing", last[:600]
    return "", last


def run(world: Path, scratch: Path, seed: int, number: int, keep: bool = False) -> tuple[str, int | None, str, str,
                                                                                         float]:
    """Run a case. Returns: its area, its code (None for a hang), what is wrong, its last words, seconds of CPU."""
    import cases

    case, _ = cases.case_of(seed, number)
    folder = scratch / f"case-{number}"
    folder.mkdir()
    pid = os.fork()
    if pid == 0:
        child(folder, world, seed, number)
    began = time.monotonic()
    while True:
        found, status, usage = os.wait4(pid, os.WNOHANG)
        if found:
            break
        if time.monotonic() - began > WALL_SECONDS:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    code = os.waitstatus_to_exitcode(status)
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        code = None
    wrong, last = judge(folder, code, case)
    how = (folder / "broken").read_text("utf-8", "replace") if (folder / "broken").is_file() else ""
    text = " ".join(word[:60] for word in case.words) + f" [{how}] {case.environment or ''} {case.stdout}".encode(
        "ascii", "backslashreplace").decode()
    if not keep:
        for path in folder.rglob("*"):
            with contextlib.suppress(OSError):
                if path.is_dir() and not path.is_symlink():
                    path.chmod(0o700)
        shutil.rmtree(folder, ignore_errors=True)
    return case.area, code, wrong, f"{text}\n      {last}", usage.ru_utime + usage.ru_stime


def import_all() -> None:
    """Import what any command may, and run nothing with it."""
    from importlib import import_module

    from ms_diffsynth.cli.main import COMMANDS
    for name in COMMANDS:
        import_module(f"ms_diffsynth.cli.{name}")
    for name in ("run.task", "debug.replay", "debug.parity", "evaluate", "template.package",
                 "pipelines.flux.transformer",
                 "pipelines.flux2.transformer", "pipelines.flux2.text_encoder", "pipelines.qwen_image.transformer",
                 "pipelines.qwen_image.text_encoder", "pipelines.sd3.transformer", "pipelines.shared.qwen3",
                 "pipelines.z_image.transformer", "pipelines.sdxl.unet", "pipelines.wan.transformer",
                 "pipelines.wan.image_encoder", "pipelines.toy.pipeline"):
        import_module(f"ms_diffsynth.{name}")
    from ms_diffsynth.registry import FAMILIES, family
    for name in FAMILIES:
        family(name)
    from ms_diffsynth.pipelines.shared.quiet import quiet_imports
    with quiet_imports():
        from mindone.diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage, UNet2DModel  # noqa: F401
        from mindone.transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel  # noqa: F401
        from transformers import CLIPTokenizer, Qwen2Tokenizer, T5Tokenizer  # noqa: F401


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=150)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", type=int, nargs="*", help="these cases alone; their folders are kept")
    parser.add_argument("--area", help="cases of this area alone")
    parser.add_argument("--world", type=Path, help="sound inputs, made when they are not there (default: anew)")
    parser.add_argument("--report", type=Path, help="write the counts and the failures as JSON")
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="ms_diffsynth-broken-"))
    world = args.world or scratch / "world"
    import_all()
    if not world.is_dir():
        pid = os.fork()
        if pid == 0:
            from world import make_world
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            make_world(world.absolute())
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            sys.exit("the world of sound inputs could not be made")
    world = world.absolute()
    import cases

    numbers = args.only if args.only else range(args.first, args.first + args.cases)
    counts, failures, seconds = defaultdict(Counter), [], 0.0
    for number in numbers:
        if args.area and args.area not in cases.case_of(args.seed, number)[0].area:
            continue
        area, code, wrong, text, used = run(world, scratch, args.seed, number, keep=bool(args.only))
        counts[area]["hang" if code is None else str(code)] += 1
        seconds += used
        if wrong:
            failures.append({"number": number, "area": area, "wrong": wrong, "text": text})
            print(f"case {number} ({area}): {wrong}: {text}", flush=True)
        elif args.only:
            print(f"case {number} ({area}): code {code}: {text}\n  {scratch / f'case-{number}'}", flush=True)
    codes = sorted({code for found in counts.values() for code in found}, key=lambda c: (len(c), c))
    print("| area | cases | " + " | ".join(codes) + " |")
    for area in sorted(counts):
        print(f"| {area} | {counts[area].total()} | " + " | ".join(str(counts[area][c] or "") for c in codes) + " |")
    kinds = Counter(failure["wrong"] for failure in failures)
    print(f"{sum(map(Counter.total, counts.values()))} cases of seed {args.seed}, {seconds:.0f} s of CPU: "
          f"{', '.join(f'{n} {kind}' for kind, n in kinds.items()) or 'no failure'}")
    if args.report:
        args.report.write_text(json.dumps({"counts": counts, "failures": failures, "seconds": seconds}, indent=1))
    if not args.only:
        shutil.rmtree(scratch, ignore_errors=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
