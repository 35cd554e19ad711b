"""What compiled GPU kernels execute, counted on a machine without a GPU: ``make gpu-counts``.

``rows`` has the layers, ``count`` compiles what they launch and counts it, ``sass`` reads machine code, ``pipes`` and
``steps`` say what an SM does with it, ``simulate`` lets warps run through it, ``known`` compares that with kernels
whose speed was published. Nothing here is a measurement.
"""
