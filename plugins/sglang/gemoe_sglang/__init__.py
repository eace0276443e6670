"""Exported folders under SGLang: `SGLANG_EXTERNAL_MODEL_PACKAGE=gemoe_sglang.models`.

NOT RUN: written from reading SGLang 0.5.23, whose wheels need CUDA. Tested is what needs no SGLang.
"""

__version__ = "0.2.0"
