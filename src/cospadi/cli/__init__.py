"""The command line. `--help` does not import torch: each command imports what it needs when it runs."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any, TextIO

from cospadi.cli.common import UsageError
from cospadi.errors import CospadiError

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def main() -> None:
    """Run a command and exit: 0 done, 1 failed with a clear message, 2 wrong usage, 130 interrupted."""
    debug = "--debug" in sys.argv
    sys.argv = [arg for arg in sys.argv if arg != "--debug"]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stream in (sys.stdout, sys.stderr):
        _replace_what_cannot_be_written(stream)
    shown, warnings.showwarning = warnings.showwarning, _warn
    try:
        code = _run(sys.argv[1:])
    except UsageError as error:
        code = _complain(str(error), USAGE, debug)
    except CospadiError as error:
        code = _complain(str(error), FAILED, debug)
    except KeyboardInterrupt:
        durable = sys.argv[1:2] in (["compress"], ["demo"])
        rest = "; run the same command again to resume" if durable else ""
        code = _complain(f"interrupted{rest}", INTERRUPTED, debug)
    except BrokenPipeError:  # the reader of our output has gone, as in `cospadi methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED
    except Exception as error:
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        message = f"internal error: {what}; please report it with the output of --debug"
        if _is_out_of_memory(error):
            message = "out of memory: close other programs, raise the memory limit, or use a machine with more memory"
        code = _complain(message, FAILED, debug)
    finally:
        warnings.showwarning = shown
    sys.exit(code)


def _replace_what_cannot_be_written(stream: TextIO) -> None:
    """Write replacement characters where an encoding lacks ours (a redirected Windows console), instead of failing."""
    reconfigure = getattr(stream, "reconfigure", None)  # streams that stand in for a console may have none
    if reconfigure is not None:
        reconfigure(errors="replace")


def _run(arguments: list[str]) -> int:
    """Parse and run; errors of the parser become a :class:`UsageError` of one line."""
    import typer

    from cospadi.cli.app import app

    command = typer.main.get_command(app)
    if "_COSPADI_COMPLETE" in os.environ:  # a shell asks for completions; click answers and exits
        command.main(prog_name="cospadi")
    context: Any = None
    try:
        with command.make_context("cospadi", list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as end:
        return int(end.exit_code)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except Exception as error:
        # depending on its version, typer uses its own copy of click or the installed one; both have this method
        text = getattr(error, "format_message", None)
        if text is None:
            raise
        where = getattr(error, "ctx", None) or context
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(where.get_help(), err=True)
            return USAGE
        path = where.command_path if where is not None else "cospadi"
        raise UsageError(f"{text().rstrip('. ')}; see {path} --help") from None
    return DONE


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out outside the guarded places, for example while a library was being loaded."""
    words = ("failed to map segment", "cannot allocate memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Show a user's warning on one line without its source location, and any other as Python does."""
    if not issubclass(category, UserWarning):
        (file or sys.stderr).write(warnings.formatwarning(message, category, filename, lineno, line))
        return
    from rich.console import Console

    text = " ".join(str(message).split())
    Console(stderr=True, highlight=False).print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)


def _complain(message: str, code: int, debug: bool) -> int:
    """Print an error on one line."""
    if debug:
        import traceback

        traceback.print_exc()
    from rich.console import Console
    from rich.text import Text

    line = Text.assemble(("Error: ", "bold red"), " ".join(message.splitlines()))
    Console(stderr=True, highlight=False).print(line, soft_wrap=True)
    return code
