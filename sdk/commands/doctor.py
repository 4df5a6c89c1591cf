"""Look at this machine as shoal will meet it: Python, processor, memory, disk, packages, execution providers.

Every package is imported in a process of its own with a deadline: some wheels die of an illegal instruction or hang.
The exit status is 1 where something that every model needs is broken.
"""

import argparse
import sys
from dataclasses import asdict, dataclass

from .. import options

NAME = "doctor"
HELP = "check this machine: processor, memory, packages, backends"
DEADLINE_SECONDS = 60
# import name, distribution, what it is for; the first three are needed by everything
PACKAGES = (
    ("numpy", "numpy", ""), ("onnxruntime", "onnxruntime", ""), ("flatbuffers", "flatbuffers", ""),
    ("tokenizers", "tokenizers", "language"), ("jinja2", "jinja2", "language"), ("tqdm", "tqdm", "convert"),
    ("onnx_ir", "onnx-ir", "convert"), ("safetensors", "safetensors", "convert"), ("gguf", "gguf", "convert"),
    ("llguidance", "llguidance", "structured"), ("starlette", "starlette", "serve"), ("uvicorn", "uvicorn", "serve"),
    ("torch", "torch", "train"), ("cryptography", "cryptography", "agent"), ("flwr", "flwr", "edge"),
    ("onnxruntime_qnn", "onnxruntime-qnn", "Qualcomm"), ("onnxruntime_ep_openvino", "onnxruntime-ep-openvino", "Intel"),
    ("onnxruntime_ep_webgpu", "onnxruntime-ep-webgpu", "WebGPU"),
)  # fmt: skip
EXTRAS = ("language", "convert", "structured", "serve", "train", "agent", "edge")
# The kernel's name of an instruction set (Linux, x86 and Arm) and ours
FEATURES = {
    "avx2": "AVX2", "avx512f": "AVX512", "avx512_vnni": "AVX512-VNNI", "avx_vnni": "AVX-VNNI", "amx_int8": "AMX-int8",
    "amx_bf16": "AMX-bf16", "asimd": "NEON", "asimddp": "dotprod", "i8mm": "i8mm", "sve": "SVE", "sme": "SME",
}  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One finding. `state`: ok, absent (an option that is not there), warn, bad (nothing works until it is mended)."""

    name: str
    state: str
    detail: str
    fix: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_json(parser)


def run(arguments: argparse.Namespace, show) -> int:
    from shoal.runtime.events import Event

    checks = [python(), processor(), memory(), *cache(), duplicates()]
    for done, package in enumerate(PACKAGES):
        show.progress(Event("check", done, len(PACKAGES) + 1, package[1]))
        checks.append(imported(*package))
    show.progress(Event("check", len(PACKAGES), len(PACKAGES) + 1, "backends"))
    checks += [kernels(), *backends()]
    show.progress(Event("check", len(PACKAGES) + 1, len(PACKAGES) + 1, "done"))
    show.table([(check.state, check.name, check.detail) for check in checks])
    for check in checks:
        if check.fix and check.state in ("warn", "bad"):
            show.line(f"\n{check.name}: {check.fix}")
    show.json([asdict(check) for check in checks])
    return 1 if any(check.state == "bad" for check in checks) else 0


def python() -> Check:
    import platform

    from .. import __version__

    system = " ".join((platform.system(), platform.machine(), *platform.libc_ver())).strip()
    detail = f"{platform.python_version()} on {system}, shoal {__version__}"
    if sys.maxsize < 2**32:
        return Check("python", "bad", detail, "ONNX Runtime has no 32-bit wheels: use a 64-bit system.")
    return Check("python", "ok", detail)


def processor(cpuinfo: str = "/proc/cpuinfo") -> Check:
    """The instruction sets that kernels ask for, where the kernel tells (Linux)."""
    import os
    import platform

    try:
        with open(cpuinfo, errors="replace") as file:
            lines = [line.partition(":") for line in file]
    except OSError:
        return Check("processor", "ok", f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}")
    flags = {flag for name, _, value in lines if name.strip() in ("flags", "Features") for flag in value.split()}
    model = next((value.strip() for name, _, value in lines if name.strip() == "model name"), platform.machine())
    found = [name for flag, name in FEATURES.items() if flag in flags]
    detail = f"{model}, {os.cpu_count()} cores: {' '.join(found) or 'no known instruction sets'}"
    if not {"avx2", "asimddp"} & flags:
        return Check("processor", "warn", detail, "Without AVX2 or Arm dotprod 4-bit models run several times slower.")
    return Check("processor", "ok", detail)


def memory() -> Check:
    """What the system has and what it can still give, with the limit of a container."""
    from pathlib import Path

    from ..show import size

    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return Check("memory", "ok", "this system does not tell")
    limit = ""
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            found = int(Path(name).read_text())
        except (OSError, ValueError):
            continue
        if found < total:
            limit = f", limited to {size(found)} by the container"
    return Check("memory", "ok", f"{size(free)} free of {size(total)}{limit}")


def cache() -> list[Check]:
    """The folder of what was prepared for this device, and the disk under it."""
    import os
    import shutil

    from shoal.runtime.device_cache import SUFFIX, cache_folder

    from ..show import size

    folder = cache_folder()
    files = list(folder.glob("*" + SUFFIX))
    state = f"{folder}: {size(sum(path.stat().st_size for path in files))} in {len(files)} files"
    there = next(path for path in (folder, *folder.parents) if path.exists())
    usage = shutil.disk_usage(there)
    writable = os.access(there, os.W_OK | os.X_OK)
    fix = "" if writable else "Make it writable, or name another folder in SHOAL_CACHE."
    full = usage.free < 1 << 30
    return [
        Check("cache", "ok" if writable else "warn", state + ("" if writable else ", cannot be written"), fix),
        Check("disk", "warn" if full else "ok", f"{size(usage.free)} free of {size(usage.total)}",
              "A model's prepared weights take about as much as its bundle." if full else ""),
    ]  # fmt: skip


def duplicates() -> Check:
    """Several distributions that install the same `onnxruntime` folder overwrite each other's files."""
    from importlib import metadata

    found = sorted(
        {
            f"{distribution.metadata['Name']} {distribution.version}"
            for distribution in metadata.distributions()
            if (distribution.metadata["Name"] or "").lower().startswith(("onnxruntime", "ort-"))
            and any(str(path) == "onnxruntime/__init__.py" for path in distribution.files or ())
        }
    )
    if len(found) > 1:
        return Check("engine", "bad", ", ".join(found), "Uninstall all of them and install onnxruntime alone.")
    return Check("engine", "ok" if found else "bad", ", ".join(found) or "onnxruntime is not installed",
                 "" if found else "pip install onnxruntime")  # fmt: skip


def imported(module: str, distribution: str, use: str) -> Check:
    """Whether a package can be imported, tried in another process."""
    from importlib import metadata

    label = f"{distribution} ({use})" if use else distribution
    install = f"pip install 'shoal[{use}]'" if use in EXTRAS else f"pip install {distribution}"
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return Check(label, "absent" if use else "bad", f"not installed: {install}", install)
    failure = try_python(f"import {module}")[1]
    if failure:
        return Check(label, "warn" if use else "bad", f"{version}: {failure}", f"{install} --force-reinstall")
    return Check(label, "ok", version)


def kernels() -> Check:
    """Shoal's own kernels: which instruction set they use, or why ONNX Runtime's are used, and what that costs."""
    code = "from shoal.runtime import kernels as k; print(k.isa() if k.available() else 'missing: ' + k.missing())"
    path, failure = try_python(code)
    why = failure or path.partition("missing: ")[2]
    if why:
        detail = (
            f"{why}; quantised models run by ONNX Runtime: slower (prefill three times, decode a quarter), and their "
            "weights are written to the cache once more"
        )
        return Check("kernels", "warn", detail, "Install a C++ compiler (g++ or clang), then shoal again.")
    if path == "scalar":
        return Check("kernels", "warn", "scalar: no instruction set of this processor is known", "")
    return Check("kernels", "ok", path)


def backends() -> list[Check]:
    """Each backend that shoal knows, with its devices or what each of its providers lacks."""
    from shoal.runtime.backends import discover
    from shoal.runtime.errors import ShoalError

    _, failure = try_python("import onnxruntime")
    if failure:
        return [Check("backends", "bad", failure, "pip install --force-reinstall onnxruntime")]
    try:
        found = discover(seconds=DEADLINE_SECONDS)
    except ShoalError as error:
        return [Check("backends", "warn", f"{error.what} {error.why}", error.fix)]
    return [
        Check(
            f"backend {one.name}", "ok" if one.devices else "absent",
            "; ".join([device.title for device in one.devices] or [f"{gap.provider}: {gap.why}" for gap in one.absent]),
        )
        for one in found
    ]  # fmt: skip


def try_python(code: str, deadline: float = DEADLINE_SECONDS) -> tuple[str, str]:
    """Runs `code` in another Python: (what it printed, why it failed or "")."""
    import signal
    import subprocess

    try:
        done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, errors="replace",
                              timeout=deadline)  # fmt: skip
    except subprocess.TimeoutExpired:
        return "", f"does not come back within {deadline:.0f} s"
    if done.returncode < 0:
        return "", f"dies of {signal.Signals(-done.returncode).name}"
    if done.returncode:
        said = done.stderr.strip().splitlines()
        return "", said[-1] if said else f"exit status {done.returncode}"
    return done.stdout.strip(), ""
