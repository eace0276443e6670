"""Reads what evaluations leave behind: tables, figures and the report; never a model."""
