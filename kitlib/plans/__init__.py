"""Plans of many notebook runs, executed by Snakemake, and the demo, which is such a plan.

Does not belong here: anything that a notebook imports.
"""
