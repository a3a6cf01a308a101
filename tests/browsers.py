"""What a browser does at the console's door, over plain HTTP."""

from __future__ import annotations

import re

import httpx


def browser_at(url: str) -> httpx.Client:
    """A client that keeps cookies, follows redirects and says where its requests come from."""
    base = url.removesuffix("/v1")
    return httpx.Client(base_url=base, follow_redirects=True, headers={"origin": base}, timeout=60)


def sign_in(browser: httpx.Client, key: str) -> httpx.Response:
    """Fill in the sign-in form and send it."""
    return browser.post("/console/sign-in", data={"csrf": form_token(browser), "key": key})


def form_token(browser: httpx.Client) -> str:
    """The hidden token of the sign-in form."""
    page = browser.get("/console/", headers={"cookie": ""}).text
    found = re.search(r'name="csrf" value="([^"]+)"', page)
    assert found, page
    return found[1]
