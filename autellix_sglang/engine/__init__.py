"""The adapter to SGLang: everything here may import sglang and torch."""
