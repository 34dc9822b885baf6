"""Benchmark: what a step takes."""

from matkv.benchmark.attention import AttentionCase, attention_benchmark
from matkv.benchmark.decode import BenchmarkConfig, benchmark

__all__ = ["AttentionCase", "BenchmarkConfig", "attention_benchmark", "benchmark"]
