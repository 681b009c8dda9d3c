"""Whether the model hub can be reached. One quick test replaces the minutes that the hub's client would try."""

import socket
from functools import cache
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

TIMEOUT = 5.0  # seconds


def unreachable() -> str | None:
    """The reason why no connection to the hub (or to its proxy) can be opened; None if one can.

    One attempt of at most ``TIMEOUT`` seconds. A hub that answers with an error is reachable: the error may pass.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    address = urlsplit(constants.ENDPOINT)
    proxies = getproxies()
    proxy = proxies.get(address.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(address.hostname or ""):
        address = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    port = address.port or (443 if address.scheme == "https" else 80)
    return _no_connection(address.hostname, port)


@cache
def _no_connection(host: str | None, port: int) -> str | None:
    try:
        socket.create_connection((host, port), TIMEOUT).close()
    except OSError as error:
        return f"{host}: {error.strerror or error}"
    return None
