"""Ranges of the numbers in a recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, FiniteFloat

Positive = Annotated[FiniteFloat, Field(gt=0)]
NonNegative = Annotated[FiniteFloat, Field(ge=0)]
Fraction = Annotated[FiniteFloat, Field(ge=0, le=1)]
Momentum = Annotated[FiniteFloat, Field(ge=0, lt=1)]
