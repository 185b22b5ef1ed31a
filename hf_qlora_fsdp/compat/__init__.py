"""The patch room: what upstream gets wrong and no argument, subclass or instance can put right.

A patch is one file: a frozen record that says what a user would see without it, and one function that builds the
replacement. `apply` puts it in place and says so, once; `revert` undoes it. Each has two tests. One runs upstream as
it is, asserts the right behaviour and is expected to fail (`xfail(strict=True)`): the day upstream is mended it passes,
turns red, and the patch is deleted. The other is the same assertion with the patch.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

from packaging.requirements import Requirement

from ..errors import PatchError
from ..ranks import log_once


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One upstream behaviour replaced by another.

    Args:
        name (`str`): Short name, as printed at the start of a run.
        target (`str`): What is replaced, `"package.module:Class.attribute"`.
        affects (`str`): Versions concerned, as a PEP 508 requirement, e.g. `"accelerate>=1.15"`.
        symptom (`str`): What a user sees without the patch.
        upstream (`str`): Issue, pull request or source line.
        remove_when (`str`): What must be released before the patch can go.
        build (`Callable`): Takes the original and returns the replacement.
    """

    name: str
    target: str
    affects: str
    symptom: str
    upstream: str
    remove_when: str
    build: Callable[[Callable], Callable]

    @property
    def is_needed(self) -> bool:
        """Whether the installed version is one that the patch concerns."""
        requirement = Requirement(self.affects)
        return requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True)


_originals: dict[str, Callable] = {}


def apply(patch: Patch) -> None:
    """Put a patch in place, unless the installed version does not need it or it is there already.

    Raises:
        PatchError: The target does not exist.
    """
    if patch.name in _originals or not patch.is_needed:
        return
    owner, attribute = _locate(patch)
    original = getattr(owner, attribute)
    setattr(owner, attribute, patch.build(original))
    _originals[patch.name] = original
    log_once("Patched %s (%s): %s Until: %s.", patch.target, patch.name, patch.symptom, patch.remove_when)


def apply_or_say(patch: Patch) -> None:
    """Put a patch in place that makes upstream faster, and say so where the installed version is not one it knows."""
    apply(patch)
    if not patch.is_needed:
        log_once("The patch %s is not in place, since it is for %s: %s", patch.name, patch.affects, patch.symptom)


def revert(patch: Patch) -> None:
    """Put the original back."""
    if patch.name in _originals:
        owner, attribute = _locate(patch)
        setattr(owner, attribute, _originals.pop(patch.name))


def active_patches() -> list[str]:
    """Return the names of the patches in place."""
    return sorted(_originals)


def _locate(patch: Patch) -> tuple[object, str]:
    module_name, _, path = patch.target.partition(":")
    *owners, attribute = path.split(".")
    try:
        owner: object = importlib.import_module(module_name)
        for name in owners:
            owner = getattr(owner, name)
        getattr(owner, attribute)
    except (ImportError, AttributeError) as error:
        requirement = Requirement(patch.affects)
        version = importlib.metadata.version(requirement.name)
        raise PatchError(
            f"Patch {patch.name} replaces {patch.target}, which {requirement.name} {version} does not have. Install a "
            "version from constraints.txt, or report this."
        ) from error
    return owner, attribute
