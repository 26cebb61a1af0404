"""`vhost-user://PATH`: a socket that vhost-user front-ends connect to; each connection is one guest's card."""

from __future__ import annotations

import socket
from typing import Protocol

from netstack.vde.attachment import LinkFactory, StreamListener
from netstack.vde.link import BaseLink
from netstack.vde.vhost_user import VhostUserLink


class VhostUserFactory(LinkFactory, Protocol):
    """Makes these links as well."""

    def vhost_user(self, name: str, sock: socket.socket) -> VhostUserLink: ...


class VhostUserListener(StreamListener):
    """`vhost-user://PATH`: several guests, each may come and go."""

    def __init__(self, uri: str, factory: VhostUserFactory, *, path: str) -> None:
        super().__init__(uri, factory, path=path)
        self._links = factory

    def _make_link(self, name: str, sock: socket.socket) -> BaseLink:
        return self._links.vhost_user(name, sock)
