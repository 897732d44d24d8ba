"""Assets to chunks in packs, and back: the only layer with threads. Every byte that comes out was verified."""
