"""Every page: drawn without an error, on a desktop and on a phone, in light and dark, for keyboards and readers."""

from __future__ import annotations

import pytest

from lapis.console.pages import PLACES
from lapis.home import Home
from lapis.server import RunningServer
from lapis.tenants.tenant import DEFAULT
from lapis.train.run import Run
from tests.browser.conftest import DESKTOP, PHONE, Visit

# Every control has a name, every picture a text, ids are unique, headings go down one step at a time.
OWN_CHECKS = """() => {
  const wrong = [], seen = new Set();
  const named = (e) => e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim() || e.title;
  for (const e of document.querySelectorAll('a, button, input:not([type=hidden]), select, textarea'))
    if (!named(e)) wrong.push('no name: ' + e.outerHTML.slice(0, 120));
  for (const e of document.querySelectorAll('img, [role=img]:not(.hidden)'))
    if (!e.alt && !e.getAttribute('aria-label')) wrong.push('no text: ' + e.outerHTML.slice(0, 120));
  for (const e of document.querySelectorAll('[id]')) {
    if (seen.has(e.id)) wrong.push('twice: ' + e.id);
    seen.add(e.id);
  }
  const levels = [...document.querySelectorAll('h1, h2, h3')].map((e) => Number(e.tagName[1]));
  if (levels.filter((level) => level === 1).length !== 1) wrong.push('headings: ' + levels);
  levels.forEach((level, i) => { if (i && level > levels[i - 1] + 1) wrong.push('headings: ' + levels); });
  if (!document.documentElement.lang) wrong.push('no language');
  return wrong;
}"""
AXE = """async () => {
  const found = await axe.run({resultTypes: ['violations']});
  const where = (rule) => rule.nodes.slice(0, 3).map((node) => node.html.slice(0, 160)).join(' | ');
  return found.violations.map((rule) => rule.id + ': ' + where(rule));
}"""
PATHS = [place.path for place in PLACES]


@pytest.mark.parametrize("path", PATHS)
def test_a_page_is_named_and_fits_a_phone(visit: Visit, path: str) -> None:
    page = visit(path)
    place = next(place for place in PLACES if place.path == path)
    assert page.title() == f"{place.title} · Lapis"
    assert page.locator("nav a[aria-current=page]").inner_text() == place.title
    page.wait_for_function("document.querySelector('.data, .panel')")
    assert page.evaluate(OWN_CHECKS) == []
    page.set_viewport_size(PHONE)
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


@pytest.mark.parametrize("path", PATHS)
def test_a_page_is_accessible_in_light_and_dark(visit: Visit, axe: str, path: str) -> None:
    page = visit(path, color_scheme="light")
    page.wait_for_function("document.querySelector('.data, .panel')")
    page.wait_for_timeout(300)  # charts are drawn
    page.evaluate(axe)
    assert page.evaluate(AXE) == []
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("document.body.classList.contains('body--dark')")
    assert page.evaluate(AXE) == []


@pytest.mark.parametrize("kind", ["run", "eval run"])
def test_what_a_page_leads_to_is_accessible_and_fits_a_phone(
    visit: Visit, axe: str, furnished: tuple[Home, str], server: RunningServer, kind: str
) -> None:
    *_, (last, _) = server.services.eval_runs.recent(DEFAULT, 10)
    path = f"/evals/{last.eval_id}/runs/{last.id}"
    if kind == "run":
        path = f"/training/runs/{Run.list(furnished[0])[1].id}"
    page = visit(path, color_scheme="light", viewport=PHONE)
    page.wait_for_function("document.querySelector('.data tbody')")
    assert page.evaluate(OWN_CHECKS) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.evaluate(axe)
    assert page.evaluate(AXE) == []
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("document.body.classList.contains('body--dark')")
    assert page.evaluate(AXE) == []


def test_the_keyboard_reaches_the_page_past_the_menu(visit: Visit) -> None:
    page = visit("/jobs")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the page"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.querySelector('.page').contains(document.activeElement)")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_the_menu_opens_on_a_phone(visit: Visit) -> None:
    page = visit(viewport=PHONE)
    assert not page.locator("nav a").first.is_visible()
    page.get_by_role("button", name="Menu").press("Enter")
    page.get_by_role("link", name="Usage").click()
    page.wait_for_selector("h1:text-is('Usage')")


def test_colours_follow_the_system_until_they_are_chosen(visit: Visit) -> None:
    page = visit(color_scheme="dark", viewport=DESKTOP)
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(paper)
    page.get_by_label("Colours").select_option("light")
    light = page.evaluate(paper)
    assert light != dark
    page.goto("/console/usage")
    page.wait_for_selector("main h1")
    assert page.evaluate(paper) == light
    page.get_by_label("Colours").select_option("")
    assert page.evaluate(paper) == dark
