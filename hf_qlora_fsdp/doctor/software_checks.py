"""Is the software what it should be? The libraries, their versions and builds, this package and its patches.

Each check yields findings, and raises only what nobody foresaw. The examination runs it in a process that it may take
down with it, so a check tries the real thing instead of guessing at it. Third-party imports are inside the functions:
whether they work is the first question.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import os
import pkgutil
import platform
import sys
from collections.abc import Iterable, Iterator

from .findings import Finding, error, note, ok, warning

_PACKAGE = __name__.partition(".")[0]

MODULES = {"pyyaml": "yaml"}
"""What is imported under another name than it is installed."""

EXTRAS = {"matplotlib": "--plot"}
"""What is imported by modules that only some options need."""

TRIED_ELSEWHERE = ("triton",)
"""What is imported by modules that only GPUs need; `kernel_checks.py` tries these and says what is lost without."""

OLDEST_PYTHON, NEWEST_TESTED_PYTHON = (3, 10), (3, 12)


def check_python() -> Iterator[Finding]:
    """Is this a Python, on a system, that the package is made for?"""
    version = sys.version_info[:2]
    said = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"
    if version < OLDEST_PYTHON:
        yield error(said, "The code needs Python 3.10.", "Make a virtual environment with Python 3.10, 3.11 or 3.12.")
    elif version > NEWEST_TESTED_PYTHON:
        yield note(said, "Newer than what the tests were run with.", "If in doubt, use Python 3.12.")
    else:
        yield ok(said)
    if platform.system() != "Linux":
        yield warning(
            f"This is {platform.system()}, not Linux.",
            "NCCL and limits of containers exist on Linux alone, and nothing else was tested.",
            "On Windows, run inside WSL2.",
        )


def check_version(name: str) -> Iterator[Finding]:
    """Is a library installed, in a version that is supported?"""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        yield error(f"{name} is not installed.", "The package needs it.", f'pip install "{_requirement(name)}"')
        return
    try:
        from ..compat.versions import LIBRARIES
    except ImportError:  # packaging, which compares versions, is what is missing
        why = "Without packaging, nobody can say whether that is a good version."
        yield note(f"{name} {version}", why, "pip install packaging")
        return
    support = LIBRARIES[name]
    verdict = support.judge(version)
    if verdict in ("too old", "too new"):
        yield error(
            f"{name} {version} is {verdict}: {support.supported} is supported.",
            f"The code relies on what {name} does in these versions.",
            f'pip install "{_requirement(name)}", or {name}=={support.tested[-1]}, which the tests were run with',
        )
    elif verdict:
        fix = f'If in doubt, pip install "{_requirement(name, pinned=True)}"'
        yield note(f"{name} {version}", "Newer than what the tests were run with.", fix)
    else:
        yield ok(f"{name} {version}" + (f" (tested: {', '.join(support.tested)})" if support.tested else ""))


def check_import(name: str) -> Iterator[Finding]:
    """Can a library be imported? Says nothing if it can."""
    module_name = MODULES.get(name, name)
    try:
        module = importlib.import_module(module_name)
    except BaseException as problem:  # what runs on import may raise anything, SystemExit too
        yield _explain_import(name, module_name, problem)
        return
    if getattr(module, "__file__", None) is None:
        yield error(
            f"`import {module_name}` finds a folder, {', '.join(getattr(module, '__path__', []))}, not the library.",
            "A folder of that name lies in the working directory or in PYTHONPATH, and comes before the library.",
            "Rename the folder, or run from another directory.",
        )


def _requirement(name: str, *, pinned: bool = False) -> str:
    """Return what to ask pip for: the supported range, or the version that was tested last."""
    try:
        from ..compat.versions import LIBRARIES
    except ImportError:  # packaging itself is what is missing
        return name
    support = LIBRARIES[name]
    return f"{name}=={support.tested[-1]}" if pinned and support.tested else f"{name}{support.supported}"


def suggest_reinstalling(name: str) -> str:
    """Return the command that installs the tested version of a library over what is there."""
    return f'pip install --force-reinstall --no-deps "{_requirement(name, pinned=True)}"'


def _explain_import(name: str, module_name: str, problem: BaseException) -> Finding:
    said = f"{name} is installed and cannot be imported: {_describe(problem)}"
    missing = (getattr(problem, "name", None) or "").partition(".")[0]
    if (
        isinstance(problem, ModuleNotFoundError)
        and missing not in ("", module_name)
        and importlib.util.find_spec(missing) is None
    ):
        return error(said, f"{name} needs {missing}, which is not there.", f"pip install {missing}")
    return error(
        said,
        "Nothing that uses it can run. Such a library is half installed, was built for another version of torch, of "
        "CUDA or of Python, or is hidden by a file of the same name.",
        suggest_reinstalling(name),
    )


def _describe(problem: BaseException) -> str:
    text = " ".join(str(problem).split())
    return f"{type(problem).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"


def check_package() -> Iterator[Finding]:
    """Can all of this package be imported, with these libraries?"""
    package, extras = importlib.import_module(_PACKAGE), set[str]()
    for name in _find_modules(package.__path__, f"{_PACKAGE}."):
        try:
            importlib.import_module(name)
        except BaseException as problem:
            missing = (getattr(problem, "name", None) or "").partition(".")[0]
            if isinstance(problem, ModuleNotFoundError) and missing in (*EXTRAS, *TRIED_ELSEWHERE):
                extras.add(missing)
                continue
            yield error(
                f"{name} cannot be imported: {_describe(problem)}",
                "The libraries can be imported, so one of them lacks something that is used here.",
                "Install the tested versions, which are named above. If they are installed, report this.",
            )
            return
    for missing in sorted(extras.intersection(EXTRAS)):
        yield note(f"{missing} is not installed.", f"{EXTRAS[missing]} needs it.", f"pip install {missing}")
    try:
        version = importlib.metadata.version("hf_qlora_fsdp")
    except importlib.metadata.PackageNotFoundError:
        version = "(not installed)"
    yield ok(f"hf_qlora_fsdp {version} in {package.__path__[0]}")


def _find_modules(folders: Iterable[str], prefix: str) -> Iterator[str]:
    """Yield the names of all modules in folders and below, and import none."""
    for info in pkgutil.iter_modules(folders, prefix):
        yield info.name
        if info.ispkg:
            inside = info.name.removeprefix(prefix)
            yield from _find_modules([os.path.join(folder, inside) for folder in folders], f"{info.name}.")


def check_patches() -> Iterator[Finding]:
    """Which patches of upstream apply to these versions, and can they be put in place?"""
    from .. import compat

    log = logging.getLogger("hf_qlora_fsdp")
    for info in pkgutil.iter_modules(compat.__path__):
        patch = getattr(importlib.import_module(f"{compat.__name__}.{info.name}"), "PATCH", None)
        if patch is None:
            continue
        if not patch.is_needed:
            yield ok(f"{patch.name} is not needed here ({patch.affects}).")
            continue
        was, log.disabled = log.disabled, True  # what it logs is said here
        try:
            compat.apply(patch)
            compat.revert(patch)
        except Exception as problem:
            fix = f"Install the tested versions, or report this with the version of {patch.affects}."
            yield error(f"{patch.name} cannot be put in place: {_describe(problem)}", patch.symptom, fix)
        else:
            yield ok(f"{patch.name} replaces {patch.target} during a run. {patch.symptom} Until: {patch.remove_when}.")
        finally:
            log.disabled = was
