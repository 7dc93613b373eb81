"""How Inductor compiles the products: as its own matrix products, with libraries and templates to choose from and epilogues fused.

Importing this package registers the lowerings: `values` for products of bfloat16 values, `packed` for those of codes and scales, `rows` for
the moving of rows. Inductor compiles everything else as calls of operators: a quantizer has several results, which templates cannot have.
"""

from quartet_compile.kernels.lowerings import packed, rows, values

__all__ = ["packed", "rows", "values"]
