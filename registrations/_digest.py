"""A digest of this package's sources in the key of PyTorch's compile caches.

AOTAutograd's cache on disk knows an operator by its name: after an edit of a registered gradient or of an inlined
body it would serve code traced from the old one.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch


def package_digest() -> str:
    """A hash over every source and data table of the package."""
    package = Path(__file__).parent.parent  # not resolved: in a checkout this folder is a link inside the package
    digest = hashlib.sha256()
    for folder in (package, package / "meta", package / "registrations"):
        for path in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".cpp", ".h", ".json")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def tag_compile_caches() -> None:
    """Add the digest to torch.compiler.config.cache_key_tag, once, for every thread."""
    config = torch.compiler.config
    tag = f"fla={package_digest()}"

    def tagged(before: str) -> str:
        return before if tag in before else f"{before};{tag}".lstrip(";")

    # A setting is the setting thread's own; its default, and what the environment says instead, hold for all threads.
    entry = vars(config)["_config"]["cache_key_tag"]
    entry.default = tagged(entry.default)
    if isinstance(entry.env_value_default, str):
        entry.env_value_default = tagged(entry.env_value_default)
    config.cache_key_tag = tagged(config.cache_key_tag)
