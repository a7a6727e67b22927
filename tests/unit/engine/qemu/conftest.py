"""A cache of what is known of programs, empty and a test's own."""

from __future__ import annotations

import pytest


@pytest.fixture
def cache_folder(monkeypatch, tmp_path):
    folder = tmp_path / "cache"
    monkeypatch.setenv("CLOUDVMM_CACHE", str(folder))
    return folder
