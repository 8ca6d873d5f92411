"""Plans of many notebook runs, carried out by Snakemake, and the demo, which is one.

Nothing that a notebook imports.
"""
