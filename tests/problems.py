"""The package's random problems."""

from coba_triton.problems import DT, LEARNABLE, VALUES, Problem, RecurrentProblem, problem, recurrent_problem

__all__ = ["DT", "LEARNABLE", "VALUES", "Problem", "RecurrentProblem", "problem", "recurrent_problem"]
