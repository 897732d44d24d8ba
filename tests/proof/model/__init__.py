"""An executable model of the commit protocol and of gc: small enough for hundreds of thousands of random histories.

``store`` is a store that loses, delays and refuses; ``log`` is how records are read and appended; ``writers`` and
``others`` are those who work there; ``world`` puts them together and says what must be true in the end. By hand, from
``tests/proof``: ``python -m model SEEDS [RULE,...] [FIRST]``, with rules of `model.world.RULES` switched off.
"""
