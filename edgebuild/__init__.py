"""edgebuild: a model compiler for the edge.

The journey of a deliverable, module by module:

    load      targets/NAME.yaml, checked           -> Target
    plan      Target, platform, backend            -> Steps (frozen data, each with a recipe)
    tasks     Steps                                -> doit tasks; doit orders, selects, threads
    fresh     is this step's receipt still true?   -> skip
    run       key -> record in the store: restore  -> else a worker process, then publish
    worker    one action record: source, assess, backends, quality, bench, gates, bundle
    evidence  what was measured, judged, packed    -> dist/NAME, dist/NAME.tar, dist/NAME.evidence.json
"""

__version__ = "0.1.0"
