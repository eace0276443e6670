"""The contest: every way to spend fewer experts, on the demo's models, under the same rules.

grid       what competes: rows, knobs, budgets, trials (experiments/grids/contest.yaml)
jobs       the runs that this takes, as commands
pool       runs them side by side and keeps every result as it ends
trials     chooses the settings of every row on the validation split
answers    what the runs have left: points, with right or wrong of every question
standings  accuracy at a mean k, differences, intervals
verdict    sentences that follow from the standings, whoever wins
report, plot
"""
