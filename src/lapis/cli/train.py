"""`lapis train RECIPE`: prepare the data if needed, then train; run again to go on where it stopped."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lapis.cli.output import json_option, print_json, print_table, say

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from lapis.home import Home
    from lapis.train.inspection import ShownText
    from lapis.train.launch import Program, Ranks
    from lapis.train.objective import Objective
    from lapis.train.recipe import Recipe
    from lapis.train.run import Run, RunSummary

SHOWN = 6  # texts of a batch; --json has all


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "sets", multiple=True, metavar="a.b=c", help="Override one setting; repeatable.")
@click.option(
    "--workers", type=click.IntRange(min=0), default=0, help="Processes for the data; 0 is one per core."
)
@click.option("--ranks", type=click.IntRange(min=1), help="Train by so many processes, under a supervisor.")
@click.option(
    "--spares",
    type=click.IntRange(min=0),
    default=0,
    help="Devices beyond --ranks, to replace one that is lost.",
)
@click.option(
    "--nodes",
    type=click.IntRange(min=1),
    help="In a Slurm job: spread --ranks over so many of its nodes; the others are spare.",
)
@click.option("--dry-run", is_flag=True, help="Show what each of --ranks would hold, and start nothing.")
@click.option(
    "--memory",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GB",
    help="With --dry-run: what a rank has; fails if one needs more.",
)
@click.option(
    "--new-segment",
    is_flag=True,
    help="Let another mixture of the data begin at the run's last checkpoint.",
)
@click.option("--inspect", is_flag=True, help="Show what the first batch trains on, and train nothing.")
@json_option
def command(
    recipe: Path,
    sets: tuple[str, ...],
    workers: int,
    ranks: int | None,
    spares: int,
    nodes: int | None,
    dry_run: bool,
    memory: float | None,
    new_segment: bool,
    inspect: bool,
    as_json: bool,
) -> None:
    """Train a model by RECIPE. A run that was stopped or killed goes on from its last checkpoint."""
    from lapis import config
    from lapis.home import Home
    from lapis.train.recipe import Recipe

    if memory is not None and not dry_run:
        raise click.UsageError("--memory is checked with --dry-run alone: it limits no training.")
    if spares and ranks is None:
        raise click.UsageError("--spares are devices beyond --ranks: say how many ranks.")
    home = Home.default()
    # Before torch is imported: what is wrong with the recipe is told at once.
    resolved = config.load(recipe, Recipe, sets)
    if dry_run:
        _dry_run(resolved, home, ranks, memory, as_json)
        return
    if nodes is not None and (ranks is None or spares):
        raise click.UsageError("--nodes spreads --ranks over nodes; all other nodes of the job are spare.")
    _train(
        resolved,
        home,
        workers=workers,
        ranks=ranks,
        spares=spares,
        nodes=nodes,
        new_segment=new_segment,
        inspect=inspect,
        as_json=as_json,
    )


def _train(
    resolved: Recipe,
    home: Home,
    *,
    workers: int,
    ranks: int | None,
    spares: int,
    nodes: int | None,
    new_segment: bool,
    inspect: bool,
    as_json: bool,
) -> None:
    from dataclasses import asdict

    from lapis import config
    from lapis.kernels.ops import select
    from lapis.log import progress
    from lapis.train.float8 import require_float8
    from lapis.train.rank import program
    from lapis.train.samples import sample_prompts
    from lapis.train.segments import settle
    from lapis.train.start import check_best, checked_shape, first_model, with_own_tokenizer
    from lapis.train.supervisor import train_ranks
    from lapis.train.trainer import find_or_create, train
    from lapis.train.world import first_alone, is_first, started

    if resolved.data is not None:
        resolved = with_own_tokenizer(resolved, home)
    size = ranks or started()
    mesh = resolved.mesh(size)
    if not inspect:
        mesh.require(size)
        if resolved.train.fp8:
            require_float8(select(64).device)
    with first_alone():
        objective = _objective(resolved, home, workers)
        shape = checked_shape(resolved, objective.tokenizer, home, mesh)  # before there is a run
        check_best(resolved, objective)
        sample_prompts(resolved, objective, shape, home)
        if inspect:
            if resolved.grpo is None:
                _inspect(objective, as_json)
            else:
                objective.begin(first_model(resolved, shape, home))
                _inspect_answers(objective, as_json)
            return
        run = find_or_create(home, resolved, config.to_toml(resolved), objective)
        settle(run, resolved, new_segment)
    if not is_first():
        train(resolved, objective, run)
        return
    if not as_json and run.status() == "finished":
        say(f"{run.id}: it is finished already, so nothing is trained")
    elif not as_json:
        say(f"{run.id}: training on {objective.facts()['tokens']:,} tokens")
    try:
        if ranks is None:
            with progress("train") as report:
                train(resolved, objective, run, report)
        else:
            launch = _launch(
                program(home, run, objective, resolved.train), ranks, spares, nodes, resolved, run
            )
            train_ranks(run, launch, resolved.supervisor)
    except KeyboardInterrupt:
        _say_stopped(run)
        raise
    summary = run.summary()
    if as_json:
        print_json(asdict(summary))
        return
    _say_summary(run.id, summary, evaluable=resolved.data is not None)


def _say_stopped(run: Run) -> None:
    if run.status() == "stopped":
        step = run.events.read("end")[-1]["step"]
        text = (
            f"{run.id}: stopped at step {step:,}, which is in a checkpoint; the same command goes on from it"
        )
        print(text, file=sys.stderr)


def _say_summary(run_id: str, summary: RunSummary, evaluable: bool) -> None:
    loss = "no loss, for every step was skipped" if summary.loss is None else f"loss {summary.loss:.4f}"
    say(f"{run_id}: step {summary.step:,}, {loss}, {summary.seconds:,.0f} s of training")
    release = f"lapis release create NAME --run {run_id}"
    if evaluable:
        say(f"Next: lapis evaluate {run_id}   lapis runs plot {run_id}   {release}")
    else:
        say(f"Next: lapis models export {run_id} FOLDER   {release}")


def _launch(
    program: Program, ranks: int, spares: int, nodes: int | None, recipe: Recipe, run: Run
) -> Callable[[Path], AbstractContextManager[Ranks]]:
    """How the ranks are started: here, or over the nodes of the Slurm job that this runs in."""
    from lapis.train.allocation import slurm_allocation
    from lapis.train.launch import Group
    from lapis.train.nodes import NodeGroup

    if nodes is None:
        return lambda folder: Group(program, ranks, folder, spares)
    allocation = slurm_allocation(ranks, nodes)
    lease = recipe.supervisor.node_seconds
    return lambda folder: NodeGroup(program, ranks, nodes, folder, allocation, lease, run.events)


def _dry_run(recipe: Recipe, home: Home, ranks: int | None, memory: float | None, as_json: bool) -> None:
    from dataclasses import asdict

    from lapis.model.layout import read_config
    from lapis.train import layout
    from lapis.train.base import model_folder

    source = recipe.model.source
    config = (
        recipe.model.resolve(recipe.tokenizer.vocab_size)
        if source is None
        else read_config(model_folder(source, home))
    )
    mesh = recipe.mesh(ranks or 1)
    mesh.require(ranks)
    layouts = layout.plan(config, mesh, recipe.train, recipe.answers)
    if as_json:
        facts = [{**asdict(rank), "place": rank.place._asdict(), "total": rank.total} for rank in layouts]
        print_json({"mesh": str(mesh), "parameters": config.parameters, "ranks": facts})
    else:
        say(f"{config.parameters:,} parameters on {mesh.size} ranks: {str(mesh) or 'one process'}")
        print_table(
            ("ranks", "layers", "heads", "experts", "parameters", "GB", "of it activations"),
            layout.rows(layouts),
        )
    if memory is not None:
        layout.check_memory(layouts, int(memory * 1e9))


def _objective(recipe: Recipe, home: Home, workers: int) -> Objective:
    """Prepare what the recipe trains on; all that is wrong with it is said here, before any training."""
    from lapis.data.pipeline import prepare
    from lapis.log import progress
    from lapis.train.base import fine_tuning
    from lapis.train.pretrain import Pretraining

    with progress("data") as report:
        if recipe.data is None:
            return fine_tuning(recipe, home, report)
        dataset = prepare(recipe.data, recipe.tokenizer, home, workers=workers, progress=report)
        return Pretraining(recipe.train, dataset, recipe.mixture)


def _inspect(objective: Objective, as_json: bool) -> None:
    from dataclasses import asdict

    from lapis.train.inspection import shown_texts

    batch = objective.step(0, 0, 1)
    texts = list(shown_texts(batch.micros, objective.tokenizer))
    tokens, trained = (sum(getattr(text, name) for text in texts) for name in ("tokens", "trained"))
    if as_json:
        rows = [{"tokens": text.tokens, "trained": text.trained, **asdict(text)} for text in texts]
        counts = {"tokens": tokens, "trained": trained, "micro_batches": len(batch.micros)}
        print_json({**dict(objective.facts()), "batch": {**counts, "texts": rows}})
        return
    _say_facts(objective)
    say(
        f"The first step: {len(texts):,} texts in {len(batch.micros):,} micro-batches, {tokens:,} tokens, "
        f"{trained:,} of them trained on ({_marked('like this')})."
    )
    for number, text in enumerate(texts[:SHOWN], 1):
        say(f"\n--- text {number}: {text.tokens:,} tokens, {text.trained:,} trained on")
        say(_plain_or_marked(text))
    if len(texts) > SHOWN:
        say(f"\n… and {len(texts) - SHOWN:,} more; --json shows all.")


def _inspect_answers(objective: Objective, as_json: bool) -> None:
    """The first prompts as the model sees them, and the first one's group of answers with their rewards."""
    from lapis.train.grpo import GroupRelative

    assert isinstance(objective, GroupRelative), "the recipe was checked"
    asked = objective.prompts_of(0)
    prompts = [objective.tokenizer.decode(one.ids, special=True) for one in asked]
    group = objective.graded(0, most=1)
    if as_json:
        answers = [{"reward": one.reward, "advantage": one.advantage, "text": one.answer.text,
                    "tokens": len(one.answer.ids), "cut": one.answer.cut} for one in group]  # fmt: skip
        facts = {"place": asked[0].place, "answers": answers}
        print_json({**dict(objective.facts()), "prompts": prompts, "group": facts})
        return
    _say_facts(objective)
    for one, prompt in list(zip(asked, prompts, strict=True))[:SHOWN]:
        say(f"\n--- {one.place}: a prompt of {len(one.ids):,} tokens\n{prompt}")
    say(f"\nThe first step's answers to {asked[0].place}, graded by {objective.reward.name}:")
    for graded in group:
        size = f"{len(graded.answer.ids):,} tokens" + (", cut off" if graded.answer.cut else "")
        say(f"\n--- reward {graded.reward:.3g}, advantage {graded.advantage:+.2f}, {size}")
        say(graded.answer.text)


def _say_facts(objective: Objective) -> None:
    facts = ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in objective.facts().items()
                      if isinstance(value, int))  # fmt: skip
    say(f"The whole set: {facts}.")


def _plain_or_marked(text: ShownText) -> str:
    return "".join(_marked(piece.text) if piece.trained else piece.text for piece in text.pieces)


def _marked(text: str) -> str:
    """Underlined and green in a terminal; elsewhere between two marks."""
    import sys

    return click.style(text, fg="green", underline=True) if sys.stdout.isatty() else f"⟦{text}⟧"
