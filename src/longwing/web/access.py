"""Who may do what from the page.

Reading and asking need what they need without a page: the API key, if there are any (the server's
guard sees to it). To load, download and evaluate is the operator's business:

- with an admin key, it is needed, in the header X-Admin-Key;
- without one, the page of this very machine may act: the server listens on loopback, has no API
  keys, stands behind no proxy and lets no other origin ask;
- else nobody may, and the refusal says how to change that.

Every route takes requests from pages of this server only. A page elsewhere can make a browser send
a POST, but neither with our content types nor with our headers, unless the server allows it; and
what says its Origin is not let in. (`curl` says none.)
"""

import hashlib
import hmac

from starlette.exceptions import HTTPException
from starlette.requests import Request

from longwing.server.faults import TgiFault
from longwing.server.guard import is_loopback, is_own_origin
from longwing.server.options import ServerOptions
from longwing.web.options import WebOptions

HEADER = "x-admin-key"


class Access:
    """The rule above, for one server.

    Args:
        server: where it listens, and to whom.
        web: the admin key.

    Attributes:
        mode: "key", "open" or "off".
    """

    def __init__(self, server: ServerOptions, web: WebOptions) -> None:
        is_own = is_loopback(server.host) and not (
            server.api_keys or server.allowed_hosts or server.cors_allow_origin
        )
        self._key = None if web.admin_key is None else _digest(web.admin_key)
        self._named = frozenset(host.lower() for host in server.allowed_hosts)
        self.mode = "key" if self._key else "open" if is_own else "off"

    def require_own_page(self, http: Request) -> None:
        """Refuse what a page from elsewhere sends.

        Raises:
            HTTPException: 403.
        """
        origin = http.headers.get("origin", "").lower()
        host = http.headers.get("host", "").lower()
        site = http.headers.get("sec-fetch-site", "none")
        foreign = origin and not is_own_origin(origin, host, self._named)
        if foreign or site not in ("same-origin", "none"):
            raise HTTPException(403, "only this server's own page may ask for this")

    def may_act(self, http: Request) -> bool:
        """Whether a request may load, download and evaluate."""
        if self._key is None:
            return self.mode == "open"
        given = http.headers.get(HEADER, "")
        return hmac.compare_digest(_digest(given), self._key)

    def require_admin(self, http: Request) -> None:
        """Refuse who may not act.

        Raises:
            TgiFault: 403; says what is needed.
        """
        if self.may_act(http):
            return
        if self.mode == "key":
            raise TgiFault("admin_key", "this needs the server's admin key", status=403)
        raise TgiFault(
            "admin_off",
            "models, downloads and evaluations are switched off: the server can be reached by "
            "others than this machine's own page; serve with --admin-key (or LONGWING_ADMIN_KEY) "
            "to allow them to those who have that key",
            status=403,
        )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
