"""What hf_mamba finds on this machine: versions, devices, the backend of each op, and what is missing.

`collect()` never raises for something that is absent or broken; it reports it, with the one command that repairs it.
"""

import importlib
import os
import platform
import shutil
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

from hf_mamba.version import __version__

__all__ = ["PACKAGES", "Device", "Environment", "Problem", "collect"]

DISTRIBUTION = "hf-mamba"
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "huggingface_hub",
    "tokenizers",
    "safetensors",
    "accelerate",
    "peft",
    "kernels",
    "bitsandbytes",
    "torchao",
    "trl",
)


@dataclass
class Device:
    """One accelerator as torch sees it; `capability` is e.g. "9.0" on NVIDIA and empty elsewhere."""

    name: str
    type: str
    capability: str
    memory_gib: float


@dataclass
class Problem:
    """Something that is missing or wrong, what follows from it, and the command that repairs it."""

    what: str
    consequence: str
    command: str


@dataclass
class Environment:
    """The report of `hf-mamba env`; `as_dict()` gives the JSON form."""

    hf_mamba: str = __version__
    python: str = ""
    system: str = ""
    cpu: str = ""
    cores: int = 0
    packages: dict[str, str | None] = field(default_factory=dict)
    torch_build: str = ""
    driver: str | None = None
    devices: list[Device] = field(default_factory=list)
    forced_backend: str | None = None
    backends: dict[str, str] = field(default_factory=dict)
    registered: dict[str, bool] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and strings."""
        return asdict(self)


def collect() -> Environment:
    """Look at this machine.

    Returns:
        The report. Nothing is installed, downloaded or compiled for it; torch and transformers are imported.
    """
    environment = Environment(
        python=platform.python_version(),
        system=platform.platform(),
        cpu=_cpu_name(),
        cores=os.cpu_count() or 0,
        packages={name: _version(name) for name in PACKAGES},
        driver=_nvidia_driver(),
    )
    _check_requirements(environment)
    torch = _import("torch", environment)
    if torch is not None:
        environment.torch_build = _torch_build(torch)
        environment.devices = _devices(torch, environment)
        _check_devices(environment)
        _backends(torch, environment)
    _registration(environment)
    return environment


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _import(name: str, environment: Environment) -> Any:
    """The module `name`, or None and a problem; a broken shared library raises OSError, an odd mix of versions anything."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        if environment.packages.get(name) is not None:
            environment.problems.append(
                Problem(
                    what=f"{name} is installed but cannot be imported: {_first_line(error)}",
                    consequence="nothing that needs it works",
                    command=f"pip install --force-reinstall {name}",
                )
            )
        return None


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                if key.strip() in ("model name", "Model"):
                    return value.strip()
    except OSError:
        pass
    if sys.platform == "darwin":
        name = _output("sysctl", "-n", "machdep.cpu.brand_string")
        if name:
            return name
    return platform.processor() or platform.machine()


def _output(*command: str) -> str | None:
    """What `command` prints, or None when it is missing, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _nvidia_driver() -> str | None:
    lines = (_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "").splitlines()
    return lines[0].strip() if lines else None


def _check_requirements(environment: Environment) -> None:
    """Compare what is installed with what the wheel's metadata asks for, so that the bounds stand in one place."""
    try:
        from packaging.requirements import Requirement

        requirements = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or []]
    except metadata.PackageNotFoundError:
        environment.problems.append(
            Problem(
                what=f"the distribution {DISTRIBUTION} is not installed; hf_mamba runs from a source folder",
                consequence="the versions of its dependencies are not checked",
                command="pip install -e .",
            )
        )
        return
    except ImportError:
        environment.problems.append(
            Problem(
                what="packaging is not installed",
                consequence="the versions of the dependencies are not checked, and transformers does not import",
                command="pip install packaging",
            )
        )
        return
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _version(requirement.name)
        wanted = f"{requirement.name}{requirement.specifier}"
        if found is None:
            environment.problems.append(
                Problem(
                    what=f"{requirement.name} is not installed ({wanted} is needed)",
                    consequence="ops run on the eager backend, GPU included"
                    if requirement.name == "triton"
                    else f"hf_mamba does not work without {requirement.name}",
                    command=f'pip install "{wanted}"',
                )
            )
        elif not requirement.specifier.contains(found, prereleases=True):
            environment.problems.append(
                Problem(
                    what=f"{requirement.name} {found} is installed, but {wanted} is needed",
                    consequence="hf_mamba is not tested with it and may fail",
                    command=f'pip install --upgrade "{wanted}"',
                )
            )


def _torch_build(torch: Any) -> str:
    if torch.version.cuda is not None:
        return f"CUDA {torch.version.cuda}"
    if torch.version.hip is not None:
        return f"ROCm {torch.version.hip}"
    if getattr(torch.version, "xpu", None) is not None:
        return f"XPU {torch.version.xpu}"
    return "CPU"


def _devices(torch: Any, environment: Environment) -> list[Device]:
    devices = []
    try:
        if torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                found = torch.cuda.get_device_properties(index)
                devices.append(
                    Device(
                        name=found.name,
                        type="cuda",
                        capability=f"{found.major}.{found.minor}" if torch.version.cuda is not None else "",
                        memory_gib=round(found.total_memory / 2**30, 1),
                    )
                )
        if hasattr(torch, "xpu") and torch.xpu.is_available():
            for index in range(torch.xpu.device_count()):
                found = torch.xpu.get_device_properties(index)
                devices.append(Device(found.name, "xpu", "", round(found.total_memory / 2**30, 1)))
        if torch.backends.mps.is_available():
            devices.append(Device("Apple GPU", "mps", "", 0.0))
    except Exception as error:
        environment.problems.append(
            Problem(
                what=f"torch cannot describe the GPU: {_first_line(error)}",
                consequence="models run on the CPU",
                command="nvidia-smi",
            )
        )
    return devices


def _check_devices(environment: Environment) -> None:
    types = {device.type for device in environment.devices}
    if environment.driver is not None and "cuda" not in types:
        if environment.torch_build == "CPU":
            problem = Problem(
                what="this machine has an NVIDIA GPU, but torch is a build for the CPU",
                consequence="models run on the CPU",
                command="pip install --force-reinstall torch",
            )
        else:
            problem = Problem(
                what=f"torch ({environment.torch_build}) cannot use the NVIDIA GPU with driver {environment.driver}",
                consequence="models run on the CPU",
                command="pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu126",
            )
        environment.problems.append(problem)
    if not types & {"cuda", "xpu"}:
        return
    # on Linux the requirement list has reported a missing triton already
    if environment.packages["triton"] is None and sys.platform != "linux":
        environment.problems.append(
            Problem(
                what="triton is not installed",
                consequence="ops run on the eager backend, GPU included",
                command="pip install triton-windows" if sys.platform == "win32" else "pip install triton",
            )
        )
    # triton compiles a small launcher for each kernel with the machine's C compiler
    compilers = [name for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name]
    if sys.platform == "linux" and not any(shutil.which(name) for name in compilers):
        environment.problems.append(
            Problem(
                what="no C compiler was found (cc, gcc, clang or $CC)",
                consequence="triton cannot launch its kernels",
                command="sudo apt-get install gcc python3-dev",
            )
        )


def _backends(torch: Any, environment: Environment) -> None:
    """The backend that each op would choose for the first GPU, or for the CPU where there is none."""
    try:
        dispatch = importlib.import_module("mamba_kernels.dispatch")
    except ValueError as error:
        environment.problems.append(
            Problem(what=_first_line(error), consequence="nothing can be imported", command="unset HF_MAMBA_BACKEND")
        )
        return
    except Exception as error:
        environment.problems.append(
            Problem(
                what=f"mamba_kernels cannot be imported: {_first_line(error)}",
                consequence="no model runs",
                command=f"pip install --force-reinstall {DISTRIBUTION}",
            )
        )
        return
    environment.forced_backend = dispatch.forced_backend()
    device = torch.device(environment.devices[0].type if environment.devices else "cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for op in dispatch.OPS:
            try:
                environment.backends[op] = dispatch.select(op, device)
            except Exception as error:
                environment.backends[op] = "none"
                environment.problems.append(
                    Problem(what=_first_line(error), consequence=f"{op} fails", command="unset HF_MAMBA_BACKEND")
                )
    # why Triton is not used on this GPU; a missing triton is reported with the other packages
    if environment.packages["triton"] is not None:
        for message in dict.fromkeys(str(warning.message) for warning in caught):
            environment.problems.append(
                Problem(
                    what=message.rstrip("."),
                    consequence="ops run on the eager backend",
                    command="nothing to install: the eager backend is right, only slower",
                )
            )


def _registration(environment: Environment) -> None:
    """Which model types the Auto classes of transformers resolve to hf_mamba."""
    if _import("transformers", environment) is None:
        return
    try:
        registration = importlib.import_module("hf_mamba.registration")
    except Exception as error:
        environment.problems.append(
            Problem(
                what=f"the models cannot be registered: {_first_line(error)}",
                consequence="Auto classes and pipelines do not find hf_mamba",
                command=f"pip install --upgrade {DISTRIBUTION} transformers",
            )
        )
        return
    environment.registered = {name: registration.is_registered(name) for name in registration.MODEL_TYPES}
    missing = [name for name, registered in environment.registered.items() if not registered]
    if missing:
        switch = os.environ.get("HF_MAMBA_REGISTER")
        environment.problems.append(
            Problem(
                what=f"not registered: {', '.join(missing)}" + (f" (HF_MAMBA_REGISTER={switch})" if switch else ""),
                consequence="Auto classes and pipelines load the native classes of transformers",
                command="unset HF_MAMBA_REGISTER",
            )
        )
