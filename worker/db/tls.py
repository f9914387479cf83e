"""How connections to Postgres are encrypted: libpq's parameters and files as a TLS context."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path

from worker.db.parameters import SYSTEM_ROOTS

# Whether to encrypt, in the order in which it is tried.
_ATTEMPTS = {"disable": (False,), "allow": (False, True), "prefer": (True, False)}
_VERIFYING = ("verify-ca", "verify-full")


def attempts(driver: Mapping[str, str], environ: Mapping[str, str] = os.environ) -> list[ssl.SSLContext | None]:
    """The contexts with which to try to connect, in order; None: without TLS. The default is libpq's, `prefer`.

    As in libpq, a parameter that is not given is read from the environment (PGSSLMODE, PGSSLROOTCERT, …), then from
    `~/.postgresql`. Files there that are missing or not readable count as absent.
    Raises OSError that names the file when one that is given cannot be used.
    """
    options = _Options(driver, environ)
    mode = options.get("sslmode") or "prefer"
    return [_context(options, mode) if encrypt else None for encrypt in _ATTEMPTS.get(mode, (True,))]


class _Options:
    def __init__(self, driver: Mapping[str, str], environ: Mapping[str, str]) -> None:
        self._driver = driver
        self._environ = environ

    def get(self, name: str) -> str | None:
        variable = f"PG{name.upper().replace('_', '')}"
        return self._driver.get(name) or self._environ.get(variable) or None

    def file(self, name: str, usual_name: str) -> str | None:
        """The file that is given, else the usual one in `~/.postgresql` if it can be read."""
        if given := self.get(name):
            return given
        try:
            usual = Path.home() / ".postgresql" / usual_name
            usual.open("rb").close()
        except (OSError, RuntimeError):  # RuntimeError: no HOME, and a user without an entry in the password file
            return None
        return str(usual)


def _context(options: _Options, mode: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = mode == "verify-full"
    roots = options.file("sslrootcert", "root.crt") if mode in ("require", *_VERIFYING) else None
    if roots is None:
        if mode in _VERIFYING:
            raise FileNotFoundError(f"sslmode={mode} needs sslrootcert=/path/of/ca.pem, or sslrootcert=system")
        context.verify_mode = ssl.CERT_NONE
    else:
        _trust(context, roots)
        if revoked := options.file("sslcrl", "root.crl"):
            _load("sslcrl", revoked, lambda: context.load_verify_locations(revoked))
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN
    if certificate := options.file("sslcert", "postgresql.crt"):
        key, password = options.file("sslkey", "postgresql.key"), options.get("sslpassword") or ""
        # Without a password, OpenSSL would ask for it on the terminal.
        _load("sslcert", certificate, lambda: context.load_cert_chain(certificate, key, lambda: password))
    context.minimum_version = _version(options.get("ssl_min_protocol_version") or "TLSv1.2")
    if newest := options.get("ssl_max_protocol_version"):
        context.maximum_version = _version(newest)
    context.set_alpn_protocols(["postgresql"])  # needed for sslnegotiation=direct
    return context


def _trust(context: ssl.SSLContext, roots: str) -> None:
    if roots == SYSTEM_ROOTS:
        context.load_default_certs()
    else:
        _load("sslrootcert", roots, lambda: context.load_verify_locations(roots))


def _load(name: str, path: str, load: Callable[[], None]) -> None:
    """OpenSSL names neither the parameter nor the file."""
    try:
        load()
    except OSError as error:  # also what OpenSSL says of a file that is not in PEM
        raise OSError(f"{name} {path}: {error.strerror or error}") from error


def _version(name: str) -> ssl.TLSVersion:
    return ssl.TLSVersion[name.replace(".", "_")]
