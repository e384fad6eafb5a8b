"""Where a request comes from, whom it means, and whether it may be answered at all."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web

from coordinator.web.endpoint import Endpoint
from edge_sdk.core.addresses import is_local
from edge_sdk.core.errors import WrongHost

ENDPOINT = web.AppKey("endpoint", Endpoint)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def client_address(request: web.BaseRequest) -> str:
    """The address that a request came from: the peer's, or what a trusted proxy there says."""
    peer = request.remote or "unknown"
    if not isinstance(request, web.Request):  # it was not even HTTP
        return peer
    forwarded = ",".join(request.headers.getall("X-Forwarded-For", ()))
    return request.app[ENDPOINT].serving.client(peer, forwarded)


@web.middleware
async def only_if_meant(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse what a page in somebody's browser sends here under its own name, and what passes by the proxy.

    A name that its owner turns to this machine's address makes the browser take the coordinator for that
    page's own server ("DNS rebinding"). Over TLS no certificate would have that name.

    Raises:
        WrongHost: the Host header names nobody here, or the host wants requests to come by its proxy.
    """
    endpoint, peer = request.app[ENDPOINT], request.remote or ""
    if not _has_tls(request):
        if endpoint.for_proxies_only and not endpoint.serving.trusts(peer) and not is_local(peer):
            raise WrongHost("this coordinator is reached through its proxy; ask its host for that address")
        name, own = request.headers.get("Host"), request.get_extra_info("sockname")
        if name is not None and not endpoint.serving.is_host(name, endpoint.host, own[0] if own else ""):
            raise WrongHost(
                f"no coordinator is called {name[:100]!r}; its host may name it in serving.hosts, and the "
                "address that is meant in serving.public_url"
            )
    return await handler(request)


def _has_tls(request: web.Request) -> bool:
    """Whether TLS protects it on the way here, or to the trusted proxy that sends it."""
    if request.get_extra_info("sslcontext") is not None:
        return True
    said = request.headers.getall("X-Forwarded-Proto", ("",))[-1]
    trusted = request.app[ENDPOINT].serving.trusts(request.remote or "")
    return trusted and said.rpartition(",")[2].strip().lower() == "https"
