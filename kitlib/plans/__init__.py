"""Plans: descriptions of many notebook runs, which Snakemake executes. The demo is such a plan.

Does not belong here: anything that a notebook imports.
"""
