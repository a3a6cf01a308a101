"""What people do in the console: chat, make keys, approve, cancel, upload, filter, verify."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import openai

from lapis.home import Home
from lapis.jobs.job import State
from lapis.jobs.queue import JobQueue
from lapis.server import RunningServer
from lapis.tenants.keys import ApiKeys
from lapis.tenants.tenant import DEFAULT, Role, Tenants
from lapis.train.run import Run
from tests.browser.conftest import Visit
from tests.browser.furnished import SAMPLES

Furnished = tuple[Home, str]


def test_a_chat_is_streamed_and_tells_how_likely_each_token_was(visit: Visit) -> None:
    page = visit("/playground?model=tiny")
    page.get_by_label("Your message").fill("Tell me of the river.")
    page.get_by_label("Your message").press("Enter")
    page.wait_for_selector("text=/\\d+ tokens, /")
    answer = page.get_by_role("group", name="Answer of tiny")
    assert re.fullmatch(r"[A-Z][a-z .A-Z]+\.", answer.inner_text())
    answer.press("ArrowRight")
    assert re.search(r'^".+" +61 % — instead: ".+" 14 %', page.locator(".odds").inner_text())


def test_two_models_answer_side_by_side_and_can_be_stopped(visit: Visit) -> None:
    page = visit("/playground")
    page.get_by_label("Compare two models").check()
    page.get_by_label("Model", exact=True).nth(1).wait_for()
    page.get_by_label("Most tokens").fill("1500")
    page.get_by_label("Your message").fill("Tell me a long story.")
    page.get_by_role("button", name="Send").click()
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("button", name="Send").and_(page.locator(":enabled")).wait_for()
    page.wait_for_function("document.querySelectorAll('.talk .tokens').length === 2")
    for number in range(2):
        page.get_by_text(re.compile(r"stopped after \d+ tokens")).nth(number).wait_for()
    assert page.locator(".said.bad").count() == 0


def test_a_run_shows_what_the_model_wrote_the_newest_first(visit: Visit, furnished: Furnished) -> None:
    run = Run.list(furnished[0])[1]
    page = visit(f"/training/runs/{run.id}")
    written = page.get_by_role("region", name="Samples")
    assert written.locator("h3").all_inner_texts() == [f"Step {step}" for step in (400, 300, 200, 100)]
    first = written.locator(".sample").first
    assert first.inner_text() == "".join(SAMPLES[0])  # its <b> is text
    prompt, text = (first.locator("span").nth(number) for number in range(2))
    color = "e => getComputedStyle(e).color"
    assert prompt.inner_text().strip() == SAMPLES[0][0].strip()
    assert prompt.evaluate(color) != text.evaluate(color)
    run.events.write("samples", step=500, samples=[{"prompt": "Again ", "text": "and again", "reward": 0.25}])
    written.get_by_text("Step 500").wait_for()  # as it comes
    assert "reward 0.25" in written.inner_text()


def test_the_python_code_asks_the_same(visit: Visit, server: RunningServer, tmp_path: Path) -> None:
    page = visit("/playground?model=tiny")
    page.get_by_label("Your message").fill('It\'s "quoted"\nand has two lines.')
    page.get_by_label("Temperature").fill("0")
    page.get_by_role("button", name="Copy as Python").click()
    code = page.locator(".q-dialog pre").inner_text()
    program = tmp_path / "asked.py"
    program.write_text(code)
    key = ApiKeys(server.services.db).create("program", "test")[1]
    done = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OPENAI_API_KEY": key},
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"[A-Z][a-z .A-Z]+\.", done.stdout.strip())


def test_a_key_is_shown_once_and_ends_its_sessions_when_revoked(visit: Visit) -> None:
    page = visit("/members")
    page.get_by_role("button", name="Create a key").click()
    page.get_by_label("Name").fill("grace")
    page.get_by_role("button", name="Create", exact=True).click()
    text = page.locator(".secret").inner_text()
    assert text.startswith("lapis_")
    page.get_by_role("button", name="I have it").click()
    other = visit("/", key=text)
    assert other.get_by_role("link", name="Audit").count() == 0
    row = page.get_by_role("row").filter(has_text="grace")
    row.get_by_role("button", name=re.compile("Revoke")).click()
    page.get_by_role("button", name="Revoke it").click()
    page.get_by_role("row").filter(has_text="grace").filter(has_text="revoked").wait_for()
    other.wait_for_selector("#key")  # it asks for a key again
    page.goto("/console/members")
    page.wait_for_selector("text=grace")
    assert text not in page.content()


def test_a_gate_that_refuses_needs_a_reason_to_be_overridden(visit: Visit) -> None:
    page = visit("/models")
    row = page.get_by_role("row").filter(has_text="poet:2")
    row.get_by_role("button", name=re.compile("Approve")).click()
    page.wait_for_selector("text=evaluation: There is no evaluation.")
    page.get_by_role("button", name="Override and approve").click()
    page.wait_for_selector("text=Overriding a gate needs a reason.")
    row.get_by_role("button", name=re.compile("Approve")).click()
    page.get_by_label("Reason (needed").fill("tried by hand")
    page.get_by_role("button", name="Override and approve").click()
    page.get_by_role("row").filter(has_text="poet:2").filter(has_text="approved").wait_for()
    page.get_by_role("link", name="poet:2").click()
    page.wait_for_selector("text=tried by hand")


def test_a_waiting_job_is_cancelled(visit: Visit, server: RunningServer) -> None:
    page = visit("/jobs")
    page.locator("tr", has_text="train poems on 8 GPUs").filter(has_text="it asks for 16 CPUs").wait_for()
    row = page.get_by_role("row").filter(has_text="batch of 12,000 requests")
    row.filter(has_text="it goes next").wait_for()
    row.get_by_role("button", name=re.compile("Cancel")).click()
    page.get_by_role("button", name="Cancel the job").click()
    page.locator("section[aria-label=Ended] tr", has_text="batch of 12,000 requests").wait_for()
    found = JobQueue(server.services.db).list(State.CANCELLED)
    assert any(job.reason.startswith("cancelled by key:") for job in found)


def test_a_batch_tells_how_far_it_is_gives_its_files_and_is_cancelled(
    visit: Visit, server: RunningServer
) -> None:
    page = visit("/batches")
    done = page.get_by_role("row").filter(has_text="completed")
    assert "1,200 of 1,200" in done.inner_text()
    with page.expect_download() as download:
        done.get_by_role("link", name="errors").press("Enter")
    assert Path(download.value.path()).read_text().splitlines() == ["{}"] * 12
    refused = page.get_by_role("row").filter(has_text="failed")
    assert "Line 12: It is not JSON." in refused.filter(has_text="embeddings").inner_text()
    going = page.get_by_role("row").filter(has_text="3,120 of 5,000")
    going.get_by_role("button", name=re.compile("Cancel batch_")).press("Enter")
    page.get_by_role("button", name="Cancel the batch").press("Enter")
    going.filter(has_text="cancelling").wait_for()
    assert going.get_by_role("button").count() == 0
    found, _ = server.services.batches.list(DEFAULT)
    assert [batch.status for batch in found if batch.total == 5000] == ["cancelling"]


def test_an_eval_run_shows_what_failed_and_why(
    visit: Visit, server: RunningServer, furnished: Furnished
) -> None:
    page = visit("/evals")
    page.get_by_role("link", name="poet of Monday").press("Enter")
    page.wait_for_selector("h2:text-is('poet of Monday')")
    with openai.OpenAI(base_url=server.url, api_key=furnished[1]) as client:
        eval_id, _, run_id = page.url.rsplit("/", 3)[1:]
        assert client.evals.runs.retrieve(run_id, eval_id=eval_id).report_url == page.url
    assert page.locator(".figure").first.inner_text().split("\n")[:2] == ["Passed", "34"]
    criteria = page.locator("section[aria-label=Criteria] tbody tr")
    assert ["right year" in text and "87%" in text for text in criteria.all_inner_texts()] == [True, False]
    rows = page.locator("section[aria-label='What failed'] tbody tr").all_inner_texts()
    assert len(rows) == 6
    assert "right year: score 0; short: score 0" in rows[0]
    assert "429: The queue of this model is full." in rows[1]
    assert "When did <b>it</b> end?" in rows[2]  # data is text
    assert page.locator("section[aria-label='What passed'] tbody tr").count() == 34


def test_an_eval_run_that_goes_on_is_cancelled(visit: Visit, server: RunningServer) -> None:
    page = visit("/evals")
    row = page.get_by_role("row").filter(has_text="nightly")
    row.get_by_role("button", name=re.compile("Cancel evalrun_")).click()
    page.get_by_role("button", name="Cancel the run").click()
    row.filter(has_text="canceled").wait_for()
    newest, _ = server.services.eval_runs.recent(DEFAULT, 1)[0]
    assert (newest.status, newest.counts.total) == ("canceled", 60)


def test_a_project_is_made_and_limited_and_somebody_invited(visit: Visit, server: RunningServer) -> None:
    page = visit("/members")
    page.get_by_role("button", name="Create a project").click()
    page.get_by_label("Name").fill("poetry")
    page.get_by_role("button", name="Create", exact=True).click()
    row = page.locator("section[aria-label=Projects] tr", has_text="poetry")
    row.get_by_role("button", name=re.compile("Limits")).click()
    page.get_by_label("Tokens per day", exact=True).fill("5000")
    page.get_by_label("Money per month").fill("12.50")
    page.get_by_role("button", name="Set", exact=True).click()
    row.filter(has_text="tokens per day 5,000, money per month 12.5").wait_for()
    quota = Tenants(server.services.db).project("poetry").quota
    assert (quota.tokens_per_day, quota.spend_per_month) == (5000, 1250)
    page.get_by_role("button", name="Invite somebody").click()
    page.get_by_label("E-mail address").fill("not an address")
    page.get_by_role("button", name="Invite", exact=True).click()
    page.wait_for_selector("text='not an address' is no e-mail address.")
    page.get_by_role("button", name="Invite somebody").click()
    page.get_by_label("E-mail address").fill("Mary@example.org")
    page.get_by_label("Project", exact=True).select_option(label="poetry")
    page.get_by_role("button", name="Invite", exact=True).click()
    page.locator("tr", has_text="mary@example.org").filter(has_text="poetry (member)").wait_for()


def test_the_report_of_a_dataset_is_shown_and_runs_nothing(visit: Visit) -> None:
    page = visit("/data")
    page.get_by_role("link", name=re.compile("tokens-")).click()
    page.wait_for_selector("text=PSF-2.0")
    report = page.frame_locator("iframe")
    report.locator("h1").wait_for()
    source = page.locator("iframe").get_attribute("src")
    answer = page.request.get(str(source))
    assert "sandbox" in answer.headers["content-security-policy"]


def test_a_file_goes_up_and_down_and_away(visit: Visit, tmp_path: Path) -> None:
    page = visit("/files")
    local = tmp_path / "talks.jsonl"
    local.write_text(
        '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}\n'
    )
    page.get_by_label("File", exact=True).set_input_files(local)
    page.get_by_role("button", name="Upload").click()
    page.wait_for_selector("text=talks.jsonl is there as file-")
    with page.expect_download() as download:
        page.get_by_role("link", name="talks.jsonl").click()
    assert Path(download.value.path()).read_text() == local.read_text()
    row = page.get_by_role("row").filter(has_text="talks.jsonl")
    row.get_by_role("button", name=re.compile("Delete file-")).click()
    page.get_by_role("button", name="Delete it").click()
    row.wait_for(state="detached")


def test_the_audit_log_is_filtered_and_verified(visit: Visit) -> None:
    page = visit("/audit")
    page.get_by_role("button", name="Verify the chain").click()
    page.wait_for_selector("text=entries are there, unchanged and in order")
    page.get_by_label("Did").fill("release.create")
    page.wait_for_function("document.querySelectorAll('tbody tr').length === 2")


def test_runs_are_compared_in_one_chart(visit: Visit) -> None:
    page = visit("/training")
    boxes = page.get_by_role("checkbox", name=re.compile("Compare poems"))
    boxes.nth(0).check()
    boxes.nth(1).check()
    chart = page.get_by_role("img", name=re.compile(r"Loss .*Last values: poems-.*, poems-"))
    chart.wait_for()
    page.get_by_role("link", name=re.compile("poems-")).first.click()
    page.wait_for_selector("text=productive steps")
    page.wait_for_selector("text=steps = 400")


def test_usage_is_exported_as_it_is_shown(visit: Visit) -> None:
    page = visit("/usage")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export CSV").click()
    lines = Path(download.value.path()).read_text().splitlines()
    tokens = sum(int(line.split(",")[4]) + int(line.split(",")[6]) for line in lines[1:] if ",model," in line)
    shown = page.locator("section[aria-label='By model'] td[data-label=Tokens]").all_inner_texts()
    assert tokens == sum(int(text.replace(",", "")) for text in shown) > 0


def test_a_member_sees_only_the_own_project(visit: Visit, server: RunningServer) -> None:
    reader = ApiKeys(server.services.db).create(
        "reader", "test", project="support", scopes=Role.READER.scopes
    )[1]
    page = visit("/usage", key=reader)
    page.wait_for_selector("text=Nothing was used in these days.")
    links = page.locator("nav a").all_inner_texts()
    assert "Audit" not in links and "Playground" not in links
    page.goto("/console/audit")
    page.wait_for_selector("text=it lacks the scope 'admin'")
    run, _ = server.services.eval_runs.recent(DEFAULT, 1)[0]
    for path, text in (
        ("/training", "No job yet."),
        ("/jobs", "Nothing waits"),
        ("/batches", "No batch yet."),
        ("/evals", "No eval was run yet."),
        (f"/evals/{run.eval_id}/runs/{run.id}", "There is no eval"),
        ("/members", "reader"),
    ):
        page.goto(f"/console{path}")
        page.wait_for_selector(f"text={text}")
        assert "poems" not in page.content() and "nightly" not in page.content()
