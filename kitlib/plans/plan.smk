# The engine's side of a plan: one rule a run, as kitlib.plans.engine has written them into the configuration.
localrules: all


rule all:
    input:
        config["targets"],


for run in config["runs"]:

    rule:
        name: run["rule"]
        input: run["input"]
        output: run["mark"]
        threads: run["threads"]
        resources: **run["resources"]
        retries: config["retries"]
        params: command=run["command"]
        shell: "{params.command}"
