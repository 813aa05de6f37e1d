"""edgebuild: a model compiler for the edge.

The journey of a deliverable, module by module:

    load      targets/NAME.yaml, checked           -> Target
    plan      Target, platform, backend            -> Steps (frozen data, each with a recipe); across targets: agreements
    tasks     Steps                                -> doit tasks; doit orders, selects, threads
    fresh     is this step's receipt still true?   -> skip
    run       key -> record in the store: restore  -> else a worker process, then publish
    worker    one action record: source, assess, backends, quality, bench, gates, bundle
    ladder    recipes, until the gates hold        -> choose:NAME, where quantize.method is auto
    evidence  what was measured, judged, packed    -> dist/NAME, dist/NAME.tar, dist/NAME.evidence.json

Where a model comes from is in source, with hub and download behind it; one file for many targets in matrix. Which framework it
gets is in select (the rows) and fit (what of them is possible).

Which interpreter a worker runs in: toolchain (the lock), environment (where it lies), install (makes one), provide (for a build).

What waits for what: twins (the same work for several targets), machinelock (for a measurement), heavy and reserve (for memory).

Beside a build, each a command: explain; plan (preview, over forecast and feasible); assess
(assessment, with facts and peek); recommend; verify (and fsck for the store); gc and du
(over inventory and roots); doctor (with accelerators and resources); toolchain (equip); completion; init.
"""

__version__ = "0.1.0"
