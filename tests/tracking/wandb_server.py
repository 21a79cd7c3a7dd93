"""A stand-in for the GraphQL end of a wandb server: knows the few questions that a report asks, and refuses others.

A question that is unknown, or leaves out a variable that its document demands, is answered with an error, as by the
real server.
"""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789" * 4
ENTITY, PROJECT = "team", "village"


class StandIn:
    """Holds one team with one project, and the reports that were saved. Use it in a `with`; see `url`."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.refused: list[str] = []
        self.elsewhere: list[str] = []
        self.views: dict[str, dict[str, Any]] = {}
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"] or 0))
                known = self.path == "/graphql"
                answer = stand_in.answer(json.loads(content), self.headers.get("Authorization", "")) if known else {}
                if not known:
                    stand_in.elsewhere.append(self.path)
                body = json.dumps(answer).encode()
                self.send_response(200 if known else 404)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "StandIn":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, question: dict[str, Any], authorization: str) -> dict[str, Any]:
        """What the server says to a question. `authorization`: the header that must carry the key."""
        document, given = question["query"], question.get("variables") or {}
        name = (re.search(r"(?:query|mutation)\s+(\w+)", document) or ["", ""])[1]
        self.asked.append((name, given))
        demanded = re.findall(r"\$(\w+):\s*[\[\w!\]]+!(?=[\s,)])", document.split("{")[0])
        missing = [variable for variable in demanded if given.get(variable) is None]
        handler = getattr(self, f"_{name}", None) or self._by_shape(document)
        if missing or handler is None or not authorization:
            said = f"missing {missing}" if missing else "unauthorized" if not authorization else f"unknown: {document}"
            self.refused.append(said)
            return {"errors": [{"message": said}]}
        return {"data": handler(given)}

    def _by_shape(self, document: str) -> Any:
        if "viewer" in document:
            return lambda _: {"viewer": viewer()}
        if "serverInfo" in document:
            return lambda _: {"serverInfo": {"cliVersionInfo": {}, "latestLocalVersionInfo": None, "features": []}}
        return None

    def _GetDefaultEntity(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": viewer()}

    def _GetProjects(self, given: dict[str, Any]) -> dict[str, Any]:
        node = {
            "__typename": "Project", "id": "UHJvamVjdA==", "name": PROJECT, "entityName": given["entity"],
            "createdAt": "2026-01-01T00:00:00", "isBenchmark": False, "user": None,
        }  # fmt: skip
        info = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        return {"models": {"pageInfo": info, "edges": [{"node": node}]}}

    def _ProjectInternalId(self, given: dict[str, Any]) -> dict[str, Any]:
        known = (given["entityName"], given["projectName"]) == (ENTITY, PROJECT)
        return {"project": {"id": "UHJvamVjdA==", "internalId": "aW50ZXJuYWw="} if known else None}

    def _upsertView(self, given: dict[str, Any]) -> dict[str, Any]:
        view_id = given.get("id")
        json.loads(given["spec"])
        new = view_id or f"Vmlldzox{len(self.views)}"
        view = {
            "id": new, "type": given["type"], "name": given["name"], "displayName": given["displayName"],
            "description": given["description"], "spec": given["spec"], "createdAt": None, "updatedAt": None,
            "project": {"id": "UHJvamVjdA==", "name": given["projectName"], "entityName": given["entityName"]},
        }  # fmt: skip
        self.views[new] = view
        return {"upsertView": {"view": view, "inserted": view_id is None}}


def viewer() -> dict[str, Any]:
    """Who is logged in."""
    return {
        "id": "VXNlcjox", "flags": "{}", "entity": ENTITY, "username": "ana", "email": "a@example.org", "admin": False,
        "name": "Ana", "deletedAt": None, "createdAt": "2026-01-01T00:00:00", "apiKeys": {"edges": []},
        "teams": {"edges": [{"node": {"name": ENTITY}}]},
    }  # fmt: skip
