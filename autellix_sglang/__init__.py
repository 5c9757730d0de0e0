"""SGLang with the agent program, not the request, as the unit of scheduling."""

__version__ = "0.1.0"
