"""Makers of the questions: each takes what an installed package ships, and gives the same rows in every run."""
