"""The `lapis` command: nouns then verbs. A command's module is imported only when that command runs."""

from __future__ import annotations

import importlib
import os
import sys
import traceback

import click

from lapis.errors import InputError, LapisError, nearest

# name: (module, one sentence for --help). The sentence stands here so that help imports no command.
COMMANDS = {
    "quickstart": ("quickstart", "From raw text to an answer on this machine, in one command."),
    "data": ("data", "Prepare and inspect datasets: clean text, token shards."),
    "tokenizer": ("tokenizer", "Train a tokenizer, encode text with it."),
    "train": ("train", "Train a model by a recipe."),
    "evaluate": ("evaluate", "Measure a run, a release or a model in bits per byte."),
    "runs": ("runs", "List, show and plot training runs."),
    "release": ("release", "Create, approve, retire and show releases."),
    "models": ("models", "List, show, pull, export and remove models."),
    "pull": ("pull", "Fetch a model: a known name, a GGUF file, a Hugging Face folder, hf:owner/name."),
    "serve": ("serve", "Serve models through the OpenAI-compatible API."),
    "chat": ("chat", "Talk with a model in the terminal."),
    "jobs": ("jobs", "Submit, list, show, cancel and follow jobs of the queue."),
    "cluster": ("cluster", "Slurm's accounts and usage, manifests for Kubernetes."),
    "keys": ("keys", "Create, list and revoke API keys."),
    "projects": ("projects", "Create, list, limit and archive projects."),
    "users": ("users", "Add, list and remove users."),
    "backup": ("backup", "Write the whole state of this installation into one file."),
    "restore": ("restore", "Put a backup back."),
    "audit": ("audit", "Verify, list and export the audit log."),
    "config": ("config", "Print every setting of a recipe."),
    "doctor": ("doctor", "Tell what this machine has, what is missing, and where things lie."),
}

HIDDEN = {"finetuning": "finetuning"}  # what the server's queue starts

INTERNAL = 70  # EX_SOFTWARE of sysexits.h


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports one only when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        name = HIDDEN.get(cmd_name) or COMMANDS.get(cmd_name, ("",))[0]
        if not name:
            return None
        module = importlib.import_module(f"lapis.cli.{name}")
        found: click.Command = getattr(module, "group", None) or module.command
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in {**COMMANDS, **HIDDEN}:
            ctx.fail(f"No such command {args[0]!r}. {nearest(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lapis", message="lapis %(version)s")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def lapis(debug: bool) -> None:
    """Lapis trains and runs AI models: raw text to an answer, every step traceable."""


def main() -> None:
    """Run the command line. Errors print cause and next step, and end with their own exit status."""
    # Before torch loads its OpenMP: threads that wait spin only for microseconds, then sleep. With the default, two
    # busy processes on the same cores slow each other down sixfold; alone it makes no difference (docs/benchmarks.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    debug = "--debug" in sys.argv[1:]
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        lapis.main(args=arguments, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        _leave(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        # click has ended the line in which the terminal shows ^C
        print("Interrupted; what was complete is kept.", file=sys.stderr)
        _leave(130)
    except BrokenPipeError:
        _leave(141)
    except LapisError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        _leave(error.exit_status)
    except Exception as error:  # noqa: BLE001 - the last line of defence: a defect of ours, said without a traceback
        if debug:
            traceback.print_exc()
        wrong = next((text for text in arguments if not _is_utf8(text)), None)
        if isinstance(error, UnicodeEncodeError) and wrong is not None:
            print(f"error: The argument {wrong[:200]!r} cannot be used: it is not UTF-8.", file=sys.stderr)
            _leave(InputError.exit_status)
        print(f"error: a defect in Lapis: {type(error).__name__}: {error}", file=sys.stderr)
        print(
            "Nothing that was complete is lost. `lapis --debug …` shows where it happened.", file=sys.stderr
        )
        _leave(INTERNAL)


def _is_utf8(text: str) -> bool:
    """Whether an argument can be written as text: bytes of it that are not UTF-8 came as surrogates."""
    return text == text.encode(errors="replace").decode()


def _leave(status: int) -> None:
    """End now: worker threads and pools of an interrupted command must not hold the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
