# SPDX-License-Identifier: Apache-2.0
"""Entry point of the command line; loads a command's module only when that command runs."""

from __future__ import annotations

import ast
import importlib
import io
import sys
from pathlib import Path
from typing import Any

import click

from flashllm import __version__
from flashllm.cli._cases import BadUsage
from flashllm.errors import ArgumentError, FlashLLMError
from flashllm.statuses import INTERRUPTED

_HERE = Path(__file__).parent


class LazyGroup(click.Group):
    """Group whose commands are the modules beside this one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        stems = (file.stem for file in _HERE.glob("*.py"))
        return sorted(stem.replace("_", "-") for stem in stems if stem != "main" and not stem.startswith("_"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"flashllm.cli.{cmd_name.replace('-', '_')}")
        command = module.command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _summary(name)) for name in self.list_commands(ctx)])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)
        except ArgumentError as error:
            if ctx.params.get("traceback"):
                raise
            raise BadUsage(str(error)) from error
        except MemoryError as error:  # NumPy's message says how much was requested
            if ctx.params.get("traceback"):
                raise
            raise click.ClickException(str(error) or "out of memory") from error
        except (FlashLLMError, OSError) as error:
            if ctx.params.get("traceback") or isinstance(error, BrokenPipeError):
                raise
            raise click.ClickException(str(error)) from error


def _summary(name: str) -> str:
    """First docstring line of a command's module, read from its source."""
    text = (_HERE / f"{name.replace('-', '_')}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(text)) or "").split("\n", 1)[0]


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="`flashllm COMMAND --help` describes one command; `flashllm doctor` checks this machine.",
)
@click.version_option(__version__, prog_name="flashllm")
@click.option("--traceback", is_flag=True, help="Show the Python traceback of an error.")
def command(traceback: bool) -> None:
    """Unstructured-sparse LLM weights on GPU tensor cores."""


def main() -> None:
    """Run the command line and exit."""
    for stream in (sys.stdout, sys.stderr):
        # Generated text and names of files may hold characters that the terminal's encoding lacks: no reason to fail.
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    command(prog_name="flashllm")
