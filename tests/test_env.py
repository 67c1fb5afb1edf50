"""The environment report: what it finds, and that whatever is missing is named with its remedy and never a crash."""

import builtins
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hf_mamba
import mamba_kernels.dispatch as dispatch
from hf_mamba import env
from hf_mamba.env import Environment, Problem, collect


def problem_about(environment: Environment, text: str) -> Problem:
    found = [problem for problem in environment.problems if text in problem.what]
    assert len(found) == 1, f"{text!r} in {[problem.what for problem in environment.problems]}"
    return found[0]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that other versions are installed; None removes a package."""
    real_version, real_requires = metadata.version, metadata.requires

    def pretend(requires: list[str] | None = None, **versions: str | None) -> None:
        def version(name: str) -> str:
            if name in versions:
                if versions[name] is None:
                    raise metadata.PackageNotFoundError(name)
                return str(versions[name])
            return real_version(name)

        monkeypatch.setattr(env.metadata, "version", version)
        if requires is not None:
            monkeypatch.setattr(
                env.metadata, "requires", lambda name: requires if name == "hf-mamba" else real_requires(name)
            )

    return pretend


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, kind: str = "cuda") -> None:
    monkeypatch.setattr(env, "_devices", lambda torch, environment: [env.Device("A GPU", kind, "9.0", 80.0)])
    monkeypatch.setattr(dispatch, "_triton_works", lambda device_type, index: True)


def test_versions_are_those_of_the_running_modules() -> None:
    environment = collect()
    assert environment.hf_mamba == hf_mamba.__version__
    assert environment.packages["torch"] == torch.__version__
    assert environment.python == ".".join(map(str, sys.version_info[:3]))
    assert environment.cores == os.cpu_count()
    assert environment.cpu


def test_the_report_is_plain_data() -> None:
    report = collect().as_dict()
    assert json.loads(json.dumps(report)) == report


def test_every_op_has_a_backend() -> None:
    environment = collect()
    assert list(environment.backends) == list(dispatch.OPS)
    if not environment.devices:
        assert set(environment.backends.values()) == {"eager"}


def test_a_forced_backend_is_shown() -> None:
    with dispatch.backend("reference"):
        environment = collect()
    assert environment.forced_backend == "reference"
    assert set(environment.backends.values()) == {"reference"}


def test_a_gpu_chooses_triton_where_there_is_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch)
    monkeypatch.setitem(dispatch.OPS, "selective_scan", True)
    monkeypatch.setitem(dispatch.OPS, "rms_norm", False)
    backends = collect().backends
    assert backends["selective_scan"] == "triton"
    assert backends["rms_norm"] == "eager"


def test_a_gpu_that_triton_does_not_support_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_old(device_type: str, index: int | None) -> bool:
        warnings.warn("this GPU has capability 6.1", UserWarning, stacklevel=1)
        return False

    pretend_gpu(monkeypatch)
    monkeypatch.setattr(dispatch, "_triton_works", too_old)
    monkeypatch.setitem(dispatch.OPS, "selective_scan", True)
    environment = collect()
    assert environment.backends["selective_scan"] == "eager"
    assert "eager" in problem_about(environment, "capability 6.1").consequence


def test_an_op_whose_backend_cannot_be_chosen_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(op: str, device: torch.device) -> str:
        raise AssertionError("no driver")

    monkeypatch.setattr(dispatch, "select", broken)
    monkeypatch.setattr(dispatch, "OPS", {"selective_scan": True})
    environment = collect()
    assert environment.backends == {"selective_scan": "none"}
    assert "no driver" in problem_about(environment, "no driver").what


def test_model_types_are_registered_and_unregistered() -> None:
    assert set(collect().registered.values()) == {True}
    hf_mamba.unregister()
    try:
        environment = collect()
    finally:
        hf_mamba.register()
    assert set(environment.registered.values()) == {False}
    assert problem_about(environment, "not registered").command == "unset HF_MAMBA_REGISTER"


def test_a_missing_package_is_named_with_its_command(installed: Callable[..., None]) -> None:
    installed(requires=["peft>=0.21"], peft=None)
    problem = problem_about(collect(), "peft is not installed")
    assert problem.command == 'pip install "peft>=0.21"'


def test_a_package_that_is_too_old_is_named_with_its_command(installed: Callable[..., None]) -> None:
    installed(requires=["transformers>=5.17"], transformers="4.57.6")
    problem = problem_about(collect(), "transformers 4.57.6")
    assert problem.command == 'pip install --upgrade "transformers>=5.17"'


def test_requirements_of_other_systems_and_extras_are_not_asked_for(installed: Callable[..., None]) -> None:
    installed(requires=['nothing>=1; sys_platform == "no-such-system"', 'nothing>=1; extra == "train"'])
    assert not [problem for problem in collect().problems if "nothing" in problem.what]


def test_without_triton_ops_fall_back_to_eager(installed: Callable[..., None]) -> None:
    installed(requires=["triton>=3.5"], triton=None)
    assert "eager" in problem_about(collect(), "triton is not installed").consequence


def test_a_source_folder_without_installation_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(env.metadata, "requires", missing)
    assert problem_about(collect(), "source folder").command == "pip install -e ."


def test_a_cpu_build_of_torch_beside_a_gpu_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "_nvidia_driver", lambda: "580.95.05")
    monkeypatch.setattr(env, "_devices", lambda torch, environment: [])
    monkeypatch.setattr(env, "_torch_build", lambda torch: "CPU")
    assert problem_about(collect(), "build for the CPU").command == "pip install --force-reinstall torch"


def test_a_driver_that_torch_cannot_use_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "_nvidia_driver", lambda: "470.57")
    monkeypatch.setattr(env, "_devices", lambda torch, environment: [])
    monkeypatch.setattr(env, "_torch_build", lambda torch: "CUDA 13.0")
    problem = problem_about(collect(), "470.57")
    assert "CUDA 13.0" in problem.what
    assert "--index-url" in problem.command


@pytest.mark.skipif(sys.platform != "linux", reason="triton needs the C compiler on Linux only")
def test_a_missing_compiler_matters_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env.shutil, "which", lambda name: None)
    assert not [problem for problem in collect().problems if "compiler" in problem.what]
    pretend_gpu(monkeypatch)
    assert "apt-get install" in problem_about(collect(), "C compiler").command


def test_a_gpu_that_torch_cannot_describe_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> bool:
        raise RuntimeError("driver and library disagree")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    assert "driver and library disagree" in problem_about(collect(), "cannot describe the GPU").what


@pytest.mark.parametrize("error", [OSError("libcudart.so.13: no such file"), ImportError("cannot import name x")])
def test_a_torch_that_does_not_import_is_reported(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    real = env.importlib.import_module

    def import_module(name: str) -> Any:
        if name == "torch":
            raise error
        return real(name)

    monkeypatch.setattr(env, "importlib", SimpleNamespace(import_module=import_module))
    environment = collect()
    assert problem_about(environment, str(error)).command == "pip install --force-reinstall torch"
    assert environment.backends == {}


def test_broken_kernels_and_models_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    real = env.importlib.import_module

    def import_module(name: str) -> Any:
        if name.startswith(("mamba_kernels", "hf_mamba.")):
            raise RuntimeError(f"{name} is broken")
        return real(name)

    monkeypatch.setattr(env, "importlib", SimpleNamespace(import_module=import_module))
    environment = collect()
    assert problem_about(environment, "mamba_kernels cannot be imported").command
    assert problem_about(environment, "models cannot be registered").command


def test_without_packaging_the_rest_is_still_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def no_packaging(name: str, *arguments: Any) -> Any:
        if name.startswith("packaging"):
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", no_packaging)
    environment = Environment()
    env._check_requirements(environment)
    assert problem_about(environment, "packaging").command == "pip install packaging"


def test_a_program_that_hangs_or_fails_gives_nothing() -> None:
    assert env._output("no-such-program-here") is None
    assert env._output(sys.executable, "-c", "raise SystemExit(3)") is None
    assert env._output(sys.executable, "-c", "print(' 42 ')") == "42"


@pytest.mark.parametrize(
    ("variable", "value", "command"),
    [
        ("HF_MAMBA_BACKEND", "no-such-backend", "unset HF_MAMBA_BACKEND"),
        ("HF_MAMBA_REGISTER", "0", "unset HF_MAMBA_REGISTER"),
    ],
    ids=["backend", "register"],
)
def test_environment_variables_are_reported(variable: str, value: str, command: str) -> None:
    """In a fresh process, since both are read at import."""
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-m", "hf_mamba.cli", "env", "--json"],
        capture_output=True,
        text=True,
        env=os.environ | {variable: value, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
    problems = json.loads(done.stdout)["problems"]
    assert [problem["command"] for problem in problems if value in problem["what"]] == [command]
