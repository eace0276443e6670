"""The paper's benchmarks, by the stock harnesses: `answer` on all ranks, `score` without a model.

    OUT/MODE/mode.json              what routes: `Mode` of analysis/benchmarks/files.py
    OUT/MODE/budget.json            of a budget: the numbers of the routers that meet it
    OUT/MODE/parts/                 parts.py: what ranks have answered, until all is
    OUT/MODE/TASK/asked.json        what the task asks: harness, counts, choices, a fingerprint
    OUT/MODE/TASK/answers.jsonl     one `Answer` a line
    OUT/MODE/TASK/routing.npz       analysis/routing_sums.py: sums over tokens, a row a document
    OUT/MODE/TASK/shown.jsonl       optional: some answers, `ShownAnswer` of that file
    OUT/MODE/TASK/scores.json       what the stock evaluator says; scored.npz: document by document

MODE is the folder of a `RoutingMode` (trained, k_8, mean_k_4, ...), TASK a leaf (mmlu_anatomy).
"""
