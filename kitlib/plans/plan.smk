# Snakemake's rules for a plan: one rule for each run, from the configuration that kitlib.plans.engine writes.
localrules: all


rule all:
    input:
        config["targets"],


for run in config["runs"]:

    rule:
        name: run["rule"]
        input: run["input"]
        output: run["done_file"]
        threads: run["threads"]
        resources: **run["resources"]
        retries: config["retries"]
        params: command=run["command"]
        shell: "{params.command}"
