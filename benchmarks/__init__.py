"""Side-by-side measurements: `python -m benchmarks --help`.

Every benchmark is one module with one Typer command. It builds contenders, lets `timing.compare` check that their results
agree before anything is timed, and puts one `record.Row` per contender and shape into a `record.Record`, which prints the
table and writes the JSON under `benchmarks/results/`.
"""
