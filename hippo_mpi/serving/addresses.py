"""Addresses to listen on, and the URLs that lead there."""

from __future__ import annotations

import ipaddress

_WILDCARDS = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # addresses that listen on all interfaces -> one to connect to


def is_loopback(address: str) -> bool:
    """Return whether only processes of this machine can reach what listens on an address."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def network_of(address: str) -> str:
    """Return what counts as one client: an IPv4 address, or the /64 network of an IPv6 address.

    Anyone with IPv6 has a whole /64 network of addresses to use.
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    return str(parsed.ipv4_mapped or ipaddress.ip_network((parsed, 64), strict=False))


def url_of(address: str, port: int, is_encrypted: bool = False) -> str:
    """Return the http or https URL of an address and a port."""
    return f"http{'s' * is_encrypted}://{f'[{address}]' if ':' in address else address}:{port}"


def url_to_ask(url: str) -> str:
    """Return the URL by which this machine reaches a server that listens on `url`, perhaps on all interfaces."""
    scheme, _, rest = url.partition("://")
    host, _, port = rest.rpartition(":")
    return f"{scheme}://{_WILDCARDS[host]}:{port}" if host in _WILDCARDS else url


def is_untrusted(error: BaseException | None) -> bool:
    """Return whether an error was caused by a certificate that isn't trusted."""
    while error is not None:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


TRUST_HINT = "set SSL_CERT_FILE to the server's certificate, or to that of its CA"
