"""Addresses to listen on, and the URLs that lead there."""

from __future__ import annotations

import ipaddress

_ANY = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # an address to listen on, and one to connect to


def is_loopback(address: str) -> bool:
    """Whether only processes of this machine reach what listens there."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def network_of(address: str) -> str:
    """Return what counts as one client: of IPv6 addresses everybody has a network of 64 bits to take them from."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return address
    return str(found.ipv4_mapped or ipaddress.ip_network((found, 64), strict=False))


def url_of(address: str, port: int, is_encrypted: bool = False) -> str:
    return f"http{'s' * is_encrypted}://{f'[{address}]' if ':' in address else address}:{port}"


def url_to_ask(url: str) -> str:
    """Return the URL by which this machine reaches a server that says that it listens on `url`: on all addresses, perhaps."""
    scheme, _, rest = url.partition("://")
    host, _, port = rest.rpartition(":")
    return f"{scheme}://{_ANY[host]}:{port}" if host in _ANY else url


def is_untrusted(error: BaseException | None) -> bool:
    """Whether an error comes of a certificate that nobody vouches for."""
    while error is not None:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


TRUST_HINT = "name the server's own certificate, or who has signed it, in SSL_CERT_FILE"
