"""The command ``demo``."""

from __future__ import annotations

import click

from mandapa.cli.session import EMBEDDED, Session, common, pass_session
from mandapa.errors import MandapaError

__all__ = ["command"]

_NEEDED = {"torch": "torch", "sklearn": "scikit-learn", "yaml": "pyyaml"}


@click.command("demo")
@click.option("--epochs", type=click.IntRange(4, 1000), default=8, show_default=True, help="How long to train.")
@common
@pass_session
def command(session: Session, epochs: int) -> None:
    """Train, kill, resume, look, check, restore. A real training run of half a minute.

    Needs the extra 'demo' and no network. Writes the repository ./.mandapa (or --repo) and the folder ./demo-out. Each
    call is a new run, and adds its versions to the artifact 'digits'.
    """
    from importlib.util import find_spec

    if missing := [package for module, package in _NEEDED.items() if find_spec(module) is None]:
        raise MandapaError(
            f"the demo trains with {', '.join(_NEEDED.values())}; missing: {', '.join(missing)}. "
            "Install them with: pip install 'mandapa[demo]'  (in a checkout: make demo)"
        )
    from mandapa.cli.demo.story import Story

    # MANDAPA_REPO may well be a team's bucket: no place to play in, unless --repo says so.
    program = click.get_current_context().find_root().command

    def run(arguments: list[str]) -> int:
        return int(program.main(arguments, prog_name="mandapa", standalone_mode=False) or 0)

    story = Story(session.repo or EMBEDDED, "demo-out", epochs, run, quiet=session.json, embedded=session.repo is None)
    result = story.run()
    session.emit(result, str)
