"""TLS to Postgres: libpq's modes and files as contexts."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from worker.db.tls import attempts

NOBODY = 65534


@pytest.fixture
def authority(tmp_path: Path) -> str:
    path = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(path))
    return str(path)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".postgresql"
    folder.mkdir()
    return folder


@pytest.fixture
def unreadable(home: Path) -> Iterator[None]:
    """The folder has files, and may not be entered."""
    for name in ("root.crt", "root.crl", "postgresql.crt", "postgresql.key"):
        (home / name).write_text("secret")
    home.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    yield
    if root:
        os.seteuid(0)
    home.chmod(0o700)


def checks(driver: dict[str, str], environ: dict[str, str] | None = None) -> list[tuple[bool, bool] | None]:
    """Of each attempt whether the certificate and the host are verified; None: without TLS."""
    made = attempts(driver, environ or {})
    return [it and (it.verify_mode is ssl.CERT_REQUIRED, it.check_hostname) for it in made]


def test_modes_have_libpqs_meaning(home: Path, authority: str) -> None:
    assert checks({"sslmode": "disable"}) == [None]
    assert checks({"sslmode": "allow"}) == [None, (False, False)]
    assert checks({}) == checks({"sslmode": "prefer"}) == [(False, False), None]
    assert checks({"sslmode": "require"}) == [(False, False)]
    assert checks({"sslmode": "require", "sslrootcert": authority}) == [(True, False)]
    assert checks({"sslmode": "verify-ca", "sslrootcert": authority}) == [(True, False)]
    assert checks({"sslmode": "verify-full", "sslrootcert": "system"}) == [(True, True)]
    assert checks({}, {"PGSSLMODE": "verify-full", "PGSSLROOTCERT": authority}) == [(True, True)]


def test_files_of_the_home_folder_are_used(home: Path, authority: str) -> None:
    (home / "root.crt").write_text(Path(authority).read_text())
    assert checks({"sslmode": "require"}) == [(True, False)]


@pytest.mark.usefixtures("unreadable")
def test_unreadable_files_of_the_home_folder_count_as_absent() -> None:
    assert checks({}) == [(False, False), None]
    assert checks({"sslmode": "require"}) == [(False, False)]
    with pytest.raises(OSError, match="sslmode=verify-full needs sslrootcert="):
        checks({"sslmode": "verify-full"})


@pytest.mark.parametrize("name", ["sslrootcert", "sslcrl", "sslcert"])
def test_file_that_cannot_be_used_is_named(home: Path, authority: str, name: str) -> None:
    for path in (home / "missing", home / "no.pem"):
        (home / "no.pem").write_text("not PEM")
        with pytest.raises(OSError, match=f"{name} {path}: "):
            checks({"sslmode": "verify-ca", "sslrootcert": authority, name: str(path)})


def test_versions_of_tls_are_limited(home: Path) -> None:
    (usual,) = attempts({"sslmode": "require"}, {})
    (narrow,) = attempts({"sslmode": "require", "ssl_min_protocol_version": "TLSv1.3"}, {})
    assert usual is not None
    assert narrow is not None
    assert (usual.minimum_version, narrow.minimum_version) == (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)
