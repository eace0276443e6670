"""The columns of the paper's tables, and the tasks of the harnesses that fill them."""

from __future__ import annotations

from dataclasses import dataclass

from gemoe_ds.analysis.benchmarks.files import Scores


@dataclass(frozen=True)
class Column:
    """A benchmark. `task`: itself, or the group whose leaves begin with its name."""

    heading: str  # as the paper has it
    task: str
    metrics: tuple[str, ...]  # the stock keys; several are added up
    scale: float = 100.0  # what makes percent of them
    parts: tuple[str, ...] = ()  # what several metrics are called; no percent, so in no average

    @property
    def headings(self) -> tuple[str, ...]:
        """What is printed: the parts by themselves, too."""
        if not self.parts:
            return (self.heading,)
        return (*(f"{self.heading} {part}" for part in self.parts), f"{self.heading} sum")

    def has(self, task: str) -> bool:
        return task == self.task or task.startswith(f"{self.task}_")

    def values(self, scores: Scores) -> tuple[float, ...]:
        """One for each of `headings`."""
        found = tuple(self.scale * scores.metric(key) for key in self.metrics)
        return (*found, sum(found)) if self.parts else found


VISION = (
    Column("MMB", "mmbench_en_dev_static", ("gpt_eval_score,none",), 1.0),
    Column("POPE", "pope", ("pope_f1_score,none",)),
    Column("SQA-I", "scienceqa_img", ("exact_match,none",)),
    Column("VQA-T", "textvqa_val", ("exact_match,none",)),
    Column("GQA", "gqa", ("exact_match,none",)),
    Column("MM-Vet", "mmvet", ("gpt_eval_score,none",), 1.0),
)
MORE = (
    Column("MMMU", "mmmu_val", ("mmmu_acc,none",)),
    Column("AI2D", "ai2d", ("exact_match,flexible-extract",)),
    Column("InfoVQA", "infovqa_val", ("anls,none",)),
    Column("MMStar", "mmstar", ("average,none",)),
    Column("RealWorldQA", "realworldqa", ("exact_match,none",)),
    Column("OCRBench", "ocrbench", ("ocrbench_accuracy,none",)),
    Column("VQAv2", "vqav2_val", ("exact_match,none",)),
    Column(
        "MME",
        "mme",
        ("mme_perception_score,none", "mme_cognition_score,none"),
        1.0,
        ("perception", "cognition"),
    ),
)
LANGUAGE = (
    Column("MMLU", "mmlu", ("acc,none",)),
    Column("BigBench", "bbh_cot_fewshot", ("exact_match,get-answer",)),
    Column("GSM-8K", "gsm8k", ("exact_match,strict-match",)),
    Column("HumanEval", "humaneval", ("pass@1,create_test",)),
)
COLUMNS = VISION + MORE + LANGUAGE
