"""Which versions of the libraries below are supported, and which were tested.

The ranges are those of setup.cfg and the last tested versions those of constraints.txt, which do not come with an
installed package; a test holds them equal.
"""

from __future__ import annotations

from dataclasses import dataclass

from packaging.specifiers import SpecifierSet
from packaging.version import Version


@dataclass(frozen=True)
class Support:
    """What is known about a library.

    Args:
        supported (`str`): Versions that the code is written for, as a PEP 440 specifier.
        tested (`tuple[str, ...]`): Versions that the test suite was run with, the last one by CI.
    """

    supported: str = ""
    tested: tuple[str, ...] = ()

    def judge(self, version: str) -> str:
        """Return `"too old"`, `"too new"`, `"untested"` (newer than what was), or `""` for a good version."""
        found = Version(Version(version).base_version)  # 2.13.0a0+git is what 2.13.0 will be
        specifiers = SpecifierSet(self.supported)
        if not specifiers.contains(found):
            is_older = any(found < Version(each.version) for each in specifiers if each.operator == ">=")
            return "too old" if is_older else "too new"
        return "untested" if self.tested and found > max(map(Version, self.tested)) else ""


LIBRARIES = {
    "packaging": Support(tested=("26.3",)),
    "psutil": Support(),
    "pyyaml": Support(tested=("6.0.3",)),
    "dill": Support(),
    "torch": Support(">=2.11", ("2.11.0", "2.13.0")),
    "safetensors": Support(tested=("0.8.0",)),
    "transformers": Support(">=5.17,<6", ("5.17.0", "5.23.0")),
    "accelerate": Support(">=1.15", ("1.15.0",)),
    "bitsandbytes": Support(">=0.50", ("0.50.2",)),
    "peft": Support(">=0.21,<1", ("0.21.0", "0.21.2")),
    "datasets": Support(tested=("5.2.0",)),
    "trl": Support(">=1.16,<2", ("1.16.0",)),
}
"""In the order in which they build on each other."""
