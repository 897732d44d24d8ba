"""Where a file is cut into chunks. Only efficiency depends on it: whatever the cuts, the bytes come back exactly.

`Cutter` yields the chunks of a source; `structured_cuts` and `growing_cuts` are the decisions behind it, without
side effects. A file is cut

* at its tensors, each in pieces of 4 MiB counted from its own start, where its format says where they are
  (safetensors; torch and NumPy zip archives; several of these zips back to back, as torch.distributed.checkpoint
  writes them): equal tensors make equal chunks wherever they stand. Nothing is ever unpickled;
* where it ended before, when it has only grown;
* not at all up to 1 MiB, and by FastCDC above, in all other cases, a wrong or hostile header included.

Source: docs/format.md.
"""

from mandapa.content.cutters.cutter import Cutter
from mandapa.content.cutters.growing import growing_cuts
from mandapa.content.cutters.source import BytesSource, FileSource, Source, StartSource
from mandapa.content.cutters.structured import structured_cuts

__all__ = ["BytesSource", "Cutter", "FileSource", "Source", "StartSource", "growing_cuts", "structured_cuts"]
