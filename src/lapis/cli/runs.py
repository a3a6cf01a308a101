"""`lapis runs`: list, show and plot training runs."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lapis.cli.output import json_option, print_json, print_table, say

if TYPE_CHECKING:
    from lapis.train.run import Run


RESTARTS = 5  # shown, of those that there were


@click.group()
def group() -> None:
    """List, show and plot training runs."""


@group.command("list")
@json_option
def list_runs(as_json: bool) -> None:
    """All runs, the oldest first."""
    from lapis.home import Home
    from lapis.train.run import Run

    home = Home.default()
    summaries = [run.summary() for run in Run.list(home)]
    if as_json:
        print_json([asdict(summary) for summary in summaries])
        return
    if not summaries:
        say(f"No runs below {home.runs} yet: `lapis train RECIPE.toml` or `lapis quickstart` makes one.")
        return
    columns = ("run", "status", "begun", "parameters", "step", "tokens", "loss", "bits per byte", "time")
    print_table(
        columns,
        [
            (
                summary.id,
                summary.status,
                _when(summary.created),
                summary.parameters,
                summary.step,
                summary.tokens,
                summary.loss,
                summary.bits_per_byte,
                _duration(summary.seconds),
            )
            for summary in summaries
        ],
    )


@group.command()
@click.argument("run")
@json_option
def show(run: str, as_json: bool) -> None:
    """What is known of a run, and its curve of loss or reward. RUN is an id, the beginning of one, or `last`."""
    from lapis.home import Home
    from lapis.train.run import Run

    found = Run.find(Home.default(), run)
    facts = _facts(found)
    if as_json:
        print_json(facts)
        return
    _say_facts(found, facts)
    _say_mixture(facts)
    _say_goodput(facts["goodput"])
    _say_ranks(facts)
    _say_checkpoints(facts)
    _say_evaluation(facts["evaluation"])
    _say_samples(facts["samples"])
    _say_curve(found.steps())
    say(f"Recipe: {found.folder / 'recipe.toml'}")
    say(f"Next: lapis runs plot {found.id}   lapis evaluate {found.id}")


@group.command()
@click.argument("run")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file; by default RUN.png in this folder.",
)
@json_option
def plot(run: str, out: Path | None, as_json: bool) -> None:
    """Draw loss or reward, tokens/s and learning rate to a PNG. RUN is an id, the beginning of one, or `last`."""
    from lapis.checkpoint.folder import listing
    from lapis.cli import curve
    from lapis.errors import ConflictError, InputError
    from lapis.home import Home
    from lapis.storage import storage_errors
    from lapis.train.run import Run

    found = Run.find(Home.default(), run)
    steps = found.steps()
    if not steps:
        raise ConflictError(
            f"The run {found.id} has no steps to draw yet.", hint=f"lapis runs show {found.id}"
        )
    out = out or Path(f"{found.id}.png")
    resumes = [event["step"] for event in found.events.read("resume")]
    kept = [checkpoint.step for checkpoint in listing(found.checkpoints)[0]]
    try:
        with storage_errors(out):
            curve.plot(steps, _title(found), resumes, kept, out)
    except OSError as error:
        raise InputError(
            f"{out} cannot be written: {error.strerror}.", hint="Name another file: --out"
        ) from error
    if as_json:
        print_json({"run": found.id, "file": str(out.absolute()), "steps": steps[-1]["step"]})
    else:
        say(f"{out}: {len(steps):,} points up to step {steps[-1]['step']:,}")


def _facts(run: Run) -> dict[str, Any]:
    from lapis.checkpoint.folder import listing
    from lapis.train.goodput import account
    from lapis.train.segments import segments_of_run, shares

    events = run.events.read()
    starts = [event for event in events if event["event"] == "start"]
    steps, samples = run.steps(), run.samples()
    whole, damaged = listing(run.checkpoints)
    goodput = account(events)
    best = min((item.manifest.score for item in whole if item.manifest.score is not None), default=math.nan)
    return {
        **asdict(run.summary()),
        "folder": str(run.folder),
        "start": _without_mark(starts[-1]) if starts else None,
        "resumes": sum(event["event"] == "resume" for event in events),
        "restarts": [_without_mark(event) for event in events if event["event"] == "restart"],
        "slow_ranks": [_without_mark(event) for event in events if event["event"] == "slow_rank"],
        "last_step": _without_mark(steps[-1]) if steps else None,
        "bad_steps": [_without_mark(event) for event in events if event["event"] == "bad_step"],
        "goodput": {**asdict(goodput), "ratio": goodput.ratio} if goodput else None,
        "checkpoints": [
            {
                "step": item.step,
                "bytes": item.bytes,
                "digest": item.digest,
                "folder": str(item.folder),
                "heldout_loss": item.manifest.score,
                "best": item.manifest.score == best,
            }
            for item in whole
        ],
        "damaged_checkpoints": [error.message for error in damaged],
        "evaluation": run.evaluation(),
        "samples": _without_mark(samples[-1]) if samples else None,
        "segments": [{**asdict(segment), "digest": segment.digest} for segment in segments_of_run(run)],
        "consumed": [share._asdict() for share in shares(run)],
    }


def _say_facts(run: Run, facts: dict[str, Any]) -> None:
    start, last = facts["start"] or {}, facts["last_step"] or {}
    lines = {
        "status": facts["status"],
        "begun": f"{_when(facts['created'])}, {_duration(facts['seconds'])} of training"
        + (f", resumed {facts['resumes']}×" if facts["resumes"] else ""),
        "model": _some("{:,} parameters", start.get("parameters")),
        "data": _some("{:,} training tokens", start.get("tokens")),
        "dataset": start.get("dataset") or start.get("dataset_digest"),
        "kernels": _kernels(start),
        "step": _some("{:,}", last.get("step")),
        "tokens seen": _some("{:,}", last.get("tokens")),
        "loss": _some("{:.4f}" if "reward" in last else "{:.4f} nats per token", last.get("loss")),
        "reward": _some("{:.4f} in the mean", last.get("reward")),
        "speed": _some("{:,.0f} tokens/s", last.get("tokens_per_s")),
        "MFU": _some("{:.2f}", last.get("mfu")),
        "memory": _some("{:,.0f} MB at most", last["memory"] / 1e6 if "memory" in last else None),
        "bad steps": _some("{:,} (see events.jsonl)", len(facts["bad_steps"]) or None),
        "folder": facts["folder"],
    }
    say(run.id)
    for name, value in lines.items():
        if value is not None:
            say(f"  {name:<12} {value}")


def _say_mixture(facts: dict[str, Any]) -> None:
    from lapis.data.mixture import describe_weights

    for segment in facts["segments"]:
        text = describe_weights(segment["weights"], segment["epochs"])
        say(f"  {'mixture':<12} from step {segment['from_step']:,}: {text}")
    for share in facts["consumed"]:
        seen = f"{share['tokens']:,} tokens seen, {share['epochs']:.2f} epochs"
        say(f"  {'':<12} {share['part']:>6.1%}  {share['source']}: {seen}")


def _say_goodput(goodput: dict[str, Any] | None) -> None:
    if goodput is None:
        return
    from lapis.train.goodput import NAMES

    wall = goodput["wall_s"]
    say(f"  {'goodput':<12} {goodput['ratio']:.1%} of {_duration(wall)} was productive; the rest:")
    for cause, seconds in sorted(goodput["lost_s"].items(), key=lambda item: -item[1]):
        say(f"  {'':<12} {seconds / wall:>6.1%}  {seconds:>10,.1f} s  {NAMES[cause]}")


def _say_ranks(facts: dict[str, Any]) -> None:
    restarts, slow = facts["restarts"], facts["slow_ranks"]
    if len(restarts) > RESTARTS:
        say(f"  {'restarts':<12} {len(restarts)}, the last {RESTARTS}:")
    for event in restarts[-RESTARTS:]:
        say(f"  {'restart':<12} from step {event['step']:,}: {event['cause']}")
    for rank in sorted({event["rank"] for event in slow}):
        worst = max(event["times"] for event in slow if event["rank"] == rank)
        say(f"  {'slow':<12} rank {rank}: its own work took up to {worst:.1f} times that of the others")


def _say_checkpoints(facts: dict[str, Any]) -> None:
    for item in facts["checkpoints"]:
        size = f"{item['bytes'] / 1e6:,.1f} MB"
        told = _some(", held-out loss {:.4f}", item["heldout_loss"]) or ""
        told += ", the best" if item["best"] else ""
        say(f"  {'checkpoint':<12} step {item['step']:,}, {size}, {item['digest'][:12]}{told}")
    for message in facts["damaged_checkpoints"]:
        say(f"  {'damaged':<12} {message}")


def _say_evaluation(evaluation: dict[str, Any] | None) -> None:
    if evaluation is None:
        return
    yardsticks = ", ".join(f"{name} {bits:.3f}" for name, bits in evaluation.get("yardsticks", {}).items())
    bits = f"{evaluation['bits_per_byte']:.3f} bits per byte of held-out text"
    say(f"  {'evaluation':<12} {bits} ({yardsticks})")


def _say_samples(event: dict[str, Any] | None) -> None:
    """What the model wrote last: a prompt behind a mark, then how it went on."""
    if event is None:
        return
    say(f"  {'samples':<12} of step {event['step']:,}:")
    for one in event["samples"]:
        reward = _some("   reward {:.3g}", one.get("reward")) or ""
        for mark, text in (("›", one["prompt"]), (" ", one["text"] + reward)):
            for line in text.splitlines() or [""]:
                say(f"  {'':<12} {mark} {_printable(line)}")


def _printable(line: str) -> str:
    """A line without what a terminal would obey."""
    return "".join(letter for letter in line.expandtabs(4) if letter.isprintable())


def _say_curve(steps: Sequence[dict[str, Any]]) -> None:
    """The loss, or the reward where there is one: the loss then tells nothing."""
    from lapis.cli import curve

    key = curve.told_by(steps)
    points = [(step["step"], step[key]) for step in steps if step.get(key) is not None]
    if len({step for step, _ in points}) < 2:
        return
    width = min(100, shutil.get_terminal_size((80, 24)).columns)
    say()
    unit = ", nats per token" if key == "loss" else ""
    say(f"  {key}{unit} (mean per column; logarithmic steps)")
    for line in curve.braille([step for step, _ in points], [value for _, value in points], width - 2):
        say("  " + line)
    say()


def _title(run: Run) -> str:
    from lapis.train.goodput import account

    summary, goodput = run.summary(), account(run.events.read())
    parts = [run.id, _some("{:,} parameters", summary.parameters), summary.status]
    parts.append(_some("{:.3f} bits per byte", summary.bits_per_byte))
    parts.append(_some("{:.1%} goodput", goodput.ratio if goodput else None))
    return " · ".join(part for part in parts if part)


def _kernels(start: dict[str, Any]) -> str | None:
    if "kernels" not in start:
        return None
    exact = "the same bits in training and serving" if start.get("bit_exact") else "not bit-exact"
    return f"{start['kernels']}, {exact}"


def _some(form: str, value: object) -> str | None:
    return None if value is None else form.format(value)


def _without_mark(event: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in event.items() if key != "event"}


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
