"""Plans of many notebook runs, executed by Snakemake, and the demo, which is such a plan.

Notebooks import nothing from this package.
"""
