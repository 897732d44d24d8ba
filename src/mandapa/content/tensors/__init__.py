"""Tensors of files: which there are, where their bytes stand, their values, and by how much two of them differ.

`tensors_of` reads structure only, `read_tensors` values, by ranges. Nothing is ever unpickled.
"""

from mandapa.content.tensors.structure import Structure, TensorPlace, read_structure, tensors_of

__all__ = ["Structure", "TensorPlace", "read_structure", "tensors_of"]
