"""The project's own runs: the demo, the comparison of methods, models at their true size."""

from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
RECIPES = Path("experiments/recipes")
