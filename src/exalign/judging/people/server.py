"""Runs the assessment page."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

import uvicorn

from exalign.errors import InputError
from exalign.judging.people.app import create_app
from exalign.judging.people.store import Store


def serve(store: Store, *, host: str = "127.0.0.1", port: int = 8765, url: str | None = None) -> None:
    """Serve every study of `store` until interrupted; `InputError` where the address cannot be used.

    Binds to loopback unless told otherwise; any other address needs `url`, the address by which assessors reach it
    (usually that of a TLS proxy in front): requests under other host names are refused. Addresses are not logged:
    they hold the tokens.
    """
    store.check()
    app = create_app(store, allowed_hosts=allowed_hosts(host, url))
    # A person reads for longer than uvicorn's 5 s; a form sent on a connection closed just then would be lost.
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=120,
    )
    try:
        uvicorn.Server(config).run()
    except SystemExit:
        raise InputError(f"Cannot listen on {host}:{port}; is it taken? Choose another --port.") from None


def allowed_hosts(host: str, url: str | None) -> list[str]:
    """The host names under which requests are answered.

    >>> allowed_hosts("127.0.0.1", None)
    ['127.0.0.1', 'localhost']
    """
    if ":" in host:
        raise InputError(f"--host {host}: give an IPv4 address or a host name.")
    named = urlsplit(url).hostname if url else None
    if url is not None and named is None:
        raise InputError(f"--url {url} has no host name (for example https://assess.example.org).")
    if not is_loopback(host) and named is None:
        raise InputError(f"{host} is open to others: say by which --url assessors reach it (behind TLS).")
    return list(dict.fromkeys([*(["127.0.0.1", "localhost"]), *([named] if named else [])]))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address bound to `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
