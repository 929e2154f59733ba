"""``python -m tokprune.cli.llava_v1`` (from a checkout also ``python -m patches.llava``): run a
script of the original llava package, compressed."""

from __future__ import annotations

import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

import typer

from tokprune.cli.app import BadInput, new_app
from tokprune.cli.method import Keep, Name, Options, Setting, method_options, named_method

#: exit code where the script ended well, but nothing was compressed
NOTHING_COMPRESSED = 3

app = new_app("python -m tokprune.cli.llava_v1")


@app.command(
    context_settings={"allow_extra_args": True},
    options_metavar="[OPTIONS] -- -m MODULE | SCRIPT.py [ARGS]...",
)
def main(
    context: typer.Context,
    method: Name = None,
    keep: Keep = None,
    option: Options = None,
    setting: Setting = None,
) -> None:
    """Run an unmodified script of the original llava package with compressed visual tokens.

    After '--' comes what would follow 'python': '-m llava.eval.model_vqa_loader --model-path …', or
    a script and its arguments. At the end a summary of the compression goes to stderr. The exit
    code is the script's, or 3 where the script ended well but no image went through a patched
    model.
    """
    made = named_method(method, method_options(keep, option), setting)
    if made is None:
        raise BadInput("give --method (see 'tokprune methods') or --setting")
    target = list(context.args)
    if not target or target == ["-m"]:
        raise BadInput("what to run is missing: -- -m MODULE [ARGS]..., or -- SCRIPT.py [ARGS]...")
    try:
        import llava.model.builder  # noqa: F401
    except ImportError as error:
        from tokprune.integrations.llava_v1.loading import INSTALL

        raise BadInput(f"the original llava package is needed ({error}); {INSTALL}") from None
    from tokprune.integrations.llava_v1.load_time import installed

    with installed(made) as traces:
        code = _run(target)
    sys.exit(_report(traces, repr(made), code))


def _run(target: list[str]) -> Any:
    """Run a module or a script as ``__main__``; returns its exit code as ``sys.exit`` takes it (1,
    after the traceback, where it raised)."""
    before, path = sys.argv, list(sys.path)
    try:
        if target[0] == "-m":
            sys.argv = target[1:]  # runpy puts the module's file in front
            runpy.run_module(target[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = target
            sys.path.insert(0, str(Path(target[0]).resolve().parent))
            runpy.run_path(target[0], run_name="__main__")
    except SystemExit as stop:
        return stop.code
    except Exception:  # the script's own, no bad input of this command
        traceback.print_exc()
        return 1
    finally:
        sys.argv, sys.path[:] = before, path
    return 0


def _report(traces: list[Any], method: str, code: Any) -> Any:
    prefills = sum(trace.prefills for trace in traces)
    for trace in traces:
        if trace.prefills:
            print(
                f"\n{method}: {trace.prefills} prompt(s) compressed; the last one:", file=sys.stderr
            )
            print(trace.summary(), file=sys.stderr)
    if prefills:
        return code
    why = (
        "no image went through the model"
        if traces
        else "no model was loaded by llava.model.builder.load_pretrained_model"
    )
    print(f"\nWARNING: {method}: nothing was compressed: {why}", file=sys.stderr)
    return code or NOTHING_COMPRESSED


if __name__ == "__main__":
    app()
