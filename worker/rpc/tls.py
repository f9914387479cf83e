"""The server's certificate, read from files."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc

from worker.observability.logs import get_logger

if TYPE_CHECKING:
    from pathlib import Path

log = get_logger(__name__)

Files = tuple[bytes, bytes]


@dataclass(kw_only=True)
class Certificate:
    """The chain and the key, in PEM. New connections use what the files have then: certificates are renewed.

    Raises OSError when a file cannot be read, or when the files do not fit together.
    """

    chain: Path
    key: Path
    _used: Files = field(init=False, repr=False)
    _cause: str = field(default="", init=False, repr=False)

    def __post_init__(self) -> None:
        self._used = self._read()

    def credentials(self) -> grpc.ServerCredentials:
        return grpc.dynamic_ssl_server_credentials(_configuration(self._used), self._renewed)  # type: ignore[arg-type]

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """None: as before. Called for each new connection, by a thread of gRPC."""
        try:
            found = self._read()
        except OSError as error:
            if str(error) != self._cause:  # not for each connection
                self._cause = str(error)
                log.warning("certificate cannot be used, the last one stays in use", cause=self._cause)
            return None
        self._cause = ""
        if found == self._used:
            return None
        self._used = found
        log.info("certificate renewed", file=str(self.chain))
        return _configuration(found)

    def _read(self) -> Files:
        files = self.key.read_bytes(), self.chain.read_bytes()
        # gRPC would only fail each connection. Without a password, OpenSSL would ask the terminal for one.
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(self.chain, self.key, password="")
        return files


def _configuration(files: Files) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([files])
