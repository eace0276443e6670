"""The columns of the paper's tables, and the tasks of the harnesses that fill them."""

from __future__ import annotations

from dataclasses import dataclass

from gemoe_ds.analysis.benchmarks.files import Scores

_MMLU = tuple(
    f"mmlu_{name}"
    for name in """
    abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology
    college_chemistry college_computer_science college_mathematics college_medicine
    college_physics computer_security conceptual_physics econometrics electrical_engineering
    elementary_mathematics formal_logic global_facts high_school_biology high_school_chemistry
    high_school_computer_science high_school_european_history high_school_geography
    high_school_government_and_politics high_school_macroeconomics high_school_mathematics
    high_school_microeconomics high_school_physics high_school_psychology high_school_statistics
    high_school_us_history high_school_world_history human_aging human_sexuality
    international_law jurisprudence logical_fallacies machine_learning management marketing
    medical_genetics miscellaneous moral_disputes moral_scenarios nutrition philosophy
    prehistory professional_accounting professional_law professional_medicine
    professional_psychology public_relations security_studies sociology us_foreign_policy
    virology world_religions
    """.split()
)
_BBH = tuple(
    f"bbh_cot_fewshot_{name}"
    for name in """
    boolean_expressions causal_judgement date_understanding disambiguation_qa dyck_languages
    formal_fallacies geometric_shapes hyperbaton logical_deduction_five_objects
    logical_deduction_seven_objects logical_deduction_three_objects movie_recommendation
    multistep_arithmetic_two navigate object_counting penguins_in_a_table
    reasoning_about_colored_objects ruin_names salient_translation_error_detection snarks
    sports_understanding temporal_sequences tracking_shuffled_objects_five_objects
    tracking_shuffled_objects_seven_objects tracking_shuffled_objects_three_objects web_of_lies
    word_sorting
    """.split()
)


@dataclass(frozen=True)
class Column:
    """A benchmark: a task of its own, or a group of `leaves`."""

    heading: str  # as the paper has it
    task: str
    metrics: tuple[str, ...]  # the stock keys; several are added up
    scale: float = 100.0  # what makes percent of them
    parts: tuple[str, ...] = ()  # what several metrics are called; no percent, so in no average
    leaves: tuple[str, ...] = ()
    # Whether the score may be a mean over documents: F1 is none, MMBench's turns belong together.
    is_mean: bool = True

    @property
    def headings(self) -> tuple[str, ...]:
        """What is printed: the parts by themselves, too."""
        if not self.parts:
            return (self.heading,)
        return (*(f"{self.heading} {part}" for part in self.parts), f"{self.heading} sum")

    def has(self, task: str) -> bool:
        return task in (self.leaves or (self.task,))

    def values(self, scores: Scores) -> tuple[float, ...]:
        """One for each of `headings`."""
        found = tuple(self.scale * scores.metric(key) for key in self.metrics)
        return (*found, sum(found)) if self.parts else found


VISION = (
    Column("MMB", "mmbench_en_dev_static", ("gpt_eval_score,none",), 1.0, is_mean=False),
    Column("POPE", "pope", ("pope_f1_score,none",), is_mean=False),
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
    Column("MMLU", "mmlu", ("acc,none",), leaves=_MMLU),
    Column("BigBench", "bbh_cot_fewshot", ("exact_match,get-answer",), leaves=_BBH),
    Column("GSM-8K", "gsm8k", ("exact_match,strict-match",)),
    Column("HumanEval", "humaneval", ("pass@1,create_test",)),
)
COLUMNS = VISION + MORE + LANGUAGE
