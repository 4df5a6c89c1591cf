"""shoal.converters: checkpoints become bundles, on a workstation. Nothing here is needed to run one.

`shoal.convert` is the way in; the names below are modules: `convert`, `recipe`, `report`, `sources`.
"""
