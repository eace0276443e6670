"""Answer benchmarks on all ranks, with what a run trained, budgets, or a fixed k.

    gemoe benchmark answer RUN --tasks mmlu gsm8k               what the run trained
    gemoe benchmark answer RUN --tasks paper-vision --k 8 5     and the untouched model at fixed k
    gemoe benchmark answer RUN --tasks gsm8k --mean-k 3 4       at 3 and 4 experts on average
    gemoe benchmark answer RECIPE --tasks gsm8k --router score --mean-k 4 --out OUT   no training

Every routing has a folder in --out: answers.jsonl and routing.npz of every task. What is there
already stays: whenever this ends, the same command goes on, on any number of ranks. A signal ends
it between two blocks, with exit code 75. `gemoe benchmark score` scores the answers, without a
model. Runs alone or under any launcher; ranks share experts if parallel.ep_size says so.
"""

from __future__ import annotations

from gemoe_ds.cluster.stopping import StopRequest
from gemoe_ds.errors import exit_on_error
from gemoe_ds.evaluation.benchmarks.answer_arguments import answer_parser, find_run


def main(argv: list[str] | None = None, stop: StopRequest | None = None) -> None:
    if argv is None:  # signals are heeded before imports that take seconds
        stop = StopRequest().listen()
    arguments = answer_parser(__doc__).parse_or_exit(argv)
    with exit_on_error():
        from gemoe_ds.engine.adopt_launcher import adopt_launcher

        start = adopt_launcher()
        find_run(arguments)
        from gemoe_ds.evaluation.benchmarks.answer_modes import answer_all, task_options
        from gemoe_ds.evaluation.benchmarks.load_tasks import load_tasks, resolve, without_examples
        from gemoe_ds.evaluation.benchmarks.needs import unmet_needs

        if start.rank == 0:
            leaves = [one.leaf for one in resolve(arguments.tasks)]
            for need in unmet_needs(leaves, may_run_code=False, judge=None):
                print(f"note: {need} to `gemoe benchmark score`", flush=True)
        options = task_options(arguments)
        tasks = load_tasks(arguments.tasks, options)
        if (note := without_examples(tasks, options)) and start.rank == 0:
            print(f"note: {note}", flush=True)
        words = arguments.calibrate_tasks
        known = load_tasks(words, options) if words else []
        answer_all(arguments, tasks, known, options.style, stop)


if __name__ == "__main__":
    main()
