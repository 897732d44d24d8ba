"""``python -m mandapa.cli``: the same as ``mandapa``."""

from mandapa.cli import main

main(prog_name="mandapa")
