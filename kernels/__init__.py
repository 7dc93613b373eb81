"""Numbers and device code. A kernel knows nothing of graphs.

`format` is the byte layout, `reference` the definition of every rule, `philox` the random numbers, `ops` the operators that rewritten
graphs call; `cpu` and `triton_kernels` are their implementations.
"""
