"""Where things are kept between runs."""

from __future__ import annotations

import os

import pytest

from cloudvmm.host.cache import cache_folder, make_cache_folder


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"CLOUDVMM_CACHE": "/own", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/own"),
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/cloudvmm"),
        ({"HOME": "/h"}, "/h/.cache/cloudvmm"),
        ({"CLOUDVMM_CACHE": "own", "HOME": "/h"}, f"{os.getcwd()}/own"),
    ],
)
def test_folder_follows_the_environment(monkeypatch, environment, folder):
    for name in ("CLOUDVMM_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    assert cache_folder() == folder


def test_folder_is_made_for_its_owner_alone(tmp_path):
    for _ in range(2):
        make_cache_folder(str(tmp_path / "a" / "b"))

    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
